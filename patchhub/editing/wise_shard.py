"""A shard: what training leaves and routing reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from patchhub.delta import Delta, from_factors, norm, to_dense
from patchhub.errors import SettingsError


@dataclass(frozen=True, eq=False)
class Shard:
    """A side memory: the change of one weight, and what routing needs.

    Attributes:
        weight: parameter name of the feed-forward output projection.
        change: (out, in) float32, sparse as trained, or low rank after `recompress`.
        routing: JSON-able: {"distance": "max" or "mean", "threshold": float}.
    """

    weight: str
    change: Delta
    routing: Mapping[str, Any]

    @property
    def threshold(self) -> float:
        return float(self.routing["threshold"])


def recompress(shard: Shard, rank: int) -> tuple[Shard, float]:
    """The shard with its change as the best one of ``rank``, and the relative Frobenius error.

    Its threshold is no longer right: measure it next.

    Raises:
        SettingsError: the rank is not a whole number above 0.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise SettingsError(f"rank must be a whole number above 0, not {rank!r}", remedy="Set rank > 0.")
    whole = to_dense(shard.change)
    left, values, right = np.linalg.svd(whole, full_matrices=False)
    change = from_factors(left[:, :rank] * values[:rank], right[:rank])
    size = norm(shard.change)
    error = float(np.linalg.norm(whole - to_dense(change))) / size if size else 0.0
    return replace(shard, change=change), error


def dense_change(change: Delta, device: torch.device) -> Float[Tensor, "out in"]:
    """The change as one float32 matrix."""
    return torch.from_numpy(to_dense(change).astype(np.float32)).to(device)
