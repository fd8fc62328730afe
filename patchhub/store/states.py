"""The history as a graph, and what is in it: the active set and the state of a commit.

Pure functions over ``parents(commit) -> its parents``, in the order they are stored, and over ``commit_of(id)``. `ActiveSet` is changed in
place; each change costs what it changes, whatever else is active."""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Final

from patchhub.canonical import canonical_json
from patchhub.objects import EMPTY_SET, Commit, Element, digest_of_sum, element_sum, groups_of

Parents = Callable[[str], Sequence[str]]
Rank = Callable[[str], int]
"""A number larger than that of every parent, such as a time corrected for clocks that run backwards."""

_LEFT: Final = 1
_RIGHT: Final = 2


def walk(starts: Iterable[str], parents: Parents, rank: Rank) -> Iterator[str]:
    """`starts` and their ancestors, each once, by descending rank, then ascending id: every child before its parents.

    Lazy: after n commits only those n and their parents have been asked for.
    """
    seen = set(starts)
    waiting = [(-rank(commit), commit) for commit in seen]
    heapq.heapify(waiting)
    while waiting:
        commit = heapq.heappop(waiting)[1]
        yield commit
        for parent in parents(commit):
            if parent not in seen:
                seen.add(parent)
                heapq.heappush(waiting, (-rank(parent), parent))


def ancestors(starts: Iterable[str], parents: Parents) -> set[str]:
    """`starts` and everything reachable from them."""
    found = set(starts)
    waiting = list(found)
    while waiting:
        for parent in parents(waiting.pop()):
            if parent not in found:
                found.add(parent)
                waiting.append(parent)
    return found


def among_ancestors(candidates: Sequence[str], starts: Iterable[str], parents: Parents, rank: Rank) -> set[str]:
    """Those of `candidates` that are among `starts` or reachable from them; nothing below the lowest is looked at."""
    if not candidates:
        return set()
    lowest = min(rank(candidate) for candidate in candidates)
    near = itertools.takewhile(lambda commit: rank(commit) >= lowest, walk(starts, parents, rank))
    return set(candidates).intersection(near)


def is_ancestor(ancestor: str, commit: str, parents: Parents) -> bool:
    """Whether `ancestor` is `commit` or reachable from it."""
    return ancestor in ancestors([commit], parents)


def merge_bases(left: str, right: str, parents: Parents) -> list[str]:
    """The best common ancestors: those that are no proper ancestor of another common ancestor; sorted by id."""
    common = ancestors([left], parents) & ancestors([right], parents)
    covered = {parent for commit in common for parent in parents(commit)}
    return sorted(common - covered)


def apart(left: Iterable[str], right: Iterable[str], parents: Parents, rank: Rank) -> tuple[int, int]:
    """How many commits are among `left` or below it but not below `right`, and the other way round.

    Ends where all that waits is below both sides: what the two have in common is looked at no further than there.
    """
    sides = dict.fromkeys(left, _LEFT)
    for commit in right:
        sides[commit] = sides.get(commit, 0) | _RIGHT
    waiting = [(-rank(commit), commit) for commit in sides]
    heapq.heapify(waiting)
    counts = {_LEFT: 0, _RIGHT: 0, _LEFT | _RIGHT: 0}
    one_sided = {commit for commit, side in sides.items() if side != _LEFT | _RIGHT}
    while one_sided:
        commit = heapq.heappop(waiting)[1]
        counts[sides[commit]] += 1
        one_sided.discard(commit)
        for parent in parents(commit):
            if parent not in sides:
                heapq.heappush(waiting, (-rank(parent), parent))
                one_sided.add(parent)
            sides[parent] = sides.get(parent, 0) | sides[commit]
            if sides[parent] == _LEFT | _RIGHT:
                one_sided.discard(parent)
    return counts[_LEFT], counts[_RIGHT]


def first_parents(start: str, parents: Parents) -> Iterator[str]:
    """`start`, its first parent, that one's first parent, and so on to the root."""
    commit: str | None = start
    while commit is not None:
        yield commit
        commit = next(iter(parents(commit)), None)


