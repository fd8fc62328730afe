"""What an edit depends on besides the model, the metric and the contexts; validated, and the same for MEMIT and PMET."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Final

from patchhub.editing.values import ValueSettings
from patchhub.errors import SettingsError
from patchhub.models.architectures import Architecture
from patchhub.text.tokens import Chat

_NARROW = 1024  # below this width hidden states are small against what an edit needs

NORMED_RATE: Final = 0.5
"""The learning rate behind a norm, in units of the output's root mean square, whatever the width."""
NORMED_CLAMP: Final = 4.0
"""The clamp behind a norm, where it is the output's length that it is relative to."""


@dataclass(frozen=True)
class EditSettings:
    """Settings of a closed-form editor, under the published names.

    Args:
        layers: edited blocks, ascending; values are optimised at the last.
        ridge: lambda, the weight of what is preserved against one request.
        steps, learning_rate, weight_decay, kl_factor, clamp, stop_loss, nll_factor, closing: see ``editing.values``.
        chat: prompts are the user's messages of this chat form; None: they are read as they are.
    """

    layers: tuple[int, ...]
    ridge: float
    steps: int
    learning_rate: float
    weight_decay: float
    kl_factor: float
    clamp: float
    stop_loss: float = 0.05
    nll_factor: float = 1.0
    closing: float = 0.0
    chat: Chat | None = None

    def __post_init__(self) -> None:
        if not self.layers or list(self.layers) != sorted(set(self.layers)) or self.layers[0] < 0:
            raise SettingsError(
                f"layers {list(self.layers)} are not ascending block numbers", remedy="For example 3,4,5."
            )
        for name in ("ridge", "steps", "learning_rate", "clamp", "nll_factor"):
            if not 0 < getattr(self, name) < math.inf:
                raise SettingsError(f"{name} must be above 0, not {getattr(self, name)}", remedy=f"Set {name} > 0.")
        for name in ("weight_decay", "kl_factor", "stop_loss", "closing"):
            if not 0 <= getattr(self, name) < math.inf:
                raise SettingsError(
                    f"{name} must be a number of at least 0, not {getattr(self, name)}", remedy=f"Set {name} >= 0."
                )

    def values(self, *, until_sure: bool) -> ValueSettings:
        """The part that the value optimisation needs."""
        return ValueSettings(
            steps=self.steps,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            kl_factor=self.kl_factor,
            clamp=self.clamp,
            stop_loss=self.stop_loss,
            nll_factor=self.nll_factor,
            closing=self.closing,
            until_sure=until_sure,
        )

    def to_json(self) -> dict[str, Any]:
        chat = {} if self.chat is None else {"chat": self.chat.to_json()}
        plain = {name: value for name, value in asdict(self).items() if name != "chat"}
        return {**plain, "layers": list(self.layers), **chat}


def default_layers(architecture: Architecture) -> tuple[int, ...]:
    """Layers round(L/8) to max(round(L/4), round(L/8) + 2) of L, with at least one block left above them."""
    depth = architecture.n_layers
    first = round(depth / 8)
    last = min(max(round(depth / 4), first + 2), depth - 2)
    return tuple(range(min(first, max(last, 0)), max(last, 0) + 1))


def is_narrow(architecture: Architecture) -> bool:
    return architecture.d_model < _NARROW


def inner_width(architecture: Architecture) -> int:
    """The number of inputs of the FFN output projection."""
    return architecture.shapes[0][1]
