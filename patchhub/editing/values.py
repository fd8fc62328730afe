"""Value optimisation: for each request the hidden vector z that makes the model say the new target.

Finished values are kept on disk while the others are made, so that an interrupted edit goes on where it stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace
from typing import Any, Final

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from patchhub.cache import Cache, Kind, Slot
from patchhub.canonical import canonical_json, object_id
from patchhub.editing.locate import Encoded
from patchhub.editing.rows import Fact, Lane, Row, Site, Trunk, beginnings, new_places, open_lanes, run_trunk
from patchhub.editing.steps import (
    LEAST_FACTS,
    STAYS,
    Predictions,
    Turn,
    in_halves,
    planned,
    read_states,
    release_memory,
    step_budget,
    turns,
    unchanged,
    with_floors,
)
from patchhub.errors import EditError
from patchhub.models.placement import optimised_in, quick

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


def fact_key(rows: Sequence[Encoded]) -> str:
    """SHA-256 of a fact's texts: token ids, place of the subject's last token, and the target's tokens [start, stop) of each.

    Where an answer has an opening, the number of its tokens besides, and where something stands behind the target.
    """
    return object_id(canonical_json([_identifying(row) for row in rows]))


def _identifying(row: Encoded) -> list[Any]:
    beside = [row.opening, row.after] if row.after else [row.opening] if row.opening else []
    return [list(row.input_ids), row.subject_last, list(row.target), *beside]


def _encoded(key: str, value: KeptValue) -> bytes:
    tail = np.array([value.loss, value.steps], np.float32)
    return bytes.fromhex(key) + b"".join(
        part.astype(np.float32).tobytes() for part in (value.target, value.hidden, tail)
    )


_BETAS, _ADAM_EPSILON = (0.9, 0.999), 1e-8  # torch.optim.Adam's defaults, which the published code uses
_STEPS_TOGETHER = (
    10  # times the steps of one fact: one vector that says several things is found later (docs/methods.md)
)
_FALLING_FACTOR, _KL_LIMIT = 0.1, 0.01  # PMET's extra stop rule (compute_zs.py)


@dataclass(frozen=True)
class ValueSettings:
    """Of the optimisation of one vector, under the published names (docs/methods.md).

    ``until_sure`` is PMET's stop rule: while a request's target is the argmax at every position, its likelihood weighs a tenth in the
    next step, and it is finished once its KL term is at most 0.01. ``closing`` weighs the token after the target, which is not the target's
    first one again, against the mean of the target's tokens, ``opening`` the mean of what an answer says before it, ``essence`` the mean of
    what the base's own words about the subject have lost. ``alternate`` is how many of the contexts beside the bare prompt a step reads, in
    turn, with the weight of all; 0: all of them.
    """

    steps: int
    learning_rate: float
    weight_decay: float
    kl_factor: float
    clamp: float
    stop_loss: float
    nll_factor: float = 1.0
    closing: float = 0.0
    opening: float = 0.0
    essence: float = 0.0
    alternate: int = 0
    until_sure: bool = False


@dataclass(frozen=True, eq=False)
class Paused:
    """Where the optimisation of a fact stopped, to be gone on from: its change, Adam's moments, what its likelihood weighs, its steps."""

    delta: Float[Tensor, "parts d"]
    first_moment: Float[Tensor, "parts d"]
    second_moment: Float[Tensor, "parts d"]
    nll_factor: float
    steps: int


