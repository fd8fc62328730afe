"""Where the config says `always`, every verb that makes a commit signs it, in one operation with it."""

from __future__ import annotations

import ast
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import patchhub
from patchhub.errors import SettingsError
from patchhub.repository import Repository
from patchhub.repository.writing import WritingVerbs
from tests.cli.conftest import FACTS, first_store  # noqa: F401  # a fixture
from tests.pins.history import commit_facts, write_adapter

PACKAGE = Path(str(patchhub.__file__)).parent
WITHOUT_MODEL: dict[str, Callable[[Repository], Any]] = {
    "revert": lambda repo: repo.revert(subject=["Ann"]),
    "cherry_pick": lambda repo: repo.cherry_pick("side"),
    "squash": lambda repo: repo.squash(2),
    "merge": lambda repo: repo.merge("side"),
    "import_": lambda repo: repo.import_(repo.store.root.parent / "adapter"),
    "pull": lambda repo: repo.pull(),
}
WITH_MODEL: dict[str, Callable[[Repository], Any]] = {
    "commit": lambda repo: repo.commit([FACTS[10]], message="one"),
    "update": lambda repo: repo.update(FACTS[5]["subject"], "Paris", force=True),
    "refresh": lambda repo: repo.refresh(force=True),
}

RECORDS = ("record(repository, ", "record_commit(repository, ")
"""How calls of `sets.commits.record` begin."""


def is_signed(repository: Repository) -> bool:
    head = repository["HEAD"].id
    with_notes = [ref for ref in repository.store.refs() if ref.startswith(f"refs/notes/{head}/signature/commit/")]
    operation = next(repository.store.operations())[1]
    return (
        with_notes != [] and set(operation.changes) == {*with_notes, "refs/heads/main"} and repository.verify().trusted
    )


def test_no_verb_is_left_out() -> None:
    verbs = {name for name, found in vars(WritingVerbs).items() if getattr(found, "is_verb", False)}
    assert verbs | {"pull"} == WITHOUT_MODEL.keys() | WITH_MODEL.keys()


def test_every_commit_that_is_recorded_is_handed_the_key() -> None:
    """A new verb cannot forget it: what records a commit in porcelain takes its signer."""
    found = 0
    for path in (PACKAGE / "porcelain").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node).startswith(RECORDS):
                assert ast.unparse(node.args[3]) == "who.signer", f"{path}: {ast.unparse(node)}"
                found += 1
        assert "repository.record(" not in path.read_text(encoding="utf-8"), path
    assert found == 6  # commit, change twice, merge, refresh, import


@pytest.mark.parametrize(
    "verb", [*sorted(WITHOUT_MODEL.keys() - {"import_"}), pytest.param("import_", marks=pytest.mark.slow)]
)
def test_it_signs(verb: str, repo: Repository, tmp_path: Path) -> None:
    folder = repo.store.root.parent
    repo.switch("side", create=True)
    commit_facts(folder, "the side", {"Finn": "Irish"})
    repo.switch("main")
    commit_facts(folder, "main", {"Cleo": "Dutch"})
    repo.remote_add("origin", str(tmp_path / "remote"))
    write_adapter(folder / "adapter")
    if verb == "pull":
        repo.switch("side")
        repo.branch("kept", "main")
        repo.branch("main", delete=True)
        repo.switch("main", "side", create=True)
        repo.push()
        repo.reset("kept")
    repo.config("sign", "always")
    before = repo["HEAD"].id
    WITHOUT_MODEL[verb](repo)
    assert repo["HEAD"].id != before
    assert is_signed(repo)
    repo.undo()
    assert repo["HEAD"].id == before


def test_a_key_that_is_gone_stops_every_verb_before_it_begins(repo: Repository, keys: Path, tmp_path: Path) -> None:
    shutil.copy(keys / "ada", tmp_path / "key")
    repo.config("sign.key", str(tmp_path / "key"))
    repo.config("sign", "always")
    (tmp_path / "key").unlink()
    before = repo.store.refs()
    for verb in (
        lambda: repo.revert(subject=["Ann"]),
        lambda: repo.squash(2),
        lambda: repo.tag("v1"),
        repo.sign,
    ):
        with pytest.raises(SettingsError, match="there is no key"):
            verb()
    assert repo.store.refs() == before
    repo.config("sign.key", unset=True)
    with pytest.raises(SettingsError, match="no key to sign with"):
        repo.squash(2)
    repo.tag("v1", sign=False)


@pytest.mark.slow
@pytest.mark.parametrize("verb", WITH_MODEL)
def test_it_signs_with_a_model(verb: str, first_store: Path, keys: Path, tmp_path: Path) -> None:  # noqa: F811
    shutil.copytree(first_store, tmp_path / "store")
    with Repository(tmp_path / "store", progress=False) as repo:
        repo.config("author", "Ada <ada@example.org>")
        repo.config("sign.allowed", str(keys / "allowed"))
        if verb == "refresh":
            repo.commit([FACTS[10]], message="one")
            repo.revert(subject=[FACTS[0]["subject"]])
        repo.config("sign.key", str(keys / "ada"))
        repo.config("sign", "always")
        WITH_MODEL[verb](repo)
        assert is_signed(repo)
