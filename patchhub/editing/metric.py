"""Second moments of the keys of each edited weight, and the matrices that preimages are read from, kept on disk.

One truncated pass over the text serves as many weights as the memory holds sums for. What is kept of each weight is a float32 .npy file
under the metric's id, written once, and memory-mapped when it is used, so never more than one weight's matrix is in
memory with its factor.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from patchhub.editing.preimages import Covariance, Preimages
from patchhub.errors import EditError
from patchhub.fsio import write_atomically
from patchhub.models.tracing import Stack, right_padded

MEMORY: Final = 8 << 30
"""Bytes that the second moments may take while they are computed, where nothing else is said."""

_AS_GIVEN: Final = Covariance()
_TOKENS_PER_BATCH = 4096
_SUM_BYTES, _FACTOR_BYTES = 4, 16  # per entry of M: a float32 sum; the metric and its factor in float64
_ROWS_PER_CHUNK = 1024


def layer_groups(layers: Sequence[int], width: int, memory: int = MEMORY) -> list[tuple[int, ...]]:
    """The layers in groups whose sums are held together, so that all but the last take a pass of their own.

    A group of g layers takes 4 g width^2 bytes, and one factor at a time 16 width^2 more; a group is never empty.
    """
    entries = width * width
    together = max(1, (memory - _FACTOR_BYTES * entries) // (_SUM_BYTES * entries))
    return [tuple(layers[start : start + together]) for start in range(0, len(layers), together)]


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
        with stack.fast(), stack.watch_keys(layers) as seen:
            started.run(started.hidden, 0, max(layers) + 1)
        real = mask.bool()
        for layer in layers:
            keys = seen[layer][real.to(seen[layer].device)].float()
            sums[layer] = sums[layer].addmm_(keys.T, keys) if layer in sums else keys.T @ keys
        count += int(real.sum())
        progress(int(real.sum()))
    if not count:
        raise EditError("there is no text to compute second moments from", remedy="Give a longer --text FILE.")
    return {layer: total.div_(count) for layer, total in sums.items()}


@dataclass(frozen=True)
class MetricCache:
    """What is kept of one metric on disk.

    Args:
        folder: the place of this metric's files, named by the metric's id.
        preimages_by: the kind of metric. The default takes each moment for the metric itself.
    """

    folder: Path
    preimages_by: Preimages = _AS_GIVEN

    def has(self, weight: str) -> bool:
        return self.path(weight).is_file()

    def store(self, weight: str, moment: Float[Tensor, "in in"]) -> None:
        """Keep what preimages of this weight need.

        Raises:
            EditError: this moment gives none.
        """
        kept = self.preimages_by.prepare(moment, weight)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path(weight), _npy(kept))

    def preimages(self, weight: str, keys: Float[Tensor, "n in"]) -> Float[Tensor, "n in"]:
        """u of each row k, in float64 from what is kept in float32."""
        kept = torch.from_numpy(np.load(self.path(weight), mmap_mode="c")).to(keys.device)
        return self.preimages_by.of(kept, keys)

    def path(self, weight: str) -> Path:
        """Where the file of a weight is, or would be."""
        return self.folder / f"{weight}.{self.preimages_by.keeps}.npy"


def _batches(documents: Sequence[Sequence[int]]) -> list[list[Sequence[int]]]:
    """Documents of similar length together, a bounded number of positions each."""
    groups: list[list[Sequence[int]]] = []
    for document in sorted((d for d in documents if d), key=len):
        if not groups or (len(groups[-1]) + 1) * len(document) > _TOKENS_PER_BATCH:
            groups.append([])
        groups[-1].append(document)
    return groups


def _npy(matrix: Float[Tensor, "in kept"]) -> Iterator[bytes]:
    """The bytes of a float32 .npy file, rounded a few rows at a time."""
    header = io.BytesIO()
    shape = tuple(matrix.shape)
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": shape})
    yield header.getvalue()
    for start in range(0, shape[0], _ROWS_PER_CHUNK):
        yield np.ascontiguousarray(matrix[start : start + _ROWS_PER_CHUNK].cpu().numpy(), "<f4").tobytes()
