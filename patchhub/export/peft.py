"""A state as a PEFT LoRA adapter, in the one form that PEFT, vLLM, SGLang and llama.cpp scale alike. NumPy only.

PEFT scales each module by ``alpha_i / r_i``, vLLM by the one ``lora_alpha / r`` of the configuration, llama.cpp by
``lora_alpha`` over the rank of each tensor. They agree where every module has the same rank r, ``lora_alpha = r``, and
there are no patterns and no rsLoRA: so all factors are padded with zeros to one rank, and the scale is 1.

The experts of a layer are a parameter, not a module (``target_parameters``): PEFT reads lora_A (E r, in) as the E blocks of A and lora_B
(out, r E) as B of each expert, expert by expert in the last place. Here all experts have one B. In a mixture of experts PEFT takes
any module called ``down_proj``, a shared expert's too, for the routed ones, so there every weight is named as a parameter.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from jaxtyping import Float
from safetensors.numpy import load, save

from patchhub.delta import Delta, LowRank, add, negative, norm, to_dense
from patchhub.errors import RepositoryError

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
    """How the adapter names the model that it is for, whether that stores weights as (in, out), whether it is a mixture of experts, and
    E of its stacked weights."""

    model: str | None
    revision: str | None
    fan_in_fan_out: bool
    mixture: bool = False
    experts: Mapping[str, int] = field(default_factory=dict)


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
            a = a.reshape(adapter.rank, count, -1).swapaxes(0, 1).reshape(count * adapter.rank, -1)
            b = np.repeat(b, count, axis=1)
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


def deltas_as_vllm_reads(files: Mapping[str, bytes]) -> dict[str, LowRank]:
    """The delta of each weight under vLLM's rule: ``lora_alpha / r`` of the configuration, patterns ignored.

    Those of experts are read as PEFT does.
    """
    config = json.loads(files[CONFIG])
    return _scaled(files, lambda rank: float(config["lora_alpha"]) / float(config["r"]))


def deltas_as_llama_cpp_reads(files: Mapping[str, bytes]) -> dict[str, LowRank]:
    """The delta of each weight under llama.cpp's rule: ``lora_alpha`` over the tensor's own rank."""
    config = json.loads(files[CONFIG])
    return _scaled(files, lambda rank: float(config["lora_alpha"]) / rank)


def check_adapter(files: Mapping[str, bytes], state: Mapping[str, Sequence[Delta]], shapes: Shapes) -> float:
    """Read written files back under both rules; the largest relative error against the state.

    A weight that the files lack counts as error 1.
    """
    worst = 0.0
    for read in (deltas_as_vllm_reads(files), deltas_as_llama_cpp_reads(files)):
        for weight, deltas in state.items():
            total = add(deltas, shapes[weight])
            if norm(total) > 0:
                worst = max(worst, _distance(read[weight], total) if weight in read else 1.0)
    return worst


def module_of(weight: str) -> str:
    """``transformer.h.3.mlp.c_proj`` of ``transformer.h.3.mlp.c_proj.weight``."""
    return weight.removesuffix(".weight")


def _scaled(files: Mapping[str, bytes], scale: Any) -> dict[str, LowRank]:
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
                a = a.reshape(-1, rank, a.shape[1]).swapaxes(0, 1).reshape(rank, -1)
                b = b.reshape(len(b), rank, -1)
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
