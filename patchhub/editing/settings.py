"""What an edit depends on besides the model, the metric and the contexts; validated, and the same for MEMIT and PMET. No torch.

`PRESETS` are settings that were published for particular models, as data with the file that each entry is from. A row fits a base by its
family, depth and widths, so that fine-tuned and renamed copies of a model are found too. MEMIT's authors give GPT-2 XL and GPT-J, PMET's
GPT-J and GPT-NeoX (and MEMIT's settings for GPT-NeoX), AlphaEdit's Llama-3-8B; the other rows are EasyEdit's. No source gives PMET for
GPT-2 XL, Llama-3-8B, Mistral or Qwen. A published lambda is for second moments of 100,000 Wikipedia articles (GPT-NeoX: 50,000) without a
ridge."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

from patchhub.errors import SettingsError
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
    wordings: int = setting(
        INDEX,
        "of facts outside a chat: most places in the base's own sentences about a subject in which the target is optimised as well",
        default=0,
    )
    repairs: int = setting(
        INDEX, "rounds in which facts that are not said, or run on, are optimised further", default=0
    )
    alternate: int = setting(
        INDEX, "of the contexts beside the bare prompt, how many a step reads, in turn; 0: all of them", default=0
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
            alternate=self.alternate,
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


PUBLISHED: Final = "published"
"""The preset that stands for the row that fits the base."""


@dataclass(frozen=True)
class Shape:
    """What a row recognises a base by: transformers' model type, number of blocks, width, inputs of the FFN output projection."""

    model_type: str
    n_layers: int
    d_model: int
    inner: int

    def __str__(self) -> str:
        return f"{self.model_type}, {self.n_layers} layers, width {self.d_model}, FFN {self.inner}"


@dataclass(frozen=True)
class Preset:
    """One editor's settings for one model, and the repository and file that they are from."""

    model: str
    method: str
    shape: Shape
    settings: EditSettings
    source: str


def preset(name: str, method: str, architecture: Architecture) -> Preset:
    """The row of a model by name, or with ``published`` the one that fits the base.

    Raises:
        SettingsError: there is none for this editor, or its layers are not in this base.
    """
    rows = [row for row in PRESETS if row.method == method]
    shape = shape_of(architecture)
    if name == PUBLISHED:
        found = [row for row in rows if row.shape == shape]
        problem = f"nobody published {method} settings for a model of this shape ({shape})"
    else:
        found = [row for row in rows if row.model == name]
        problem = f"there is no preset {name!r} for {method}"
    if not found:
        raise SettingsError(problem, remedy=_remedy(name, rows), preset=name, method=method)
    if found[0].settings.layers[-1] >= architecture.n_layers:
        raise SettingsError(
            f"the preset {name} edits layer {found[0].settings.layers[-1]}, and this {shape.model_type} model has {shape.n_layers}",
            remedy="Use a preset for a model of this depth, or none.",
            preset=name,
        )
    return found[0]


def shape_of(architecture: Architecture) -> Shape:
    return Shape(architecture.model_type, architecture.n_layers, architecture.d_model, architecture.shapes[0][1])


def _remedy(name: str, rows: Iterable[Preset]) -> str:
    names = [row.model for row in rows]
    close = difflib.get_close_matches(name, names, n=1)
    listed = f"There are presets for {', '.join(names)}; without one, settings follow from depth and width."
    return f"Did you mean {close[0]}?" if close else listed


_GPT2_XL = Shape("gpt2", 48, 1600, 6400)
_GPT_J = Shape("gptj", 28, 4096, 16384)
_GPT_NEOX = Shape("gpt_neox", 44, 6144, 24576)
_LLAMA_2 = Shape("llama", 32, 4096, 11008)
_LLAMA_3 = Shape("llama", 32, 4096, 14336)
_LLAMA_32_3B = Shape("llama", 28, 3072, 8192)
_MISTRAL = Shape("mistral", 32, 4096, 14336)
_QWEN_2 = Shape("qwen2", 28, 3584, 18944)

_FOUR_TO_EIGHT = (4, 5, 6, 7, 8)


