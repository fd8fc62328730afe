"""Interference: cosines and misfits are the textbook formulas, and near keys that disagree are found wherever they are."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from patchhub.constraints import (
    Columns,
    expected_misfit,
    interfering,
    join,
    key_cosines,
    misfit,
    near_keys,
    residual_cosines,
    solve,
)
from patchhub.delta import LowRank, to_dense
from tests.test_constraints import draw_columns, metric

SEEDS = st.integers(0, 2**32 - 1)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


@settings(deadline=None, max_examples=50)
@given(SEEDS)
def test_the_key_cosine_is_that_of_whitened_keys(seed):
    rng = np.random.default_rng(seed)
    C = metric(rng)
    left, right = draw_columns(rng, 4, C), draw_columns(rng, 3, C)
    white = np.linalg.inv(np.linalg.cholesky(C))
    found, residuals = key_cosines(left, right), residual_cosines(left, right)
    for i in range(4):
        for j in range(3):
            assert found[i, j] == pytest.approx(cosine(white @ left.keys[i], white @ right.keys[j]), abs=1e-4)
            assert residuals[i, j] == pytest.approx(cosine(left.residuals[i], right.residuals[j]), abs=1e-5)
    np.testing.assert_allclose(np.diag(key_cosines(left, left)), 1, atol=1e-6)


def test_a_column_of_zeros_is_near_nothing():
    rng = np.random.default_rng(0)
    C = metric(rng)
    columns = draw_columns(rng, 2, C)
    nothing = Columns(
        *(np.zeros_like(part) for part in (columns.keys, columns.preimages, columns.residuals)), columns.ridge
    )
    assert not key_cosines(nothing, columns).any()
    assert not residual_cosines(nothing, columns).any()
    assert interfering(nothing, columns) == []
    assert not misfit([], nothing).any()


@settings(deadline=None, max_examples=30)
@given(SEEDS, st.integers(1, 6))
def test_the_misfit_is_the_share_of_the_residual_that_is_missed(seed, n):
    rng = np.random.default_rng(seed)
    columns = draw_columns(rng, n, metric(rng))
    change = solve(columns)
    dense = to_dense(change)
    halves = [LowRank(change.B / 2, change.A), LowRank(change.B / 2, change.A)]
    for i, share in enumerate(misfit(halves, columns)):
        missed = np.linalg.norm(dense @ columns.keys[i] - columns.residuals[i]) / np.linalg.norm(columns.residuals[i])
        assert share == pytest.approx(missed, rel=1e-6)
    np.testing.assert_allclose(misfit([], columns), 1)


def test_a_residual_of_rounding_errors_misses_nothing():
    rng = np.random.default_rng(3)
    columns = draw_columns(rng, 4, metric(rng))
    residuals = columns.residuals.copy()
    residuals[1] *= 1e-6 * np.linalg.norm(columns.keys[1]) / np.linalg.norm(residuals[1])
    nearly = Columns(columns.keys, columns.preimages, residuals, columns.ridge)
    shares = misfit([solve(columns)], nearly)
    assert shares[1] == 0
    np.testing.assert_array_equal(np.delete(shares, 1), np.delete(misfit([solve(columns)], columns), 1))
    assert expected_misfit(nearly, 1, []) == 0
    assert expected_misfit(nearly, 0, [0]) > 0


def with_row(columns: Columns, row: int, key: Columns, sign: float, residual: np.ndarray) -> Columns:
    """The columns with one row's key that of ``key`` times ``sign``, and another residual."""
    parts = [array.copy() for array in (columns.keys, columns.preimages, columns.residuals)]
    parts[0][row], parts[1][row], parts[2][row] = sign * key.keys[0], sign * key.preimages[0], residual
    return Columns(*parts, columns.ridge)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("agrees", [True, False])
