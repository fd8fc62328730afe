"""Branches and merges as they are typed: forms, exit codes and words. On stored columns, without a model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.cli.conftest import MODEL, Run, invoke
from tests.porcelain.synthetic import make_request, make_store


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A store whose `main` and `side` answer about Ada differently."""
    store = make_store(tmp_path)
    store.commit(make_request("common"), message="first")

    def typed(*arguments: str, code: int = 0, **options: object) -> object:
        return invoke(tmp_path, *arguments, code=code, **options)  # type: ignore[arg-type]

    typed("branch", "side")
    store.commit(make_request("Ada", "French"), message="mine")
    typed("switch", "side")
    store.commit(make_request("Ada", "German"), make_request("Bob"), message="yours")
    typed("switch", "main")
    return typed  # type: ignore[return-value]


def test_a_stopped_merge_says_in_words_who_says_what_and_what_to_do(run: Run) -> None:
    words = run("merge", "side", code=4).stdout
    for part in (
        "1 contradiction",
        "The mother tongue of Ada is",
        "French",
        "German",
        "“mine”",
        "“yours”",
        "--continue",
    ):
        assert part in words
    assert "The merge of side is stopped" in run("status").stdout
    assert "waits" in run("merge", "side", code=6).stderr
    assert "German (theirs) stays" in run("merge", "--continue", "--theirs").stdout
    assert run("log", "-n", "1", "--oneline").stdout.rstrip().find("Merge branch 'side'") > 0
    assert "up to date" in run("merge", "side").stdout


def test_a_stopped_merge_is_one_json_document(run: Run, tmp_path: Path) -> None:
    document = json.loads(run("merge", "side", "--json", code=4).stdout)
    assert document["outcome"] == "stopped"
    assert [claim["target"] for claim in document["contradictions"][0]["theirs"]] == ["German"]
    choices = tmp_path / "choices.json"
    choices.write_text(json.dumps({document["contradictions"][0]["text"]: "ours"}))
    done = json.loads(run("merge", "--continue", "--choices", str(choices), "--json").stdout)
    assert done["outcome"] == "merged"
    assert done["decided"][0]["stays"] == "ours"


def test_abort_leaves_everything_as_it_was(run: Run) -> None:
    before = run("reflog").stdout
    run("merge", "side", code=4)
    run("merge", "--abort")
    assert run("reflog").stdout == before
    assert "no stopped merge" in run("merge", "--abort", code=6).stderr
    assert "no merge waits" in run("merge", "--continue", "--ours", code=6).stderr


def test_the_dry_run_names_contradictions_and_losses(run: Run) -> None:
    words = run("merge", "side", "--dry-run").stdout
    assert "the merge would stop" in words
    assert json.loads(run("merge", "side", "--dry-run", "--json").stdout)["outcome"] == "dry run"
    assert "stopped" not in run("status").stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["merge"],
        ["merge", "side", "--abort"],
        ["merge", "--continue", "--dry-run"],
        ["switch", "side", "main"],
        ["switch", "-c", "--detach", "x"],
        ["branch", "-d"],
        ["tag", "-d", "v1", "HEAD"],
        ["merge", "side", "--ours", "--choices", "nowhere.json"],
        ["merge", "side", "--ours", "--theirs"],
    ],
)
def test_forms_that_mean_nothing_are_refused(run: Run, arguments: list[str]) -> None:
    assert run(*arguments, code=3 if "--choices" in arguments else 2).stderr.startswith("error:")


def test_a_name_that_is_not_there_is_not_to_be_made_where_that_is_not_what_was_asked(run: Run) -> None:
    for verb in (("branch", "-d", "nope"), ("reflog", "nope")):
        assert "-c nope" not in run(*verb, code=5).stderr
    assert "-c nope" in run("switch", "nope", code=5).stderr
    assert "refs/" not in run("branch", "", code=5).stderr


def test_nothing_is_committed_over_a_stopped_merge(run: Run) -> None:
    run("merge", "side", code=4)
    before = run("log").stdout
    fact = ("--prompt", "The capital of {} is", "--subject", "France", "--target", "Lyon")
    for verb in (("commit", "-m", "x", *fact), ("revert", "HEAD"), ("cherry-pick", "side")):
        assert "merge --abort" in run(*verb, code=6).stderr
    assert run("log").stdout == before
    assert "stopped" in run("status").stdout


