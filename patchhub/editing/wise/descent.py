"""The published training of a side memory: gradient descent on its entries under the mask.

Two losses: that of the edited prompts' targets, and the margin loss of the activations by which routing tells prompts apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from patchhub.editing.locate import Encoded
from patchhub.editing.wise.settings import Distance, WiseSettings
from patchhub.errors import EditError
from patchhub.models.tracing import Pass, Stack, right_padded


def margin_loss(
    inside: Float[Tensor, " n"], outside: Float[Tensor, " m"], margins: tuple[float, float, float]
) -> Float[Tensor, ""]:
    """relu(d_out - d_in + gamma) + relu(d_out - alpha) + relu(beta - d_in), each as the mean of its positive entries.

    The first term compares every pair. (Wang et al. 2024, eq. 5; the published code takes means in the same way.)

    Args:
        inside: distances of edited prompts.
        outside: distances of unrelated texts.
        margins: alpha, beta, gamma.
    """
    alpha, beta, gamma = margins
    pairs = outside[None, :] - inside[:, None] + gamma
    terms = (pairs.reshape(-1), outside - alpha, beta - inside)
    return torch.stack([_mean_of_positive(term) for term in terms]).sum()


def _mean_of_positive(values: Float[Tensor, " n"]) -> Float[Tensor, ""]:
    positive = values.clamp(min=0.0)
    return positive.sum() / (values > 0).sum().clamp(min=1)


_STOP_LOSS, _STOP_CHANGE = 0.02, 1e-4  # EasyEdit's early stop
_ROWS_PER_BATCH = 96
_TEXTS = 64  # unrelated texts that the margin loss is computed from


@dataclass(frozen=True, eq=False)
class _Rows:
    """Rows of prompts with targets, run once up to the edited block, and where their targets are predicted.

    ``outputs`` are the feed-forward projection's, ``keys`` its inputs. States, outputs and keys are on the device of the edited block,
    what belongs to predictions where token ids go.
    """

    start: Pass
    hidden: Float[Tensor, "rows time d"]
    outputs: Float[Tensor, "rows time d"]
    keys: Float[Tensor, "rows time in"]
    prompt: Bool[Tensor, "rows time"]
    row: Int[Tensor, " m"]
    column: Int[Tensor, " m"]
    token: Int[Tensor, " m"]
    share: Float[Tensor, " m"]


@dataclass(frozen=True, eq=False)
class _Texts:
    """Keys of unrelated texts, and which positions are tokens."""

    keys: Float[Tensor, "texts time in"]
    real: Bool[Tensor, "texts time"]


def descend(
    stack: Stack,
    layer: int,
    prompts: Sequence[Sequence[Encoded]],
    texts: Sequence[Sequence[int]],
    mask: Float[Tensor, "out in"],
    start: Float[Tensor, "out in"],
    margins: tuple[float, float, float],
    settings: WiseSettings,
) -> tuple[Float[Tensor, "out in"], float]:
    """The change after training from ``start``, and the last loss.

    Args:
        prompts: of each request, its contexts with targets.
        texts: token ids of unrelated texts.
        mask: 1 where an entry may change.
        margins: alpha, beta, gamma as distances.

    Raises:
        EditError: the loss stopped being finite.
    """
    batches = _prepare(stack, layer, prompts)
    outside = [_read_texts(stack, layer, texts[:_TEXTS])] if texts else []
    change, loss, before = start.clone(), 0.0, math.inf
    for _ in range(settings.descent_steps):
        loss, gradient = _step(stack, layer, batches, outside, change, margins, settings.distance)
        if not math.isfinite(loss):
            raise EditError("the training gave a loss that is not finite", remedy="Lower `descent_rate`.")
        if loss <= _STOP_LOSS and abs(before - loss) <= _STOP_CHANGE:
            break
        before = loss
        gradient = (gradient + settings.descent_decay * change) * mask
        change = (change - settings.descent_rate * gradient).clamp(-settings.norm_constraint, settings.norm_constraint)
    return change, loss


def _step(
    stack: Stack,
    layer: int,
    batches: Sequence[_Rows],
    outside: Sequence[_Texts],
    change: Float[Tensor, "out in"],
    margins: tuple[float, float, float],
    distance: Distance,
) -> tuple[float, Float[Tensor, "out in"]]:
    """The loss and its gradient; one batch's graph is in memory at a time."""
    variable = change.detach().requires_grad_()
    parts = [partial(_edit_loss, stack, layer, rows, variable) for rows in batches]
    if outside:
        parts.append(partial(_margin_loss, batches, outside, variable, margins, distance))
    total, gradient = 0.0, torch.zeros_like(change)
    for part in parts:
        loss = part()
        total += float(loss.detach())
        gradient += torch.autograd.grad(loss, variable)[0]
    return total, gradient


