"""The history as a drawing in text: one lane per line of descent, as `log --graph` shows it. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Drawing:
    """One commit: its own row, the rows that lead to the lanes after it, and a row of those lanes."""

    commit: str
    edges: tuple[str, ...]
    lanes: str

    def beside(self, lines: Sequence[str]) -> Iterator[str]:
        """The drawing with text to its right: the first line at the commit, the others at edges and lanes."""
        rows = [self.commit, *self.edges]
        rows += [self.lanes] * (len(lines) - len(rows))
        width = max(map(len, [*rows, self.lanes])) + 1
        for row, line in zip(rows, [*lines, *[""] * (len(rows) - len(lines))], strict=True):
            yield f"{row:<{width}}{line}".rstrip()


def draw(commits: Iterable[tuple[str, Sequence[str]]]) -> Iterator[Drawing]:
    """One drawing per commit.

    Each lane waits for one commit. A commit's lane goes on to its first parent, further lanes open to its right for other
    parents, and a lane whose parent another one waits for already joins that one.

    Args:
        commits: (id, ids of its parents), every child before its parents.
    """
    lanes: list[str] = []
    for commit, parents in commits:
        if commit not in lanes:
            lanes.append(commit)
        place = lanes.index(commit)
        fresh = [parent for parent in dict.fromkeys(parents) if parent not in lanes]
        after = [*lanes[:place], *fresh, *lanes[place + 1 :]]
        edges = [(column, after.index(lane)) for column, lane in enumerate(lanes) if column != place]
        edges += [(place, after.index(parent)) for parent in dict.fromkeys(parents)]
        row = " ".join("*" if column == place else "|" for column in range(len(lanes)))
        yield Drawing(row, tuple(_transition(edges)), " ".join("|" for _ in after))
        lanes = after


def _transition(edges: Iterable[tuple[int, int]]) -> Iterator[str]:
    """Rows in which every edge (column now, column wanted) moves at most one column, until all have arrived."""
    moving = set(edges)
    while any(now != wanted for now, wanted in moving):
        cells: dict[int, str] = {}
        for now, wanted in moving:
            step = (wanted > now) - (wanted < now)
            sign = {-1: "/", 0: "|", 1: "\\"}[step]
            cell = 2 * now + step
            cells[cell] = sign if cells.get(cell, sign) == sign else "X"
        moving = {(now + (wanted > now) - (wanted < now), wanted) for now, wanted in moving}
        yield "".join(cells.get(cell, " ") for cell in range(max(cells) + 1))
