"""Requests of a set, in words. Reads JSON only."""

from __future__ import annotations

from collections.abc import Iterable

from patchhub.objects import Element, Request
from patchhub.store.repository import Repository


def active_requests(repository: Repository, elements: Iterable[Element]) -> dict[Element, Request]:
    """The request of each element, in the set's order. Whole patches and withheld texts have none."""
    wanted: dict[str, set[str]] = {}
    for patch, request in elements:
        if request is not None:
            wanted.setdefault(patch, set()).add(request)
    return {
        (patch, request.id): request
        for patch, requests in sorted(wanted.items())
        for request in sorted(repository.requests(repository.patch(patch)), key=lambda request: request.id)
        if request.id in requests
    }
