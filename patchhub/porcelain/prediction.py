"""`merge --dry-run`: what a merge would bring, told from recorded columns without writing anything. NumPy only, no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from patchhub.constraints import Columns
from patchhub.delta import Delta
from patchhub.errors import RevisionError
from patchhub.interference import interfering, misfit
from patchhub.objects import Element, Request
from patchhub.porcelain.columns import read_columns, read_state, solve_change
from patchhub.porcelain.contradictions import Contradiction, Resolution, Side
from patchhub.porcelain.facts import active_requests, left_and_entered
from patchhub.porcelain.merge import UNDECIDED, plan
from patchhub.store.graph import is_ancestor
from patchhub.store.repository import Repository

LOSS = 0.1
"""A fact is reported where its misfit grows by more than this share of what it asked for, at any weight."""


@dataclass(frozen=True)
class Other:
    """The fact of the other side that is nearest to one, and the cosines of their keys and residuals."""

    text: str
    target: str
    key_cosine: float
    residual_cosine: float


@dataclass(frozen=True)
class Loss:
    """A fact that the other side's facts would weaken or that one of them interferes with.

    Attributes:
        side: whose fact it is.
        request, text, target: its id and words; the id alone where texts are withheld.
        weight: where its misfit ||D k - r|| / ||r|| grows most.
        before, after: that misfit on its own side, and merged; 0 is exactly what was asked, 1 nothing of it.
        other: the interfering fact with the nearest key, if there is one.
    """

    side: Side
    request: str
    text: str
    target: str
    weight: str
    before: float
    after: float
    other: Other | None

    @property
    def growth(self) -> float:
        return self.after - self.before


@dataclass(frozen=True)
class Prediction:
    """`merge --dry-run`: contradictions, and the facts that would lose, the largest loss first.

    Losses are those of the merge in which open contradictions are decided for ours.
    """

    from_ours: int
    from_theirs: int
    contradictions: tuple[Contradiction, ...]
    losses: tuple[Loss, ...]
    unchecked: int

    def to_json(self) -> dict[str, Any]:
        return {
            "outcome": "dry run",
            "from_ours": self.from_ours,
            "from_theirs": self.from_theirs,
            "contradictions": [found.to_json() for found in self.contradictions],
            "losses": [asdict(loss) for loss in self.losses],
            "unchecked": self.unchecked,
        }


def predict(
    repository: Repository, revision: str, *, resolution: Resolution = UNDECIDED, loss: float = LOSS
) -> Prediction:
    """What merging a revision into HEAD would bring.

    Raises:
        RevisionError: no such revision, or one side has no commit.
        RequestError: the resolution does not fit the contradictions.
        EditError: the sides' columns are of different metrics.
    """
    ours, theirs = repository.head[1], repository.resolve(revision)
    if ours is None or theirs is None:
        raise RevisionError("a side of this merge is the unpatched model", remedy="Name a commit; HEAD needs one too.")
    if is_ancestor(theirs, ours, repository.parents):
        return Prediction(0, 0, (), (), 0)
    first = plan(repository, ours, theirs, resolution)
    decided = plan(repository, ours, theirs, Resolution(resolution.choices, resolution.prefer or "ours"))
    left = _side(repository, "ours", ours, decided.merged - decided.theirs)
    right = _side(repository, "theirs", theirs, decided.merged - decided.ours)
    merged = _extended(left.state, solve_change(repository, decided.ours, decided.merged))
    pairs = _nearest(left, right)
    losses = [found for side in (left, right) for found in _losses(repository, side, merged, pairs, loss)]
    return Prediction(
        len(left_and_entered(repository, decided.theirs, decided.merged)[1]),
        len(left_and_entered(repository, decided.ours, decided.merged)[1]),
        first.open,
        tuple(sorted(losses, key=lambda found: (-found.growth, found.request))),
        first.unchecked,
    )


@dataclass(frozen=True)
class _Alone:
    """What one side brings alone, per weight: which element each row is of, and its columns; and that side's state."""

    side: Side
    rows: Mapping[str, Sequence[Element]]
    columns: Mapping[str, Columns]
    state: Mapping[str, Sequence[Delta]]


@dataclass(frozen=True)
class _Near:
    """The interfering element of the other side with the nearest key."""

    element: Element
    key_cosine: float
    residual_cosine: float


def _side(repository: Repository, side: Side, commit: str, elements: frozenset[Element]) -> _Alone:
    columns = read_columns(repository, elements)
    weights = {patch: repository.patch(patch).weights.keys() for patch in {patch for patch, _ in elements}}
    ordered = sorted(
        (patch, request) for patch, request in elements if request is not None
    )  # the order of read_columns
    rows = {weight: [element for element in ordered if weight in weights[element[0]]] for weight in columns}
    return _Alone(side, rows, columns, read_state(repository, commit))


def _extended(state: Mapping[str, Sequence[Delta]], change: Mapping[str, Delta]) -> dict[str, list[Delta]]:
    return {
        weight: [*state.get(weight, ()), *([change[weight]] if weight in change else [])]
        for weight in state.keys() | change.keys()
    }


def _nearest(left: _Alone, right: _Alone) -> dict[Element, _Near]:
    """For each element that one of the other side interferes with at some weight, the one with the nearest key there."""
    nearest: dict[Element, _Near] = {}
    for weight in sorted(left.columns.keys() & right.columns.keys()):
        for i, j, key, residual in interfering(left.columns[weight], right.columns[weight]):
            ends = left.rows[weight][i], right.rows[weight][j]
            for element, other in (ends, ends[::-1]):
                if element not in nearest or abs(key) > abs(nearest[element].key_cosine):
                    nearest[element] = _Near(other, key, residual)
    return nearest


def _losses(
    repository: Repository,
    side: _Alone,
    merged: Mapping[str, Sequence[Delta]],
    nearest: Mapping[Element, _Near],
    limit: float,
) -> list[Loss]:
    """A report for each fact of a side that loses more than ``limit`` at a weight, or that is interfered with."""
    worst: dict[Element, tuple[float, str, float, float]] = {}
    for weight, columns in side.columns.items():
        before, after = misfit(side.state.get(weight, ()), columns), misfit(merged.get(weight, ()), columns)
        for element, then, now in zip(side.rows[weight], before.tolist(), after.tolist(), strict=True):
            worst[element] = max(worst.get(element, (-np.inf, "", 0.0, 0.0)), (now - then, weight, then, now))
    listed = {element: found for element, found in worst.items() if found[0] > limit or element in nearest}
    others = {nearest[element].element for element in listed if element in nearest}
    texts = active_requests(repository, listed.keys() | others)
    return [
        Loss(
            side.side,
            str(element[1]),
            *_words(texts, element),
            weight,
            before,
            after,
            _other(texts, nearest.get(element)),
        )
        for element, (_, weight, before, after) in listed.items()
    ]


def _other(texts: Mapping[Element, Request], near: _Near | None) -> Other | None:
    return None if near is None else Other(*_words(texts, near.element), near.key_cosine, near.residual_cosine)


def _words(texts: Mapping[Element, Request], element: Element) -> tuple[str, str]:
    """A fact's text and target; its id where the texts are withheld."""
    request = texts.get(element)
    return (f"request {str(element[1])[:12]}", "(withheld)") if request is None else (request.text, request.target_new)
