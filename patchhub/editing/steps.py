"""The steps of an optimisation: how many facts fit into one, and what one computes, from the states that the head reads.

The memory of a step is what autograd keeps: per position and block the inputs of its products and activations, per predicted token the
logits, and per row the frozen keys and values. `Footprint` counts these from the model's sizes; it need not be exact, since a batch that
does not fit all the same is halved and run again.

Logits of some hundred predictions over a vocabulary are a hundred megabytes, and each of the dozen operations on them would go through
memory once: so they are computed a few predictions at a time, which stay in a processor's caches, and the gradient stops at the states."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import accumulate, groupby, takewhile
from math import gcd
from typing import Final, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import huber_loss

from patchhub.editing.rows import Fact, Lane, Site, new_places
from patchhub.errors import EditError
from patchhub.models import placement
from patchhub.models.tracing import Stack

POSITIONS: Final = 1536
"""Positions that one step computes on a CPU: enough for its products to run at full speed, few enough for its caches."""

LEAST_FACTS: Final = 8
"""Facts that a batch shrinks to; a multiple of as many begin in one."""

_SHARE = 0.5  # of the memory that is free, where nothing else is said
_SAFE = 0.7  # of what is left: pieces that were freed are not all used again
_KERNELS = 150 << 20  # what the library of the products keeps for their shapes, on a CPU; at most half of what is left
_WIDE, _INNER = 12, 5  # vectors of width d and of the feed-forward part's width that a block keeps per position
_LEAST_READ = 64  # positions
_ON_A_GPU = 8  # times the positions of a batch that is read: with fewer its time is in starting kernels
_LOGITS = 4  # copies of a prediction's logits: themselves, in float32, their softmax, their gradient
_MESSAGES = ("not enough memory", "can't allocate memory", "out of memory")

Item = TypeVar("Item")


@dataclass(frozen=True)
class Footprint:
    """Bytes of one optimisation step.

    Attributes:
        position: per position that a step computes.
        prediction: per predicted token.
        prefix: per position of a frozen prefix.
    """

    position: int
    prediction: int
    prefix: int

    @classmethod
    def of(cls, stack: Stack, first: int) -> Footprint:
        """Of steps that run the blocks from ``first`` on."""
        config, architecture = stack.model.config.get_text_config(), stack.architecture
        size = next(stack.blocks[-1].parameters()).element_size()
        inner = max(projection.passed for projection in architecture.feed_forward)
        blocks = len(stack.blocks)
        kept = max(1, blocks - first) * (_WIDE * architecture.d_model + _INNER * inner)
        return cls(
            position=kept * max(size, 2),
            prediction=_LOGITS * 4 * config.vocab_size,
            prefix=blocks * 2 * architecture.d_model * size,
        )


def free_memory(device: torch.device) -> int:
    """Bytes that could be taken now: of the GPU, or of the machine; see `host_memory`."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return placement.free_memory()


