"""Which active facts get in each other's way, and what each of them does not get: from the stored columns. NumPy only, no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from patchhub.constraints import Columns
from patchhub.delta import Delta
from patchhub.interference import KEY_COSINE, RESIDUAL_COSINE, key_cosines, misfit, residual_cosines
from patchhub.objects import Element
from patchhub.porcelain.columns import read_columns, read_state
from patchhub.porcelain.progress import Progress
from patchhub.store.repository import Repository

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
    repository: Repository, commit: str, elements: frozenset[Element], progress: Progress, *, shown: int
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
    rows = {weight: _rows(repository, elements, weight) for weight in columns}
    nearest: dict[tuple[str, str], Overlap] = {}
    misfits: dict[str, float] = {}
    progress.stage("comparing facts", len(columns))
    for weight, found in columns.items():
        _keep_worst(misfits, rows[weight], state.get(weight, ()), found)
        for left, right, key, residual in overlapping(found):
            ends = rows[weight][left], rows[weight][right]
            pair = (min(ends), max(ends))
            if pair not in nearest or abs(key) > abs(nearest[pair].key_cosine):
                nearest[pair] = Overlap(*pair, weight, round(key, 4), round(residual, 4))
        progress.advance(1)
    ordered = sorted(nearest.values(), key=lambda pair: (-abs(pair.key_cosine), pair.left, pair.right))
    return Crowding(tuple(ordered[:shown]), len(ordered), misfits)


def overlapping(columns: Columns) -> list[tuple[int, int, float, float]]:
    """(i, j, cosine of keys, cosine of residuals) of the rows i < j that interfere, as `interference.interfering` defines it."""
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


def _rows(repository: Repository, elements: frozenset[Element], weight: str) -> list[str]:
    """The request of each row of `read_columns` at a weight."""
    patches = {patch for patch, _ in elements}
    editing = {patch for patch in patches if weight in repository.patch(patch).weights}
    return [
        request
        for patch, request in sorted(elements, key=lambda element: (element[0], element[1] or ""))
        if patch in editing and request is not None
    ]


def _keep_worst(misfits: dict[str, float], rows: Sequence[str], deltas: Sequence[Delta], columns: Columns) -> None:
    for request, share in zip(rows, misfit(deltas, columns).tolist(), strict=True):
        misfits[request] = max(misfits.get(request, 0.0), share)
