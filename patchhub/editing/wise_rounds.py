"""The default training of a side memory: what it must add at the new subjects is optimised, then the matrix is fitted to that.

The edit loss (the targets' negative log likelihood over all contexts) is minimised over the vector that the side memory adds at a
subject's last token, as MEMIT does for its values (`editing.values`), with the side memory of the round before in place. The fit
(`editing.wise_fit`) then finds the matrix under the mask that adds these vectors and moves unrelated text least. What the fit
leaves undone is the next round's to optimise.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from patchhub.editing.sites import BlockOutput
from patchhub.editing.values import optimise_values
from patchhub.editing.wise_fit import solve_masked, wanted
from patchhub.editing.wise_settings import WiseSettings
from patchhub.editing.wise_task import Task
from patchhub.models.tracing import Stack


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
    before = rows.keys @ task.start.T
    new = rows.owner >= task.held
    added, losses = torch.zeros_like(task.start), torch.zeros(count)
    for number in range(settings.rounds):
        change = task.start + added
        steps = settings.steps if number == 0 else -(-settings.steps // 2)
        with _side_path(stack, settings.layer, change):
            site = BlockOutput(stack, settings.layer)
            values = optimise_values(site, facts, settings.values(steps), progress=done.advance)
        losses = values.loss[-count:]
        if number and not bool(values.steps.any()):
            break
        missing = torch.zeros(len(rows.scope.facts), before.shape[1], device=before.device)
        missing[checked] = (values.targets - values.hidden).to(before.device)
        now = rows.keys @ change.T + missing[rows.owner]
        unmoved = ~new & (missing[rows.owner] == 0).all(1)
        outputs = torch.where(new[:, None], _lengthened(now, task.margins[1]), now) - before
        outputs = outputs.masked_fill(unmoved[:, None], 0.0)
        added = solve_masked(task.problem, wanted(rows.keys, rows.shares, outputs), added)
        limit = settings.norm_constraint
        added = (task.start + added).clamp(-limit, limit) - task.start
    done.finish()
    return (task.start + added) * task.problem.mask, losses


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
