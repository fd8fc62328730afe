"""Value optimisation: for each request the hidden vector z that makes the model say the new target.

The objective is ROME's (Meng et al. 2022, eq. 4), as MEMIT and PMET use it: a change delta of what a site of the last edited
layer gives at the subject's last token, the same in every context, minimising

    nll_factor mean over contexts of -log P(target | context) / len(target)
    + kl_factor KL(P_delta || P_0) at the subject's last token of "{subject} is a"
    + weight_decay ||delta|| / ||h||^2                                (h what the site gives unedited; summed over its parts)

by Adam, with ||delta|| clamped to clamp ||h|| for each part and a stop once the objective is below a limit; z = h + delta.

Requests do not interact: they are optimised many at a time, each with its own Adam state, clamp and stop. Nothing that delta
cannot change is computed twice. Blocks below the site and all positions before the subject's last token run once; the steps run the
blocks above from that token on, over kept keys and values, and the head where a target is predicted. Rows of one length
share a batch, and finished requests leave it at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from patchhub.editing.locate import Encoded
from patchhub.errors import EditError
from patchhub.models.tracing import Pass, Prefix, Stack, left_padded, right_padded

_BETAS, _ADAM_EPSILON = (0.9, 0.999), 1e-8  # torch.optim.Adam's defaults, which the published code uses
_FALLING_FACTOR, _KL_LIMIT = 0.1, 0.01  # PMET's extra stop rule (compute_zs.py)
_TOKENS_PER_BATCH = 1536  # positions that one step computes; small enough for the caches of a CPU


@dataclass(frozen=True)
class ValueSettings:
    """Of the optimisation of one vector, under the published names (docs/methods.md).

    ``until_sure`` is PMET's stop rule: while a request's target is the argmax at every position, its likelihood weighs a tenth in the
    next step, and it is finished once its KL term is at most 0.01.
    """

    steps: int
    learning_rate: float
    weight_decay: float
    kl_factor: float
    clamp: float
    stop_loss: float
    nll_factor: float = 1.0
    until_sure: bool = False


@dataclass(frozen=True)
class Fact:
    """One request as the optimiser sees it: ``rows[0]`` is the bare prompt; ``essence`` is "{subject} is a"."""

    rows: tuple[Encoded, ...]
    essence: Encoded


@dataclass(frozen=True, eq=False)
class Values:
    """``targets`` z (n, d) float32, the unedited h (n, d), the last objective and step count per request."""

    targets: Float[Tensor, "n d"]
    hidden: Float[Tensor, "n d"]
    loss: Float[Tensor, " n"]
    steps: Int[Tensor, " n"]


class Site(ABC):
    """Where the change enters a layer: which blocks run again at each step, and what the change is added to.

    A change has one vector per part; part 0 is the one that is written into weights.
    """

    parts: int

    def __init__(self, stack: Stack, layer: int) -> None:
        self.stack, self.layer = stack, layer

    @property
    @abstractmethod
    def first(self) -> int:
        """The first block that runs at each step."""

    @abstractmethod
    def run(self, rows: Rows, change: Float[Tensor, "rows parts d"]) -> Float[Tensor, "rows time d"]:
        """Hidden states after the last block, with the change added in column 0."""

    @abstractmethod
    def unedited(self, rows: Rows) -> Float[Tensor, "rows parts d"]:
        """What the change is added to."""


class BlockOutput(Site):
    """The output of the layer's block: MEMIT's site."""

    parts = 1

    @property
    def first(self) -> int:
        return self.layer + 1

    def run(self, rows: Rows, change: Float[Tensor, "rows parts d"]) -> Float[Tensor, "rows time d"]:
        first = (rows.hidden[:, 0].float() + change[:, 0]).to(rows.hidden.dtype)
        hidden = torch.cat([first[:, None], rows.hidden[:, 1:]], dim=1)
        return rows.start.run(hidden, self.first, len(self.stack.blocks))

    def unedited(self, rows: Rows) -> Float[Tensor, "rows parts d"]:
        return rows.hidden[:, :1].float()


class Projections(Site):
    """The outputs of the layer's feed-forward (part 0) and attention (part 1) projections: PMET's site."""

    parts = 2

    @property
    def first(self) -> int:
        return self.layer

    @property
    def _modules(self) -> tuple[nn.Module, nn.Module]:
        block = self.stack.blocks[self.layer]
        return self.stack.ffn_out[self.layer], block.get_submodule(self.stack.architecture.attn_out)

    def run(self, rows: Rows, change: Float[Tensor, "rows parts d"]) -> Float[Tensor, "rows time d"]:
        def adding(part: int) -> Any:
            def add(module: nn.Module, args: Any, output: Tensor) -> Tensor:
                first = (output[:, 0].float() + change[:, part]).to(output.dtype)
                return torch.cat([first[:, None], output[:, 1:]], dim=1)

            return add

        handles = [module.register_forward_hook(adding(part)) for part, module in enumerate(self._modules)]
        try:
            return rows.start.run(rows.hidden, self.first, len(self.stack.blocks))
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def unedited(self, rows: Rows) -> Float[Tensor, "rows parts d"]:
        found: dict[int, Tensor] = {}

        def keeping(part: int) -> Any:
            return lambda module, args, output: found.__setitem__(part, output[:, 0].float())

        handles = [module.register_forward_hook(keeping(part)) for part, module in enumerate(self._modules)]
        try:
            rows.start.run(rows.hidden, self.layer, self.layer + 1)
        finally:
            for handle in handles:
                handle.remove()
        return torch.stack([found[0], found[1]], dim=1)


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of one batch from the subject's last token on (column 0), over a frozen prefix."""

    start: Pass
    ids: Int[Tensor, "rows time"]
    mask: Int[Tensor, "rows all"]
    positions: Int[Tensor, "rows time"]
    prefix: Prefix | None
    hidden: Float[Tensor, "rows time d"]  # before the first block that runs at each step
    fact: Int[Tensor, " rows"]  # index into the batch's facts

    def select(self, rows: Int[Tensor, " kept"], fact: Int[Tensor, " kept"]) -> Rows:
        prefix = self.prefix.select(rows) if self.prefix is not None else None
        ids, mask, positions = self.ids[rows], self.mask[rows], self.positions[rows]
        start = self.start.stack.begin(ids, mask, positions, prefix)
        return Rows(start, ids, mask, positions, prefix, self.hidden[rows], fact)