@dataclass(frozen=True, eq=False)
class Values:
    """``targets`` z (n, d) float32, the unedited h (n, d), the last objective and step count per request.

    ``paused`` is, by place, where they can be gone on from: not of values that were found in the cache, and only where it is asked for.
    """

    targets: Float[Tensor, "n d"]
    hidden: Float[Tensor, "n d"]
    loss: Float[Tensor, " n"]
    steps: Int[Tensor, " n"]
    paused: dict[int, Paused] = field(default_factory=dict)

    @classmethod
    def of(cls, count: int, width: int) -> Values:
        """Places for the values of ``count`` facts."""
        targets, hidden = torch.zeros(count, width), torch.zeros(count, width)  # a pickle of a view is one of the whole
        return cls(targets, hidden, torch.zeros(count), torch.zeros(count, dtype=torch.long))

    def at(self, place: int) -> KeptValue:
        """One fact's, to be kept."""
        vectors = self.targets[place].numpy(), self.hidden[place].numpy()
        return KeptValue(*vectors, float(self.loss[place]), int(self.steps[place]))

    def take(self, place: int, other: Values, row: int) -> None:
        """Put a fact of others in its place."""
        self.put(place, other.at(row))
        if row in other.paused:
            self.paused[place] = other.paused[row]

    def put(self, place: int, value: KeptValue) -> None:
        """The inverse of `at`."""
        self.paused.pop(place, None)
        self.targets[place] = torch.from_numpy(value.target.copy())
        self.hidden[place] = torch.from_numpy(value.hidden.copy())
        self.loss[place], self.steps[place] = value.loss, value.steps


@dataclass(frozen=True, eq=False)
class _Members:
    """The facts of a batch: place in the caller's order, group, and h of the bare prompt."""

    place: Int[Tensor, " facts"]
    group: Int[Tensor, " facts"]
    hidden: Float[Tensor, "facts parts d"]

    def select(self, kept: Bool[Tensor, " groups"], group: Int[Tensor, " groups"]) -> _Members:
        """Those of some groups, which get new numbers."""
        stay = kept[self.group]
        return _Members(self.place[stay], group[self.group[stay]], self.hidden[stay])


@dataclass(frozen=True, eq=False)
class _Batch:
    """Groups of facts that are being optimised at the same time, each group with one change and its Adam state.

    Some are finished already (not ``live``). They stay until half of the batch can go: libraries make a kernel for each shape of a
    product and keep it for good, so there must not be as many shapes as steps.
    """

    members: _Members
    live: Bool[Tensor, " groups"]
    lanes: tuple[Lane, ...]
    predictions: Predictions
    contexts: int  # of each fact's texts, the bare prompt included
    turns: tuple[Turn, ...]
    essence_log_probs: Float[Tensor, "groups vocabulary"] | None  # before anything changed; None until the first step
    hidden: Float[Tensor, "groups parts d"]  # of each group's first fact
    length: Float[Tensor, "groups parts"]
    unit: Float[Tensor, "groups parts 1"]
    delta: Float[Tensor, "groups parts d"]
    first_moment: Float[Tensor, "groups parts d"]
    second_moment: Float[Tensor, "groups parts d"]
    nll_factor: Float[Tensor, " groups"]
    begun: Int[Tensor, " groups"]  # steps before the first one here
    found: _Found


@dataclass(frozen=True, eq=False)
class _Found:
    """Each group when it was last live: its change, Adam's moments, what its likelihood weighed, its objective, the steps before it."""

    delta: Float[Tensor, "groups parts d"]
    first_moment: Float[Tensor, "groups parts d"]
    second_moment: Float[Tensor, "groups parts d"]
    nll_factor: Float[Tensor, " groups"]
    objective: Float[Tensor, " groups"]
    steps: Int[Tensor, " groups"]

    def select(self, keep: Int[Tensor, " kept"]) -> _Found:
        return _Found(*(getattr(self, one.name)[keep] for one in fields(self)))


@dataclass(frozen=True, eq=False)
class _Step:
    """One evaluation: the objective of each group, its gradient (none at the last step), which groups are done and which are sure, and
    the essence's predictions."""

    objective: Float[Tensor, " groups"]
    gradient: Float[Tensor, "groups parts d"] | None
    done: Bool[Tensor, " groups"]
    sure: Bool[Tensor, " groups"]
    essence: Float[Tensor, "groups vocabulary"]


