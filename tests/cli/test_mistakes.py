"""Mistakes that people make: each is answered with what is wrong, where, and what to do, before anything expensive, and nothing is lost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from patchhub.cli.main import main
from patchhub.repository import Repository
from patchhub.store.store import Store
from tests.cli.conftest import MODEL

FACT = {"prompt": "The capital of {} is", "subject": "Chile", "target_new": "Lima"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository without commits, among files that are not as they should be."""
    folder = tmp_path_factory.mktemp("mistakes")
    Repository.init(folder, MODEL, progress=False).close()
    files = {
        "good.json": json.dumps([FACT]),
        "empty_target.jsonl": json.dumps({**FACT, "target_new": ""}),
        "no_target.jsonl": json.dumps({"prompt": "{} is", "subject": "X"}),
        "number.jsonl": json.dumps({**FACT, "target_new": 5}),
        "half.jsonl": json.dumps(FACT)[:-3],
        "numbers.json": "[1, 2]",
        "unknown.json": json.dumps([{"who": "Ada", "what": "speaks"}]),
        "nearly.json": json.dumps([{**FACT, "paraphrase": "x"}]),
        "empty.jsonl": "",
        "two_answers.json": json.dumps([FACT, {**FACT, "target_new": "Oslo"}]),
        "elsewhere.json": json.dumps([{**FACT, "prompt": "The capital of Peru is"}]),
    }
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "picture.json").write_bytes(b"\x89PNG\xff\xfe")
    (folder / "facts.parquet").write_bytes(b"PAR1")
    (folder / "hollow").mkdir()
    return folder


