"""Which facts get in each other's way: a new batch with what is active, and active facts among themselves. NumPy only.

The rivals of a batch are told from its keys before any value is optimised; those of active facts from the stored columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from jaxtyping import Float

from patchhub.constraints import (
    KEY_COSINE,
    RESIDUAL_COSINE,
    Columns,
    expected_misfit,
    join,
    key_cosines,
    misfit,
    near_keys,
    residual_cosines,
)
from patchhub.delta import Delta
from patchhub.errors import InterferenceError
from patchhub.objects import Element, Request
from patchhub.progress import Progress
from patchhub.results import Result
from patchhub.sets.columns import read_columns, read_state
from patchhub.sets.elements import active_requests
from patchhub.store.store import Store

_RIVALS: Final = 32
"""How many of a fact's rivals its expected loss is computed with, those with the nearest keys."""
_NAMED: Final = 3
_SCREEN: Final = 0.8  # share of the limit above which keys of bare prompts are looked into


@dataclass(frozen=True)
class Rival(Result):
    """A fact that another one is expected to weaken.

    Attributes:
        request, text, target: its id and words; the id alone where texts are withheld.
        active: whether it is active already, not in the batch.
        other, other_target: the fact with the nearest key among those that it competes with.
        key_cosine: of the two keys in the metric, between -1 and 1.
        before, after: the share of its change that it misses alone, and beside its rivals; see `constraints.expected_misfit`.
    """

    request: str
    text: str
    target: str
    active: bool
    other: str
    other_target: str
    key_cosine: float
    before: float
    after: float

    def __str__(self) -> str:
        return (
            f"'{self.text} {self.target}' is expected to miss {self.after:.0%} of its change, {self.before:.0%} alone: "
            f"its key is that of '{self.other} {self.other_target}' to {abs(self.key_cosine):.2f}"
        )


def suspects(keys: Float[np.ndarray, "n in"], preimages: Float[np.ndarray, "n in"], active: Columns) -> list[int]:
    """The facts of a batch that may compete with one of the batch or of the active set, told from keys of the bare prompts alone.

    Those keys cost a tenth of the mean keys that are recorded and are nearly along them, so pairs are looked for below the limit.
    """
    batch = _without_residuals(keys, preimages, 1.0, active)
    near = near_keys(batch, join([batch, active]), limit=_SCREEN * KEY_COSINE)
    pairs = [pair for pair in near if pair.left != pair.right]
    return sorted({row for pair in pairs for row in (pair.left, pair.right) if row < len(batch)})


def competition(
    repository: Store,
    requests: Sequence[Request],
    keys: Float[np.ndarray, "n in"],
    preimages: Float[np.ndarray, "n in"],
    ridge: float,
    active: Columns,
) -> tuple[Rival, ...]:
    """The facts of a batch and of the active set that compete with one of the batch for a key, the largest expected loss first.

    Args:
        keys, preimages, ridge: of the batch's requests at the lowest edited weight.
        active: the columns of the set that the batch is written on, at that weight.
    """
    batch = _without_residuals(keys, preimages, ridge, active)
    together = join([batch, active])
    near = [pair for pair in near_keys(batch, together) if pair.left < pair.right]
    if not near:
        return ()
    names = [(request.id, request.text, request.target_new) for request in requests]
    names += _names(repository, active.labels)
    rivals: dict[int, dict[int, float]] = {}
    subjects = [request.subject for request in requests]
    for left, right, cosine in near:
        # Facts of one subject in a batch are written with one value: they share their key, and do not compete for it.
        shared = right < len(requests) and subjects[left] == subjects[right]
        if names[left][2] != names[right][2] and not shared:
            rivals.setdefault(left, {})[right] = cosine
            rivals.setdefault(right, {})[left] = cosine
    found = [_rival(row, others, together, names, len(requests)) for row, others in rivals.items()]
    return tuple(sorted(found, key=lambda rival: (rival.before - rival.after, rival.request)))


def refuse(rivals: Sequence[Rival]) -> InterferenceError:
    """The error that names the facts that would lose most."""
    listed = "; ".join(map(str, rivals[:_NAMED]))
    more = f"; and {len(rivals) - _NAMED} more" if len(rivals) > _NAMED else ""
    count = "1 fact competes" if len(rivals) == 1 else f"{len(rivals)} facts compete"
    return InterferenceError(
        f"{count} for a key: {listed}{more}",
        remedy="Leave one of them out, or commit without --strict.",
        facts=[rival.to_json() for rival in rivals],
    )


def warnings(rivals: Sequence[Rival]) -> list[str]:
    """A sentence for each of the facts that would lose most, and one for the others."""
    said = [str(rival) for rival in rivals[:_NAMED]]
    more = len(rivals) - _NAMED
    return [*said, f"{more} more compete for a key like this (--json lists them)"] if more > 0 else said


