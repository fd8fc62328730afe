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

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from patchhub.editing.budget import POSITIONS, Footprint, in_halves, step_budget
from patchhub.editing.kept_values import KeptValue, KeptValues, fact_key
from patchhub.editing.locate import Encoded
from patchhub.editing.sites import Rows, Site
from patchhub.editing.trunk import Row, Trunk, open_rows, read_trunk
from patchhub.errors import EditError

_BETAS, _ADAM_EPSILON = (0.9, 0.999), 1e-8  # torch.optim.Adam's defaults, which the published code uses
_FALLING_FACTOR, _KL_LIMIT = 0.1, 0.01  # PMET's extra stop rule (compute_zs.py)


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

    @classmethod
    def of(cls, count: int, width: int) -> Values:
        """Places for the values of ``count`` facts."""
        vectors = torch.zeros(2, count, width)
        return cls(vectors[0], vectors[1], torch.zeros(count), torch.zeros(count, dtype=torch.long))

    def at(self, place: int) -> KeptValue:
        """One fact's, to be kept."""
        vectors = self.targets[place].numpy(), self.hidden[place].numpy()
        return KeptValue(*vectors, float(self.loss[place]), int(self.steps[place]))

    def put(self, place: int, value: KeptValue) -> None:
        """The inverse of `at`."""
        self.targets[place] = torch.from_numpy(value.target.copy())
        self.hidden[place] = torch.from_numpy(value.hidden.copy())
        self.loss[place], self.steps[place] = value.loss, value.steps


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
    memory: int | None = None,
    kept: KeptValues | None = None,
    progress: Callable[[int], None] = lambda finished: None,
) -> Values:
    """z of every fact at ``site`` on the model's present weights.

    Args:
        memory: bytes that the process may hold, see `budget.step_budget`; a step that does not fit all the same is halved.
        kept: values that were optimised before, and where those that are optimised now are kept.
        progress: called with the number of facts finished since the last call.

    Raises:
        EditError: an objective stopped being finite, or a single fact does not fit in memory.
    """
    stack = site.stack
    values = Values.of(len(facts), stack.architecture.d_model)
    keys = [_key(fact) for fact in facts] if kept else []
    known = kept.read() if kept else {}
    waiting = [place for place in range(len(facts)) if not (kept and keys[place] in known)]
    for place in set(range(len(facts))).difference(waiting):
        values.put(place, known[keys[place]])
    progress(len(facts) - len(waiting))
    if not waiting:
        return values
    with stack.fast():
        trunk = read_trunk(stack, _alike(facts))

        def run(chosen: Sequence[int]) -> None:
            index = torch.tensor(chosen, device=stack.device)
            _descend(site, _prepare(site, [facts[i] for i in chosen], index, trunk, settings), settings, values)

        groups = _batches(site, facts, waiting, step_budget(stack.device, memory))
        for chosen in in_halves(groups, run, remedy="Give more --memory, or a smaller model."):
            if kept:
                kept.add({keys[place]: values.at(place) for place in chosen})
            progress(len(chosen))
    return values


def _alike(facts: Sequence[Fact]) -> list[list[Encoded]]:
    """The texts of each context, and those of the KL term."""
    return [*([fact.rows[c] for fact in facts] for c in range(len(facts[0].rows))), [fact.essence for fact in facts]]


def _descend(site: Site, batch: _Batch, settings: ValueSettings, values: Values) -> None:
    """Optimise one batch and put what comes out in its places in ``values``."""
    values.hidden[batch.index.cpu()] = batch.hidden[:, 0].cpu()
    for number in range(settings.steps):
        step = _evaluate(site, batch, settings, last=number == settings.steps - 1)
        where = batch.index.cpu()
        values.loss[where], values.steps[where] = step.objective.cpu(), number
        values.targets[where] = (batch.hidden + batch.delta)[:, 0].cpu()
        if not torch.isfinite(step.objective).all():
            raise EditError(
                "the value optimisation gave a loss that is not finite",
                remedy="Lower `learning_rate` or `clamp`, or check the base for NaN weights.",
            )
        if step.gradient is None or bool(step.done.all()):
            return
        batch = _adam(batch, step, number, settings)
        if bool(step.done.any()):
            batch = _without(batch, step.done)


