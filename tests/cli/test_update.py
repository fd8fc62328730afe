"""`update`, and what `commit` says of facts that compete for a key; on the shipped model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from patchhub.store.store import Store
from tests.cli.conftest import FACTS, Run

AUSTRALIA = "The capital of Australia is"


def facts(store: Path) -> dict[str, str]:
    """Target by text of every active fact."""
    from patchhub.sets.elements import active_requests

    with Store.open(store) as repository:
        found = active_requests(repository, repository.active(repository.head[1]))
        return {request.text: request.target_new for request in found.values()}


def test_one_fact_gets_another_target_in_one_commit(run: Run, store: Path) -> None:
    before = facts(store)
    done: dict[str, Any] = json.loads(run("update", "--subject", "Australia", "--target", "Rome", "--json").stdout)
    assert (len(done["written"]), len(done["replaced"]), done["held"]) == (1, 1, 1)
    assert facts(store) == {**before, AUSTRALIA: "Rome"}
    assert "Sydney -> Rome" in run("log").stdout
    shown = json.loads(run("show", "--json").stdout)
    (added,) = shown["facts_added"]
    assert added["target_true"] == FACTS[0]["target_true"]
    with Store.open(store) as repository:
        request = repository.requests(repository.patch(done["patches"][0]))[0]
        assert len(request.paraphrases) == len(FACTS[0]["paraphrases"])
    run("revert", "HEAD")
    assert facts(store) == before


def test_back_to_the_true_answer(run: Run, store: Path) -> None:
    run("update", "--subject", "Australia", "--target", FACTS[0]["target_true"])
    assert facts(store)[AUSTRALIA] == FACTS[0]["target_true"]


def test_which_fact_is_meant_must_be_clear(run: Run, store: Path) -> None:
    before = facts(store)
    assert "Did you mean 'Australia'?" in run("update", "--subject", "Austria", "--target", "Rome", code=3).stderr
    assert "already" in run("update", "--subject", "Australia", "--target", "Sydney", code=3).stderr
    assert "commit" in run("update", "--subject", "Zanzibar", "--target", "Rome", code=3).stderr
    second = {"prompt": "People in {} speak", "subject": "Australia", "target_new": "Polish"}
    for key, value in (("repairs", "0"), ("steps", "2")):  # which fact is meant does not depend on whether it holds
        run("config", f"memit.{key}", value)
    run("commit", "-", "-m", "x", "--force", stdin=json.dumps(second))
    refused = run("update", "--subject", "Australia", "--target", "Rome", code=3).stderr
    assert "People in {} speak; The capital of {} is" in refused
    wrong = run("update", "--subject", "Australia", "--target", "Rome", "--prompt", "The flag of {} is", code=3).stderr
    assert "no active fact with the prompt" in wrong
    for prompt, target in ((AUSTRALIA, "Rome"), ("People in {} speak", "German")):
        run("update", "--subject", "Australia", "--target", target, "--prompt", prompt, "--force")
    assert facts(store) == {**before, AUSTRALIA: "Rome", "People in Australia speak": "German"}


def test_facts_kept_side_by_side_are_all_replaced(run: Run, store: Path) -> None:
    before = facts(store)
    for key, value in (("repairs", "0"), ("steps", "2")):
        run("config", f"memit.{key}", value)
    other = json.dumps({**FACTS[0], "target_new": "Rome"})
    run("commit", "-", "-m", "x", "--on-conflict", "keep", "--force", stdin=other)
    assert "already" in run("update", "--subject", "Australia", "--target", "Rome", code=3).stderr
    done = json.loads(run("update", "--subject", "Australia", "--target", "Paris", "--force", "--json").stdout)
    assert len(done["replaced"]) == 2
    assert facts(store) == {**before, AUSTRALIA: "Paris"}


def test_two_answers_to_one_question_are_told_by_what_the_model_says(run: Run, store: Path) -> None:
    """The same fact in other words with another target: they share a value, which cannot say both, and the loser is named."""
    rival = {"prompt": "The capital city of {} is", "subject": "Australia", "target_new": "Rome"}
    for key, value in (("repairs", "1"), ("steps", "10")):
        run("config", f"memit.{key}", value)
    done = json.loads(run("commit", "-", "-m", "x", "--json", "--force", stdin=json.dumps(rival)).stdout)
    assert len(done["again"]) == 1
    assert done["rivals"] == []
    assert "not said" in {fault["why"] for fault in done["faults"]}


def test_facts_of_one_target_do_not_compete(run: Run) -> None:
    same = {"prompt": "The capital city of {} is", "subject": "Australia", "target_new": "Sydney"}
    quick = ("--set", "steps=2", "--set", "repairs=0", "--force")
    run("commit", "-", "-m", "x", "--strict", *quick, stdin=json.dumps(same))


def test_settings_for_one_commit(run: Run, store: Path) -> None:
    done = json.loads(
        run(
            "commit",
            "-",
            "-m",
            "x",
            "--json",
            "--set",
            "layers=2,3",
            "--set",
            "memit.ridge=99",
            "--force",
            stdin=json.dumps(FACTS[12]),
        ).stdout
    )
    with Store.open(store) as repository:
        settings = repository.patch(done["patches"][0]).settings
    assert (settings["layers"], settings["ridge"]) == ([2, 3], 99)
    fact = json.dumps(FACTS[13])
    for text, words in (
        ("layers", "not KEY=VALUE"),
        ("layers=x", "3-5"),
        ("lambda=3", "no setting"),
        ("ridge=0", "above 0"),
        ("pmet.ridge=3", "no setting"),
        ("preset=published", "nobody published"),
        ("preset=gpt2-xxl", "the presets are"),
        ("layers=3-9", "cannot name layer 9"),
    ):
        assert words in run("commit", "-", "-m", "x", "--set", text, code=2, stdin=fact).stderr
    assert "the presets are" in run("config", "preset", "gpt5", code=2).stderr