@dataclass(frozen=True, eq=False)
class Part:
    """Facts that are optimised at the same time, with all that their values depend on besides the model and the site.

    Attributes:
        together: groups of places among ``facts``, as in `optimise_values`.
        common: the beginnings that the texts of all facts have in common, not only of these: so a part gives the same bits anywhere.
    """

    facts: tuple[Fact, ...]
    together: tuple[tuple[int, ...], ...]
    common: tuple[tuple[int, ...], ...]
    settings: ValueSettings
    begun: Mapping[int, Paused] | None = None

    def optimise(self, site: Site, memory: int | None = None) -> Values:
        """The values of the facts; see `optimise_values`."""
        options: dict[str, Any] = {"together": self.together, "common": self.common, "begun": self.begun}
        return optimise_values(site, self.facts, self.settings, memory=memory, **options)


Elsewhere = Callable[[Sequence[Part]], Iterator[tuple[int, Values]]]
"""Optimises parts in other processes: the place and the values of each part, in the order in which they are finished."""


def optimise_values(
    site: Site,
    facts: Sequence[Fact],
    settings: ValueSettings,
    *,
    together: Sequence[Sequence[int]] | None = None,
    common: Sequence[tuple[int, ...]] | None = None,
    begun: Mapping[int, Paused] | None = None,
    memory: int | None = None,
    kept: KeptValues | None = None,
    elsewhere: Elsewhere | None = None,
    progress: Callable[[int], None] = lambda finished: None,
) -> Values:
    """z of every fact at ``site`` on the model's present weights.

    Args:
        together: groups of places that share one change, each place in exactly one of them; None: each fact has its own.
        common: what the texts of each context, and those of the KL term, have in front; None: as much as these facts' have.
        begun: where the optimisation of some facts is gone on from, by place, facts of one group from the same; the values are those of all
            steps at once. None: nowhere, and nothing is `paused`.
        memory: bytes that the process may hold, see `steps.step_budget`; a step that does not fit all the same is halved.
        kept: values that were optimised before, and where those that are optimised now are kept.
        elsewhere: where they are optimised; None: here. The parts are the same either way.
        progress: called with the number of facts finished since the last call.

    Raises:
        EditError: an objective stopped being finite, or a single group does not fit in memory.
    """
    stack = site.stack
    values = Values.of(len(facts), stack.architecture.d_model)
    groups = [tuple(group) for group in together] if together is not None else [(n,) for n in range(len(facts))]
    keys = {place: key for group in groups for place, key in _keys(facts, group)} if kept else {}
    known = kept.read() if kept else {}
    waiting = [group for group in groups if not (kept and all(keys[place] in known for place in group))]
    for place in set(range(len(facts))).difference(*waiting):
        values.put(place, known[keys[place]])
    progress(len(facts) - sum(map(len, waiting)))
    if not waiting:
        return values
    with stack.fast():
        common = beginnings(stack, _alike(facts)) if common is None else common
        batches = planned(stack, site.first, facts, waiting, step_budget(stack.device, memory))
        if elsewhere:
            finished = _gathered(elsewhere, batches, facts, common, settings, begun, values)
        else:
            finished = _here(site, batches, facts, common, settings, begun, values, memory)
        for chosen in finished:
            places = [place for group in chosen for place in group]
            if kept:
                kept.add({keys[place]: values.at(place) for place in places})
            progress(len(places))
    return values


def _here(
    site: Site,
    batches: Sequence[Sequence[tuple[int, ...]]],
    facts: Sequence[Fact],
    common: Sequence[tuple[int, ...]],
    settings: ValueSettings,
    begun: Mapping[int, Paused] | None,
    values: Values,
    memory: int | None,
) -> Iterator[Sequence[tuple[int, ...]]]:
    """Optimise the batches on this model; yields each that is finished, or the halves of one that does not fit."""
    trunk, model = run_trunk(site.stack, common), site.stack.model
    own, seen = model.dtype, set[torch.dtype]()

    def run(chosen: Sequence[tuple[int, ...]]) -> None:
        if memory is not None:
            release_memory()  # what the last batch left in pieces would come on top of the next
        batch, other = _prepare(site, facts, chosen, trunk, settings, begun), optimised_in(model, memory)
        with quick(model, near=other in seen) if other != own else nullcontext():
            seen.add(model.dtype)
            if model.dtype != own:
                lanes = (replace(lane, rows=lane.rows.to(model.dtype)) for lane in batch.lanes)
                batch = replace(batch, lanes=tuple(lanes))
            _descend(site, batch, settings, values, pause=begun is not None)

    return in_halves(batches, run, remedy="Give more --memory, or a smaller model.")


