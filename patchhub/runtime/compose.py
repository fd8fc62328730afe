"""The weights of a state: cast(W0 + sum of deltas), in float32, with one product and one cast (docs/format.md)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from patchhub.delta import Delta, Dense, LowRank, Sparse
from patchhub.models.structure import Orientation


@torch.no_grad()
def compose(
    w0: Float[Tensor, "rows columns"], deltas: Sequence[Delta], *, orientation: Orientation, dtype: torch.dtype
) -> Float[Tensor, "rows columns"]:
    """cast(W0 + sum of deltas), on the device of W0; W0 stays as it is.

    The factors of all low-rank deltas are concatenated in the given order and enter by one product; then dense and
    sparse deltas are added in the same order. Besides W0 and the result one float32 copy of the weight is in memory.
    The same arguments give the same bits on one machine, device and library set, whatever precision of products the
    process allows.

    Args:
        w0: the weight as the checkpoint stores it.
        deltas: in ascending order of blob id, which is the caller's duty.
        orientation: ``in_out`` if ``w0`` is (in, out); deltas are (out, in).
        dtype: of the result.

    Raises:
        ValueError: a delta has another shape than the weight.
    """
    total = w0.to(torch.float32, copy=True)
    _add(_out_in(total, orientation), deltas)
    return total.to(dtype)


@torch.no_grad()
def survival(
    w0: Float[Tensor, "rows columns"],
    deltas: Sequence[Delta],
    composed: Float[Tensor, "rows columns"],
    *,
    orientation: Orientation,
) -> float:
    """The share of the change that the cast keeps: 1 - ||(W - W0) - D|| / ||D||, D the sum of the deltas.

    1 where nothing is lost or nothing changes, 0 where no entry moved. Two float32 copies of the weight are in memory.
    Arguments as for `compose`; ``composed`` is its result.
    """
    wanted = torch.zeros(w0.shape, dtype=torch.float32, device=w0.device)
    _add(_out_in(wanted, orientation), deltas)
    size = _norm(wanted)
    lost = composed.to(torch.float32, copy=True).sub_(w0).sub_(wanted)
    return 1.0 - _norm(lost) / size if size else 1.0


def _out_in(weight: Tensor, orientation: Orientation) -> Tensor:
    """A view of shape (out, in)."""
    return weight if orientation == "out_in" else weight.T


def _add(total: Float[Tensor, "out in"], deltas: Sequence[Delta]) -> None:
    """Add the deltas to a float32 matrix, in place."""
    for delta in deltas:
        if delta.shape != tuple(total.shape):
            raise ValueError(f"a delta of shape {delta.shape} does not fit a weight of shape {tuple(total.shape)}")
    low = [delta for delta in deltas if isinstance(delta, LowRank)]
    if low:
        b = _tensor(np.concatenate([delta.B for delta in low], axis=1), total.device)
        a = _tensor(np.concatenate([delta.A for delta in low], axis=0), total.device)
        with _ieee_products():
            total.addmm_(b, a)
    for delta in deltas:
        if isinstance(delta, Dense):
            total.add_(_tensor(delta.matrix, total.device))
        elif isinstance(delta, Sparse):
            bits = np.unpackbits(delta.mask, count=total.numel())
            rows, columns = np.divmod(np.flatnonzero(bits), total.shape[1])
            places = (torch.from_numpy(rows).to(total.device), torch.from_numpy(columns).to(total.device))
            total.index_put_(places, _tensor(delta.values, total.device), accumulate=True)


def _tensor(array: Float[np.ndarray, " *shape"], device: torch.device) -> Tensor:
    writable = np.require(array, dtype=np.float32, requirements=["W"])
    return torch.from_numpy(writable).to(device)


def _norm(matrix: Tensor) -> float:
    return float(torch.linalg.vector_norm(matrix, dtype=torch.float64))


@contextmanager
def _ieee_products() -> Iterator[None]:
    """Float32 products in float32, even where the process lets them run in TF32 or bfloat16."""
    mkldnn: Any = torch.backends.mkldnn
    backends = (torch.backends.cuda.matmul, mkldnn.matmul)
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
