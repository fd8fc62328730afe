"""Two branches of facts merged, and the first one reverted, beside subtracting its delta; through the command line.

    python -m tests.benchmarks.merge --model DIR --facts FILE [-n 500] [--refresh]

Prints S of all facts after the merge (compare with `tests.benchmarks.spine -n 2N`, one commit of all), the time of the
merge as a share of the edits', and after the revert S of the second branch's facts and how many of the first's old
answers are given, beside the second branch alone (which edits near those prompts as well) and the base.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from patchhub.delta import negative
from patchhub.editing.requests import read_requests
from patchhub.evaluation.metrics import score_targets
from patchhub.evaluation.suites import counterfact_scores, read_facts
from patchhub.objects import Request
from patchhub.runtime.patched_model import load_patched
from patchhub.sets.columns import read_state
from patchhub.store.store import Store
from patchhub.worktree.opening import open_base, patch_state, state_at


def main() -> None:
    options = _options()
    requests = list(read_requests(options.facts).requests)
    a, b = requests[: options.n], requests[options.n : 2 * options.n]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _patchhub(folder, "init", str(options.model.resolve()))
        edits = 0.0
        for branch, facts in (("a", a), ("b", b)):
            _patchhub(folder, "switch", "-c", branch, "base")
            records = [{"prompt": f.prompt, "subject": f.subject, "target_new": f.target_new} for f in facts]
            (folder / "facts.json").write_text(json.dumps(records))
            edits += _patchhub(folder, "commit", "facts.json", "-m", f"branch {branch}")
        merging = _patchhub(folder, "merge", "a")
        print(f"edits {edits:.1f} s, merge {merging:.1f} s: {merging / edits:.1%}")
        _report(folder, "merged", {"all": a + b, "a": a, "b": b})
        if options.refresh:
            print(f"refresh {_patchhub(folder, 'refresh'):.1f} s")
            _report(folder, "merged and refreshed", {"all": a + b})
            _patchhub(folder, "reset", "HEAD~1")
        _patchhub(folder, "revert", "a")
        _report(folder, "a reverted", {"b": b}, gone=a)
        with Store.open(folder) as repository:
            states = [repository.state(repository.resolve(revision)) for revision in ("HEAD", "b")]
            print(f"a reverted has the state of b alone, bit for bit: {states[0] == states[1]}")
            _subtract(repository, a, b)
            for label, revision in (("b alone", "b"), ("base", "base")):
                model: Any = load_patched(open_base(repository), state_at(repository, revision), dtype=torch.float32)
                _print(label, model, repository.config.base["path"], {"b": b}, gone=a)


def _subtract(repository: Store, a: list[Request], b: list[Request]) -> None:
    """The state of the merge with the delta of branch a's commit subtracted."""
    merged, first = (read_state(repository, repository.resolve(rev)) for rev in ("HEAD~1", "a"))
    deltas = {weight: [*merged[weight], *map(negative, first.get(weight, ()))] for weight in merged}
    model: Any = load_patched(open_base(repository), patch_state(repository, deltas, None), dtype=torch.float32)
    _print("a's delta subtracted", model, repository.config.base["path"], {"b": b}, gone=a)


def _report(folder: Path, label: str, groups: dict[str, list[Request]], gone: list[Request] | None = None) -> None:
    _patchhub(folder, "apply", "HEAD", "--out", "out", "--overwrite")
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "out", dtype=torch.float32)
    _print(label, model, folder / "out", groups, gone)


def _print(
    label: str, model: Any, place: Path | str, groups: dict[str, list[Request]], gone: list[Request] | None = None
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(place)
    for name, facts in groups.items():
        estimates = counterfact_scores(read_facts(model, tokenizer, facts)).estimates
        values = "  ".join(f"{score} {estimates[score].value:.3f}" for score in ("ES", "PS", "NS", "NA", "S"))
        print(f"{label}, facts of {name}: {values}")
    if gone:
        scores = score_targets(model, tokenizer, [(fact.text, fact.target_true or "") for fact in gone])
        back = sum(score.argmax_right for score in scores)
        print(f"{label}: old answers of a's facts given: {back} of {len(gone)}")


def _patchhub(folder: Path, *arguments: str) -> float:
    begun = perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "patchhub", *arguments], cwd=folder, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"patchhub {' '.join(arguments)} failed: {done.stderr}")
    return perf_counter() - begun


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--facts", type=Path, required=True)
    parser.add_argument("-n", type=int, default=500)
    parser.add_argument("--refresh", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
