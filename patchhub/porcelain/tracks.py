"""The history as a drawing with lines: which track each commit is on, and which tracks lead to its parents. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """One commit in the drawing.

    Attributes:
        track: its column.
        lines: (column at this commit's row, column at the next row) of every line between the two.
    """

    track: int
    lines: tuple[tuple[int, int], ...]


def lay_out(commits: Iterable[tuple[str, Sequence[str]]]) -> Iterator[Place]:
    """One place per commit.

    A track waits for one commit, and no commit is waited for twice. A commit's track goes on to its first parent; where another track
    waits for that one already, the two become one in the column further left. Further parents take the leftmost free columns.

    Args:
        commits: (id, ids of its parents), every child before its parents. A parent that does not come is waited for to the end.
    """
    waiting: list[str | None] = []
    for commit, parents in commits:
        track = waiting.index(commit) if commit in waiting else _free(waiting)
        waiting[track] = None
        before = list(waiting)
        for parent in dict.fromkeys(parents):
            if parent not in waiting:
                column = track if waiting[track] is None else _free(waiting)
            elif waiting[track] is None and waiting.index(parent) > track:
                waiting[waiting.index(parent)] = None
                column = track
            else:
                continue
            waiting[column] = parent
        passing = [(column, waiting.index(awaited)) for column, awaited in enumerate(before) if awaited is not None]
        onward = [(track, waiting.index(parent)) for parent in dict.fromkeys(parents)]
        yield Place(track, (*passing, *onward))


def _free(waiting: list[str | None]) -> int:
    """The leftmost column that waits for nothing, made if there is none."""
    if None not in waiting:
        waiting.append(None)
    return waiting.index(None)
