"""A state as an adapter of other programs: PEFT's LoRA, and GGUF; and a GGUF of the base with the change fused in. NumPy only.

PEFT's is in the one form that PEFT, vLLM, SGLang and llama.cpp scale alike. PEFT scales each module by ``alpha_i / r_i``, vLLM by the one
``lora_alpha / r`` of the configuration, llama.cpp by ``lora_alpha`` over the rank of each tensor. They agree where every module has the
same rank r, ``lora_alpha = r``, and there are no patterns and no rsLoRA: so all factors are padded with zeros to one rank, and the scale
is 1.

The experts of a layer are a parameter, not a module (``target_parameters``): PEFT reads lora_A (E r, in) as the E blocks of A and lora_B
(out, r E) as B of each expert, expert by expert in the last place. Here all experts have one B. It takes a parameter for stored (out, in)
unless its module has an attribute `is_transposed`; where that is missing though it is stored (in, out) (Llama 4), A and B of each expert
change places, transposed. In a mixture of experts PEFT takes any module called ``down_proj``, a shared expert's too, for the routed ones,
so there every weight is named as a parameter.

GGUF is for llama.cpp and Ollama, and needs the extra `gguf`.

llama.cpp names tensors in its own words (`blk.3.ffn_down.weight`) and stores every weight as (out, in), whatever the checkpoint does;
factors of a weight W are `W.lora_a` (rank, in) and `W.lora_b` (out, rank), and the change is B A times `adapter.lora.alpha` over the
rank (ggml-org/llama.cpp, convert_lora_to_gguf.py and src/llama-adapter.cpp). With alpha equal to the rank the scale is 1.

A whole model is made from a GGUF of the base that is there already: its tokenizer, its settings and every tensor that does not change are
copied, so nothing of them has to be translated; the changed weights are W0 + dW of the
checkpoint's own W0, in 16 bits where that file has them in fewer.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from jaxtyping import Float
from safetensors.numpy import load, save

from patchhub.delta import Delta, LowRank, add, negative, norm, to_dense
from patchhub.errors import BaseError, RepositoryError, SettingsError
from patchhub.fsio import os_errors

CONFIG: Final = "adapter_config.json"
WEIGHTS: Final = "adapter_model.safetensors"
RANKS: Final = (8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that servers allocate buffers for (vLLM's ``max_lora_rank``)."""

EXACT: Final = 1e-6
"""Relative error below which an adapter counts as the state itself: what float32 factors can hold."""

_TAKING_ADAPTERS: Final = """
    apertus arcee cohere cohere2 cwm ernie4_5 exaone4 falcon_h1 gemma gemma2 gemma3 gemma3_text glm glm4 gpt_bigcode gpt_neox granite
    granite_swa hunyuan_v1_dense hyperclovax internlm3 iquestcoder jais2 llama minicpm3 ministral3 mistral nemotron olmo olmo2 olmo3 opt
    phi phi3 qwen2 qwen3 qwen3_5_text seed_oss smollm3 starcoder2 vaultgemma
"""
LORA_IN_VLLM: Final = frozenset(_TAKING_ADAPTERS.split())
"""Dense families, by transformers' ``model_type``, whose classes in vLLM 0.33 take LoRA adapters; gpt2, gptj, falcon and others do not."""

_PREFIX: Final = "base_model.model."
_NUMERICAL_RANK = 1e-7  # the share of a delta's norm that float32 factors lose anyway

Shapes = Mapping[str, tuple[int, int]]


@dataclass(frozen=True, eq=False)
class Adapter:
    """One low-rank delta per weight, all of rank `rank`, in float32, and the relative error of each."""

    factors: Mapping[str, LowRank]
    rank: int
    errors: Mapping[str, float]

    @property
    def error(self) -> float:
        """The largest relative error over the weights."""
        return max(self.errors.values(), default=0.0)