def _without_residuals(
    keys: Float[np.ndarray, "n in"], preimages: Float[np.ndarray, "n in"], ridge: float, active: Columns
) -> Columns:
    """Columns of a batch whose residuals are not known yet."""
    count = len(keys)
    nowhere = np.zeros((count, active.shape[0]), np.float32)
    return Columns(
        keys, preimages, nowhere, np.full(count, ridge, np.float32), (None,) * count
    )  # joined to labelled ones


def _rival(
    row: int, others: Mapping[int, float], together: Columns, names: Sequence[tuple[str, str, str]], new: int
) -> Rival:
    nearest = sorted(others, key=lambda other: -abs(others[other]))[:_RIVALS]
    group = [row, *nearest]
    unknown = [place for place, member in enumerate(group) if member < new]
    alone = expected_misfit(together.take([row]), 0, [0] if row < new else [])
    beside = expected_misfit(together.take(group), 0, unknown)
    _, other, other_target = names[nearest[0]]
    request, text, target = names[row]
    return Rival(request, text, target, row >= new, other, other_target, others[nearest[0]], alone, beside)


def _names(repository: Store, labels: Sequence[Element]) -> list[tuple[str, str, str]]:
    """Id, text and target of each labelled column; a name of its own where texts are withheld."""
    texts = active_requests(repository, labels)
    return [
        (str(label[1]), texts[label].text, texts[label].target_new)
        if label in texts
        else (str(label[1]), f"request {str(label[1])[:12]}", "(withheld)")
        for label in labels
    ]


_BLOCK: Final = 512  # rows of a cosine matrix that are held at a time


@dataclass(frozen=True)
class Overlap:
    """Two facts with near keys and different residuals, at the weight where their keys are nearest."""

    left: str
    right: str
    weight: str
    key_cosine: float
    residual_cosine: float


@dataclass(frozen=True)
class Crowding:
    """How the compared facts share the weights.

    Attributes:
        overlaps: the pairs with the nearest keys first, cut to the number that was asked for.
        pairs: how many pairs overlap at some weight, before the cut.
        misfits: per request id the largest ||D k - r|| / ||r|| over the weights.
    """

    overlaps: tuple[Overlap, ...]
    pairs: int
    misfits: Mapping[str, float]


NOTHING: Final = Crowding((), 0, {})


def crowding(
    repository: Store, commit: str, elements: frozenset[Element], progress: Progress, *, shown: int
) -> Crowding:
    """Compare some active facts of a commit with one another, and each with what the commit's state gives it.

    The work grows with the square of their number times the widths of the weights.

    Args:
        elements: facts of closed-form patches that are active at the commit.
        shown: at most so many overlaps.

    Raises:
        CorruptStoreError: a patch's tensors are not what its manifest says.
    """
    whole = {(patch, request) for patch, request in repository.active(commit) if request is None}
    additive = {element for element in whole if repository.patch(element[0]).kind == "additive"}
    columns = read_columns(repository, elements | additive)
    state = read_state(repository, commit)
    nearest: dict[tuple[str, str], Overlap] = {}
    misfits: dict[str, float] = {}
    progress.stage("comparing facts", len(columns))
    for weight, found in columns.items():
        requests = [str(request) for _, request in found.labels]
        _keep_worst(misfits, requests, state.get(weight, ()), found)
        for left, right, key, residual in overlapping(found):
            ends = requests[left], requests[right]
            pair = (min(ends), max(ends))
            if pair not in nearest or abs(key) > abs(nearest[pair].key_cosine):
                nearest[pair] = Overlap(*pair, weight, round(key, 4), round(residual, 4))
        progress.advance(1)
    ordered = sorted(nearest.values(), key=lambda pair: (-abs(pair.key_cosine), pair.left, pair.right))
    return Crowding(tuple(ordered[:shown]), len(ordered), misfits)


def overlapping(columns: Columns) -> list[tuple[int, int, float, float]]:
    """(i, j, cosine of keys, cosine of residuals) of the rows i < j that interfere, as `constraints.interfering` defines it."""
    found: list[tuple[int, int, float, float]] = []
    for start in range(0, len(columns), _BLOCK):
        stop = min(start + _BLOCK, len(columns))
        part, rest = columns.take(range(start, stop)), columns.take(range(start, len(columns)))
        keys, residuals = key_cosines(part, rest), residual_cosines(part, rest)
        hit = np.triu((np.abs(keys) > KEY_COSINE) & (np.sign(keys) * residuals < RESIDUAL_COSINE), 1)
        found += [
            (start + i, start + j, float(keys[i, j]), float(residuals[i, j])) for i, j in np.argwhere(hit).tolist()
        ]
    return found


def _keep_worst(misfits: dict[str, float], rows: Sequence[str], deltas: Sequence[Delta], columns: Columns) -> None:
    for request, share in zip(rows, misfit(deltas, columns).tolist(), strict=True):
        misfits[request] = max(misfits.get(request, 0.0), share)
