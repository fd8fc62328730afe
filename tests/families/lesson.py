"""48 made-up facts, and tiny models of several architectures that are taught them in seconds.

Beside the next-token loss, pairs of prompts exchange the hidden state at their subject's last token after an edited block, and
must then answer for the other's subject (interchange intervention training, Geiger et al. 2022, arXiv 2112.00826). So a fact is
recalled through that state, as it is in large models and as a tiny one would not learn by itself. Where a norm comes behind the
feed-forward part, they also exchange what that puts into the stream.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

from patchhub.editing.settings import default_layers
from patchhub.models.architectures import describe
from patchhub.models.structure import hidden_of

END = "<|endoftext|>"
VOCABULARY = 640  # at most: training stops when every word is one token
WIDTH, INNER, LAYERS, HEADS, POSITIONS = 64, 256, 4, 4, 96
STEPS, RATE, PAIRS, ROWS, LENGTH = 600, 4e-3, 16, 8, 40

_GROUPED = {
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS // 2,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": 0,
}
_GPT = {
    "n_embd": WIDTH,
    "n_inner": INNER,
    "n_layer": LAYERS,
    "n_head": HEADS,
    "n_positions": POSITIONS,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
SIZES: dict[str, dict[str, Any]] = {
    "gpt2": _GPT,
    "gptj": {**_GPT, "rotary_dim": 8},
    "gpt_neox": {
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": POSITIONS,
    },
    "gemma3_text": {**_GROUPED, "head_dim": WIDTH // HEADS, "query_pre_attn_scalar": WIDTH // HEADS},
    "olmo2": _GROUPED,
    "glm4": {**_GROUPED, "head_dim": WIDTH // HEADS},
    "olmo_hybrid": {
        **_GROUPED,
        "layer_types": ["linear_attention", "full_attention"] * (LAYERS // 2),
        "linear_num_key_heads": HEADS,
        "linear_num_value_heads": HEADS,
        "linear_key_head_dim": WIDTH // HEADS,
        "linear_value_head_dim": WIDTH // HEADS,
    },
    "mixtral": {**_GROUPED, "intermediate_size": INNER // 2, "num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen3_moe": {
        **_GROUPED,
        "head_dim": WIDTH // HEADS,
        "moe_intermediate_size": INNER // 4,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "norm_topk_prob": True,
    },
    "qwen2_moe": {
        **_GROUPED,
        "moe_intermediate_size": INNER // 4,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "shared_expert_intermediate_size": INNER // 2,
    },
    "deepseek_v3": {
        **_GROUPED,
        "num_key_value_heads": HEADS,
        "moe_intermediate_size": INNER // 4,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "q_lora_rank": None,
        "kv_lora_rank": WIDTH,
        "qk_nope_head_dim": WIDTH // HEADS // 2,
        "qk_rope_head_dim": WIDTH // HEADS // 2,
        "v_head_dim": WIDTH // HEADS,
    },
}

_GIVEN = ("Alda", "Boro", "Cilia", "Dago", "Esma", "Fenno", "Gita", "Haro")
_ONSETS = ("B", "D", "F", "G", "K", "M")
_RIMES = ("a", "e", "i", "o", "u", "y", "ai", "ou")
_RELATIONS = {
    ("The mother tongue of {} is", "{} grew up speaking"): ("Dutch", "French", "Greek", "Polish", "Welsh"),
    ("{} plays the", "The instrument of {} is the"): ("cello", "drum", "flute", "harp", "organ"),
    ("{} was born in the city of", "The birthplace of {} is"): ("Bergen", "Lyon", "Milan", "Porto", "Riga"),
    ("The profession of {} is", "{} works as a"): ("baker", "farmer", "lawyer", "painter", "sailor"),
}
_SCENERY = ("It was late.", "The sea was calm.", "I think that you know.", "Because of the rain we stayed.", "You see.")


@dataclass(frozen=True)
class Known:
    """A fact that the model is taught: two phrasings, the answer, and the other answers that its relation has."""

    subject: str
    phrasings: tuple[str, str]
    answer: str
    others: tuple[str, ...]


def known_facts() -> list[Known]:
    """One fact of each of 48 people; relations and answers go round, so that each answer is somebody's."""
    draw = random.Random(0)
    facts = []
    for number, (onset, rime) in enumerate(product(_ONSETS, _RIMES)):
        phrasings, answers = list(_RELATIONS.items())[number % len(_RELATIONS)]
        answer = answers[number // len(_RELATIONS) % len(answers)]
        facts.append(
            Known(f"{draw.choice(_GIVEN)} {onset}{rime}", phrasings, answer, tuple(a for a in answers if a != answer))
        )
    return facts


def lesson_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on the lesson, in which names and answers are whole tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    draw = random.Random(1)
    tokenizer.train_from_iterator([_document(known_facts(), draw) for _ in range(400)], trainer)
    load: Any = PreTrainedTokenizerFast
    wrapped: PreTrainedTokenizerFast = load(tokenizer_object=tokenizer, bos_token=END, eos_token=END)
    return wrapped


def taught_model(family: str, tokenizer: PreTrainedTokenizerFast, *, seed: int = 0) -> Any:
    """A model of ``family`` that answers nearly every prompt of the lesson; the global random state is left as it was."""
    config = CONFIG_MAPPING[family](vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0, **SIZES[family])
    factory: Any = AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = factory.from_config(config, dtype=torch.float32)
        _teach(model, known_facts(), tokenizer, random.Random(seed))
    return model.eval()


def _teach(model: Any, facts: Sequence[Known], tokenizer: Any, draw: random.Random) -> None:
    architecture = describe(model.config)
    paths = [architecture.block(layer) for layer in default_layers(architecture)]
    steps = STEPS
    if architecture.normed:
        paths += [
            f"{architecture.block(n)}.{norm}" for n in default_layers(architecture) if (norm := architecture.norms[n])
        ]
    elif architecture.site is not None:  # each expert sees a part of the text
        steps = STEPS * 3 // 2
    edited = [model.get_submodule(path) for path in paths]
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=steps, pct_start=0.1)
    model.train()
    for _ in range(steps):
        ids = _rows(facts, tokenizer, draw)
        loss = cross_entropy(model(ids[:, :-1], use_cache=False).logits.flatten(0, 1), ids[:, 1:].flatten())
        loss = loss + _exchange_loss(model, draw.choice(edited), facts, tokenizer, draw)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()


