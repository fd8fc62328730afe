"""What an edit depends on besides the model, the metric and the contexts; validated. No torch.

`EditSettings` is the same for MEMIT and PMET, `WiseSettings` is of a side memory.

`PRESETS` are settings that were published for particular models, as data with the file that each entry is from. A row fits a base by its
family, depth and widths, so that fine-tuned and renamed copies of a model are found too. MEMIT's authors give GPT-2 XL and GPT-J, PMET's
GPT-J and GPT-NeoX (and MEMIT's settings for GPT-NeoX), AlphaEdit's Llama-3-8B; the other rows are EasyEdit's. No source gives PMET for
GPT-2 XL, Llama-3-8B, Mistral or Qwen. A published lambda is for second moments of 100,000 Wikipedia articles (GPT-NeoX: 50,000) without a
ridge.

What a side memory depends on besides the model, the requests and the texts; validated (docs/wise.md).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

from patchhub.errors import SettingsError
from patchhub.settings import AT_MOST_ONE, COUNT, INDEX, LAYERS, NOT_NEGATIVE, POSITIVE, SHARE, check, one_of, setting

if TYPE_CHECKING:
    from patchhub.editing.values import ValueSettings
    from patchhub.models.architectures import Architecture
    from patchhub.text.tokens import Chat


_NARROW = 512  # below this width hidden states are small against what an edit needs (docs/benchmarks.md)
_CROWDED: Final = 6.0
"""Lambda grows where a projection has fewer than so many inputs for each fact."""
_NARROW_SHARDS = 1024  # likewise for shards, which were measured less

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
    ridge: float = setting(
        POSITIVE,
        "lambda, the weight of what is preserved; default: from the FFN's width and, of many facts, their number",
    )
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
    essence: float = setting(
        NOT_NEGATIVE,
        "weight of what the base says of a subject by itself, in its chat or where it has none in plain text: its words stay as likely",
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
            essence=self.essence,
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


def crowding(architecture: Architecture, facts: int) -> float:
    """Times which the default lambda grows: where there are more facts than a sixth of the projection's inputs, as their number does.

    Keys of so many facts fill what the metric leaves free, and a lambda for few lets every one of them be met at any price
    (docs/benchmarks.md). Not of narrow models and behind norms, where it has not been measured.
    """
    if is_narrow(architecture) or architecture.normed:
        return 1.0
    return max(1.0, _CROWDED * facts / inner_width(architecture))


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
    where it has so many, and at least the published share; of experts those count that a token passes. The published limit of an entry is
    for projections of some 1,500 inputs: where experts have fewer, each entry of theirs must be larger for as much of an output.
    """
    narrow = architecture.d_model < _NARROW_SHARDS
    layer = min(max(1, round(architecture.n_layers / 8)), architecture.n_layers - 1)
    projection = architecture.feed_forward[layer]
    inner = projection.shape[1]
    normed = architecture.norms[layer] is not None
    clamp = NORMED_CLAMP if normed else 2.0 if narrow else 0.75
    beta = 1.0 if normed else 0.75 * clamp
    return WiseSettings(
        layer=layer,
        shard_size=max(1, min(500, inner // 15)),
        mask_ratio=min(1.0, max(0.2, 1600 / projection.passed)),
        alpha=beta / 4,
        beta=beta,
        gamma=beta / 2,
        steps=20,
        learning_rate=NORMED_RATE if normed else 1.0 if narrow else 0.5,
        clamp=clamp,
        ridge=inner / 16,
        norm_constraint=1.0 if architecture.site is None else max(1.0, 1536 * max(1, projection.experts) / inner),
    )
