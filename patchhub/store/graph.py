"""The history as a graph: pure functions over ``parents(commit) -> its parents``, in the order they are stored."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final

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
