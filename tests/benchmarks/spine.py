"""The main job on real facts, through the command line: scores by commit, of the applied checkpoint, and after a revert.

    python -m tests.benchmarks.spine --model DIR --facts FILE [--text FILE ...] [-n 100] [--batches 1] [--more 100]

Every command runs in a process of its own; the scores are those of plain transformers on the applied folder.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from patchhub.editing.requests import read_requests
from patchhub.evaluation.suites import counterfact_scores, read_facts
from patchhub.models.checkpoint import open_checkpoint
from patchhub.models.fingerprint import fingerprint
from patchhub.objects import Request

SHOWN = ("ES", "EA", "PS", "PA", "NS", "NA", "S")


def main() -> None:
    options = _options()
    requests = list(read_requests(options.facts).requests)
    first, more = requests[: options.n], requests[options.n : options.n + options.more]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = str(options.model.resolve())
        _patchhub(folder, "init", base)
        _report("base", options.model, first)
        size = -(-len(first) // options.batches)
        text = [word for path in options.text for word in ("--text", str(path.resolve()))]
        for number in range(options.batches):
            _commit(folder, first[number * size : (number + 1) * size], text if number == 0 else [])
        _patchhub(folder, "apply", "HEAD", "--out", "first")
        _report(f"{len(first)} facts in {options.batches}", folder / "first", first)
        if more:
            _commit(folder, more, [])
            _patchhub(folder, "apply", "HEAD", "--out", "both")
            _report(f"first {len(first)} after {len(more)} more", folder / "both", first)
            _report(f"the {len(more)} more", folder / "both", more)
            _patchhub(folder, "revert", "HEAD")
            _patchhub(folder, "apply", "HEAD", "--out", "again")
            print("revert of the second commit:", _same(folder / "first", folder / "again"))
        count = len(json.loads(_patchhub(folder, "log", "--json")))
        for number in range(options.batches):
            _patchhub(folder, "revert", f"HEAD~{(count - options.batches) + 2 * number}")
        _patchhub(folder, "apply", "HEAD", "--out", "none")
        print("everything reverted:", _same(options.model, folder / "none"))
        print(_patchhub(folder, "fsck").strip())


def _commit(folder: Path, facts: list[Request], text: list[str]) -> None:
    records = [{"prompt": f.prompt, "subject": f.subject, "target_new": f.target_new} for f in facts]
    (folder / "facts.json").write_text(json.dumps(records))
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), perf_counter()
    _patchhub(folder, "commit", "facts.json", "-m", f"{len(facts)} facts", *text)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"commit of {len(facts)}: {perf_counter() - begun:.1f} s, {cpu / len(facts):.3f} CPU s per fact, ", end="")
    print(f"peak {after.ru_maxrss / 1024:.0f} MB")


def _patchhub(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "patchhub", *arguments], cwd=folder, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"patchhub {' '.join(arguments)} failed: {done.stderr}")
    return done.stdout


def _report(label: str, model_folder: Path, facts: list[Request]) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    scores = counterfact_scores(read_facts(model, tokenizer, facts))
    values = {name: estimate.value for name, estimate in scores.estimates.items()}
    print(f"{label:>28}: " + "  ".join(f"{name} {values[name]:.3f}" for name in SHOWN if name in values))


def _same(one: Path, other: Path) -> str:
    a, b = fingerprint(open_checkpoint(one)).tensors, fingerprint(open_checkpoint(other)).tensors
    differing = [name for name in a if a[name] != b[name]]
    return f"{len(a)} tensors compared, {len(differing)} differ"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--facts", type=Path, required=True)
    parser.add_argument("--text", type=Path, action="append", default=[])
    parser.add_argument("-n", type=int, default=100)
    parser.add_argument("--more", type=int, default=0)
    parser.add_argument("--batches", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
