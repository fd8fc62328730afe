"""WISE (Wang et al. 2024, "WISE: Rethinking the Knowledge Memory for Lifelong Model Editing"): edits in a side memory.

The default training optimises what the side memory must add at the new subjects, then fits its matrix to that, in rounds. The published
one is gradient descent on the matrix's entries under the mask, with two losses: that of the edited prompts' targets, and the margin loss
of the activations by which routing tells prompts apart."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from patchhub.delta import Dense, from_sparse
from patchhub.editing.locate import Encoded
from patchhub.editing.rows import BlockOutput, FeedForward
from patchhub.editing.settings import Distance, WiseSettings
from patchhub.editing.values import Values, optimise_values
from patchhub.editing.wise.fit import solve_masked, wanted
from patchhub.editing.wise.texts import (
    SHARE_OF_BARE,
    Rows,
    Shard,
    Task,
    dense_change,
    make_task,
    read_rows,
    text_distances,
)
from patchhub.errors import EditError
from patchhub.models.architectures import Behind
from patchhub.models.experts import Routed
from patchhub.models.tracing import Pass, Stack, add_beside, right_padded
from patchhub.objects import Request


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
        keys=_dense(seen[layer]),
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
    return _Texts(_dense(seen[layer]), mask.bool().to(seen[layer].device))


def _dense(keys: Tensor | Routed) -> Float[Tensor, "rows time in"]:
    """Keys in float32; of experts all their blocks, also those of zeros."""
    return keys[:] if isinstance(keys, Routed) else keys.float()


def _distance(
    side: Float[Tensor, "rows time out"], real: Bool[Tensor, "rows time"], distance: Distance
) -> Float[Tensor, " rows"]:
    """The routing distance of each row; a squared length of zero has gradient zero."""
    lengths = side.square().sum(-1).clamp(min=1e-12).sqrt().masked_fill(~real, 0.0)
    return lengths.amax(1) if distance == "max" else lengths.sum(1) / real.sum(1)


_LENGTH = 1.0  # behind a norm, of the output with the side memory, in lengths of the one without


def fit_rounds(
    stack: Stack, task: Task, settings: WiseSettings, progress: Callable[[int], None]
) -> tuple[Float[Tensor, "out in"], Float[Tensor, " n"]]:
    """The change after all rounds, and the edit loss of each new request when it was last optimised.

    What new requests add is lengthened to beta where it is shorter, so that routing can see it. Requests that the shard holds keep what
    it gave for them; some of them are looked at in every round, and mended where that is no longer enough.

    Args:
        progress: called with a number of new requests, in all once for each.
    """
    rows, count = task.rows, len(task.rows.scope.facts) - task.held
    done = _SharedProgress(settings.rounds, count, progress)
    checked = _checked(task, settings)
    facts = [rows.scope.facts[index] for index in checked]
    before, behind = rows.keys.times(task.start), stack.behind(settings.layer)
    place = BlockOutput if behind.gain is None else FeedForward
    bare = rows.keys[rows.firsts]
    new = rows.owner >= task.held
    added, losses = torch.zeros_like(task.start), torch.zeros(count)
    for number in range(settings.rounds):
        change = task.start + added
        steps = settings.steps if number == 0 else -(-settings.steps // 2)
        with _side_path(stack, settings.layer, change):
            site = place(stack, settings.layer)
            values = optimise_values(site, facts, settings.values(steps), progress=done.advance)
        losses = values.loss[-count:]
        if number and not bool(values.steps.any()):
            break
        missing = torch.zeros(len(rows.scope.facts), before.shape[1], device=before.device)
        given = bare[torch.tensor(checked, device=before.device)].times(change).cpu()
        missing[checked] = _missing(values, behind, given, task.margins[1]).to(before.device)
        now = rows.keys.times(change) + missing[rows.owner]
        unmoved = ~new & (missing[rows.owner] == 0).all(1)
        outputs = torch.where(new[:, None], _lengthened(now, task.margins[1]), now) - before
        outputs = outputs.masked_fill(unmoved[:, None], 0.0)
        added = solve_masked(task.problem, wanted(rows.keys, rows.shares, outputs), added)
        limit = settings.norm_constraint
        added = (task.start + added).clamp(-limit, limit) - task.start
    done.finish()
    return (task.start + added) * task.problem.mask, losses


def _missing(values: Values, behind: Behind, given: Float[Tensor, "n out"], least: float) -> Float[Tensor, "n out"]:
    """What the output of the projection lacks at the bare prompts, where the side memory gives ``given``.

    Behind a norm, which does not see how long an output is, the whole of what the side memory gives is at least ``least`` long.
    """
    if behind.gain is None:
        return (values.targets - values.hidden) / behind.scale
    moved = values.steps > 0
    found = behind.beyond(values.targets, values.hidden - given, least, _LENGTH) - given
    return torch.where(moved[:, None], found, torch.zeros_like(found))


def _checked(task: Task, settings: WiseSettings) -> list[int]:
    """Some of the requests that the shard holds, by chance, and all new ones."""
    count = len(task.rows.scope.facts) - task.held
    draw = random.Random(settings.seed * 1_000_003 + task.held)
    held = draw.sample(range(task.held), min(task.held, settings.rehearsal * count))
    return [*sorted(held), *range(task.held, task.held + count)]


def _lengthened(outputs: Float[Tensor, "rows out"], least: float) -> Float[Tensor, "rows out"]:
    """Rows shorter than ``least`` are scaled up to that length."""
    lengths: Tensor = torch.linalg.vector_norm(outputs, dim=1, keepdim=True).clamp(min=torch.finfo(outputs.dtype).tiny)
    return outputs * (least / lengths).clamp(min=1.0)


class _SharedProgress:
    """Tells several rounds over the same requests as one."""

    def __init__(self, rounds: int, total: int, progress: Callable[[int], None]) -> None:
        self._rounds, self._total, self._progress = rounds, total, progress
        self._done = self._told = 0

    def advance(self, done: int) -> None:
        self._done += done
        self._tell(min(self._done // self._rounds, self._total))

    def finish(self) -> None:
        self._tell(self._total)

    def _tell(self, total: int) -> None:
        if total > self._told:
            self._progress(total - self._told)
            self._told = total


@contextmanager
def _side_path(stack: Stack, layer: int, change: Float[Tensor, "out in"]) -> Iterator[None]:
    """While open, the layer's output projection also adds dW k, in float32."""
    handle = add_beside(stack.ffn_out[layer], [Dense(change.cpu().numpy())])
    try:
        yield
    finally:
        handle.remove()


