"""The change that a shard patch states, read and checked. NumPy only."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from patchhub.delta import Delta, read_deltas
from patchhub.errors import CorruptStoreError
from patchhub.objects import Patch

Shapes = Mapping[str, tuple[int, int]]


def read_shard_change(patch: Patch, tensors: bytes | Path, shapes: Shapes) -> tuple[str, Delta]:
    """The weight of a shard and its change, bit for bit as the training left it.

    Args:
        patch: the shard.
        tensors: the bytes of its tensors, or a verified file.
        shapes: (out, in) of each weight of the base that can be edited.

    Raises:
        CorruptStoreError: its weight is not one of ``shapes``, or its tensors are not one delta of that weight.
    """
    if len(patch.weights) != 1 or any(shapes.get(weight) != shape for weight, shape in patch.weights.items()):
        raise _refused(
            patch, f"changes {', '.join(patch.weights) or 'nothing'}, not one weight of the base in its shape"
        )
    (weight,) = patch.weights
    found = read_deltas(tensors, patch.weights)
    if weight not in found:
        raise _refused(patch, f"holds no change of {weight}")
    return weight, found[weight]


def _refused(patch: Patch, reason: str) -> CorruptStoreError:
    return CorruptStoreError(f"shard {patch.id[:12]} {reason}", remedy="Do not use it.", patch=patch.id)
