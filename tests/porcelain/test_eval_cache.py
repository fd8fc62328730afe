"""What was measured is not measured again: by state and item, whatever the revision is called, and only while nothing differs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from patchhub.cache import Cache
from patchhub.errors import BaseError, EditError, RequestError, SettingsError
from patchhub.porcelain.change import revert
from patchhub.porcelain.measure import Evaluation, Evaluator, Facts, evaluate, evaluate_history, metrics_for
from patchhub.porcelain.refs import collect, config_set
from patchhub.porcelain.scores import notes_of
from patchhub.progress import Silent
from patchhub.store.store import Store
from patchhub.who import Who
from patchhub.worktree import measuring
from patchhub.worktree.measuring import StateResults, item_key, state_key
from tests.porcelain.taught import AUTHOR, PLACES, TIME, TONGUES, fact, make_store, teach

pytestmark = pytest.mark.usefixtures("short_texts")

FACTS = Facts(tuple(fact(*pair) for pair in [*PLACES, *TONGUES]), "facts.json", "wise", contexts=("So. {}",))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    make_store(folder).close()
    return folder


@pytest.fixture
def repository(original: Path, tmp_path: Path) -> Iterator[Store]:
    """A copy that the test may change."""
    shutil.copytree(original / ".patchhub", tmp_path / ".patchhub")
    with Store.open(tmp_path) as opened:
        yield opened


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The stages that a model had to answer."""
    asked: list[str] = []
    real = measuring.Measurer._model

    def watched(self: measuring.Measurer, revision: str) -> Any:
        asked.append(revision)
        return real(self, revision)

    monkeypatch.setattr(measuring.Measurer, "_model", watched)
    return asked


def run(repository: Store, revision: str = "HEAD", facts: Facts = FACTS, **options: Any) -> Evaluation:
    return evaluate(Evaluator(repository, facts, Silent()), revision, Who(AUTHOR, TIME), **options)


def numbers(done: Evaluation) -> dict[str, Any]:
    return {**done.to_json(), "commit": None, "note": None}


def test_the_same_question_is_asked_once(repository: Store, loads: list[str]) -> None:
    first = run(repository)
    assert loads
    loads.clear()
    assert numbers(run(repository)) == numbers(first)
    fewer = Facts(FACTS.requests, "facts.json", "counterfact", limit=2, contexts=FACTS.contexts)
    run(repository, facts=fewer)
    assert not loads, "no model is loaded for what is known"
    run(repository, facts=Facts(FACTS.requests, contexts=("Then. {}",)))
    assert loads


def test_a_state_that_comes_back_is_known_by_its_content(repository: Store, loads: list[str]) -> None:
    before = run(repository, "HEAD~1")
    run(repository)
    revert(repository, "HEAD", Who(AUTHOR, TIME, ""))
    loads.clear()
    assert numbers(run(repository)) == numbers(before)
    assert not loads
    teach(repository, [("Paris", "Lyon")], "one more")
    run(repository)
    assert loads


def test_a_lost_or_damaged_cache_costs_time_only(repository: Store, loads: list[str]) -> None:
    first = run(repository)
    states = sorted((repository.cache.folder / "scores").iterdir())
    assert len(states) == 2, "the base and HEAD"
    for file in states[0].iterdir():
        file.write_bytes(file.read_bytes().replace(b"[[", b"[[9,", 1))
    shutil.rmtree(states[1])
    loads.clear()
    assert numbers(run(repository)) == numbers(first)
    assert loads


def test_keys_tell_everything_apart_and_nothing_else() -> None:
    assert item_key("target", prompt="a", target="b") == item_key("target", target="b", prompt="a")
    assert item_key("target", prompt="a", target="b") != item_key("greedy", prompt="a", target="b")
    assert state_key(base="x", deltas=["1"]) != state_key(base="x", deltas=["2"])


def test_results_of_two_runs_add_up(tmp_path: Path) -> None:
    one, other = StateResults(Cache(tmp_path), "s"), StateResults(Cache(tmp_path), "s")
    one.keep({"a": [1.5, "x"]})
    other.keep({"b": None})
    assert dict(StateResults(Cache(tmp_path), "s")) == {"a": [1.5, "x"], "b": None}
    for file in tmp_path.rglob("*.json"):
        file.write_bytes(b"\xff\n{}")
    assert dict(StateResults(Cache(tmp_path), "s")) == {}


def test_a_walk_measures_what_has_no_note_of_this_suite(repository: Store, loads: list[str]) -> None:
    run(repository, "HEAD~1")
    rows = evaluate_history(Evaluator(repository, FACTS, Silent()), "HEAD", Who(AUTHOR, TIME))
    assert [row.fresh for row in rows] == [True, False]
    assert [row.message for row in rows] == ["tongues", "places"]
    loads.clear()
    again = evaluate_history(Evaluator(repository, FACTS, Silent()), "HEAD", Who(AUTHOR, TIME))
    assert [row.noted for row in again] == [row.noted for row in rows]
    assert not any(row.fresh for row in again)
    assert not loads
    other = Facts(FACTS.requests, "facts.json", "wise", limit=2, contexts=FACTS.contexts)
    assert all(row.fresh for row in evaluate_history(Evaluator(repository, other, Silent()), "HEAD", Who(AUTHOR, TIME)))
    assert len(notes_of(repository, repository.resolve("HEAD"))) == 2


