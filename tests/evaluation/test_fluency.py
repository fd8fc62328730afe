"""Fluency is ROME's n-gram entropy: compared with the formula written out in numpy, and with what is known by counting."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from patchhub.evaluation.suites import entropy, fluency, fluency_scores, words

texts = st.lists(st.sampled_from(["a", "b", "c", "."]), max_size=30).map(" ".join)


def plain(text):
    """2/3 of the bigrams' and 4/3 of the trigrams' entropy, their mean, as ROME's evaluation writes it."""
    tokens, found = text.split(), []
    for n in (2, 3):
        grams = list(zip(*(tokens[start:] for start in range(n)), strict=False))
        counts = np.array([grams.count(gram) for gram in set(grams)], dtype=float)
        shares = counts / counts.sum()
        found.append(np.sum(-shares * np.log(shares) / np.log(2)) if grams else 0.0)
    return float(np.mean(np.array(found) * np.array([2 / 3, 4 / 3])))


@given(texts)
def test_fluency_is_the_published_formula(text):
    assert fluency(text) == pytest.approx(plain(text), abs=1e-12)


@given(st.integers(3, 200))
def test_what_never_repeats_has_the_most_and_what_only_repeats_has_none(n):
    distinct = " ".join(f"w{number}" for number in range(n))
    assert fluency(distinct) == pytest.approx((2 / 3 * math.log2(n - 1) + 4 / 3 * math.log2(n - 2)) / 2)
    assert fluency("the " * n) == 0


def test_words_are_runs_of_letters_and_single_signs():
    assert words("Zoë's 2 cats, 東京!") == ["Zoë", "'", "s", "2", "cats", ",", "東京", "!"]
    assert entropy(["a", "b", "a", "b"], 2) == pytest.approx(-(2 / 3 * math.log2(2 / 3) + 1 / 3 * math.log2(1 / 3)))
    assert fluency("") == fluency("one") == 0


def test_records_without_text_do_not_count():
    scores = fluency_scores(["a b c d", None, "a a a a"])
    assert scores.estimates["fluency"].records == 2
    assert scores.estimates["fluency"].value == pytest.approx(fluency("a b c d") / 2)
