"""Tiny random models and a tokenizer for them, made on the spot: every test that runs a model runs one of these.

The weights are drawn much larger than an initialisation would draw them, so that attention is not uniform, logits differ
by several units, and a mistake of one position, mask bit or norm shows at once.
"""

from __future__ import annotations

from functools import cache
from typing import Any, cast

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from patchhub.models.architectures import describe
from patchhub.models.tracing import Stack

VOCABULARY = 320
BOS, EOS = 0, 1
_PLACES = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": EOS, "vocab_size": VOCABULARY}
_GPT = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 96, **_PLACES}
_ROTARY = {
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 96,
    **_PLACES,
}
_GROUPED = {**_ROTARY, "num_key_value_heads": 2, "head_dim": 8}
_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}

SETTINGS: dict[str, dict[str, Any]] = {
    "gpt2": {**_GPT, **_NO_DROPOUT},
    "gptj": {**_GPT, **_NO_DROPOUT, "rotary_dim": 4},
    "gpt_neox": _ROTARY,
    "llama": _GROUPED,
    "qwen3": _GROUPED,
    "phi": {**_ROTARY, "num_key_value_heads": 4},
}
"""The families that every test of the editing core runs on; "mistral" with a short window is made where it is needed."""

FAMILIES = tuple(SETTINGS)

_CORPUS = [
    "The mother tongue of Danielle Darrieux is French. The mother tongue of Arend Lijphart is Dutch.",
    "The Space Needle is located in Seattle, in the United States. Lyon is a twin city of Milan and of Manila.",
    "What does the Eiffel Tower look like? Therefore it is in Paris. Because I think that you know it.",
]


@cache
def tiny_tokenizer(*, bos: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 320 tokens, as GPT-2's; with ``bos`` it puts a token in front of every text, as Llama's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.post_processor = (
        processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
        if bos
        else processors.ByteLevel(trim_offsets=False)
    )
    load: Any = PreTrainedTokenizerFast
    return cast(
        PreTrainedTokenizerFast, load(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    )


def tiny_model(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A random causal LM of 4 layers and width 32; the global random state is left as it was."""
    config = CONFIG_MAPPING[family](**{**SETTINGS.get(family, _GROUPED), **changes})
    factory: Any = AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = factory.from_config(config, dtype=dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        centre, spread = (1.0, 0.2) if "norm" in name or "ln_" in name or "layernorm" in name else (0.0, 0.2)
        parameter.data.copy_((centre if name.endswith("weight") else 0.0) + spread * noise)
    return model


def tiny_stack(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Stack:
    """The pieces of a `tiny_model`."""
    model = tiny_model(family, seed=seed, dtype=dtype, **changes)
    return Stack(model, describe(model.config))