def resident_memory() -> int:
    """Bytes that this process holds now; 0 where that is not known."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def release_memory() -> None:
    """Give freed memory back to the system, where the C library can: it keeps what was freed between pieces still in use."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def step_budget(device: torch.device, memory: int | None) -> int:
    """Bytes that a step may take.

    Args:
        memory: what the process may hold in all, its model included; on a GPU, what may be allocated there. None: half of what is free.
    """
    if memory is None:
        return int(_SHARE * free_memory(device))
    release_memory()
    if device.type == "cuda":
        return max(0, int(_SAFE * (memory - torch.cuda.memory_allocated(device))))
    left = memory - resident_memory()
    return max(0, int(_SAFE * (left - min(_KERNELS, left // 2))))


def reading_positions(stack: Stack, memory: int | None, most: int) -> int:
    """How many padded positions a forward pass without gradients may read, if at most so many on a CPU and eight times as many on a GPU.

    Each takes the keys and values of all blocks, twice while they grow, one block's states, and its logits.

    Args:
        memory: as for `step_budget`; None: ``most``.
    """
    if stack.device.type != "cpu":
        most *= _ON_A_GPU
    if memory is None:
        return most
    config, architecture = stack.model.config.get_text_config(), stack.architecture
    size = max(next(stack.blocks[-1].parameters()).element_size(), 2)
    inner = max(width for _, width in architecture.shapes)
    states = (4 * len(stack.blocks) + _WIDE) * architecture.d_model + _INNER * inner
    position: int = (
        states * size + (_LOGITS + 2) * 4 * config.vocab_size
    )  # the base's logits are there beside a state's
    return min(most, max(_LEAST_READ, step_budget(stack.device, memory) // position))


def planned(
    stack: Stack, first: int, facts: Sequence[Fact], waiting: Sequence[tuple[int, ...]], budget: int
) -> list[list[tuple[int, ...]]]:
    """Groups of facts in batches: single facts and groups apart, those whose first rows are about equally long together.

    Args:
        first: the first block that runs at each step.
        budget: bytes that a step of a batch takes at most.
    """
    footprint = Footprint.of(stack, first)
    most = POSITIONS if stack.device.type == "cpu" else budget // footprint.position

    def several(group: tuple[int, ...]) -> bool:
        return len(group) > 1

    def length(group: tuple[int, ...]) -> tuple[int, int]:
        bare = facts[group[0]]
        return bare.suffix(bare.rows[0]), bare.rows[-1].subject_last

    batches: list[list[tuple[int, ...]]] = []
    for _, alike in groupby(sorted(waiting, key=lambda group: (several(group), *length(group))), key=several):
        rest = list(alike)
        while rest:
            sizes = accumulate(sum(_bytes(facts[place], footprint) for place in group) for group in rest)
            positions = accumulate(sum(positions_of(facts[place]) for place in group) for group in rest)
            fit = takewhile(lambda both: both[0] <= budget and both[1] <= most, zip(sizes, positions, strict=True))
            count = max(1, sum(1 for _ in fit))
            if LEAST_FACTS < count < len(rest):
                count -= count % LEAST_FACTS
            batches.append(rest[:count])
            rest = rest[count:]
    return batches


def positions_of(fact: Fact) -> int:
    """Positions of a fact that a step computes: from its subjects' last tokens on, and the essence's."""
    return 1 + sum(row.kept for row in fact.opened)


def _bytes(fact: Fact, footprint: Footprint) -> int:
    """What one fact adds to a step."""
    ends = fact.closers is not None
    predictions = 1 + sum(row.opening + row.target[1] - row.target[0] + ends + (row.after > 0) for row in fact.rows)
    predictions += fact.sentence.target[1] - fact.sentence.target[0] if fact.sentence else 0
    return (
        footprint.position * positions_of(fact)
        + footprint.prediction * predictions
        + footprint.prefix * sum(text.subject_last for text in fact.texts)
    )


def in_halves(
    groups: Sequence[Sequence[Item]], run: Callable[[Sequence[Item]], None], *, remedy: str
) -> Iterator[Sequence[Item]]:
    """Run every group; one that does not fit in memory is halved and run again. Yields each group that was finished.

    Raises:
        EditError: a single item does not fit.
    """
    waiting = [list(group) for group in reversed(groups)]
    while waiting:
        group = waiting.pop()
        if _fits(run, group):
            yield group
        elif len(group) == 1:
            raise EditError("there is not enough memory to optimise a single fact", remedy=remedy)
        else:
            middle = len(group) // 2
            waiting += [group[middle:], group[:middle]]


def _fits(run: Callable[[Sequence[Item]], None], group: Sequence[Item]) -> bool:
    try:
        run(group)
    except (MemoryError, torch.OutOfMemoryError):
        pass
    except RuntimeError as error:
        if not any(message in str(error).lower() for message in _MESSAGES):
            raise
    else:
        return True
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return False


_CACHED = 12 << 20  # bytes of float32 logits that are computed at once on a CPU
_HEAD_ROWS = 32  # the head is called with a multiple of so many


STAYS: Final = -2
"""In place of closers: a word of the base's own, which is to stay as likely as it is."""


@dataclass(frozen=True, eq=False)
class Predictions:
    """The tokens that are predicted, of targets, behind these and of the base's own: each with its share of its group's mean.

    ``closers`` is, for what follows a target, the row of ``masks`` whose tokens may, -1 for a token of the target and `STAYS` for one of
    the base's own; ``after`` and ``own`` are where it is a row, and where it is `STAYS`. ``floor`` is what the base gives to its own.
    """

    token: Int[Tensor, " m"]
    share: Float[Tensor, " m"]
    fact: Int[Tensor, " m"]
    closers: Int[Tensor, " m"]
    after: Int[Tensor, " ends"]
    own: Int[Tensor, " own"]
    floor: Float[Tensor, " m"]
    masks: Bool[Tensor, "kinds vocabulary"]

    @classmethod
    def of(
        cls,
        token: Int[Tensor, " m"],
        share: Float[Tensor, " m"],
        fact: Int[Tensor, " m"],
        closers: Int[Tensor, " m"],
        masks: Bool[Tensor, "kinds vocabulary"],
        floor: Float[Tensor, " m"] | None = None,
    ) -> Predictions:
        """With ``after`` and ``own``, for which a device is waited for."""
        after, own = (found.nonzero()[:, 0] for found in (closers >= 0, closers == STAYS))
        return cls(token, share, fact, closers, after, own, torch.zeros_like(share) if floor is None else floor, masks)

    def log_probs(self, logits: Float[Tensor, "m vocabulary"]) -> Float[Tensor, " m"]:
        """Of each target token; of what follows a target, the logarithm of the summed probabilities."""
        chosen = logits.gather(1, self.token[:, None])[:, 0]
        if len(self.after):
            closed = logits[self.after].masked_fill(~self.masks[self.closers[self.after]], -torch.inf).logsumexp(-1)
            chosen = chosen.index_copy(0, self.after, closed)
        return chosen - logits.logsumexp(-1)

    def losses(self, logits: Float[Tensor, "m vocabulary"]) -> Float[Tensor, " m"]:
        """Of each its negative log likelihood, times its share; of the base's own what it has lost, as Huber's loss takes it.

        That has no slope where nothing is lost: else rounding would decide whether a word pulls at the first step.
        """
        lost = -self.log_probs(logits)
        if len(self.own):
            own = (lost[self.own] + self.floor[self.own]).clamp(min=0)
            lost = lost.index_copy(0, self.own, huber_loss(own, torch.zeros_like(own), reduction="none"))
        return lost * self.share

    def wrong(self, logits: Float[Tensor, "m vocabulary"]) -> Bool[Tensor, " m"]:
        """Where the most probable token is not what a target asks for."""
        best = logits.argmax(-1)
        ends = self.masks[self.closers[self.after], best[self.after]]
        return (best != self.token).index_copy(0, self.after, ~ends) & (self.closers != STAYS)

    def weighed(self, rows: Int[Tensor, " kept"], times: Float[Tensor, " m"]) -> Predictions:
        """Some of them, with so many times their shares."""
        shares = (self.share * times)[rows]
        return Predictions.of(
            self.token[rows], shares, self.fact[rows], self.closers[rows], self.masks, self.floor[rows]
        )

    def select(self, kept: Bool[Tensor, " m"], fact: Int[Tensor, " facts"]) -> Predictions:
        """Some of them, with new numbers for facts."""
        rows = kept.nonzero()[:, 0]
        shares, of_fact = self.share[rows], fact[self.fact[rows]]
        return Predictions.of(self.token[rows], shares, of_fact, self.closers[rows], self.masks, self.floor[rows])

    def cut(self) -> tuple[Predictions, ...]:
        """In parts whose logits are computed at once: all of them on a GPU, few enough for the caches of a CPU."""
        count = len(self.token)
        size = count if self.token.device.type != "cpu" else at_once(self.masks.shape[1])
        if count <= size:
            return (self,)
        parts = [slice(start, start + size) for start in range(0, count, size)]
        return tuple(
            Predictions.of(self.token[p], self.share[p], self.fact[p], self.closers[p], self.masks, self.floor[p])
            for p in parts
        )


def at_once(vocabulary: int) -> int:
    """How many predictions' logits are computed at once on a CPU."""
    return max(_HEAD_ROWS, _CACHED // (4 * max(1, vocabulary)) // _HEAD_ROWS * _HEAD_ROWS)


@torch.no_grad()
def unchanged(
    site: Site, lanes: Sequence[Lane], slots: Int[Tensor, " read"], delta: Float[Tensor, "groups parts d"]
) -> Float[Tensor, "read d"]:
    """The states of some slots, in their order, before anything changed; ``delta`` is any change of the groups."""
    states, found = list[Tensor](), list[Tensor]()
    for lane in lanes:
        read = torch.isin(lane.slot, slots).nonzero()[:, 0]
        if len(read):
            needed, row = torch.unique(lane.row[read], return_inverse=True)
            rows = lane.rows.lend(needed)
            states.append(site.run(rows, torch.zeros_like(delta)[rows.fact], row, lane.column[read]))
            found.append(lane.slot[read])
    return torch.cat(states)[torch.cat(found).argsort()]


@torch.no_grad()
def with_floors(
    site: Site, lanes: Sequence[Lane], predictions: Predictions, delta: Float[Tensor, "groups parts d"]
) -> Predictions:
    """The predictions with what the model gives to its own words."""
    slots, floor = predictions.own, torch.zeros_like(predictions.share)
    states, size = unchanged(site, lanes, slots, delta), at_once(site.stack.vocabulary)
    for start in range(0, len(slots), size):
        some = slots[start : start + size]
        log_probs = site.stack.logits(states[start : start + size]).float().log_softmax(-1)
        floor[some] = log_probs.gather(1, predictions.token[some, None])[:, 0]
    return replace(predictions, floor=floor)


@dataclass(frozen=True, eq=False)
class Turn:
    """What one step reads of a batch.

    Attributes:
        lanes: the lanes that it runs, and which rows of each; None: all of them.
        states: of each of these lanes, row and column of the states that are read.
        order: of the states of all lanes, one lane after the other, by their slots.
        parts: the predictions from them, those together whose logits are computed at once.
    """

    lanes: tuple[tuple[int, Int[Tensor, " rows"] | None], ...]
    states: tuple[tuple[Int[Tensor, " read"], Int[Tensor, " read"]], ...]
    order: Int[Tensor, " slots"]
    parts: tuple[Predictions, ...]


def turns(lanes: Sequence[Lane], predictions: Predictions, contexts: int, some: int) -> tuple[Turn, ...]:
    """What the steps of a batch read, in turn.

    Args:
        contexts: how many of each fact's texts are contexts, the bare prompt included, which comes first.
        some: how many of the contexts beside the bare prompt are read in a step, with the weight of all; 0: all.
    """
    others = contexts - 1
    if not 0 < some < others:
        order = torch.cat([lane.slot for lane in lanes]).argsort()
        whole = tuple((number, None) for number in range(len(lanes)))
        return (Turn(whole, tuple((lane.row, lane.column) for lane in lanes), order, predictions.cut()),)
    of_slot = torch.zeros_like(torch.cat([lane.slot for lane in lanes]))
    for lane in lanes:
        of_slot[lane.slot] = lane.context[lane.row]
    of_prediction = of_slot[: len(predictions.token)]
    times = torch.where((of_prediction > 0) & (of_prediction < contexts), others / some, 1.0)
    found = []
    for turn in range(others // gcd(others, some)):
        chosen = torch.tensor([1 + (turn * some + place) % others for place in range(some)], device=of_slot.device)
        found.append(_turn(lanes, predictions, times, contexts, chosen))
    return tuple(found)


def _turn(
    lanes: Sequence[Lane],
    predictions: Predictions,
    times: Float[Tensor, " m"],
    contexts: int,
    chosen: Int[Tensor, " some"],
) -> Turn:
    runs, states, slots = list[tuple[int, Tensor]](), list[tuple[Tensor, Tensor]](), list[Tensor]()
    for number, lane in enumerate(lanes):
        kept = (lane.context == 0) | (lane.context >= contexts) | torch.isin(lane.context, chosen)
        rows, read = kept.nonzero()[:, 0], kept[lane.row].nonzero()[:, 0]
        if len(rows):
            runs.append((number, rows))
            states.append((new_places(rows, len(kept))[lane.row[read]], lane.column[read]))
            slots.append(lane.slot[read])
    slot = torch.cat(slots)
    predicted = slot.sort().values
    predicted = predicted[(predicted < len(predictions.token)).nonzero()[:, 0]]
    return Turn(tuple(runs), tuple(states), slot.argsort(), predictions.weighed(predicted, times).cut())


@dataclass(frozen=True, eq=False)
class Read:
    """What the states that the head reads say.

    Attributes:
        nll: of each group, the mean of its targets' negative log likelihood.
        kl: of each group, how far its essence's predictions have moved.
        wrong: of each group, how many predictions have another token as the most probable one; None where nobody asks.
        essence: the essences' log-probabilities.
        gradient: of the sum of ``factor`` nll + ``kl_factor`` kl with respect to the states; None where nobody asks.
    """

    nll: Float[Tensor, " groups"]
    kl: Float[Tensor, " groups"]
    wrong: Float[Tensor, " groups"] | None
    essence: Float[Tensor, "groups vocabulary"]
    gradient: Float[Tensor, "slots d"] | None


def read_states(
    stack: Stack,
    states: Float[Tensor, "slots d"],
    parts: Sequence[Predictions],
    before: Float[Tensor, "groups vocabulary"] | None,
    factor: Float[Tensor, " groups"],
    kl_factor: float,
    *,
    gradient: bool,
    sure: bool,
) -> Read:
    """The objective's terms that depend on predictions.

    Args:
        states: after the last block, first those of the predictions, then one essence for each group.
        before: the essences' log-probabilities before anything changed; None: they are the present ones.
        factor: what the likelihood of each group weighs.
        gradient, sure: whether the gradient, and how many predictions are wrong, are asked for.
    """
    nll, slopes = torch.zeros_like(factor), list[Tensor]()
    wrong = torch.zeros_like(factor) if sure else None
    essence, kl = torch.zeros(0, device=states.device), torch.zeros_like(factor)
    start, pieces = 0, _pieces(parts, len(factor), states.device)
    for part, essences in pieces:
        count = len(part.token) if part else 0
        given = states[start : start + count + essences].detach().requires_grad_(gradient)
        start += count + essences
        pulled = torch.zeros((), device=states.device)
        with torch.set_grad_enabled(gradient):
            logits = stack.logits(given).float()
            if part:
                losses = part.losses(logits[:count])
                pulled = (losses * factor[part.fact]).sum()
                nll = nll.index_add(0, part.fact, losses.detach())
            if essences:
                now = logits[count:].log_softmax(-1)
                essence = now.detach()
                moved = (now.exp() * (now - (essence if before is None else before))).sum(-1)
                pulled, kl = pulled + kl_factor * moved.sum(), moved.detach()
        if gradient:
            slopes += torch.autograd.grad(pulled, given)
        if wrong is not None and part:
            wrong = wrong.index_add(0, part.fact, part.wrong(logits[:count].detach()).float())
    return Read(nll, kl, wrong, essence, torch.cat(slopes) if gradient else None)


def _pieces(
    parts: Sequence[Predictions], groups: int, device: torch.device
) -> Iterator[tuple[Predictions | None, int]]:
    """What the head is called with: a part of the predictions, and how many essences; those go with the last part where there is room."""
    yield from ((part, 0) for part in parts[:-1])
    last = parts[-1]
    if device.type != "cpu" or len(last.token) + groups <= at_once(last.masks.shape[1]):
        yield last, groups
    else:
        yield last, 0
        yield None, groups
