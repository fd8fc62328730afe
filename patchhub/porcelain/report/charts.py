"""Scores as files: CSV of scores and of facts, and a picture as SVG text without fonts, scripts or links."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Final

from patchhub.fsio import write_atomically
from patchhub.porcelain.measure import Evaluation
from patchhub.porcelain.scores import DEFINITIONS, GENERALITY, LEADING, SPECIFICITY, Noted, Score, kind, noted_history
from patchhub.results import spreadsheet_cell
from patchhub.store.store import Store

SERIES: Final = 6
"""How many series can be told apart."""
_TICKS: Final = (0.0, 0.25, 0.5, 0.75, 1.0)
_LABELS_ACROSS: Final = 12
_LINE: Final = 15  # pixels between two lines of text
_INSET: Final = 28  # from the sides to the first and last step
_DASHED: Final = 4  # series from here on, so that equal lines show both
_LIGHT: Final = ("#1f5fbf", "#b4530a", "#1b7a3d", "#8a3fa0", "#a11d3a", "#4d5866")
_DARK: Final = ("#7db1ff", "#ffb066", "#6fdc94", "#dba0ee", "#ff8fa5", "#c0cad6")


@dataclass(frozen=True)
class Box:
    """Where a chart's data area lies, in pixels of the picture."""

    left: float
    top: float
    width: float
    height: float

    def x(self, share: float) -> float:
        return self.left + self.width * share

    def y(self, share: float) -> float:
        return self.top + self.height * (1 - min(max(share, 0.0), 1.0))


@dataclass(frozen=True)
class Series:
    """A named row of values over the steps, None where a step has none, and optionally an interval of each."""

    name: str
    values: Sequence[float | None]
    intervals: Sequence[tuple[float, float] | None] = ()


@dataclass(frozen=True)
class Point:
    """A labelled point of the unit square; hollow for what others are compared with."""

    label: str
    x: float
    y: float
    hollow: bool = False


def picture(width: int, height: int, title: str, parts: Sequence[str]) -> str:
    """The whole SVG document."""
    colours = "".join(f".f{i}{{fill:{c}}}.s{i}{{stroke:{c}}}" for i, c in enumerate(_LIGHT))
    dark = "".join(f".f{i}{{fill:{c}}}.s{i}{{stroke:{c}}}" for i, c in enumerate(_DARK))
    style = (
        "text{font:12px system-ui,sans-serif;fill:#20262e}.head{font-weight:600;font-size:14px}.dim{fill:#5b6672}"
        ".page{fill:#ffffff}.grid{stroke:#d8dde3}.line{fill:none;stroke-width:2}.band{opacity:.18}"
        f".hollow{{fill:none;stroke:#5b6672;stroke-width:1.5}}{colours}"
        "@media(prefers-color-scheme:dark){text{fill:#e6eaef}.dim{fill:#a3aeba}.page{fill:#14181d}.grid{stroke:#343c46}"
        f".hollow{{stroke:#a3aeba}}{dark}}}"
    )
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">\n'
        f"<title>{escape(title)}</title>\n<style>{style}</style>\n"
        f'<rect class="page" width="{width}" height="{height}"/>\n{body}\n</svg>\n'
    )


def lines(box: Box, title: str, across: str, steps: Sequence[str], series: Sequence[Series]) -> str:
    """Values over steps from left to right, each series named at its right end."""
    last = max(len(steps) - 1, 1)
    inside = box.width - 2 * _INSET
    places = [box.left + _INSET + inside * (0.5 if len(steps) == 1 else step / last) for step in range(len(steps))]
    parts = [_head(box, title), *_grid(box), *_steps(box, places, steps)]
    parts.append(_text(box.x(0.5), box.y(0) + 36, across, anchor="middle"))
    ends: list[tuple[float, int, str]] = []
    for number, one in enumerate(series[:SERIES]):
        parts += _band(box, places, one, number)
        known = [(places[step], value) for step, value in enumerate(one.values) if value is not None]
        path = " ".join(f"{x:.1f},{box.y(value):.1f}" for x, value in known)
        dashes = ' stroke-dasharray="5 4"' if number >= _DASHED else ""
        parts.append(f'<polyline class="line s{number}"{dashes} points="{path}"/>')
        parts += [_mark(x, box.y(value), number, f"{one.name} {value:.3f}") for x, value in known]
        if known:
            ends.append((box.y(known[-1][1]), number, f"{one.name} {known[-1][1]:.3f}"))
    for y, number, text in _spread(ends):
        parts.append(_text(box.x(1) + 12, y + 4, text, kind=f"f{number}"))
    return "\n".join(parts)


