"""Value optimisation: for each request the hidden vector z that makes the model say the new target.

The objective is ROME's (Meng et al. 2022, eq. 4), as MEMIT uses it at the last edited layer l: a change delta of the hidden state
after block l at the subject's last token, the same in every context, minimising

    mean over contexts of -log P(target | context) / len(target)      (nll)
    + kl_factor KL(P_delta || P_0) at the subject's last token of "{subject} is a"
    + weight_decay ||delta|| / ||h||^2                                (h the unedited hidden state)

by Adam, with ||delta|| clamped to clamp ||h|| and a stop once the objective is below a limit; z = h + delta.

Requests do not interact: they are optimised many at a time, each with its own Adam state, clamp and stop. Nothing that delta
cannot change is computed twice. Blocks up to l and all positions before the subject's last token run once; the steps run the
blocks above l from that token on, over kept keys and values, and the head where a target is predicted. Rows of similar length
share a batch, and finished requests leave it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from patchhub.editing.locate import Encoded
from patchhub.errors import EditError
from patchhub.models.tracing import Pass, Prefix, Stack, left_padded, right_padded

_BETAS, _ADAM_EPSILON = (0.9, 0.999), 1e-8  # torch.optim.Adam's defaults, which the published code uses
_COMPACT_WHEN = 0.15  # rebuild the batch when this share of its requests has finished
_TOKENS_PER_BATCH = 1536  # positions that one step computes; small enough for the caches of a CPU


@dataclass(frozen=True)
class ValueSettings:
    """Of the optimisation of one vector (names and defaults as published for MEMIT, see docs/methods.md)."""

    steps: int
    learning_rate: float
    weight_decay: float
    kl_factor: float
    clamp: float
    stop_loss: float


@dataclass(frozen=True)
class Fact:
    """One request as the optimiser sees it: ``rows[0]`` is the bare prompt; ``essence`` is "{subject} is a"."""

    rows: tuple[Encoded, ...]
    essence: Encoded


@dataclass(frozen=True, eq=False)
class Values:
    """``targets`` z (n, d) float32, the unedited hidden states h (n, d), the last objective and step count per request."""

    targets: Float[Tensor, "n d"]
    hidden: Float[Tensor, "n d"]
    loss: Float[Tensor, " n"]
    steps: Int[Tensor, " n"]


@dataclass(frozen=True, eq=False)
class _Rows:
    """Rows of one batch from the subject's last token on (column 0), over a frozen prefix."""

    start: Pass
    ids: Int[Tensor, "rows time"]
    mask: Int[Tensor, "rows all"]
    positions: Int[Tensor, "rows time"]
    prefix: Prefix | None
    hidden: Float[Tensor, "rows time d"]  # after block l, unedited
    fact: Int[Tensor, " rows"]  # index into the batch's facts

    def select(self, rows: Int[Tensor, " kept"], fact: Int[Tensor, " kept"]) -> _Rows:
        prefix = self.prefix.select(rows) if self.prefix is not None else None
        ids, mask, positions = self.ids[rows], self.mask[rows], self.positions[rows]
        start = self.start.stack.begin(ids, mask, positions, prefix)
        return _Rows(start, ids, mask, positions, prefix, self.hidden[rows], fact)

    def edited(self, delta: Float[Tensor, "facts d"], layer: int) -> Float[Tensor, "rows time d"]:
        """Hidden states after the last block with delta added after block ``layer`` in column 0."""
        first = (self.hidden[:, 0].float() + delta[self.fact]).to(self.hidden.dtype)
        hidden = torch.cat([first[:, None], self.hidden[:, 1:]], dim=1)
        return self.start.run(hidden, layer + 1, len(self.start.stack.blocks))


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
    targets: _Rows
    predictions: _Predictions
    essence: _Rows
    essence_log_probs: Float[Tensor, "facts vocabulary"]
    hidden: Float[Tensor, "facts d"]
    delta: Float[Tensor, "facts d"]
    first_moment: Float[Tensor, "facts d"]
    second_moment: Float[Tensor, "facts d"]


def optimise_values(
    stack: Stack,
    layer: int,
    facts: Sequence[Fact],
    settings: ValueSettings,
    *,
    progress: Callable[[int], None] = lambda finished: None,
) -> Values:
    """z of every fact at the output of block ``layer`` on the model's present weights.

    Args:
        progress: called with the number of facts finished since the last call.

    Raises:
        EditError: an objective stopped being finite.
    """
    width = stack.architecture.d_model
    hidden, targets = torch.zeros(len(facts), width), torch.zeros(len(facts), width)
    loss, steps = torch.zeros(len(facts)), torch.zeros(len(facts), dtype=torch.long)
    for chosen in _batches(facts):
        batch = _prepare(stack, layer, [facts[i] for i in chosen], torch.tensor(chosen, device=stack.device))
        hidden[chosen] = batch.hidden.cpu()
        for step in range(settings.steps):
            objective, gradient = _objective(batch, layer, settings, last=step == settings.steps - 1)
            done = objective < settings.stop_loss
            loss[batch.index.cpu()], steps[batch.index.cpu()] = objective.cpu(), step
            targets[batch.index.cpu()] = (batch.hidden + batch.delta).cpu()
            if not torch.isfinite(objective).all():
                raise EditError(
                    "the value optimisation gave a loss that is not finite",
                    remedy="Lower `learning_rate` or `clamp`, or check the base for NaN weights.",
                )
            if gradient is None or bool(done.all()):
                break
            batch = _adam(batch, gradient, done, step, settings)
            if done.sum() > _COMPACT_WHEN * len(done):
                progress(int(done.sum()))
                batch = _without(batch, done)
        progress(len(batch.index))
    return Values(targets, hidden, loss, steps)


