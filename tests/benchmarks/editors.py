"""An editor on real facts: CPU time by stage, scores and memory, beside the plain one-fact-at-a-time implementation in the same run.

    python -m tests.benchmarks.editors --model DIR --facts FILE --text FILE[:DOCUMENTS] ... [-n 100] [--plain 5]
        [--method memit|pmet] [--batches 10] [--contributions]

With --batches the facts are written in that many batches, each on top of the ones before. With --contributions the values are
optimised once more without each of the things that make it fast. Times are CPU seconds of this process with one thread. The
plain side runs on facts spread evenly over the same list, with the same contexts and settings; its dense solve, which does
not grow with the facts, is left out of its time.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from patchhub.cache import Cache
from patchhub.constraints import join
from patchhub.delta import Delta
from patchhub.editing import record, rows, steps, values
from patchhub.editing.editor import EDITORS
from patchhub.editing.metric import Covariance, MetricCache, second_moments
from patchhub.editing.record import Edit, State, side_paths
from patchhub.editing.requests import read_requests
from patchhub.editing.settings import EditSettings
from patchhub.evaluation.metrics import perplexity
from patchhub.evaluation.suites import counterfact_scores, read_facts
from patchhub.models.architectures import describe
from patchhub.models.tracing import Stack
from patchhub.objects import Request
from patchhub.text.sampling import context_templates
from tests.reference import plain, plain_pmet

STAGES = {
    "prefix": [(values, "run_trunk"), (values, "_prepare")],
    "steps": [(values, "_evaluate"), (values, "_adam"), (values, "_shrunk")],
    "sweep": [(record, "_read")],
    "solve": [(record, "_extend")],
}
"""Functions whose time is reported; what they leave of the whole is "other"."""

SCORES = ("S", "ES", "PS", "NS", "EA", "PA", "NA")


@dataclass
class Clock:
    """CPU seconds of this process by stage."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        start = time.process_time()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.process_time() - start

    def timed(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with self.measure(stage):
                return function(*args, **kwargs)

        return run


@dataclass(frozen=True)
class Setup:
    """Everything that both sides run on."""

    stack: Stack
    tokenizer: Any
    requests: Sequence[Request]
    contexts: Sequence[str]
    settings: EditSettings
    method: str = "memit"


def main(arguments: Sequence[str]) -> None:
    torch.set_num_threads(1)
    options = _options(arguments)
    setup = _setup(options)
    count = len(setup.requests)
    report: dict[str, Any] = {"facts": count, "batches": options.batches, "settings": setup.settings.to_json()}
    with tempfile.TemporaryDirectory() as folder:
        metric, report["metric"] = _metric(setup, options, Path(folder))
        written, clock, steps = _in_batches(setup, metric, options.batches)
        if options.contributions:
            report["without"] = _contributions(setup, metric)
    report["ours"] = _per_fact(clock, count)
    report["ours"]["mean_steps"] = steps
    report["peak_rss_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    report["scores"] = _scores(setup, written, options)
    if options.plain:
        report["plain"] = _per_fact(_plain(setup, options.plain), options.plain)
        report["times_faster"] = report["plain"]["whole"] / report["ours"]["whole"]
    if options.reference_seconds:
        report["reference"] = {"seconds": options.reference_seconds, "S": options.reference_s}
    print(json.dumps(report, indent=2) if options.json else _table(report))


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.editors", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder of a causal language model")
    parser.add_argument("--facts", type=Path, required=True, help="any shape of facts that patchhub reads")
    parser.add_argument("--text", action="append", required=True, help="JSON list of texts, FILE or FILE:DOCUMENTS")
    parser.add_argument(
        "--held-out", type=Path, help="JSON list of texts: perplexity before and after on the first 100"
    )
    parser.add_argument("-n", type=int, default=100, help="number of facts")
    parser.add_argument("--skip", type=int, default=0, help="facts to leave out at the front")
    parser.add_argument("--method", choices=sorted(EDITORS), default="memit")
    parser.add_argument(
        "--batches", type=int, default=1, help="write the facts in so many batches, one on top of another"
    )
    parser.add_argument("--layers", type=_integers, help="default: the editor's rule, as for all settings")
    parser.add_argument("--lambda", dest="ridge", type=float)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--clamp", type=float)
    parser.add_argument("--kl-factor", type=float)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--alternate", type=int, help="of the contexts beside the bare prompt, how many a step reads")
    parser.add_argument(
        "--contributions", action="store_true", help="time the values without each thing that makes them fast"
    )
    parser.add_argument("--epsilon", type=float, default=0.01, help="regularisation of the second moments")
    parser.add_argument("--seed", type=int, default=0, help="of the contexts")
    parser.add_argument("--plain", type=int, default=5, help="facts for the plain implementation; 0 leaves it out")
    parser.add_argument("--reference-seconds", type=float, help="of another implementation, per fact, to compare with")
    parser.add_argument("--reference-s", type=float, help="its score S, in per cent")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(arguments)


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _setup(options: argparse.Namespace) -> Setup:
    factory: Any = AutoModelForCausalLM
    model = factory.from_pretrained(options.model, dtype=torch.float32, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(options.model, local_files_only=True)
    stack = Stack(model, describe(model.config))
    names = ("layers", "ridge", "steps", "learning_rate", "clamp", "kl_factor", "alternate")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    settings = replace(EDITORS[options.method].default_settings(stack.architecture), **given)
    requests = read_requests(options.facts).requests[options.skip : options.skip + options.n]
    contexts = context_templates(stack, tokenizer, seed=options.seed)
    return Setup(stack, tokenizer, requests, contexts, settings, options.method)


def _metric(setup: Setup, options: argparse.Namespace, folder: Path) -> tuple[MetricCache, dict[str, float]]:
    texts = [text for source in options.text for text in _texts(source)]
    limit = min(256, setup.stack.model.config.get_text_config().max_position_embeddings)
    documents = [ids[:limit] for ids in setup.tokenizer(texts)["input_ids"]]
    cache, clock = MetricCache(Cache(folder), "0" * 64, Covariance(options.epsilon)), Clock()
    with clock.measure("seconds"):
        for layer, moment in second_moments(setup.stack, setup.settings.layers, documents).items():
            cache.store(setup.stack.architecture.ffn_weight(layer), moment)
    return cache, {"tokens": sum(map(len, documents)), **clock.seconds}


def _texts(source: str) -> list[str]:
    path, _, count = source.partition(":")
    texts: list[str] = json.loads(Path(path).read_text(encoding="utf-8"))
    return texts[: int(count)] if count else texts


def edit_timed(setup: Setup, metric: MetricCache, state: State | None = None) -> tuple[Edit, Clock]:
    """Write the facts on top of ``state`` (none: the base), with the CPU seconds of each stage and of the whole."""
    clock = Clock()
    with ExitStack() as patches:
        for stage, functions in STAGES.items():
            for module, name in functions:
                patches.enter_context(patch.object(module, name, clock.timed(stage, getattr(module, name))))
        with clock.measure("whole"):
            result = EDITORS[setup.method].edit(
                setup.stack,
                setup.tokenizer,
                setup.requests,
                setup.contexts,
                setup.settings,
                metric,
                state or State({}, {}),
            )
    return result, clock


def _in_batches(setup: Setup, metric: MetricCache, batches: int) -> tuple[dict[str, list[Delta]], Clock, float]:
    """The deltas of every weight after the last batch, the time of all, and the mean number of steps."""
    clock, columns, steps = Clock(), {}, 0.0
    deltas: dict[str, list[Delta]] = {}
    size = -(-len(setup.requests) // batches)
    for start in range(0, len(setup.requests), size):
        part = replace(setup, requests=setup.requests[start : start + size])
        with side_paths(setup.stack, _by_layer(setup, deltas)):
            edit, spent = edit_timed(part, metric, State(columns, deltas))
        for name, change in edit.recording.change.items():
            deltas.setdefault(name, []).append(change)
        new = edit.recording.columns
        columns = {name: join([columns[name], new[name]]) if name in columns else new[name] for name in new}
        for stage, seconds in spent.seconds.items():
            clock.seconds[stage] = clock.seconds.get(stage, 0.0) + seconds
        steps += float(edit.values.steps.double().sum())
    return deltas, clock, steps / len(setup.requests)


def _by_layer(setup: Setup, deltas: Mapping[str, Sequence[Delta]]) -> dict[int, Sequence[Delta]]:
    return {setup.stack.architecture.layer_of(name): parts for name, parts in deltas.items()}


def _contributions(setup: Setup, metric: MetricCache) -> dict[str, float]:
    """CPU seconds per fact of the values, whole and without one thing each."""

    @contextmanager
    def nothing(*arguments: Any) -> Iterator[None]:
        yield

    def no_trunk(stack: Stack, groups: Sequence[Any]) -> rows.Trunk:
        return rows.Trunk((0,) * len(groups), torch.zeros(len(groups), 0, dtype=torch.long), None)

    switched: dict[str, tuple[Any, str, Any]] = {
        "nothing left out": (steps, "POSITIONS", steps.POSITIONS),
        "faster products": (Stack, "fast", nothing),
        "many facts at once": (steps, "POSITIONS", 1),
        "dropping finished facts": (values, "_shrunk", lambda batch, *_, **__: batch),
        "shared beginnings": (values, "run_trunk", no_trunk),
        "the last feed-forward part at targets only": (Stack, "feed_forward_at", nothing),
    }
    found: dict[str, float] = {}
    for name, (owner, attribute, other) in switched.items():
        with patch.object(owner, attribute, other):
            _, clock = edit_timed(setup, metric)
        found[name] = (clock.seconds["prefix"] + clock.seconds["steps"]) / len(setup.requests)
    return found


def _plain(setup: Setup, count: int) -> Clock:
    """The published procedure on ``count`` facts: values, then keys and present values at every layer."""
    clock, stack, layers = Clock(), setup.stack, setup.settings.layers
    chosen = [setup.requests[i * len(setup.requests) // count] for i in range(count)]
    with clock.measure("whole"):
        for fact in chosen:
            common = (stack.model, setup.tokenizer, stack.architecture, fact, setup.contexts)
            with clock.measure("steps"):
                if setup.method == "pmet":
                    plain_pmet.find_values(*common, layers[-1], setup.settings.values(until_sure=True))
                else:
                    plain.find_value(*common, layers[-1], setup.settings.values(until_sure=False))
            with clock.measure("sweep"):
                for layer in layers:
                    plain.mean_key(*common, layer)
                    plain.present_output(stack.model, setup.tokenizer, fact, stack.blocks[layers[-1]])
    return clock


def _scores(setup: Setup, deltas: Mapping[str, Sequence[Delta]], options: argparse.Namespace) -> dict[str, float]:
    """In per cent, with the change beside the weights; perplexities as they are."""
    stack = setup.stack
    change = _by_layer(setup, deltas)
    held_out = _texts(str(options.held_out))[:100] if options.held_out else []
    found: dict[str, float] = {}
    if held_out:
        found["ppl before"] = perplexity(stack.model, setup.tokenizer, held_out)
    with side_paths(stack, change):
        readings = read_facts(stack.model, setup.tokenizer, setup.requests)
        if held_out:
            found["ppl after"] = perplexity(stack.model, setup.tokenizer, held_out)
    estimates = counterfact_scores(readings, resamples=1).estimates
    return {**{name: 100 * estimates[name].value for name in SCORES if name in estimates}, **found}


def _per_fact(clock: Clock, facts: int) -> dict[str, float]:
    """CPU seconds per fact, the stages in the order in which they ended."""
    stages = {stage: seconds / facts for stage, seconds in clock.seconds.items()}
    whole = stages.pop("whole")
    return {"whole": whole, **stages, "other": whole - sum(stages.values())}


def _table(report: dict[str, Any]) -> str:
    batches = f" in {report['batches']} batches" if report["batches"] > 1 else ""
    lines = [f"{report['facts']} facts{batches}, {report['settings']}"]
    lines.append("metric: {tokens} tokens, {seconds:.1f} CPU s".format(**report["metric"]))
    for side in ("ours", "plain"):
        if side in report:
            parts = ", ".join(f"{name} {value:.4g}" for name, value in report[side].items())
            lines.append(f"{side}, CPU s per fact: {parts}")
    for name, seconds in report.get("without", {}).items():
        ratio = seconds / report["without"]["nothing left out"]
        lines.append(f"values without {name}: {seconds:.4f} CPU s per fact, {ratio:.2f} times")
    if "times_faster" in report:
        lines.append(f"times faster than plain: {report['times_faster']:.1f}")
    lines.append(", ".join(f"{name} {value:.1f}" for name, value in report["scores"].items()))
    lines.append(f"peak RSS {report['peak_rss_mb']} MB")
    if "reference" in report:
        seconds, score = report["reference"]["seconds"], report["reference"]["S"]
        lines.append(
            f"reference: {seconds} CPU s per fact ({seconds / report['ours']['whole']:.1f} times ours), S {score}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main(sys.argv[1:])
