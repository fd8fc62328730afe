"""Changes of weights: the three forms of docs/format.md, their algebra and their bytes. NumPy only.

A delta is the change dW of one weight, always of shape (out, in) whatever the checkpoint's orientation. Stored values are
float32 or float16; arithmetic is float64."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final, TypeAlias

import numpy as np
from jaxtyping import Float, UInt8
from safetensors import SafetensorError
from safetensors.numpy import load, save

from patchhub.errors import CorruptStoreError
from patchhub.fsio import Span

FORMS = {"B", "A", "dense", "mask", "values"}
NEGLIGIBLE = 1e-6
"""A change whose norm is a smaller share of its weight's is rounding errors, and nothing that a cast could lose."""
_ROWS = 2048  # of keys that are in float64 at a time
STORED_DTYPES = (np.dtype(np.float32), np.dtype(np.float16))


@dataclass(frozen=True, eq=False)
class LowRank:
    """dW = B A."""

    B: Float[np.ndarray, "out rank"]
    A: Float[np.ndarray, "rank in"]

    @property
    def shape(self) -> tuple[int, int]:
        return self.B.shape[0], self.A.shape[1]

    @property
    def rank(self) -> int:
        return int(self.A.shape[0])


@dataclass(frozen=True, eq=False)
class Dense:
    """dW as it is."""

    matrix: Float[np.ndarray, "out in"]

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.matrix.shape
        return rows, columns


@dataclass(frozen=True, eq=False)
class Sparse:
    """dW with ``values`` (row-major) where the bits of ``mask`` are set; the mask is packed, most significant bit first."""

    shape: tuple[int, int]
    mask: UInt8[np.ndarray, " bytes"]
    values: Float[np.ndarray, " nonzero"]


Delta: TypeAlias = LowRank | Dense | Sparse


def from_factors(B: Float[np.ndarray, "out rank"], A: Float[np.ndarray, "rank in"]) -> Delta:
    """The float32 delta B A in its smaller form.

    Low rank is kept with orthonormal rows of A, so that rounding the factors to float32 moves dW by no more
    than about 1e-7 ||dW||, however ill-conditioned the given factors are.
    """
    out, inner = B.shape[0], A.shape[1]
    rank = A.shape[0]
    if rank * (out + inner) >= out * inner:
        return Dense((_f64(B) @ _f64(A)).astype(np.float32))
    q, r = np.linalg.qr(_f64(A).T)
    return LowRank((_f64(B) @ r.T).astype(np.float32), np.ascontiguousarray(q.T, dtype=np.float32))


def compact(delta: Delta) -> Delta:
    """The same change in float32, in its smaller form."""
    if isinstance(delta, LowRank):
        return from_factors(delta.B, delta.A)
    return Dense(delta.matrix.astype(np.float32)) if isinstance(delta, Dense) else delta


def to_dense(delta: Delta) -> Float[np.ndarray, "out in"]:
    """dW in float64."""
    if isinstance(delta, LowRank):
        product: Float[np.ndarray, "out in"] = _f64(delta.B) @ _f64(delta.A)
        return product
    if isinstance(delta, Dense):
        return _f64(delta.matrix)
    out, inner = delta.shape
    flat: Float[np.ndarray, " entries"] = np.zeros(out * inner)
    flat[np.unpackbits(delta.mask, count=out * inner).astype(bool)] = delta.values
    return flat.reshape(out, inner)


def from_sparse(matrix: Float[np.ndarray, "out in"]) -> Sparse:
    """The nonzero entries of a matrix, in its own float type."""
    out, inner = matrix.shape
    nonzero = matrix != 0
    return Sparse((out, inner), np.packbits(nonzero.reshape(-1)), matrix[nonzero])


def image(delta: Delta, keys: Float[np.ndarray, "n in"]) -> Float[np.ndarray, "n out"]:
    """dW k for each row k, in float64; the rows are read in blocks."""
    factors = [_f64(delta.A).T, _f64(delta.B).T] if isinstance(delta, LowRank) else [to_dense(delta).T]
    result: Float[np.ndarray, "n out"] = np.empty((len(keys), delta.shape[0]))
    for start in range(0, len(keys), _ROWS):
        rows = slice(start, start + _ROWS)
        reached = _f64(keys[rows])
        for factor in factors:
            reached = reached @ factor
        result[rows] = reached
    return result


