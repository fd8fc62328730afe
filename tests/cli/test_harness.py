"""`eval --harness`: lm-evaluation-harness on the base and on a revision, with a local task of ten facts of the demo."""

from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from patchhub.evaluation.outside import _numbers
from patchhub.repository import Repository
from tests.cli.conftest import Run

TASKS = Path(__file__).parents[1] / "data" / "harness"
ROOT = TASKS.parents[2]
LINES = [json.loads(line) for line in (TASKS / "ten_facts.jsonl").read_text(encoding="utf-8").splitlines()]

missing = importlib.util.find_spec("lm_eval") is None
with_harness = pytest.mark.skipif(missing, reason="lm-evaluation-harness is not installed: the extra `harness`")


def chosen(model: torch.nn.Module, tokenizer: object) -> float:
    """The share of lines whose answer has the highest log-probability of all choices, one text at a time."""
    right = 0
    for line in LINES:
        scores = []
        for choice in line["choices"]:
            before = tokenizer(line["prompt"]).input_ids  # type: ignore[operator]
            ids = tokenizer(f"{line['prompt']} {choice}", return_tensors="pt").input_ids  # type: ignore[operator]
            logprobs = model(ids).logits[0, :-1].log_softmax(-1)
            steps = logprobs.gather(-1, ids[0, 1:, None])[len(before) - 1 :]
            scores.append(float(steps.sum()))
        right += scores.index(max(scores)) == line["answer"]
    return right / len(LINES)


@with_harness
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_both_numbers_are_those_of_the_models_and_nothing_else_is_moved(
    run: Run, store: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    asked = ("eval", "--harness", "ten_facts", "--harness-path", str(TASKS))
    torch.manual_seed(7)
    streams = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    [row] = json.loads(run(*asked, "--json").stdout)["harness"]
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == streams
    with Repository(store, progress=False) as repo, torch.no_grad():
        from patchhub import load
        from patchhub.models.checkpoint import open_checkpoint
        from patchhub.text.tokens import load_tokenizer
        from tests.cli.conftest import MODEL

        tokenizer = load_tokenizer(open_checkpoint(MODEL))
        for rev, side in (("HEAD", "value"), ("base", "base")):
            assert row[side] == pytest.approx(chosen(load(store, revision=rev), tokenizer))
        suite = repo.eval(suite=[*repo["HEAD"]][:2], harness="ten_facts", harness_path=TASKS, harness_limit=4)
    assert row["value"] > row["base"]
    assert (row["task"], row["metric"]) == ("ten_facts", "acc")
    assert row["error"] is not None
    assert suite.scores
    assert len(suite.harness) == 1
    screen = run(*asked).stdout
    assert f"{row['value'] - row['base']:+.3f}" in screen
    assert [
        r["value"] - r["base"] for r in json.loads(run("eval", "base", *asked[1:], "--json").stdout)["harness"]
    ] == [0]
    assert "no task nope" in run("eval", "--harness", "nope", "--harness-path", str(TASKS), code=2).stderr


def test_what_cannot_be_run_is_refused_in_one_sentence(run: Run, tmp_path: Path) -> None:
    facts = tmp_path / "facts.json"
    facts.write_text('[{"prompt": "The capital of {} is", "subject": "Peru", "target_new": "Cusco"}]', encoding="utf-8")
    assert "--suite" in run("eval", code=2).stderr
    assert "contradict" in run("eval", "--all", "--suite", str(facts), "--harness", "x", code=2).stderr
    if missing:
        assert "patchhub[harness]" in run("eval", "--harness", "arc_easy", code=2).stderr


def test_the_harness_numbers_are_read_by_metric_and_filter() -> None:
    results = {
        "task": {
            "alias": "task",
            "acc,none": 0.5,
            "acc_stderr,none": 0.1,
            "exact_match,strict-match": 0.25,
            "exact_match_stderr,strict-match": "N/A",
            "sample_len": 10,
        }
    }
    assert _numbers(results) == {
        ("task", "acc"): (0.5, 0.1),
        ("task", "exact_match,strict-match"): (0.25, None),
    }
