"""Bands and candidates are sound for any depth, and halving finds the best at a bounded cost."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from patchhub.editing.settings import EditSettings
from patchhub.porcelain.tune import RIDGES, STEP_SIZES, bands, candidates, sizes, successive_halving

DEPTHS = st.integers(3, 100)


@st.composite
def present_bands(draw):
    depth = draw(DEPTHS)
    first = draw(st.integers(0, depth - 2))
    return tuple(range(first, draw(st.integers(first, depth - 2)) + 1)), depth


@given(present_bands())
def test_bands_are_ascending_inside_the_model_and_listed_once(drawn):
    present, depth = drawn
    found = bands(present, depth)
    assert found[0] == present
    assert len(set(found)) == len(found) <= 7
    for band in found:
        assert band == tuple(range(band[0], band[-1] + 1))
        assert band[0] >= 0
        assert band[-1] <= depth - 2


def test_the_bands_of_an_8b_model():
    found = bands((4, 5, 6, 7, 8), 32)
    assert [(band[0], band[-1]) for band in found] == [(4, 8), (0, 4), (8, 12), (12, 16), (6, 8), (8, 8), (4, 12)]


def test_candidates_are_every_band_step_size_and_lambda_and_the_present_first():
    present = EditSettings((1, 2, 3), 64.0, 20, 0.5, 0.5, 0.06, 2.0)
    found = candidates(present, 6)
    assert found[0] is present
    assert len(set(found)) == len(found) == len(bands(present.layers, 6)) * len(STEP_SIZES) * len(RIDGES)
    assert {settings.clamp for settings in found} == {present.clamp}


@given(st.integers(1, 1000))
def test_rounds_grow_to_all_facts(facts):
    found = sizes(facts)
    assert list(found) == sorted(set(found))
    assert found[-1] == facts
    assert found[0] >= min(facts, 4)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=80), st.integers(1, 200))
def test_a_score_that_does_not_depend_on_the_facts_finds_the_best(scores, facts):
    asked: list[tuple[int, int]] = []

    def score(candidate: int, number: int) -> float:
        asked.append((candidate, number))
        return float(scores[candidate])

    found = successive_halving(range(len(scores)), score, sizes(facts))
    assert found[0].candidate == scores.index(max(scores))
    assert found[0].facts == facts
    assert sorted(standing.candidate for standing in found) == list(range(len(scores)))
    assert (0, facts) in asked
    assert len(set(asked)) == len(asked)


def test_the_cost_is_bounded():
    """63 settings on 24 facts: at most 63 on 6, 17 on 12 and 6 on 24 facts, not 63 on 24."""
    asked = []
    successive_halving(range(63), lambda candidate, facts: asked.append(facts) or candidate / 63, sizes(24))
    assert sum(asked) <= 63 * 6 + 17 * 12 + 6 * 24 < 63 * 24 / 2
    assert math.isclose(asked.count(24), 6)
