"""Texts whose present states are kept: what editors do for batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from patchhub.editing.rows import KeyRow
from patchhub.models.tracing import Stack, right_padded


def keep_rows(texts: Sequence[Sequence[int]], first: int) -> list[KeyRow]:
    """Texts, each cut after the place that is kept, as the rows of requests ``first``, ``first + 1``, ..."""
    return [KeyRow(tuple(text), request, 0, 1.0) for request, text in enumerate(texts, first)]


@torch.no_grad()
def present_states(stack: Stack, texts: Sequence[Sequence[int]], layer: int) -> Float[Tensor, "n d"]:
    """What is there at the last token of each text, where the targets of facts are: float32 on the CPU.

    The hidden state after block ``layer``; where a norm comes behind the feed-forward projection, the output of that.
    """
    found = torch.zeros(len(texts), stack.architecture.d_model)
    for place, text in enumerate(texts):
        with stack.watch_values([layer]) as projected:
            start = stack.begin(*right_padded([text], stack.device))
            hidden = start.run(start.hidden, 0, layer + 1)
        found[place] = (projected[layer] if stack.architecture.normed else hidden)[0, -1].float().cpu()
    return found
