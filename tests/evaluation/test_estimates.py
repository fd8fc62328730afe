"""Means and intervals: what they are on known data, and that they depend on nothing but data, resamples and seed."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from patchhub.evaluation.suites import Combined, arithmetic_mean, estimate, harmonic_mean, mean_or_none

values = st.none() | st.floats(0, 1)
columns = st.lists(st.tuples(values, values), min_size=1, max_size=20)
BOTH = {"S": Combined(("a", "b"), harmonic_mean)}


@given(columns)
def test_values_are_the_means_of_what_is_there(rows):
    table = {"a": [row[0] for row in rows], "b": [row[1] for row in rows]}
    result = estimate(table, BOTH, resamples=50)
    known = {name: [value for value in column if value is not None] for name, column in table.items()}
    for name, column in known.items():
        if not column:
            assert name not in result
            continue
        assert result[name].value == pytest.approx(math.fsum(column) / len(column))
        assert result[name].records == len(column)
        assert min(column) - 1e-12 <= result[name].low <= result[name].high <= max(column) + 1e-12
    assert ("S" in result) == all(known.values())


def test_the_harmonic_mean_is_zero_with_any_zero():
    assert harmonic_mean(np.array([[0.5, 1.0, 1.0], [0.0, 1.0, 1.0]])).tolist() == [0.75, 0.0]
    combined = estimate({"a": [1.0, 1.0], "b": [0.0, 0.0]}, BOTH)
    assert (combined["S"].value, combined["S"].high) == (0.0, 0.0)


def test_a_combined_score_is_that_of_the_means_not_the_mean_of_scores():
    result = estimate({"a": [1.0, 0.0], "b": [0.0, 1.0]}, BOTH | {"A": Combined(("a", "b"), arithmetic_mean)})
    assert result["S"].value == pytest.approx(0.5)
    assert result["A"].value == result["A"].low == result["A"].high == pytest.approx(0.5)


def test_the_interval_is_the_binomial_one():
    share, records = 0.8, 400
    column = [1.0] * int(share * records) + [0.0] * int((1 - share) * records + 0.5)
    result = estimate({"a": column}, {}, resamples=4000)["a"]
    half = 1.96 * math.sqrt(share * (1 - share) / records)
    assert result.value == pytest.approx(share)
    assert result.low == pytest.approx(share - half, abs=0.005)
    assert result.high == pytest.approx(share + half, abs=0.005)


def test_the_seed_alone_decides_the_samples():
    column = [float(number % 3 == 0) for number in range(50)]
    assert estimate({"a": column}, {}, seed=1) == estimate({"a": column}, {}, seed=1)
    assert estimate({"a": column}, {}, seed=1) != estimate({"a": column}, {}, seed=2)
    alone, beside = estimate({"a": column}, {}), estimate({"a": column, "b": [0.0] * 50}, {})
    assert beside["a"] == alone["a"]


def test_nothing_to_estimate():
    assert estimate({}, {}) == estimate({"a": []}, {}) == estimate({"a": [None]}, BOTH) == {}
    assert mean_or_none([]) is None
    assert mean_or_none([0.0, 1.0]) == 0.5