def _edit_loss(stack: Stack, layer: int, rows: _Rows, change: Float[Tensor, "out in"]) -> Float[Tensor, ""]:
    """The part of the edit loss that some rows make."""
    behind, added = stack.behind(layer), rows.keys @ change.T
    moved = behind(added) if behind.gain is None else behind(rows.outputs + added) - behind(rows.outputs)
    hidden = (rows.hidden.float() + moved).to(rows.hidden.dtype)
    logits = stack.logits(rows.start.finish(hidden, layer + 1, rows.row, rows.column)).float()
    chosen = logits.log_softmax(-1).gather(1, rows.token[:, None].to(logits.device))[:, 0]
    return -(chosen * rows.share.to(chosen.device)).sum().to(change.device)


def _margin_loss(
    batches: Sequence[_Rows],
    outside: Sequence[_Texts],
    change: Float[Tensor, "out in"],
    margins: tuple[float, float, float],
    distance: Distance,
) -> Float[Tensor, ""]:
    inside = [_distance(rows.keys @ change.T, rows.prompt, distance) for rows in batches]
    apart = [_distance(texts.keys @ change.T, texts.real, distance) for texts in outside]
    return margin_loss(torch.cat(inside), torch.cat(apart), margins)


@torch.no_grad()
def _prepare(stack: Stack, layer: int, prompts: Sequence[Sequence[Encoded]]) -> list[_Rows]:
    """All contexts of all requests, those of similar length together."""
    flat = [(text, 1.0 / len(texts)) for texts in prompts for text in texts]
    flat.sort(key=lambda item: len(item[0].input_ids))
    chunks = [flat[begin : begin + _ROWS_PER_BATCH] for begin in range(0, len(flat), _ROWS_PER_BATCH)]
    return [_rows(stack, layer, chunk) for chunk in chunks]


def _rows(stack: Stack, layer: int, chunk: Sequence[tuple[Encoded, float]]) -> _Rows:
    ids, mask, positions = right_padded([text.input_ids for text, _ in chunk], stack.device)
    with stack.watch_keys([layer]) as seen, stack.watch_values([layer]) as projected:
        start = stack.begin(ids, mask, positions)
        hidden = start.run(start.hidden, 0, layer + 1).to(stack.device_of(layer))
    found = [
        (index, place - 1, text.input_ids[place], share / (text.target[1] - text.target[0]))
        for index, (text, share) in enumerate(chunk)
        for place in range(*text.target)
    ]
    row, column, token, shares = zip(*found, strict=True)
    stops = torch.tensor([text.target[0] for text, _ in chunk]).to(hidden.device)
    return _Rows(
        start=start,
        hidden=hidden,
        outputs=projected[layer].float(),
        keys=seen[layer].float(),
        prompt=torch.arange(ids.shape[1], device=hidden.device)[None] < stops[:, None],
        row=torch.tensor(row).to(stack.device),
        column=torch.tensor(column).to(stack.device),
        token=torch.tensor(token).to(stack.device),
        share=torch.tensor(shares).to(stack.device),
    )


@torch.no_grad()
def _read_texts(stack: Stack, layer: int, texts: Sequence[Sequence[int]]) -> _Texts:
    ids, mask, positions = right_padded(texts, stack.device)
    with stack.watch_keys([layer]) as seen:
        start = stack.begin(ids, mask, positions)
        start.run(start.hidden, 0, layer + 1)
    return _Texts(seen[layer].float(), mask.bool().to(seen[layer].device))


def _distance(
    side: Float[Tensor, "rows time out"], real: Bool[Tensor, "rows time"], distance: Distance
) -> Float[Tensor, " rows"]:
    """The routing distance of each row; a squared length of zero has gradient zero."""
    lengths = side.square().sum(-1).clamp(min=1e-12).sqrt().masked_fill(~real, 0.0)
    return lengths.amax(1) if distance == "max" else lengths.sum(1) / real.sum(1)
