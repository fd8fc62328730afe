"""Weights of the base as arrays, and what rounding to their type keeps of a change. NumPy only, no model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from jaxtyping import Float, UInt32

from patchhub.delta import NEGLIGIBLE, Delta, LowRank, add, to_dense
from patchhub.models.checkpoint import Checkpoint

_SAMPLED_ENTRIES: Final = 1 << 22


def _widened(bits: np.ndarray) -> Float[np.ndarray, ...]:
    """bfloat16, which NumPy does not have, from its bits."""
    wide: UInt32[np.ndarray, ...] = bits.astype(np.uint32) << 16
    return wide.view(np.float32)


def _to_bfloat16(values: Float[np.ndarray, ...]) -> Float[np.ndarray, ...]:
    """Rounded to the nearest, ties to even; still float32."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded: UInt32[np.ndarray, ...] = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return rounded.view(np.float32)


def _to_float16(values: Float[np.ndarray, ...]) -> Float[np.ndarray, ...]:
    with np.errstate(over="ignore"):
        return values.astype(np.float16).astype(np.float32)


@dataclass(frozen=True)
class _Type:
    """How one safetensors dtype lies on disk, how it is read, and how a float32 is rounded to it."""

    stored: Any
    read: Callable[[np.ndarray], np.ndarray]
    rounded: Callable[[np.ndarray], np.ndarray]


_TYPES: Final[Mapping[str, _Type]] = {
    "F16": _Type(np.float16, lambda raw: raw.astype(np.float32), _to_float16),
    "BF16": _Type(np.uint16, _widened, _to_bfloat16),
    "F32": _Type(np.float32, np.asarray, lambda values: values.astype(np.float32)),
}


@dataclass(frozen=True, eq=False)
class BaseWeight:
    """One weight as the checkpoint stores it, mapped from its file.

    Attributes:
        raw: (rows, columns) in the stored type.
        kind: that type.
        transposed: it is stored (in, out).
    """

    raw: np.ndarray
    kind: _Type
    transposed: bool

    def rows(self, part: slice) -> Float[np.ndarray, "some columns"]:
        """Some rows in float32."""
        return self.kind.read(self.raw[part])


def open_weight(checkpoint: Checkpoint, parameter: str, orientation: str) -> BaseWeight | None:
    """A weight of the base by its parameter name; None where it is of a type that is not read here.

    Raises:
        BaseError: the checkpoint has no such weight.
    """
    entry = checkpoint.entry(checkpoint.resolve_name(parameter))
    kind = _TYPES.get(entry.dtype)
    if kind is None:
        return None
    raw = np.memmap(entry.file, kind.stored, "r", entry.begin, entry.shape)
    return BaseWeight(raw, kind, orientation == "in_out")


def survival(weight: BaseWeight, deltas: Sequence[Delta], *, entries: int = _SAMPLED_ENTRIES) -> float:
    """The share of a change that the cast keeps: 1 - ||(cast(W0 + D) - W0) - D|| / ||D||, D the sum of the deltas; 0 where less than none.

    1 of a change that is `NEGLIGIBLE` beside the weight. As `runtime.compose.survival`, but on evenly spaced rows of about so many entries.
    """
    rows, columns = weight.raw.shape
    total = add(deltas, (columns, rows) if weight.transposed else (rows, columns))
    part = slice(0, rows, max(1, rows * columns // entries))
    base, wanted = weight.rows(part), _rows(total, part, weight.transposed)
    size = float(np.linalg.norm(wanted))
    lost = float(np.linalg.norm(weight.kind.rounded(base + wanted) - base - wanted))
    return 1.0 if size <= NEGLIGIBLE * float(np.linalg.norm(base)) else max(0.0, 1.0 - lost / size)


def _rows(delta: Delta, part: slice, transposed: bool) -> Float[np.ndarray, "some columns"]:
    """Some rows of a delta in the orientation of the stored weight, in float32."""
    if isinstance(delta, LowRank):
        left, right = (delta.A.T, delta.B.T) if transposed else (delta.B, delta.A)
        found: Float[np.ndarray, "some columns"] = (left[part] @ right).astype(np.float32)
        return found
    dense = to_dense(delta)
    return (dense.T if transposed else dense)[part].astype(np.float32)
