"""The largest singular value of a weight and of a change, by power iteration. NumPy only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
from jaxtyping import Float

from patchhub.delta import Delta, LowRank, to_dense

_STEPS: Final = 40  # the value is then right to about a per cent, whatever the gap to the next one

Vector = Float[np.ndarray, " width"]


def largest_singular_value(matrix: Float[np.ndarray, "rows columns"]) -> float:
    """Of a matrix, from below."""
    matrix = _at_least_single(matrix)
    return _largest(lambda x: matrix @ x, lambda y: matrix.T @ y, matrix.shape[1], matrix.dtype)


def largest_of_delta(delta: Delta) -> float:
    """Of a delta, from below; factors are not multiplied out."""
    if isinstance(delta, LowRank):
        B, A = _at_least_single(delta.B), _at_least_single(delta.A)
        return _largest(lambda x: B @ (A @ x), lambda y: A.T @ (B.T @ y), A.shape[1], A.dtype)
    return largest_singular_value(to_dense(delta))


def _largest(
    apply: Callable[[Vector], Vector], back: Callable[[Vector], Vector], width: int, dtype: np.dtype[Any]
) -> float:
    """max ||M x|| over unit x, M given by its products with vectors from both sides.

    Vectors are of M's own type: a product of two types copies the whole matrix to the wider one, every time.
    """
    x = np.random.default_rng(0).standard_normal(width).astype(dtype)
    value = 0.0
    for _ in range(_STEPS):
        size = float(np.linalg.norm(x))
        if size == 0.0 or not np.isfinite(size):
            return size and value
        y = apply(x / dtype.type(size))
        value, x = float(np.linalg.norm(y)), back(y)
    return value


def _at_least_single(matrix: Float[np.ndarray, "rows columns"]) -> Float[np.ndarray, "rows columns"]:
    """In float32 where it is float16, whose range the steps would leave."""
    return matrix.astype(np.promote_types(matrix.dtype, np.float32), copy=False)
