"""`squash`: several commits become one with the same active facts. NumPy only, no model.

The new commit is solved from the recorded columns against the commit below the squashed ones, so its weights are those of
the old tip to about 1e-6. The old commits stay in the operation log; `undo` brings them back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from patchhub.errors import RevisionError
from patchhub.porcelain.snapshot import Draft, Stamp, prepare
from patchhub.store import graph
from patchhub.store.repository import Repository
from patchhub.store.revisions import BRANCHES, HEAD


@dataclass(frozen=True)
class Squashed:
    """What `squash` did.

    Attributes:
        commit: the new commit.
        replaced: the commits that it stands for, newest first, along first parents.
        active: how many facts are active.
        proof: the largest relative residual of the joint solution over the weights.
    """

    commit: str
    replaced: tuple[str, ...]
    active: int
    proof: float

    def to_json(self) -> dict[str, Any]:
        return {"commit": self.commit, "replaced": list(self.replaced), "active": self.active, "proof": self.proof}


def squash(repository: Repository, span: str, stamp: Stamp) -> Squashed:
    """Replace the commits of `span` by one and move the current branch to it.

    Args:
        span: a number, the last so many commits along first parents; or ``FROM..TO``, those after FROM up to TO, which must be
            HEAD (or left out).
        stamp: without a message, the messages of the squashed commits are joined.

    Raises:
        RevisionError: the span is not at least two commits that end at HEAD.
    """
    branch, head = repository.head
    replaced, parent = _span(repository, span, head)
    message = stamp.message or "\n\n".join(repository.commit(commit).message for commit in reversed(replaced))
    tip = repository.commit(replaced[0])
    draft = Draft((parent,) if parent else (), repository.active(replaced[0]), tip.metric, "squash", {})
    commit = prepare(repository, draft, Stamp(stamp.author, stamp.time, message))
    identity = repository.objects.put(commit.to_json())
    repository.move_refs(
        {HEAD if branch is None else BRANCHES + branch: (replaced[0], identity)},
        command="squash",
        arguments={"commits": list(replaced)},
        author=stamp.author,
        time=stamp.time,
    )
    proofs = [float(value) for value in commit.check["proof"].values()]
    return Squashed(identity, tuple(replaced), repository.active_count(identity), max(proofs, default=0.0))


def _span(repository: Repository, span: str, head: str | None) -> tuple[Sequence[str], str | None]:
    """The commits to replace, newest first, and the one below them (None: they go down to the base)."""
    if head is None:
        raise RevisionError("there is no commit yet", remedy="Commit some facts first.")
    chain = graph.first_parents(head, repository.parents)
    if span.isdigit():
        found = list(islice(chain, int(span) + 1))
        commits, below = found[: int(span)], found[int(span) :]
        if len(commits) < int(span):
            raise RevisionError(
                f"HEAD has {len(commits)} commits along first parents, not {span}",
                remedy="Name fewer, or write `base..` for all of them.",
            )
        parent = below[0] if below else None
    else:
        parent = _below(repository, span, head)
        whole = list(chain)
        if parent is not None and parent not in whole:
            raise RevisionError(
                f"{span.partition('..')[0]} is not below HEAD along first parents",
                remedy="See `patchhub log --first-parent`.",
            )
        commits = whole[: whole.index(parent)] if parent is not None else whole
    if len(commits) < 2:
        raise RevisionError(f"{span} is not more than one commit", remedy="Name at least two commits to squash.")
    return commits, parent


def _below(repository: Repository, span: str, head: str) -> str | None:
    """FROM of ``FROM..TO``, after checking that TO is HEAD."""
    start, dots, end = span.partition("..")
    if not (start and dots):
        raise RevisionError(
            f"{span!r} is neither a number of commits nor FROM..TO", remedy="For example: patchhub squash 3 -m TEXT"
        )
    if end and repository.resolve(end) != head:
        raise RevisionError(
            f"{end} is not the commit at HEAD", remedy="Switch to it first; only the newest commits can be squashed."
        )
    return repository.resolve(start)
