"""`gc` as a command, and that the verbs of this package which only look or tidy load neither torch nor NumPy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

import pytest
from click.testing import CliRunner

from patchhub.cli.main import main
from patchhub.porcelain.refs import collect
from patchhub.who import duration
from tests.porcelain.synthetic import Synthetic, make_request, make_store

NOW = "2040-01-01T00:00:00Z"
CHECK = """
import sys
from patchhub.cli.main import main
try:
    main(sys.argv[1:], prog_name="patchhub")
except SystemExit as done:
    assert not done.code, done.code
heavy = {"torch", "transformers", "numpy"} & set(sys.modules)
assert not heavy, heavy
"""


@pytest.fixture
def store(tmp_path: Path) -> Synthetic:
    made = make_store(tmp_path)
    made.commit(make_request("Ann"), message="one")
    made.commit(make_request("Bob"), message="two")
    return made


def test_only_what_is_older_than_the_grace_period_goes(store: Synthetic) -> None:
    repository = store.repository
    path = repository.objects.path(repository.objects.put(b"lost"))
    day = 86_400
    born = path.stat().st_mtime
    os.utime(path, (born - 10 * day, born - 10 * day))
    now = _instant(born)
    assert collect(repository, now=now).items == ()
    assert collect(repository, now=now, grace=duration("9 days"), dry_run=True).size == 4
    assert path.exists()
    done = collect(repository, now=now, grace=duration("9 days"))
    assert (done.size, dict(done.counts)) == (4, {"object": 1})
    assert not path.exists()


def test_undone_commits_stay(store: Synthetic) -> None:
    repository = store.repository
    tip, weights = repository.head[1], store.weights()
    repository.undo(author="Ada <ada@example.org>", time=NOW)
    assert collect(repository, now=NOW, grace=duration("0")).items == ()
    repository.redo(author="Ada <ada@example.org>", time=NOW)
    assert repository.head[1] == tip
    assert (store.weights() == weights).all()


def test_the_command_says_what_and_how_much(store: Synthetic, monkeypatch: pytest.MonkeyPatch) -> None:
    store.repository.objects.put(b"x" * 5000)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "2208988800")

    def run(*arguments: str, code: int = 0) -> str:
        folder = str(store.repository.root.parent)
        result = CliRunner().invoke(main, ["--repo", folder, "gc", *arguments])
        assert result.exit_code == code, result.output
        return result.stdout

    assert "would delete 1 object: 0.01 MB" in run("--dry-run")
    document = json.loads(run("--dry-run", "--json"))
    assert (document["bytes"], document["dry_run"], len(document["items"])) == (5000, True, 1)
    assert "deleted 1 object" in run("--grace", "2w")
    assert "deleted nothing" in run()
    run("--grace", "soon", code=2)


@pytest.mark.parametrize(
    "verb",
    [
        ["gc", "--dry-run"],
        ["search", "Ann"],
        ["blame", "The mother tongue of Ann is", "--lookup"],
        ["merge-base", "HEAD", "HEAD~1"],
        ["log", "--graph", "--stat", "-S", "Ann"],
        ["status"],
        ["diff"],
    ],
)
def test_verbs_that_look_are_light(verb: list[str], store: Synthetic) -> None:
    folder = str(store.repository.root.parent)
    done = subprocess.run(
        [sys.executable, "-c", CHECK, "--repo", folder, *verb], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("verb", [["squash", "2"], ["diff", "--weights"]])
def test_verbs_on_stored_arrays_load_no_torch(verb: list[str], store: Synthetic) -> None:
    check = CHECK.replace('"torch", "transformers", "numpy"', '"torch", "transformers"')
    folder = str(store.repository.root.parent)
    done = subprocess.run(
        [sys.executable, "-c", check, "--repo", folder, *verb], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def _instant(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
