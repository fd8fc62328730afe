"""What a side memory depends on besides the model, the requests and the texts; validated (docs/wise.md)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from patchhub.editing.settings import NORMED_CLAMP, NORMED_RATE, inner_width, is_narrow
from patchhub.settings import COUNT, INDEX, NOT_NEGATIVE, POSITIVE, SHARE, check, one_of, setting

if TYPE_CHECKING:
    from patchhub.editing.values import ValueSettings
    from patchhub.models.architectures import Architecture

Distance = Literal["max", "mean"]
"""Over a sequence's tokens: the largest of their distances, or, as published, their mean."""

Merging = Literal["ties", "linear"]
Margins = Literal["relative", "absolute"]
Solver = Literal["fit", "descent"]


_DISTANCE = one_of(*get_args(Distance))
_MERGING = one_of(*get_args(Merging))
_MARGINS = one_of(*get_args(Margins))
_SOLVER = one_of(*get_args(Solver))


@dataclass(frozen=True)
class WiseSettings:
    """Settings of WISE, under the published names where there are any.

    Margins are distances of activations: those of unrelated text stay below alpha, those of edited prompts above beta, and gamma lies
    between the two; "relative" margins are in units of the median length of the hidden states after the layer. The solver "fit" optimises
    values and fits the matrix to them (``training``); "descent" descends on the matrix as published (``descent``).

    Raises:
        SettingsError: a value cannot be used.
    """

    layer: int = setting(INDEX, "layer whose feed-forward output gets a side memory; default: from the model's depth")
    mask_ratio: float = setting(SHARE, "share of the matrix that a shard may change")
    alpha: float = setting(NOT_NEGATIVE, "margin: distances of unrelated text stay below it")
    beta: float = setting(POSITIVE, "margin: distances of edited prompts rise above it")
    gamma: float = setting(NOT_NEGATIVE, "margin: how far the two kinds of distances are kept apart")
    steps: int = setting(COUNT, "most steps of the optimisation")
    learning_rate: float = setting(POSITIVE, "step of the optimisation")
    clamp: float = setting(POSITIVE, "largest change of a value, relative to its norm")
    ridge: float = setting(POSITIVE, "weight of what is preserved against one fact; default: from the FFN's width")
    shard_size: int = setting(COUNT, "facts after which a shard is full (500)", default=500)
    seed: int = setting(INDEX, "seed of the random subspaces and texts", default=0)
    margins: Margins = setting(
        _MARGINS, "margins relative to the model's activations, or as published", default="relative"
    )
    distance: Distance = setting(
        _DISTANCE,
        "distance of a sequence: its tokens' largest, or their mean as published",
        default="max",
    )
    act_ratio: float = setting(
        POSITIVE, "routing threshold, relative to a low quantile of the edited prompts' distances", default=1.0
    )
    norm_constraint: float = setting(POSITIVE, "largest change of an entry", default=1.0)
    solver: Solver = setting(
        _SOLVER, "fit the matrix to optimised values, or descend on it as published", default="fit"
    )
    weight_decay: float = setting(NOT_NEGATIVE, "weight of the change's norm in the loss", default=0.5)
    kl_factor: float = setting(NOT_NEGATIVE, "weight of the KL term that keeps the subject's essence", default=0.0625)
    stop_loss: float = setting(NOT_NEGATIVE, "a fact is finished below this loss", default=0.05)
    rounds: int = setting(COUNT, "times that the fit is followed by optimising what it left undone", default=4)
    descent_steps: int = setting(COUNT, "most steps of descent", default=40)
    descent_rate: float = setting(POSITIVE, "step of descent", default=1.0)
    descent_decay: float = setting(NOT_NEGATIVE, "weight decay of descent, under the mask", default=1e-5)
    rehearsal: int = setting(
        INDEX, "earlier facts of the shard, for each new one, that every round looks at and mends", default=4
    )
    prefixes: int = setting(INDEX, "random texts, beside the contexts, that a subject is put after", default=10)
    neighbours: int = setting(INDEX, "texts about other subjects that the base writes for each fact", default=8)
    merge_method: Merging = setting(_MERGING, "how shards are joined into one side memory", default="ties")
    merge_density: float = setting(SHARE, "share of each shard's entries that joining by ties keeps", default=0.53)

    def __post_init__(self) -> None:
        check(self)

    def values(self, steps: int) -> ValueSettings:
        """The part that the optimisation of the edit loss needs."""
        from patchhub.editing.values import ValueSettings  # the only thing here that needs torch

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
