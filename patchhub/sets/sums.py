"""What a set asks of each weight, by columns or by their sums, and the change of the weights from one set to another. NumPy only.

Sets of more columns than d_in are solved from the sums X and Y over their columns (`constraints.Moments`), and those are kept in the cache,
commit by commit: the sums of a commit are its first parent's with its changes, so a commit of m facts reads m columns, however many are
active.

A sum of floating-point numbers depends on their order, and a solved delta's bytes are part of a commit's name. So the sums of a commit are
one function of its history, by whatever way they are had: they are formed anew from the set, read in its order, at certain commits that
history alone decides, and from there every commit adds its own. What the cache keeps are values of this function, no others, and a store
without a cache finds the same bits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from safetensors.numpy import load_file, save

from patchhub.cache import Kind, Slot
from patchhub.constraints import FORM_ANEW, SUMS_BEYOND, Columns, Moments, difference, join, no_columns, no_moments
from patchhub.delta import Delta, add, negative
from patchhub.objects import Commit, Element
from patchhub.sets.columns import columns_beside, read_additive, read_patches, tensor_shapes, weight_shapes
from patchhub.store.states import first_parent
from patchhub.store.store import Store

KIND: Final = Kind("sums", ".safetensors", limit=4 << 30)

STEP: Final = 64
"""What one commit costs beside its columns, in columns: it touches all of X and Y. Measured at d_in 1,536: 35 to 60."""

WORTH: Final = 256
"""Sums that cost more columns than this to form, steps counted, are kept. At d_in 1,536 so many take as long as a few entries to write."""

_ROWS: Final = 2048  # of columns that are summed in one product

Deltas = Mapping[str, Sequence[Delta]]
Asked = Mapping[str, Columns | Moments]


def asked_for(repository: Store, near: str | None, elements: frozenset[Element], additive: Deltas) -> Asked:
    """What a set asks of each weight on top of additive deltas: its columns, or their sums where there are more than d_in.

    Args:
        near: a commit with much the same set, whose sums are the way to this one's; None: there is none.

    Raises:
        CorruptStoreError: a patch's tensors are not what its manifest says.
    """
    if not _are_many(repository, _count(elements)):
        return columns_beside(repository, elements, additive)
    found = sums_near(repository, near, elements)
    return {weight: sums.beyond(additive.get(weight, ())) for weight, sums in found.items()}


def solve_change(
    repository: Store, before: frozenset[Element], after: frozenset[Element], *, near: str | None = None
) -> dict[str, Delta]:
    """D(after) - D(before) of each weight that either set changes, from what was recorded alone (float64).

    Where the sets' additive patches differ at a weight, every column's residual there is another, and both sets are solved;
    elsewhere only what the sets do not have in common is.

    Args:
        near: a commit with much the same set as either, as in `asked_for`.
    """
    shapes = tensor_shapes(repository)
    old, new = read_additive(repository, before), read_additive(repository, after)
    gone, come = read_additive(repository, before - after), read_additive(repository, after - before)
    shifted = gone.keys() | come.keys()
    added = columns_beside(repository, after - before, new)
    removed = columns_beside(repository, before - after, old)
    common = _in_common(repository, near, before, after, new) if added or removed else {}
    change: dict[str, Delta] = {}
    for weight in sorted(added.keys() | removed.keys() | shifted):
        nothing = no_columns(shapes[weight])
        if weight not in shifted:
            parts = added.get(weight, nothing), removed.get(weight, nothing)
            change[weight] = difference(common.get(weight, nothing), *parts)
    if shifted:
        sides = asked_for(repository, near, before, old), asked_for(repository, near, after, new)
        for weight in shifted:
            nothing = no_columns(shapes[weight])
            then, now = (_solved(side.get(weight, nothing)) for side in sides)
            parts_of = [*come.get(weight, ()), now, *map(negative, [*gone.get(weight, ()), then])]
            change[weight] = add(parts_of, shapes[weight])
    return dict(sorted(change.items()))


def _in_common(
    repository: Store, near: str | None, before: frozenset[Element], after: frozenset[Element], additive: Deltas
) -> Asked:
    """What the columns ask for that both sets have; sums where the larger set has more than d_in."""
    common = before & after
    if not _are_many(repository, max(_count(before), _count(after))):
        return columns_beside(repository, common, additive)
    found = sums_near(repository, near, common)
    return {weight: sums.beyond(additive.get(weight, ())) for weight, sums in found.items()}


def _solved(part: Columns | Moments) -> Delta:
    if isinstance(part, Moments):
        return part.solve()
    nothing = no_columns(part.shape)
    return difference(nothing, part, nothing)


def _are_many(repository: Store, count: int) -> bool:
    """Whether so many columns are solved by their sums, at whatever weight."""
    return count > SUMS_BEYOND * max((inner for _, inner in weight_shapes(repository).values()), default=0)


def _count(elements: Iterable[Element]) -> int:
    return sum(1 for _, request in elements if request is not None)


def sums_near(repository: Store, near: str | None, elements: frozenset[Element]) -> dict[str, Moments]:
    """The sums over a set per weight, from those of a commit with much the same set; columns as recorded, additive patches left out.

    Raises:
        CorruptStoreError: a patch's tensors are not what its manifest says.
    """
    there = repository.active(near)
    gone, come = there - elements, elements - there
    if near is None or len(gone) + len(come) > len(elements):
        return _whole(repository, elements)
    return _moved(repository, sums_at(repository, near), gone, come, lambda: elements)


def sums_at(repository: Store, commit: str) -> dict[str, Moments]:
    """The sums over a commit's columns as recorded, per weight that has any: one function of its history, bit for bit.

    Going up from the root, each commit costs its changes and a `STEP`. Where more has been spent than the set had when it was last read
    whole, it is read whole again: so sums are never older than one reading, what that costs is twice what the changes cost at the most,
    and so is what a store without a cache pays.
    """
    kept, way = _nearest_kept(repository, commit)
    found, count, anchor, spent = kept.sums, kept.active, kept.anchor, kept.spent
    whole, cost = -1, 0
    for place, identity in enumerate(way):
        step = repository.commit(identity)
        count += _count(step.added) - _count(step.removed)
        spent += _cost(step)
        if spent > anchor:
            whole, anchor, spent = place, count, 0
    if whole >= 0:
        found, cost = _whole(repository, repository.active(way[whole])), anchor
    for identity in way[whole + 1 :]:
        step = repository.commit(identity)
        found = _after(repository, found, identity, step)
        cost += _cost(step)
    if cost > WORTH:
        _keep(_slot(repository, commit), _Kept(found, count, anchor, spent))
    return found


def _cost(commit: Commit) -> int:
    """What a commit's changes cost; shards and imported changes are no columns."""
    columns = _count(commit.added) + _count(commit.removed)
    return STEP + columns if columns else 0


