"""An active set that is changed in place. Each change costs what it changes, whatever else is active."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from patchhub.canonical import canonical_json
from patchhub.objects import Element, groups_of
from patchhub.set_digest import digest_of_sum, element_sum


class ActiveSet:
    """Some elements, with what is asked of them kept up: their digest, their bytes, and what no sound set has."""

    def __init__(self, elements: Iterable[Element]) -> None:
        self._patches: dict[str, set[str | None]] = {}
        self._columns: Counter[str] = Counter()
        self._encoded: dict[str, bytes] = {}  # a patch's part of `data`, while it is up to date
        self._doubled: set[str] = set()
        self._mixed: set[str] = set()
        self._sum = 0
        self.change(removed=(), added=frozenset(elements))

    def __contains__(self, element: Element) -> bool:
        return element[1] in self._patches.get(element[0], ())

    def change(self, *, removed: Iterable[Element], added: Iterable[Element]) -> None:
        """Take out what is in the set, then put in what is not."""
        for patch, request in removed:
            self._patches[patch].remove(request)
            self._changed(patch, request, -1)
        for patch, request in added:
            self._patches.setdefault(patch, set()).add(request)
            self._changed(patch, request, 1)

    @property
    def digest(self) -> str:
        """The set digest."""
        return digest_of_sum(self._sum)

    @property
    def doubled(self) -> str | None:
        """A request with more than one column in the set, the smallest id; None if there is none."""
        return min(self._doubled, default=None)

    @property
    def mixed(self) -> str | None:
        """A patch that is there both as a whole and by request, the smallest id; None if there is none."""
        return min(self._mixed, default=None)

    def data(self) -> bytes:
        """The canonical bytes of the set object.

        Raises:
            ValueError: a patch is `mixed`.
        """
        for patch in self._patches.keys() - self._encoded.keys():
            (group,) = groups_of((patch, request) for request in self._patches[patch])
            self._encoded[patch] = canonical_json(group)
        return b"[" + b",".join(self._encoded[patch] for patch in sorted(self._patches)) + b"]"

    def _changed(self, patch: str, request: str | None, by: int) -> None:
        """Keep up what is derived from the elements after one of them came (`by` 1) or went (-1)."""
        self._sum += by * element_sum([(patch, request)])
        self._encoded.pop(patch, None)
        requests = self._patches[patch]
        if not requests:
            del self._patches[patch]
        _keep(self._mixed, patch, None in requests and len(requests) > 1)
        if request is not None:
            self._columns[request] += by
            _keep(self._doubled, request, self._columns[request] > 1)
            if not self._columns[request]:
                del self._columns[request]


def _keep(names: set[str], name: str, belongs: bool) -> None:
    if belongs:
        names.add(name)
    else:
        names.discard(name)
