"""The keys of requests at one layer, on the model's present weights: one pass that stops there."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from patchhub.editing.record import KeyRow
from patchhub.models.tracing import Stack, right_padded

_TOKENS_PER_BATCH = 8192


@torch.no_grad()
def mean_keys(stack: Stack, layer: int, rows: Sequence[KeyRow]) -> Float[Tensor, "n in"]:
    """For each request the weighted mean over its rows of the FFN output projection's input at the row's last token, float64 on the CPU.

    At the lowest edited layer these are the keys that recording will store.
    """
    requests = 1 + max(row.request for row in rows)
    keys = torch.zeros(requests, stack.architecture.shapes[layer][1], dtype=torch.float64)
    for batch in _batches(rows):
        ids, mask, positions = right_padded([row.tokens for row in batch], stack.device)
        started = stack.begin(ids, mask, positions)
        with stack.fast(), stack.watch_keys([layer]) as seen:
            started.run(started.hidden, 0, layer + 1)
        last = torch.tensor([len(row.tokens) - 1 for row in batch], device=seen[layer].device)
        found = seen[layer][torch.arange(len(batch), device=last.device), last].double().cpu()
        weights = torch.tensor([row.weight for row in batch], dtype=torch.float64)
        keys.index_add_(0, torch.tensor([row.request for row in batch]), found * weights[:, None])
    return keys


def _batches(rows: Sequence[KeyRow]) -> list[list[KeyRow]]:
    """Rows of similar length together, a bounded number of positions each."""
    batches: list[list[KeyRow]] = []
    for row in sorted(rows, key=lambda row: len(row.tokens)):
        if not batches or (len(batches[-1]) + 1) * len(row.tokens) > _TOKENS_PER_BATCH:
            batches.append([])
        batches[-1].append(row)
    return batches
