"""WISE's training as its authors published it, one edit at a time and with nothing reused: every step runs the whole model.

The texts, the mask and the margins are given, so that what is compared is the training itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from patchhub.editing.locate import Encoded


@dataclass(frozen=True)
class Descent:
    """Settings of the published training; ``distance`` is "mean" there."""

    steps: int = 40
    rate: float = 1.0
    decay: float = 1e-5
    limit: float = 1.0
    margins: tuple[float, float, float] = (5.0, 20.0, 10.0)
    distance: str = "mean"
    stop_loss: float = 0.02
    stop_change: float = 1e-4


def train(
    model: Any, module: Any, rows: Sequence[Encoded], texts: Sequence[Sequence[int]], mask: Tensor, settings: Descent
) -> Tensor:
    """The change (out, in) of the weight of ``module`` after training on one request.

    Args:
        rows: the request with its target in every context.
        texts: unrelated texts.
        mask: 1 where an entry may change.
    """
    change = torch.zeros_like(mask)
    before = float("inf")
    for _ in range(settings.steps):
        variable = change.clone().requires_grad_()
        loss = _loss(model, module, rows, texts, variable, settings)
        (gradient,) = torch.autograd.grad(loss, variable)
        if loss.item() <= settings.stop_loss and abs(before - loss.item()) <= settings.stop_change:
            break
        before = loss.item()
        change = change - settings.rate * mask * (gradient + settings.decay * change)
        change = change.clamp(-settings.limit, settings.limit)
    return change


def _loss(
    model: Any, module: Any, rows: Sequence[Encoded], texts: Sequence[Sequence[int]], change: Tensor, settings: Descent
) -> Tensor:
    alpha, beta, gamma = settings.margins
    likelihoods, inside, outside = [], [], []
    for row in rows:
        logits, lengths = _run(model, module, row.input_ids, change)
        start, stop = row.target
        log_probs = logits[start - 1 : stop - 1].log_softmax(-1)
        targets = torch.tensor(row.input_ids[start:stop])
        likelihoods.append(log_probs.gather(1, targets[:, None]).mean())
        inside.append(_distance(lengths[:start], settings.distance))
    for text in texts:
        outside.append(_distance(_run(model, module, text, change)[1], settings.distance))
    pairs = [relu(far - near + gamma) for near in inside for far in outside]
    loss = -torch.stack(likelihoods).mean()
    for term in (pairs, [relu(far - alpha) for far in outside], [relu(beta - near) for near in inside]):
        positive = [value for value in term if value.item() > 0]
        if positive:
            loss = loss + torch.stack(positive).mean()
    return loss


def _run(model: Any, module: Any, tokens: Sequence[int], change: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of one text with the change in place, and ||dW k|| at each of its tokens."""
    lengths: list[Tensor] = []
    ids = torch.tensor([list(tokens)])

    def add(module: Any, args: Any, output: Tensor) -> Tensor:
        side = args[0] @ change.T
        lengths.append(side.square().sum(-1).clamp(min=1e-12).sqrt()[0])
        return output + side

    handle = module.register_forward_hook(add)
    try:
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0]
    finally:
        handle.remove()
    return logits, lengths[0]


def _distance(lengths: Tensor, kind: str) -> Tensor:
    return lengths.max() if kind == "max" else lengths.mean()


def relu(value: Tensor) -> Tensor:
    return value.clamp(min=0.0)
