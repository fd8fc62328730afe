"""The largest singular value of a weight and of a change, by power iteration. NumPy only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
from jaxtyping import Float

from patchhub.delta import Delta, LowRank, to_dense

_STEPS: Final = 40  # the value is then right to about a per cent, whatever the gap to the next one

Vector = Float[np.ndarray, " width"]


def largest_singular_value(matrix: Float[np.ndarray, "rows columns"]) -> float:
    """Of a matrix, from below."""
    return _largest(lambda x: matrix @ x, lambda y: matrix.T @ y, matrix.shape[1])


def largest_of_delta(delta: Delta) -> float:
    """Of a delta, from below; factors are not multiplied out."""
    if isinstance(delta, LowRank):
        B, A = delta.B, delta.A
        return _largest(lambda x: B @ (A @ x), lambda y: A.T @ (B.T @ y), A.shape[1])
    return largest_singular_value(to_dense(delta))


def _largest(apply: Callable[[Vector], Vector], back: Callable[[Vector], Vector], width: int) -> float:
    """max ||M x|| over unit x, M given by its products with vectors from both sides."""
    x = np.random.default_rng(0).standard_normal(width)
    value = 0.0
    for _ in range(_STEPS):
        size = float(np.linalg.norm(x))
        if size == 0.0 or not np.isfinite(size):
            return size and value
        y = apply(x / size)
        value, x = float(np.linalg.norm(y)), back(y)
    return value
