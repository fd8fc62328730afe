"""The weights of a state: cast(W0 + sum of deltas), in float32, with one product and one cast (docs/format.md).

Composed weights are kept on disk, so that loading a state again costs what loading its base costs (decision 4)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from patchhub.cache import Cache, Kind, Slot
from patchhub.delta import NEGLIGIBLE, Delta, Dense, LowRank, section
from patchhub.fsio import CHUNK
from patchhub.models.structure import Orientation

_BLOCK = 1 << 22  # entries worked on at a time: they stay in the processor's cache

_PER_BACKEND: Final = hasattr(torch.backends.cuda.matmul, "fp32_precision")  # torch 2.9 and later


@torch.no_grad()
def compose(
    w0: Float[Tensor, "*experts rows columns"], deltas: Sequence[Delta], *, orientation: Orientation, dtype: torch.dtype
) -> Float[Tensor, "*experts rows columns"]:
    """cast(W0 + sum of deltas), on the device of W0; W0 stays as it is.

    The factors of all low-rank deltas are concatenated in the given order and enter by one product; the sum of the
    dense and sparse deltas, in the same order, is added to it. The same arguments give the same bits on one machine,
    device and library set, whatever precision of products the process allows. Beyond W0 and the result, memory holds a
    few blocks of rows, and one float32 matrix if there are dense or sparse deltas.

    Args:
        w0: the weight as the checkpoint stores it; of three dimensions, the experts of a stacked weight; of one, a bias or a norm's.
        deltas: in ascending order of blob id, which is the caller's duty.
        orientation: ``in_out`` if ``w0``, or each expert, is (in, out); deltas are (out, in), of a stack (out, E in).
        dtype: of the result.

    Raises:
        ValueError: a delta has another shape than the weight.
    """
    if w0.ndim == 1:  # a vector is a matrix of one column
        return compose(w0[:, None], deltas, orientation="out_in", dtype=dtype)[:, 0]
    result = torch.empty(w0.shape, dtype=dtype, device=w0.device)
    for into, part, parts in zip(_experts(result), _experts(w0), sections(w0, deltas, orientation), strict=True):
        change = _change(part, parts, orientation)
        with _ieee_products():
            for rows in _blocks(part):
                into[rows] = change.added_to(part[rows].to(torch.float32, copy=True), rows)
    return result


def sections(w0: Tensor, deltas: Sequence[Delta], orientation: Orientation) -> list[Sequence[Delta]]:
    """The deltas of each expert of a stacked weight; of another weight all of them."""
    if w0.ndim == 2:
        return [deltas]
    inner = w0.shape[-1 if orientation == "out_in" else -2]
    return [[section(d, slice(e * inner, (e + 1) * inner)) for d in deltas] for e in range(len(w0))]


def _experts(weight: Tensor) -> list[Tensor]:
    return [weight] if weight.ndim == 2 else list(weight)


@torch.no_grad()
def survival(
    w0: Float[Tensor, "*experts rows columns"],
    deltas: Sequence[Delta],
    composed: Float[Tensor, "*experts rows columns"],
    *,
    orientation: Orientation,
) -> float:
    """The share of the change that the cast keeps: 1 - ||(W - W0) - D|| / ||D||, D the sum of the deltas.

    1 where nothing is lost or next to nothing changes (`NEGLIGIBLE`), 0 where no entry moved. Arguments and memory as for `compose`;
    ``composed`` is its result.
    """
    if w0.ndim == 1:
        return survival(w0[:, None], deltas, composed[:, None], orientation="out_in")
    lost = wanted = size = 0.0
    for part, made, parts in zip(_experts(w0), _experts(composed), sections(w0, deltas, orientation), strict=True):
        change = _change(part, parts, orientation)
        with _ieee_products():
            for rows in _blocks(part):
                block = change.added_to(torch.zeros(part[rows].shape, dtype=torch.float32, device=w0.device), rows)
                wanted += _square(block)
                size += _square(part[rows].to(torch.float32))
                lost += _square(made[rows].to(torch.float32, copy=True).sub_(part[rows]).sub_(block))
    return 1.0 if wanted <= NEGLIGIBLE**2 * size else 1.0 - (lost / wanted) ** 0.5


@dataclass(frozen=True)
class _Change:
    """A sum of deltas, left @ right + rest, in float32 and in the orientation of the stored weight."""

    left: Float[Tensor, "rows rank"] | None
    right: Float[Tensor, "rank columns"] | None
    rest: Float[Tensor, "rows columns"] | None

    def added_to(self, block: Float[Tensor, "some columns"], rows: slice) -> Float[Tensor, "some columns"]:
        """``block``, the given rows of a float32 weight, with their change added in place."""
        if self.left is not None and self.right is not None:
            block.addmm_(self.left[rows], self.right)
        return block if self.rest is None else block.add_(self.rest[rows])


def _change(w0: Tensor, deltas: Sequence[Delta], orientation: Orientation) -> _Change:
    rows, columns = w0.shape
    shape = (rows, columns) if orientation == "out_in" else (columns, rows)
    for delta in deltas:
        if delta.shape != shape:
            raise ValueError(f"a delta of shape {delta.shape} does not fit a weight of shape {shape} (out, in)")
    low = [delta for delta in deltas if isinstance(delta, LowRank)]
    left = right = rest = None
    if low:
        left = _tensor(np.concatenate([delta.B for delta in low], axis=1), w0.device)
        right = _tensor(np.concatenate([delta.A for delta in low], axis=0), w0.device)
    if len(low) < len(deltas):
        rest = _tensor(_sum([delta for delta in deltas if not isinstance(delta, LowRank)], shape), w0.device)
    if orientation == "in_out":
        left, right, rest = _transposed(right), _transposed(left), _transposed(rest)
    return _Change(left, right, rest)


def _sum(deltas: Sequence[Delta], shape: tuple[int, int]) -> Float[np.ndarray, "out in"]:
    """The sum of dense and sparse deltas, one after the other, in float32."""
    total = np.zeros(shape, dtype=np.float32)
    for delta in deltas:
        if isinstance(delta, Dense):
            total += delta.matrix
        elif not isinstance(delta, LowRank):
            total.reshape(-1)[np.unpackbits(delta.mask, count=total.size).astype(bool)] += delta.values
    return total


def _tensor(array: Float[np.ndarray, " *shape"], device: torch.device) -> Tensor:
    return torch.from_numpy(array.astype(np.float32, copy=False)).to(device)


def _transposed(matrix: Tensor | None) -> Tensor | None:
    return None if matrix is None else matrix.T


def _blocks(weight: Tensor) -> Iterator[slice]:
    rows, columns = weight.shape
    step = max(1, _BLOCK // max(1, columns))
    return (slice(start, start + step) for start in range(0, rows, step))


def _square(block: Tensor) -> float:
    return float(torch.linalg.vector_norm(block, dtype=torch.float64)) ** 2


@contextmanager
def _ieee_products() -> Iterator[None]:
    """Float32 products in float32, even where the process lets them run in TF32 or bfloat16."""
    mkldnn: Any = torch.backends.mkldnn
    backends = (torch.backends.cuda.matmul, mkldnn.matmul) if _PER_BACKEND else ()
    before = [backend.fp32_precision for backend in backends]
    overall = None if _PER_BACKEND else torch.get_float32_matmul_precision()
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        if overall is not None:
            torch.set_float32_matmul_precision("highest")
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
        if overall is not None:
            torch.set_float32_matmul_precision(overall)


KIND: Final = Kind("weights", ".safetensors", limit=4 << 30)

_NAMES: Final = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64"}


@dataclass(frozen=True)
class ReadyWeights:
    """The kept weights of one state.

    Attributes:
        cache: where they are.
        base: id of the base.
        blobs: ids of the delta blobs of the state, in order.
    """

    cache: Cache
    base: str
    blobs: tuple[str, ...]

    def open(self, dtype: torch.dtype, device: str) -> dict[str, Tensor] | None:
        """Parameter name -> composed weight, mapped from the file; None where they are not kept.

        Args:
            device: the type of the device that composes them, such as "cuda": libraries round differently.
        """
        path = self._slot(dtype, device).path()
        try:
            return None if path is None else load_file(path)
        except (OSError, SafetensorError):  # another process deleted it
            return None

    def keep(self, dtype: torch.dtype, device: str, weights: Mapping[str, Tensor]) -> None:
        """Write them, if they fit; a failure to write is no error."""
        if weights and sum(tensor.nbytes for tensor in weights.values()) <= (KIND.limit or 0):
            self._slot(dtype, device).keep(_safetensors(weights))

    def _slot(self, dtype: torch.dtype, device: str) -> Slot:
        """The place of all that the bits depend on."""
        versions = {"dtype": str(dtype), "device": device, "torch": torch.__version__}
        return self.cache.slot(KIND, base=self.base, blobs=list(self.blobs), **versions)


def _safetensors(weights: Mapping[str, Tensor]) -> Iterator[bytes]:
    """A safetensors file, one tensor after the other, so that memory holds no second copy of them."""
    header, end = {}, 0
    for name, tensor in weights.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    yield len(text).to_bytes(8, "little") + text
    for tensor in weights.values():
        raw = tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy()
        yield from (raw[start : start + CHUNK].tobytes() for start in range(0, len(raw), CHUNK))