def add(deltas: Sequence[Delta], shape: tuple[int, int]) -> Delta:
    """The sum in float64: factors are concatenated while that is smaller than dense."""
    out, inner = shape
    low = [d for d in deltas if isinstance(d, LowRank)]
    if len(low) == len(deltas) and sum(d.rank for d in low) * (out + inner) < out * inner:
        empty = LowRank(np.zeros((out, 0)), np.zeros((0, inner)))
        parts = [empty, *low]
        return LowRank(np.hstack([_f64(d.B) for d in parts]), np.vstack([_f64(d.A) for d in parts]))
    total = np.zeros(shape)
    for delta in deltas:
        total += to_dense(delta)
    return Dense(total)


def negative(delta: Delta) -> Delta:
    """-dW in the same form."""
    if isinstance(delta, LowRank):
        return LowRank(-delta.B, delta.A)
    if isinstance(delta, Dense):
        return Dense(-delta.matrix)
    return Sparse(delta.shape, delta.mask, -delta.values)


def section(delta: Delta, columns: slice) -> Delta:
    """Some columns of dW: of a stacked weight the change of one expert."""
    if isinstance(delta, LowRank):
        return LowRank(delta.B, delta.A[:, columns])
    if isinstance(delta, Dense):
        return Dense(delta.matrix[:, columns])
    return from_sparse(to_dense(delta)[:, columns].astype(delta.values.dtype))


def is_zero(delta: Delta) -> bool:
    """Whether dW is seen to change nothing; factors are not multiplied out."""
    parts = (delta.A,) if isinstance(delta, LowRank) else (delta.matrix if isinstance(delta, Dense) else delta.values,)
    return not any(part.any() for part in parts)


def norm(delta: Delta) -> float:
    """Frobenius norm. Low rank goes through two QR factorisations, never through B A, so that nearly cancelling
    factors still give a norm that is right to about 1e-15 ||B|| ||A||."""
    if isinstance(delta, Sparse):
        return float(np.linalg.norm(_f64(delta.values)))
    return float(np.linalg.norm(_core(delta)))


def inner(one: Delta, other: Delta) -> float:
    """The Frobenius inner product, sum of products of entries; factors are not multiplied out."""
    if isinstance(one, LowRank) and isinstance(other, LowRank):
        return float(np.sum((_f64(one.B).T @ _f64(other.B)) * (_f64(one.A) @ _f64(other.A).T)))
    return float(np.sum(to_dense(one) * to_dense(other)))


def numerical_rank(delta: Delta, tolerance: float) -> int:
    """How many singular values are above `tolerance`."""
    core = to_dense(delta) if isinstance(delta, Sparse) else _core(delta)
    return int((np.linalg.svd(core, compute_uv=False) > tolerance).sum()) if core.size else 0


def _core(delta: LowRank | Dense) -> Float[np.ndarray, "rows columns"]:
    """A small matrix with the singular values of dW."""
    if isinstance(delta, Dense) or delta.rank >= min(delta.shape):
        return to_dense(delta)
    core: Float[np.ndarray, "rank rank"] = np.linalg.qr(_f64(delta.B)).R @ np.linalg.qr(_f64(delta.A).T).R.T
    return core


def write_deltas(deltas: Mapping[str, Delta]) -> bytes:
    """One safetensors file without metadata, so the same deltas always give the same bytes."""
    tensors: dict[str, np.ndarray] = {}
    for weight, delta in deltas.items():
        if isinstance(delta, LowRank):
            parts = {"B": delta.B, "A": delta.A}
        elif isinstance(delta, Dense):
            parts = {"dense": delta.matrix}
        else:
            parts = {"mask": delta.mask, "values": delta.values}
        for form, array in parts.items():
            tensors[f"{weight}.{form}"] = np.ascontiguousarray(array)
    return save(tensors)


def read_deltas(source: bytes | Path, shapes: Mapping[str, tuple[int, int]]) -> dict[str, Delta]:
    """The inverse of ``write_deltas``.

    Args:
        source: the file's bytes, or its path (verified by the caller).
        shapes: (out, in) of every weight that may occur; anything else is refused.

    Raises:
        CorruptStoreError: not a safetensors file, an unknown weight or form, a wrong shape or type, a value that is not finite.
    """
    try:
        tensors = load(source if isinstance(source, bytes) else source.read_bytes())
    except (SafetensorError, ValueError, KeyError) as error:
        raise CorruptStoreError(f"a delta is not a readable safetensors file ({error})", remedy=_REMEDY) from error
    grouped: dict[str, dict[str, np.ndarray]] = {}
    for name, array in tensors.items():
        weight, _, form = name.rpartition(".")
        if form not in FORMS or weight not in shapes:
            raise CorruptStoreError(f"a delta holds the unexpected tensor {name!r}", remedy=_REMEDY, tensor=name)
        _check_array(name, form, array)
        grouped.setdefault(weight, {})[form] = array
    return {weight: _delta(weight, parts, shapes[weight]) for weight, parts in sorted(grouped.items())}


