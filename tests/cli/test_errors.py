"""Bad input: one line that says what is wrong and where, one that says what to do, an exit code, and nothing written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

from patchhub.cli.main import main
from tests.cli.conftest import FACTS, MODEL, Run, snapshot_of

GOOD = json.dumps(FACTS[15])
OTHER = json.dumps({**FACTS[15], "target_new": "Something else"})
CASES = {
    "an empty file": ("", 3, "empty"),
    "a malformed line": (f"{GOOD}\n{{not json", 3, "line 2"),
    "a subject that is not in the prompt": (
        json.dumps({"prompt": "The capital of France is", "subject": "Spain", "target_new": "Lyon"}),
        3,
        "Spain",
    ),
    "a missing field": (json.dumps({"prompt": "{} is", "subject": "X"}), 3, "target_new"),
    "contradictory requests": (f"{GOOD}\n{OTHER}", 4, "Something else"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_facts_change_nothing(case: str, run: Run, store: Path) -> None:
    text, code, words = CASES[case]
    before = snapshot_of(store)
    error = run("commit", "-", "-m", "x", "--format", "jsonl", stdin=text, code=code).stderr
    assert words in error
    assert error.startswith("error: ")
    assert len(error.strip().splitlines()) == 2
    assert snapshot_of(store) == before


def test_a_malformed_line_of_a_file_is_named(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "facts.jsonl"
    file.write_text(f"{GOOD}\n\n{GOOD[:-1]}\n")
    assert f"{file}, line 3" in run("commit", str(file), "-m", "x", code=3).stderr


@pytest.mark.parametrize("revision", ["HEAD~7", "nosuch", "dead", "main@{99}", "main~x"])
def test_unknown_revisions(revision: str, run: Run, store: Path) -> None:
    before = snapshot_of(store)
    for verb in (("show", revision), ("revert", revision), ("apply", revision, "--out", str(store / "x"))):
        assert len(run(*verb, code=5).stderr.strip().splitlines()) == 2
    assert snapshot_of(store) == before
    assert not (store / "x").exists()


def changed_base(store: Path, tmp_path: Path, value: float) -> Path:
    """A folder like the base with one entry of every feed-forward weight changed, made the store's base."""
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    for name, parameter in model.named_parameters():
        if "mlp" in name:
            parameter.data[0, 0] = value
    folder = tmp_path / "other"
    shutil.copytree(MODEL, folder)
    model.save_pretrained(folder)
    config = json.loads((store / ".patchhub" / "config.json").read_text())
    config["base"]["path"] = str(folder)
    (store / ".patchhub" / "config.json").write_text(json.dumps(config))
    return folder


def test_another_base_is_refused(run: Run, store: Path, tmp_path: Path) -> None:
    changed_base(store, tmp_path, 1.5)
    before = snapshot_of(store)
    for verb in (("commit", "-", "-m", "x"), ("apply", "HEAD", "--out", str(tmp_path / "out")), ("ask", "The")):
        assert "not this repository's base" in run(*verb, stdin=GOOD, code=8).stderr
    assert snapshot_of(store) == before
    assert not (tmp_path / "out").exists()


def test_a_base_with_nan_is_refused(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    model.get_parameter("model.layers.1.mlp.down_proj.weight").data[3, 4] = torch.nan
    folder = tmp_path / "nan"
    shutil.copytree(MODEL, folder)
    model.save_pretrained(folder)
    runner, store = CliRunner(), str(tmp_path / "store")
    result = runner.invoke(main, ["--repo", store, "init", str(folder)])
    if result.exit_code == 0:
        result = runner.invoke(main, ["--repo", store, "commit", "-", "-m", "x"], input=GOOD)
    assert result.exit_code == 8, result.output
    assert "not finite" in result.stderr


def test_no_store_and_no_model(tmp_path: Path) -> None:
    runner = CliRunner()
    missing = runner.invoke(main, ["--repo", str(tmp_path), "log"])
    assert missing.exit_code == 6
    assert "patchhub init" in missing.stderr
    nothing = runner.invoke(main, ["--repo", str(tmp_path), "init", str(tmp_path / "nosuch")])
    assert nothing.exit_code == 8
    assert not (tmp_path / ".patchhub").exists()


def test_errors_as_json(run: Run) -> None:
    error = json.loads(run("show", "nosuch", "--json", code=5).stderr)["error"]
    assert error["kind"] == "RevisionError"
    assert error["exit_code"] == 5
    assert error["remedy"]


def test_a_mistyped_command_is_explained() -> None:
    result = CliRunner().invoke(main, ["comit"])
    assert result.exit_code == 2
    assert "patchhub commit" in result.stderr