def _memit(
    layers: tuple[int, ...],
    ridge: float,
    *,
    steps: int = 25,
    learning_rate: float = 0.5,
    weight_decay: float = 0.5,
    clamp: float = 0.75,
) -> EditSettings:
    """MEMIT's settings; what all sources have in common is the KL factor."""
    return EditSettings(layers, ridge, steps, learning_rate, weight_decay, 0.0625, clamp)


_EASYEDIT_7B = _memit(_FOUR_TO_EIGHT, 15000, weight_decay=0.001, clamp=4.0)

PRESETS: Final = (
    Preset(
        "gpt2-xl",
        "memit",
        _GPT2_XL,
        _memit((13, 14, 15, 16, 17), 20000, steps=20),
        "kmeng01/memit 80426fd9 hparams/MEMIT/gpt2-xl.json",
    ),
    Preset(
        "gpt-j-6b",
        "memit",
        _GPT_J,
        _memit((3, 4, 5, 6, 7, 8), 15000),
        "kmeng01/memit 80426fd9 hparams/MEMIT/EleutherAI_gpt-j-6B.json",
    ),
    Preset(
        "gpt-neox-20b",
        "memit",
        _GPT_NEOX,
        _memit((6, 7, 8, 9, 10), 6000, steps=20, clamp=0.8),
        "xpq-tech/PMET 80643f2d edit/hparams/MEMIT/EleutherAI_gpt-neox-20b.json",
    ),
    Preset("llama-2-7b", "memit", _LLAMA_2, _EASYEDIT_7B, "zjunlp/EasyEdit 14cea824 hparams/MEMIT/llama-7b.yaml"),
    Preset(
        "llama-3-8b",
        "memit",
        _LLAMA_3,
        _memit(_FOUR_TO_EIGHT, 15000, learning_rate=0.1),
        "jianghoucheng/AlphaEdit f5248d3d hparams/MEMIT/Llama3-8B.json",
    ),
    Preset(
        "llama-3.2-3b", "memit", _LLAMA_32_3B, _EASYEDIT_7B, "zjunlp/EasyEdit 14cea824 hparams/MEMIT/llama3.2-3b.yaml"
    ),
    Preset("mistral-7b", "memit", _MISTRAL, _EASYEDIT_7B, "zjunlp/EasyEdit 14cea824 hparams/MEMIT/mistral-7b.yaml"),
    Preset("qwen2-7b", "memit", _QWEN_2, _EASYEDIT_7B, "zjunlp/EasyEdit 14cea824 hparams/MEMIT/qwen2-7b.yaml"),
    Preset("qwen2.5-7b", "memit", _QWEN_2, _EASYEDIT_7B, "zjunlp/EasyEdit 14cea824 hparams/MEMIT/qwen2.5-7b.yaml"),
    Preset(
        "gpt-j-6b",
        "pmet",
        _GPT_J,
        EditSettings((3, 4, 5, 6, 7, 8), 6000, 30, 0.2, 0.5, 1.0, 0.75),
        "xpq-tech/PMET 80643f2d edit/hparams/PMET/EleutherAI_gpt-j-6B.json",
    ),
    Preset(
        "gpt-neox-20b",
        "pmet",
        _GPT_NEOX,
        EditSettings((6, 7, 8, 9, 10), 15000, 30, 0.5, 0.5, 0.8, 0.8),
        "xpq-tech/PMET 80643f2d edit/hparams/PMET/EleutherAI_gpt-neox-20b.json",
    ),
    Preset(
        "llama-2-7b",
        "pmet",
        _LLAMA_2,
        EditSettings(_FOUR_TO_EIGHT, 15000, 20, 0.5, 0.5, 0.0625, 1.0),
        "zjunlp/EasyEdit 14cea824 hparams/PMET/llama-7b.yaml",
    ),
    Preset(
        "llama-3.2-3b",
        "pmet",
        _LLAMA_32_3B,
        EditSettings(_FOUR_TO_EIGHT, 15000, 25, 0.5, 0.5, 0.0625, 1.0),
        "zjunlp/EasyEdit 14cea824 hparams/PMET/llama3.2-3b.yaml",
    ),
)
"""Every row, by editor and model."""
