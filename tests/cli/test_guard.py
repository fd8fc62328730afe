"""The guard on the command line: refusals in words and as JSON, --force, --check, and what `show` and `log` say of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import FACTS, Run

HUGE = ["--set", "clamp=50", "--set", "learning_rate=20"]


@pytest.fixture
def more(store: Path) -> str:
    """A file with three more facts."""
    file = store / "more.json"
    file.write_text(json.dumps(FACTS[10:13]), encoding="utf-8")
    return str(file)


def test_a_collapse_is_refused_in_words_and_moves_nothing(run: Run, more: str) -> None:
    before = run("log", "--json").stdout
    refused = run("commit", more, "-m", "huge", *HUGE, code=10)
    assert "the guard refused this change" in refused.stderr
    assert "guard.drift" in refused.stderr
    assert "--force" in refused.stderr
    assert run("log", "--json").stdout == before
    assert json.loads(run("fsck", "--json").stdout)["sound"]


def test_a_refusal_is_data_under_json(run: Run, more: str) -> None:
    error = json.loads(run("commit", more, "-m", "huge", *HUGE, "--json", code=10).stderr.splitlines()[-1])["error"]
    assert (error["kind"], error["exit_code"]) == ("GuardError", 10)
    found = error["facts"]["findings"][0]
    assert found["check"] == "drift"
    assert found["value"] > found["limit"] > 0


def test_a_forced_commit_says_so(run: Run, more: str) -> None:
    run("commit", more, "-m", "huge", "--force", *HUGE)
    assert "forced although on text that has nothing to do with the facts" in run("show").stdout
    assert "forced although" in run("log", "--stat", "--oneline", "-n", "1").stdout
    check = json.loads(run("show", "--json").stdout)["check"]
    assert check["forced"] is True
    assert check["guard"]["failed"]


def test_a_healthy_commit_shows_what_was_measured(run: Run, more: str) -> None:
    run("commit", more, "-m", "three more")
    shown = run("show").stdout
    for words in ("guard: passed", "3 of 3 new facts are the model's answer", "drift from the base", "rounding to"):
        assert words in shown
    assert "Guard:  passed, 3/3 new facts hold" in run("log", "--stat").stdout
    assert "Guard" not in run("log").stdout


def test_merge_and_revert_ask_the_model_only_under_check(run: Run, more: str) -> None:
    run("branch", "side")
    run("commit", more, "-m", "here")
    run("switch", "side")
    run("commit", "--prompt", "The capital of {} is", "--subject", "Italy", "--target", "Milan", "-m", "there")
    run("switch", "main")
    run("merge", "side", "--check")
    assert "drift from the base" in run("show").stdout
    run("revert", "--subject", "Italy")
    assert "guard: passed" in run("show").stdout
    assert "drift from the base" not in run("show").stdout


def test_limits_are_settings(run: Run, more: str) -> None:
    run("config", "guard.drift", "0.00001")
    run("commit", more, "-m", "three more", code=10)
    run("config", "guard.drift", "-1", code=2)
