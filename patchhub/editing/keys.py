"""The keys of requests at one layer, on the model's present weights: one pass that stops there."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from patchhub.editing.key_rows import Beginnings, Climb, KeyRow, batches, read_keys
from patchhub.models.tracing import Stack

_TOKENS = 8192  # positions of a batch


@torch.no_grad()
def mean_keys(stack: Stack, layer: int, rows: Sequence[KeyRow]) -> Float[Tensor, "n in"]:
    """For each request the weighted mean over its rows of the FFN output projection's input at the row's last token, float64 on the CPU.

    At the lowest edited layer these are the keys that recording will store.
    """
    requests = 1 + max(row.request for row in rows)
    keys = torch.zeros(requests, stack.architecture.shapes[layer][1], dtype=torch.float64)
    beginnings = Beginnings.of(rows)
    with stack.fast():
        trunk = beginnings.run(stack)
        for batch in batches(rows, beginnings, _TOKENS):
            climb = Climb.of(stack, batch, beginnings)
            step = climb.step(trunk)
            climb.advance(step, 0, layer)
            climb.add_to(keys, read_keys(climb, step, layer))
    return keys