def oldest_first(starts: Iterable[str], parents: Parents) -> Iterator[str]:
    """`starts` and their ancestors, each once, every parent before its children."""
    done: set[str] = set()
    for start in sorted(starts):
        waiting = [(start, False)]
        while waiting:
            commit, expanded = waiting.pop()
            if commit in done:
                continue
            if expanded:
                done.add(commit)
                yield commit
            else:
                waiting.append((commit, True))
                waiting.extend((parent, False) for parent in reversed(parents(commit)) if parent not in done)


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


MAX_STATE_BLOBS: Final = 128
MAX_STATE_FACTOR: Final = 2
"""A state may list blobs of at most this many times the bytes of the whole delta."""

CommitOf = Callable[[str], Commit]
SetOf = Callable[[str], frozenset[Element]]
"""The elements of a set object."""


def active_set(
    commit_id: str | None, commit_of: CommitOf, set_of: SetOf, known: Mapping[str, frozenset[Element]]
) -> frozenset[Element]:
    """What is active at a commit: the changes of the first-parent chain since the last keyframe or `known` set."""
    changes: list[Commit] = []
    elements: set[Element] = set()
    cursor = commit_id
    while cursor is not None:
        if cursor in known:
            elements = set(known[cursor])
            break
        commit = commit_of(cursor)
        if commit.keyframe is not None:
            elements = set(set_of(commit.keyframe.set_id))
            break
        changes.append(commit)
        cursor = first_parent(commit)
    for commit in reversed(changes):
        elements -= commit.removed
        elements |= commit.added
    return frozenset(elements)


def state(commit_id: str | None, commit_of: CommitOf, known: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """The ordered delta blobs whose sum is the weight change of a commit (``docs/format.md``, "The state").

    `known` holds states that need not be derived again.
    """
    blobs: list[str] = []
    cursor = commit_id
    while cursor is not None:
        if cursor in known:
            blobs.extend(reversed(known[cursor]))
            break
        commit = commit_of(cursor)
        if commit.same_as is not None:
            cursor = commit.same_as
        elif commit.set_digest == EMPTY_SET:
            break
        elif commit.keyframe is not None:
            blobs.extend([commit.keyframe.tensors] if commit.keyframe.tensors is not None else [])
            break
        else:
            blobs.extend([commit.tensors] if commit.tensors is not None else [])
            cursor = first_parent(commit)
    return tuple(reversed(blobs))


def lineage(commit_id: str, commit_of: CommitOf) -> Iterator[str]:
    """The commits that a commit's weights go back to: itself, the one that it repeats or its first parent, and so on."""
    cursor: str | None = commit_id
    while cursor is not None:
        yield cursor
        commit = commit_of(cursor)
        cursor = None if commit.set_digest == EMPTY_SET else commit.same_as or first_parent(commit)


def commits_read(commit_id: str | None, commit_of: CommitOf) -> int:
    """How many commits `state` and `whole_patches` read for a commit: those since the last keyframe, that one included."""
    count, cursor = 0, commit_id
    while cursor is not None:
        commit = commit_of(cursor)
        count += 1
        if commit.same_as is not None:
            cursor = commit.same_as
        elif commit.set_digest == EMPTY_SET or commit.keyframe is not None:
            break
        else:
            cursor = first_parent(commit)
    return count


def whole_patches(commit_id: str | None, commit_of: CommitOf, set_of: SetOf) -> frozenset[str]:
    """The patches that are active as a whole at a commit: shards and additive ones. Reads the commits that `state` reads."""
    changes: list[Commit] = []
    elements: set[Element] = set()
    cursor = commit_id
    while cursor is not None:
        commit = commit_of(cursor)
        if commit.same_as is not None:
            cursor = commit.same_as
        elif commit.set_digest == EMPTY_SET:
            break
        elif commit.keyframe is not None:
            elements = set(set_of(commit.keyframe.set_id))
            break
        else:
            changes.append(commit)
            cursor = first_parent(commit)
    for commit in reversed(changes):
        elements -= commit.removed
        elements |= commit.added
    return frozenset(identity for identity, request in elements if request is None)


def needs_keyframe(reads: int, blob_bytes: int, whole_bytes: int) -> bool:
    """Whether a state that takes so many commits and bytes to read is too long beside the whole delta of `whole_bytes`."""
    return reads > MAX_STATE_BLOBS or blob_bytes > MAX_STATE_FACTOR * whole_bytes


def first_parent(commit: Commit) -> str | None:
    """The commit that a commit's changes are counted against; None for a root."""
    return commit.parents[0] if commit.parents else None
