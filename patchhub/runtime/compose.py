"""The weights of a state: cast(W0 + sum of deltas), in float32, with one product and one cast (docs/format.md).

Composed weights are kept on disk, so that loading a state again costs what loading its base costs (decision 4)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from patchhub.canonical import canonical_json, object_id
from patchhub.delta import NEGLIGIBLE, Delta, Dense, LowRank
from patchhub.fsio import temporary_path
from patchhub.models.structure import Orientation

_BLOCK = 1 << 22  # entries worked on at a time: they stay in the processor's cache

_PER_BACKEND: Final = hasattr(torch.backends.cuda.matmul, "fp32_precision")  # torch 2.9 and later


@torch.no_grad()
def compose(
    w0: Float[Tensor, "rows columns"], deltas: Sequence[Delta], *, orientation: Orientation, dtype: torch.dtype
) -> Float[Tensor, "rows columns"]:
    """cast(W0 + sum of deltas), on the device of W0; W0 stays as it is.

    The factors of all low-rank deltas are concatenated in the given order and enter by one product; the sum of the
    dense and sparse deltas, in the same order, is added to it. The same arguments give the same bits on one machine,
    device and library set, whatever precision of products the process allows. Beyond W0 and the result, memory holds a
    few blocks of rows, and one float32 matrix if there are dense or sparse deltas.

    Args:
        w0: the weight as the checkpoint stores it.
        deltas: in ascending order of blob id, which is the caller's duty.
        orientation: ``in_out`` if ``w0`` is (in, out); deltas are (out, in).
        dtype: of the result.

    Raises:
        ValueError: a delta has another shape than the weight.
    """
    change = _change(w0, deltas, orientation)
    result = torch.empty(w0.shape, dtype=dtype, device=w0.device)
    with _ieee_products():
        for rows in _blocks(w0):
            result[rows] = change.added_to(w0[rows].to(torch.float32, copy=True), rows)
    return result


@torch.no_grad()
def survival(
    w0: Float[Tensor, "rows columns"],
    deltas: Sequence[Delta],
    composed: Float[Tensor, "rows columns"],
    *,
    orientation: Orientation,
) -> float:
    """The share of the change that the cast keeps: 1 - ||(W - W0) - D|| / ||D||, D the sum of the deltas.

    1 where nothing is lost or next to nothing changes (`NEGLIGIBLE`), 0 where no entry moved. Arguments and memory as for `compose`;
    ``composed`` is its result.
    """
    change = _change(w0, deltas, orientation)
    lost = wanted = size = 0.0
    with _ieee_products():
        for rows in _blocks(w0):
            block = change.added_to(torch.zeros(w0[rows].shape, dtype=torch.float32, device=w0.device), rows)
            wanted += _square(block)
            size += _square(w0[rows].to(torch.float32))
            lost += _square(composed[rows].to(torch.float32, copy=True).sub_(w0[rows]).sub_(block))
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


LIMIT: Final = 4 << 30
"""Bytes that all kept states together may take; the oldest go first."""


@dataclass(frozen=True)
class ReadyWeights:
    """The kept weights of one state.

    Attributes:
        folder: where all states' files are.
        base: id of the base.
        blobs: ids of the delta blobs of the state, in order.
        limit: bytes that all files together may take.
    """

    folder: Path
    base: str
    blobs: tuple[str, ...]
    limit: int = LIMIT

    def open(self, dtype: torch.dtype, device: str) -> dict[str, Tensor] | None:
        """Parameter name -> composed weight; None where they are not kept, or not as they were written.

        Args:
            device: the type of the device that composes them, such as "cuda": libraries round differently.
        """
        file, stamp = self._paths(dtype, device)
        try:
            if json.loads(stamp.read_bytes()) != _stamp(file):
                return None
            return load_file(file)
        except (OSError, ValueError, SafetensorError):
            return None

    def keep(self, dtype: torch.dtype, device: str, weights: Mapping[str, Tensor]) -> None:
        """Write them, if they fit; a failure to write is no error."""
        if not weights or sum(tensor.nbytes for tensor in weights.values()) > self.limit:
            return
        file, stamp = self._paths(dtype, device)
        temporary = temporary_path(file)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            stamp.unlink(missing_ok=True)
            save_file({name: tensor.cpu().contiguous() for name, tensor in weights.items()}, temporary)
            temporary.replace(file)
            stamp.write_text(json.dumps(_stamp(file)))
            self._evict(file)
        except (OSError, SafetensorError):  # safetensors has its own error for a full disk
            with suppress(OSError):
                temporary.unlink(missing_ok=True)

    def _paths(self, dtype: torch.dtype, device: str) -> tuple[Path, Path]:
        """The file and its stamp; the name hashes all that the bits depend on."""
        versions = {"dtype": str(dtype), "device": device, "torch": torch.__version__}
        name = object_id(canonical_json({"base": self.base, "blobs": list(self.blobs), **versions}))
        return self.folder / f"{name}.safetensors", self.folder / f"{name}.json"

    def _evict(self, newest: Path) -> None:
        files = sorted(self.folder.glob("*.safetensors"), key=lambda path: path.stat().st_mtime_ns)
        total = sum(path.stat().st_size for path in files)
        for path in files:
            if total <= self.limit or path == newest:
                break
            total -= path.stat().st_size
            path.with_suffix(".json").unlink(missing_ok=True)
            path.unlink()


def _stamp(file: Path) -> dict[str, Any]:
    status = file.stat()
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns}