@dataclass(frozen=True, eq=False)
class _Predictions:
    """Where the target tokens are predicted: row, column and token of each, and its share of its fact's mean."""

    row: Int[Tensor, " m"]
    column: Int[Tensor, " m"]
    token: Int[Tensor, " m"]
    share: Float[Tensor, " m"]
    fact: Int[Tensor, " m"]


@dataclass(frozen=True, eq=False)
class _Batch:
    """The requests that are being optimised together, with their Adam state."""

    index: Int[Tensor, " facts"]  # place in the caller's order
    targets: Rows
    predictions: _Predictions
    essence: Rows
    essence_log_probs: Float[Tensor, "facts vocabulary"]
    hidden: Float[Tensor, "facts parts d"]
    delta: Float[Tensor, "facts parts d"]
    first_moment: Float[Tensor, "facts parts d"]
    second_moment: Float[Tensor, "facts parts d"]
    nll_factor: Float[Tensor, " facts"]


@dataclass(frozen=True, eq=False)
class _Step:
    """One evaluation: the objective of each fact, its gradient (none at the last step), which facts are done and which are sure."""

    objective: Float[Tensor, " facts"]
    gradient: Float[Tensor, "facts parts d"] | None
    done: Bool[Tensor, " facts"]
    sure: Bool[Tensor, " facts"]


def optimise_values(
    site: Site,
    facts: Sequence[Fact],
    settings: ValueSettings,
    *,
    progress: Callable[[int], None] = lambda finished: None,
) -> Values:
    """z of every fact at ``site`` on the model's present weights.

    Args:
        progress: called with the number of facts finished since the last call.

    Raises:
        EditError: an objective stopped being finite.
    """
    width = site.stack.architecture.d_model
    hidden, targets = torch.zeros(len(facts), width), torch.zeros(len(facts), width)
    loss, steps = torch.zeros(len(facts)), torch.zeros(len(facts), dtype=torch.long)
    for chosen in _batches(facts):
        batch = _prepare(site, [facts[i] for i in chosen], torch.tensor(chosen, device=site.stack.device), settings)
        hidden[chosen] = batch.hidden[:, 0].cpu()
        for number in range(settings.steps):
            step = _evaluate(site, batch, settings, last=number == settings.steps - 1)
            where = batch.index.cpu()
            loss[where], steps[where] = step.objective.cpu(), number
            targets[where] = (batch.hidden + batch.delta)[:, 0].cpu()
            if not torch.isfinite(step.objective).all():
                raise EditError(
                    "the value optimisation gave a loss that is not finite",
                    remedy="Lower `learning_rate` or `clamp`, or check the base for NaN weights.",
                )
            if step.gradient is None or bool(step.done.all()):
                break
            batch = _adam(batch, step, number, settings)
            if bool(step.done.any()):
                progress(int(step.done.sum()))
                batch = _without(batch, step.done)
        progress(len(batch.index))
    return Values(targets, hidden, loss, steps)


