"""How far a branch is from the remotes': counted on stores that really push and fetch, and as `status` says it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from patchhub.cli.main import main
from patchhub.porcelain.history import Divergence, divergences
from patchhub.porcelain.share import CURRENT, fetch, push, remote_add, remote_remove
from patchhub.progress import Silent
from patchhub.store.store import Store
from patchhub.who import Who
from tests.cli.test_processes import CHECK
from tests.remotes.stores import AUTHOR, TIME, add_batch, make_store, move, switch


@pytest.fixture
def ours(tmp_path: Path) -> Iterator[Store]:
    """Two commits that are also at origin, a folder."""
    with shared(tmp_path, "ours") as repository:
        add_batch(repository, range(2))
        add_batch(repository, range(2, 4))
        pushed(repository)
        yield repository


def shared(folder: Path, name: str) -> Store:
    repository = make_store(folder / name)
    remote_add(repository, "origin", str(folder / "shared"))
    return repository


def pushed(repository: Store) -> None:
    push(repository, "origin", CURRENT, Silent(), who=Who(AUTHOR, TIME))


def fetched(repository: Store, remote: str = "origin") -> None:
    fetch(repository, remote, Silent(), who=Who(AUTHOR, TIME))


def said(repository: Store) -> str:
    result = CliRunner().invoke(main, ["--repo", str(repository.root.parent), "status"])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_each_side_is_counted_from_what_was_fetched(ours: Store, tmp_path: Path) -> None:
    assert divergences(ours) == (Divergence("origin/main", 0, 0),)
    assert "On branch main\nup to date with origin/main\n" in said(ours)
    add_batch(ours, range(4, 6))
    add_batch(ours, range(6, 8))
    assert divergences(ours) == (Divergence("origin/main", 2, 0),)
    assert "On branch main\nahead 2 of origin/main\n" in said(ours)
    with shared(tmp_path, "theirs") as theirs:
        fetched(theirs)
        assert divergences(theirs) == (Divergence("origin/main", 0, 2),)  # no commit here yet
        move(theirs, {"refs/heads/main": (None, theirs.refs()["refs/remotes/origin/main"])})
        add_batch(theirs, range(10, 12))
        pushed(theirs)
    assert divergences(ours) == (Divergence("origin/main", 2, 0),)  # nothing asks the remote
    fetched(ours)
    assert divergences(ours) == (Divergence("origin/main", 2, 1),)
    assert "ahead 2, behind 1 of origin/main\n" in said(ours)
    document = json.loads(
        CliRunner().invoke(main, ["--repo", str(ours.root.parent), "status", "--json"]).stdout,
    )
    assert document["remotes"] == [{"branch": "origin/main", "ahead": 2, "behind": 1}]
    move(ours, {"refs/heads/main": (ours.head[1], ours.resolve("HEAD~2"))}, "reset")
    assert divergences(ours) == (Divergence("origin/main", 0, 1),)
    assert "\nbehind 1 of origin/main\n" in said(ours)


def test_nothing_is_said_without_a_remote_branch_of_that_name(ours: Store) -> None:
    head = str(ours.head[1])
    move(ours, {"refs/heads/team/main": (None, head), "refs/heads/side": (None, head)})
    for branch in ("side", "team/main"):
        switch(ours, branch)
        assert divergences(ours) == ()
        assert "origin" not in said(ours)
    move(ours, {"HEAD": (ours.refs()["HEAD"], head)}, "switch")
    assert divergences(ours) == ()


def test_every_remote_is_named(ours: Store, tmp_path: Path) -> None:
    remote_add(ours, "another", str(tmp_path / "shared"))
    fetched(ours, "another")
    add_batch(ours, range(4, 6))
    pushed(ours)
    assert divergences(ours) == (Divergence("another/main", 1, 0), Divergence("origin/main", 0, 0))
    remote_remove(ours, "another", who=Who(AUTHOR, TIME))
    assert divergences(ours) == (Divergence("origin/main", 0, 0),)


def test_a_branch_with_a_slash(ours: Store) -> None:
    move(ours, {"refs/heads/team/main": (None, ours.head[1])})
    switch(ours, "team/main")
    pushed(ours)
    add_batch(ours, range(4, 6))
    assert divergences(ours) == (Divergence("origin/team/main", 1, 0),)


def test_counting_imports_neither_torch_nor_numpy(ours: Store) -> None:
    add_batch(ours, range(4, 6))
    command = [sys.executable, "-c", CHECK, "--repo", str(ours.root.parent), "status"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "ahead 1 of origin/main" in done.stdout
