"""A store on the shipped model with one commit of facts, made once through the command line and copied for each test."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from patchhub.cli.main import main

MODEL = Path(str(files("patchhub") / "demo_model"))
FACTS: list[dict[str, Any]] = json.loads((files("patchhub") / "demo_facts.json").read_text(encoding="utf-8"))

Run = Callable[..., Result]


def invoke(folder: Path, *arguments: str, code: int = 0, stdin: str | None = None) -> Result:
    """`patchhub ARGUMENTS` on the store in ``folder``; the exit code must be ``code`` and nothing else may escape."""
    result = CliRunner().invoke(main, ["--repo", str(folder), *arguments], input=stdin)
    if not isinstance(result.exception, SystemExit | None):
        raise result.exception
    assert result.exit_code == code, f"{arguments}: exit {result.exit_code}\n{result.stdout}\n{result.stderr}"
    return result


def measured_store(first_store: Path, folder: Path, facts: int) -> Path:
    """A copy of a store with a suite of so many facts, and in its cache all answers to them of HEAD and of the base."""
    store = Path(shutil.copytree(first_store, folder / "store"))
    (store / "suite.json").write_text(json.dumps(FACTS[:facts]), encoding="utf-8")
    invoke(store, "eval", "--suite", str(store / "suite.json"), "--no-note")
    return store


@pytest.fixture(scope="session")
def first_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """init, and one commit of the first ten facts of the demo."""
    folder = tmp_path_factory.mktemp("store")
    invoke(folder, "init", str(MODEL), "--author", "Ada <ada@example.org>")
    facts = folder / "facts.json"
    facts.write_text(json.dumps(FACTS[:10]), encoding="utf-8")
    invoke(folder, "commit", str(facts), "-m", "ten facts", "--author", "Ada <ada@example.org>")
    return folder


@pytest.fixture
def store(first_store: Path, tmp_path: Path) -> Path:
    """A copy of ``first_store`` that the test may change."""
    folder = tmp_path / "store"
    shutil.copytree(first_store, folder)
    return folder


@pytest.fixture
def run(store: Path) -> Run:
    return lambda *arguments, **options: invoke(store, *arguments, **options)


def snapshot_of(folder: Path) -> dict[str, int]:
    """Every file of a store and its size, without the lock and the cache."""
    root = folder / ".patchhub"
    return {
        str(path.relative_to(root)): path.stat().st_size
        for path in root.rglob("*")
        if path.is_file() and path.name != "lock" and "cache" not in path.parts
    }
