"""What a side memory depends on besides the model, the requests and the texts; validated (docs/wise.md)."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from patchhub.editing.settings import NORMED_CLAMP, NORMED_RATE, inner_width, is_narrow
from patchhub.editing.values import ValueSettings
from patchhub.errors import SettingsError
from patchhub.models.architectures import Architecture

Distance = Literal["max", "mean"]
"""Over a sequence's tokens: the largest of their distances, or, as published, their mean."""

Merging = Literal["ties", "linear"]
Margins = Literal["relative", "absolute"]
Solver = Literal["fit", "descent"]

_COUNTS = ("shard_size", "steps", "rounds", "descent_steps")
_POSITIVE = (*_COUNTS, "learning_rate", "clamp", "ridge", "beta", "act_ratio", "norm_constraint", "descent_rate")
_WHOLE = (*_COUNTS, "seed", "layer", "prefixes", "neighbours", "rehearsal")
_NOT_NEGATIVE = (
    "alpha", "gamma", "seed", "layer", "prefixes", "neighbours", "rehearsal", "weight_decay", "kl_factor", "stop_loss", "descent_decay",
)  # fmt: skip
_SHARES = ("mask_ratio", "merge_density")
_CHOICES = {"distance": Distance, "merge_method": Merging, "margins": Margins, "solver": Solver}


@dataclass(frozen=True)
class WiseSettings:
    """Settings of WISE, under the published names where there are any.

    Args:
        layer: the block whose feed-forward output projection gets a side memory.
        shard_size: requests after which a shard is full.
        seed, mask_ratio: of the random subspace, the share of entries that training may change.
        alpha, beta, gamma: the activation margins: distances of unrelated text stay below alpha, those of edited prompts above beta,
            and gamma lies between the two.
        margins: "relative": in units of the median length of the hidden states after the layer; "absolute": as they are.
        distance, act_ratio: routing: the distance of a sequence, and the threshold over the distances of edited prompts.
        norm_constraint: the largest change of an entry.
        solver: "fit" or the published "descent", see ``editing.wise_fit`` and ``editing.wise_descent``.
        steps, learning_rate, weight_decay, kl_factor, clamp, stop_loss: of the edit loss, see ``editing.values``.
        descent_steps, descent_rate, descent_decay: of the "descent", as published.
        rounds: times that the fit is followed by optimising what it left undone.
        ridge: the weight of what is preserved against one request.
        rehearsal: requests of the continued shard, for each new one, that every round looks at and mends.
        prefixes: random texts, beside the contexts, that a subject is put after.
        neighbours: texts about other subjects that the base writes for each request.
        merge_method, merge_density: how shards are joined into one.
    """

    layer: int
    mask_ratio: float
    alpha: float
    beta: float
    gamma: float
    steps: int
    learning_rate: float
    clamp: float
    ridge: float
    shard_size: int = 500
    seed: int = 0
    margins: Margins = "relative"
    distance: Distance = "max"
    act_ratio: float = 1.0
    norm_constraint: float = 1.0
    solver: Solver = "fit"
    weight_decay: float = 0.5
    kl_factor: float = 0.0625
    stop_loss: float = 0.05
    rounds: int = 4
    descent_steps: int = 40
    descent_rate: float = 1.0
    descent_decay: float = 1e-5
    rehearsal: int = 4
    prefixes: int = 10
    neighbours: int = 8
    merge_method: Merging = "ties"
    merge_density: float = 0.53

    def __post_init__(self) -> None:
        for name in (*_POSITIVE, *_NOT_NEGATIVE, *_SHARES):
            self._check_number(name)
        for name, choice in _CHOICES.items():
            if getattr(self, name) not in get_args(choice):
                raise SettingsError(
                    f"{name} is {getattr(self, name)!r}", remedy=f"Use one of {', '.join(get_args(choice))}."
                )

    def _check_number(self, name: str) -> None:
        value = getattr(self, name)
        kind = int if name in _WHOLE else (int, float)
        fits = isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value)
        enough = fits and (value >= 0 if name in _NOT_NEGATIVE else value > 0)
        if not enough or (name in _SHARES and value > 1):
            number = "a whole number" if name in _WHOLE else "a number"
            span = (
                "of at least 0" if name in _NOT_NEGATIVE else "above 0" if name in _POSITIVE else "above 0, at most 1"
            )
            raise SettingsError(
                f"{name} must be {number} {span}, not {value!r}", remedy=f"Set {name} to {number} {span}."
            )

    def values(self, steps: int) -> ValueSettings:
        """The part that the optimisation of the edit loss needs."""
        return ValueSettings(
            steps=steps,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            kl_factor=self.kl_factor,
            clamp=self.clamp,
            stop_loss=self.stop_loss,
        )

    def absolute_margins(self, unit: float) -> tuple[float, float, float]:
        """alpha, beta and gamma as distances; ``unit`` is the median length of the hidden states after the layer."""
        scale = unit if self.margins == "relative" else 1.0
        return self.alpha * scale, self.beta * scale, self.gamma * scale

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def default_wise_settings(architecture: Architecture) -> WiseSettings:
    """Settings from depth and width alone (docs/wise.md gives the measurements).

    The layer is the first that the closed-form editors write, but never block 0. A shard holds one request for 15 inputs of the
    projection: with more, edited prompts and other text come too close to one another. The mask leaves each output at least 1,600 entries
    where it has so many, and at least the published share.
    """
    narrow = is_narrow(architecture)
    inner = inner_width(architecture)
    normed = architecture.norm is not None
    clamp = NORMED_CLAMP if normed else 2.0 if narrow else 0.75
    beta = 1.0 if normed else 0.75 * clamp
    return WiseSettings(
        layer=min(max(1, round(architecture.n_layers / 8)), architecture.n_layers - 1),
        shard_size=max(1, min(500, inner // 15)),
        mask_ratio=min(1.0, max(0.2, 1600 / inner)),
        alpha=beta / 4,
        beta=beta,
        gamma=beta / 2,
        steps=20,
        learning_rate=NORMED_RATE if normed else 1.0 if narrow else 0.5,
        clamp=clamp,
        ridge=inner / 16,
    )
