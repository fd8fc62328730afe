"""Every verb that makes a commit refuses a stopped merge, before it does anything else."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from patchhub.errors import RepositoryError
from patchhub.repository import Repository
from patchhub.repository.writing import WritingVerbs
from tests.pins.history import AUTHOR, EPOCH, commit_facts, init, write_adapter

VERBS = sorted(name for name, found in vars(WritingVerbs).items() if getattr(found, "is_verb", False))
FACT = {"prompt": "The mother tongue of {} is", "subject": "Finn", "target_new": "Irish"}


@pytest.fixture
def stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Repository:
    """A repository of handmade columns, without a model, in which a merge waits."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", EPOCH)
    init(tmp_path)
    commit_facts(tmp_path, "one", {"Ann": "French"})
    repository = Repository(tmp_path, progress=False)
    repository.config("author", AUTHOR)
    repository.switch("side", create=True)
    commit_facts(tmp_path, "side", {"Eve": "Czech"})
    repository.switch("main")
    commit_facts(tmp_path, "main", {"Eve": "French"})
    assert repository.merge("side").outcome == "stopped"
    write_adapter(tmp_path / "adapter")
    return repository


def arguments(folder: Path) -> Mapping[str, tuple[tuple[Any, ...], Mapping[str, Any]]]:
    """What each verb is called with; a verb that is not here fails its test."""
    return {
        "commit": (([FACT],), {"message": "why"}),
        "update": (("Ann", "German"), {}),
        "revert": (("HEAD",), {}),
        "cherry_pick": (("side",), {}),
        "squash": ((2,), {}),
        "merge": (("side",), {}),
        "refresh": ((), {}),
        "import_": ((folder / "adapter",), {}),
    }


@pytest.mark.parametrize("verb", VERBS)
def test_it_refuses(verb: str, stopped: Repository, tmp_path: Path) -> None:
    before = stopped.store.refs()
    positional, named = arguments(tmp_path)[verb]
    with pytest.raises(RepositoryError, match="waits for its contradictions"):
        getattr(stopped, verb)(*positional, **named)
    assert stopped.store.refs() == before
    assert stopped.merge(abort=True).outcome == "aborted"


def test_every_verb_that_judges_a_commit_is_one_of_them() -> None:
    """Porcelain functions that end in `judge` are called in that module alone."""
    folder = Path(inspect.getfile(WritingVerbs)).parents[1]
    judging = {
        path.stem for path in (folder / "porcelain").rglob("*.py") if "judge(" in path.read_text(encoding="utf-8")
    }
    assert judging == {"change", "commit", "exchange", "merge"}
    verbs = ("import commit", "import update", "import revert", "import cherry_pick", "import squash", "import refresh")
    for path in (folder / "repository").glob("*.py"):
        if path.name != "writing.py":
            text = path.read_text(encoding="utf-8")
            assert not [line for line in (*verbs, "import import_change", "import merge\n") if line in text], path
