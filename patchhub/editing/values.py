"""Value optimisation: for each request the hidden vector z that makes the model say the new target.

Finished values are kept on disk while the others are made, so that an interrupted edit goes on where it stopped."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby
from typing import Any, Final

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from patchhub.cache import Cache, Kind, Slot
from patchhub.canonical import canonical_json, object_id
from patchhub.editing.budget import POSITIONS, Footprint, in_halves, release_memory, step_budget
from patchhub.editing.locate import Encoded
from patchhub.editing.rows import Row, Rows, Site, Trunk, open_rows, read_trunk
from patchhub.errors import EditError

KIND: Final = Kind("values", ".values", limit=1 << 30)

_KEY = 32  # bytes of a fact's hash


@dataclass(frozen=True, eq=False)
class KeptValue:
    """What was optimised for one fact: target z and unedited h (d,), float32, the last objective and the number of steps."""

    target: np.ndarray
    hidden: np.ndarray
    loss: float
    steps: int


@dataclass(frozen=True)
class KeptValues:
    """The values of one model state under one setting, an entry of the cache for each batch.

    Attributes:
        cache: where they are.
        inputs: everything that a value depends on besides its fact, as JSON.
        width: d, floats of a value.
    """

    cache: Cache
    inputs: Mapping[str, Any]
    width: int

    def read(self) -> dict[str, KeptValue]:
        """Key -> value of every fact."""
        size, found = _KEY + 4 * (2 * self.width + 2), {}
        for content in self._slot.contents():
            for start in range(0, len(content), size):
                record = content[start : start + size]
                floats = np.frombuffer(record[_KEY:], np.float32)
                target, hidden = floats[: self.width], floats[self.width : -2]
                found[record[:_KEY].hex()] = KeptValue(target, hidden, float(floats[-2]), int(floats[-1]))
        return found

    def add(self, values: Mapping[str, KeptValue]) -> None:
        """Keep a batch; a failure to write is no error."""
        self._slot.keep([b"".join(_encoded(key, value) for key, value in values.items())])

    @property
    def _slot(self) -> Slot:
        return self.cache.slot(KIND, **self.inputs, width=self.width)


def fact_key(rows: Sequence[tuple[Sequence[int], int, tuple[int, int]]]) -> str:
    """SHA-256 of a fact's texts: token ids, place of the subject's last token, and the target's tokens [start, stop) of each."""
    return object_id(canonical_json([[list(ids), place, list(target)] for ids, place, target in rows]))


def _encoded(key: str, value: KeptValue) -> bytes:
    tail = np.array([value.loss, value.steps], np.float32)
    return bytes.fromhex(key) + b"".join(
        part.astype(np.float32).tobytes() for part in (value.target, value.hidden, tail)
    )


_BETAS, _ADAM_EPSILON = (0.9, 0.999), 1e-8  # torch.optim.Adam's defaults, which the published code uses
_LEAST_FACTS = 8  # that a batch shrinks to; a multiple of as many begin in one
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
    """The requests that are being optimised together, with their Adam state.

    Some are finished already (not ``live``). They stay until half of the batch can go: libraries make a kernel for each shape of a
    product and keep it for good, so there must not be as many shapes as steps.
    """

    live: Bool[Tensor, " facts"]
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
            if memory is not None:
                release_memory()  # what the last batch left in pieces would come on top of the next
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
        objective, where = step.objective[batch.live].cpu(), batch.index[batch.live].cpu()
        values.loss[where], values.steps[where] = objective, number
        values.targets[where] = (batch.hidden + batch.delta)[batch.live, 0].cpu()
        if not torch.isfinite(objective).all():
            raise EditError(
                "the value optimisation gave a loss that is not finite",
                remedy="Lower `learning_rate` or `clamp`, or check the base for NaN weights.",
            )
        live = batch.live & ~step.done
        if step.gradient is None or not bool(live.any()):
            return
        batch = _shrunk(replace(_adam(batch, step, number, settings), live=live))


def _batches(site: Site, facts: Sequence[Fact], places: Sequence[int], budget: int) -> list[list[int]]:
    """The places in groups whose bare rows are equally long and whose step stays below ``budget`` bytes."""
    footprint = Footprint.of(site.stack, site.first)
    positions = POSITIONS if site.stack.device.type == "cpu" else budget // footprint.position
    ordered = sorted(places, key=lambda i: (_suffix(facts[i].rows[0]), facts[i].rows[-1].subject_last))
    groups: list[list[int]] = []
    for suffix, alike in groupby(ordered, key=lambda i: _suffix(facts[i].rows[0])):
        rest = list(alike)
        while rest:
            most = max(1, positions // (len(facts[rest[0]].rows) * suffix))
            sizes = accumulate(_bytes(facts[i], footprint) for i in rest[:most])
            count = max(1, sum(size <= budget for size in sizes))
            if _LEAST_FACTS < count < len(rest):
                count -= count % _LEAST_FACTS
            groups.append(rest[:count])
            rest = rest[count:]
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
        live=torch.ones(len(facts), dtype=torch.bool, device=stack.device),
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


def _shrunk(batch: _Batch) -> _Batch:
    """The batch without its finished facts, or with so many of them that its size is a power of two."""
    live = int(batch.live.sum())
    size = max(_LEAST_FACTS, 1 << (live - 1).bit_length())
    if size >= len(batch.live):
        return batch
    kept = batch.live.clone()
    kept[(~kept).nonzero()[: size - live, 0]] = True
    keep = kept.nonzero()[:, 0]
    place = _new_places(keep, len(kept))
    rows = kept[batch.targets.fact].nonzero()[:, 0]
    new_row = _new_places(rows, len(batch.targets.fact))
    old = batch.predictions
    theirs = kept[old.fact]
    predictions = _Predictions(
        new_row[old.row[theirs]], old.column[theirs], old.token[theirs], old.share[theirs], place[old.fact[theirs]]
    )
    return _Batch(
        live=batch.live[keep],
        index=batch.index[keep],
        targets=batch.targets.select(rows, place[batch.targets.fact[rows]]),
        predictions=predictions,
        essence=batch.essence.select(keep, torch.arange(len(keep), device=keep.device)),
        essence_log_probs=batch.essence_log_probs[keep],
        hidden=batch.hidden[keep],
        delta=batch.delta[keep],
        first_moment=batch.first_moment[keep],
        second_moment=batch.second_moment[keep],
        nll_factor=batch.nll_factor[keep],
    )


def _new_places(kept: Int[Tensor, " kept"], count: int) -> Int[Tensor, " count"]:
    """Where each of ``count`` items goes when only some are kept; -1 for the others."""
    places = torch.full((count,), -1, device=kept.device)
    return places.index_copy(0, kept, torch.arange(len(kept), device=kept.device))
