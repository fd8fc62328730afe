"""`search` and the lookup in words: what the index says is what the objects say, at any commit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from patchhub.cli.main import main
from patchhub.errors import SettingsError
from patchhub.porcelain.search import mentioned, search
from patchhub.store import lookup
from tests.porcelain.synthetic import Synthetic, make_request, make_store

PEOPLE = ("Marie Curie", "Louis Pasteur", "Ada Lovelace", "Zoë Müller", "Ann", "Ann Lee")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Synthetic:
    """A commit per person; then Pasteur is taken back, and Curie is taught again with another target."""
    made = make_store(tmp_path_factory.mktemp("search"))
    for name in PEOPLE:
        made.commit(make_request(name), message=f"about {name}")
    made.commit(make_request("Gil"), remove=_columns_of(made, "Louis Pasteur"), message="not Pasteur")
    made.commit(make_request("Marie Curie", "Polish"), remove=_columns_of(made, "Marie Curie"), message="Polish")
    return made


def _columns_of(store: Synthetic, subject: str) -> frozenset[tuple[str, str | None]]:
    request = make_request(subject).id
    return frozenset(element for element in store.active() if element[1] == request)


def test_search_says_who_taught_it_and_whether_it_holds(store: Synthetic) -> None:
    (found,) = search(store.repository, "pasteur")
    assert not found.active
    assert [change.message for change in found.changes] == ["about Louis Pasteur", "not Pasteur"]
    assert found.taught is not None
    assert found.taught.message == "about Louis Pasteur"
    assert search(store.repository, "pasteur", revision="HEAD~2")[0].active
    assert not search(store.repository, "pasteur", revision="base")[0].active
    states = {item.fact.target_new: item.active for item in search(store.repository, "Curie")}
    assert states == {"French": False, "Polish": True}


@pytest.mark.parametrize(
    ("words", "subject", "people"),
    [
        ("muller", "", {"Zoë Müller"}),
        ("tongue french", "ann", {"Ann", "Ann Lee"}),
        ("", "lee", {"Ann Lee"}),
        ("ann lovelace", "", set()),
        ("polish", "curie", {"Marie Curie"}),
        ("french", "curie polish", set()),
        ('" OR *', "", set()),
        ("lee ?", "", set()),
    ],
)
def test_every_word_must_be_there(store: Synthetic, words: str, subject: str, people: set[str]) -> None:
    assert {item.fact.subject for item in search(store.repository, words, subject=subject)} == people


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=15), st.text(max_size=10))
def test_any_text_can_be_searched_for(store: Synthetic, words: str, subject: str) -> None:
    if words.strip() or subject.strip():
        search(store.repository, words, subject=subject)
    else:
        with pytest.raises(SettingsError):
            search(store.repository, words, subject=subject)


def test_active_columns_are_those_of_the_set_at_every_commit(store: Synthetic) -> None:
    repository = store.repository
    tip = repository.resolve("HEAD")
    assert tip is not None
    everything = [fact.request for fact in lookup.search(repository, "tongue")]
    assert len(set(everything)) == len(PEOPLE) + 2
    for identity, _ in repository.log(tip):
        assert lookup.active_among(repository, identity, everything) == repository.active(identity)
    assert lookup.active_among(repository, None, everything) == set()
    assert lookup.active_among(repository, tip, everything * 100) == repository.active(tip)


def test_a_prompt_is_looked_up_among_the_active_facts(store: Synthetic) -> None:
    facts = mentioned(store.repository, "The mother tongue of Ann Lee is")
    assert [fact.subject for fact in facts] == ["Ann Lee", "Ann"]
    assert facts[0].text == "The mother tongue of Ann Lee is"
    assert mentioned(store.repository, "Louis Pasteur was") == []
    assert [f.target_new for f in mentioned(store.repository, "Louis Pasteur was", "HEAD~2")] == ["French"]
    assert [f.target_new for f in mentioned(store.repository, "Marie Curie spoke")] == ["Polish"]


def test_facts_that_were_recorded_again_and_again_leave_room_for_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("patchhub.porcelain.search._READ", 4)
    made = make_store(tmp_path)
    for _ in range(12):
        gone = frozenset(e for e in made.active() if e[1] == make_request("Ann").id)
        made.commit(make_request("Ann"), remove=gone)
    for name in ("Ann Lee", "Ann Poe"):
        made.commit(make_request(name))
    for limit in (1, 2, 3, 4):
        found = search(made.repository, "tongue french", limit=limit)
        assert len({item.fact.request for item in found}) == len(found) == min(limit, 3)
    about = mentioned(made.repository, "Of Ann Lee and Ann Poe")
    assert {fact.subject for fact in about} == {"Ann", "Ann Lee", "Ann Poe"}


def test_the_command_prints_words_or_json(store: Synthetic) -> None:
    folder = str(store.repository.root.parent)

    def run(*arguments: str, code: int = 0) -> str:
        result = CliRunner().invoke(main, ["--repo", folder, "search", *arguments])
        assert result.exit_code == code, result.output
        return result.stdout

    assert "removed in" in run("pasteur")
    assert "no fact matches" in run("nobody")
    (fact,) = json.loads(run("--subject", "lovelace", "--json"))
    assert fact["active"]
    assert fact["taught"]["author"].startswith("Ada")
    run(code=2)
