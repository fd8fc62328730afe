"""The guard on the command line: refusals in words and as JSON, --force, --check, and what `show` and `log` say of it."""

from __future__ import annotations

import json
import re
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
    said = run("commit", more, "-m", "huge", "--force", *HUGE).stdout
    assert "forced although on text that has nothing to do with the facts" in run("show").stdout
    assert "forced although" in run("log", "--stat", "--oneline", "-n", "1").stdout
    check = json.loads(run("show", "--json").stdout)["check"]
    assert check["forced"] is True
    assert check["guard"]["failed"]
    lost = check["guard"]["earlier"]
    assert lost["count"] > 0
    assert f"{lost['count']} of {lost['of']} earlier facts are no longer the model's answer" in said


def test_a_healthy_commit_shows_what_was_measured(run: Run, more: str) -> None:
    run("commit", more, "-m", "three more")
    shown = run("show").stdout
    for words in ("guard: passed", "3 of 3 new facts are the model's answer", "drift from the base", "rounding to"):
        assert words in shown
    stat = run("log", "--stat").stdout
    assert "Guard:  passed, 3/3 new facts hold" in stat
    assert re.search(r"held text moved by \d\.\d{3} nats", stat)
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


def test_what_does_not_read_right_is_named_by_commit_show_and_json(run: Run, store: Path) -> None:
    """Two facts with the same prompt and subject cannot both be said."""
    one, two = FACTS[10], {**FACTS[10], "target_new": FACTS[11]["target_new"]}
    (store / "both.json").write_text(json.dumps([one, *FACTS[11:13]]), encoding="utf-8")
    run("commit", str(store / "both.json"), "-m", "three")
    (store / "other.json").write_text(json.dumps([two, FACTS[13]]), encoding="utf-8")
    told = run("commit", str(store / "other.json"), "-m", "two", "--on-conflict", "keep", "--json", "--force").stdout
    faults = json.loads(told)["faults"]
    assert all(fault["why"] in ("not said", "runs on", "leak") and fault["prompt"] for fault in faults)
    check = json.loads(run("show", "--json").stdout)["check"]["guard"]["spoken"]
    assert check["faults"] == faults
    assert check["said"]["of"] == check["closed"]["of"] == 2
    failing = {fault["prompt"] for fault in faults if fault["why"] != "leak"}
    assert len(failing) == 2 - check["closed"]["count"]
    shown = run("show").stdout
    assert "written freely" in shown
    for fault in faults[:8]:
        assert f"{fault['prompt']!r} is followed by" in shown


def test_under_all_one_leak_is_enough_to_refuse(run: Run, store: Path) -> None:
    """A limit that any leak breaks, and `--all`, refuse the same commit, and the refusal says what the model wrote."""
    facts = json.dumps([{**fact, "target_new": FACTS[10]["target_new"]} for fact in FACTS[10:13]])
    (store / "alike.json").write_text(facts, encoding="utf-8")
    done = json.loads(run("commit", str(store / "alike.json"), "-m", "three", "--json").stdout)
    run("undo")
    if done["faults"]:
        refused = run("commit", str(store / "alike.json"), "-m", "three", "--all", "--json", code=10)
        error = json.loads(refused.stderr.splitlines()[-1])["error"]["facts"]
        assert error["findings"][-1]["check"] == "all"
        assert error["faults"] == done["faults"]
    else:
        run("commit", str(store / "alike.json"), "-m", "three", "--all")
