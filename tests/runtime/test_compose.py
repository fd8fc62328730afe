"""Composing equals the dense oracle, rounds once, and gives the same bits every time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from patchhub.delta import Delta, Dense, LowRank, from_sparse, to_dense
from patchhub.models.structure import Orientation
from patchhub.runtime.compose import compose, survival

HALVES = [torch.bfloat16, torch.float16]
FLOATS = [torch.float32, *HALVES]


def random_deltas(seed: int, out: int, inner: int, kinds: Sequence[str], scale: float = 0.1) -> list[Delta]:
    rng = np.random.default_rng(seed)
    result: list[Delta] = []
    for kind in kinds:
        matrix = (scale * rng.standard_normal((out, inner))).astype(np.float32)
        if kind == "low":
            rank = int(rng.integers(1, 4))
            left = (scale * rng.standard_normal((out, rank))).astype(np.float32)
            result.append(LowRank(left, rng.standard_normal((rank, inner)).astype(np.float32)))
        elif kind == "half":
            result.append(LowRank(matrix[:, :1].astype(np.float16), rng.standard_normal((1, inner)).astype(np.float16)))
        elif kind == "dense":
            result.append(Dense(matrix))
        else:
            result.append(from_sparse(matrix * (rng.random((out, inner)) < 0.2)))
    return result


def stored_weight(out: int, inner: int, orientation: Orientation, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(out * inner)
    shape = (out, inner) if orientation == "out_in" else (inner, out)
    return torch.randn(shape, generator=generator).to(dtype)


def oracle(w0: Tensor, deltas: Sequence[Delta], orientation: Orientation) -> Tensor:
    """W0 + sum of deltas in float64, as stored."""
    total = torch.from_numpy(sum((to_dense(d) for d in deltas), np.zeros(deltas[0].shape)))
    return w0.double() + (total if orientation == "out_in" else total.T)


kinds = st.lists(st.sampled_from(["low", "half", "dense", "sparse"]), min_size=1, max_size=6)
orientations: st.SearchStrategy[Orientation] = st.sampled_from(["out_in", "in_out"])


@settings(deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 9), st.integers(1, 17), kinds, orientations, st.sampled_from(FLOATS))
def test_equals_the_dense_oracle(
    seed: int, out: int, inner: int, kinds: list[str], orientation: Orientation, dtype: torch.dtype
) -> None:
    w0 = stored_weight(out, inner, orientation, dtype)
    before = w0.clone()
    deltas = random_deltas(seed, out, inner, kinds)
    exact = oracle(w0, deltas, orientation)
    full = compose(w0, deltas, orientation=orientation, dtype=torch.float32)
    assert full.shape == w0.shape
    torch.testing.assert_close(full.double(), exact, rtol=1e-5, atol=1e-5)
    for target in FLOATS:  # one cast, whatever the stored type
        assert torch.equal(compose(w0, deltas, orientation=orientation, dtype=target), full.to(target))
    assert torch.equal(w0, before)


@pytest.mark.parametrize("orientation", ["out_in", "in_out"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_no_deltas_give_the_stored_weight_in_memory_of_its_own(orientation: Orientation, dtype: torch.dtype) -> None:
    w0 = stored_weight(5, 7, orientation, dtype)
    composed = compose(w0, [], orientation=orientation, dtype=dtype)
    assert torch.equal(composed, w0)
    assert composed.data_ptr() != w0.data_ptr()


@pytest.mark.parametrize("orientation", ["out_in", "in_out"])
def test_the_same_list_gives_the_same_bits_whatever_the_process_allows(orientation: Orientation) -> None:
    w0 = stored_weight(96, 352, orientation)
    deltas = random_deltas(3, 96, 352, ["low", "dense", "low", "sparse", "half", "low"])
    first = compose(w0, deltas, orientation=orientation, dtype=torch.float32)
    precision = torch.get_float32_matmul_precision()
    try:
        for allowed in ("highest", "high", "medium"):
            torch.set_float32_matmul_precision(allowed)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                again = compose(w0.clone(), deltas, orientation=orientation, dtype=torch.float32)
            assert torch.equal(first, again)
            assert torch.get_float32_matmul_precision() == allowed
    finally:
        torch.set_float32_matmul_precision(precision)


def test_a_delta_and_its_negative_leave_the_base_to_rounding() -> None:
    w0 = stored_weight(32, 80, "out_in", torch.bfloat16)
    [delta] = random_deltas(0, 32, 80, ["low"])
    assert isinstance(delta, LowRank)
    both = [delta, LowRank(-delta.B, delta.A)]
    assert torch.equal(compose(w0, both, orientation="out_in", dtype=torch.bfloat16), w0)


def test_a_delta_of_another_shape_is_an_error() -> None:
    w0 = stored_weight(4, 6, "in_out")
    with pytest.raises(ValueError, match="does not fit"):
        compose(w0, random_deltas(0, 6, 4, ["low"]), orientation="in_out", dtype=torch.float32)


@pytest.mark.parametrize("orientation", ["out_in", "in_out"])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("scale", [1e-4, 1e-3, 1e-2, 1.0])
def test_survival_equals_the_dense_oracle(orientation: Orientation, dtype: torch.dtype, scale: float) -> None:
    w0 = stored_weight(48, 64, orientation, dtype)
    deltas = random_deltas(1, 48, 64, ["low", "dense", "sparse"], scale)
    composed = compose(w0, deltas, orientation=orientation, dtype=dtype)
    wanted = oracle(w0, deltas, orientation) - w0.double()
    expected = 1 - float(((composed.double() - w0.double()) - wanted).norm() / wanted.norm())
    assert survival(w0, deltas, composed, orientation=orientation) == pytest.approx(expected, abs=1e-4)


def test_survival_at_its_ends() -> None:
    w0 = stored_weight(48, 64, "out_in", torch.bfloat16)
    deltas = random_deltas(1, 48, 64, ["low"])
    full = compose(w0, deltas, orientation="out_in", dtype=torch.float32)
    assert survival(w0, deltas, full, orientation="out_in") == pytest.approx(1.0, abs=1e-5)
    assert survival(w0, deltas, w0, orientation="out_in") == pytest.approx(0.0, abs=1e-6)
    assert survival(w0, [], w0, orientation="out_in") == 1.0
    nearly = random_deltas(1, 48, 64, ["low"], 1e-9)
    assert survival(w0, nearly, w0, orientation="out_in") == 1.0
    losses = [
        survival(w0, small, compose(w0, small, orientation="out_in", dtype=w0.dtype), orientation="out_in")
        for small in (random_deltas(1, 48, 64, ["low"], scale) for scale in (1e-4, 1e-3, 1e-2, 1e-1))
    ]
    assert losses == sorted(losses)
    assert losses[0] < 0.5 < 0.95 < losses[-1]
