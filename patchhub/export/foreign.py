"""Changes that other programs made, as deltas: a PEFT LoRA adapter, or a full difference of two weights. NumPy only."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.numpy import load_file

from patchhub.delta import Delta, Dense, LowRank, from_factors, from_sparse, norm
from patchhub.errors import RequestError
from patchhub.export.peft import CONFIG, WEIGHTS, Shapes

_NAME: Final = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<part>[AB])\.weight")
_REMEDY: Final = "Only plain LoRA adapters in safetensors can be imported."
_LIMIT: Final = 1 << 20  # bytes of a configuration
_SPARSE: Final = 0.5  # below this share of values that changed, a mask and values are smaller than the matrix


def read_adapter(folder: Path, shapes: Shapes) -> dict[str, Delta]:
    """The deltas of a PEFT LoRA adapter, scaled as PEFT scales them (``alpha_i / r_i``, with rsLoRA ``alpha_i / sqrt(r_i)``).

    Args:
        folder: holds ``adapter_config.json`` and ``adapter_model.safetensors``; nothing is unpickled.
        shapes: (out, in) of each weight that may be changed.

    Raises:
        RequestError: it is no plain LoRA, it changes other modules, or its tensors are malformed.
    """
    config = _read_config(folder / CONFIG)
    pairs: dict[str, dict[str, np.ndarray]] = {}
    for name, array in _read_tensors(folder / WEIGHTS).items():
        match = _NAME.fullmatch(name)
        weight = f"{match['module']}.weight" if match else name
        if match is None or weight not in shapes:
            raise _refusal(folder, f"it changes {weight}, which patchhub does not edit", tensor=name)
        pairs.setdefault(weight, {})[match["part"]] = array
    deltas: dict[str, Delta] = {}
    for weight, parts in sorted(pairs.items()):
        out, inner = shapes[weight]
        rank = len(parts["A"]) if parts.keys() == {"A", "B"} and parts["A"].ndim == 2 else -1
        if rank < 1 or parts["A"].shape != (rank, inner) or parts["B"].shape != (out, rank):
            raise _refusal(folder, f"its factors of {weight} are missing or do not fit {(out, inner)}")
        factors = [part.astype(np.float64) for part in (parts["B"], parts["A"])]
        if not all(bool(np.isfinite(factor).all()) for factor in factors):
            raise _refusal(folder, f"its factors of {weight} are not finite")
        deltas[weight] = from_factors(factors[0] * _scale(config, weight.removesuffix(".weight"), rank), factors[1])
    return deltas


def from_difference(change: Float[np.ndarray, "out in"], tolerance: float) -> tuple[Delta, str, float]:
    """A weight's change in its smallest form: (delta, name of the form, relative error).

    Sparse where at most half of the values changed and that is smaller; low rank where the singular values that are
    left out have at most `tolerance` of the norm and that is smaller; dense otherwise.
    """
    out, inner = change.shape
    u, values, vt = np.linalg.svd(change.astype(np.float64), full_matrices=False)
    tails = np.append(np.sqrt(np.cumsum(values[::-1] ** 2))[::-1], 0.0)
    rank = int((tails > tolerance * tails[0]).sum())
    nonzero = int(np.count_nonzero(change))
    low_cost, sparse_cost = rank * (out + inner), nonzero + out * inner / 32
    if nonzero <= _SPARSE * change.size and sparse_cost < low_cost:
        return from_sparse(change.astype(np.float32)), "sparse", 0.0
    if low_cost < change.size:
        factors = from_factors(u[:, :rank] * values[:rank], vt[:rank])
        return factors, f"rank {rank}", float(tails[rank] / tails[0])
    return Dense(change.astype(np.float32)), "dense", 0.0


def form_of(delta: Delta) -> str:
    """A delta's form in words."""
    if isinstance(delta, LowRank):
        return f"rank {delta.rank}"
    return "dense" if isinstance(delta, Dense) else "sparse"


def is_nothing(delta: Delta) -> bool:
    return norm(delta) == 0


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    alpha = next(
        (value for key, value in config["alpha_pattern"].items() if _matches(key, module)), config["lora_alpha"]
    )
    return float(alpha) / (math.sqrt(rank) if config["use_rslora"] else rank)


def _matches(pattern: str, module: str) -> bool:
    """As PEFT matches the keys of its patterns: the whole name, or its end after a dot."""
    return _expression(pattern).fullmatch(module) is not None


def _expression(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({pattern.lstrip('^')})$")


def _read_config(path: Path) -> dict[str, Any]:
    try:
        data = path.read_bytes()[: _LIMIT + 1]
        config = json.loads(data) if len(data) <= _LIMIT else None
    except (OSError, ValueError, RecursionError) as error:
        raise _refusal(path, f"it cannot be read ({error})") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise _refusal(path, "it is not the configuration of a LoRA adapter")
    for field in ("use_dora", "lora_bias", "modules_to_save", "layer_replication", "trainable_token_indices"):
        if config.get(field):
            raise _refusal(path, f"it uses {field}")
    if config.get("bias", "none") != "none":
        raise _refusal(path, "it changes biases")
    patterns, alpha = config.get("alpha_pattern") or {}, config.get("lora_alpha")
    numbers = [alpha, *patterns.values()] if isinstance(patterns, dict) else [None]
    if not all(isinstance(number, int | float) and math.isfinite(number) for number in numbers):
        raise _refusal(path, "its lora_alpha or alpha_pattern is malformed")
    try:
        for pattern in patterns:
            _expression(pattern)
    except re.error as error:
        raise _refusal(path, f"its alpha_pattern is malformed ({error})") from error
    return {"lora_alpha": alpha, "alpha_pattern": patterns, "use_rslora": bool(config.get("use_rslora"))}


def _read_tensors(path: Path) -> dict[str, np.ndarray]:
    try:
        found: dict[str, np.ndarray] = load_file(path)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _refusal(path, f"it cannot be read as float32 or float16 safetensors ({error})") from error
    return found


def _refusal(path: Path, reason: str, **facts: Any) -> RequestError:
    return RequestError(f"{path} cannot be imported: {reason}", remedy=_REMEDY, path=str(path), **facts)
