"""The objective of one optimisation step, from the states that the head reads, and its gradient with respect to them.

Logits of some hundred predictions over a vocabulary are a hundred megabytes, and each of the dozen operations on them would go through
memory once: so they are computed a few predictions at a time, which stay in a processor's caches, and the gradient stops at the states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from patchhub.editing.rows import Lane, new_places
from patchhub.models.tracing import Stack

_CACHED = 12 << 20  # bytes of float32 logits that are computed at once on a CPU
_ROWS = 32  # the head is called with a multiple of so many


@dataclass(frozen=True, eq=False)
class Predictions:
    """The target tokens that are predicted, and what follows them: the token of each, and its share of its group's mean.

    ``closers`` is, for what follows a target, the row of ``masks`` whose tokens may, and -1 for a token of the target; ``after`` is where
    it is not -1.
    """

    token: Int[Tensor, " m"]
    share: Float[Tensor, " m"]
    fact: Int[Tensor, " m"]
    closers: Int[Tensor, " m"]
    after: Int[Tensor, " ends"]
    masks: Bool[Tensor, "kinds vocabulary"]

    @classmethod
    def of(
        cls,
        token: Int[Tensor, " m"],
        share: Float[Tensor, " m"],
        fact: Int[Tensor, " m"],
        closers: Int[Tensor, " m"],
        masks: Bool[Tensor, "kinds vocabulary"],
    ) -> Predictions:
        """With ``after``, for which a device is waited for."""
        return cls(token, share, fact, closers, (closers >= 0).nonzero()[:, 0], masks)

    def log_probs(self, logits: Float[Tensor, "m vocabulary"]) -> Float[Tensor, " m"]:
        """Of each target token; of what follows a target, the logarithm of the summed probabilities."""
        chosen = logits.gather(1, self.token[:, None])[:, 0]
        if len(self.after):
            closed = logits[self.after].masked_fill(~self.masks[self.closers[self.after]], -torch.inf).logsumexp(-1)
            chosen = chosen.index_copy(0, self.after, closed)
        return chosen - logits.logsumexp(-1)

    def wrong(self, logits: Float[Tensor, "m vocabulary"]) -> Bool[Tensor, " m"]:
        """Where the most probable token is another one."""
        best = logits.argmax(-1)
        ends = self.masks[self.closers[self.after], best[self.after]]
        return (best != self.token).index_copy(0, self.after, ~ends)

    def weighed(self, rows: Int[Tensor, " kept"], times: Float[Tensor, " m"]) -> Predictions:
        """Some of them, with so many times their shares."""
        shares = (self.share * times)[rows]
        return Predictions.of(self.token[rows], shares, self.fact[rows], self.closers[rows], self.masks)

    def select(self, kept: Bool[Tensor, " m"], fact: Int[Tensor, " facts"]) -> Predictions:
        """Some of them, with new numbers for facts."""
        rows = kept.nonzero()[:, 0]
        return Predictions.of(self.token[rows], self.share[rows], fact[self.fact[rows]], self.closers[rows], self.masks)

    def cut(self) -> tuple[Predictions, ...]:
        """In parts whose logits are computed at once: all of them on a GPU, few enough for the caches of a CPU."""
        count = len(self.token)
        size = count if self.token.device.type != "cpu" else at_once(self.masks.shape[1])
        if count <= size:
            return (self,)
        parts = [slice(start, start + size) for start in range(0, count, size)]
        return tuple(
            Predictions.of(self.token[p], self.share[p], self.fact[p], self.closers[p], self.masks) for p in parts
        )


def at_once(vocabulary: int) -> int:
    """How many predictions' logits are computed at once on a CPU."""
    return max(_ROWS, _CACHED // (4 * max(1, vocabulary)) // _ROWS * _ROWS)


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
    start = 0
    for part in parts:
        given = states[start : start + len(part.token)].detach().requires_grad_(gradient)
        start += len(part.token)
        with torch.set_grad_enabled(gradient):
            logits = stack.logits(given).float()
            losses = -part.log_probs(logits) * part.share
        if gradient:
            slopes += torch.autograd.grad((losses * factor[part.fact]).sum(), given)
        nll = nll.index_add(0, part.fact, losses.detach())
        if wrong is not None:
            wrong = wrong.index_add(0, part.fact, part.wrong(logits.detach()).float())
    given = states[start:].detach().requires_grad_(gradient)
    with torch.set_grad_enabled(gradient):
        essence = stack.logits(given).float().log_softmax(-1)
        kl = (essence.exp() * (essence - (essence.detach() if before is None else before))).sum(-1)
    if gradient:
        slopes += torch.autograd.grad(kl_factor * kl.sum(), given)
    return Read(nll, kl.detach(), wrong, essence.detach(), torch.cat(slopes) if gradient else None)