def _gathered(
    elsewhere: Elsewhere,
    batches: Sequence[Sequence[tuple[int, ...]]],
    facts: Sequence[Fact],
    common: Sequence[tuple[int, ...]],
    settings: ValueSettings,
    begun: Mapping[int, Paused] | None,
    values: Values,
) -> Iterator[Sequence[tuple[int, ...]]]:
    """Let the batches be optimised elsewhere, those that take longest first; yields each that is finished."""
    ordered = sorted(batches, key=lambda batch: _weight(facts, batch), reverse=True)
    parts = []
    for batch in ordered:
        numbers = iter(range(len(facts)))
        together = tuple(tuple(next(numbers) for _ in group) for group in batch)
        places = [place for group in batch for place in group]
        started = None if begun is None else {row: begun[place] for row, place in enumerate(places) if place in begun}
        parts.append(Part(tuple(facts[place] for place in places), together, tuple(common), settings, started))
    for number, found in elsewhere(parts):
        for row, place in enumerate(place for group in ordered[number] for place in group):
            values.take(place, found, row)
        yield ordered[number]


def _weight(facts: Sequence[Fact], batch: Sequence[tuple[int, ...]]) -> int:
    """Positions that optimising a batch computes at most, up to a factor."""
    steps = _STEPS_TOGETHER if len(batch[0]) > 1 else 1
    return steps * sum(row.kept for group in batch for place in group for row in facts[place].opened)


def _alike(facts: Sequence[Fact]) -> list[list[Encoded]]:
    """The texts of each context, and those of the KL term."""
    found: dict[int, list[Encoded]] = {}
    for fact in facts:
        for context, row in zip(fact.contexts, fact.rows, strict=True):
            found.setdefault(context, []).append(row)
        if fact.sentence is not None:
            found.setdefault(fact.alone, []).append(fact.sentence)
    return [*(found[context] for context in sorted(found)), [fact.essence for fact in facts]]


def _descend(site: Site, batch: _Batch, settings: ValueSettings, values: Values, *, pause: bool) -> None:
    """Optimise one batch and put what comes out in its places in ``values``."""
    values.hidden[batch.members.place.cpu()] = batch.members.hidden[:, 0].cpu()
    steps = settings.steps * (1 if len(batch.members.place) == len(batch.live) else _STEPS_TOGETHER)
    least, some = int(batch.begun.min()), settings.alternate
    left = steps - least
    if int(batch.begun.max()):
        slots = torch.arange(len(batch.predictions.token), len(batch.predictions.token) + len(batch.live))
        states = unchanged(site, batch.lanes, slots.to(batch.delta.device), batch.delta)
        batch = replace(batch, essence_log_probs=site.stack.logits(states).float().log_softmax(-1))
    for number in range(left):
        turn = batch.turns[(least + number) % len(batch.turns)]
        step = _evaluate(site, batch, turn, settings, last=number == left - 1)
        sound = torch.isfinite(step.objective) | ~batch.live
        batch = _noted(batch, step, number, steps)
        live, finite = torch.stack([batch.live, sound]).tolist()  # the one time that a step waits for the device
        if not all(finite):
            raise EditError(
                "the value optimisation gave a loss that is not finite",
                remedy="Lower `learning_rate` or `clamp`, or check the base for NaN weights.",
            )
        if step.gradient is None or not any(live):
            break
        batch = _shrunk(_adam(batch, step, number, settings), live, values, some, pause=pause)
    _keep(batch, values, pause=pause)