@dataclass(frozen=True)
class BaseName:
    """How the adapter names the model that it is for, whether that stores weights as (in, out), whether it is a mixture of experts, E
    of its stacked weights, and those of them that PEFT takes for stored the other way round."""

    model: str | None
    revision: str | None
    fan_in_fan_out: bool
    mixture: bool = False
    experts: Mapping[str, int] = field(default_factory=dict)
    turned: Collection[str] = ()


def make_adapter(
    state: Mapping[str, Sequence[Delta]], shapes: Shapes, *, tolerance: float, rank: int | None = None
) -> Adapter:
    """The adapter of a state: exact where a rank of `RANKS` can hold it, recompressed by QR and SVD where not.

    Args:
        state: the deltas of each weight, which are summed.
        shapes: (out, in) per weight.
        tolerance: the largest relative error (Frobenius) of a weight that is accepted.
        rank: take this rank instead of the smallest that is exact.

    Raises:
        RepositoryError: nothing changes, or no allowed rank comes within `tolerance`.
    """
    sums = {weight: add(deltas, shapes[weight]) for weight, deltas in sorted(state.items())}
    sums = {weight: total for weight, total in sums.items() if norm(total) > 0}
    if not sums:
        raise RepositoryError(
            "this state changes no weight, so there is no adapter of it", remedy="Use the base itself."
        )
    parts = {weight: _singular(total) for weight, total in sums.items()}
    needed = max(_numerical_rank(values) for _, values, _ in parts.values())
    chosen = rank or next((allowed for allowed in RANKS if allowed >= needed), RANKS[-1])
    factors = {weight: _padded(*part, rank=chosen) for weight, part in parts.items()}
    errors = {weight: _distance(factors[weight], total) for weight, total in sums.items()}
    worst = max(errors, key=errors.__getitem__)
    if errors[worst] > tolerance:
        raise RepositoryError(
            f"an adapter of rank {chosen} would change {worst} with a relative error of {errors[worst]:.1e} "
            f"(the state has rank {needed})",
            remedy="Accept it with --tolerance, or export a checkpoint.",
            weight=worst,
            error=errors[worst],
            rank=needed,
        )
    return Adapter(factors, chosen, errors)


def in_every_layer(adapter: Adapter, weights: Mapping[str, tuple[int, int]]) -> Adapter:
    """The adapter with factors of zeros for those of the weights that it lacks: some servers load no adapter of some layers only.

    Args:
        weights: (out, in) of each.
    """
    zeros = {
        weight: LowRank(np.zeros((rows, adapter.rank), np.float32), np.zeros((adapter.rank, columns), np.float32))
        for weight, (rows, columns) in weights.items()
    }
    return Adapter({**zeros, **adapter.factors}, adapter.rank, adapter.errors)


