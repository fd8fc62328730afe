"""Configurations of tiny models (width 32, 3 layers) of every family in the table, and of families that are refused."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig

_GPT = {
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
    "vocab_size": 96,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_ROTARY = {**_GPT, "rotary_dim": 4}
_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_NO_HEAD_DIM = {key: value for key, value in _LLAMA.items() if key != "head_dim"}
_BLOOM = {
    "hidden_size": 32,
    "n_layer": 3,
    "n_head": 4,
    "vocab_size": 96,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_EXPERTS = {**_LLAMA, "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_DEEPSEEK = {
    **{key: value for key, value in _EXPERTS.items() if key != "head_dim"},
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}

_MAMBA = {"mamba_d_state": 8, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_expand": 2}
_DELTA = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}

SUPPORTED: dict[str, dict[str, Any]] = {
    "gpt2": _GPT,
    "gpt_bigcode": _GPT,
    "gptj": _ROTARY,
    "codegen": _ROTARY,
    "gpt_neo": {
        "hidden_size": 32,
        "num_layers": 3,
        "num_heads": 4,
        "attention_types": [[["global", "local", "global"], 1]],
        "max_position_embeddings": 64,
        "vocab_size": 96,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
    "gpt_neox": _NO_HEAD_DIM,
    "bloom": _BLOOM,
    "falcon": {**_NO_HEAD_DIM, "ffn_hidden_size": 128},
    "mpt": {"d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": 64, "vocab_size": 96},
    "opt": {**_NO_HEAD_DIM, "ffn_dim": 80, "word_embed_proj_dim": 32},
    "phi": _NO_HEAD_DIM,
    "starcoder2": _NO_HEAD_DIM,
    "cohere": _NO_HEAD_DIM,
    "cohere2": _NO_HEAD_DIM,
    "exaone4": _NO_HEAD_DIM,
    "gemma": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3_text": _LLAMA,
    "glm": _LLAMA,
    "glm4": _LLAMA,
    "granite": {**_NO_HEAD_DIM, "residual_multiplier": 0.2},
    "llama": _LLAMA,
    "minicpm3": {
        **_NO_HEAD_DIM,
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
    },
    "ministral": {**_LLAMA, "layer_types": ["full_attention"] * 3},
    "mistral": _LLAMA,
    "olmo": _NO_HEAD_DIM,
    "olmo2": _NO_HEAD_DIM,
    "olmo3": _NO_HEAD_DIM,
    "phi3": _NO_HEAD_DIM,
    "qwen2": _NO_HEAD_DIM,
    "qwen3": _LLAMA,
    "smollm3": _NO_HEAD_DIM,
    "stablelm": _NO_HEAD_DIM,
    "deepseek_v2": {**_DEEPSEEK, "topk_method": "greedy"},
    "deepseek_v3": _DEEPSEEK,
    "glm4_moe": {**_DEEPSEEK, "head_dim": 8},
    "gpt_oss": {**_EXPERTS, "layer_types": ["full_attention"] * 3},
    "granitemoe": {**_EXPERTS, "residual_multiplier": 0.2},
    "llama4_text": _EXPERTS,
    "mixtral": _EXPERTS,
    "olmoe": _EXPERTS,
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 40},
    "qwen3_moe": _EXPERTS,
    "bamba": {**_NO_HEAD_DIM, **_MAMBA, "attn_layer_indices": [1]},
    "falcon_h1": {**_LLAMA, **_MAMBA, "mamba_d_ssm": 64},
    "granitemoehybrid": {
        **_EXPERTS,
        **_MAMBA,
        "layer_types": ["mamba", "attention", "mamba"],
        "shared_intermediate_size": 40,
    },
    "jamba": {
        **_EXPERTS,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "qwen3_5_text": {**_LLAMA, **_DELTA},
    "qwen3_5_moe_text": {**_EXPERTS, **_DELTA, "shared_expert_intermediate_size": 40},
    "qwen3_next": {**_EXPERTS, **_DELTA, "shared_expert_intermediate_size": 40},
}

_RECENT: dict[str, dict[str, Any]] = {
    "afmoe": {**_DEEPSEEK, "head_dim": 8, "num_shared_experts": 1, "num_dense_layers": 1},
    "apertus": _NO_HEAD_DIM,
    "arcee": _LLAMA,
    "axk1": _DEEPSEEK,
    "cwm": _LLAMA,
    "dbrx": {
        "d_model": 32,
        "n_layers": 3,
        "n_heads": 4,
        "max_seq_len": 64,
        "vocab_size": 96,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10_000.0},
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots1": {**_DEEPSEEK, "head_dim": 8},
    "ernie4_5": _LLAMA,
    "ernie4_5_moe": {
        **_EXPERTS,
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
    },
    "exaone_moe": {**_EXPERTS, "num_shared_experts": 1, "first_k_dense_replace": 1},
    "flex_olmo": {**_EXPERTS},
    "glm4_moe_lite": _DEEPSEEK,
    "hunyuan_v1_dense": _LLAMA,
    "hunyuan_v1_moe": {**_EXPERTS, "moe_topk": 2},
    "kimi_linear": {
        **_DEEPSEEK,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "linear_num_heads": 2,
        "linear_head_dim": 8,
    },
    "lfm2": {**_NO_HEAD_DIM, "layer_types": ["conv", "full_attention", "conv"], "block_multiple_of": 8},
    "lfm2_moe": {**_EXPERTS, "layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "mimo_v2_flash": {**_EXPERTS, "n_routed_experts": 4, "v_head_dim": 8},
    "minimax_m2": _EXPERTS,
    "ministral3": _LLAMA,
    "nemotron": _LLAMA,
    "olmo_hybrid": {**_NO_HEAD_DIM, **_DELTA},
    "phimoe": _EXPERTS,
    "seed_oss": _LLAMA,
}
RECENT = tuple(_RECENT)
SUPPORTED |= _RECENT

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("gemma4_text", _LLAMA, "no feed-forward projection"),
    ("opt", {**SUPPORTED["opt"], "do_layer_norm_before": False}, "final_layer_norm"),
    ("bart", {}, "encoder-decoder"),
    ("mamba", {"hidden_size": 32, "num_hidden_layers": 3, "vocab_size": 96}, "no feed-forward projection"),
    ("rwkv", {"hidden_size": 32, "num_hidden_layers": 3, "vocab_size": 96}, "blocks other than one attention"),
    ("llama", {**_LLAMA, "quantization_config": {"quant_method": "fp8"}}, "quantised"),
    ("vit", {}, "cannot be built as a causal language model"),
]


def tiny_config(family: str, **changes: Any) -> PreTrainedConfig:
    """The configuration of a tiny supported model."""
    return make_config(family, {**SUPPORTED[family], **changes})


def make_config(family: str, settings: dict[str, Any]) -> PreTrainedConfig:
    config: PreTrainedConfig = CONFIG_MAPPING[family](**settings)
    return config


def random_model(config: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> Any:
    factory: Any = AutoModelForCausalLM
    torch.manual_seed(0)
    return factory.from_config(config, dtype=dtype)
