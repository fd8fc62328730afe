"""WISE (Wang et al. 2024, "WISE: Rethinking the Knowledge Memory for Lifelong Model Editing"): edits in a side memory.

A side memory is the change of one feed-forward matrix. Queries near the edits are answered with it, all others without it
(`runtime.routing`); what tells them apart is the distance ||dW k|| that the change itself causes. docs/wise.md has the formulas, what
differs from the published code, and why.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from patchhub.delta import from_sparse
from patchhub.editing.wise_descent import descend
from patchhub.editing.wise_keys import text_distances
from patchhub.editing.wise_losses import margin_loss
from patchhub.editing.wise_rounds import fit_rounds
from patchhub.editing.wise_rows import SHARE_OF_BARE
from patchhub.editing.wise_settings import WiseSettings
from patchhub.editing.wise_shard import Shard, dense_change, recompress
from patchhub.editing.wise_task import Rows, Task, make_task, read_rows
from patchhub.errors import EditError
from patchhub.models.tracing import Stack
from patchhub.objects import Request

__all__ = ["Shard", "Trained", "measure", "recompress", "train"]

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
