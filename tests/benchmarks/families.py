"""Which causal language models of the installed transformers can be edited, and why the others cannot.

    python -m tests.benchmarks.families             # a table in the form of docs/models.md
    python -m tests.benchmarks.families NAME ...    # some families, with the whole reason

Each family is built tiny and with random weights, as the tests build it if it has a row, taken apart, and each of its layers is probed;
where it cannot be built so small, its structure alone is looked at, in the size of its default configuration, without weights. Nothing
is downloaded.
"""

from __future__ import annotations

import copy
import logging
import sys
import warnings
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

from patchhub.errors import UnsupportedModelError
from patchhub.models.architectures import additive_probe, describe
from patchhub.models.tracing import Stack
from tests.models.tiny_configs import SUPPORTED, tiny_config

TINY: dict[str, Any] = {
    "hidden_size": 32,
    "n_embd": 32,
    "d_model": 32,
    "intermediate_size": 80,
    "ffn_dim": 80,
    "n_inner": 80,
    "num_hidden_layers": 4,
    "num_layers": 4,
    "n_layer": 4,
    "n_layers": 4,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "max_seq_len": 64,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "rotary_dim": 4,
    "mamba_d_state": 8,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "mamba_n_groups": 1,
    "n_groups": 1,
    "mamba_d_ssm": 64,
    "mamba_expand": 2,
    "state_size": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
"""Of a tiny model, under every name that families have for it; a family gets those that its default configuration has."""

LARGEST = 20_000_000
"""Parameters of a model that is given numbers."""


@dataclass(frozen=True)
class Looked:
    """What was found of one family. ``checked`` is "random weights" or "structure"; ``reason`` is None where it can be edited."""

    family: str
    checked: str
    reason: str | None
    projections: tuple[str, ...] = ()


def tiny(config_class: Any) -> Any:
    """A tiny configuration of a family.

    Raises:
        Exception: of any kind, where the family does not take such numbers.
    """
    if config_class.model_type in SUPPORTED:
        return tiny_config(config_class.model_type)
    own = config_class()
    settings = {
        name: value
        for name, value in TINY.items()
        if isinstance(getattr(own, name, None), int | None) and hasattr(own, name)
    }
    if hasattr(own, "kv_lora_rank") or hasattr(own, "v_head_dim"):
        settings["num_key_value_heads"] = TINY["num_attention_heads"]
    for name in ("layer_types", "mlp_layer_types", "layers_block_type"):
        types = getattr(own, name, None)
        if types and not isinstance(getattr(config_class, name, None), property):
            kinds = sorted(set(types))
            settings[name] = [kinds[min(place, len(kinds) - 1)] for place in range(4)]
    return config_class(**settings)


def look(config_class: Any) -> Looked:
    """Build, take apart and probe one family."""
    family = config_class.model_type
    factory: Any = AutoModelForCausalLM
    try:
        config = tiny(config_class)
        with torch.device("meta"):
            size = sum(p.numel() for p in factory.from_config(copy.deepcopy(config)).parameters())
        if size > LARGEST:
            raise ValueError(f"{size} parameters")
        torch.manual_seed(0)
        model = factory.from_config(copy.deepcopy(config), dtype=torch.float32).eval()
    except Exception:  # any model's own code runs here
        config, model = None, None
    try:
        if model is None:
            found = describe(config_class())
            return Looked(family, "structure", None, paths(found))
        found = describe(model.config)
        stack = Stack(model, found)
        for layer in range(found.n_layers):
            additive_probe(stack.model, found, layer)
        return Looked(family, "random weights", None, paths(found))
    except UnsupportedModelError as error:
        reason = str(error.fields.get("reason") or error) if hasattr(error, "fields") else str(error)
        return Looked(family, "structure" if model is None else "random weights", reason)
    except Exception as error:  # as above
        return Looked(family, "nothing", f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")


def paths(found: Any) -> tuple[str, ...]:
    """The feed-forward projections of a family's layers, and those beside them."""
    return tuple(dict.fromkeys(p.path for p in (*found.feed_forward, *(p for p in found.beside if p))))


def main(wanted: list[str]) -> None:
    """Print the table."""
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    classes = {config.model_type: config for config in MODEL_FOR_CAUSAL_LM_MAPPING}
    found = []
    for name in sorted(wanted or classes):
        one = look(classes[name])
        found.append(one)
        reason = one.reason if wanted or one.reason is None else one.reason[:160]
        print(
            f"| {one.family} | {'refused: ' + reason if reason else ', '.join(one.projections)} | {one.checked} |",
            flush=True,
        )
    counts = Counter("accepted" if one.reason is None else "refused" for one in found)
    print(f"\n{len(found)} families: {counts['accepted']} accepted, {counts['refused']} refused")


if __name__ == "__main__":
    main(sys.argv[1:])
