"""Scores in words: one line, a table, or two columns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import click

from patchhub.cli.terminal import count, say

if TYPE_CHECKING:
    from patchhub.porcelain.scores import Compared, Noted, Score

_SMALL = ("kl",)
_CHANGE = 0.0005  # what three digits show


def score_line(noted: Noted) -> str:
    """`S 0.883  ES 0.950 ... (counterfact, 100 facts of facts.json)`."""
    numbers = "  ".join(f"{name} {number(name, score.value)}" for name, score in noted.leading.items())
    return f"{numbers}  {click.style(measured_on(noted.kind, noted.facts, noted.file), dim=True)}"


def summary(notes: Sequence[Noted]) -> list[tuple[str, Score]]:
    """The first score of each note, for where a line is short: `S`, or `chat S` where it was asked in a chat."""
    leading = [(noted.chat, *next(iter(noted.leading.items()))) for noted in notes if noted.leading]
    return [(f"chat {name}" if chat else name, score) for chat, name, score in leading]


def measured_on(kind: str, facts: int, file: str) -> str:
    """`(counterfact, 100 facts of facts.json)`."""
    number_of = f", {count(facts, 'fact')}" if facts else ""
    return f"({kind}{number_of}{f' of {file}' if file else ''})"


def number(name: str, value: float) -> str:
    """Three decimals; small numbers, such as KL, in two digits."""
    return f"{value:.2g}" if name in _SMALL else f"{value:.3f}"


def say_scores(scores: Mapping[str, Score], definitions: Mapping[str, str], *, against: str = "base") -> None:
    """One line per score: value, interval, the value it is compared with, and what it means."""
    for name, score in scores.items():
        low, high = (None if bound is None else number(name, bound) for bound in (score.low, score.high))
        interval = f"[{low}, {high}]" if low and high else ""
        beside = f"{against} {number(name, score.base)}" if score.base is not None else ""
        say(
            f"{name:>20} {number(name, score.value):>7} {click.style(f'{interval:<16} {beside:<13}', dim=True)} "
            f"{definitions.get(name, '')}"
        )


def say_compared(rows: Sequence[Compared], old: str, new: str, definitions: Mapping[str, str]) -> None:
    """Per suite the scores at two revisions beside each other and their difference."""
    for row in rows:
        say(f"scores {measured_on(row.kind, row.facts, row.file)}", dim=True)
        width = max(8, len(old[:12]), len(new[:12]))
        say(f"{'':>20} {old[:12]:>{width}} {new[:12]:>{width}} {'change':>8}", dim=True)
        for name in {**row.after, **row.before}:
            before, after = row.before.get(name), row.after.get(name)
            cells = ["-" if side is None else number(name, side.value) for side in (before, after)]
            change = after.value - before.value if before and after else None
            shown = "-" if change is None else f"{change:+.3f}" if abs(change) >= _CHANGE else "="
            say(
                f"{name:>20} {cells[0]:>{width}} {cells[1]:>{width}} {shown:>8}  "
                f"{click.style(definitions.get(name, ''), dim=True)}"
            )


def say_table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table under its titles: the first column to the left, the others to the right."""
    table = [list(titles), *map(list, rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(titles))]
    for place, row in enumerate(table):
        first, *others = [
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        say("  ".join([first, *others]).rstrip(), bold=place == 0)
