"""Notes read back: whatever they hold, in a fixed order, beside each other, and only what the refs name now."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from patchhub.objects import Note
from patchhub.porcelain.exchange import hub_pages
from patchhub.porcelain.history import log, show
from patchhub.porcelain.scores import Score, compare, noted_history, notes_of, read_note
from patchhub.porcelain.search import diff
from patchhub.progress import Silent
from tests.porcelain.synthetic import AUTHOR, TIME, Synthetic, make_request, make_store
from tests.remotes import stores

ID = "a" * 64


@pytest.fixture
def history(tmp_path: Path) -> Synthetic:
    """Two commits, both measured, the first one twice."""
    store = make_store(tmp_path)
    first = store.commit(make_request("Ada"), message="first")
    second = store.commit(make_request("Grace"), message="second")
    for commit, score in ((first, 0.25), (first, 0.5), (second, 0.75)):
        add(store, commit, {"S": {"value": score, "low": 0.1, "high": 0.9, "records": 4, "base": 0.05}, "exact": 0.5})
    return store


def add(store: Synthetic, commit: str, scores: dict[str, Any], suite: str = "counterfact-1") -> None:
    settings = {"metrics": "counterfact", "file": "facts.json", "facts": 4}
    note = Note(commit=commit, made_by="Ada", scores=scores, settings=settings, suite=suite)
    store.repository.add_note(note, command="eval", arguments={}, author=AUTHOR, time=TIME)


def test_only_the_present_note_of_a_suite_counts(history: Synthetic) -> None:
    repository = history.repository
    [noted] = notes_of(repository, repository.resolve("HEAD~1"))
    assert noted.scores["S"] == Score(0.5, 0.1, 0.9, 0.05, 4)
    assert list(noted.leading) == ["S", "exact"]
    assert [row.scores["S"].value for row in noted_history(repository, "HEAD", "counterfact-1")] == [0.5, 0.75]
    assert noted_history(repository, "HEAD", "other") == []
    assert notes_of(repository, None) == ()


def test_log_show_and_diff_say_the_scores(history: Synthetic) -> None:
    repository = history.repository
    assert [entry.scores[0].scores["S"].value for entry in log(repository)] == [0.75, 0.5]
    assert show(repository).to_json()["scores"][0]["scores"]["S"]["value"] == 0.75
    [row] = diff(repository, "HEAD~1", "HEAD").scores
    assert (row.before["S"].value, row.after["S"].value) == (0.5, 0.75)
    [from_base] = diff(repository, "base", "HEAD").scores
    assert (from_base.before, from_base.after["S"].value) == ({"S": Score(0.05)}, 0.75)
    [to_base] = diff(repository, "HEAD", "base").scores
    assert (to_base.before["S"].value, to_base.after) == (0.75, {"S": Score(0.05)})


def test_a_side_that_was_not_measured_has_no_scores(history: Synthetic) -> None:
    store = history
    third = store.commit(make_request("Alan"))
    add(store, third, {"S": 1}, suite="counterfact-2")
    found = {row.suite: row for row in compare(store.repository, store.repository.resolve("HEAD~1"), third)}
    assert (found["counterfact-1"].before["S"].value, found["counterfact-1"].after) == (0.75, {})
    assert (found["counterfact-2"].before, found["counterfact-2"].after["S"].value) == ({}, 1)
    assert diff(store.repository, "base", "base").scores == ()


def test_the_model_card_holds_the_scores_with_their_meaning(tmp_path: Path) -> None:
    repository = stores.make_store(tmp_path)
    head = stores.add_batch(repository, range(2))
    scores = {"S": {"value": 0.75, "low": 0.1, "high": 0.9, "base": 0.05}, "exact": 0.5}
    settings = {"metrics": "counterfact", "facts": 4}
    note = Note(commit=head, made_by="Ada", scores=scores, settings=settings, suite="counterfact-1")
    repository.add_note(note, command="eval", arguments={}, author=AUTHOR, time=TIME)
    card = hub_pages(repository, "ada/facts", head, Silent(), withheld=False)["README.md"]
    assert card
    text = card.decode()
    assert "| S | 0.75 | 0.1 to 0.9 | 0.05 | harmonic mean of" in text
    assert "counterfact, 4 facts" in text
    assert "| exact | 0.5 |  |  |" in text


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


@given(
    scores=st.dictionaries(st.sampled_from(["S", "value", "x", ""]) | st.text(max_size=4), values, max_size=5),
    settings=st.dictionaries(st.sampled_from(["metrics", "file", "facts", "seed"]), values, max_size=4),
)
def test_any_note_can_be_read(scores: dict[str, Any], settings: dict[str, Any]) -> None:
    """Notes come from others as well; what is no finite number is left out."""
    noted = read_note(ID, Note(commit=ID, made_by="", scores=scores, settings=settings, suite="x"))
    assert all(math.isfinite(score.value) for score in noted.scores.values())
    assert noted.leading.keys() <= noted.scores.keys()
    noted.to_json()


def test_scores_come_in_the_order_of_their_definitions() -> None:
    scores = {"exact": 1, "zzz": 2, "ES": 3, "S": 4, "aaa": {"b": 5}}
    noted = read_note(ID, Note(commit=ID, made_by="", scores=scores, settings={}, suite="zsre"))
    assert list(noted.scores) == ["S", "ES", "exact", "aaa.b", "zzz"]
    assert noted.metrics == "zsre"
