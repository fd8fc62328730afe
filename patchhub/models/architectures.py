"""Which weights of a model can be edited, what they are called, and what stands behind them.

The editable weights are the output projections of the feed-forward networks. They are found in the structure of the
model, built without weights (`structure`); for the families of `FAMILIES` the result must also be the one that was
verified by hand. Nothing else in patchhub knows names of model families.

Between such a projection's output y and the residual stream stands nothing, a scale a (Granite), or a norm with a gain g (Gemma 2 and 3,
OLMo 2):

    x_out = x + phi(y),    phi(y) = a y    or    phi(y) = a g y / sqrt(mean(y^2) + eps)

A norm does not see how long y is, so what it can give is an ellipsoid, and of all outputs that give one point of it the nearest to the
present one can be written (docs/methods.md). A scale on the logits (Cohere) lies behind the stream and does not matter here.

The experts of a layer are one stacked weight (`experts`). Where a shared expert stands beside them, facts are written into
one of the two."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)

from patchhub.errors import BaseError, SettingsError, UnsupportedModelError
from patchhub.models.experts import check_experts, gate_the_key, on_output
from patchhub.models.structure import (
    BlockStructure,
    Orientation,
    Projection,
    StructureError,
    find_structure,
    hidden_of,
    is_recurrent,
)

_SMALL = 1e-3  # length per channel of the vector that eps is read off
_TOLERANCE = 1e-3  # relative; of half-precision norms too
_HALVINGS = 100  # of the interval of the multiplier, which is searched on a logarithmic scale


@dataclass(frozen=True, eq=False)
class Behind:
    """phi of one layer, as numbers.

    Attributes:
        scale: a.
        gain: g (d,), float64 on the CPU; None: there is no norm.
        eps: under the norm's root.
    """

    scale: float = 1.0
    gain: Float[Tensor, " d"] | None = None
    eps: float = 0.0

    def __call__(self, y: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """phi(y), in y's type and on its device."""
        if self.gain is None:
            return y * self.scale
        return y * (y.square().mean(-1, keepdim=True) + self.eps).rsqrt() * (self.scale * self.gain).to(y)

    def slope(self, y: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """What each channel of a small change of y is multiplied with, at an unchanged length of y."""
        if self.gain is None:
            return torch.full_like(y, self.scale)
        return (y.square().mean(-1, keepdim=True) + self.eps).rsqrt() * (self.scale * self.gain).to(y)

    def residual(self, y: Float[Tensor, "n d"], share: Float[Tensor, "n d"], length: float) -> Float[Tensor, "n d"]:
        """What is to be added to y for the stream to move by ``share``, or as near to that as phi gets; ``length`` as in `toward`."""
        if self.gain is None:
            return share / self.scale
        return self.toward(self.nearest(self(y) + share), y, length)

    def nearest(self, wanted: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """The v with mean(v^2) = 1 whose phi(v) is nearest to ``wanted``: the nearest point of an ellipsoid, for a layer with a norm.

        With h = a g it is v_i = h_i t_i / (h_i^2 + mu), where mu > -min h^2 gives v its length; a channel of no gain gets nothing.
        """
        assert self.gain is not None
        h = (self.scale * self.gain).to(wanted)
        square = h.square()
        least, most = square.min(), square.max()

        def mean_square(above: Float[Tensor, "n 1"]) -> Float[Tensor, "n 1"]:
            return (h * wanted / (square - least + above)).square().mean(-1, keepdim=True)

        # mean_square falls in mu; the interval of mu + min h^2 spans all that float64 can tell apart.
        tiny = torch.finfo(wanted.dtype).eps * most
        low = torch.full_like(wanted[:, :1], float(tiny.log()))
        high = (wanted.abs().amax(-1, keepdim=True) * h.abs().max() + most).log() + 1.0
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            long = mean_square(middle.exp()) > 1
            low, high = torch.where(long, middle, low), torch.where(long, high, middle)
        return h * wanted / (square - least + ((low + high) / 2).exp())

    def toward(self, target: Float[Tensor, "n d"], y: Float[Tensor, "n d"], length: float) -> Float[Tensor, "n d"]:
        """The smallest change of y after which phi gives what it gives for ``target``.

        With a norm that is c v - y, c = <v, y> / <v, v>, where the result is at least ``length`` times as long as y.
        """
        return target - y if self.gain is None else self.beyond(target, y, 0.0, length)

    def beyond(
        self, target: Float[Tensor, "n d"], y: Float[Tensor, "n d"], least: float, length: float
    ) -> Float[Tensor, "n d"]:
        """As `toward`, the smallest change that is at least ``least`` long; for a layer with a norm.

        It is c v - y with the larger root c of ||c v - y|| = least, where that is larger than c of the smallest change.
        """
        square = target.square().sum(-1, keepdim=True).clamp(min=torch.finfo(target.dtype).tiny)
        factor = (target * y).sum(-1, keepdim=True) / square
        aside = y.square().sum(-1, keepdim=True) - factor.square() * square
        more = ((least**2 - aside).clamp(min=0) / square).sqrt()
        floor = length * y.norm(dim=-1, keepdim=True) / square.sqrt()
        return torch.maximum(factor + more, floor) * target - y


@torch.no_grad()
def read_behind(norm: nn.Module | None, scale: float, width: int) -> Behind:
    """phi of a loaded layer, read off what its norm gives.

    Raises:
        StructureError: the norm is not y / rms(y) times a gain (it centres, or has a bias).
    """
    if norm is None:
        return Behind(scale)
    parameter = next(norm.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device

    def given(y: Tensor) -> Tensor:
        found: Any = norm(y.to(device)[None])
        return torch.as_tensor(found)[0].double().cpu()

    pattern = torch.linspace(-1.0, 1.0, width) + 0.5
    at_rest = given(pattern)
    gain = at_rest * pattern.double().square().mean().sqrt() / pattern.double()
    short = given(_SMALL * pattern / pattern.square().mean().sqrt())
    ratio = float((short * at_rest).sum() / at_rest.square().sum().clamp(min=1e-300))
    eps = max(0.0, _SMALL**2 * (1 / max(ratio, 1e-6) ** 2 - 1))
    behind = Behind(scale, gain * (1 + eps / pattern.double().square().mean()).sqrt(), eps)
    other = torch.cos(torch.arange(width, dtype=torch.float32)) + 0.25
    error = float((given(other) - behind(other.double()) / scale).norm())
    if not error <= _TOLERANCE * float(given(other).norm()) + 1e-9:
        raise StructureError(
            "has a norm behind the feed-forward network that is not a root-mean-square norm with a gain"
        )
    return behind


_ADAPTER: Final = "adapter_config.json"  # by which transformers finds an adapter
_NO_ADAPTER: Final = "no adapter"  # a folder that no model has: transformers looks for the adapter there


@dataclass(frozen=True)
class Family:
    """One row of the table: module paths as in transformers; projections and norms are relative to a block.

    ``norms`` are those that may stand behind the feed-forward projection, None: nothing. A scale there is a number of the model's
    configuration, so no part of a row. ``also`` are the projections of blocks that are made otherwise, and a shared expert's.
    """

    blocks: str
    ffn_out: str
    attn_out: str
    orientation: Orientation = "out_in"
    norms: tuple[str | None, ...] = (None,)
    also: tuple[str, ...] = ()

    def contradicts(self, blocks: str, structures: Sequence[BlockStructure]) -> str | None:
        """What was found that is not in the row; None: nothing."""
        for s in structures:
            paths = {*(projection.path for projection in s.feed_forward), s.attention.path}
            strange = sorted(paths - {self.ffn_out, self.attn_out, *self.also})
            if (
                strange
                or (blocks, s.attention.orientation) != (self.blocks, self.orientation)
                or s.norm not in self.norms
            ):
                return f"{blocks}, {', '.join(sorted(paths))}, {s.attention.orientation}, norm {s.norm}"
        return None


_LLAMA_LIKE = Family("model.layers", "mlp.down_proj", "self_attn.o_proj")
_POST_NORM = replace(_LLAMA_LIKE, norms=("post_feedforward_layernorm",))
_EXPERTS = replace(_LLAMA_LIKE, ffn_out="mlp.experts", also=("mlp.down_proj",))
_SHARED_EXPERTS = replace(_EXPERTS, also=("mlp.down_proj", "mlp.shared_experts.down_proj"))
_GATED_EXPERTS = replace(_EXPERTS, also=("mlp.down_proj", "mlp.shared_expert.down_proj"))

FAMILIES: Final[Mapping[str, Family]] = {
    "gpt2": Family("transformer.h", "mlp.c_proj", "attn.c_proj", "in_out"),
    "gpt_neo": Family("transformer.h", "mlp.c_proj", "attn.attention.out_proj"),
    "gpt_bigcode": Family("transformer.h", "mlp.c_proj", "attn.c_proj"),
    "gptj": Family("transformer.h", "mlp.fc_out", "attn.out_proj"),
    "codegen": Family("transformer.h", "mlp.fc_out", "attn.out_proj"),
    "gpt_neox": Family("gpt_neox.layers", "mlp.dense_4h_to_h", "attention.dense"),
    "bloom": Family("transformer.h", "mlp.dense_4h_to_h", "self_attention.dense"),
    "falcon": Family("transformer.h", "mlp.dense_4h_to_h", "self_attention.dense"),
    "mpt": Family("transformer.blocks", "ffn.down_proj", "attn.out_proj"),
    "opt": Family("model.decoder.layers", "fc2", "self_attn.out_proj"),
    "phi": Family("model.layers", "mlp.fc2", "self_attn.dense"),
    "starcoder2": Family("model.layers", "mlp.c_proj", "self_attn.o_proj"),
    "apertus": _LLAMA_LIKE,
    "arcee": _LLAMA_LIKE,
    "cohere": _LLAMA_LIKE,
    "cohere2": _LLAMA_LIKE,
    "cwm": _LLAMA_LIKE,
    "ernie4_5": _LLAMA_LIKE,
    "gemma": _LLAMA_LIKE,
    "glm": _LLAMA_LIKE,
    "granite": _LLAMA_LIKE,
    "hunyuan_v1_dense": _LLAMA_LIKE,
    "llama": _LLAMA_LIKE,
    "minicpm3": _LLAMA_LIKE,
    "ministral": _LLAMA_LIKE,
    "ministral3": _LLAMA_LIKE,
    "mistral": _LLAMA_LIKE,
    "nemotron": _LLAMA_LIKE,
    "olmo": _LLAMA_LIKE,
    "phi3": _LLAMA_LIKE,
    "qwen2": _LLAMA_LIKE,
    "qwen3": _LLAMA_LIKE,
    "seed_oss": _LLAMA_LIKE,
    "smollm3": _LLAMA_LIKE,
    "stablelm": _LLAMA_LIKE,
    "exaone4": _POST_NORM,
    "gemma2": _POST_NORM,
    "gemma3_text": _POST_NORM,
    "olmo2": _POST_NORM,
    "olmo3": _POST_NORM,
    "glm4": replace(_LLAMA_LIKE, norms=("post_mlp_layernorm",)),
    "dbrx": Family("transformer.blocks", "ffn.experts", "norm_attn_norm.attn.out_proj"),
    "flex_olmo": replace(_EXPERTS, norms=("post_feedforward_layernorm",)),
    "gpt_oss": _EXPERTS,
    "granitemoe": replace(_EXPERTS, ffn_out="block_sparse_moe.experts"),
    "mimo_v2_flash": _EXPERTS,
    "minimax_m2": _EXPERTS,
    "mixtral": _EXPERTS,
    "olmoe": _EXPERTS,
    "phimoe": _EXPERTS,
    "qwen2_moe": _GATED_EXPERTS,
    "qwen3_moe": _EXPERTS,
    "afmoe": replace(_SHARED_EXPERTS, norms=("post_mlp_layernorm",)),
    "axk1": replace(_SHARED_EXPERTS, norms=(None, "mlp.post_mlp_layernorm")),
    "deepseek_v2": _SHARED_EXPERTS,
    "deepseek_v3": _SHARED_EXPERTS,
    "dots1": _SHARED_EXPERTS,
    "ernie4_5_moe": _SHARED_EXPERTS,
    "exaone_moe": _SHARED_EXPERTS,
    "glm4_moe": _SHARED_EXPERTS,
    "glm4_moe_lite": _SHARED_EXPERTS,
    "hunyuan_v1_moe": replace(_EXPERTS, also=("mlp.shared_mlp.down_proj",)),
    "bamba": Family("model.layers", "feed_forward.down_proj", "self_attn.o_proj", also=("mamba.out_proj",)),
    "falcon_h1": Family("model.layers", "feed_forward.down_proj", "self_attn.o_proj"),
    "granitemoehybrid": Family(
        "model.layers",
        "block_sparse_moe.experts",
        "self_attn.o_proj",
        also=("shared_mlp.output_linear", "mamba.out_proj"),
    ),
    "jamba": Family(
        "model.layers",
        "feed_forward.experts",
        "self_attn.o_proj",
        also=("feed_forward.down_proj", "mamba.out_proj"),
    ),
    "kimi_linear": _SHARED_EXPERTS,
    "lfm2": Family("model.layers", "feed_forward.w2", "self_attn.out_proj", also=("conv.out_proj",)),
    "lfm2_moe": Family(
        "model.layers", "feed_forward.experts", "self_attn.out_proj", also=("feed_forward.w2", "conv.out_proj")
    ),
    "olmo_hybrid": replace(_LLAMA_LIKE, norms=(None, "post_feedforward_layernorm"), also=("linear_attn.o_proj",)),
    "qwen3_5_text": replace(_LLAMA_LIKE, also=("linear_attn.out_proj",)),
    "qwen3_5_moe_text": replace(_GATED_EXPERTS, also=(*_GATED_EXPERTS.also, "linear_attn.out_proj")),
    "qwen3_next": replace(_GATED_EXPERTS, also=(*_GATED_EXPERTS.also, "linear_attn.out_proj")),
    "llama4_text": Family(
        "model.layers",
        "feed_forward.experts",
        "self_attn.o_proj",
        also=("feed_forward.shared_expert.down_proj", "feed_forward.down_proj"),
    ),
}

Site: TypeAlias = Literal["routed", "shared"]
"""Which experts facts are written into."""

SITES: Final[tuple[Site, ...]] = ("routed", "shared")
DEFAULT_SITE: Final[Site] = "routed"


@dataclass(frozen=True)
class Architecture:
    """The editable structure of one model.

    Attributes:
        model_type: the family's name in transformers.
        n_layers: number of decoder blocks.
        d_model: width of the residual stream.
        blocks: path of the list of decoder blocks.
        feed_forward: the feed-forward output projection of each layer that facts are written into.
        attention: path of the attention output projection of each layer, relative to its block.
        orientation: how the linear weights of the blocks are stored; deltas are (out, in) whatever it says.
        norms: of each layer the path of the norm behind the feed-forward projection, relative to its block; None: there is none.
        beside: the projection of each layer that facts could be written into instead; None: there is none.
        site: which experts `feed_forward` is of; None of a model without experts.
        recurrent: as `is_recurrent`.
    """

    model_type: str
    n_layers: int
    d_model: int
    blocks: str
    feed_forward: tuple[Projection, ...]
    attention: tuple[str, ...]
    orientation: Orientation
    norms: tuple[str | None, ...]
    beside: tuple[Projection | None, ...] = ()
    site: Site | None = None
    recurrent: bool = False

    @property
    def normed(self) -> bool:
        """Whether a norm stands behind the feed-forward projection of some layer."""
        return any(norm is not None for norm in self.norms)

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """(out, in) of the feed-forward weight of each layer."""
        return tuple(projection.shape for projection in self.feed_forward)

    @property
    def chosen(self) -> dict[str, Projection]:
        """The weights that facts are written into, by parameter name."""
        return {self.ffn_weight(layer): projection for layer, projection in enumerate(self.feed_forward)}

    @property
    def weights(self) -> dict[str, Projection]:
        """Every weight that facts could be written into: those of `feed_forward`, then those beside them."""
        other = enumerate(self.beside)
        return self.chosen | {f"{self.block(layer)}.{p.parameter}": p for layer, p in other if p is not None}

    def block(self, layer: int) -> str:
        """The module path of a decoder block.

        Raises:
            SettingsError: there is no such layer.
        """
        if not 0 <= layer < self.n_layers:
            raise SettingsError(
                f"layer {layer} does not exist in this {self.model_type} model",
                remedy=f"Choose layers from 0 to {self.n_layers - 1}.",
                layer=layer,
                layers=self.n_layers,
            )
        return f"{self.blocks}.{layer}"

    def ffn_weight(self, layer: int) -> str:
        """The parameter name of a layer's feed-forward output projection: ``transformer.h.3.mlp.c_proj.weight``."""
        return f"{self.block(layer)}.{self.feed_forward[layer].parameter}"

    def ffn_module(self, layer: int) -> str:
        """The module path of a layer's feed-forward output projection."""
        return f"{self.block(layer)}.{self.feed_forward[layer].path}"

    def attn_module(self, layer: int) -> str:
        """The module path of a layer's attention output projection."""
        return f"{self.block(layer)}.{self.attention[layer]}"

    def layer_of(self, weight: str) -> int:
        """The layer whose `ffn_weight` this is.

        Raises:
            BaseError: it is none of this model.
        """
        for layer in range(self.n_layers):
            if self.ffn_weight(layer) == weight:
                return layer
        raise BaseError(
            f"{weight} is not a feed-forward output projection of this {self.model_type} model",
            remedy=f"Its weights are named like {self.ffn_weight(0)}.",
            weight=weight,
        )


def read_config(folder: Path) -> PreTrainedConfig:
    """The transformers configuration of a model folder. No code of the folder is run.

    Raises:
        UnsupportedModelError: the installed transformers does not know the model, or its configuration is malformed.
    """
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # any model's own code runs here
        reason = str(error).partition("\n")[0]
        raise UnsupportedModelError(
            f"the configuration in {folder} cannot be read by transformers ({reason})",
            remedy="Install a transformers that knows this model; models with their own code are not supported.",
            folder=str(folder),
        ) from error
    return config


def read_model(folder: Path, **arguments: Any) -> PreTrainedModel:
    """The causal language model of a folder, from its own configuration and weights alone.

    Where an adapter lies beside the weights, as trainings leave it, transformers would put it on if PEFT is installed: that would
    be another model than the files that were fingerprinted. No code of the folder is run.

    Args:
        arguments: passed on to ``from_pretrained`` (dtype, device_map, quantization_config, ...).

    Raises:
        SettingsError: ``trust_remote_code`` is asked for.
    """
    if arguments.pop("trust_remote_code", False):
        raise SettingsError("patchhub never runs a model's own code", remedy="Leave trust_remote_code out.")
    if (folder / _ADAPTER).is_file():
        arguments["adapter_kwargs"] = {"subfolder": _NO_ADAPTER}
    factory = _factory(read_config(folder))
    model: PreTrainedModel = factory.from_pretrained(
        folder, **{"local_files_only": True, **arguments}, trust_remote_code=False
    )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise BaseError(
            f"transformers puts the adapter in {folder} on the model",
            remedy=f"Move {_ADAPTER} away.",
            folder=str(folder),
        )
    return model


def describe(config: PreTrainedConfig, site: Site | None = None) -> Architecture:
    """The architecture of the model that a configuration stands for, from its structure on the meta device.

    Args:
        site: which experts facts are written into; None: `DEFAULT_SITE` where there are both.

    Raises:
        SettingsError: the model has no experts of that kind.
        UnsupportedModelError: the model cannot be edited; the message says why.
    """
    _refuse_by_config(config)
    text: Any = config.get_text_config()
    try:
        n_layers, d_model = int(text.num_hidden_layers), int(text.hidden_size)
        blocks, structures = find_structure(without_weights(config), n_layers, d_model)
        _refuse_differing(structures)
        row = FAMILIES.get(config.model_type)
        strange = row.contradicts(blocks, structures) if row else None
        if strange:
            raise StructureError(f"has another structure than its family ({strange}, not {row})")
    except AttributeError as error:
        raise _refusal(config, f"has no usual decoder ({error})") from error
    except StructureError as error:
        raise _refusal(config, str(error)) from error
    chosen, beside, found = _choose(config, structures, site)
    return Architecture(
        model_type=config.model_type,
        n_layers=n_layers,
        d_model=d_model,
        blocks=blocks,
        feed_forward=chosen,
        attention=tuple(structure.attention.path for structure in structures),
        orientation=structures[0].attention.orientation,
        norms=tuple(structure.norm for structure in structures),
        beside=beside,
        site=found,
        recurrent=is_recurrent(config),
    )


def _choose(
    config: Any, structures: Sequence[BlockStructure], site: Site | None
) -> tuple[tuple[Projection, ...], tuple[Projection | None, ...], Site | None]:
    """The projection of each layer that facts are written into, the other one, and of which experts the former are."""
    kinds: list[dict[Site, Projection]] = []
    for structure in structures:
        routed = any(p.experts for p in structure.feed_forward)
        kinds.append({"routed" if p.experts or not routed else "shared": p for p in structure.feed_forward})
    mixed = [kind for kind in kinds if any(p.experts for p in kind.values())]
    # Routed experts that cannot be read (Llama 4) leave the shared one alone in its block.
    has: set[Site] = {"routed"} if mixed else {"shared"} if _is_routed(config) else set()
    has |= {"shared"} if mixed and all("shared" in kind for kind in mixed) else set()
    if site is not None and site not in has:
        raise SettingsError(
            f"this {config.model_type} model has no {site} experts that facts can be written into",
            remedy=f"Use --experts {has.pop()}." if len(has) == 1 else "Leave --experts out.",
            model_type=config.model_type,
        )
    chosen = site or (DEFAULT_SITE if DEFAULT_SITE in has else next(iter(has), None))
    picked = [(kind.get(chosen or "routed") or next(iter(kind.values())), kind) for kind in kinds]
    others = [next((p for p in kind.values() if p is not taken), None) for taken, kind in picked]
    return tuple(taken for taken, _ in picked), tuple(others), chosen


def _is_routed(config: Any) -> bool:
    """Whether a configuration without readable experts speaks of some."""
    text = config.get_text_config()
    return bool(getattr(text, "num_local_experts", 0) or getattr(text, "num_experts", 0))


def behind_of(model: Any, architecture: Architecture, layer: int) -> Behind:
    """What stands between the feed-forward projection of a layer and the residual stream, of a loaded model.

    Raises:
        UnsupportedModelError: a norm of another kind than y / rms(y) times a gain.
    """
    path = architecture.norms[layer]
    norm = None if path is None else model.get_submodule(f"{architecture.block(layer)}.{path}")
    try:
        return read_behind(norm, architecture.feed_forward[layer].scale, architecture.d_model)
    except StructureError as error:
        raise _refusal(model.config, str(error)) from error


def hook_output(
    model: Any, architecture: Architecture, layer: int, function: Callable[[Tensor], Tensor | None]
) -> RemovableHandle:
    """As `Stack.hook_output`, of any model of this architecture."""
    path = architecture.norms[layer]
    if path is None:
        projection: nn.Module = model.get_submodule(architecture.ffn_module(layer))
        return on_output(projection, function)

    def enter(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        found = function(args[0])
        return None if found is None else (found, *args[1:])

    norm: nn.Module = model.get_submodule(f"{architecture.block(layer)}.{path}")
    return norm.register_forward_pre_hook(enter)


@torch.no_grad()
def gate_keys(model: Any, architecture: Architecture) -> None:
    """Let the gates of the shared experts that facts are written into multiply keys, see `gate_the_key`; a second time it does nothing.

    Raises:
        UnsupportedModelError: the model then gives something else.
    """
    gated = {layer: p for layer, p in enumerate(architecture.feed_forward) if p.gate is not None}
    if not gated:
        return
    ids = torch.arange(1, 5, device=model.get_input_embeddings().weight.device)[None]
    last = model.get_submodule(architecture.block(architecture.n_layers - 1))
    before = _block_output(model, last, ids).double()
    changed = [_gate_layer(model, architecture, layer) for layer in gated]
    if not any(changed):
        return
    after = _block_output(model, last, ids)
    tolerance = max(_TOLERANCE, 16 * torch.finfo(after.dtype).eps)
    if not float((after.double() - before).norm()) <= tolerance * float(before.norm()):
        raise _refusal(
            model.config, "has shared experts behind gates that are no sigmoids of one linear map of their input"
        )


def _gate_layer(model: Any, architecture: Architecture, layer: int) -> bool:
    projection = architecture.feed_forward[layer]
    assert projection.gate is not None
    return gate_the_key(model.get_submodule(architecture.block(layer)), projection.path, projection.gate)


@torch.no_grad()
def additive_probe(model: Any, architecture: Architecture, layer: int) -> None:
    """Check on a loaded model that a vector added to a feed-forward output moves the block's output by what `Behind` says.

    The vector makes what enters the stream about as long as the hidden states, so that half precision resolves it, or is as long as
    the output where a norm comes; the tolerance is a few units in the last place of the model's type.

    Raises:
        UnsupportedModelError: something else lies between the projection and the residual stream.
    """
    gate_keys(model, architecture)
    behind = behind_of(model, architecture, layer)
    block = model.get_submodule(architecture.block(layer))
    projection = model.get_submodule(architecture.ffn_module(layer))
    if architecture.feed_forward[layer].experts and not check_experts(projection):
        raise _refusal(
            model.config, f"has experts that compute something else than their keys say ({type(projection).__name__})"
        )
    ids = torch.arange(1, 5, device=model.get_input_embeddings().weight.device)[None]
    outputs: list[Tensor] = []
    handle = hook_output(model, architecture, layer, outputs.append)
    try:
        before = _block_output(model, block, ids)
    finally:
        handle.remove()
    own = outputs[0].reshape(before.shape).to(before.device)
    pattern = torch.linspace(-1.0, 1.0, before.shape[-1], device=before.device)
    length = before.float().norm() / abs(behind.scale) if behind.gain is None else own.float().norm()
    vector = (pattern * length / pattern.norm()).to(before.dtype)
    handle = on_output(projection, lambda output: output + vector.to(output.device))
    try:
        after = _block_output(model, block, ids)
    finally:
        handle.remove()
    moved = own + vector
    expected = behind(moved.double()) - behind(own.double())
    error = ((after.double() - before.double()) - expected).norm(dim=-1).max()
    size = torch.maximum(expected.norm(dim=-1).max(), before.double().norm(dim=-1).max())
    # A norm is read off float32 numbers, and its own steps round too.
    units = 8 if behind.gain is None else 64
    if not float(error) <= units * torch.finfo(before.dtype).eps * float(size):
        raise UnsupportedModelError(
            f"a vector added to the feed-forward output of layer {layer} does not enter the residual stream "
            "as the model's structure says",
            remedy="Only decoders with nothing, a scale or one norm behind the feed-forward projection can be edited.",
            layer=layer,
            model_type=architecture.model_type,
        )


class _Seen(Exception):
    """Ends a forward pass behind the block that was looked at."""


def _block_output(model: Any, block: Any, ids: Tensor) -> Tensor:
    """What a block gives for some tokens; nothing behind it is run."""
    seen: list[Tensor] = []

    def see(module: nn.Module, args: Any, output: Any) -> None:
        seen.append(hidden_of(output))
        raise _Seen

    handle, training = block.register_forward_hook(see), model.training
    try:
        with suppress(_Seen):
            model.eval()(input_ids=ids, use_cache=False)
    finally:
        handle.remove()
        model.train(training)
    return seen[0]


def _refuse_by_config(config: Any) -> None:
    """What the configuration alone rules out."""
    if getattr(config, "is_encoder_decoder", False):
        raise _refusal(config, "is an encoder-decoder, and edits are defined for decoder-only models")
    if getattr(config, "quantization_config", None):
        raise _refusal(
            config,
            "has quantised weights, to which a change cannot be added",
            remedy="Use the unquantised checkpoint that it was made from.",
        )


def _factory(config: PreTrainedConfig) -> Any:
    """Where transformers makes the model: among causal language models, else among those that see images and write text.

    The latter are edited in their language model.
    """
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def without_weights(config: PreTrainedConfig) -> Any:
    """The model on the meta device, with the attention whose steps autograd sees."""
    factory = _factory(config)
    try:
        with torch.device("meta"):
            return factory.from_config(
                copy.deepcopy(config), attn_implementation="eager", dtype=torch.float32, trust_remote_code=False
            )
    except Exception as error:  # any model's own code runs here
        reason = str(error).partition("\n")[0]
        raise StructureError(f"cannot be built as a causal language model by transformers ({reason})") from error


def _refuse_differing(structures: Sequence[BlockStructure]) -> None:
    """What must be the same in all blocks; the paths of projections and norms need not be."""
    if len({s.attention.orientation for s in structures}) != 1:
        raise StructureError("has blocks of different structure")


def _refusal(config: Any, reason: str, *, remedy: str | None = None) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"this {config.model_type} model {reason}",
        remedy=remedy or f"Choose a dense decoder, for example one of: {', '.join(sorted(FAMILIES))}.",
        model_type=config.model_type,
        reason=reason,
    )
