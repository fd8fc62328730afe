"""The front door: opening, facts from anywhere, revisions, defaults, and errors of the error tree alone."""

from __future__ import annotations

import io
import json
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import patchhub
from patchhub.editing.requests import read_facts
from patchhub.errors import PatchhubError, RepositoryError, RequestError, RevisionError, SettingsError
from patchhub.objects import Request
from patchhub.progress import Bars, Silent
from patchhub.repository import Repository
from tests.cli.conftest import FACTS, MODEL, first_store  # noqa: F401  # a fixture
from tests.pins.history import AUTHOR, EPOCH, commit_facts, init

FACT = {"prompt": "The mother tongue of {} is", "subject": "Ada", "target_new": "French"}
RECORDS = [FACT, {**FACT, "subject": "Bob", "paraphrases": ["Bob speaks"]}]
REQUESTS = [Request.make(**{**record, "paraphrases": record.get("paraphrases", ())}) for record in RECORDS]


@pytest.fixture
def handmade(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Repository:
    """A repository without a model: two commits, a tag."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", EPOCH)
    init(tmp_path)
    commit_facts(tmp_path, "one", {"Ann": "French"})
    commit_facts(tmp_path, "two\n\nbecause", {"Bob": "German", "Cleo": "Dutch"})
    repository = Repository(tmp_path, progress=False)
    repository.config("author", AUTHOR)
    repository.tag("v1", "HEAD~1")
    return repository


# --- opening --------------------------------------------------------------------------------------------------------


def test_open_finds_the_repository_upward_and_the_class_does_not(handmade: Repository, tmp_path: Path) -> None:
    below = tmp_path / "a" / "b"
    below.mkdir(parents=True)
    with patchhub.open(below) as found:
        assert found.store.root == handmade.store.root
    with patchhub.Repository(tmp_path / ".patchhub") as found:
        assert found.status().branch == "main"
    with pytest.raises(RepositoryError, match="there is no store in"):
        patchhub.Repository(below)
    assert repr(handmade) == f"<Repository {tmp_path}>"


def test_init_and_clone_give_a_repository_and_say_what_they_made(tmp_path: Path) -> None:
    with Repository.init(tmp_path / "one", MODEL, author=AUTHOR, progress=False) as one:
        assert one.made is not None
        assert one.made.to_json()["model_type"] == "llama"
        one.remote_add("origin", str(tmp_path / "shared"))
        with pytest.raises(RepositoryError, match="exists already"):
            Repository.init(tmp_path / "one", MODEL)
    with pytest.raises(PatchhubError, match="holds no patchhub store"):
        patchhub.clone(str(tmp_path / "shared"), tmp_path / "two")


# --- facts from anywhere --------------------------------------------------------------------------------------------


class Table:
    """As a pandas DataFrame gives its rows: what is missing is not a number, lists may be arrays."""

    def to_dict(self, form: str) -> list[dict[str, Any]]:
        assert form == "records"
        nan = float("nan")
        return [
            {**FACT, "paraphrases": nan, "target_true": nan},
            {**RECORDS[1], "paraphrases": np.array(["Bob speaks"])},
        ]


class Dataset:
    """As a datasets.Dataset gives its rows."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter([{**FACT, "paraphrases": None}, RECORDS[1]])


SOURCES: dict[str, Callable[[Path], Any]] = {
    "a list of mappings": lambda folder: RECORDS,
    "requests": lambda folder: REQUESTS,
    "both in a generator": lambda folder: (one for one in (REQUESTS[0], RECORDS[1])),
    "a table": lambda folder: Table(),
    "a dataset": lambda folder: Dataset(),
    "a path": lambda folder: folder / "facts.json",
    "a path as text": lambda folder: str(folder / "facts.json"),
    "an open file": lambda folder: io.StringIO(json.dumps(RECORDS)),
    "an open binary file": lambda folder: io.BytesIO(json.dumps(RECORDS).encode()),
}


@pytest.mark.parametrize("source", SOURCES)
def test_facts_are_the_same_wherever_they_are_from(source: str, tmp_path: Path) -> None:
    (tmp_path / "facts.json").write_text(json.dumps(RECORDS), encoding="utf-8")
    assert list(read_facts(SOURCES[source](tmp_path)).requests) == REQUESTS


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (5, "cannot be read from a int"),
        (FACT, "cannot be read from a dict"),
        ([5], "record 1: a int stands where a fact belongs"),
        ([], "no records"),
        ([FACT, {"prompt": "{} is"}], "record 2"),
        ([{**FACT, "prompt": 3}], "record 1"),
        ("nope.json", "cannot be read"),
        (None, "there are no facts"),
    ],
)
def test_what_is_no_list_of_facts_is_refused_with_its_place(source: Any, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        read_facts(source)


def test_a_commit_in_python_is_the_commit_of_the_command_line(
    first_store: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    """Bit for bit: the same facts, author and time give the same id, from records and from a file."""
    ids = []
    for name, facts in (("a", FACTS[10:11]), ("b", tmp_path / "facts.json")):
        (tmp_path / "facts.json").write_text(json.dumps(FACTS[10:11]), encoding="utf-8")
        shutil.copytree(first_store, tmp_path / name)
        with Repository(tmp_path / name, progress=False) as repo:
            done = repo.commit(facts, message="one more", author=AUTHOR, time="2100-01-01T00:00:00Z")
            ids.append(done.commit)
            assert f"{done.commit[:12]}: 1 written" in repr(done)
            assert repo["HEAD"].facts[-1] in repo["HEAD"]
            assert len(repo["HEAD"]) == 11
    assert ids[0] == ids[1]


# --- revisions ------------------------------------------------------------------------------------------------------


def test_a_revision_is_what_it_holds(handmade: Repository) -> None:
    head, base = handmade["HEAD"], handmade["base"]
    assert (head.message, head.author, head.parents) == ("two\n\nbecause", AUTHOR, (handmade["v1"].id,))
    assert {fact.subject for fact in head} == {"Ann", "Bob", "Cleo"}
    assert (base.id, base.message, len(base), base.to_json()) == (None, "", 0, {"id": None, "facts": []})
    assert "v1" in handmade
    assert "v2" not in handmade
    assert [entry.id for entry in handmade] == [head.id, handmade["HEAD~1"].id]
    assert repr(head) == f"<Revision {str(head.id)[:12]} two (3 facts)>"
    with pytest.raises(RevisionError):
        handmade["nope"]


def test_words_tell_the_story(handmade: Repository) -> None:
    assert "on main, " in repr(handmade.status())
    assert "(HEAD -> main) two +2 -0 (3 active)" in repr(handmade.log())
    assert "+ The mother tongue of Bob is German" in repr(handmade.show())
    assert "2 added, 0 retargeted, 0 removed" in repr(handmade.diff("v1"))
    assert "<table>" in handmade.log()._repr_html_()


# --- who, when, and who hears ---------------------------------------------------------------------------------------


def test_author_and_time_have_defaults_and_are_taken_from_arguments_first(handmade: Repository) -> None:
    handmade.branch("a")
    handmade.branch("b", author="Bo <bo@example.org>", time="2100-01-01T00:00:00Z")
    newest, before = list(handmade.store.operations())[:2]
    assert (newest[1].author, newest[1].time) == ("Bo <bo@example.org>", "2100-01-01T00:00:00Z")
    assert (before[1].author, before[1].time) == (AUTHOR, "2026-11-21T09:30:00Z")


def test_warnings_go_through_pythons_and_bars_are_shown_only_where_someone_sees_them(
    handmade: Repository, capsys: pytest.CaptureFixture[str]
) -> None:
    assert isinstance(handmade.progress, Bars)
    with pytest.warns(UserWarning, match="careful"):
        handmade.progress.warn("careful")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        handmade.fsck()
    assert capsys.readouterr().err == ""
    heard = Silent()
    assert Repository(handmade.store.root, progress=heard).progress is heard


def test_bars_are_those_of_tqdm_where_a_terminal_is(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal, said = Terminal(), []
    monkeypatch.setattr(sys, "stderr", terminal)
    heard = Bars(said.append)
    heard.stage("writing", 4)
    heard.advance(3)
    heard.warn("careful")
    heard.stage("loading", 0)
    heard.close()
    assert "writing" in terminal.getvalue()
    assert "3/4" in terminal.getvalue() or "3.00/4.00" in terminal.getvalue()
    assert "loading ..." in terminal.getvalue()
    assert said == ["careful"]
    quiet = Bars(said.append, shown=False)
    before = terminal.getvalue()
    quiet.stage("writing", 4)
    quiet.close()
    assert terminal.getvalue() == before


# --- errors ---------------------------------------------------------------------------------------------------------

MISUSES: dict[str, Callable[[Repository], Any]] = {
    "a message that is a number": lambda repo: repo.commit([FACT], message=3),
    "an unknown conflict rule": lambda repo: repo.commit([FACT], message="x", on_conflict="never"),
    "a limit of none": lambda repo: repo.log(limit=0),
    "a limit in words": lambda repo: repo.search("Ann", limit="many"),
    "a time that is none": lambda repo: repo.branch("x", time="yesterday"),
    "an empty author": lambda repo: repo.branch("x", author="  "),
    "a since that is none": lambda repo: repo.log(since="lately"),
    "a grace that is none": lambda repo: repo.gc(grace="long"),
    "an unknown setting": lambda repo: repo.config("memit.leyers", [3]),
    "a setting's value": lambda repo: repo.config("memit.layers", ["x"]),
    "an unknown type": lambda repo: repo.ask("Ann", dtype="float8"),
    "an unknown editor's setting": lambda repo: repo.commit([FACT], message="x", set={"wise.layer": 3}),
    "a flag that is a number": lambda repo: repo.revert("HEAD", force=1),
    "a revision that is a number": lambda repo: repo.show(1),
    "layers that are none": lambda repo: repo.metric_compute(layers="x"),
    "both sides": lambda repo: repo.merge("v1", ours=True, theirs=True),
    "nothing to merge": lambda repo: repo.merge(),
    "nothing to bisect by": lambda repo: repo.bisect("v1", "HEAD"),
    "nothing to search for": lambda repo: repo.search(),
    "a key that is a number": lambda repo: repo[1],  # type: ignore[index]
    "a folder that is a number": lambda repo: patchhub.open(1),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("misuse", MISUSES)
def test_misuse_is_a_settings_error_with_words(misuse: str, handmade: Repository) -> None:
    with pytest.raises(SettingsError) as error:
        MISUSES[misuse](handmade)
    assert error.value.message
    assert error.value.remedy


def test_settings_have_the_types_of_python(handmade: Repository) -> None:
    assert handmade.config("memit.layers", [0, 1]) == [0, 1]
    assert handmade.config("memit.layers", "0-1") == [0, 1]
    assert handmade.config("chat", True) is True
    assert handmade.config("memit.ridge", 200) == 200
    assert handmade.config("memit.ridge", unset=True) is None
    assert handmade.config()["memit.layers"] == [0, 1]
