"""The facts of a report: every request that its commits ever added or removed, with who did, and whether it is active."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, ClassVar

from patchhub.objects import Element
from patchhub.store.listing import every_change, every_fact
from patchhub.store.lookup import Fact
from patchhub.store.repository import Repository


@dataclass(frozen=True)
class FactRow:
    """One request.

    Attributes:
        texts: the request in words; None where they are withheld.
        changes: (place of the commit on the page, +1 added, -1 removed, 0 recorded again), the earliest first; commits that are
            not on the page are left out.
        last: the order of its last change among all changes; larger is later.
        column: the recorded columns that are active; None where it is not active, or only as part of a whole patch.
        active: whether the state holds it.
    """

    FIELDS: ClassVar = ("id", "prompt", "subject", "target_new", "target_true", "active", "misfit", "changes")

    id: str
    texts: Fact | None
    changes: tuple[tuple[int, int], ...]
    last: int
    column: Element | None
    active: bool

    def to_json(self, misfit: float | None) -> list[Any]:
        """The row in the order of `FIELDS`; the id cut to the length that names it on the page."""
        words = self.texts
        texts = [None] * 4 if words is None else [words.prompt, words.subject, words.target_new, words.target_true]
        share = None if misfit is None else round(misfit, 4)
        return [self.id[:16], *texts, int(self.active), share, [list(change) for change in self.changes]]


def fact_rows(
    repository: Repository, active: AbstractSet[Element], reachable: AbstractSet[str], places: Mapping[str, int]
) -> list[FactRow]:
    """Every request that a reachable commit added or removed, the last changed first.

    Args:
        active: the active set that the page is about.
        reachable: ids of the commits that count.
        places: for those that are on the page, their place there.
    """
    steps: dict[str, dict[str, int]] = {}
    last: dict[str, int] = {}
    for moment, (commit, _, request, change) in enumerate(every_change(repository)):
        if commit not in reachable:
            continue
        found = steps.setdefault(request, {})
        found[commit] = found.get(commit, 0) + change
        last[request] = moment
    texts = {fact.request: fact for fact in every_fact(repository)}
    columns = {element[1]: element for element in active if element[1] is not None}
    whole = {request for patch, one in active if one is None for request in repository.patch(patch).requests}
    rows = [
        FactRow(
            request,
            texts.get(request),
            tuple((places[commit], max(-1, min(1, change))) for commit, change in found.items() if commit in places),
            last[request],
            columns.get(request),
            request in columns or request in whole,
        )
        for request, found in steps.items()
    ]
    return sorted(rows, key=lambda row: (-row.last, row.id))