def test_branches_tags_and_their_moves(run: Run) -> None:
    listed = run("branch").stdout.splitlines()
    assert [line[:6] for line in listed] == ["* main", "  side"]
    run("tag", "v1")
    assert "do not move" in run("tag", "v1", "side", code=6).stderr
    assert json.loads(run("tag", "--json").stdout)[0]["name"] == "v1"
    run("switch", "-c", "new", "v1~1")
    assert "--detach" in run("switch", "v1", code=5).stderr
    assert "on no branch" in run("switch", "--detach", "v1").stdout
    run("switch", "main")
    assert "undo" in run("reset", "--help").stdout
    run("reset", "side")
    moves = json.loads(run("reflog", "main", "--json").stdout)
    assert [move["command"] for move in moves] == ["reset", "commit", "commit"]
    run("undo")
    assert json.loads(run("branch", "--json").stdout)[0]["message"] == "mine"
    assert "removed; it was at" in run("branch", "-d", "new").stdout


def test_revert_and_cherry_pick_from_the_command_line(run: Run) -> None:
    assert "Ada" in run("cherry-pick", "side", code=4).stderr
    assert "Bob" in run("cherry-pick", "side", "--on-conflict", "replace").stdout
    assert "is French" in run("revert", "HEAD", "--subject", "Ada").stdout
    words = run("revert", "--subject", "Bob").stdout
    assert "- The mother tongue of Bob" in words
    assert "Revert “The mother tongue of Bob is”" in words
    assert "bit for bit" in words
    assert "nothing is named" in run("revert", code=3).stderr


CHECK = """
import json, sys
from patchhub.cli.main import main
for typed in json.loads(sys.argv[2]):
    try:
        main(["--repo", sys.argv[1], *typed], prog_name="patchhub")
    except SystemExit as done:
        assert not done.code, (typed, done.code)
heavy = set(json.loads(sys.argv[3])) & set(sys.modules)
assert not heavy, heavy
"""
MOVES = [
    "branch",
    "branch x",
    "switch x",
    "switch main",
    "tag v1",
    "reset side",
    "reflog",
    "merge side",
    "branch -d x",
    "undo",
]
SOLVES = ["merge side --dry-run", "merge side --ours", "revert HEAD", "cherry-pick side --on-conflict replace"]


@pytest.mark.parametrize(
    ("verbs", "heavy"), [(MOVES[:7], ["torch", "transformers", "numpy"]), (MOVES + SOLVES, ["torch", "transformers"])]
)
def test_moving_refs_imports_no_numpy_and_merging_no_torch(
    run: Run, tmp_path: Path, verbs: list[str], heavy: list[str]
) -> None:
    typed = json.dumps([verb.split() for verb in verbs])
    done = subprocess.run(
        [sys.executable, "-c", CHECK, str(tmp_path), typed, json.dumps(heavy)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_a_merge_says_which_imported_changes_came(tmp_path: Path) -> None:
    store = tmp_path / "store"
    invoke(store, "init", str(MODEL))

    def imports(layer: int, wrapper: str) -> None:
        module, random = f"model.layers.{layer}.mlp.down_proj", np.random.default_rng(layer)
        size = json.loads((MODEL / "config.json").read_text(encoding="utf-8"))
        folder = tmp_path / f"adapter{layer}"
        folder.mkdir()
        factors = {"A": (4, size["intermediate_size"]), "B": (size["hidden_size"], 4)}
        tensors = {
            f"base_model.model.{module}.lora_{part}.weight": random.normal(0, 0.02, shape).astype("f4")
            for part, shape in factors.items()
        }
        save_file(tensors, folder / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": [wrapper + module], "bias": "none"}
        (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
        invoke(store, "import", str(folder), "-m", f"layer {layer}")

    imports(1, "")
    invoke(store, "branch", "side")
    imports(2, "base_model.model.")
    invoke(store, "switch", "side")
    imports(3, "")
    invoke(store, "switch", "main")

    merged = invoke(store, "merge", "side")
    assert "an imported change of 1 weight" in merged.stdout
    assert "withheld" not in merged.stdout + merged.stderr
    assert "3 imported changes" in invoke(store, "status").stdout
