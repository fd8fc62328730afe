"""What a batch of facts competes with, told from keys before any value is optimised.

Facts of different targets whose keys are nearly alike ask one weight for two outputs at one input, and the joint solution gives
each only a part. The keys are those of the lowest edited layer, where they are what recording will store; one truncated forward pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
from jaxtyping import Float

from patchhub.constraints import Columns, join
from patchhub.errors import InterferenceError
from patchhub.interference import KEY_COSINE, expected_misfit, near_keys
from patchhub.objects import Element, Request
from patchhub.porcelain.facts import active_requests
from patchhub.store.repository import Repository

_RIVALS: Final = 32
"""How many of a fact's rivals its expected loss is computed with, those with the nearest keys."""
_NAMED: Final = 3
_SCREEN: Final = 0.8  # share of the limit above which keys of bare prompts are looked into


@dataclass(frozen=True)
class Rival:
    """A fact that another one is expected to weaken.

    Attributes:
        request, text, target: its id and words; the id alone where texts are withheld.
        active: whether it is active already, not in the batch.
        other, other_target: the fact with the nearest key among those that it competes with.
        key_cosine: of the two keys in the metric, between -1 and 1.
        before, after: the share of its change that it misses alone, and beside its rivals; see `interference.expected_misfit`.
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

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def suspects(keys: Float[np.ndarray, "n in"], preimages: Float[np.ndarray, "n in"], active: Columns) -> list[int]:
    """The facts of a batch that may compete with one of the batch or of the active set, told from keys of the bare prompts alone.

    Those keys cost a tenth of the mean keys that are recorded and are nearly along them, so pairs are looked for below the limit.
    """
    batch = _without_residuals(keys, preimages, 1.0, active)
    near = near_keys(batch, join([batch, active]), limit=_SCREEN * KEY_COSINE)
    pairs = [pair for pair in near if pair.left != pair.right]
    return sorted({row for pair in pairs for row in (pair.left, pair.right) if row < len(batch)})


def competition(
    repository: Repository,
    weight: str,
    requests: Sequence[Request],
    keys: Float[np.ndarray, "n in"],
    preimages: Float[np.ndarray, "n in"],
    ridge: float,
    kept: frozenset[Element],
    active: Columns,
) -> tuple[Rival, ...]:
    """The facts of a batch and of the active set that compete with one of the batch for a key, the largest expected loss first.

    Args:
        weight: the lowest edited weight.
        keys, preimages, ridge: of the batch's requests at that weight.
        kept: the active set that the batch is written on.
        active: its columns at that weight, in the set's order.
    """
    batch = _without_residuals(keys, preimages, ridge, active)
    together = join([batch, active])
    near = [pair for pair in near_keys(batch, together) if pair.left < pair.right]
    if not near:
        return ()
    names = [(request.id, request.text, request.target_new) for request in requests]
    names += _names(repository, weight, kept)
    rivals: dict[int, dict[int, float]] = {}
    for left, right, cosine in near:
        if names[left][2] != names[right][2]:
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
    return Columns(keys, preimages, nowhere, np.full(count, ridge, np.float32))


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


def _names(repository: Repository, weight: str, kept: frozenset[Element]) -> list[tuple[str, str, str]]:
    """Id, text and target of each column of a weight in the set's order; a name of its own where texts are withheld."""
    weights = {patch: repository.patch(patch).weights.keys() for patch in {patch for patch, _ in kept}}
    rows = sorted((patch, request) for patch, request in kept if request is not None and weight in weights[patch])
    texts = active_requests(repository, rows)
    return [
        (request, texts[patch, request].text, texts[patch, request].target_new)
        if (patch, request) in texts
        else (request, f"request {request[:12]}", "(withheld)")
        for patch, request in rows
    ]