@dataclass(frozen=True, eq=False)
class _Kept:
    """The sums of a commit, and what is needed to go on from it.

    Attributes:
        active: how many columns the commit has.
        anchor: how many it had when the set was read whole.
        spent: what the commits since then cost.
    """

    sums: dict[str, Moments]
    active: int
    anchor: int
    spent: int


def _nearest_kept(repository: Store, commit: str) -> tuple[_Kept, list[str]]:
    """The nearest commit down the first parents whose sums are kept, and the commits that follow it, the oldest first."""
    way: list[str] = []
    cursor: str | None = commit
    while cursor is not None:
        path = _slot(repository, cursor).path()
        if path is not None:
            tensors = load_file(path)
            active, anchor, spent = (int(number) for number in tensors.pop("place"))
            sums = {}
            for weight in {name.rpartition(".")[0] for name in tensors}:
                count, *rounding = tensors[f"{weight}.count"].tolist()
                X, Y = tensors[f"{weight}.X"], tensors[f"{weight}.Y"]
                sums[weight] = Moments(X, Y, int(count), (rounding[0], rounding[1]))
            return _Kept(sums, active, anchor, spent), way[::-1]
        way.append(cursor)
        cursor = first_parent(repository.commit(cursor))
    return _Kept({}, 0, 0, 0), way[::-1]