def _noted(batch: _Batch, step: _Step, number: int, steps: int) -> _Batch:
    """The batch with what this step found of its live groups, without those that are done or have had so many steps."""
    live, found, taken = batch.live, batch.found, batch.begun + number
    where = live[:, None, None]
    noted = _Found(
        torch.where(where, batch.delta, found.delta),
        torch.where(where, batch.first_moment, found.first_moment),
        torch.where(where, batch.second_moment, found.second_moment),
        torch.where(live, batch.nll_factor, found.nll_factor),
        torch.where(live, step.objective, found.objective),
        torch.where(live, taken, found.steps),
    )
    before = step.essence if batch.essence_log_probs is None else batch.essence_log_probs
    return replace(batch, live=live & ~step.done & (taken < steps - 1), essence_log_probs=before, found=noted)


def _keep(batch: _Batch, values: Values, *, pause: bool) -> None:
    """Put what was found of a batch in its places."""
    where, group, found = batch.members.place.cpu(), batch.members.group, batch.found
    values.targets[where] = (batch.members.hidden + found.delta[group])[:, 0].cpu()
    values.loss[where], values.steps[where] = found.objective[group].cpu(), found.steps[group].cpu()
    if pause:
        delta, first, second = (states.cpu() for states in (found.delta, found.first_moment, found.second_moment))
        factors, steps = found.nll_factor.tolist(), found.steps.tolist()
        for place, number in zip(where.tolist(), group.tolist(), strict=True):
            states = delta[number].clone(), first[number].clone(), second[number].clone()
            values.paused[place] = Paused(states[0], states[1], states[2], factors[number], steps[number])


def _keys(facts: Sequence[Fact], group: Sequence[int]) -> list[tuple[int, str]]:
    """Place and key of each fact of a group: a hash of its own texts, then of those that it shares its change with."""
    found = []
    for place in group:
        ordered = [facts[place], *(facts[other] for other in group if other != place)]
        found.append((place, fact_key([text for fact in ordered for text in fact.texts])))
    return found


def _prepare(
    site: Site,
    facts: Sequence[Fact],
    chosen: Sequence[tuple[int, ...]],
    trunk: Trunk,
    settings: ValueSettings,
    begun: Mapping[int, Paused] | None,
) -> _Batch:
    stack, device = site.stack, site.stack.device
    places = [(place, number) for number, group in enumerate(chosen) for place in group]
    opened = [(facts[place], replace(row, fact=number)) for place, number in places for row in facts[place].opened]
    rows, of_rows = [row for _, row in opened], [fact for fact, _ in opened]
    weights = [weight for place, _ in places for weight in _shares(facts[place], settings)]
    read, predictions = _predictions(rows, of_rows, weights, settings, stack.vocabulary, device)
    last = len(trunk.lengths) - 1
    read += [(len(rows) + number, 0) for number in range(len(chosen))]
    rows += [Row(facts[group[0]].essence, 1, last, number) for number, group in enumerate(chosen)]
    lanes, members = open_lanes(site, rows, read, trunk), torch.tensor(places, device=device).T
    hidden, lengths = _unedited(site, rows, lanes)
    first = torch.tensor([sum(map(len, chosen[:number])) for number in range(len(chosen))], device=device)
    bare = facts[chosen[0][0]]
    contexts = len(bare.rows) - bare.others - bare.wordings
    zeros = torch.zeros_like(hidden[first])
    if len(predictions.own):
        predictions = with_floors(site, [lane for lane, _ in lanes], predictions, zeros)
    new = Paused(zeros[0], zeros[0], zeros[0], settings.nll_factor, 0)
    starts = [(begun or {}).get(group[0], new) for group in chosen]
    delta, first_moment, second_moment = (
        torch.stack([getattr(start, name).to(device) for start in starts])
        for name in ("delta", "first_moment", "second_moment")
    )
    factor = torch.tensor([start.nll_factor for start in starts], device=device)
    steps = torch.tensor([start.steps for start in starts], device=device)
    return _Batch(
        members=_Members(members[0], members[1], hidden),
        live=torch.ones(len(chosen), dtype=torch.bool, device=device),
        lanes=tuple(lane for lane, _ in lanes),
        predictions=predictions,
        contexts=contexts,
        turns=turns([lane for lane, _ in lanes], predictions, contexts, settings.alternate),
        essence_log_probs=None,
        hidden=hidden[first],
        length=lengths[first],
        unit=site.unit(hidden[first]),
        delta=delta,
        first_moment=first_moment,
        second_moment=second_moment,
        nll_factor=factor,
        begun=steps,
        found=_Found(zeros, zeros, zeros, factor, zeros[:, 0, 0], torch.zeros_like(steps)),
    )


