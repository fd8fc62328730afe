"""Means over records with bootstrap intervals; numpy only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_RESAMPLES_AT_ONCE = 64
_COVERAGE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A score, the bounds of its 95 % bootstrap interval, and the number of records that have it."""

    value: float
    low: float
    high: float
    records: int


@dataclass(frozen=True)
class Combined:
    """A score computed from the means of others, such as their harmonic mean."""

    parts: tuple[str, ...]
    of: Callable[[NDArray[np.float64]], NDArray[np.float64]]


def harmonic_mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The harmonic mean along the last axis: (..., n) to (...); 0 where any value is 0 or less."""
    smallest = np.maximum(values.min(-1, keepdims=True), 0)
    ratios = np.divide(smallest, values, out=np.zeros_like(values), where=smallest > 0)  # at most 1: no overflow
    total = ratios.sum(-1)
    mean = np.divide(values.shape[-1] * smallest[..., 0], total, out=np.zeros_like(total), where=total > 0)
    return np.asarray(mean)


def arithmetic_mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean along the last axis."""
    return np.asarray(values.mean(-1))


def mean_or_none(values: Sequence[float]) -> float | None:
    """The mean of one record's prompts, or None where the record has none."""
    return sum(values) / len(values) if values else None


def estimate(
    columns: Mapping[str, Sequence[float | None]],
    combined: Mapping[str, Combined],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Estimate]:
    """The mean of each column over the records that have a value, and the combined scores.

    The interval is the percentile bootstrap over records: all scores are computed on the same `resamples` samples of
    the records with replacement, drawn with `seed`; samples in which a score has no record do not count for it. A
    column without any value is left out, and so is a combined score that needs it.

    Args:
        columns: per score one value for each record, None where the record has none.
    """
    names, table = _table(columns)
    if not names:
        return {}
    whole = _means(table, np.ones((1, len(table))))[0]
    means = np.concatenate([_means(table, counts) for counts in _resamples(len(table), resamples, seed)])
    records = (~np.isnan(table)).sum(0)
    result = {
        name: _estimate(whole[column], means[:, column], int(records[column])) for column, name in enumerate(names)
    }
    for name, rule in combined.items():
        if set(names) >= set(rule.parts):
            columns_of = [names.index(part) for part in rule.parts]
            spread = rule.of(means[:, columns_of])
            result[name] = _estimate(rule.of(whole[columns_of]), spread, int(records[columns_of].min()))
    return result


def means(
    columns: Mapping[str, Sequence[float | None]], combined: Mapping[str, Combined], rows: Sequence[int]
) -> dict[str, float]:
    """The scores of some of the records, by their places, without intervals."""
    names, table = _table({name: [column[row] for row in rows] for name, column in columns.items()})
    if not names:
        return {}
    whole = _means(table, np.ones((1, len(table))))[0]
    found = {name: float(value) for name, value in zip(names, whole, strict=True)}
    for name, rule in combined.items():
        if found.keys() >= set(rule.parts):
            found[name] = float(rule.of(np.array([found[part] for part in rule.parts])))
    return found


def _table(columns: Mapping[str, Sequence[float | None]]) -> tuple[list[str], NDArray[np.float64]]:
    """The columns that have a value, by name, and as a table (records, columns) with NaN where there is none."""
    present = {name: column for name, column in columns.items() if any(value is not None for value in column)}
    rows = [[np.nan if value is None else value for value in column] for column in present.values()]
    return list(present), np.array(rows, dtype=np.float64).T


def _means(table: NDArray[np.float64], counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean of each column (records, columns) under each weighting of the records (samples, records)."""
    known = ~np.isnan(table)
    weights = counts @ known
    sums = counts @ np.where(known, table, 0.0)
    return np.divide(sums, weights, out=np.full_like(sums, np.nan), where=weights > 0)


def _resamples(records: int, resamples: int, seed: int) -> Iterator[NDArray[np.float64]]:
    """How often each record was drawn: blocks of (samples, records)."""
    generator = np.random.default_rng(seed)
    for start in range(0, resamples, _RESAMPLES_AT_ONCE):
        size = min(_RESAMPLES_AT_ONCE, resamples - start)
        yield generator.multinomial(records, np.full(records, 1 / records), size=size).astype(np.float64)


def _estimate(value: NDArray[np.float64] | float, spread: NDArray[np.float64], records: int) -> Estimate:
    tail = (1 - _COVERAGE) / 2
    low, high = np.nanquantile(spread, [tail, 1 - tail])
    return Estimate(float(value), float(low), float(high), records)