def _keep(slot: Slot, kept: _Kept) -> None:
    """Into the cache, unless the entry alone were larger than all entries may be."""
    tensors = {"place": np.array([kept.active, kept.anchor, kept.spent], np.float64)}
    for weight, sums in kept.sums.items():
        tensors |= {f"{weight}.X": sums.X, f"{weight}.Y": sums.Y}
        tensors[f"{weight}.count"] = np.array([len(sums), *sums.rounding])
    if sum(array.nbytes for array in tensors.values()) <= (KIND.limit or 0):
        slot.keep([save({name: np.ascontiguousarray(array) for name, array in tensors.items()})])


def _slot(repository: Store, commit: str) -> Slot:
    return repository.cache.slot(KIND, of=commit, commit=commit)


def _after(repository: Store, before: dict[str, Moments], identity: str, commit: Commit) -> dict[str, Moments]:
    """A commit's sums from its first parent's."""
    return _moved(repository, before, commit.removed, commit.added, lambda: repository.active(identity))


def _moved(
    repository: Store,
    sums: dict[str, Moments],
    gone: Iterable[Element],
    come: Iterable[Element],
    elements: Callable[[], frozenset[Element]],
) -> dict[str, Moments]:
    """Sums with columns taken back and added; formed anew where taking back left more rounding error than `FORM_ANEW` in them.

    Args:
        elements: the set whose sums these are then.
    """
    found = _summed(repository, sums, gone, Moments.without)
    found = _summed(repository, found, come, Moments.add)
    if found is not sums and max((part.error for part in found.values()), default=0.0) > FORM_ANEW:
        return _whole(repository, elements())
    return found


def _whole(repository: Store, elements: Iterable[Element]) -> dict[str, Moments]:
    return _summed(repository, {}, elements, Moments.add)


def _summed(
    repository: Store,
    sums: dict[str, Moments],
    elements: Iterable[Element],
    put: Callable[[Moments, Columns], Moments],
) -> dict[str, Moments]:
    """Sums with the columns of some elements put in or taken out, in blocks of rows; of weights that have any then."""
    found, shapes = dict(sums), tensor_shapes(repository)
    for weight, columns in ColumnBlocks(repository, elements):
        found[weight] = put(found.get(weight, no_moments(shapes[weight])), columns)
    return {weight: part for weight, part in found.items() if len(part)}


@dataclass(frozen=True, eq=False)
class ColumnBlocks:
    """The columns of a set as recorded, additive patches left out: a weight and some of its labelled rows at a time, read anew each time.

    Raises:
        CorruptStoreError: while they are read: a patch's tensors are not what its manifest says.
    """

    repository: Store
    elements: Iterable[Element]

    def __iter__(self) -> Iterator[tuple[str, Columns]]:
        waiting: dict[str, list[Columns]] = {}
        for part in read_patches(self.repository, self.elements):
            for weight, columns in part.items():
                waiting.setdefault(weight, []).append(columns)
                if sum(map(len, waiting[weight])) >= _ROWS:
                    yield weight, join(waiting.pop(weight))
        yield from ((weight, join(parts)) for weight, parts in waiting.items())


def recorded_columns(repository: Store, elements: frozenset[Element]) -> Iterable[tuple[str, Columns]]:
    """The same, to be gone through more than once: kept where there are at most d_in, else read anew."""
    found = ColumnBlocks(repository, elements)
    return found if _are_many(repository, _count(elements)) else list(found)
