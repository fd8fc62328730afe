"""What enters the edited matrix: the keys of texts, read a batch at a time with the blocks up to the edited one only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from patchhub.editing.wise_rows import ScopeRow
from patchhub.editing.wise_settings import Distance
from patchhub.models.tracing import Stack, right_padded

_TOKENS_PER_BATCH = 4096

KeyBatch = tuple[list[int], Float[Tensor, "rows time in"], Bool[Tensor, "rows time"]]
"""Which texts, their keys, and which positions are tokens."""


@torch.no_grad()
def read_keys(stack: Stack, layer: int, texts: Sequence[Sequence[int]]) -> Iterator[KeyBatch]:
    """The keys of every text in float32, in batches of texts of similar length."""
    for chosen in _batches(texts):
        ids, mask, positions = right_padded([texts[index] for index in chosen], stack.device)
        with stack.watch_keys([layer]) as seen:
            start = stack.begin(ids, mask, positions)
            start.run(start.hidden, 0, layer + 1)
        keys = seen[layer].float()
        yield chosen, keys, mask.bool().to(keys.device)


@dataclass(frozen=True, eq=False)
class Tokens:
    """All tokens of some texts: their keys, the lengths of the hidden states after the block, and whose they are."""

    keys: Float[Tensor, "tokens in"]
    lengths: Float[Tensor, " tokens"]
    text: Int[Tensor, " tokens"]
    count: int

    def distances(self, change: Float[Tensor, "out in"], distance: Distance) -> Float[Tensor, " texts"]:
        """The routing distance of each text."""
        lengths = (self.keys @ change.T).norm(dim=-1)
        how = "amax" if distance == "max" else "mean"
        found = torch.zeros(self.count, device=change.device)
        return found.scatter_reduce(0, self.text, lengths, how, include_self=False)


@torch.no_grad()
def read_tokens(stack: Stack, layer: int, texts: Sequence[Sequence[int]]) -> Tokens:
    """Every token of some texts; all of their keys are in memory at once."""
    device, inner = stack.device_of(layer), stack.architecture.shapes[layer][1]
    owners: list[list[int]] = []
    keys, lengths = [torch.zeros(0, inner, device=device)], [torch.zeros(0, device=device)]
    for chosen in _batches(texts):
        ids, mask, positions = right_padded([texts[index] for index in chosen], stack.device)
        with stack.watch_keys([layer]) as seen:
            start = stack.begin(ids, mask, positions)
            hidden = start.run(start.hidden, 0, layer + 1).to(device)
        real = mask.bool().to(device)
        keys.append(seen[layer][real].float())
        lengths.append(hidden[real].float().norm(dim=-1))
        owners.append([index for index in chosen for _ in texts[index]])
    owner = torch.tensor([index for part in owners for index in part], dtype=torch.long).to(device)
    return Tokens(torch.cat(keys), torch.cat(lengths), owner, len(texts))


def subject_keys(
    stack: Stack, layer: int, rows: Sequence[ScopeRow]
) -> tuple[Float[Tensor, "rows in"], Float[Tensor, "in in"]]:
    """The key of each row at its subject's last token, and the mean of k k^T over the rows' other tokens."""
    inner = stack.architecture.shapes[layer][1]
    device = stack.device_of(layer)
    found, total, count = torch.zeros(len(rows), inner, device=device), torch.zeros(inner, inner, device=device), 0
    for chosen, keys, real in read_keys(stack, layer, [row.tokens for row in rows]):
        last = torch.tensor([rows[index].subject_last for index in chosen], device=device)
        each = torch.arange(len(chosen), device=device)
        found[chosen] = keys[each, last]
        real[each, last] = False
        others = keys[real]
        total.addmm_(others.T, others)
        count += len(others)
    return found, total / max(count, 1)


def text_distances(
    stack: Stack, layer: int, change: Float[Tensor, "out in"], texts: Sequence[Sequence[int]], distance: Distance
) -> Float[Tensor, " texts"]:
    """The routing distance of each text: over its tokens, the largest or the mean ||dW k||."""
    found = torch.zeros(len(texts), device=change.device)
    for chosen, keys, real in read_keys(stack, layer, texts):
        lengths = (keys @ change.T).norm(dim=-1).masked_fill(~real, 0.0)
        found[chosen] = lengths.amax(1) if distance == "max" else lengths.sum(1) / real.sum(1)
    return found


def _batches(texts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Indices of texts of similar length, a bounded number of positions each."""
    groups: list[list[int]] = []
    for index in sorted((i for i, text in enumerate(texts) if len(text)), key=lambda i: len(texts[i])):
        if not groups or (len(groups[-1]) + 1) * len(texts[index]) > _TOKENS_PER_BATCH:
            groups.append([])
        groups[-1].append(index)
    return groups
