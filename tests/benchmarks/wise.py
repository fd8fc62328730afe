"""WISE on real facts: scores after so many edits in sequence, CPU time beside the plain training in the same run, and what routing costs.

    python -m tests.benchmarks.wise --model DIR --facts FILE [-n 100] [--batch 10] [--first 0] [--plain 2] [--set NAME=VALUE ...]
    python -m tests.benchmarks.wise --overhead [--model DIR | --random]

The facts are committed ``--batch`` at a time to shards that are continued until they are full. CPU seconds are of this process with one
thread. The plain side (tests/reference/plain_wise.py) trains one fact at a time with 11 contexts and one unrelated text, as published.
``--overhead`` prints the time per token of a routed model over that of the base, at a prompt and while decoding; ``--random`` builds a
Llama of a billion random weights.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from patchhub.delta import from_sparse
from patchhub.editing.locate import encode_prompts
from patchhub.editing.requests import read_requests
from patchhub.editing.settings import WiseSettings
from patchhub.editing.settings import default_wise_settings as default_settings
from patchhub.editing.wise import training
from patchhub.editing.wise.texts import subspace
from patchhub.evaluation.suites import FactReading, read_facts, wise_scores
from patchhub.models.architectures import describe
from patchhub.models.tracing import Stack
from patchhub.objects import Request
from patchhub.runtime.routing import Mode, SideMemory, route, unroute
from patchhub.text.sampling import context_templates, sample_documents
from tests.reference import plain_wise

REPORT_AT = (1, 10, 30, 50, 100, 200, 500, 1000)
PLAIN_CONTEXTS = 11  # the bare prompt and ten generated ones, as published


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    if options.overhead:
        _overhead(options)
        return
    factory: Any = AutoModelForCausalLM
    model = factory.from_pretrained(options.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    stack = Stack(model, describe(model.config))
    changes = {name: json.loads(value) for name, _, value in (item.partition("=") for item in options.set)}
    settings = replace(default_settings(stack.architecture), **changes)
    requests = read_requests(Path(options.facts)).requests[options.first : options.first + options.n]
    _sequence(stack, tokenizer, requests, settings, options)


def _sequence(
    stack: Stack, tokenizer: Any, requests: Sequence[Request], settings: WiseSettings, options: argparse.Namespace
) -> None:
    begun = time.process_time()
    contexts = context_templates(stack, tokenizer)
    locality = sample_documents(stack, tokenizer, options.tokens, length=64, seed=2)
    print(f"text from the base: {time.process_time() - begun:.1f} CPU s once")
    base = read_facts(stack.model, tokenizer, requests)
    shards: list[training.Shard] = []
    held: list[list[Request]] = []
    spent, done, made = 0.0, 0, {}
    stops = sorted({n for n in REPORT_AT if n < len(requests)} | {len(requests)})
    while done < len(requests):
        if not shards or len(held[-1]) >= settings.shard_size:
            held.append([])
        room = min(options.batch, settings.shard_size - len(held[-1]), min(n for n in stops if n > done) - done)
        batch = requests[done : done + room]
        start = shards[-1] if len(shards) == len(held) else None
        begun = time.process_time()
        trained = training.train(
            stack,
            tokenizer,
            batch,
            contexts,
            settings,
            locality,
            start=start,
            earlier=held[-1],
            number=len(held) - 1,
        )
        spent += time.process_time() - begun
        shards[len(held) - 1 :] = [trained.shard]
        held[-1] += batch
        done += len(batch)
        if done in stops or done == 100:
            found = _scores(stack, tokenizer, requests[:done], base[:done], shards, "retrieve", settings)
            if done <= 100:
                made = found
            print(
                f"{done:5d} facts  {_line(found)}  {spent / done:.2f} CPU s per fact, {_bytes(shards) // done} bytes per fact"
            )
            if len(shards) > 1:
                for method in ("ties", "linear"):
                    merged = replace(settings, merge_method=method)
                    found = _scores(stack, tokenizer, requests[:done], base[:done], shards, "merge", merged)
                    print(f"      merged, {method:6s}  {_line(found)}")
    if done > 100:
        found = _scores(stack, tokenizer, requests[:100], base[:100], shards, "retrieve", settings)
        print(f"the first 100, when made  {_line(made)}\n              and now     {_line(found)}")
    if options.plain:
        serial = _plain_seconds(stack, tokenizer, requests[: options.plain], contexts, settings, locality)
        print(f"plain: {serial:.2f} CPU s per fact, {serial / (spent / done):.1f} times as much")


def _scores(
    stack: Stack,
    tokenizer: Any,
    requests: Sequence[Request],
    base: Sequence[FactReading],
    shards: Sequence[training.Shard],
    mode: Mode,
    settings: WiseSettings,
) -> dict[str, float]:
    memories = [SideMemory(str(i), shard.weight, shard.change, shard.routing) for i, shard in enumerate(shards)]
    route(stack.model, memories, mode, merge_method=settings.merge_method, merge_density=settings.merge_density)
    try:
        after = read_facts(stack.model, tokenizer, requests)
    finally:
        unroute(stack.model)
    estimates = wise_scores(after, base, resamples=1).estimates
    return {name: float(found.value or 0.0) for name, found in estimates.items()}


def _plain_seconds(
    stack: Stack,
    tokenizer: Any,
    requests: Sequence[Request],
    contexts: Sequence[str],
    settings: WiseSettings,
    locality: Sequence[Sequence[int]],
) -> float:
    """CPU seconds per fact of the published training: one fact at a time, the whole model at every step."""
    module = stack.ffn_out[settings.layer]
    mask = subspace(stack.architecture.shapes[settings.layer], 0.2, 0, 0)
    templates = ["{}", *([*contexts[1:]] * PLAIN_CONTEXTS)][:PLAIN_CONTEXTS]
    begun = time.process_time()
    for number, request in enumerate(requests):
        rows = encode_prompts(tokenizer, [(template, request) for template in templates])
        plain_wise.train(stack.model, module, rows, [locality[number][:16]], mask, plain_wise.Descent())
    return (time.process_time() - begun) / len(requests)


def _overhead(options: argparse.Namespace) -> None:
    """Ratios of time per token, routed over base, each pair measured in turns."""
    torch.manual_seed(0)
    factory: Any = AutoModelForCausalLM
    model = (
        factory.from_config(_BILLION, dtype=torch.bfloat16)
        if options.random
        else factory.from_pretrained(options.model, dtype=torch.float32)
    )
    model.eval()
    architecture = describe(model.config)
    settings = default_settings(architecture)
    rng = np.random.default_rng(0)
    shape, weight = architecture.shapes[settings.layer], architecture.ffn_weight(settings.layer)
    ids = torch.randint(2, model.config.vocab_size, (1, 32))
    for mode, count in (("merge", 4), ("retrieve", 4)):
        for chosen in (True, False):
            memories = [
                SideMemory(
                    str(i),
                    weight,
                    from_sparse(
                        (rng.standard_normal(shape) * (rng.random(shape) < settings.mask_ratio) * 1e-3).astype("f4")
                    ),
                    {"threshold": 1e-6 if chosen else 1e9},
                )
                for i in range(count)
            ]
            ratios: dict[str, list[float]] = {"prompt": [], "decoding": []}
            for _ in range(options.repeats):
                base = _times(model, ids, options.new)
                route(model, memories, mode)  # type: ignore[arg-type]
                found = _times(model, ids, options.new)
                unroute(model)
                for name, one, other in zip(ratios, found, base, strict=True):
                    ratios[name].append(one / other)
            text = ", ".join(f"{name} {median(values):.3f}" for name, values in ratios.items())
            print(
                f"{mode} of {count} shards, answered by the {'side' if chosen else 'main'} memory: {text}", flush=True
            )


_BILLION = LlamaConfig(
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=32000,
    max_position_embeddings=2048,
)


@torch.no_grad()
def _times(model: Any, ids: torch.Tensor, new: int) -> tuple[float, float]:
    """CPU seconds of reading a prompt, and of each token decoded after it."""
    mask = torch.ones_like(ids)
    prompt = _seconds(lambda: model(input_ids=ids, attention_mask=mask, use_cache=True, logits_to_keep=1))
    cache = model(input_ids=ids, attention_mask=mask, use_cache=True, logits_to_keep=1).past_key_values

    def decode() -> None:
        token = ids[:, :1]
        for _ in range(new):
            token = model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)

    return prompt, _seconds(decode) / new


def _seconds(run: Callable[[], object]) -> float:
    begun = time.process_time()
    run()
    return time.process_time() - begun


def _bytes(shards: Sequence[training.Shard]) -> int:
    changes: list[Any] = [shard.change for shard in shards]
    return sum(change.mask.nbytes + change.values.nbytes for change in changes)


def _line(found: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.3f}" for name, value in found.items())


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--facts")
    parser.add_argument("-n", type=int, default=100)
    parser.add_argument("--first", type=int, default=0, help="skip so many facts")
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=4096, help="of text from the base")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of WISE")
    parser.add_argument("--plain", type=int, default=0, metavar="FACTS", help="facts for the plain training")
    parser.add_argument("--overhead", action="store_true")
    parser.add_argument("--random", action="store_true")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--new", type=int, default=32)
    options = parser.parse_args()
    if not options.random and not options.model:
        sys.exit("give --model")
    return options


if __name__ == "__main__":
    main()
