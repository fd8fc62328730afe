"""`eval --judge`: what a model behind an address says of each answer is one more share, and nothing measured is lost where it fails."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from patchhub.errors import RemoteError, SettingsError
from patchhub.evaluation.outside import PROMPT, Judge, Server, root_of
from patchhub.repository.arguments import judge_of
from tests.cli.conftest import FACTS, Run, measured_store
from tests.served import server

pytestmark = pytest.mark.usefixtures("short_texts")

KEY = "secret-key-of-the-judge"
DOCS = Path(__file__).parents[2] / "docs" / "evaluation.md"


def judged(question: str) -> tuple[str, str, str]:
    """The prompt, the answer and the target that a question to the judge is about."""
    lines = [line.partition(": ") for line in question.splitlines()]
    texts = {name: json.loads(text) for name, _, text in lines if text.startswith('"')}
    return texts["Text"], texts["What it wrote"], texts["Expected answer"]


def lenient(question: str) -> str:
    """A judge that finds the target anywhere in the answer."""
    _, answer, target = judged(question)
    return "Yes." if target in answer else "no"


@pytest.fixture(scope="module")
def measured(first_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store with a suite of two facts that has been measured."""
    return measured_store(first_store, tmp_path_factory.mktemp("measured"), 2)


@pytest.fixture
def store(measured: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(measured, tmp_path / "store"))


@pytest.fixture
def suite(store: Path) -> str:
    return str(store / "suite.json")


def test_the_share_is_what_the_judge_said_and_is_kept_like_other_scores(
    run: Run, store: Path, suite: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATCHHUB_JUDGE_KEY", KEY)
    asked: list[tuple[str, str, str]] = []

    def complete(question: str) -> str:
        asked.append(judged(question))
        return lenient(question)

    with server(complete) as url:
        arguments = ("eval", "--suite", suite, "--judge", url)
        found = json.loads(run(*arguments, "--json").stdout)
        screen = run(*arguments).stdout
        walk = json.loads(run(*arguments, "--all", "--json").stdout)
    plain = json.loads(run("eval", "--suite", suite, "--json", "--no-note").stdout)
    for side in ("value", "base"):
        assert found["scores"]["judged"][side] == plain["scores"]["contained"][side]
    assert not any(KEY.encode() in file.read_bytes() for file in store.rglob("*") if file.is_file())
    assert KEY not in json.dumps(found) + screen
    assert len(set(asked)) == 4  # two facts, of the commit and of the base
    assert {prompt for prompt, _, _ in asked} == {fact["prompt"].format(fact["subject"]) for fact in FACTS[:2]}
    assert found["suite"] != plain["suite"]
    assert {name: s for name, s in found["scores"].items() if name != "judged"} == plain["scores"]
    assert found["settings"]["judge"] == {"model": "tiny", "prompt": PROMPT}
    [note] = [note for note in json.loads(run("show", "--json").stdout)["scores"] if note["suite"] == found["suite"]]
    assert note["scores"]["judged"]["value"] == found["scores"]["judged"]["value"]
    assert [row["fresh"] for row in walk] == [False]
    head = screen.splitlines()[1:4]
    assert head[0].split()[:6] == ["live", "efficacy", "paraphrase", "closure", "judged", "leak"]
    assert max(map(len, head)) <= 80


def test_a_judge_that_fails_is_one_sentence_and_the_rest_is_kept(run: Run, suite: str) -> None:
    with server(lambda question: "I would rather say perhaps") as url:
        failed = run("eval", "--suite", suite, "--judge", url, code=11)
        assert "yes or no" in failed.stderr
        assert "kept as note" in " ".join(failed.stderr.split())
        assert "404" in run("eval", "--suite", suite, "--judge", url, "--judge-model", "other", code=11).stderr
    assert "cannot be asked" in run("eval", "--suite", suite, "--judge", "127.0.0.1:9", code=11).stderr
    assert "no address" in run("eval", "--suite", suite, "--judge", "file:///etc/passwd", code=2).stderr
    assert "--suite" in run("eval", "--judge", "127.0.0.1:9", code=2).stderr
    plain = json.loads(run("eval", "--suite", suite, "--json").stdout)
    [note] = json.loads(run("show", "--json").stdout)["scores"]
    assert (note["suite"], note["note"]) == (plain["suite"], plain["note"])
    assert "judged" not in note["scores"]


def test_a_key_goes_to_the_judge_and_openais_only_over_https_or_on_this_machine() -> None:
    written = ("The capital of Peru is", "Lima", " Lima.")
    heard: list[str | None] = []
    with server(lenient, heard=heard) as url:
        for keys, sent in (
            ({"OPENAI_API_KEY": "one", "PATCHHUB_JUDGE_KEY": "two"}, "Bearer two"),
            ({"OPENAI_API_KEY": "one"}, "Bearer one"),
            ({}, None),
        ):
            judge = judge_of(url, "tiny", keys)
            assert judge is not None
            assert judge.gives(written)
            assert judge.gives(written)
            assert heard == [sent]
            heard.clear()
    for address, key in (("http://example.org", None), ("https://example.org", "one")):
        judge = judge_of(address, "tiny", {"OPENAI_API_KEY": "one"})
        assert judge is not None
        assert judge.server.key == key
        assert "one" not in repr(judge)


def test_a_key_is_not_sent_on_where_the_server_redirects() -> None:
    first: list[str | None] = []
    second: list[str | None] = []
    with server(lenient, second) as other, server(lenient, first, moved_to=other) as url:
        assert Server(root_of(url), KEY).first_model() == "tiny"
    assert (first, second) == ([f"Bearer {KEY}"], [None])


@pytest.fixture
def slow() -> Iterator[str]:
    def complete(question: str) -> str:
        time.sleep(0.5)
        return "yes"

    with server(complete) as url:
        yield url


def test_a_time_out_is_one_sentence(slow: str) -> None:
    with pytest.raises(RemoteError, match="timed out"):
        Judge(Server(root_of(slow), seconds=0.1), "tiny").gives(("The capital of Peru is", "Lima", " Lima."))


def test_an_address_with_a_password_is_refused_and_not_repeated() -> None:
    with pytest.raises(SettingsError) as refused:
        root_of("https://ada:hunter2@example.org/v1")
    assert "hunter2" not in str(refused.value)


def test_the_prompt_is_the_one_in_the_docs() -> None:
    assert "\n".join(f"    {line}".rstrip() for line in PROMPT.splitlines()) in DOCS.read_text(encoding="utf-8")