def weights_in(file: Span) -> frozenset[str]:
    """The weights that a file of deltas changes, from its header alone.

    Raises:
        CorruptStoreError: not a safetensors file.
    """
    return frozenset(name.rpartition(".")[0] for name in Tensors(file))


def read_delta(file: Span, weight: str, shape: tuple[int, int]) -> Delta:
    """The delta of one weight, of which alone the bytes are read.

    Raises:
        CorruptStoreError: as in `read_deltas`, or the file does not change that weight.
    """
    tensors = Tensors(file)
    names = {name for name in tensors if name.rpartition(".")[0] == weight}
    parts = {name.rpartition(".")[2]: tensors[name] for name in sorted(names)}
    for form, array in parts.items():
        if form not in FORMS:
            raise CorruptStoreError(f"a delta holds the unexpected tensor '{weight}.{form}'", remedy=_REMEDY)
        _check_array(f"{weight}.{form}", form, array)
    return _delta(weight, parts, shape)


class Tensors(Mapping[str, np.ndarray]):
    """The tensors of a safetensors file that is a file of its own or lies in another one; each is read when it is asked for.

    The library that reads such files maps whole files only.
    """

    _DTYPES: Final = MappingProxyType(
        {"F64": np.float64, "F32": np.float32, "F16": np.float16, "I64": np.int64, "I32": np.int32, "U8": np.uint8}
    )

    def __init__(self, file: Span) -> None:
        """Read the header.

        Raises:
            CorruptStoreError: there is none, or it is not one of tensors that lie in the file.
        """
        self._file = file
        try:
            length = int.from_bytes(file.read(0, 8), "little")
            if length > file.size - 8:
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(8, length))
            self._start = 8 + length
            self._entries = {str(name): dict(entry) for name, entry in header.items() if name != "__metadata__"}
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise self._unreadable(error) from error

    def __getitem__(self, name: str) -> np.ndarray:
        entry = self._entries[name]
        try:
            dtype, shape = np.dtype(self._DTYPES[entry["dtype"]]), tuple(entry["shape"])
            begin, end = entry["data_offsets"]
            if not all(type(size) is int for size in shape):  # a text times a large number is a very long text
                raise ValueError(f"the shape of {name} is not of whole numbers")
            if (
                not 0 <= begin <= end <= self._file.size - self._start
                or end - begin != math.prod(shape) * dtype.itemsize
            ):
                raise ValueError(f"{name} does not lie where it should")
            return np.frombuffer(self._file.read(self._start + begin, end - begin), dtype).reshape(shape)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise self._unreadable(error) from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    @staticmethod
    def _unreadable(error: Exception) -> CorruptStoreError:
        return CorruptStoreError(f"a delta is not a readable safetensors file ({error})", remedy=_REMEDY)


_REMEDY = "Run `patchhub fsck` to see what is damaged."


def _check_array(name: str, form: str, array: np.ndarray) -> None:
    if form == "mask":
        valid = array.dtype == np.uint8
    else:
        valid = array.dtype in STORED_DTYPES and bool(np.isfinite(array).all())
    if not valid:
        raise CorruptStoreError(f"tensor {name!r} has a forbidden type or value", remedy=_REMEDY, tensor=name)


def _delta(weight: str, parts: Mapping[str, np.ndarray], shape: tuple[int, int]) -> Delta:
    out, inner = shape
    arrays = {form: array.shape for form, array in parts.items()}
    rank = parts["A"].shape[0] if "A" in parts and parts["A"].ndim == 2 else -1
    if arrays == {"B": (out, rank), "A": (rank, inner)}:
        return LowRank(parts["B"], parts["A"])
    if arrays == {"dense": (out, inner)}:
        return Dense(parts["dense"])
    size = math.ceil(out * inner / 8)
    if arrays.keys() == {"mask", "values"} and arrays["mask"] == (size,):
        bits = np.unpackbits(parts["mask"])
        if arrays["values"] == (int(bits[: out * inner].sum()),) and not bits[out * inner :].any():
            return Sparse(shape, parts["mask"], parts["values"])
    raise CorruptStoreError(f"the delta of {weight} does not have the shape {shape}", remedy=_REMEDY, weight=weight)


def _f64(array: np.ndarray) -> Float[np.ndarray, ...]:
    return array.astype(np.float64, copy=False)
