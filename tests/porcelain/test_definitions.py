"""Every score that a suite gives has a definition, and what stands for a suite are scores of it."""

from __future__ import annotations

from patchhub.evaluation.live import LiveReading, live_scores
from patchhub.evaluation.metrics import DocumentDrift
from patchhub.evaluation.suites import (
    Sibling,
    counterfact_scores,
    drift_scores,
    fluency_scores,
    scored,
    wise_scores,
    zsre_scores,
)
from patchhub.porcelain.scores import (
    BESIDE,
    DEFINITIONS,
    FIGURES,
    GENERALITY,
    GROUPS,
    LEADING,
    SPECIFICITY,
    SUITES,
    headline,
)
from tests.evaluation.test_suites import FACTS

WRITTEN = LiveReading(
    "1",
    "Paris",
    (" Paris", " Paris"),
    (" Paris",),
    " Rome",
    ((Sibling("The capital of Spain is", frozenset()), " Rome"),),
)
EVERY = {
    "counterfact": counterfact_scores(FACTS, FACTS),
    "zsre": zsre_scores(FACTS, FACTS),
    "wise": wise_scores(FACTS, FACTS),
    "live": live_scores([WRITTEN], [WRITTEN], chat=True),
    "fluency": fluency_scores(["a b c"]),
    "drift": drift_scores([DocumentDrift(0.1, 0.1, 3)]),
    "judge": scored("judge", {}, {"judged": [1.0]}, {}, resamples=1, seed=0),
}


def test_definitions_are_of_the_scores_and_of_nothing_else():
    assert {name for scores in EVERY.values() for name in scores.estimates} == set(DEFINITIONS)
    assert set(GROUPS) == set(EVERY)


def test_what_stands_for_a_suite_is_measured():
    shared = {name for suite in ("live", "fluency", "drift", "judge") for name in EVERY[suite].estimates}
    assert {*BESIDE, *FIGURES} <= shared
    for suite in SUITES:
        found = set(EVERY[suite].estimates)
        assert set(LEADING[suite]) <= found
        assert {GENERALITY[suite], SPECIFICITY[suite]} <= set(LEADING[suite])
        assert set(headline(suite)) <= found | shared
    assert headline("unknown") == BESIDE
