"""Three-way merge of active sets. Pure: sets, and the history as ``parents(commit)``.

A set gives each request at most one column, so it maps the request to its element or to nothing (a whole patch is its own key).
What a merge keeps for a request is the largest of what the two sides say, in this order:

    what the merge base says  <  nothing  <  a column of the patch with the larger id  <  one of the smaller id

So a change wins over no change, a column made since over a removal, and of two columns for one request the smaller patch id's. As the
largest in a total order, the result does not depend on the order of the sides, nor on how branches of one common base are grouped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from patchhub.objects import Element
from patchhub.store.graph import Parents, merge_bases

ActiveSet = frozenset[Element]


def three_way(base: ActiveSet, ours: ActiveSet, theirs: ActiveSet) -> ActiveSet:
    """The set that holds what either side changed since ``base``, and what neither did."""
    before, left, right = _by_key(base), _by_key(ours), _by_key(theirs)
    merged = (_winner(left.get(key), right.get(key), before.get(key)) for key in left.keys() | right.keys())
    return frozenset(element for element in merged if element is not None)


def base_set(left: str, right: str, parents: Parents, active: Callable[[str], ActiveSet]) -> ActiveSet:
    """The set that two commits are compared with: that of their merge base, empty (the unpatched model) without one.

    Several merge bases are merged with one another, in ascending order of id, as if a commit had been made of each step.
    """
    tips: list[str] = []
    merged: ActiveSet = frozenset()
    for tip in merge_bases(left, right, parents):
        if tips:
            virtual = "+".join(tips)
            below = _with_commit(f"merge of {virtual}", tuple(tips), parents)
            merged = three_way(base_set(f"merge of {virtual}", tip, below, active), merged, active(tip))
        else:
            merged = active(tip)
        tips.append(tip)
    return merged


def _with_commit(name: str, its_parents: Sequence[str], parents: Parents) -> Parents:
    """The same history with one commit more."""
    return lambda commit: its_parents if commit == name else parents(commit)


def _by_key(elements: ActiveSet) -> dict[str, Element]:
    return {patch if request is None else request: (patch, request) for patch, request in elements}


def _winner(left: Element | None, right: Element | None, before: Element | None) -> Element | None:
    def below(element: Element | None) -> tuple[bool, bool, str]:
        return element == before, element is None, element[0] if element else ""

    return min(left, right, key=below)
