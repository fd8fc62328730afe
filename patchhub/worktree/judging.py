"""The judge of a commit: the guard's checks, with the model in memory or without one. No torch unless the model is asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from patchhub.evaluation.guard import Measured
from patchhub.objects import Commit, Request
from patchhub.progress import Progress
from patchhub.sets.commits import Judge
from patchhub.sets.guard import Prepared, decided, from_vectors, prepared
from patchhub.store.store import Store

if TYPE_CHECKING:
    from patchhub.worktree.opening import Opened


@dataclass(frozen=True)
class Guarding:
    """How a verb that works on stored vectors is guarded.

    Attributes:
        force: write what fails all the same, and say so in the commit.
        check: ask the model too.
    """

    force: bool = False
    check: bool = False

    def judge(
        self, repository: Store, progress: Progress, *, facts: int | None = None, remedy: str | None = None
    ) -> Judge:
        """The judge of one commit of a repository; ``facts`` and ``remedy`` are as in `decided`."""

        def look(commit: Commit) -> Mapping[str, Any]:
            found = prepared(repository, commit)
            measured = _ask_model(repository, found, progress) if self.check else from_vectors(repository, found)
            return decided(repository, measured, force=self.force, facts=facts, remedy=remedy)

        return look


GUARDED: Final = Guarding()
"""Stored vectors and the cast alone; what fails is refused."""


def judge_edit(
    repository: Store, opened: Opened, requests: Sequence[Request], progress: Progress, *, force: bool
) -> Judge:
    """The judge of a commit of new facts, with the model that they were written with."""

    def look(commit: Commit) -> Mapping[str, Any]:
        from patchhub.worktree.guard import from_model

        progress.stage("checking", 0)
        measured = from_model(repository, opened, prepared(repository, commit), requests)
        _warn(measured, progress)
        return decided(repository, measured, force=force)

    return look


def _ask_model(repository: Store, found: Prepared, progress: Progress) -> Measured:
    """All checks, with the base loaded for them."""
    from patchhub.models.architectures import describe, read_config
    from patchhub.sets.elements import active_requests
    from patchhub.worktree.guard import Budget, from_model
    from patchhub.worktree.loading import open_base
    from patchhub.worktree.opening import open_model

    progress.stage("loading the base", 0)
    checkpoint = open_base(repository)
    opened = open_model(repository, checkpoint, describe(read_config(checkpoint.folder)), [], {})
    requests = {request.id: request for request in active_requests(repository, found.commit.added).values()}
    progress.stage("checking", 0)
    measured = from_model(repository, opened, found, list(requests.values()), Budget())
    _warn(measured, progress)
    progress.close()
    return measured


def _warn(measured: Measured, progress: Progress) -> None:
    if measured.first_token:
        facts = "1 subject ends" if measured.first_token == 1 else f"{measured.first_token} subjects end"
        progress.warn(
            f"{facts} at the first token of the prompt, where the keys of all texts are alike: such an edit reaches unrelated "
            "text; put words before the subject"
        )
