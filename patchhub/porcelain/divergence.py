"""How far a branch and the remotes' branches of its name have come apart, from the local store alone. No torch, no NumPy."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from patchhub.store import graph
from patchhub.store.repository import Repository
from patchhub.store.revisions import REMOTES


@dataclass(frozen=True)
class Divergence:
    """A branch beside a remote's branch of its name, as that was when it was last fetched or pushed.

    Attributes:
        branch: the remote's, as ``origin/main``.
        ahead: commits of the branch here that the remote's does not have.
        behind: commits of the remote's that the branch here does not have.
    """

    branch: str
    ahead: int
    behind: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def divergences(repository: Repository) -> tuple[Divergence, ...]:
    """One for each remote that has a branch of the current branch's name, by name of the remote; none where HEAD is detached."""
    branch, head = repository.head
    here = [] if head is None else [head]
    return tuple(
        Divergence(ref[len(REMOTES) :], *graph.apart(here, [target], repository.parents, repository.rank))
        for ref, target in sorted(repository.refs().items())
        if ref.startswith(REMOTES) and ref[len(REMOTES) :].partition("/")[2] == branch
    )
