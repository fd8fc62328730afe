"""WISE (Wang et al. 2024, "WISE: Rethinking the Knowledge Memory for Lifelong Model Editing"): edits in a side memory.

The default training optimises what the side memory must add at the new subjects, then fits its matrix to that, in rounds."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from patchhub.delta import from_sparse
from patchhub.editing.rows import BlockOutput, FeedForward
from patchhub.editing.values import Values, optimise_values
from patchhub.editing.wise.descent import descend, margin_loss
from patchhub.editing.wise.settings import WiseSettings
from patchhub.editing.wise.task import (
    Rows,
    Shard,
    Task,
    dense_change,
    make_task,
    read_rows,
    solve_masked,
    wanted,
)
from patchhub.editing.wise.texts import SHARE_OF_BARE, text_distances
from patchhub.errors import EditError
from patchhub.models.behind import Behind
from patchhub.models.tracing import Stack
from patchhub.objects import Request

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
    before, behind = rows.keys @ task.start.T, stack.behind(settings.layer)
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
        missing[checked] = _missing(values, behind, bare[checked].cpu() @ change.T.cpu(), task.margins[1]).to(
            before.device
        )
        now = rows.keys @ change.T + missing[rows.owner]
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
    right = change.T.contiguous()

    def add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return (output.float() + args[0].float() @ right).to(output.dtype)

    handle = stack.ffn_out[layer].register_forward_hook(add)
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
    shard = Shard(stack.architecture.ffn_weight(settings.layer), sparse, _routing(task.rows, inside, outside, settings))
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
    return replace(shard, routing=_routing(rows, inside, outside, settings))


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
        lengths: Tensor = torch.linalg.vector_norm(rows.keys @ change.T, dim=1)
        return lengths
    prompts = [row.tokens[: row.prompt_stop] for row in rows.scope.rows]
    return text_distances(stack, settings.layer, change, prompts, settings.distance)


def _routing(
    rows: Rows, inside: Float[Tensor, " rows"], outside: Float[Tensor, " texts"], settings: WiseSettings
) -> dict[str, Any]:
    """What routing needs.

    The threshold is as low as unrelated text allows, so that paraphrases pass, but between 0.7 and act_ratio times what nearly all rows
    in scope exceed, and bare prompts pass in any case.
    """
    near = float(inside.quantile(_INSIDE))
    far = float(outside.quantile(_OUTSIDE)) if len(outside) else 0.0
    bare = inside[rows.shares >= SHARE_OF_BARE]
    surely = _BARE_SHARE * float(bare.quantile(_BARE))
    threshold = min(max(far, _LOWEST * near), settings.act_ratio * near, surely)
    return {"distance": settings.distance, "threshold": threshold}