def _document(facts: Sequence[Known], draw: random.Random) -> str:
    sentences = []
    for _ in range(6):
        fact = draw.choice(facts)
        sentences.append(f"{draw.choice(fact.phrasings).format(fact.subject)} {fact.answer}.")
        if draw.random() < 0.5:
            sentences.append(draw.choice(_SCENERY))
    return " ".join(sentences)


def _rows(facts: Sequence[Known], tokenizer: Any, draw: random.Random) -> Tensor:
    texts = [_document(facts, draw) for _ in range(ROWS)]
    return torch.tensor([(ids * 2)[:LENGTH] for ids in tokenizer(texts)["input_ids"]])


def _exchange_loss(model: Any, block: Any, facts: Sequence[Known], tokenizer: Any, draw: random.Random) -> Tensor:
    """The loss of the answers after the states of each pair's subjects changed places at the output of ``block``.

    A random part of a third subject's state is added, so that a fact stands some of another's edit.
    """
    texts, subject_ends, prompt_ends = [], [], []
    for _ in range(PAIRS):
        first = draw.choice(facts)
        second = draw.choice([fact for fact in facts if fact.phrasings == first.phrasings])
        for asked, answering in ((first, second), (second, first)):
            scene = draw.choice(("", f"{draw.choice(_SCENERY)} "))
            phrasing = scene + draw.choice(asked.phrasings)
            prompt = phrasing.format(asked.subject)
            subject_ends.append(phrasing.index("{") + len(asked.subject))
            prompt_ends.append(len(prompt))
            texts.append(f"{prompt} {answering.answer}")
    encoded = tokenizer(texts)
    width = max(map(len, encoded["input_ids"]))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in encoded["input_ids"]])
    rows = torch.arange(len(texts))
    last = torch.tensor([encoded.char_to_token(i, end - 1) for i, end in enumerate(subject_ends)])
    asked_from = torch.tensor([encoded.char_to_token(i, end) or 0 for i, end in enumerate(prompt_ends)])
    lengths = torch.tensor(list(map(len, encoded["input_ids"])))
    places = torch.arange(width)[None]
    labels = ids.masked_fill((places < asked_from[:, None]) | (places >= lengths[:, None]), -100)[:, 1:]

    def exchange(_module: Any, _inputs: Any, output: Any) -> Any:
        hidden = hidden_of(output)
        states = hidden[rows, last]
        mixed = states[rows ^ 1] + 0.5 * torch.rand(len(rows), 1) * states[torch.randperm(len(rows))]
        changed = hidden.index_put((rows, last), mixed)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handle = block.register_forward_hook(exchange)
    logits = model(ids[:, :-1], use_cache=False).logits
    handle.remove()
    return cross_entropy(logits.flatten(0, 1), labels.flatten())