_INSIDE, _OUTSIDE = 0.05, 0.98  # quantiles of distances; the published minimum hangs on a single prompt
_LOWEST = 0.7  # of the distance inside; lower, and prompts about other subjects would be answered
_BARE, _BARE_SHARE = 0.01, 0.95  # the quantile of bare prompts that pass whatever else is asked, and with what room
_KEPT_DIGITS = 6  # of what is reported


@dataclass(frozen=True, eq=False)
class Trained:
    """A shard, and of its training JSON-able numbers: margins, median distances, losses, bytes per edit."""

    shard: Shard
    report: Mapping[str, float]


def train(
    stack: Stack,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Request],
    contexts: Sequence[str],
    settings: WiseSettings,
    locality: Sequence[Sequence[int]],
    *,
    start: Shard | None = None,
    earlier: Sequence[Request] = (),
    number: int = 0,
    progress: Callable[[str, int], None] = lambda stage, done: None,
) -> Trained:
    """Train a side memory for ``requests`` on the stack's present (main) weights, shards detached.

    Args:
        contexts: templates with one ``{}``; the first is the bare prompt.
        locality: token ids of texts that the side memory must leave alone.
        start: the open shard that is continued; None opens a new one.
        earlier: the requests that ``start`` holds; what it gives at them is kept.
        number: which random subspace: the mask depends on (settings.seed, number).
        progress: called with "training" and a number of requests done; the numbers add up to that of ``requests``.

    Raises:
        EditError: a loss or the change stopped being finite.
    """
    task = make_task(stack, tokenizer, requests, contexts, settings, locality, start, earlier, number)
    solve = fit_rounds if settings.solver == "fit" else _descent(locality)
    change, losses = solve(stack, task, settings, lambda done: progress("training", done))
    if not bool(torch.isfinite(change).all()):
        raise EditError("the side memory is not finite", remedy="Lower `learning_rate` or `clamp`, or raise `ridge`.")
    inside = _distances(stack, change, task.rows, settings)
    outside = task.apart.distances(change, settings.distance)
    sparse = from_sparse(change.cpu().numpy())
    routing = _routing(stack, task.rows, inside, outside, settings)
    shard = Shard(stack.architecture.ffn_weight(settings.layer), sparse, routing)
    numbers = {
        "alpha": task.margins[0],
        "beta": task.margins[1],
        "gamma": task.margins[2],
        "bytes_per_edit": (sparse.mask.nbytes + sparse.values.nbytes) / (len(earlier) + len(requests)),
        "distance_inside": float(inside.median()),
        "distance_outside": float(outside.median()) if len(outside) else 0.0,
        "edit_loss": float(losses.mean()),
        "margin_loss": float(margin_loss(inside, outside, task.margins)),
    }
    return Trained(shard, {name: round(value, _KEPT_DIGITS) for name, value in numbers.items()})


