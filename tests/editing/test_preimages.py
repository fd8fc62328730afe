"""Kinds of metric: preimages against dense algebra, and the null space against AlphaEdit's equations written out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from patchhub.cache import Cache
from patchhub.constraints import Columns, difference, join, no_columns, solve
from patchhub.delta import to_dense
from patchhub.editing import metric as under_test
from patchhub.editing.metric import Covariance, MetricCache, NullSpace, regularised
from patchhub.errors import EditError

THRESHOLD, L2 = 2e-2, 10.0


def moment_of(size: int, seed: int, *, low: float = -4.0, high: float = 1.0) -> Tensor:
    """A second moment with eigenvalues from 10^low to 10^high."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    return (basis * torch.logspace(low, high, size, dtype=torch.float64)) @ basis.T


def draw(rows: int, size: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, size)).astype(np.float32)


def columns_of(by: NullSpace, moment: Tensor, keys: np.ndarray, residuals: np.ndarray) -> Columns:
    preimages = by.of(by.prepare(moment, "w"), torch.from_numpy(keys)).numpy()
    return Columns(keys, preimages, residuals, np.ones(len(keys), np.float32))


def alpha_edit(moment: Tensor, batches: list[tuple[np.ndarray, np.ndarray]]) -> list[np.ndarray]:
    """The weight's change after each batch (K, V wanted at K against W0), as the published code has it: every batch solves

        (P (K K^T + C_0) + L2 I) X = P K R^T,   W += X^T,   C_0 += K K^T

    with R what the present weight still misses, and P from the singular vectors of the moment below the threshold.
    """
    left, values, _ = np.linalg.svd(moment.numpy())
    free = left[:, values < THRESHOLD]
    projection = free @ free.T
    size = len(projection)
    cache, change, found = np.zeros((size, size)), np.zeros((batches[0][1].shape[1], size)), []
    for keys, wanted in batches:
        K, V = keys.T.astype(np.float64), wanted.T.astype(np.float64)
        residual = V - change @ K
        change = (
            change + np.linalg.solve(projection @ (K @ K.T + cache) + L2 * np.eye(size), projection @ K @ residual.T).T
        )
        cache = cache + K @ K.T
        found.append(change)
    return found


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 10**6), st.integers(3, 20), st.integers(1, 5), st.lists(st.integers(1, 9), min_size=1, max_size=4)
)
def test_one_batch_after_another_is_alpha_edit(seed, size, out, sizes):
    """Also with more keys than free directions."""
    moment, by = moment_of(size, seed), NullSpace(THRESHOLD, L2)
    batches = [(draw(n, size, seed + 2 * i), draw(n, out, seed + 2 * i + 1)) for i, n in enumerate(sizes)]
    nothing = no_columns((out, size))
    active, change = nothing, np.zeros((out, size))
    for (keys, wanted), expected in zip(batches, alpha_edit(moment, batches), strict=True):
        added = columns_of(by, moment, keys, wanted)
        change = change + to_dense(difference(active, added, nothing))
        active = join([active, added])
        assert relative(change, expected) < 1e-8
        assert relative(to_dense(solve(active)), expected) < 1e-8


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.integers(4, 24))
def test_preimages_are_the_projection_over_l2(seed, size):
    moment, by = moment_of(size, seed), NullSpace(THRESHOLD, L2)
    values, vectors = torch.linalg.eigh(moment)
    free = vectors[:, values < THRESHOLD]
    keys = torch.from_numpy(draw(5, size, seed))
    found = by.of(by.prepare(moment, "w"), keys)
    torch.testing.assert_close(found, keys.double() @ free @ free.T / L2, rtol=1e-9, atol=1e-10)


def test_what_is_protected_stays(tmp_path: Path):
    """Through the float32 file: a key in the span of the text's large directions keeps its value, whatever is written."""
    moment, cache = moment_of(16, 0), MetricCache(Cache(tmp_path), "0" * 64, NullSpace(THRESHOLD, L2))
    cache.store("w", moment.float())
    values, vectors = torch.linalg.eigh(moment)
    protected = vectors[:, values >= THRESHOLD].T.numpy()
    keys = draw(6, 16, 1)
    preimages = cache.preimages("w", torch.from_numpy(keys)).numpy().astype(np.float32)
    change = to_dense(solve(Columns(keys, preimages, draw(6, 3, 2), np.ones(6, np.float32))))
    assert np.linalg.norm(change) > 0.1
    assert np.linalg.norm(protected @ change.T) < 1e-5 * np.linalg.norm(change)


def test_kinds_do_not_read_one_another(tmp_path: Path):
    MetricCache(Cache(tmp_path), "0" * 64, Covariance(0.01)).store("w", moment_of(6, 0))
    assert not MetricCache(Cache(tmp_path), "0" * 64, NullSpace(THRESHOLD, L2)).has("w")


def test_no_free_direction_is_an_error():
    with pytest.raises(EditError, match="no direction of w") as caught:
        NullSpace(THRESHOLD, L2).prepare(moment_of(5, 0, low=-1.0), "w")
    assert caught.value.facts["smallest"] == pytest.approx(0.1)
    with pytest.raises(EditError, match="not finite"):
        NullSpace(THRESHOLD, L2).prepare(torch.full((4, 4), float("nan")), "w")


def test_everything_free_is_a_plain_ridge():
    keys = torch.eye(4)
    by = NullSpace(1e9, L2)
    kept = by.prepare(moment_of(4, 0), "w")
    assert kept.shape == (4, 0)
    assert torch.equal(by.of(kept, keys), torch.eye(4, dtype=torch.float64) / L2)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.integers(1, 12), st.floats(0, 1))
def test_regularisation_adds_a_share_of_the_median_diagonal(seed, size, epsilon):
    draws = torch.randn(size + 3, size, generator=torch.Generator().manual_seed(seed))
    moment = draws.T @ draws
    before = moment.clone()
    found = regularised(moment, epsilon)
    off = ~torch.eye(size, dtype=torch.bool)
    assert torch.equal(found[off], moment.double()[off])
    middle = sorted(moment.diagonal().tolist())[(size - 1) // 2]  # the lower one of two
    torch.testing.assert_close(found.diagonal(), moment.diagonal().double() + epsilon * middle, rtol=1e-6, atol=1e-7)
    assert torch.equal(moment, before)


@pytest.mark.parametrize("block", [1, 7, 24, 100])
def test_a_factor_used_in_blocks_solves_the_same(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    moment, keys = moment_of(24, 3), torch.from_numpy(draw(5, 24, 4))
    by = Covariance(0.01)
    monkeypatch.setattr(under_test, "_BLOCK", block)
    expected = torch.linalg.solve(regularised(moment, 0.01), keys.double().T).T
    torch.testing.assert_close(by.of(by.prepare(moment, "w"), keys), expected, rtol=1e-9, atol=1e-9)
