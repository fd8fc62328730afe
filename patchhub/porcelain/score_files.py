"""Scores as files: CSV of scores and of facts, and the picture."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from patchhub.evaluation.definitions import DEFINITIONS, GENERALITY, LEADING, SPECIFICITY
from patchhub.porcelain import charts
from patchhub.porcelain.charts import Box, Point, Series
from patchhub.porcelain.evaluate import Evaluation
from patchhub.porcelain.scores import Noted, Score, kind

_RELATIONS: Final = 10
_COLUMNS: Final = ("commit", "suite", "score", "value", "low", "high", "records", "base", "definition")


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


def facts_csv(done: Evaluation) -> str:
    """One line per fact with its own value of every score, empty where it has none."""
    rows = list(done.records())
    return _csv(tuple(rows[0]), rows)


def picture(done: Evaluation, history: Sequence[Noted]) -> str:
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
        charts.lines(
            Box(60, 60, 740, 260), f"Scores by commit ({about})", "commit, oldest first", steps, _series(names, history)
        ),
        charts.square(
            Box(70, 440, 330, 330),
            f"Generality, {GENERALITY[metrics]}, against specificity, {SPECIFICITY[metrics]}",
            SPECIFICITY[metrics],
            GENERALITY[metrics],
            _points(metrics, done, history),
        ),
        charts.rows(
            Box(500, 440, 420, height - 500),
            f"By relation at {_name(done.commit)}",
            [f"{_cut(template)} ({found['facts']:.0f})" for template, found in relations],
            by_relation,
            first_colour=1,
        ),
    ]
    return charts.picture(960, height, f"Scores: {about}", parts)


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
    writer.writerows(rows)
    return buffer.getvalue()
