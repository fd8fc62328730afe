"""Several side memories of one weight joined into one: TIES (Yadav et al. 2023) or a plain sum. NumPy only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import numpy as np
from jaxtyping import Float

from patchhub.delta import Delta, to_dense

Merging: TypeAlias = Literal["ties", "linear"]


def merge_changes(
    changes: Sequence[Delta], method: Merging = "ties", density: float = 0.53
) -> Float[np.ndarray, "out in"]:
    """One change, float32, that stands for all; a single one stays as it is.

    Args:
        changes: of one weight, all of one shape.
        method: "linear" adds them up; "ties" first keeps the largest entries of each, elects a sign per entry and takes the mean of what
            agrees with it.
        density: the share of a change's nonzero entries that "ties" keeps.
    """
    matrices = [to_dense(change).astype(np.float32) for change in changes]
    if len(matrices) == 1:
        return matrices[0]
    if method == "linear":
        total: Float[np.ndarray, "out in"] = np.stack(matrices).sum(0)
        return total
    return _ties(np.stack([_trimmed(matrix, density) for matrix in matrices]))


def _trimmed(matrix: Float[np.ndarray, "out in"], density: float) -> Float[np.ndarray, "out in"]:
    """The matrix with all but the largest ``density`` of its nonzero entries, by magnitude, set to zero."""
    sizes = np.abs(matrix[matrix != 0])
    kept = round(density * sizes.size)
    if kept == 0:
        return np.zeros_like(matrix)
    least = np.partition(sizes, sizes.size - kept)[sizes.size - kept]
    return np.where(np.abs(matrix) >= least, matrix, np.float32(0))


def _ties(stacked: Float[np.ndarray, "n out in"]) -> Float[np.ndarray, "out in"]:
    """Per entry, the mean of the values that have the sign of the sum of all."""
    agree = (np.sign(stacked) == np.sign(stacked.sum(0))[None]) & (stacked != 0)
    mean: Float[np.ndarray, "out in"] = np.where(agree, stacked, np.float32(0)).sum(0)
    mean /= np.maximum(agree.sum(0), 1).astype(np.float32)
    return mean
