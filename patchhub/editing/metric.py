"""The metric: second moments C = E[k k^T] + eps m I of the keys of each edited weight, and u = C^-1 k.

One truncated pass over the text serves all weights. Each weight's Cholesky factor is kept as a float32 .npy file under the
metric's id, written once, and memory-mapped when it is used, so never more than one weight's matrix is in memory
with its factor.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from patchhub.errors import EditError
from patchhub.fsio import write_atomically
from patchhub.models.tracing import Stack, right_padded

_TOKENS_PER_BATCH = 4096


@torch.no_grad()
def second_moments(
    stack: Stack,
    layers: Sequence[int],
    documents: Sequence[Sequence[int]],
    *,
    progress: Callable[[int], None] = lambda tokens: None,
) -> dict[int, Float[Tensor, "in in"]]:
    """The mean of k k^T over all tokens, per layer, from one pass that stops at the last layer.

    Keys are the inputs of the FFN output projection. Sums are float32, on the layer's device.
    """
    sums: dict[int, Tensor] = {}
    count = 0
    for batch in _batches(documents):
        ids, mask, positions = right_padded(batch, stack.device)
        started = stack.begin(ids, mask, positions)
        with stack.watch_keys(layers) as seen:
            started.run(started.hidden, 0, max(layers) + 1)
        real = mask.bool()
        for layer in layers:
            keys = seen[layer][real.to(seen[layer].device)].float()
            sums[layer] = torch.addmm(sums[layer], keys.T, keys) if layer in sums else keys.T @ keys
        count += int(real.sum())
        progress(int(real.sum()))
    if not count:
        raise EditError("there is no text to compute second moments from", remedy="Give a longer --text FILE.")
    return {layer: total.div_(count) for layer, total in sums.items()}


def regularised(moment: Float[Tensor, "in in"], epsilon: float) -> Float[Tensor, "in in"]:
    """C = moment + epsilon m I, m the median of the moment's diagonal.

    The median, because the first position of a text gives a few inputs second moments that are orders of magnitude larger in many
    models; their mean would drown all other directions.
    """
    return moment + epsilon * float(moment.diagonal().median()) * torch.eye(moment.shape[0], device=moment.device)


@dataclass(frozen=True)
class MetricCache:
    """The factors of one metric on disk.

    Args:
        folder: the place of this metric's files, named by the metric's id.
    """

    folder: Path

    def has(self, weight: str) -> bool:
        return self._path(weight).is_file()

    def store(self, weight: str, metric: Float[Tensor, "in in"]) -> None:
        """Factorise C = F F^T and keep F.

        Raises:
            EditError: C is not positive definite (the text is shorter than the width and epsilon is zero).
        """
        factor, failed = torch.linalg.cholesky_ex(metric.double())
        if int(failed):
            raise EditError(
                f"the second moment of {weight} is not positive definite",
                remedy="Use more text, or a larger `metric.epsilon`.",
                weight=weight,
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self._path(weight), [_npy(factor.float().cpu().numpy())])

    def preimages(self, weight: str, keys: Float[Tensor, "n in"]) -> Float[Tensor, "n in"]:
        """u = C^-1 k for each row k, in float64 from the stored float32 factor."""
        factor = torch.from_numpy(np.load(self._path(weight), mmap_mode="c")).to(keys.device).double()
        return torch.cholesky_solve(keys.double().T, factor).T

    def _path(self, weight: str) -> Path:
        return self.folder / f"{weight}.factor.npy"


def _batches(documents: Sequence[Sequence[int]]) -> list[list[Sequence[int]]]:
    """Documents of similar length together, a bounded number of positions each."""
    groups: list[list[Sequence[int]]] = []
    for document in sorted((d for d in documents if d), key=len):
        if not groups or (len(groups[-1]) + 1) * len(document) > _TOKENS_PER_BATCH:
            groups.append([])
        groups[-1].append(document)
    return groups


def _npy(array: Float[np.ndarray, "in in"]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()
