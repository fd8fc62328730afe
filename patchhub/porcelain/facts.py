"""Facts of a set, in words. Reads JSON only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeAlias

from patchhub.objects import Element, Request
from patchhub.porcelain.shards import active_shards, without_shards
from patchhub.store.lookup import patches_ever_whole
from patchhub.store.repository import Repository

Place: TypeAlias = tuple[str, str | None]
"""Where a fact is kept: (patch id, request id). For a column that is its element; a shard's element is (patch id, None)."""


def active_requests(repository: Repository, elements: Iterable[Element]) -> dict[Place, Request]:
    """The request at each place of a set: its columns and all that its shards hold, in order of patch and request id.

    Additive patches and withheld texts have none. A fact that two shards hold is there twice.
    """
    wanted: dict[str, set[str]] = {}
    for patch, request in elements:
        if request is not None:
            wanted.setdefault(patch, set()).add(request)
        elif repository.patch(patch).kind == "shard":
            wanted[patch] = set(repository.patch(patch).requests)
    return {
        (patch, request.id): request
        for patch, requests in sorted(wanted.items())
        for request in sorted(repository.requests(repository.patch(patch)), key=lambda request: request.id)
        if request.id in requests
    }


def places_of(repository: Repository, elements: Iterable[Element]) -> frozenset[Place]:
    """Every place of a set, also those of withheld texts; an additive patch has its element alone."""
    elements = frozenset(elements)
    return without_shards(repository, elements) | shard_places(repository, elements)


def shard_places(repository: Repository, elements: Iterable[Element]) -> frozenset[Place]:
    """The places of a set that are in shards."""
    shards = active_shards(repository, elements)
    return frozenset((shard, fact) for shard, patch in shards.items() for fact in patch.requests)


def distinct(requests: Mapping[Place, Request]) -> tuple[Request, ...]:
    """Each request once, in the order of its first place."""
    return tuple({request.id: request for request in requests.values()}.values())


def imports_of(repository: Repository) -> frozenset[Element]:
    """The elements of all imported changes that were ever active: they hold no facts, and the index counts each as one."""
    return frozenset(
        (patch, None) for patch in patches_ever_whole(repository) if repository.patch(patch).kind == "additive"
    )


def count_changed(repository: Repository, removed: frozenset[Element], added: frozenset[Element]) -> tuple[int, int]:
    """How many facts a change of elements takes out and puts in, counted as `left_and_entered` lists them."""
    out, into = ({request for _, request in shard_places(repository, side)} for side in (removed, added))
    columns = [len(without_shards(repository, side)) for side in (removed, added)]
    return columns[0] + len(out - into), columns[1] + len(into - out)


def left_and_entered(
    repository: Repository, before: frozenset[Element], after: frozenset[Element]
) -> tuple[tuple[Request, ...], tuple[Request, ...]]:
    """The facts whose columns left a set or came into it, and those that its shards forgot or took in.

    A column that takes another's place counts on both sides; a shard that takes another's place counts with the facts that only one
    of the two holds.
    """
    return _beyond(repository, before, after), _beyond(repository, after, before)


def _beyond(repository: Repository, one: frozenset[Element], other: frozenset[Element]) -> tuple[Request, ...]:
    """Facts of columns that the other set has not, and of shards that none of the other's shards holds."""
    held = {request for _, request in shard_places(repository, other)}
    texts = active_requests(repository, one - other)
    return distinct({place: text for place, text in texts.items() if place in one or place[1] not in held})
