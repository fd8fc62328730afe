"""The change of a weight run beside the weight: y + (x A^T) B^T in float32, whatever type or quantisation the weight has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from patchhub.delta import Delta, LowRank, add, to_dense


class SidePath:
    """A forward hook of a linear module: what the sum of some deltas adds to its output.

    Input and output may be of any float type; the products and the sum are float32, and one cast gives the output's type. The
    factors follow the output to its device at the first call there.

    Args:
        deltas: at least one; all (out, in), the module's, however it stores its weight.
    """

    def __init__(self, deltas: Sequence[Delta]) -> None:
        out, inner = deltas[0].shape
        total = add(deltas, (out, inner))
        if isinstance(total, LowRank) and total.B.shape[1] * (out + inner) < out * inner:
            matrices: tuple[np.ndarray, ...] = (total.A, total.B)
        else:
            matrices = (to_dense(total),)
        self._factors = [torch.from_numpy(np.ascontiguousarray(matrix, np.float32)) for matrix in matrices]

    def __call__(
        self, module: torch.nn.Module, args: tuple[Any, ...], output: Float[Tensor, "*batch out"]
    ) -> Float[Tensor, "*batch out"]:
        change: Tensor = args[0].to(output.device, torch.float32)
        self._factors = [factor.to(output.device) for factor in self._factors]
        for factor in self._factors:
            change = torch.nn.functional.linear(change, factor)
        changed: Tensor = output.float() + change
        return changed.to(output.dtype)
