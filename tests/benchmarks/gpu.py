"""What an edit costs on one GPU, phase by phase, beside what the machine's own products and copies allow.

    python -m tests.benchmarks.gpu [--small] [--device cuda] [-n 1 -n 8 -n 100]

The base is a random Llama in the shape of Llama-3-8B in bfloat16, made in memory (`--small`: 4 blocks of width 256, for a CPU). Phases:
text from the base, second moments of one layer, the Cholesky factor of one metric in float64, values, and recording. A floor counts
products alone at the speed that a large product of the same type has here, or the bytes of the weights at the speed of a copy, whichever
takes longer: of values those of the positions that a step computes, forwards and backwards through the blocks above the edited ones,
and of the head. Takes a few minutes on an H100.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from patchhub.cache import Cache
from patchhub.editing import editor
from patchhub.editing.editor import EDITORS, encode_facts, memit_settings
from patchhub.editing.metric import Covariance, MetricCache, second_moments
from patchhub.editing.record import State, record
from patchhub.editing.rows import Fact, key_rows
from patchhub.editing.steps import positions_of
from patchhub.editing.values import optimise_values
from patchhub.models.architectures import describe
from patchhub.models.tracing import Stack
from patchhub.objects import Request
from patchhub.text.sampling import sample_documents
from patchhub.text.tokens import Closers
from tests.benchmarks.growth import invented

PACKAGE = Path(editor.__file__).parent.parent
LARGE = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
LARGE |= {"num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192}
SMALL = {"hidden_size": 256, "intermediate_size": 896, "num_hidden_layers": 4, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "vocab_size": 8192, "max_position_embeddings": 512}
KINDS = (("The mother tongue of {} is", "French"), ("{} was born in", "Berlin"), ("{} plays the", "piano"))
CONTEXTS = (
    "{}",
    "The tower looked over the old town. {}",
    "Therefore it was said again. {}",
    "Because nobody knew. {}",
    "I think that you know it well. {}",
    "You are not alone here. {}",
)


@dataclass(frozen=True)
class Speed:
    """Of the machine: floating-point operations per second by type, and bytes read per second by a copy on the device."""

    operations: dict[torch.dtype, float]
    bytes: float

    @classmethod
    def measured(cls, device: torch.device, size: int) -> Speed:
        found = {}
        for dtype in (torch.bfloat16, torch.float32, torch.float64):
            a, b = (torch.randn(size, size, device=device, dtype=torch.float32).to(dtype) for _ in range(2))
            found[dtype] = 2 * size**3 / seconds(lambda a=a, b=b: a @ b, device, times=3)  # type: ignore[misc]
        block = torch.empty(64 * size * size, device=device, dtype=torch.uint8)
        return cls(found, 2 * block.numel() / seconds(block.clone, device, times=3))


def seconds(run: Callable[[], Any], device: torch.device, *, times: int = 0) -> float:
    """Wall time of a call, the last kernel included; with ``times`` the least of so many, after one that is not counted."""
    if times:
        run()
    found = []
    for _ in range(max(1, times)):
        wait(device)
        begun = perf_counter()
        run()
        wait(device)
        found.append(perf_counter() - begun)
    return min(found)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def tell(phase: str, took: float, floor: float, note: str = "") -> None:
    print(f"| {phase} | {took:.2f} | {floor:.2f} | {took / floor:.1f} | {note} |", flush=True)


def main() -> None:
    options = _options()
    device = torch.device(options.device)
    tokenizer = AutoTokenizer.from_pretrained(PACKAGE / "demo_model")
    with torch.device(device):
        config = LlamaConfig(**(SMALL if options.small else LARGE))
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        factory: Any = AutoModelForCausalLM
        model = factory.from_config(config, dtype=dtype)
    stack = Stack(model, describe(config))
    speed = Speed.measured(device, 1024 if options.small else 8192)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    rates = ", ".join(f"{str(kind)[6:]} {rate / 1e12:.2f} TFLOP/s" for kind, rate in speed.operations.items())
    print(f"{name}; torch {torch.__version__}; {rates}; copy {speed.bytes / 1e9:.0f} GB/s")
    print(f"base: {sum(p.numel() for p in model.parameters()) / 1e9:.2f} billion weights, {str(dtype)[6:]}\n")
    print("| phase | s | floor, s | times floor | |\n|---|---|---|---|---|")
    settings = replace(memit_settings(stack.architecture), chat_weight=0.0)
    with tempfile.TemporaryDirectory() as folder:
        metric = MetricCache(Cache(Path(folder)), "0" * 64, Covariance(0.05))
        _metric(stack, tokenizer, settings.layers, metric, speed, options.documents)
        facts = _facts(stack, tokenizer, max(options.n))
        for count in options.n:
            values = _values(stack, facts[:count], settings, speed)
        _record(stack, facts[: options.n[-1]], settings, metric, values)
    if device.type == "cuda":
        print(f"\nwaits for the device in a step: {_waits(stack, facts[:8], settings):.1f}")
        print(f"most memory allocated: {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB")


def _metric(stack: Stack, tokenizer: Any, layers: Sequence[int], metric: MetricCache, speed: Speed, count: int) -> None:
    length, documents, weights = 64, list[list[int]](), _weights(stack)
    sample_documents(stack, tokenizer, 4 * length, length=length, seed=1)  # kernels are loaded
    took = seconds(
        lambda: documents.extend(sample_documents(stack, tokenizer, count * length, length=length)), stack.device
    )
    everything = sum(weights) + _head(stack)
    steps = (length - 1) * max(2 * everything * count / _rate(stack, speed), _size(stack) * everything / speed.bytes)
    tell(f"text: {count} documents of {length} tokens", took, steps, f"{count * length / took:.0f} tokens a second")
    tokens, width = sum(map(len, documents)), stack.architecture.shapes[layers[-1]][1]
    moments: dict[int, Tensor] = {}
    took = seconds(lambda: moments.update(second_moments(stack, layers[:1], documents)), stack.device)
    reading = 2 * tokens * sum(weights[: layers[0] + 1]) / _rate(stack, speed)
    floor = reading + 2 * tokens * width**2 / speed.operations[torch.float32]
    tell(f"second moments of a layer, {tokens} tokens", took, floor, f"{width} inputs")
    took = seconds(lambda: Covariance(0.05).prepare(moments[layers[0]], "w"), stack.device)
    tell("Cholesky factor in float64", took, width**3 / 3 / speed.operations[torch.float64])
    for layer in layers:  # one stands for all: what recording costs does not depend on the numbers
        metric.store(stack.architecture.ffn_weight(layer), moments[layers[0]])


def _facts(stack: Stack, tokenizer: Any, count: int) -> list[Fact]:
    kinds = [Request.make(prompt, "Anna", target) for prompt, target in KINDS]
    closers = Closers.of(tokenizer, stack.vocabulary)
    return encode_facts(tokenizer, invented(kinds, count), CONTEXTS, closers=closers)


def _values(stack: Stack, facts: Sequence[Fact], settings: Any, speed: Speed) -> Any:
    way = EDITORS["memit"].way(stack.architecture)
    chosen, site = settings.values(until_sure=False), way.site(stack, settings.layers)
    chosen = replace(chosen, stop_loss=0.0)  # every fact takes all steps
    found: list[Any] = []
    optimise_values(site, facts[:1], replace(chosen, steps=2))
    took = seconds(lambda: found.append(optimise_values(site, facts, chosen)), stack.device)
    above, predictions = sum(_weights(stack)[site.first :]), sum(len(fact.rows) for fact in facts) * 3
    step = 4 * (above * sum(map(positions_of, facts)) + _head(stack) * predictions) / _rate(stack, speed)
    read = 2 * _size(stack) * (above + _head(stack)) / speed.bytes
    tell(
        f"values of {len(facts)} facts", took, chosen.steps * max(step, read), f"{len(facts) / took:.2f} facts a second"
    )
    return found[0]


def _record(stack: Stack, facts: Sequence[Fact], settings: Any, metric: MetricCache, values: Any) -> None:
    rows, way = key_rows([fact.rows for fact in facts]), EDITORS["memit"].way(stack.architecture)
    state = State({}, {})
    took = seconds(
        lambda: record(stack, settings.layers, rows, values.targets, settings.ridge, metric, state, way.spread),
        stack.device,
    )
    print(f"| recording {len(facts)} facts in {len(settings.layers)} layers | {took:.2f} | | | |", flush=True)


def _waits(stack: Stack, facts: Sequence[Fact], settings: Any) -> float:
    """How often a step of the optimisation waits for the device: the difference between 12 and 4 steps."""
    site = EDITORS["memit"].way(stack.architecture).site(stack, settings.layers)
    counts = []
    for steps in (4, 12):
        chosen = replace(settings.values(until_sure=False), stop_loss=0.0, steps=steps)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            optimise_values(site, facts, chosen)
            torch.cuda.set_sync_debug_mode("default")
        counts.append(len(caught))
    return (counts[1] - counts[0]) / 8


def _weights(stack: Stack) -> list[int]:
    """Numbers of the matrices of each block."""
    return [sum(p.numel() for p in block.parameters() if p.ndim == 2) for block in stack.blocks]


def _head(stack: Stack) -> int:
    return int(stack.model.get_output_embeddings().weight.numel())


def _size(stack: Stack) -> int:
    return int(stack.model.dtype.itemsize)


def _rate(stack: Stack, speed: Speed) -> float:
    return speed.operations[stack.model.dtype]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("-n", type=int, action="append", help="facts; more than once for more sizes")
    parser.add_argument("--documents", type=int, default=1024)
    found = parser.parse_args()
    found.n = found.n or [1, 8, 100]
    return found


if __name__ == "__main__":
    main()
