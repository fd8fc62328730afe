"""Tiny random models and a tokenizer with tokens of every length, so that numbers depend on every position."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

CORPUS = ["The capital of France is Paris, and the capital of Spain is Madrid.", "Zoë Kravitz speaks English in 東京."]
VOCABULARY = 300
POSITIONS = 96


def train(special: str | None) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<s>"]
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if special:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


def gpt2() -> GPT2LMHeadModel:
    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": POSITIONS, "vocab_size": VOCABULARY}
    return GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.3, bos_token_id=None, eos_token_id=None))


LLAMA = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": POSITIONS,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": None,
}


def llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**LLAMA))


def mistral() -> MistralForCausalLM:
    """Reads only the last six positions: padding inside the window would change its numbers."""
    return MistralForCausalLM(MistralConfig(**LLAMA, sliding_window=6))


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Tiny models are ten times slower on threads that wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


BUILDERS = {"gpt2": (gpt2, None), "llama": (llama, "<s>"), "mistral": (mistral, "<s>")}


@pytest.fixture(scope="session", params=BUILDERS)
def model_and_tokenizer(request):
    """A float64 model in evaluation mode, with the tokenizer that goes with it."""
    build, special = BUILDERS[request.param]
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = build().double().eval()
    return model, train(special)


@pytest.fixture(scope="session")
def learned_model_and_tokenizer():
    """A GPT-2 that knows one sentence by heart."""
    tokenizer = train(None)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = gpt2().eval()  # without dropout: the same model whatever ran before
    ids = torch.tensor([tokenizer(CORPUS[0]).input_ids])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    return model, tokenizer
