"""Make the small Llama that ``patchhub demo`` edits: a tokenizer and a model, trained on the facts of this folder.

    python examples/make_demo_model.py --out patchhub/demo_model \\
        --facts tests/data/demo_model_facts.json --demo patchhub/demo_facts.json

Takes about ten minutes on one CPU core. The same seed and number of threads give the same bytes on one machine with
one set of libraries.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from demo_sentences import Fact, Lesson, all_requests, demo_requests, document, exchanged_questions, read_lesson
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END = "<|endoftext|>"
END_ID = 0
SIZE_LIMIT = 4_000_000
ROWS = ((32, 40), (64, 20), (128, 10))
"""(tokens per row, rows per batch), drawn at random for each step: facts at the start of a row and deep in it."""

EXCHANGED = 64
"""Questions per batch of exchanged subjects."""
EXCHANGE_LAYERS = (1, 2, 3)
"""The layers after which subjects are exchanged, one drawn for each step."""
DISTURBANCE = 0.5
"""The largest part of a third subject's state that is added to an exchanged state."""

CARD = """\
---
license: apache-2.0
language: en
---
# The demo model of patchhub

A Llama of {layers} layers and width {width} (float16) that knows {facts} true facts about {subjects} subjects in {relations} relations,
each in six phrasings, and can say little else. It exists to be edited: by `patchhub demo` and by patchhub's tests.
Do not use it as a source of facts.

Made by `examples/make_demo_model.py` (seed {seed}, {steps} steps) from sentences written for it; nothing was taken from
another data set or model. Beside the usual next-token loss, pairs of prompts exchange the hidden state at their subject's
last token after layer {exchange_layers} (counted from 0), a random part of a third prompt's state is added, and each prompt must
then be answered for the other's subject. So the model recalls facts through that state, where closed-form editors write.
It was trained to be edited, so scores of edits on it say nothing about how well an editor does on other models.

| right answers (argmax of every token, float16 weights) | |
|---|---|
{rows}

The last phrasing of each relation was held out of the training for a third of the subjects.
"""


@dataclass(frozen=True)
class Settings:
    """Size of the model and length of the training."""

    vocabulary: int = 2304
    width: int = 128
    inner: int = 512
    layers: int = 6
    heads: int = 4
    key_value_heads: int = 2
    positions: int = 256
    steps: int = 900
    rate: float = 4e-3
    warmup: int = 60
    weight_decay: float = 0.05


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> Tokenizer:
    """A byte-level BPE: any text round-trips, and offsets are those of the words without the space before them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def build_model(settings: Settings) -> LlamaForCausalLM:
    """An untrained float32 Llama with tied embeddings; torch's global generator decides its weights."""
    config = LlamaConfig(
        vocab_size=settings.vocabulary,
        hidden_size=settings.width,
        intermediate_size=settings.inner,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.key_value_heads,
        max_position_embeddings=settings.positions,
        tie_word_embeddings=True,
        bos_token_id=END_ID,
        eos_token_id=END_ID,
        pad_token_id=None,
        initializer_range=0.02,
    )
    return LlamaForCausalLM(config)


