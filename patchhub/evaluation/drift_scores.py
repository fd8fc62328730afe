"""Drift as scores: perplexity ratio and KL over documents, with intervals."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from patchhub.evaluation.drift import DocumentDrift
from patchhub.evaluation.estimates import Combined
from patchhub.evaluation.suites import Scores, scored


def drift_scores(documents: Sequence[DocumentDrift], *, resamples: int = 1000, seed: int = 0) -> Scores:
    """perplexity_ratio and kl per token over all documents; the records of their intervals are the documents."""
    columns = {
        "growth": [document.growth for document in documents],
        "divergence": [document.divergence for document in documents],
        "positions": [float(document.positions) for document in documents],
    }
    combined = {
        "perplexity_ratio": Combined(("growth", "positions"), _exp_of_ratio),
        "kl": Combined(("divergence", "positions"), _ratio),
    }
    scores = scored("drift", {}, columns, combined, resamples=resamples, seed=seed)
    shown = {name: found for name, found in scores.estimates.items() if name in combined}
    return Scores(scores.suite, scores.settings, shown, {}, {})


def _ratio(means: NDArray[np.float64]) -> NDArray[np.float64]:
    """(..., 2) to (...)."""
    return np.asarray(means[..., 0] / means[..., 1])


def _exp_of_ratio(means: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(np.exp(_ratio(means)))
