"""What active columns were recorded on and with: staleness, the metric, and what `refresh` put in their place. Reads JSON only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from patchhub.errors import EditError
from patchhub.objects import EMPTY_SET, Element, set_digest
from patchhub.porcelain.shards import without_shards
from patchhub.store.repository import Repository


def stale_requests(repository: Repository, elements: frozenset[Element]) -> int:
    """How many columns of a set were recorded on a state that is not part of the set."""
    patches = [patch for patch, request in elements if request is not None]
    stale = {patch for patch in set(patches) if is_stale(repository, patch, elements)}
    return sum(patch in stale for patch in patches)


def is_stale(repository: Repository, patch: str, elements: frozenset[Element]) -> bool:
    """Whether a patch was recorded on a state that is not part of a set, or that no commit here tells."""
    below = _recorded_on(repository, patch)
    return below is None or not below <= elements


def one_metric(repository: Repository, elements: Iterable[Element]) -> str | None:
    """The metric of all columns of a set; None where nothing in it has one.

    Raises:
        EditError: they are of more than one, so nothing solves them together.
    """
    metrics = {repository.patch(patch).metric for patch in {patch for patch, _ in elements}} - {None}
    if len(metrics) > 1:
        listed = sorted(str(metric) for metric in metrics)
        raise EditError(
            f"the facts are recorded with different metrics ({', '.join(metric[:12] for metric in listed)})",
            remedy="Write one side's facts again on the other with `patchhub commit`; columns of two metrics do not mix.",
            metrics=listed,
        )
    return next(iter(metrics), None)


def _recorded_on(repository: Repository, identity: str) -> frozenset[Element] | None:
    """The set that a patch was recorded on: that of a commit, or what the commit that brought the patch left of its parent's."""
    made_on = repository.patch(identity).made_on
    if made_on in (None, EMPTY_SET):
        return frozenset()
    known = repository.set_of(made_on)
    brought = (c for c, patch, sign in _changes(repository, identity) if sign > 0 and patch == identity)
    left = (without_shards(repository, repository.active(c) - repository.commit(c).added) for c in brought)
    return next((below for below in left if set_digest(below) == made_on), None) if known is None else known


def _changes(repository: Repository, identity: str) -> list[tuple[str, str, int]]:
    requests = repository.patch(identity).requests
    return repository.changes_of(requests[0]) if requests else []


def recorded_again(repository: Repository, gone: frozenset[Element], active: frozenset[Element]) -> frozenset[Element]:
    """The active elements that `refresh` put in the place of some that are not active any more."""
    requests = {request for _, request in gone}
    return frozenset(
        (patch, request)
        for patch, request in active
        if request in requests and any((earlier, request) in gone for earlier in _refreshed(repository, patch))
    )


def _refreshed(repository: Repository, identity: str) -> Iterator[str]:
    """The patches whose columns a patch holds anew, as far back as this store has them."""
    if identity not in repository.objects:
        return
    for earlier in repository.patch(identity).settings.get("refreshes", ()):
        yield earlier
        yield from _refreshed(repository, earlier)
