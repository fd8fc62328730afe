"""What an edit depends on besides the model, the metric and the contexts; validated, and the same for MEMIT and PMET. No torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

from patchhub.settings import AT_MOST_ONE, COUNT, INDEX, LAYERS, NOT_NEGATIVE, POSITIVE, check, setting

if TYPE_CHECKING:
    from patchhub.editing.values import ValueSettings
    from patchhub.models.architectures import Architecture
    from patchhub.text.tokens import Chat

_NARROW = 1024  # below this width hidden states are small against what an edit needs

NORMED_RATE: Final = 0.5
"""The learning rate behind a norm, in units of the output's root mean square, whatever the width."""
NORMED_CLAMP: Final = 4.0
"""The clamp behind a norm, where it is the output's length that it is relative to."""


@dataclass(frozen=True)
class EditSettings:
    """Settings of a closed-form editor, under the published names (docs/methods.md).

    Attributes:
        chat: prompts are the user's messages of this chat form; None: they are read as they are.

    Raises:
        SettingsError: a value cannot be used.
    """

    layers: tuple[int, ...] = setting(
        LAYERS, "edited layers, such as 3,4,5 or 3-5; values are optimised at the last; default: from the model's depth"
    )
    ridge: float = setting(POSITIVE, "lambda, the weight of what is preserved; default: from the FFN's width")
    steps: int = setting(COUNT, "most steps of the value optimisation")
    learning_rate: float = setting(POSITIVE, "Adam step of the value optimisation")
    weight_decay: float = setting(NOT_NEGATIVE, "weight of the change's norm in the loss")
    kl_factor: float = setting(NOT_NEGATIVE, "weight of the KL term that keeps the subject's essence")
    clamp: float = setting(POSITIVE, "largest change of a value, relative to its norm")
    stop_loss: float = setting(NOT_NEGATIVE, "a fact is finished below this loss", default=0.05)
    nll_factor: float = setting(POSITIVE, "weight of the target's likelihood in the loss", default=1.0)
    closing: float = setting(NOT_NEGATIVE, "weight of what follows the target: a new word, or an end", default=0.0)
    opening: float = setting(
        NOT_NEGATIVE,
        "in a chat, weight of what the base says before the target, which then stands where the base's answer has it; "
        "0: the target is the answer's first word",
        default=0.0,
    )
    chat_weight: float = setting(
        AT_MOST_ONE,
        "of facts outside a chat: how much of the loss is of the same prompt as a message in the base's chat template, if it has one",
        default=0.0,
    )
    repairs: int = setting(
        INDEX, "rounds in which facts that are not said, or run on, are optimised further", default=0
    )
    chat: Chat | None = None

    def __post_init__(self) -> None:
        check(self)

    def values(self, *, until_sure: bool) -> ValueSettings:
        """The part that the value optimisation needs."""
        from patchhub.editing.values import ValueSettings  # the only thing here that needs torch

        return ValueSettings(
            steps=self.steps,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            kl_factor=self.kl_factor,
            clamp=self.clamp,
            stop_loss=self.stop_loss,
            nll_factor=self.nll_factor,
            closing=self.closing,
            opening=self.opening,
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
    return architecture.shapes[-1][1]  # the first blocks of a mixture of experts may have none