def measure(
    stack: Stack,
    tokenizer: PreTrainedTokenizerBase,
    shard: Shard,
    requests: Sequence[Request],
    contexts: Sequence[str],
    settings: WiseSettings,
    locality: Sequence[Sequence[int]],
) -> Shard:
    """The shard with its threshold measured again on the stack's present main weights; arguments as for `train`."""
    rows, _ = read_rows(stack, tokenizer, requests, contexts, settings, locality, cut=True)
    change = dense_change(shard.change, rows.keys.device)
    inside = _distances(stack, change, rows, settings)
    outside = text_distances(stack, settings.layer, change, locality, settings.distance)
    return replace(shard, routing=_routing(stack, rows, inside, outside, settings))


_Solve = Callable[
    [Stack, Task, WiseSettings, Callable[[int], None]], tuple[Float[Tensor, "out in"], Float[Tensor, " n"]]
]


def _descent(locality: Sequence[Sequence[int]]) -> _Solve:
    """The published training in the form of `fit_rounds`."""

    def solve(
        stack: Stack, task: Task, settings: WiseSettings, progress: Callable[[int], None]
    ) -> tuple[Float[Tensor, "out in"], Float[Tensor, " n"]]:
        prompts = [fact.rows for fact in task.rows.scope.facts]
        change, loss = descend(
            stack, settings.layer, prompts, locality, task.problem.mask, task.start, task.margins, settings
        )
        count = len(prompts) - task.held
        progress(count)
        return change, torch.full((count,), loss / len(prompts))

    return solve


def _distances(
    stack: Stack, change: Float[Tensor, "out in"], rows: Rows, settings: WiseSettings
) -> Float[Tensor, " rows"]:
    """The routing distance of each row in scope.

    With "max" it is the distance at the subject's last token: what holds wherever the subject stands, whatever else is in the text.
    """
    if settings.distance == "max":
        lengths: Tensor = torch.linalg.vector_norm(rows.keys.times(change), dim=1)
        return lengths
    prompts = [row.tokens[: row.prompt_stop] for row in rows.scope.rows]
    return text_distances(stack, settings.layer, change, prompts, settings.distance)


def _routing(
    stack: Stack, rows: Rows, inside: Float[Tensor, " rows"], outside: Float[Tensor, " texts"], settings: WiseSettings
) -> dict[str, Any]:
    """What routing needs.

    The threshold is as low as unrelated text allows, so that paraphrases pass, but between 0.7 and act_ratio times what nearly all rows
    in scope exceed, and bare prompts pass in any case. Distances are of gated keys: where the projection is a shared expert's behind a
    gate, the map that the gate is computed by is named.
    """
    near = float(inside.quantile(_INSIDE))
    far = float(outside.quantile(_OUTSIDE)) if len(outside) else 0.0
    bare = inside[rows.shares >= SHARE_OF_BARE]
    surely = _BARE_SHARE * float(bare.quantile(_BARE))
    threshold = min(max(far, _LOWEST * near), settings.act_ratio * near, surely)
    gate = stack.architecture.feed_forward[settings.layer].gate
    named = {} if gate is None else {"gate": f"{stack.architecture.block(settings.layer)}.{gate}"}
    return {"distance": settings.distance, "threshold": threshold, **named}
