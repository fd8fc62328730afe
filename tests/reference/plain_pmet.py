"""PMET as published (Li et al. 2024; xpq-tech/PMET edit/pmet), one fact at a time; what differs from MEMIT in `plain`.

Two vectors are optimised together, at the outputs of the attention and of the feed-forward projection of the last edited layer, but
only the feed-forward one is written, as in all published settings. Residuals are measured at that projection's output and divided
by the root of the number of layers still to write.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from tests.reference.plain import (
    Fact,
    Places,
    Value,
    ValueSettings,
    Written,
    fact_rows,
    logits,
    objective_parts,
    output_hook,
    projection,
    spread,
)

FALLING_FACTOR, KL_LIMIT = 0.1, 0.01  # compute_zs.py: once the target is the argmax everywhere


class PmetSettings(ValueSettings, Protocol):
    @property
    def nll_factor(self) -> float: ...


@dataclass(frozen=True, eq=False)
class Values:
    """The value at the feed-forward projection, which is written, and the one at the attention's, which is not."""

    ffn: Value
    attention: Value


def find_values(
    model: Any,
    tokenizer: Any,
    places: Places,
    fact: Fact,
    contexts: Sequence[str],
    layer: int,
    settings: PmetSettings,
) -> Values:
    """compute_zs.py: Adam on both vectors, each clamped to its own norm, with the extra stop rule."""
    rows = fact_rows(tokenizer, fact, contexts)
    everywhere = torch.arange(len(rows.ids))
    width, dtype = model.get_input_embeddings().weight.shape[1], next(model.parameters()).dtype
    deltas = [torch.zeros(width, dtype=dtype, requires_grad=True) for _ in range(2)]
    optimiser = torch.optim.Adam(deltas, lr=settings.learning_rate)
    modules = (projection(model, places, layer), model.get_submodule(places.attn_module(layer)))
    hidden: dict[int, Tensor] = {}
    unedited, steps, nll_factor = None, 0, settings.nll_factor
    model.requires_grad_(False)

    def adding(which: int) -> Callable[[Tensor], Tensor]:
        def add_delta(output: Tensor) -> Tensor:
            hidden.setdefault(which, output[0, rows.subject_last[0]].detach().clone())
            changed = output.clone()
            changed[everywhere, rows.subject_last] = output[everywhere, rows.subject_last] + deltas[which]
            return changed

        return add_delta

    while True:
        optimiser.zero_grad()
        with output_hook(modules[0], adding(0)), output_hook(modules[1], adding(1)):
            found = logits(model, rows.ids, rows.mask)
        nll, kl, essence = objective_parts(found, rows, unedited)
        unedited = essence.detach() if unedited is None else unedited
        decay = sum(delta.norm() / hidden[which].norm() ** 2 for which, delta in enumerate(deltas))
        kl_loss = settings.kl_factor * kl
        loss = nll_factor * nll.mean() + kl_loss + settings.weight_decay * decay
        sure = target_is_argmax(found[:-1], rows.labels[:-1])
        nll_factor = settings.nll_factor * (FALLING_FACTOR if sure else 1.0)
        if loss < settings.stop_loss or (sure and kl_loss <= KL_LIMIT) or steps == settings.steps - 1:
            both = [Value(hidden[i] + deltas[i].detach(), hidden[i], float(loss.detach()), steps) for i in range(2)]
            return Values(both[0], both[1])
        loss.backward()
        optimiser.step()
        steps += 1
        with torch.no_grad():
            for which, delta in enumerate(deltas):
                limit = settings.clamp * hidden[which].norm()
                if delta.norm() > limit:
                    delta.mul_(limit / delta.norm())


def target_is_argmax(logits: Tensor, labels: Tensor) -> bool:
    """Whether every target token has the largest logit (the published code compares two means of probabilities)."""
    where = labels != -100
    chosen = logits[where].gather(1, labels[where][:, None])[:, 0]
    return bool((chosen == logits[where].max(-1).values).all())


def pmet(
    model: Any,
    tokenizer: Any,
    places: Places,
    facts: Sequence[Fact],
    contexts: Sequence[str],
    layers: Sequence[int],
    settings: PmetSettings,
    ridge: float,
    moments: Mapping[int, Tensor],
) -> tuple[list[Values], Written]:
    """The whole edit; shares are what is missing at the last layer's projection over the root of the layers to go."""
    last = layers[-1]
    values = [find_values(model, tokenizer, places, fact, contexts, last, settings) for fact in facts]
    written = spread(
        model,
        tokenizer,
        places,
        facts,
        contexts,
        layers,
        torch.stack([value.ffn.target for value in values]),
        ridge,
        moments,
        measured=projection(model, places, last),
        divisor=math.sqrt,
    )
    return values, written