def _batches(facts: Sequence[Fact]) -> list[list[int]]:
    """Indices grouped so that the rows of a group have similar lengths and one step a bounded number of positions."""
    order = sorted(range(len(facts)), key=lambda i: (_suffix(facts[i].rows[0]), facts[i].rows[-1].subject_last))
    groups: list[list[int]] = []
    for index in order:
        rows, suffix = len(facts[index].rows), _suffix(facts[index].rows[0])
        if not groups or (len(groups[-1]) + 1) * rows * suffix > _TOKENS_PER_BATCH:
            groups.append([])
        groups[-1].append(index)
    return groups


def _suffix(row: Encoded) -> int:
    """Positions from the subject's last token to the one that predicts the last target token."""
    return row.target[1] - 1 - row.subject_last


def _prepare(stack: Stack, layer: int, facts: Sequence[Fact], index: Int[Tensor, " facts"]) -> _Batch:
    rows = [(row, number) for number, fact in enumerate(facts) for row in fact.rows]
    owner = torch.tensor([number for _, number in rows], device=stack.device)
    targets = _begin(stack, layer, [(row, _suffix(row)) for row, _ in rows], owner)
    bare = torch.tensor([i for i, (row, number) in enumerate(rows) if row is facts[number].rows[0]])
    essence = _begin(stack, layer, [(fact.essence, 1) for fact in facts], torch.arange(len(facts), device=stack.device))
    hidden = targets.hidden[bare.to(stack.device), 0].float()
    with torch.no_grad():
        unedited = stack.logits(essence.edited(torch.zeros_like(hidden), layer)[:, 0]).float().log_softmax(-1)
    zeros = torch.zeros_like(hidden)
    predictions = _predictions(rows, [len(fact.rows) for fact in facts], stack.device)
    return _Batch(index, targets, predictions, essence, unedited, hidden, zeros, zeros, zeros)


@torch.no_grad()
def _begin(stack: Stack, layer: int, rows: Sequence[tuple[Encoded, int]], owner: Int[Tensor, " rows"]) -> _Rows:
    """Run the prefixes and the blocks up to ``layer`` once; rows come with the number of positions to keep."""
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
    hidden = start.run(start.hidden, 0, layer + 1)
    return _Rows(start, ids, mask, positions, prefix, hidden, owner)


def _predictions(rows: Sequence[tuple[Encoded, int]], counts: Sequence[int], device: torch.device) -> _Predictions:
    found: list[tuple[int, int, int, float, int]] = []
    for number, (row, fact) in enumerate(rows):
        start, stop = row.target
        share = 1.0 / ((stop - start) * counts[fact])
        found += [(number, p - 1 - row.subject_last, row.input_ids[p], share, fact) for p in range(start, stop)]
    row_, column, token, share_, fact_ = zip(*found, strict=True)
    integers = [torch.tensor(values, device=device) for values in (row_, column, token, fact_)]
    return _Predictions(integers[0], integers[1], integers[2], torch.tensor(share_, device=device), integers[3])


def _objective(
    batch: _Batch, layer: int, settings: ValueSettings, *, last: bool
) -> tuple[Float[Tensor, " facts"], Float[Tensor, "facts d"] | None]:
    """The objective of each fact and, unless this is the last step, its gradient."""
    delta = batch.delta.detach().requires_grad_(not last)
    with torch.set_grad_enabled(not last):
        where = batch.predictions
        stack = batch.targets.start.stack
        logits = stack.logits(batch.targets.edited(delta, layer)[where.row, where.column]).float()
        log_probs = logits.gather(1, where.token[:, None])[:, 0] - logits.logsumexp(-1)
        nll = torch.zeros_like(delta[:, 0]).index_add(0, where.fact, -log_probs * where.share)
        essence = stack.logits(batch.essence.edited(delta, layer)[:, 0]).float().log_softmax(-1)
        kl = (essence.exp() * (essence - batch.essence_log_probs)).sum(-1)
        decay = delta.norm(dim=1) / batch.hidden.norm(dim=1).square()
        objective = nll + settings.kl_factor * kl + settings.weight_decay * decay
    gradient = None if last else torch.autograd.grad(objective.sum(), delta)[0]
    return objective.detach(), gradient


def _adam(
    batch: _Batch,
    gradient: Float[Tensor, "facts d"],
    done: Bool[Tensor, " facts"],
    step: int,
    settings: ValueSettings,
) -> _Batch:
    """One Adam step and the clamp, for the facts that are not done."""
    first = _BETAS[0] * batch.first_moment + (1 - _BETAS[0]) * gradient
    second = _BETAS[1] * batch.second_moment + (1 - _BETAS[1]) * gradient.square()
    scale = (second / (1 - _BETAS[1] ** (step + 1))).sqrt() + _ADAM_EPSILON
    delta = batch.delta - settings.learning_rate * (first / (1 - _BETAS[0] ** (step + 1))) / scale
    limit = settings.clamp * batch.hidden.norm(dim=1, keepdim=True)
    delta = delta * (limit / delta.norm(dim=1, keepdim=True).clamp(min=1e-12)).clamp(max=1.0)
    delta = torch.where(done[:, None], batch.delta, delta)
    return _Batch(
        batch.index,
        batch.targets,
        batch.predictions,
        batch.essence,
        batch.essence_log_probs,
        batch.hidden,
        delta,
        first,
        second,
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
        batch.index[keep],
        batch.targets.select(rows, place[batch.targets.fact[rows]]),
        predictions,
        batch.essence.select(keep, torch.arange(len(keep), device=done.device)),
        batch.essence_log_probs[keep],
        batch.hidden[keep],
        batch.delta[keep],
        batch.first_moment[keep],
        batch.second_moment[keep],
    )
