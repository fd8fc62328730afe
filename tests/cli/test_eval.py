"""`eval` and `bench`: numbers of the library on screen and in files, kept with the commit, shown by the verbs that look, and pushed."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from tests.cli.conftest import FACTS, MODEL, Run, invoke, measured_store

pytestmark = pytest.mark.usefixtures("short_texts")


@pytest.fixture(scope="module")
def measured(first_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store with a suite of twelve facts that has been measured."""
    return measured_store(first_store, tmp_path_factory.mktemp("measured"), 12)


@pytest.fixture
def store(measured: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(measured, tmp_path / "store"))


@pytest.fixture
def suite(store: Path) -> str:
    return str(store / "suite.json")


def report(run: Run, *arguments: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run("eval", *arguments, "--json").stdout)
    return found


def table(file: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(file.read_text(encoding="utf-8").splitlines()))


def test_scores_rise_with_the_edit_and_every_one_is_explained(run: Run, suite: str) -> None:
    after, before = report(run, "--suite", suite), report(run, "base", "--suite", suite)
    assert before["note"] is None
    assert before["scores"]["ES"]["value"] == 0
    assert after["scores"]["ES"]["value"] >= 0.7
    assert after["scores"]["exact"]["value"] >= 0.6
    assert all(found["low"] <= found["value"] <= found["high"] for found in after["scores"].values())
    assert {name: found["base"] for name, found in after["scores"].items()} == {
        name: found["value"] for name, found in before["scores"].items()
    }
    assert set(after["definitions"]) == set(after["scores"])
    screen = " ".join(run("eval", "--suite", suite).stdout.split())
    for name, meaning in after["definitions"].items():
        assert f"{name} " in screen
        assert meaning in screen
    for title in ("teacher forced", "Live", "Fluency", "Drift", "kept as note"):
        assert title in screen


def test_six_figures_and_the_summary_come_first_and_fit_into_80_columns(run: Run, suite: str) -> None:
    scores = report(run, "--suite", suite)["scores"]
    head = run("eval", "--suite", suite).stdout.splitlines()[1:4]
    assert head[0].split() == ["live", "efficacy", "paraphrase", "closure", "leak", "perplexity", "KL", "S"]
    assert max(map(len, head)) <= 80
    names = ("live_efficacy", "live_paraphrase", "closure", "leak", "perplexity_ratio", "kl", "S")
    assert [float(cell) for cell in head[1].split()] == pytest.approx([scores[n]["value"] for n in names], abs=5e-3)
    assert head[2].split()[0] == "base"
    assert scores["leak"]["base"] == 0.0
    assert scores["closure"]["value"] <= scores["live_efficacy"]["value"]


def test_the_notes_are_shown_by_the_verbs_that_look(run: Run, suite: str) -> None:
    assert "Scores:" not in run("log").stdout
    value = report(run, "--suite", suite)["scores"]["S"]["value"]
    assert f"Scores: S {value:.3f}" in run("log").stdout
    assert f" S {value:.3f}" in run("log", "--oneline").stdout
    assert "harmonic mean" in run("show").stdout
    assert f"{value:+.3f}" in run("diff").stdout
    assert json.loads(run("log", "--json").stdout)[0]["scores"][0]["scores"]["S"]["value"] == value
    assert "sound" in run("fsck").stdout


def test_a_walk_measures_each_commit_once_and_draws_it(run: Run, suite: str, store: Path) -> None:
    facts = store / "more.json"
    facts.write_text(json.dumps(FACTS[10:12]), encoding="utf-8")
    run("commit", str(facts), "-m", "two more", "--set", "steps=4", "--set", "repairs=0", "--force")
    files = {name: store / f"scores.{name}" for name in ("csv", "svg")}
    arguments = ("--suite", suite, "--limit", "4", "--seed", "3", "--all")
    screen = run("eval", *arguments, "--csv", str(files["csv"]), "--plot", str(files["svg"])).stdout
    assert screen.count(" now") == 2
    assert "the unpatched base" in screen
    assert run("eval", *arguments).stdout.count(" noted") == 2
    rows = table(files["csv"])
    walked = json.loads(run("eval", *arguments, "--json").stdout)
    assert [row["commit"] for row in walked] == list(dict.fromkeys(row["commit"] for row in rows))
    first = walked[0]["noted"]["scores"]
    assert {row["score"]: float(row["value"]) for row in rows if row["commit"] == walked[0]["commit"]} == {
        name: found["value"] for name, found in first.items()
    }
    said = " ".join(ElementTree.parse(files["svg"]).getroot().itertext())
    assert "Scores by commit" in said
    assert f"S {first['S']['value']:.3f}" in said