def _shares(fact: Fact, settings: ValueSettings) -> list[float]:
    """What each of the texts that are opened weighs: the rows, and the sentence."""
    return fact.shares if fact.sentence is None else [*fact.shares, settings.essence]


def _unedited(
    site: Site, rows: Sequence[Row], lanes: Sequence[tuple[Lane, Sequence[int]]]
) -> tuple[Float[Tensor, "facts parts d"], Float[Tensor, "facts parts"]]:
    """What the change is added to in the bare row of every fact, and what its length is relative to; essences are no such rows."""
    facts = [number for number, row in enumerate(rows) if row.trunk == 0]
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for lane, numbers in lanes:
        if any(rows[number].trunk == 0 for number in numbers):
            hidden = site.unedited(lane.rows)
            found |= dict(zip(numbers, zip(hidden, site.lengths(lane.rows, hidden), strict=True), strict=True))
    hidden, lengths = (torch.stack(parts) for parts in zip(*(found[number] for number in facts), strict=True))
    return hidden, lengths


def _predictions(
    rows: Sequence[Row],
    facts: Sequence[Fact],
    weights: Sequence[float],
    settings: ValueSettings,
    vocabulary: int,
    device: torch.device,
) -> tuple[list[tuple[int, int]], Predictions]:
    """What is predicted, with row and column of each; ``facts`` are the rows' facts, ``weights`` what each row weighs in its fact."""
    masks: dict[tuple[int, int], tuple[int, Tensor]] = {}

    def but(token: int, closers: Tensor | None) -> int:
        """The number of the mask of what may follow, which is not the target again: the closers, or anything."""
        key = (token, id(closers))
        if key not in masks:
            mask = torch.ones(vocabulary, dtype=torch.bool) if closers is None else closers.clone()
            mask[token] = False
            masks[key] = len(masks), mask
        return masks[key][0]

    read: list[tuple[int, int]] = []
    found: list[tuple[int, float, int, int]] = []
    for number, row in enumerate(rows):
        text, (start, stop), fact, last = row.encoded, row.encoded.target, facts[number], row.encoded.subject_last
        if row.stays:
            read += [(number, place - 1 - last) for place in range(start, stop)]
            share = weights[number] / (stop - start)
            found += [(text.input_ids[place], share, row.fact, STAYS) for place in range(start, stop)]
            continue
        spans = [(start, stop, weights[number] / (stop - start))]
        if text.opening and settings.opening:
            spans.append((start - text.opening, start, settings.opening * weights[number] / text.opening))
        for begin, end, share in spans:
            read += [(number, place - 1 - last) for place in range(begin, end)]
            found += [(text.input_ids[place], share, row.fact, -1) for place in range(begin, end)]
        if fact.closers is not None:
            read.append((number, stop - 1 - last))
            found.append((0, settings.closing * weights[number], row.fact, but(text.input_ids[start], fact.closers)))
        if text.after:
            read.append((number, stop + text.after - 1 - last))
            found.append((0, settings.closing * weights[number], row.fact, but(text.input_ids[start], fact.behind)))
    token, shares, fact_, closers = zip(*found, strict=True)
    tokens, of_fact, ends = (torch.tensor(numbers, device=device) for numbers in (token, fact_, closers))
    follow = [mask for _, mask in masks.values()]
    allowed = torch.stack(follow) if follow else torch.zeros(0, vocabulary, dtype=torch.bool)
    return read, Predictions.of(tokens, torch.tensor(shares, device=device), of_fact, ends, allowed.to(device))


