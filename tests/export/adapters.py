"""Kinds of adapters, and what `import` does with each: the table of docs/hub.md is written from here (`python -m tests.docs`)."""

from __future__ import annotations

from typing import Any

ADAPTED: dict[str, dict[str, Any]] = {
    "plain": {},
    "rank-stabilised (`use_rslora`)": {"use_rslora": True},
    "`alpha_pattern`, `rank_pattern`": {
        "alpha_pattern": {"layers.1.mlp.down_proj": 2, "^model.layers.2.mlp.down_proj": 5, "^layers.3": 9},
        "rank_pattern": {"layers.(1|3).mlp": 2, "layers.1.mlp.down_proj": 2},
    },
    "`layers_to_transform`": {"layers_to_transform": [1, 2], "layers_pattern": "layers"},
    "`exclude_modules`": {"exclude_modules": r".*\.1\.mlp\.down_proj"},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal", "r": 4},
    "MiCA": {"init_lora_weights": "mica"},
    "EVA": {"init_lora_weights": "eva", "eva_config": {}},
    "dropout": {"lora_dropout": 0.3},
    "DoRA (`use_dora`)": {"use_dora": True},
    "DoRA of embeddings": {"use_dora": True, "target_modules": ["embed_tokens", "q_proj"]},
    "biases of B (`lora_bias`), where the base has biases": {"lora_bias": True, "target_modules": ["q_proj", "k_proj"]},
    "single tokens (`trainable_token_indices`)": {"trainable_token_indices": [200, 3, 17]},
    "single tokens of embedding and head": {"trainable_token_indices": {"embed_tokens": [5, 17], "lm_head": [9, 5]}},
    "biases (`bias`)": {"bias": "all", "target_modules": ["q_proj", "down_proj"]},
    "embeddings, where the head is another tensor": {"target_modules": ["embed_tokens", "down_proj"]},
    "head, where the embedding is another tensor": {"target_modules": ["lm_head", "q_proj"]},
    "whole modules (`modules_to_save`): embeddings and head that are two tensors, norms, others": {
        "modules_to_save": ["embed_tokens", "lm_head", "norm", "up_proj"],
        "target_modules": ["down_proj"],
    },
}
"""Kinds of LoRA that are imported, as the options that PEFT makes them with."""

KINDS = """
ADALORA ADAMSS ADAPTION_PROMPT BEFT BOFT C3A CARTRIDGE CPT DEFT DELORA FOURIERFT FROD GLORA GRALORA HIRA HRA IA3 LILY LN_TUNING LOHA
LOKR MISS MULTITASK_PROMPT_TUNING OFT OSF P_TUNING PEANUT POLY PREFIX_TUNING PROMPT_TUNING PSOFT PVERA RANDLORA ROAD SHADOW SHIRA
SUPERTUNING TINYLORA TRAINABLE_TOKENS UNILORA VBLORA VERA WAVEFT XLORA
""".split()  # noqa: SIM905
"""Every other kind of adapter that PEFT 0.21 makes: none is base + scale B A."""

REFUSED: dict[str, tuple[str, Any]] = {
    "PiSSA": ("init_lora_weights", "pissa"),
    "PiSSA by fast SVD": ("init_lora_weights", "pissa_niter_4"),
    "OLoRA": ("init_lora_weights", "olora"),
    "CorDA": ("init_lora_weights", "corda"),
    "LoftQ": ("init_lora_weights", "loftq"),
    "LoRA-GA": ("init_lora_weights", "lora_ga"),
    "VeLoRA": ("velora_config", {"num_groups": 4}),
    "KaSA": ("kasa_config", {}),
    "activated LoRA": ("alora_invocation_tokens", [7, 9]),
    "Arrow": ("arrow_config", {}),
    "QALoRA": ("use_qalora", True),
    "BD-LoRA": ("use_bdlora", {"nblocks": 2}),
    "MonteCLoRA": ("monteclora_config", {}),
    "replicated layers": ("layer_replication", [[0, 2], [1, 4]]),
    "parameters": ("target_parameters", ["mlp.down_proj.weight"]),
    "tied weights": ("ensure_weight_tying", True),
    "Megatron": ("megatron_config", {"tensor_model_parallel_size": 2}),
    "sequence classification": ("task_type", "SEQ_CLS"),
    **{kind: ("peft_type", kind) for kind in KINDS},
}
"""Kinds of adapter that are refused: the field that says what they are, and a value of it."""


def table() -> str:
    """Every kind, as docs/hub.md lists it; PEFT's other kinds share a row."""
    rows = [f"| {kind} | imported |" for kind in ADAPTED]
    rows += [f"| {kind} | refused: `{field}` |" for kind, (field, _) in REFUSED.items() if kind not in KINDS]
    rows.append(f"| {', '.join(KINDS)} | refused: `peft_type` |")
    return "\n".join(["| adapter | import |", "|---|---|", *rows]) + "\n"
