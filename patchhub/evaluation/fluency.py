"""Fluency: how varied the words of generated text are, as in ROME's evaluation. Repetition, the sign of a broken model, scores low."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Final

from patchhub.evaluation.suites import Scores, scored

WEIGHTS: Final[Mapping[int, float]] = {2: 2 / 3, 3: 4 / 3}
"""The weight of each n-gram length; their mean is 1."""

_WORD = re.compile(r"\w+|[^\w\s]")


def words(text: str) -> list[str]:
    """Runs of letters and digits, and every other visible character by itself."""
    return _WORD.findall(text)


def entropy(items: Sequence[str], n: int) -> float:
    """The entropy in bits of the n-grams of `items`, H = -sum_g p(g) log2 p(g); 0 where there is no n-gram."""
    counts = Counter(tuple(items[start : start + n]) for start in range(len(items) - n + 1))
    total = counts.total()
    return -sum(count / total * math.log2(count / total) for count in counts.values()) + 0.0


def fluency(text: str) -> float:
    """The mean of 2/3 H(bigrams) and 4/3 H(trigrams) of a text, in bits."""
    found = words(text)
    return sum(weight * entropy(found, n) for n, weight in WEIGHTS.items()) / len(WEIGHTS)


def fluency_scores(texts: Sequence[str | None], *, resamples: int = 1000, seed: int = 0) -> Scores:
    """fluency, the mean over texts; None stands for a record that has no text."""
    column = [None if text is None else fluency(text) for text in texts]
    return scored("fluency", {}, {"fluency": column}, {}, resamples=resamples, seed=seed)
