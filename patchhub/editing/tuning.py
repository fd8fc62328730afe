"""Which settings to try for a base, and how to find the best of many on few facts. Pure: scoring is the caller's."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final, Generic, TypeVar

from patchhub.editing.settings import EditSettings

Candidate = TypeVar("Candidate")

STEP_SIZES: Final = (0.5, 1.0, 2.0)
"""Multiples of the learning rate that are tried."""
RIDGES: Final = (0.25, 1.0, 4.0)
"""Multiples of lambda that are tried."""


@dataclass(frozen=True)
class Standing(Generic[Candidate]):
    """A candidate, the most facts that it was scored on, and its score there."""

    candidate: Candidate
    facts: int
    score: float


def candidates(present: EditSettings, depth: int) -> list[EditSettings]:
    """The present settings first, then every band of layers with every multiple of step size and lambda."""
    found = [
        replace(present, layers=band, learning_rate=step * present.learning_rate, ridge=ridge * present.ridge)
        for band in bands(present.layers, depth)
        for step in STEP_SIZES
        for ridge in RIDGES
    ]
    return [present, *(settings for settings in found if settings != present)]


def bands(present: Sequence[int], depth: int) -> list[tuple[int, ...]]:
    """Bands of layers to try: the present one, moved by about an eighth of the depth, and narrower and wider ones.

    All leave at least one block above them; none is listed twice.
    """
    first, last = present[0], present[-1]
    step, width = max(1, round(depth / 8)), last - first + 1
    ends = [
        (first, last),
        *((first + shift, last + shift) for shift in (-step, step, 2 * step)),
        (last - width // 2, last),
        (last, last),
        (first, last + step),
    ]
    highest = max(depth - 2, 0)
    inside = {(max(a, 0), min(b, highest)): None for a, b in ends if b >= 0 and a <= highest}
    return [tuple(present), *(band for a, b in inside if (band := tuple(range(a, b + 1))) != tuple(present))]


def sizes(facts: int) -> tuple[int, ...]:
    """How many facts each round scores on: a quarter, half, and all of them, but never fewer than four where there are four."""
    return tuple(sorted({min(facts, max(4, math.ceil(facts / part))) for part in (4, 2, 1)}))


def successive_halving(
    tried: Sequence[Candidate],
    score: Callable[[Candidate, int], float],
    rounds: Sequence[int],
    *,
    kept: float = 0.25,
    least: int = 3,
) -> list[Standing[Candidate]]:
    """Score all candidates on few facts and the better ones on more (Jamieson and Talwalkar, 2016); the best first.

    The first candidate goes through every round whatever it scores, so that the winner is compared with it on all facts. Ties go to the
    earlier candidate.

    Args:
        score: of a candidate on the first so many facts.
        rounds: how many facts each round scores on, ascending.
        kept: share of the candidates that a round passes on.
        least: but so many at least.
    """
    standing: dict[int, Standing[Candidate]] = {}
    going = list(range(len(tried)))
    for number, facts in enumerate(rounds):
        for index in going:
            standing[index] = Standing(tried[index], facts, score(tried[index], facts))
        if number < len(rounds) - 1:
            best = sorted(going, key=lambda index: (-standing[index].score, index))
            going = sorted({0, *best[: max(least, math.ceil(kept * len(going)))]})
    order = sorted(standing, key=lambda index: (-standing[index].facts, -standing[index].score, index))
    return [standing[index] for index in order]