def _evaluate(site: Site, batch: _Batch, turn: Turn, settings: ValueSettings, *, last: bool) -> _Step:
    """The objective of each fact, as far as this turn reads it, and, unless this is the last step, its gradient."""
    delta = batch.delta.detach().requires_grad_(not last)
    with torch.set_grad_enabled(not last):
        found = list[Tensor]()
        for (lane, some), (row, column) in zip(turn.lanes, turn.states, strict=True):
            rows = batch.lanes[lane].rows if some is None else batch.lanes[lane].rows.lend(some)
            found.append(site.run(rows, delta[rows.fact], row, column))
        states = torch.cat(found)[turn.order]
        decay = (batch.unit[..., 0] * delta.norm(dim=-1) / batch.length.square()).sum(-1)
    said = read_states(
        site.stack,
        states,
        turn.parts,
        batch.essence_log_probs,
        batch.nll_factor,
        settings.kl_factor,
        gradient=not last,
        sure=settings.until_sure,
    )
    kl = settings.kl_factor * said.kl
    objective = batch.nll_factor * said.nll + kl + settings.weight_decay * decay.detach()
    gradient = None
    if said.gradient is not None:
        pulled = [said.gradient, torch.full_like(decay, settings.weight_decay)]
        gradient = torch.autograd.grad([states, decay], delta, pulled)[0]
    done, sure = objective < settings.stop_loss, torch.zeros_like(objective, dtype=torch.bool)
    if said.wrong is not None:
        sure = said.wrong == 0
        done = done | (sure & (kl <= _KL_LIMIT))
    return _Step(objective, gradient, done, sure, said.essence)


def _adam(batch: _Batch, step: _Step, number: int, settings: ValueSettings) -> _Batch:
    """One Adam step and the clamp."""
    assert step.gradient is not None
    first = _BETAS[0] * batch.first_moment + (1 - _BETAS[0]) * step.gradient
    second = _BETAS[1] * batch.second_moment + (1 - _BETAS[1]) * step.gradient.square()
    taken = (batch.begun + number + 1)[:, None, None].double()
    of_first, of_second = ((1 - beta**taken).float() for beta in _BETAS)
    scale = (second / of_second).sqrt() + _ADAM_EPSILON
    delta = batch.delta - settings.learning_rate * batch.unit * (first / of_first) / scale
    limit = settings.clamp * batch.length[..., None]
    delta = delta * (limit / delta.norm(dim=-1, keepdim=True).clamp(min=1e-12)).clamp(max=1.0)
    return replace(
        batch,
        delta=delta,
        first_moment=first,
        second_moment=second,
        nll_factor=settings.nll_factor * torch.where(step.sure, _FALLING_FACTOR, 1.0),
    )


def _shrunk(batch: _Batch, live: Sequence[bool], values: Values, some: int, *, pause: bool) -> _Batch:
    """The batch without its finished groups, or with so many of them that its size is a power of two."""
    left = sum(live)
    size = max(LEAST_FACTS, 1 << (left - 1).bit_length())
    if size >= len(live):
        return batch
    _keep(batch, values, pause=pause)
    finished = [group for group, going in enumerate(live) if not going]
    leaving = set(finished[size - left :])
    kept = torch.tensor([group not in leaving for group in range(len(live))], device=batch.live.device)
    keep = kept.nonzero()[:, 0]
    place = new_places(keep, len(kept))
    predicted = kept[batch.predictions.fact]
    predictions = batch.predictions.select(predicted, place)
    stays = torch.cat([predicted, kept])
    slots = new_places(stays.nonzero()[:, 0], len(stays))
    lanes = [lane for lane in (lane.select(kept, place, slots) for lane in batch.lanes) if lane is not None]
    assert batch.essence_log_probs is not None
    return _Batch(
        members=batch.members.select(kept, place),
        live=batch.live[keep],
        lanes=tuple(lanes),
        predictions=predictions,
        contexts=batch.contexts,
        turns=turns(lanes, predictions, batch.contexts, some),
        essence_log_probs=batch.essence_log_probs[keep],
        hidden=batch.hidden[keep],
        length=batch.length[keep],
        unit=batch.unit[keep],
        delta=batch.delta[keep],
        first_moment=batch.first_moment[keep],
        second_moment=batch.second_moment[keep],
        nll_factor=batch.nll_factor[keep],
        begun=batch.begun[keep],
        found=batch.found.select(keep),
    )