def square(box: Box, title: str, across: str, up: str, points: Sequence[Point]) -> str:
    """Points of the unit square, joined in their order; the last one stands out."""
    parts = [_head(box, title), *_grid(box)]
    parts += [_rule(box.x(tick), box.y(0), box.x(tick), box.y(1)) for tick in _TICKS]
    parts += [_text(box.x(tick), box.y(0) + 18, f"{tick:g}", anchor="middle", kind="dim") for tick in _TICKS]
    parts.append(_text(box.x(0.5), box.y(0) + 36, across, anchor="middle"))
    parts.append(
        f'<text transform="translate({box.left - 40:.1f},{box.y(0.5):.1f}) rotate(-90)" text-anchor="middle">{escape(up)}</text>'
    )
    walked = [point for point in points if not point.hollow]
    path = " ".join(f"{box.x(point.x):.1f},{box.y(point.y):.1f}" for point in walked)
    parts.append(f'<polyline class="line s5" style="stroke-width:1;opacity:.6" points="{path}"/>')
    named = [point for point in points if point.hollow] + walked[-1:]
    for point in points:
        x, y = box.x(point.x), box.y(point.y)
        about = f"{point.label}: {across} {point.x:.3f}, {up} {point.y:.3f}"
        hollow = f'<circle class="hollow" cx="{x:.1f}" cy="{y:.1f}" r="5"><title>{escape(about)}</title></circle>'
        parts.append(hollow if point.hollow else _mark(x, y, 0, about, size=6 if point in named else 4))
        if point in named:
            right, below = point.x > 0.7, point.y > 0.1
            at = (x - 10 if right else x + 10, y + 18 if below else y - 10)
            parts.append(_text(*at, point.label, anchor="end" if right else "start"))
    return "\n".join(parts)


def rows(box: Box, title: str, labels: Sequence[str], series: Sequence[Series], *, first_colour: int = 0) -> str:
    """Per label a row with one mark for each series, whose values are one per label. The labels stand above their rows."""
    parts = [_head(box, title)]
    x, height = box.left, box.height / max(len(labels), 1)
    for number, one in enumerate(series, first_colour):
        parts += [_mark(x + 5, box.top - 4, number, one.name), _text(x + 15, box.top, one.name, kind=f"f{number}")]
        x += 32 + 8 * len(one.name)
    for tick in _TICKS:
        parts.append(_rule(box.x(tick), box.top + 8, box.x(tick), box.top + box.height))
        parts.append(_text(box.x(tick), box.top + box.height + 18, f"{tick:g}", anchor="middle", kind="dim"))
    for place, label in enumerate(labels):
        y = box.top + height * (place + 1) - 9
        parts += [_text(box.left, y - 12, label), _rule(box.left, y, box.left + box.width, y)]
        for number, one in enumerate(series, first_colour):
            value = one.values[place]
            apart = 4 * (number - first_colour - (len(series) - 1) / 2)  # so that equal values show all marks
            if value is not None:
                about = f"{label}: {one.name} {value:.3f}"
                parts.append(_mark(box.x(min(max(value, 0.0), 1.0)), y + apart, number, about, size=3))
    return "\n".join(parts)


def _head(box: Box, title: str) -> str:
    return _text(box.left, box.top - 24, title, kind="head")


def _grid(box: Box) -> Iterator[str]:
    for tick in _TICKS:
        y = box.y(tick)
        yield _rule(box.left, y, box.left + box.width, y)
        yield _text(box.left - 8, y + 4, f"{tick:g}", anchor="end", kind="dim")