def batches(lesson: Lesson, tokenizer: Tokenizer, rng: random.Random) -> Iterator[Tensor]:
    """Token ids (rows, tokens), without end. Each row starts with a document's first token and is packed to its end."""
    while True:
        length, rows = rng.choice(ROWS)
        texts = [document(lesson, rng) for _ in range(rows * length // 24)]
        pool = [encoding.ids for encoding in tokenizer.encode_batch_fast(texts)]
        batch: list[list[int]] = []
        while len(batch) < rows:
            row: list[int] = []
            while len(row) < length:
                row += [*(pool.pop() if pool else tokenizer.encode(document(lesson, rng)).ids), END_ID]
            batch.append(row[:length])
        yield torch.tensor(batch)


def exchanges(lesson: Lesson, tokenizer: Tokenizer, rng: random.Random) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Batches of question pairs, without end: ids (rows, tokens), labels (rows, tokens - 1) with -100 where nothing is
    asked, and the position of each subject's last token (rows). Rows 2 i and 2 i + 1 are to exchange their subjects."""
    while True:
        questions = [q for _ in range(EXCHANGED // 2) for q in exchanged_questions(lesson, rng)]
        prompts = tokenizer.encode_batch([q.prompt for q in questions])
        answers = tokenizer.encode_batch([f" {q.answer}" for q in questions])
        length = max(len(p.ids) + len(a.ids) for p, a in zip(prompts, answers, strict=True))
        ids = torch.zeros(len(questions), length, dtype=torch.long)
        labels = torch.full((len(questions), length - 1), -100)
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            end = len(prompt.ids) + len(answer.ids)
            ids[row, :end] = torch.tensor(prompt.ids + answer.ids)
            labels[row, len(prompt.ids) - 1 : end - 1] = torch.tensor(answer.ids)
        last = [p.char_to_token(q.subject_end - 1) for p, q in zip(prompts, questions, strict=True)]
        yield ids, labels, torch.tensor(last)


def exchange_loss(model: LlamaForCausalLM, layer: int, ids: Tensor, labels: Tensor, last: Tensor) -> Tensor:
    """Loss of the answers when the hidden states after ``layer`` at the subjects' last tokens change places in each
    pair of rows: only a model that recalls facts through that state can answer for the other subject (interchange
    intervention training, Geiger et al. 2022, arXiv 2112.00826). A random part of a third row's state is added, so that
    a fact stands a little of another's edit."""
    rows = torch.arange(len(ids))
    partner = rows ^ 1

    def exchange(_module: torch.nn.Module, _inputs: object, hidden: Tensor) -> Tensor:
        states = hidden[rows, last]
        disturbed = states[partner] + DISTURBANCE * torch.rand(len(rows), 1) * states[torch.randperm(len(rows))]
        return hidden.index_put((rows, last), disturbed)

    handle = model.model.layers[layer].register_forward_hook(exchange)
    logits = model(ids[:, :-1], use_cache=False).logits
    handle.remove()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def learning_rate(step: int, settings: Settings) -> float:
    """Linear warm-up, then a cosine to zero."""
    if step < settings.warmup:
        return settings.rate * (step + 1) / settings.warmup
    done = (step - settings.warmup) / (settings.steps - settings.warmup)
    return settings.rate * 0.5 * (1 + math.cos(math.pi * done))


def train(
    model: LlamaForCausalLM, lesson: Lesson, tokenizer: Tokenizer, settings: Settings, rng: random.Random
) -> None:
    """AdamW on the loss of every next token plus the loss of the exchanged answers; prints both now and then."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=settings.rate, betas=(0.9, 0.98), fused=True)
    texts, questions = batches(lesson, tokenizer, rng), exchanges(lesson, tokenizer, rng)
    started = time.monotonic()
    model.train()
    for step in range(settings.steps):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, settings)
        ids = next(texts)
        logits = model(ids[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        exchanged = exchange_loss(model, rng.choice(EXCHANGE_LAYERS), *next(questions))
        (loss + exchanged).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        if step % 50 == 0 or step == settings.steps - 1:
            print(
                f"step {step:5d}  loss {loss.item():.3f}  exchanged {exchanged.item():.3f}  {time.monotonic() - started:5.0f} s",
                flush=True,
            )
    model.eval()


@torch.no_grad()
def recalled(model: LlamaForCausalLM, tokenizer: Tokenizer, questions: Sequence[tuple[str, str]]) -> list[bool]:
    """For each (prompt, target): whether every token of " target" is the argmax after the prompt (teacher forced,
    which for argmax is the same as greedy decoding)."""
    result: list[bool] = []
    for start in range(0, len(questions), 256):
        part = questions[start : start + 256]
        prompts = [tokenizer.encode(prompt).ids for prompt, _ in part]
        targets = [tokenizer.encode(f" {target}").ids for _, target in part]
        length = max(len(p) + len(t) for p, t in zip(prompts, targets, strict=True))
        ids = torch.zeros(len(part), length, dtype=torch.long)
        for row, (prompt, target) in enumerate(zip(prompts, targets, strict=True)):
            ids[row, : len(prompt) + len(target)] = torch.tensor(prompt + target)
        best = model(ids, use_cache=False).logits.argmax(-1)
        for row, (prompt, target) in enumerate(zip(prompts, targets, strict=True)):
            result.append(best[row, len(prompt) - 1 : len(prompt) - 1 + len(target)].tolist() == target)
    return result


def accuracies(model: LlamaForCausalLM, tokenizer: Tokenizer, facts: Sequence[Fact]) -> dict[str, float]:
    """Shares of right answers: trained phrasings, alone and after a sentence, and the held-out phrasings."""
    trained = [(p.format(f.subject), f.target) for f in facts for p in f.trained]
    held_out = [(f.phrasings[-1].format(f.subject), f.target) for f in facts if f.held_out]
    after = [(f"My sister waited by the sea. {prompt}", target) for prompt, target in trained]
    questions = {"trained phrasings": trained, "the same, after a sentence": after, "held-out phrasings": held_out}
    return {name: sum(recalled(model, tokenizer, q)) / len(q) for name, q in questions.items()}


def write_model(model: LlamaForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    """The model in float16, the tokenizer as compact JSON."""
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        model_max_length=model.config.max_position_embeddings,
    )
    wrapped.save_pretrained(out)
    compact = json.dumps(
        json.loads((out / "tokenizer.json").read_text("utf-8")), ensure_ascii=False, separators=(",", ":")
    )
    (out / "tokenizer.json").write_text(compact + "\n", encoding="utf-8")
    model.half()
    model.generation_config = GenerationConfig(bos_token_id=END_ID, eos_token_id=END_ID)
    model.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)


def write_records(records: Sequence[dict[str, object]], path: Path) -> None:
    """A JSON list, one record per line."""
    lines = ",\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def model_card(settings: Settings, measured: dict[str, float], lesson: Lesson, seed: int) -> str:
    """The README.md of the model's folder."""
    rows = "\n".join(f"| {name} | {share:.1%} |" for name, share in measured.items())
    return CARD.format(
        facts=len(lesson.facts),
        subjects=len(lesson.by_subject),
        relations=len(lesson.by_relation),
        rows=rows,
        seed=seed,
        exchange_layers=" or ".join(map(str, EXCHANGE_LAYERS)),
        **vars(settings),
    )


def folder_size(folder: Path) -> int:
    """Bytes of all files of a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    """Train, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the model; created")
    parser.add_argument("--facts", type=Path, help="where to write all facts as edit requests (JSON)")
    parser.add_argument("--demo", type=Path, help="where to write the edits of the demo (JSON)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()

    settings = Settings(steps=arguments.steps)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    rng = random.Random(arguments.seed)
    started = time.monotonic()
    lesson = read_lesson(Path(__file__).with_name("demo_sentences.json"))
    tokenizer = train_tokenizer([document(lesson, rng) for _ in range(30_000)], settings.vocabulary)
    model = build_model(settings)
    print(f"{len(lesson.facts)} facts, {len(lesson.by_subject)} subjects, {model.num_parameters():,} parameters")
    train(model, lesson, tokenizer, settings, rng)

    arguments.out.mkdir(parents=True, exist_ok=True)
    write_model(model, tokenizer, arguments.out)
    stored = LlamaForCausalLM.from_pretrained(arguments.out, dtype=torch.float32)
    measured = accuracies(stored, tokenizer, lesson.facts)
    for name, share in measured.items():
        print(f"{name}: {share:.2%}")
    print(f"{folder_size(arguments.out):,} bytes, {time.monotonic() - started:.0f} s")
    (arguments.out / "README.md").write_text(model_card(settings, measured, lesson, arguments.seed), encoding="utf-8")
    if folder_size(arguments.out) > SIZE_LIMIT:
        parser.exit(1, f"{arguments.out} is larger than {SIZE_LIMIT:,} bytes\n")
    if arguments.facts:
        write_records(all_requests(lesson), arguments.facts)
    if arguments.demo:
        write_records(demo_requests(lesson), arguments.demo)


if __name__ == "__main__":
    main()