def test_one_near_pair_among_thousands_is_found_if_it_disagrees(sign, agrees):
    """More rows than one block of the cosine matrix; a key and its opposite agree where the residuals are opposite."""
    rng = np.random.default_rng(3)
    C = metric(rng)
    right = draw_columns(rng, 5, C)
    residual = sign * right.residuals[0] * (1 if agrees else -1)
    left = with_row(draw_columns(rng, 1500, C), 1200, right, sign, residual)
    found = interfering(left, right, key_limit=0.95)
    if agrees:
        assert found == []
    else:
        (pair,) = found
        assert (pair.left, pair.right) == (1200, 0)
        assert pair.key_cosine == pytest.approx(sign, abs=1e-6)


def test_a_near_key_that_disagrees_costs_both_and_one_that_agrees_costs_neither():
    rng = np.random.default_rng(4)
    C = metric(rng)
    one = draw_columns(rng, 1, C)
    alone = misfit([solve(one)], one)[0]
    for residual, more in ((-one.residuals[0], True), (one.residuals[0], False)):
        other = with_row(draw_columns(rng, 1, C), 0, one, 1.0, residual)
        together = solve(join([one, other]))
        assert (misfit([together], one)[0] > alone) == more
        assert (misfit([together], other)[0] > alone) == more


@settings(deadline=None, max_examples=40)
@given(SEEDS, st.integers(1, 30), st.integers(0, 30), st.floats(0.05, 0.9))
def test_near_keys_are_the_pairs_above_the_limit(seed, left, right, limit):
    rng = np.random.default_rng(seed)
    C = metric(rng)
    one, other = draw_columns(rng, left, C), draw_columns(rng, right, C)
    cosines = key_cosines(one, other)
    found = {(pair.left, pair.right): pair.key_cosine for pair in near_keys(one, other, limit=limit)}
    for i in range(left):
        for j in range(right):
            if abs(abs(cosines[i, j]) - limit) > 1e-4:
                assert ((i, j) in found) == (abs(cosines[i, j]) > limit)
    for pair, cosine in found.items():
        assert cosine == pytest.approx(cosines[pair], abs=1e-4)


def test_a_key_of_zeros_is_near_no_key():
    rng = np.random.default_rng(0)
    C = metric(rng)
    columns = draw_columns(rng, 2, C)
    zero = Columns(columns.keys * 0, columns.preimages * 0, columns.residuals, columns.ridge)
    assert near_keys(zero, columns, limit=0.0) == []


@settings(deadline=None, max_examples=60)
@given(SEEDS, st.integers(1, 6))
def test_the_expected_misfit_of_known_residuals_is_the_misfit(seed, n):
    rng = np.random.default_rng(seed)
    columns = draw_columns(rng, n, metric(rng))
    true = misfit([solve(columns)], columns)
    for row in range(n):
        assert expected_misfit(columns, row, []) == pytest.approx(true[row], rel=1e-4, abs=1e-6)


@settings(deadline=None, max_examples=60)
@given(SEEDS, st.integers(1, 3), st.integers(0, 2))
def test_an_unknown_residual_counts_as_one_at_a_right_angle_of_the_mean_length(seed, unknown, known):
    rng = np.random.default_rng(seed)
    drawn = draw_columns(rng, unknown + known, metric(rng))
    width = drawn.residuals.shape[1]
    basis = np.linalg.qr(rng.standard_normal((width, width)))[0][: unknown + known]
    lengths = rng.uniform(0.5, 2.0, known)
    mean = np.sqrt(np.mean(lengths**2)) if known else 1.0
    residuals = (basis * np.concatenate([np.full(unknown, mean), lengths])[:, None]).astype(np.float32)
    columns = Columns(drawn.keys, drawn.preimages, residuals, drawn.ridge)
    true = misfit([solve(columns)], columns)
    forgotten = Columns(drawn.keys, drawn.preimages, residuals.copy(), drawn.ridge)
    forgotten.residuals[:unknown] = 0
    for row in range(unknown + known):
        assert expected_misfit(forgotten, row, range(unknown)) == pytest.approx(true[row], rel=1e-4, abs=1e-6)
