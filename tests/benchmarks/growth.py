"""Seconds per fact as batches grow: MEMIT on 100, 1,000 and 10,000 synthetic facts, by stage.

    python -m tests.benchmarks.growth [--model DIR] [-n 100 -n 1000 -n 10000]

Subjects are invented, so that there are as many as it takes; prompts and targets are those of the shipped model's facts. Times are CPU
seconds of this process with one thread. What is asked of the editor: at 10,000 facts at most 1.2 times the seconds per fact
of 100, and everything besides the values below a tenth of the whole at 1,000.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import resource
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from patchhub.cache import Cache
from patchhub.editing import editor
from patchhub.editing.metric import Covariance, MetricCache, second_moments
from patchhub.editing.requests import read_requests
from patchhub.models.architectures import describe
from patchhub.models.tracing import Stack
from patchhub.objects import Request
from patchhub.text.sampling import context_templates, sample_documents
from tests.benchmarks.editors import Setup, edit_timed

PACKAGE = Path(editor.__file__).parent.parent
VALUES = ("prefix", "steps")
"""Stages of the value optimisation."""


def invented(facts: Sequence[Request], count: int) -> list[Request]:
    """Facts of the given kinds about ``count`` subjects that do not exist, each of two made-up words."""
    sounds = ["ba", "ke", "li", "mo", "nu", "ra", "si", "to", "ve", "zan", "dor", "mir", "len", "gus"]
    words = ["".join(parts).capitalize() for parts in itertools.product(sounds, repeat=3)]
    generator = random.Random(0)
    names: dict[str, None] = {}
    while len(names) < count:
        names[f"{generator.choice(words)} {generator.choice(words)}"] = None
    kinds = [(fact.prompt, fact.target_new) for fact in facts]
    return [
        Request.make(prompt, name, target)
        for name, (prompt, target) in zip(names, itertools.cycle(kinds), strict=False)
    ]


def main(arguments: Sequence[str]) -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.growth", description=__doc__)
    parser.add_argument("--model", type=Path, default=PACKAGE / "demo_model", help="folder of a causal language model")
    parser.add_argument(
        "--facts", type=Path, default=PACKAGE / "demo_facts.json", help="whose prompts and targets to use"
    )
    parser.add_argument("-n", type=int, action="append", help="facts of a batch; repeatable")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    factory: Any = AutoModelForCausalLM
    model = factory.from_pretrained(options.model, dtype=torch.float32, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(options.model, local_files_only=True)
    stack = Stack(model, describe(model.config))
    settings, contexts = editor.default_settings(stack.architecture), context_templates(stack, tokenizer)
    facts = read_requests(options.facts).requests
    rows: dict[int, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        metric = _metric(stack, tokenizer, settings.layers, Path(folder))
        for count in options.n or (100, 1_000, 10_000):
            setup = Setup(stack, tokenizer, invented(facts, count), contexts, settings)
            _, clock = edit_timed(setup, metric)
            rows[count] = {stage: seconds / count for stage, seconds in clock.seconds.items()}
            rows[count]["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(rows, indent=2) if options.json else _table(rows))


def _metric(stack: Stack, tokenizer: Any, layers: Sequence[int], folder: Path) -> MetricCache:
    width = max(inner for _, inner in stack.architecture.shapes)
    documents = sample_documents(stack, tokenizer, 20 * width, length=64)
    cache = MetricCache(Cache(folder), "0" * 64, Covariance(0.01))
    for layer, moment in second_moments(stack, layers, documents).items():
        cache.store(stack.architecture.ffn_weight(layer), moment)
    return cache


def _table(rows: dict[int, dict[str, float]]) -> str:
    first = next(iter(rows.values()))["whole"]
    lines = ["facts   CPU ms per fact   of the first   besides the values   peak MB"]
    for count, row in rows.items():
        besides = 1 - sum(row[stage] for stage in VALUES) / row["whole"]
        lines.append(
            f"{count:6,}   {1e3 * row['whole']:15.2f}   {row['whole'] / first:12.2f}   {besides:18.1%}   {row['peak_mb']:7.0f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main(sys.argv[1:])