def _batches(facts: Sequence[Fact]) -> list[list[int]]:
    """Indices grouped so that the bare rows of a group are equally long and one step computes a bounded number of positions."""
    order = sorted(range(len(facts)), key=lambda i: (_suffix(facts[i].rows[0]), facts[i].rows[-1].subject_last))
    groups: list[list[int]] = []
    length = 0
    for index in order:
        rows, suffix = len(facts[index].rows), _suffix(facts[index].rows[0])
        if suffix != length or (len(groups[-1]) + 1) * rows * suffix > _TOKENS_PER_BATCH:
            groups.append([])
        groups[-1].append(index)
        length = suffix
    return groups


def _suffix(row: Encoded) -> int:
    """Positions from the subject's last token to the one that predicts the last target token."""
    return row.target[1] - 1 - row.subject_last


def _prepare(site: Site, facts: Sequence[Fact], index: Int[Tensor, " facts"], settings: ValueSettings) -> _Batch:
    stack = site.stack
    rows = [(row, number) for number, fact in enumerate(facts) for row in fact.rows]
    owner = torch.tensor([number for _, number in rows], device=stack.device)
    targets = _begin(site, [(row, _suffix(row)) for row, _ in rows], owner)
    bare = torch.tensor([i for i, (row, number) in enumerate(rows) if row is facts[number].rows[0]])
    essence = _begin(site, [(fact.essence, 1) for fact in facts], torch.arange(len(facts), device=stack.device))
    hidden = site.unedited(targets)[bare.to(stack.device)]
    zeros = torch.zeros_like(hidden)
    with torch.no_grad():
        unedited = stack.logits(site.run(essence, zeros)[:, 0]).float().log_softmax(-1)
    return _Batch(
        index=index,
        targets=targets,
        predictions=_predictions(rows, [len(fact.rows) for fact in facts], stack.device),
        essence=essence,
        essence_log_probs=unedited,
        hidden=hidden,
        delta=zeros,
        first_moment=zeros,
        second_moment=zeros,
        nll_factor=torch.full((len(facts),), settings.nll_factor, device=stack.device),
    )


@torch.no_grad()
def _begin(site: Site, rows: Sequence[tuple[Encoded, int]], owner: Int[Tensor, " rows"]) -> Rows:
    """Run the prefixes and the blocks below the site once; rows come with the number of positions to keep."""
    stack = site.stack
    before = [row.input_ids[: row.subject_last] for row, _ in rows]
    after = [row.input_ids[row.subject_last : row.subject_last + kept] for row, kept in rows]
    ids, mask, positions = right_padded(after, stack.device)
    positions = positions + torch.tensor([len(b) for b in before], device=stack.device)[:, None]
    prefix = None
    if any(before):
        prefix_ids, prefix_mask, prefix_positions = left_padded(before, stack.device)
        prefix = stack.read_prefix(prefix_ids, prefix_mask, prefix_positions)
        mask = torch.cat([prefix_mask, mask], dim=1)
    start = stack.begin(ids, mask, positions, prefix)
    hidden = start.run(start.hidden, 0, site.first)
    return Rows(start, ids, mask, positions, prefix, hidden, owner)


def _predictions(rows: Sequence[tuple[Encoded, int]], counts: Sequence[int], device: torch.device) -> _Predictions:
    found: list[tuple[int, int, int, float, int]] = []
    for number, (row, fact) in enumerate(rows):
        start, stop = row.target
        share = 1.0 / ((stop - start) * counts[fact])
        found += [(number, p - 1 - row.subject_last, row.input_ids[p], share, fact) for p in range(start, stop)]
    row_, column, token, share_, fact_ = zip(*found, strict=True)
    integers = [torch.tensor(values, device=device) for values in (row_, column, token, fact_)]
    return _Predictions(integers[0], integers[1], integers[2], torch.tensor(share_, device=device), integers[3])


