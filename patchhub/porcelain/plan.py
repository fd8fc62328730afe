"""What a batch of facts changes about the active set, decided before any model is loaded. Reads JSON only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from patchhub.editing.requests import Batch, contradiction_error, find_contradictions
from patchhub.errors import RequestError
from patchhub.objects import Element, Request
from patchhub.porcelain.facts import Place, active_requests, places_of
from patchhub.store.repository import Repository

OnConflict = Literal["refuse", "replace", "keep"]


@dataclass(frozen=True)
class Plan:
    """What a batch changes about the active set.

    Attributes:
        parent: the commit at HEAD; None before any.
        requests: the facts to write.
        kept: HEAD's elements without the columns of replaced facts.
        replaced: the facts that go, because a fact of the batch says otherwise.
        shrunk: per kept shard, the ids of the replaced facts that it holds.
        already_active: facts of the batch that are left out.
    """

    parent: str | None
    requests: tuple[Request, ...]
    kept: frozenset[Element]
    replaced: Mapping[Place, Request]
    shrunk: Mapping[str, frozenset[str]]
    already_active: int


def plan_batch(repository: Repository, batch: Batch, on_conflict: OnConflict) -> Plan:
    """What committing ``batch`` on HEAD would change.

    Raises:
        RequestError: every fact is active already.
        ContradictionError: two facts of the batch contradict each other, or one contradicts an active one under "refuse".
    """
    _, parent = repository.head
    elements = repository.active(parent)
    active = active_requests(repository, elements)
    here = {request for _, request in places_of(repository, elements)}
    new = tuple(request for request in batch.requests if request.id not in here)
    if not new:
        raise RequestError(
            "every one of these facts is active already, so there is nothing to commit",
            remedy="See `patchhub status`; to write a fact again, revert it first.",
        )
    replaced: dict[Place, Request] = {}
    if on_conflict != "keep":
        if inner := find_contradictions(new):
            raise contradiction_error(inner, active=False)
        outer = find_contradictions(new, active.values())
        if outer and on_conflict == "refuse":
            raise contradiction_error(outer, active=True)
        asked = {(request.prompt, request.subject) for request in new}
        replaced = {place: request for place, request in active.items() if (request.prompt, request.subject) in asked}
    shards = {patch for patch, _ in replaced.keys() - elements}
    shrunk = {
        shard: frozenset(r.id for (patch, _), r in replaced.items() if patch == shard) for shard in sorted(shards)
    }
    already = len(batch.requests) - len(new)
    return Plan(parent, new, elements - replaced.keys(), replaced, shrunk, already)