def _steps(box: Box, places: Sequence[float], steps: Sequence[str]) -> Iterator[str]:
    """The names of steps below the axis, as many as there is room for."""
    every = -(-len(steps) // _LABELS_ACROSS)
    for place in range(len(steps) - 1, -1, -every):
        yield _text(places[place], box.y(0) + 18, steps[place], anchor="middle", kind="dim")


def _band(box: Box, places: Sequence[float], series: Series, number: int) -> Iterator[str]:
    known = [(places[step], pair) for step, pair in enumerate(series.intervals) if pair is not None]
    if len(known) > 1:
        upper = [f"{x:.1f},{box.y(high):.1f}" for x, (_, high) in known]
        lower = [f"{x:.1f},{box.y(low):.1f}" for x, (low, _) in reversed(known)]
        yield f'<polygon class="band f{number}" points="{" ".join(upper + lower)}"/>'
    for x, (low, high) in known if len(known) == 1 else ():
        yield f'<line class="s{number}" x1="{x:.1f}" y1="{box.y(low):.1f}" x2="{x:.1f}" y2="{box.y(high):.1f}"/>'


def _mark(x: float, y: float, number: int, about: str, size: float = 4) -> str:
    """One value: a circle, square, diamond or triangle by its series, with what it says."""
    s = size * 1.1
    shapes = (
        f'<circle class="f{number}" cx="{x:.1f}" cy="{y:.1f}" r="{size}">',
        f'<rect class="f{number}" x="{x - s:.1f}" y="{y - s:.1f}" width="{2 * s:.1f}" height="{2 * s:.1f}">',
        f'<path class="f{number}" d="M{x:.1f} {y - 1.4 * s:.1f}l{1.4 * s:.1f} {1.4 * s:.1f}l{-1.4 * s:.1f} {1.4 * s:.1f}'
        f'l{-1.4 * s:.1f} {-1.4 * s:.1f}z">',
        f'<path class="f{number}" d="M{x:.1f} {y - 1.3 * s:.1f}l{1.3 * s:.1f} {2.3 * s:.1f}h{-2.6 * s:.1f}z">',
    )
    shape = shapes[number % len(shapes)]
    return f"{shape}<title>{escape(about)}</title></{shape[1:].partition(' ')[0]}>"


def _spread(ends: Sequence[tuple[float, int, str]]) -> list[tuple[float, int, str]]:
    """Labels moved apart downwards, from the top one on, so that none covers another."""
    placed: list[tuple[float, int, str]] = []
    for y, number, text in sorted(ends):
        placed.append((max(y, placed[-1][0] + _LINE) if placed else y, number, text))
    return placed


def _rule(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="grid" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, text: str, *, anchor: str = "start", kind: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{escape(text)}</text>'


_RELATIONS: Final = 10
_COLUMNS: Final = ("commit", "suite", "score", "value", "low", "high", "records", "base", "definition")


def write_scores(
    repository: Store,
    done: Evaluation,
    *,
    csv: Path | None = None,
    facts_csv: Path | None = None,
    plot: Path | None = None,
) -> None:
    """Write the files that are asked for: scores as CSV, each fact's own values as CSV, and a picture of the scores as SVG."""
    if csv is not None:
        rows: list[tuple[str | None, str, Mapping[str, Score]]] = [(done.commit, done.suite, done.scores)]
        if done.history is not None:
            rows = [(row.commit, done.suite, row.noted.scores) for row in done.history if row.noted]
        _write(csv, scores_csv(rows))
    if facts_csv is not None:
        _write(facts_csv, records_csv(done))
    if plot is not None:
        _write(plot, score_picture(done, noted_history(repository, done.commit or "base", done.suite)))


def _write(file: Path, text: str) -> None:
    write_atomically(file, (text.encode("utf-8"),))


def scores_csv(rows: Iterable[tuple[str | None, str, Mapping[str, Score]]]) -> str:
    """One line per commit, suite and score; the commit is empty for the unpatched model."""
    return _csv(
        _COLUMNS,
        (
            {
                "commit": commit or "",
                "suite": suite,
                "score": name,
                **score.to_json(),
                "definition": DEFINITIONS.get(name, ""),
            }
            for commit, suite, scores in rows
            for name, score in scores.items()
        ),
    )


def records_csv(done: Evaluation) -> str:
    """One line per fact with its own value of every score, empty where it has none."""
    rows = list(done.records())
    return _csv(tuple(rows[0]), rows)


def score_picture(done: Evaluation, history: Sequence[Noted]) -> str:
    """Three charts of one suite as SVG: scores by commit, generality against specificity, scores by relation.

    Args:
        done: the revision whose relations are shown.
        history: notes of the same suite, oldest first.
    """
    metrics = str(done.settings["metrics"])
    names = [*LEADING[metrics], "exact"]
    relations = list(done.relations.items())[:_RELATIONS]
    height = 440 + max(330, 40 * len(relations)) + 60
    about = f"{kind(metrics, chat=done.chat)}, {len(done.facts)} facts of {done.settings['file']}"
    steps = [noted.commit[:7] for noted in history]
    by_relation = [Series(name, [found.get(name) for _, found in relations]) for name in names[1:]]
    parts = [
        lines(
            Box(60, 60, 740, 260), f"Scores by commit ({about})", "commit, oldest first", steps, _series(names, history)
        ),
        square(
            Box(70, 440, 330, 330),
            f"Generality, {GENERALITY[metrics]}, against specificity, {SPECIFICITY[metrics]}",
            SPECIFICITY[metrics],
            GENERALITY[metrics],
            _points(metrics, done, history),
        ),
        rows(
            Box(500, 440, 420, height - 500),
            f"By relation at {_name(done.commit)}",
            [f"{_cut(template)} ({found['facts']:.0f})" for template, found in relations],
            by_relation,
            first_colour=1,
        ),
    ]
    return picture(960, height, f"Scores: {about}", parts)


def _series(names: Sequence[str], history: Sequence[Noted]) -> list[Series]:
    """The scores by commit; only the summary, the first of them, with its intervals."""
    columns = [(name, [noted.scores.get(name) for noted in history]) for name in names]
    return [
        Series(
            name,
            [None if score is None else score.value for score in column],
            [_interval(score) for score in column] if place == 0 else (),
        )
        for place, (name, column) in enumerate(columns)
        if any(column)
    ]


def _interval(score: Score | None) -> tuple[float, float] | None:
    return None if score is None or score.low is None or score.high is None else (score.low, score.high)


def _points(metrics: str, done: Evaluation, history: Sequence[Noted]) -> list[Point]:
    """The base, then every commit that has both scores."""
    across, up = SPECIFICITY[metrics], GENERALITY[metrics]
    base = done.base
    points = [Point("base", base[across], base[up], hollow=True)] if across in base and up in base else []
    for noted in history:
        found = noted.scores
        if across in found and up in found:
            points.append(Point(noted.commit[:7], found[across].value, found[up].value))
    return points


def _name(commit: str | None) -> str:
    return commit[:7] if commit else "the unpatched base"


def _cut(text: str, length: int = 52) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _csv(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: spreadsheet_cell(value) for name, value in row.items()} for row in rows)
    return buffer.getvalue()