def _evaluate(site: Site, batch: _Batch, settings: ValueSettings, *, last: bool) -> _Step:
    """The objective of each fact and, unless this is the last step, its gradient."""
    delta = batch.delta.detach().requires_grad_(not last)
    where, stack = batch.predictions, site.stack
    with torch.set_grad_enabled(not last):
        logits = stack.logits(site.run(batch.targets, delta[batch.targets.fact])[where.row, where.column]).float()
        chosen = logits.gather(1, where.token[:, None])[:, 0]
        log_probs = chosen - logits.logsumexp(-1)
        nll = torch.zeros_like(batch.nll_factor).index_add(0, where.fact, -log_probs * where.share)
        essence = stack.logits(site.run(batch.essence, delta[batch.essence.fact])[:, 0]).float().log_softmax(-1)
        kl = settings.kl_factor * (essence.exp() * (essence - batch.essence_log_probs)).sum(-1)
        decay = (delta.norm(dim=-1) / batch.hidden.norm(dim=-1).square()).sum(-1)
        objective = batch.nll_factor * nll + kl + settings.weight_decay * decay
    gradient = None if last else torch.autograd.grad(objective.sum(), delta)[0]
    done, sure = objective < settings.stop_loss, torch.zeros_like(objective, dtype=torch.bool)
    if settings.until_sure:
        wrong = (chosen < logits.max(-1).values).float()
        sure = torch.zeros_like(batch.nll_factor).index_add(0, where.fact, wrong) == 0
        done = done | (sure & (kl <= _KL_LIMIT))
    return _Step(objective.detach(), gradient, done, sure)


def _adam(batch: _Batch, step: _Step, number: int, settings: ValueSettings) -> _Batch:
    """One Adam step and the clamp."""
    assert step.gradient is not None
    first = _BETAS[0] * batch.first_moment + (1 - _BETAS[0]) * step.gradient
    second = _BETAS[1] * batch.second_moment + (1 - _BETAS[1]) * step.gradient.square()
    scale = (second / (1 - _BETAS[1] ** (number + 1))).sqrt() + _ADAM_EPSILON
    delta = batch.delta - settings.learning_rate * (first / (1 - _BETAS[0] ** (number + 1))) / scale
    limit = settings.clamp * batch.hidden.norm(dim=-1, keepdim=True)
    delta = delta * (limit / delta.norm(dim=-1, keepdim=True).clamp(min=1e-12)).clamp(max=1.0)
    return replace(
        batch,
        delta=delta,
        first_moment=first,
        second_moment=second,
        nll_factor=settings.nll_factor * torch.where(step.sure, _FALLING_FACTOR, 1.0),
    )


def _without(batch: _Batch, done: Bool[Tensor, " facts"]) -> _Batch:
    """The batch without its finished facts."""
    keep = (~done).nonzero()[:, 0]
    place = torch.full((len(done),), -1, device=done.device).index_copy(
        0, keep, torch.arange(len(keep), device=done.device)
    )
    rows = (~done)[batch.targets.fact].nonzero()[:, 0]
    new_row = torch.full((len(batch.targets.fact),), -1, device=done.device)
    new_row = new_row.index_copy(0, rows, torch.arange(len(rows), device=done.device))
    old = batch.predictions
    kept = (~done)[old.fact]
    predictions = _Predictions(
        new_row[old.row[kept]], old.column[kept], old.token[kept], old.share[kept], place[old.fact[kept]]
    )
    return _Batch(
        index=batch.index[keep],
        targets=batch.targets.select(rows, place[batch.targets.fact[rows]]),
        predictions=predictions,
        essence=batch.essence.select(keep, torch.arange(len(keep), device=done.device)),
        essence_log_probs=batch.essence_log_probs[keep],
        hidden=batch.hidden[keep],
        delta=batch.delta[keep],
        first_moment=batch.first_moment[keep],
        second_moment=batch.second_moment[keep],
        nll_factor=batch.nll_factor[keep],
    )
