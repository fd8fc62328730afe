"""What users of git type is answered with what does it here; a suggestion is near, or there is none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from patchhub.cli.habits import COMMANDS, OPTIONS
from patchhub.cli.main import main
from tests.cli.conftest import MODEL


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("habits")
    assert typed(folder, "init", str(MODEL))[0] == 0
    return folder


def typed(folder: Path, *words: str) -> tuple[int, str]:
    done = CliRunner().invoke(main, ["--repo", str(folder), *words])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_commands_of_git_are_answered(command: str, folder: Path) -> None:
    code, said = typed(folder, command)
    assert code == 2
    assert " ".join(COMMANDS[command].split()[:4]) in " ".join(said.split())


@pytest.mark.parametrize(("command", "option"), sorted(OPTIONS))
def test_options_of_git_are_answered(command: str, option: str, folder: Path) -> None:
    code, said = typed(folder, command, option)
    assert code == 2
    assert " ".join(OPTIONS[command, option].split()[:4]) in " ".join(said.split())


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (("comit",), "commit"),
        (("commit", "--mesage", "x"), "--message"),
        (("remote", "rm", "nobody"), "there is no remote 'nobody'"),
        (("config", "memit.layers", "3-99"), "the base has 6 layers"),
        (("config", "memit.foo", "1"), "memit.closing"),
        (("commit", "The capital of France is Lyon", "-m", "x"), "--prompt, --subject and --target"),
        (("log", "nope..HEAD"), "nothing is named 'nope'"),
    ],
)
def test_what_is_mistyped_is_told(words: tuple[str, ...], wanted: str, folder: Path) -> None:
    code, said = typed(folder, *words)
    assert code != 0
    assert wanted in " ".join(said.split())


def test_nothing_is_suggested_where_nothing_is_near(folder: Path) -> None:
    assert "Did you mean" not in typed(folder, "commit", "--xyzzy")[1]
    assert "Did you mean" not in typed(folder, "frobnicate")[1]


def test_a_usage_error_is_json_where_json_was_asked_for(folder: Path) -> None:
    code, said = typed(folder, "log", "--xyzzy", "--json")
    assert code == 2
    assert json.loads(said)["error"]["kind"] == "usage"


def test_log_counts_and_ranges_as_git_does(folder: Path) -> None:
    fact = ("--prompt", "The capital of {} is", "--target", "Oslo", "--force")
    for subject in ("Kenya", "Brazil", "Peru"):
        assert typed(folder, "commit", "-m", subject, "--subject", subject, *fact)[0] == 0
    assert len(json.loads(typed(folder, "log", "-2", "--json")[1])) == 2
    found = json.loads(typed(folder, "log", "HEAD~2..", "--json")[1])
    assert [entry["message"] for entry in found] == ["Peru", "Brazil"]
    assert typed(folder, "diff", "HEAD~1..HEAD", "--json")[1] == typed(folder, "diff", "HEAD~1", "HEAD", "--json")[1]