def adapter_files(adapter: Adapter, base: BaseName) -> dict[str, bytes]:
    """``adapter_config.json`` and ``adapter_model.safetensors``."""
    tensors: dict[str, np.ndarray] = {}
    parameters = sorted(adapter.factors) if base.mixture else []
    for weight, factor in adapter.factors.items():
        a, b, module = factor.A, factor.B, module_of(weight)
        if weight in base.experts:
            count, module = base.experts[weight], weight.rpartition(".")[0]
            a, b = a.reshape(adapter.rank, count, -1), np.broadcast_to(b[..., None], (*b.shape, count))
            if weight in base.turned:
                a, b = b.transpose(1, 2, 0), a.transpose(2, 0, 1)
            a, b = a.swapaxes(0, 1).reshape(count * adapter.rank, -1), b.reshape(len(b), -1)
        tensors[f"{_PREFIX}{module}.lora_A.weight"] = np.ascontiguousarray(a)
        tensors[f"{_PREFIX}{module}.lora_B.weight"] = np.ascontiguousarray(b)
    config: dict[str, Any] = {
        "alpha_pattern": {},
        "base_model_name_or_path": base.model,
        "bias": "none",
        "fan_in_fan_out": base.fan_in_fan_out,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": adapter.rank,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": adapter.rank,
        "rank_pattern": {},
        "revision": base.revision,
        "target_modules": [] if base.mixture else sorted(module_of(weight) for weight in adapter.factors),
        **({"target_parameters": parameters} if parameters else {}),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    return {CONFIG: text.encode("utf-8"), WEIGHTS: save(tensors, metadata={"format": "pt"})}


def deltas_as_vllm_reads(files: Mapping[str, bytes], turned: Collection[str] = ()) -> dict[str, LowRank]:
    """The delta of each weight under vLLM's rule: ``lora_alpha / r`` of the configuration, patterns ignored.

    Those of experts are read as PEFT does; ``turned`` as in `BaseName`.
    """
    config = json.loads(files[CONFIG])
    return _scaled(files, lambda rank: float(config["lora_alpha"]) / float(config["r"]), turned)


def deltas_as_llama_cpp_reads(files: Mapping[str, bytes], turned: Collection[str] = ()) -> dict[str, LowRank]:
    """The delta of each weight under llama.cpp's rule: ``lora_alpha`` over the tensor's own rank."""
    config = json.loads(files[CONFIG])
    return _scaled(files, lambda rank: float(config["lora_alpha"]) / rank, turned)


def check_adapter(
    files: Mapping[str, bytes], state: Mapping[str, Sequence[Delta]], shapes: Shapes, turned: Collection[str] = ()
) -> float:
    """Read written files back under both rules; the largest relative error against the state.

    A weight that the files lack counts as error 1.
    """
    worst = 0.0
    for read in (deltas_as_vllm_reads(files, turned), deltas_as_llama_cpp_reads(files, turned)):
        for weight, deltas in state.items():
            total = add(deltas, shapes[weight])
            if norm(total) > 0:
                worst = max(worst, _distance(read[weight], total) if weight in read else 1.0)
    return worst


def module_of(weight: str) -> str:
    """``transformer.h.3.mlp.c_proj`` of ``transformer.h.3.mlp.c_proj.weight``."""
    return weight.removesuffix(".weight")


def _scaled(files: Mapping[str, bytes], scale: Any, turned: Collection[str]) -> dict[str, LowRank]:
    tensors, config = load(files[WEIGHTS]), json.loads(files[CONFIG])
    stacked = {weight.rpartition(".")[0]: weight for weight in config.get("target_parameters", ())}
    found = {}
    for name in tensors:
        if name.endswith(".lora_A.weight"):
            module = name.removesuffix(".lora_A.weight")
            a, b = tensors[name], tensors[f"{module}.lora_B.weight"]
            weight = stacked.get(module.removeprefix(_PREFIX), module.removeprefix(_PREFIX) + ".weight")
            if weight in stacked.values() and not weight.endswith(".weight"):
                rank = int(config["r"])
                a, b = a.reshape(-1, rank, a.shape[1]).swapaxes(0, 1), b.reshape(len(b), rank, -1)
                if weight in turned:
                    a, b = b.transpose(1, 2, 0), a.transpose(2, 0, 1)
                a = a.reshape(rank, -1)
                b = np.where((b == b[..., :1]).all(), b[..., 0], np.float32(np.inf))  # all experts have one B
            found[weight] = LowRank(b * np.float32(scale(a.shape[0])), a)
    return found


def _singular(
    delta: Delta,
) -> tuple[Float[np.ndarray, "out k"], Float[np.ndarray, " k"], Float[np.ndarray, "k in"]]:
    """The singular value decomposition of a delta, in float64; of low-rank factors by QR of each, never of their product."""
    if isinstance(delta, LowRank) and delta.rank < min(delta.shape):
        left, left_r = np.linalg.qr(delta.B.astype(np.float64))
        right, right_r = np.linalg.qr(delta.A.T.astype(np.float64))
        u, values, vt = np.linalg.svd(left_r @ right_r.T)
        return left @ u, values, vt @ right.T
    u, values, vt = np.linalg.svd(to_dense(delta), full_matrices=False)
    return u, values, vt


def _numerical_rank(values: Float[np.ndarray, " k"]) -> int:
    """How many singular values are needed so that the rest is lost in float32 anyway."""
    tails = np.sqrt(np.cumsum(values[::-1] ** 2))[::-1]  # tails[i]: norm of values[i:]
    return int((tails > _NUMERICAL_RANK * tails[0]).sum())


def _padded(
    u: Float[np.ndarray, "out k"], values: Float[np.ndarray, " k"], vt: Float[np.ndarray, "k in"], *, rank: int
) -> LowRank:
    """The largest `rank` singular triples, split evenly between the factors, with zeros where there are fewer."""
    kept = min(rank, len(values))
    roots = np.sqrt(values[:kept])
    b = np.zeros((u.shape[0], rank), np.float32)
    a = np.zeros((rank, vt.shape[1]), np.float32)
    b[:, :kept], a[:kept] = u[:, :kept] * roots, roots[:, None] * vt[:kept]
    return LowRank(b, a)


def _distance(one: Delta, other: Delta) -> float:
    """|| one - other || / || other ||."""
    return norm(add([one, negative(other)], one.shape)) / norm(other)


_EXTRA: Final = "Install the extra that writes it: pip install 'patchhub[gguf]'."
_CONVERT: Final = "Write the whole model with `patchhub apply` and convert it with llama.cpp's convert_hf_to_gguf.py."
_ARCHITECTURES: Final[Mapping[str, str]] = {
    "cohere": "command-r",
    "cohere2": "cohere2",
    "exaone4": "exaone4",
    "falcon": "falcon",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3": "gemma3",
    "gemma3_text": "gemma3",
    "glm4": "glm4",
    "gpt2": "gpt2",
    "gpt_neox": "gptneox",
    "gptj": "gptj",
    "granite": "granite",
    "llama": "llama",
    "minicpm3": "minicpm3",
    "mistral": "llama",
    "olmo": "olmo",
    "olmo2": "olmo2",
    "phi": "phi2",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "smollm3": "smollm3",
    "stablelm": "stablelm",
    "starcoder2": "starcoder2",
}
"""What llama.cpp calls an architecture, by transformers' ``model_type``."""

_MOVED: Final = ("attn_q", "attn_k", "attn_qkv")
"""Weights whose rows llama.cpp's converter puts into another order for some architectures."""


def write_gguf(adapter: Adapter, model_type: str, layers: int, file: Path, *, base: str | None) -> None:
    """Write an adapter as GGUF; read it back with `read_gguf`.

    Args:
        layers: how many blocks the base has.
        base: the base's name on the Hub, if it has one.

    Raises:
        SettingsError: the extra is not there, llama.cpp does not know the architecture, or a weight has no plain counterpart there.
    """
    gguf = _library()
    names = names_in_llama_cpp(adapter.factors, model_type, layers)
    tensors = {names[weight]: factor for weight, factor in adapter.factors.items()}
    writer = gguf.GGUFWriter(str(file), _ARCHITECTURES[model_type])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(adapter.rank))
    writer.add_name(file.stem)
    if base is not None:
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, base.rpartition("/")[2])
        writer.add_base_model_repo_url(0, f"https://huggingface.co/{base}")
    for name, factor in sorted(tensors.items()):
        writer.add_tensor(f"{name}.lora_a", np.ascontiguousarray(factor.A, np.float32))
        writer.add_tensor(f"{name}.lora_b", np.ascontiguousarray(factor.B, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_gguf(file: Path) -> dict[str, LowRank]:
    """The change of each weight, by llama.cpp's name, under its rule: alpha over the rank of the factors, times B A."""
    reader = _library().GGUFReader(str(file))
    alpha = float(reader.fields["adapter.lora.alpha"].contents())
    tensors = {tensor.name: np.asarray(tensor.data, np.float32) for tensor in reader.tensors}
    found = {}
    for name, factor in tensors.items():
        if name.endswith(".lora_a"):
            weight = name.removesuffix(".lora_a")
            scaled = tensors[f"{weight}.lora_b"] * np.float32(alpha / factor.shape[0])
            found[weight] = LowRank(scaled, np.array(factor))
    return found


def names_in_llama_cpp(weights: Mapping[str, Any], model_type: str, layers: int) -> dict[str, str]:
    """What llama.cpp calls each weight.

    Raises:
        SettingsError: as in `write_gguf`.
    """
    gguf = _library()
    architecture = _ARCHITECTURES.get(model_type)
    if architecture is None:
        raise SettingsError(f"it is not known what llama.cpp calls a model of type {model_type!r}", remedy=_CONVERT)
    known = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(known[architecture], layers)
    return {weight: _name(names, weight, model_type) for weight in weights}


Weights = Mapping[str, tuple[Float[np.ndarray, "out in"], Float[np.ndarray, "out in"]]]
"""By llama.cpp's name: a weight of the base, and the same with the change."""

_NEAR: Final[Mapping[str, float]] = {"F32": 5e-3, "F16": 5e-3, "BF16": 5e-3, "Q8_0": 2e-2, "Q6_K": 5e-2}
"""How far a GGUF's weight may be from the base's (relative, Frobenius), by its type: rounding, not training; others may be `_FAR`."""
_FAR: Final = 0.35


def fuse_gguf(
    base: Path, out: Path, changed: Weights, model_type: str, layers: int, advance: Callable[[int], None]
) -> float:
    """Write a GGUF of the base anew with some weights changed; metadata, tokenizer and all other tensors are copied as they are.

    Args:
        changed: the weights that change, as the base has them and as they shall be.
        layers: how many blocks the base has.
        advance: called with the bytes that were written.

    Returns:
        the largest relative error of a changed weight, read back.

    Raises:
        BaseError: the file is no GGUF of this base, is one part of several, or cannot be read.
        SettingsError: a weight does not fit into 16 bits, or the extra is missing.
    """
    gguf = _library()
    try:
        reader = gguf.GGUFReader(str(base))
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise BaseError(f"{base} cannot be read as GGUF ({error})", remedy="Give a GGUF file of the base.") from None
    _check_base(reader, base, model_type, layers)
    replaced = {name: _replacement(reader, base, name, *pair) for name, pair in changed.items()}
    part = out.with_name(f"{out.name}.part")
    try:
        with os_errors(out):
            _copy(reader, part, replaced, advance)
            os.replace(part, out)
    finally:
        with suppress(OSError):
            part.unlink()
    written = {tensor.name: tensor for tensor in gguf.GGUFReader(str(out)).tensors}
    return max((_far(_values(written[name]), new) for name, (_, new) in changed.items()), default=0.0)


def _check_base(reader: Any, base: Path, model_type: str, layers: int) -> None:
    fields = reader.fields
    architecture = fields["general.architecture"].contents() if "general.architecture" in fields else None
    parts = int(fields["split.count"].contents()) if "split.count" in fields else 1
    if parts > 1:
        raise BaseError(
            f"{base} is one of {parts} files", remedy="Join them with llama.cpp's `llama-gguf-split --merge`."
        )
    there = fields.get(f"{architecture}.block_count")
    if architecture != _ARCHITECTURES.get(model_type) or there is None or int(there.contents()) != layers:
        found = f"{architecture!r} with {there.contents() if there else 'unknown'} blocks"
        raise BaseError(f"{base} is a model {found}, the base is of {model_type!r} with {layers}", remedy=_OF_BASE)


_OF_BASE: Final = "Give a GGUF of the base itself, in whatever precision."


def _replacement(reader: Any, base: Path, name: str, old: Any, new: Any) -> tuple[np.ndarray, Any]:
    """The bytes and the type of a changed tensor.

    Raises:
        BaseError: the file's tensor is missing, of another shape, or not the base's.
    """
    gguf = _library()
    tensor: Any = next((tensor for tensor in reader.tensors if tensor.name == name), None)
    there = _values(tensor) if tensor is not None else None
    if there is None or there.shape != old.shape:
        raise BaseError(f"{base} has no tensor {name} of shape {old.shape}", remedy=_OF_BASE, tensor=name)
    kind, apart = tensor.tensor_type.name, _far(there, old)
    if not apart <= _NEAR.get(kind, _FAR):
        raise BaseError(
            f"{name} of {base} is {apart:.2g} away from the base's: it is of another model",
            remedy=_OF_BASE,
            tensor=name,
        )
    plain = kind if kind in ("F32", "BF16") else "F16"
    if plain == "F16" and float(np.abs(new).max()) > float(np.finfo(np.float16).max):
        raise SettingsError(
            f"{name} does not fit into 16 bits", remedy="Give a GGUF of the base in float32 or bfloat16.", tensor=name
        )
    form = gguf.GGMLQuantizationType[plain]
    return np.ascontiguousarray(gguf.quants.quantize(np.ascontiguousarray(new, np.float32), form)), form


def _copy(
    reader: Any, out: Path, replaced: Mapping[str, tuple[np.ndarray, Any]], advance: Callable[[int], None]
) -> None:
    gguf = _library()
    writer = gguf.GGUFWriter(str(out), reader.fields["general.architecture"].contents(), endianess=reader.endianess)
    for key, stored in reader.fields.items():
        if key != "general.architecture" and not key.startswith("GGUF."):
            form = stored.types[0]
            inner = stored.types[-1] if form == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, stored.contents(), form, sub_type=inner)
    tensors = [(t.name, *replaced.get(t.name, (t.data, t.tensor_type))) for t in reader.tensors]
    for name, data, form in tensors:
        writer.add_tensor_info(name, data.shape, data.dtype, data.nbytes, form)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, data, _ in tensors:
        writer.write_tensor_data(data, tensor_endianess=reader.endianess)
        advance(data.nbytes)
    writer.close()


def _values(tensor: Any) -> Float[np.ndarray, "out in"]:
    """A tensor of a GGUF file in float32."""
    found: np.ndarray = _library().quants.dequantize(tensor.data, tensor.tensor_type)
    return found.astype(np.float32, copy=False)


def _far(one: Float[np.ndarray, "out in"], other: Float[np.ndarray, "out in"]) -> float:
    """|| one - other || / || other ||."""
    return float(np.linalg.norm(one - other) / (np.linalg.norm(other) or 1.0))


def known_to_llama_cpp(model_type: str) -> bool:
    """Whether llama.cpp's name of a family is known; asked without the extra."""
    return model_type in _ARCHITECTURES


def modelfile(base: str | None, adapter: str | None) -> str:
    """Ollama's description of the base with the adapter, or of a whole model alone: `ollama create NAME -f Modelfile`."""
    if adapter is None:
        return f"FROM ./{base}\n"
    about = "# FROM is the base as Ollama knows it: a name of its library, or the GGUF file of the same weights."
    return f"{about}\nFROM {base or 'BASE'}\nADAPTER ./{adapter}\n"


def _name(names: Any, weight: str, model_type: str) -> str:
    plain = module_of(weight).replace("model.language_model.", "model.").replace("language_model.", "")
    name = names.get_name(plain)
    if name is None or name.rpartition(".")[2] in _MOVED:
        raise SettingsError(
            f"{weight} has no plain counterpart in llama.cpp's form of a {model_type} model",
            remedy="Write a PEFT adapter with `patchhub export peft`, and convert it with llama.cpp's convert_lora_to_gguf.py.",
            weight=weight,
        )
    return f"{name}.weight"


def _library() -> Any:
    try:
        import gguf
    except ImportError:
        raise SettingsError("GGUF files cannot be written or read here", remedy=_EXTRA) from None
    return gguf