def _batches(site: Site, facts: Sequence[Fact], places: Sequence[int], budget: int) -> list[list[int]]:
    """The places in groups whose bare rows are equally long and whose step stays below ``budget`` bytes."""
    footprint = Footprint.of(site.stack, site.first)
    positions = POSITIONS if site.stack.device.type == "cpu" else budget // footprint.position
    groups: list[list[int]] = []
    length = taken = used = 0
    for place in sorted(places, key=lambda i: (_suffix(facts[i].rows[0]), facts[i].rows[-1].subject_last)):
        fact, suffix = facts[place], _suffix(facts[place].rows[0])
        size, computed = _bytes(fact, footprint), len(fact.rows) * suffix
        if suffix != length or taken + size > budget or used + computed > positions:
            groups.append([])
            length, taken, used = suffix, 0, 0
        groups[-1].append(place)
        taken, used = taken + size, used + computed
    return groups


def _bytes(fact: Fact, footprint: Footprint) -> int:
    """What one fact adds to a step."""
    rows = (*fact.rows, fact.essence)
    predictions = 1 + sum(row.target[1] - row.target[0] for row in fact.rows)
    return (
        footprint.position * (1 + sum(_suffix(row) for row in fact.rows))
        + footprint.prediction * predictions
        + footprint.prefix * sum(row.subject_last for row in rows)
    )


def _key(fact: Fact) -> str:
    return fact_key([(row.input_ids, row.subject_last, row.target) for row in (*fact.rows, fact.essence)])


def _suffix(row: Encoded) -> int:
    """Positions from the subject's last token to the one that predicts the last target token."""
    return row.target[1] - 1 - row.subject_last


def _prepare(
    site: Site, facts: Sequence[Fact], index: Int[Tensor, " facts"], trunk: Trunk, settings: ValueSettings
) -> _Batch:
    stack = site.stack
    rows = [
        Row(row, _suffix(row), context, number)
        for number, fact in enumerate(facts)
        for context, row in enumerate(fact.rows)
    ]
    targets = open_rows(site, rows, trunk)
    bare = torch.tensor([place for place, row in enumerate(rows) if row.trunk == 0], device=stack.device)
    last = len(trunk.lengths) - 1
    essence = open_rows(site, [Row(fact.essence, 1, last, number) for number, fact in enumerate(facts)], trunk)
    hidden = site.unedited(targets)[bare]
    zeros = torch.zeros_like(hidden)
    with torch.no_grad():
        unedited = stack.logits(_at_start(site, essence, zeros)).float().log_softmax(-1)
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


def _predictions(rows: Sequence[Row], counts: Sequence[int], device: torch.device) -> _Predictions:
    found: list[tuple[int, int, int, float, int]] = []
    for number, row in enumerate(rows):
        text, (start, stop) = row.encoded, row.encoded.target
        share = 1.0 / ((stop - start) * counts[row.fact])
        found += [(number, p - 1 - text.subject_last, text.input_ids[p], share, row.fact) for p in range(start, stop)]
    row_, column, token, share_, fact_ = zip(*found, strict=True)
    integers = [torch.tensor(values, device=device) for values in (row_, column, token, fact_)]
    return _Predictions(integers[0], integers[1], integers[2], torch.tensor(share_, device=device), integers[3])


def _evaluate(site: Site, batch: _Batch, settings: ValueSettings, *, last: bool) -> _Step:
    """The objective of each fact and, unless this is the last step, its gradient."""
    delta = batch.delta.detach().requires_grad_(not last)
    where, stack = batch.predictions, site.stack
    with torch.set_grad_enabled(not last):
        logits = stack.logits(site.run(batch.targets, delta[batch.targets.fact], where.row, where.column)).float()
        chosen = logits.gather(1, where.token[:, None])[:, 0]
        log_probs = chosen - logits.logsumexp(-1)
        nll = torch.zeros_like(batch.nll_factor).index_add(0, where.fact, -log_probs * where.share)
        essence = stack.logits(_at_start(site, batch.essence, delta[batch.essence.fact])).float().log_softmax(-1)
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


def _at_start(site: Site, rows: Rows, change: Float[Tensor, "rows parts d"]) -> Float[Tensor, "rows d"]:
    """Hidden states after the last block in column 0 of each row."""
    every = torch.arange(len(change), device=change.device)
    return site.run(rows, change, every, torch.zeros_like(every))


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