MISTAKES = {
    "a file that is not there": ("commit nope.jsonl -m x", ("nope.jsonl", "No such file", "Name a file")),
    "a sentence as the file": (
        'commit "Lyon is a capital" -m x',
        ("Lyon is a capital", "--prompt, --subject and --target"),
    ),
    "a folder as the file": ("commit hollow -m x", ("hollow", "directory")),
    "no reason": ("commit good.json", ("needs a message", "-m TEXT")),
    "no facts": ("commit -m x", ("there are no facts", "Give a file")),
    "an empty target": (
        "commit empty_target.jsonl -m x",
        ("line 1", "'target_new' is empty", "every fact needs 'target_new'"),
    ),
    "no target": ("commit no_target.jsonl -m x", ("line 1", "'target_new' is missing", "Add the field")),
    "a number as target": ("commit number.jsonl -m x", ("line 1", "'target_new' is a number, not a text")),
    "a cut line": ("commit half.jsonl -m x", ("line 1", "malformed JSON at column", "Correct the JSON")),
    "numbers for records": ("commit numbers.json -m x", ("record 1", "a number", "prompt, subject, target_new")),
    "an unknown record": ("commit unknown.json -m x", ("record 1", "'who', 'what'", "docs/data.md")),
    "a typing error in a record": ("commit nearly.json -m x", ("record 1", "'paraphrase'", "'paraphrases'")),
    "an empty file": ("commit empty.jsonl -m x", ("empty.jsonl", "at least one fact")),
    "a picture": ("commit picture.json -m x", ("picture.json", "not UTF-8", "Save")),
    "two answers": ("commit two_answers.json -m x", ("1 contradiction", "Lima", "Oslo", "Keep one")),
    "another subject": ("commit elsewhere.json -m x", ("'Chile' is not in the prompt", "Write the subject")),
    "an unknown setting": ("commit good.json -m x --set foo=1", ("memit.foo", "memit.ridge")),
    "a bad value": ("commit good.json -m x --set steps=many", ("memit.steps", "whole number")),
    "layers beyond the model": ("commit good.json -m x --set layers=3-99", ("layer 99", "6 layers", "0 to 5")),
    "an unknown editor": ("commit good.json -m x --method rome", ("'rome'", "memit, pmet, wise")),
    "too little memory": ("commit good.json -m x --memory 1MB", ("1 MB", "model", "at least")),
    "no size": ("commit good.json -m x --memory lots", ("'lots' is not a size", "4GB")),
    "force a push": ("push --force", ("pull", "--force-with-lease")),
    "an unknown remote": ("push nowhere", ("'nowhere'", "remote add")),
    "an address that nothing opens": ("remote add o s3x://bucket", ("s3x://", "hf://user/repo")),
    "a remote's name": ('remote add "a b" x', ("'a b'", "letters")),
    "an unknown revision": ('ask --rev nope "The"', ("nothing is named 'nope'", "patchhub branch")),
    "an empty prompt": ('ask ""', ("prompt is empty", "patchhub ask")),
    "an unknown key": ("config memit.layer", ("memit.layer", "memit.layers")),
    "a base that is none": ("config base.path hollow", ("config.json", "folder")),
    "no such time": ("log --since 2020-13-01", ("2020-13-01", "2 weeks ago")),
    "no such format": ("log --format %q", ("%q", "%h")),
    "no such suite": ("eval --suite nope.json", ("nope.json", "Name a file")),
    "nothing to search": ("search", ("nothing to search", "--subject")),
    "no commits to squash": ("squash 2", ("no commit yet", "Commit")),
    "no commit to amend": ("commit --amend -m x", ("no commit yet to amend", "patchhub commit FILE")),
    "a branch that is not there": ("switch nope", ("no branch 'nope'", "switch -c nope")),
    "a name with a space": ('tag "a b"', ("'a b' cannot be", "letters")),
    "a store that is there": ("init {model}", ("exists already", "another folder")),
    "an empty address": ("clone {folder}/hollow new", ("holds no patchhub store", "Check the address")),
    "a Hub address without a name": ("clone hf://user new", ("hf://user", "hf://user/repo")),
    "no duration": ("gc --grace soon", ("'soon' is not a duration", "14 days")),
    "an option of another command": ("commit --xyzzy", ("no option --xyzzy", "commit --help")),
    "a command of git": ("stash", ("no command 'stash'", "patchhub switch -c")),
    "an empty undo": ("undo", ("nothing to undo", "op log")),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_it_is_told_what_is_wrong_and_what_to_do(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    typed, wanted = MISTAKES[name]
    monkeypatch.chdir(folder)
    before = Store.open(folder).refs()
    ran = CliRunner().invoke(main, typed.format(model=MODEL, folder=folder))
    said = " ".join(ran.output.split())
    assert isinstance(ran.exception, SystemExit), ran.exception
    assert ran.exit_code not in (0, 1)
    assert not [word for word in wanted if word not in said], said
    assert "Traceback" not in said
    assert Store.open(folder).refs() == before


def test_a_parquet_file_is_read_or_says_by_what(folder: Path) -> None:
    ran = CliRunner().invoke(main, ["--repo", str(folder), "commit", str(folder / "facts.parquet"), "-m", "x"])
    assert ran.exit_code == 3
    assert "patchhub[data]" in ran.output or "as Parquet" in ran.output


def test_a_store_that_moved_with_its_base_finds_it(tmp_path: Path) -> None:
    shutil.copytree(MODEL, tmp_path / "one" / "model")
    Repository.init(tmp_path / "one" / "facts", tmp_path / "one" / "model", progress=False).close()
    (tmp_path / "one").rename(tmp_path / "two")
    status = CliRunner().invoke(main, ["--repo", str(tmp_path / "two" / "facts"), "status", "--json"])
    found = json.loads(status.output)
    assert (found["base"]["path"], found["base_found"]) == (str(tmp_path / "two" / "model"), True)
    (tmp_path / "two" / "model").rename(tmp_path / "elsewhere")
    ran = CliRunner().invoke(
        main, ["--repo", str(tmp_path / "two" / "facts"), "apply", "base", "--out", str(tmp_path / "out")]
    )
    assert ran.exit_code == 8
    assert "--base FOLDER" in ran.output


def test_a_clone_that_was_killed_goes_on(folder: Path, tmp_path: Path) -> None:
    """What is there at the moment when the remote has been named and nothing has come yet."""
    shutil.copytree(folder / ".patchhub", tmp_path / "ours" / ".patchhub")
    remote = tmp_path / "remote"
    with Repository(tmp_path / "ours", progress=False) as ours:
        ours.config("metric.tokens", 2000)
        ours.commit([FACT], message="one", force=True)
        ours.remote_add("there", str(remote))
        ours.push("there")
    with Repository.init(tmp_path / "theirs", MODEL, progress=False) as theirs:
        theirs.remote_add("origin", str(remote))
    words = ["clone", str(remote), str(tmp_path / "theirs"), "--base", str(MODEL)]
    assert CliRunner().invoke(main, words).exit_code == 0
    assert CliRunner().invoke(main, ["--repo", str(tmp_path / "theirs"), "fsck"]).exit_code == 0
    again = CliRunner().invoke(main, words)
    assert again.exit_code == 6
    assert "exists already" in again.output
