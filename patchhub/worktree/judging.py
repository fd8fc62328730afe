"""The judge of a commit: the guard's checks, with the model in memory or without one. No torch unless the model is asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from patchhub.objects import Commit, Request
from patchhub.progress import Progress
from patchhub.sets.guard import decided, from_vectors, prepared
from patchhub.store.store import Store

if TYPE_CHECKING:
    from patchhub.sets.commits import Sentence
    from patchhub.worktree.opening import Worktree


@dataclass(frozen=True)
class Guarding:
    """How a verb is guarded.

    Attributes:
        force: write what fails all the same, and say so in the commit.
        check: ask the model too, where the verb does not have it in memory anyway.
        all: refuse as soon as one new fact does not hold, runs on, or is said of another subject.
    """

    force: bool = False
    check: bool = False
    all: bool = False


GUARDED: Final = Guarding()
"""What fails is refused; a verb that needs no model asks stored vectors and the cast alone."""


def judge(
    repository: Store,
    commit: Commit,
    progress: Progress,
    guarding: Guarding = GUARDED,
    *,
    tree: Worktree | None = None,
    written: Sequence[Request] = (),
    sentences: Sequence[Sentence] = (),
    facts: int | None = None,
    remedy: str | None = None,
) -> Commit:
    """A prepared commit with what the guard found in its ``check``. Every verb that commits ends here.

    Args:
        tree: the model that the change was made with, which is asked; None: the model is asked only under ``guarding.check``, opened for
            that in the repository's chat form, device, type and quantisation.
        written: new facts, which the model must hold.
        sentences: what it said of their subjects before.
        facts: the commit may drift as much as so many new facts; None: as those that it brings.
        remedy: what to do about a refusal, where that is not a matter of how facts are written.

    Raises:
        GuardError: a check failed, without ``guarding.force``; nothing was written.
        BaseError: the base is missing or changed, where the model is asked.
    """
    found = prepared(repository, commit)
    if tree is None and not guarding.check:
        measured = from_vectors(repository, found)
    else:
        from patchhub.worktree.guard import ask_model

        measured = ask_model(repository, found, progress, tree, written, facts, sentences)
        if measured.first_token:
            subjects = "1 subject ends" if measured.first_token == 1 else f"{measured.first_token} subjects end"
            progress.warn(
                f"{subjects} at the first token of the prompt, where the keys of all texts are alike: such an edit reaches "
                "unrelated text; put words before the subject"
            )
    report = decided(repository, measured, force=guarding.force, all_facts=guarding.all, facts=facts, remedy=remedy)
    return replace(commit, check={**commit.check, **report})