def test_a_commit_that_gives_no_numbers_does_not_end_a_walk(repository: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = repository.resolve("HEAD")
    real = measuring.Measurer.measure

    def measure(self: measuring.Measurer, revision: str, *, behind: str | None = None) -> measuring.Measured:
        if revision == broken:
            raise EditError("the model's logits are not numbers")
        return real(self, revision, behind=behind)

    monkeypatch.setattr(measuring.Measurer, "measure", measure)
    progress = Silent()
    rows = evaluate_history(Evaluator(repository, FACTS, progress), "HEAD", Who(AUTHOR, TIME))
    assert [row.noted is None for row in rows] == [True, False]
    assert "not numbers" in progress.warnings[0]


def test_a_note_says_what_was_measured(repository: Store) -> None:
    done = run(repository)
    [noted] = notes_of(repository, done.commit)
    assert (noted.note, noted.suite, noted.metrics, noted.facts) == (done.note, done.suite, "wise", 6)
    assert noted.scores == done.scores
    settings = repository.note(noted.note).settings
    assert settings["contexts"] == ["So. {}"]
    assert run(repository, "base").note is None


def test_a_seed_draws_other_facts_and_a_limit_alone_the_first() -> None:
    requests = FACTS.requests
    assert Facts(requests, limit=3).chosen == requests[:3]
    drawn = [Facts(requests, limit=3, seed=seed).chosen for seed in range(8)]
    assert len(set(drawn)) > 1
    assert all(list(part) == [request for request in requests if request in part] for part in drawn)
    assert Facts(requests, limit=3, seed=1).chosen == drawn[1]
    assert Facts(requests, limit=99, seed=1).chosen == requests


def test_prompts_that_leave_no_room_are_not_scored(repository: Store) -> None:
    filled = Facts(FACTS.requests, contexts=("It is so. " * 9 + "{}",))
    scores = run(repository, facts=filled, keep=False).scores
    assert "exact" in scores
    assert "exact_in_context" not in scores


def test_text_of_ones_own_replaces_what_was_kept_aside(repository: Store, tmp_path: Path) -> None:
    text = tmp_path / "held.txt"
    text.write_text("What does the Eiffel Tower look like?\nBecause I think that you know it.\n", encoding="utf-8")
    own = run(repository, facts=Facts(FACTS.requests, text=(text,), contexts=FACTS.contexts), keep=False)
    kept = run(repository, facts=Facts(FACTS.requests, contexts=FACTS.contexts), keep=False)
    assert own.scores["kl"].records == 2
    assert own.scores["kl"] != kept.scores["kl"]
    assert own.suite != kept.suite
    with pytest.raises(RequestError, match="cannot be read"):
        run(repository, facts=Facts(FACTS.requests, text=(tmp_path / "none.txt",)))


@pytest.mark.parametrize(
    ("facts", "error", "says"),
    [
        (Facts(FACTS.requests, metrics="rouge"), SettingsError, "rouge"),
        (Facts(()), RequestError, "no facts"),
        (Facts(FACTS.requests, contexts=("no slot",)), SettingsError, "does not contain"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(
    repository: Store, facts: Facts, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        run(repository, facts=facts)


def test_a_base_that_is_gone_is_named(repository: Store, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    config = empty / "config.json"
    config.write_text("{}", encoding="utf-8")
    config_set(repository, "base.path", str(empty))
    config.unlink()
    with pytest.raises(BaseError, match="empty"):
        run(repository)


def test_old_results_are_collected_and_fresh_ones_stay(repository: Store, loads: list[str]) -> None:
    first = run(repository, keep=False)
    files = sorted((repository.cache.folder / "scores").rglob("*.json"))
    os.utime(files[0], (0, 0))
    assert [item.path for item in collect(repository, now=TIME).items] == [files[0]]
    assert [file for file in files if file.exists()] == files[1:]
    assert numbers(run(repository, keep=False)) == numbers(first)


@pytest.mark.parametrize(
    ("name", "content", "metrics"),
    [
        ("a.json", '[{"subject": "x", "src": "x is", "alt": "y"}]', "zsre"),
        ("a.csv", "subject,src,alt\nx,x is,y\n", "zsre"),
        ("a.csv", "prompt,subject,target_new\nthe alt of x,x,src\n", "counterfact"),
        ("a.jsonl", '{"prompt": "{} is", "subject": "x", "target_new": "src alt"}', "counterfact"),
    ],
)
def test_the_shape_of_the_records_chooses_the_metrics(tmp_path: Path, name: str, content: str, metrics: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert metrics_for(tmp_path / name) == metrics
    assert metrics_for(tmp_path / "missing.json") == "counterfact"