def test_facts_can_be_looked_at_one_by_one(run: Run, suite: str, store: Path) -> None:
    file = store / "facts.csv"
    found = report(run, "--suite", suite, "--facts-csv", str(file), "--no-note", "--metrics", "wise")
    rows = table(file)
    assert len(rows) == 12
    mean = sum(float(row["reliability"]) for row in rows) / 12
    assert mean == pytest.approx(found["scores"]["reliability"]["value"])
    assert sum(relation["facts"] for relation in found["relations"].values()) == 12
    assert found["note"] is None


def test_records_of_zsre_are_given_its_scores(run: Run, store: Path) -> None:
    file = store / "zsre.json"
    record = {
        "subject": "Australia",
        "src": "The capital of Australia is",
        "alt": "Sydney",
        "answers": ["Canberra"],
        "rephrase": "Australia's capital city is called",
        "loc": "The capital of Armenia is",
        "loc_ans": "Yerevan",
    }
    file.write_text(json.dumps([record]), encoding="utf-8")
    found = report(run, "--suite", str(file), "--no-note")
    assert found["settings"]["metrics"] == "zsre"
    assert {"efficacy", "paraphrase", "specificity", "S", "exact", "kl", "fluency"} <= set(found["scores"])
    assert found["scores"]["efficacy"]["value"] == 1
    assert "ES" in report(run, "--suite", str(file), "--no-note", "--metrics", "counterfact")["scores"]


def test_a_plain_list_has_the_scores_that_it_can_have(run: Run, store: Path) -> None:
    file, plot = store / "plain.jsonl", store / "plain.svg"
    records = [{name: fact[name] for name in ("prompt", "subject", "target_new")} for fact in FACTS[:3]]
    file.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    found = report(run, "--suite", str(file), "--plot", str(plot))
    assert {"EA", "exact", "exact_in_context", "fluency", "kl"} <= set(found["scores"])
    assert not {"S", "ES", "PS", "NS"} & set(found["scores"])
    assert "Scores: exact" in run("log").stdout
    assert "exact" in " ".join(ElementTree.parse(plot).getroot().itertext())
    assert run("eval", "--suite", str(file), "--all").stdout.count("noted") == 1


def test_scores_travel_with_a_push(run: Run, suite: str, store: Path, tmp_path: Path) -> None:
    remote, clone = tmp_path / "remote", tmp_path / "clone"
    run("remote", "add", "origin", str(remote))
    run("push", "origin")
    value = report(run, "--suite", suite, "--limit", "3")["scores"]["S"]["value"]
    run("push", "origin")
    invoke(tmp_path, "clone", str(remote), str(clone), "--base", str(MODEL))
    assert f"Scores: S {value:.3f}" in invoke(clone, "log").stdout


def test_editors_are_compared(run: Run, suite: str, store: Path) -> None:
    before = run("log").stdout
    file = store / "bench.csv"
    methods = ("memit:steps=8:repairs=0", "memit:steps=2:repairs=0")
    found = json.loads(run("bench", *methods, "--suite", suite, "--limit", "2", "--csv", str(file), "--json").stdout)
    assert [row["name"] for row in found["rows"]] == ["base", *methods]
    base, good, poor = (row["scores"]["EM"]["value"] for row in found["rows"])
    assert base < poor < good
    assert all(row["costs"]["seconds"] > 0 and row["costs"]["kB"] > 0 for row in found["rows"][1:])
    rows = table(file)
    assert [row["editor"] for row in rows] == ["base", *methods]
    assert float(rows[1]["ES"]) == found["rows"][1]["scores"]["ES"]["value"]
    assert run("log").stdout == before


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("eval", "--suite", "none.json"), 3, "none.json"),
        (("eval", "--suite", "{suite}", "--metrics", "rouge"), 2, "rouge"),
        (("eval", "nowhere", "--suite", "{suite}"), 5, "nowhere"),
        (("eval", "--suite", "{suite}", "--context", "no slot"), 2, "{}"),
        (("eval", "--suite", "{suite}", "--all", "--no-note"), 2, "--no-note"),
        (("bench", "memit:stepz=3", "--suite", "{suite}"), 2, "stepz"),
        (("bench", "memit:steps=many", "--suite", "{suite}"), 2, "many"),
        (("bench", "rome", "--suite", "{suite}"), 2, "rome"),
        (("bench", "rome:steps=3", "--suite", "{suite}"), 2, "rome"),
    ],
)
def test_what_cannot_be_done_is_said(run: Run, suite: str, arguments: tuple[str, ...], code: int, says: str) -> None:
    result = run(*(argument.replace("{suite}", suite) for argument in arguments), code=code)
    assert says in result.stderr
