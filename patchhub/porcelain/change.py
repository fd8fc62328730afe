"""Verbs that change the active set without a model: `revert`. NumPy only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from patchhub.errors import ContradictionError, RepositoryError, RevisionError
from patchhub.objects import EMPTY_SET, Element, Request
from patchhub.porcelain.facts import active_requests
from patchhub.porcelain.snapshot import Draft, Stamp, snapshot
from patchhub.store.repository import Repository


@dataclass(frozen=True)
class Reverted:
    """What `revert` did.

    Attributes:
        commit: the new commit.
        removed, restored: facts that are no longer active, and that are active again.
        skipped: facts that were gone or back already.
        same_as: the earlier commit whose weights these are bit for bit, if the set was seen before.
        stale: active facts that were recorded on a state that is no longer below them.
        proof: the largest relative residual of the joint solution over the weights.
    """

    commit: str
    removed: tuple[Request, ...]
    restored: tuple[Request, ...]
    skipped: tuple[Request, ...]
    same_as: str | None
    stale: int
    proof: float

    def to_json(self) -> dict[str, Any]:
        lists = {"removed": self.removed, "restored": self.restored, "skipped": self.skipped}
        return {
            "commit": self.commit,
            **{name: [request.id for request in requests] for name, requests in lists.items()},
            "same_as": self.same_as,
            "stale": self.stale,
            "proof": self.proof,
        }


def revert(repository: Repository, revision: str, stamp: Stamp) -> Reverted:
    """Undo what a commit changed against its first parent, wherever it is in history, as a new commit on HEAD.

    Raises:
        RevisionError: no such commit, or nothing of it is left to revert.
        ContradictionError: a fact that would come back contradicts one that is active now.
    """
    identity = repository.resolve(revision)
    if identity is None:
        raise RevisionError(f"{revision} is the unpatched model; there is nothing to revert", remedy="Name a commit.")
    target = repository.commit(identity)
    message = stamp.message or f"Revert “{target.message.splitlines()[0] if target.message else identity[:12]}”"
    return _change_set(
        repository,
        remove=target.added,
        restore=target.removed,
        stamp=Stamp(stamp.author, stamp.time, message),
        command="revert",
        arguments={"commit": identity},
    )


def stale_requests(repository: Repository, elements: frozenset[Element]) -> int:
    """How many columns of a set were recorded on a state that is not part of the set."""
    stale = 0
    for patch in {patch for patch, _ in elements}:
        made_on = repository.patch(patch).made_on
        below = repository.set_of(made_on) if made_on not in (None, EMPTY_SET) else frozenset()
        if below is None or not below <= elements:
            stale += sum(1 for found, _ in elements if found == patch)
    return stale


def _change_set(
    repository: Repository,
    *,
    remove: Iterable[Element],
    restore: Iterable[Element],
    stamp: Stamp,
    command: str,
    arguments: Mapping[str, Any],
) -> Reverted:
    _, head = repository.head
    before = repository.active(head)
    present = {request for _, request in before if request is not None}
    removed = frozenset(remove) & before
    restored = frozenset(e for e in restore if e not in before and e[1] not in present - {r for _, r in removed})
    skipped = (frozenset(remove) - removed) | (frozenset(restore) - restored)
    after = (before - removed) | restored
    if after == before:
        raise RevisionError(
            "nothing of this commit is left to revert: its facts are gone or back already",
            remedy="See `patchhub status` for what is active.",
        )
    if head is None:
        raise RepositoryError("there is no commit yet", remedy="Commit some facts first.")
    _refuse_contradictions(repository, before - removed, restored)
    metric = repository.commit(head).metric
    identity = snapshot(repository, Draft((head,), after, metric, command, arguments), stamp)
    commit = repository.commit(identity)
    proofs = [float(value) for value in commit.check["proof"].values()]
    return Reverted(
        identity,
        tuple(active_requests(repository, removed).values()),
        tuple(active_requests(repository, restored).values()),
        tuple(active_requests(repository, skipped).values()),
        commit.same_as,
        stale_requests(repository, after),
        max(proofs, default=0.0),
    )


def _refuse_contradictions(repository: Repository, staying: frozenset[Element], restored: frozenset[Element]) -> None:
    active = {(r.prompt, r.subject): r for r in active_requests(repository, staying).values()}
    for request in active_requests(repository, restored).values():
        other = active.get((request.prompt, request.subject))
        if other is not None:
            raise ContradictionError(
                f"'{request.text}' would be '{request.target_new}' again, but '{other.target_new}' is active",
                remedy="Revert the commit that wrote the active fact first.",
                restored=request.id,
                active=other.id,
            )
