"""Joined changes: what TIES and a plain sum give, entry by entry."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from patchhub.delta import from_sparse, to_dense
from patchhub.runtime.routing import merge_changes

VALUES = st.sampled_from([-3.0, -2.0, -0.5, 0.0, 0.5, 1.0, 4.0])


@st.composite
def changes(draw: st.DrawFn) -> list[np.ndarray]:
    count = draw(st.integers(1, 3))
    return [
        np.array(draw(st.lists(VALUES, min_size=6, max_size=6)), dtype=np.float32).reshape(2, 3) for _ in range(count)
    ]


def plain_ties(matrices: list[np.ndarray], density: float) -> np.ndarray:
    """TIES one entry at a time."""
    trimmed = []
    for matrix in matrices:
        sizes = sorted((abs(v) for v in matrix.ravel() if v), reverse=True)
        kept = round(density * len(sizes))
        least = sizes[kept - 1] if kept else np.inf
        trimmed.append(np.where(np.abs(matrix) >= least, matrix, 0))
    result = np.zeros_like(matrices[0])
    for place in np.ndindex(result.shape):
        values = [matrix[place] for matrix in trimmed]
        sign = np.sign(sum(values))
        agreeing = [value for value in values if value and np.sign(value) == sign]
        result[place] = sum(agreeing) / len(agreeing) if agreeing else 0
    return result


@given(changes(), st.sampled_from([0.25, 0.53, 1.0]))
def test_ties_is_what_it_is_entry_by_entry(matrices: list[np.ndarray], density: float) -> None:
    found = merge_changes([from_sparse(matrix) for matrix in matrices], "ties", density)
    expected = plain_ties(matrices, density) if len(matrices) > 1 else matrices[0]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert found.dtype == np.float32


@given(changes())
def test_linear_is_the_sum(matrices: list[np.ndarray]) -> None:
    found = merge_changes([from_sparse(matrix) for matrix in matrices], "linear")
    np.testing.assert_allclose(found, sum(to_dense(from_sparse(matrix)) for matrix in matrices), rtol=1e-6)


@given(changes(), st.integers(0, 2**32 - 1))
def test_disjoint_subspaces_do_not_disturb_one_another(matrices: list[np.ndarray], seed: int) -> None:
    owner = np.random.default_rng(seed).integers(0, len(matrices), matrices[0].shape)
    apart = [np.where(owner == number, matrix, 0).astype(np.float32) for number, matrix in enumerate(matrices)]
    found = merge_changes([from_sparse(matrix) for matrix in apart], "ties", 1.0)
    np.testing.assert_array_equal(found, sum(apart))
