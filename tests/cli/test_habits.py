"""What users of git type is answered with what does it here; a suggestion is near, or there is none."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner

from patchhub.cli.habits import COMMANDS, MISSING, MORE, OPTIONS, WORDS
from patchhub.cli.main import SECTIONS, main
from patchhub.store.store import Store
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
    code, said = typed(folder, *([] if command == "patchhub" else [command]), option)
    assert code == 2
    assert " ".join(OPTIONS[command, option].split()[:4]) in " ".join(said.split())


@pytest.mark.parametrize(("command", "word"), sorted(WORDS))
def test_commands_below_a_command_of_git_are_answered(command: str, word: str, folder: Path) -> None:
    code, said = typed(folder, command, word, "x")
    assert code == 2
    assert WORDS[command, word] in " ".join(said.split())


@pytest.mark.parametrize("command", sorted(MORE))
def test_more_words_than_a_command_takes_are_answered(command: str, folder: Path) -> None:
    code, said = typed(folder, command, "a", "b", "c")
    assert code == 2
    assert MORE[command] in " ".join(said.split())


@pytest.mark.parametrize("command", sorted(MISSING.keys() - {"patchhub", "import", "merge"}))
def test_an_argument_that_is_missing_is_explained(command: str, folder: Path) -> None:
    code, said = typed(folder, command)
    assert code == 2
    assert MISSING[command] in " ".join(said.split())


def test_every_answer_is_about_a_command_that_is_there() -> None:
    for command in {*(command for command, _ in (*OPTIONS, *WORDS)), *MORE, *MISSING}:
        assert command in {*main.commands, "patchhub"}
    for words in (*COMMANDS.values(), *OPTIONS.values(), *WORDS.values(), *MORE.values(), *MISSING.values()):
        for verb in re.findall(r"`patchhub (\w[\w-]*)", words):
            assert verb in main.commands, words
    assert not COMMANDS.keys() & main.commands.keys()
    for command, option in OPTIONS:
        known = main if command == "patchhub" else main.commands[command]
        assert option not in {name for param in known.params for name in param.opts}


def test_nothing_is_suggested_for_what_the_hub_is_asked(folder: Path) -> None:
    for command in ("login", "repo", "ls-remote"):
        assert "Did you mean" not in typed(folder, command)[1]


def test_usage_errors_before_the_command_are_json_too(folder: Path) -> None:
    done = CliRunner().invoke(main, ["--jsno", "log", "--json"])
    assert done.exit_code == 2
    assert json.loads(done.output)["error"]["kind"] == "usage"


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (("comit",), "commit"),
        (("shwo",), "patchhub show"),
        (("commit", "--mesage", "x"), "--message"),
        (("remote", "rm", "nobody"), "there is no remote 'nobody'"),
        (("config", "memit.layers", "3-99"), "the base has 6 layers"),
        (("config", "memit.foo", "1"), "memit.closing"),
        (("commit", "The capital of France is Lyon", "-m", "x"), "--prompt, --subject and --target"),
        (("log", "nope..HEAD"), "nothing is named 'nope'"),
        (("log", "Kenya"), "`patchhub log -S Kenya`"),
        (("revert", "main..HEAD"), "is a range of commits"),
        (("revert", "-m", "1", "HEAD"), "-m is the message"),
        (("config", "nokey"), "Nearest are"),
        (("config", "user.email"), "author"),
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


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three commits on main, each of one fact."""
    folder = tmp_path_factory.mktemp("taught")
    assert typed(folder, "init", str(MODEL))[0] == 0
    assert typed(folder, "config", "metric.tokens", "3000")[0] == 0
    fact = ("--prompt", "The capital of {} is", "--target", "Oslo", "--force", "--author", "Ada <ada@example.org>")
    for subject in ("Kenya", "Brazil", "Peru"):
        assert typed(folder, "commit", "-m", subject, "--subject", subject, *fact)[0] == 0
    return folder


@pytest.fixture
def store(taught: Path, tmp_path: Path) -> Path:
    shutil.copytree(taught, tmp_path / "store")
    return tmp_path / "store"


def done(folder: Path, *words: str) -> str:
    code, said = typed(folder, *words)
    assert code == 0, said
    return said


def test_log_counts_and_ranges_as_git_does(taught: Path) -> None:
    assert len(json.loads(done(taught, "log", "-2", "--json"))) == 2
    found = json.loads(done(taught, "log", "HEAD~2..", "--json"))
    assert [entry["message"] for entry in found] == ["Peru", "Brazil"]
    assert done(taught, "diff", "HEAD~1..HEAD") == done(taught, "diff", "HEAD~1", "HEAD")
    assert done(taught, "diff", "HEAD~1...HEAD", "--json") == done(taught, "diff", "HEAD~1", "HEAD", "--json")


def test_log_shows_every_branch_and_any_form(store: Path) -> None:
    done(store, "switch", "-c", "side", "HEAD~2")
    assert done(store, "log", "--format", "%s") == "Kenya\n"
    assert (
        done(store, "log", "--all", "--pretty=format:%s %an <%ae>%%").splitlines()[0] == "Peru Ada <ada@example.org>%"
    )
    assert done(store, "log", "--format", "oneline") == done(store, "log", "--oneline")
    assert typed(store, "log", "--format", "%q")[0] == 2


def test_log_lists_the_facts_of_each_commit(taught: Path) -> None:
    assert done(taught, "log", "-p", "--oneline", "-2").splitlines()[1::2] == [
        f"  + The capital of {subject} is Oslo" for subject in ("Peru", "Brazil")
    ]
    assert done(taught, "log", "-p", "--graph").count(" + The capital of ") == 3
    assert done(taught, "log", "-p", "--json") == done(taught, "log", "--json")


def test_points_in_time_as_git_writes_them(taught: Path) -> None:
    for words in (("--since", "2.weeks"), ("--since=2.weeks.ago",), ("--after", "yesterday"), ("--since", "2 weeks")):
        assert len(done(taught, "log", "--oneline", *words).splitlines()) == 3
    assert done(taught, "log", "--before", "2.weeks.ago") == ""


def test_show_finds_facts_by_what_they_are_called(taught: Path) -> None:
    by_subject = done(taught, "show", "kenya", "--json")
    (fact,) = json.loads(by_subject)
    assert (fact["subject"], fact["active"]) == ("Kenya", True)
    for name in ("The capital of Kenya is", "The capital of Kenya is Oslo", fact["id"][:10], "HEAD:Kenya", "@~2:Kenya"):
        assert done(taught, "show", name, "--json") == by_subject
    assert typed(taught, "show", "HEAD~2:Peru")[0] == 3
    assert [fact["subject"] for fact in json.loads(done(taught, "show", "HEAD~2:oslo", "--json"))] == ["Kenya"]
    assert len(json.loads(done(taught, "show", "Oslo", "--json"))) == 3
    assert typed(taught, "show", "Kenya is")[0] == 5
    assert done(taught, "show", "@") == done(taught, "show", "HEAD")
    assert "+ The" not in done(taught, "show", "--stat")


def test_what_two_branches_do_not_share(store: Path) -> None:
    done(store, "switch", "-c", "side", "HEAD~1")
    fact = ("--prompt", "The capital of {} is", "--target", "Oslo", "--subject", "Chile", "--force")
    done(store, "commit", "-m", "Chile", *fact)
    told = [entry["message"] for entry in json.loads(done(store, "log", "main...side", "--json"))]
    assert sorted(told) == ["Chile", "Peru"]
    assert done(store, "log", "main...main") == ""
    assert done(store, "log", "base...HEAD~1", "--format", "%s") == done(store, "log", "HEAD~1", "--format", "%s")
    assert all(len(word) < 64 for word in done(store, "diff", "main...side").split())


def test_switch_goes_back_to_where_head_was(store: Path) -> None:
    assert typed(store, "switch", "-")[0] == 5
    done(store, "switch", "-c", "side")
    for branch in ("main", "side", "main"):
        done(store, "switch", "-")
        assert json.loads(done(store, "status", "--json"))["branch"] == branch
    done(store, "branch", "-D", "side")
    assert typed(store, "switch", "-")[0] == 5


def test_a_tag_says_what_it_is_for(store: Path, tmp_path: Path) -> None:
    """Its message travels, is taken back with it, and is no score."""
    done(store, "tag", "v1", "-m", "first release\nof many")
    assert "first release" in done(store, "tag")
    assert "Scores" not in done(store, "log", "-1")
    done(store, "remote", "add", "origin", str(tmp_path / "remote"))
    done(store, "push", "--tags")
    done(store, "push")
    there = str(tmp_path / "there")
    assert CliRunner().invoke(main, ["clone", str(tmp_path / "remote"), there, "--base", str(MODEL)]).exit_code == 0
    assert done(Path(there), "tag") == done(store, "tag")
    done(Path(there), "fsck")
    done(store, "tag", "-d", "v1")
    assert not any("/tag/" in ref for ref in Store.open(store).refs())
    done(store, "undo")
    assert "first release" in done(store, "tag")
    assert typed(store, "tag", "-m", "alone")[0] == 2


def test_branches_are_renamed_and_listed(store: Path) -> None:
    done(store, "branch", "side", "HEAD~1")
    done(store, "branch", "-m", "side", "aside")
    done(store, "branch", "-m", "trunk")
    assert [branch["name"] for branch in json.loads(done(store, "branch", "--list", "--json"))] == ["aside", "trunk"]
    assert json.loads(done(store, "status", "--json"))["branch"] == "trunk"
    assert "(2 active facts)" in done(store, "branch", "-v")
    done(store, "branch", "-D", "aside")
    done(store, "undo", "3")
    assert [branch["name"] for branch in json.loads(done(store, "branch", "--json"))] == ["main", "side"]


def test_undo_takes_facts_back_first(store: Path) -> None:
    done(store, "branch", "side")
    done(store, "switch", "side")
    assert "`branch`" in done(store, "undo")
    assert json.loads(done(store, "status", "--json"))["branch"] == "main"  # the one it is on is no more
    assert "`commit`" in done(store, "undo")
    done(store, "redo")
    assert json.loads(done(store, "log", "main", "--json"))[0]["message"] == "Peru"
    done(store, "switch", "--detach", "HEAD")
    assert "`switch`" in done(store, "undo", "--all")
    done(store, "undo", "3")
    assert json.loads(done(store, "branch", "--json")) == []
    assert typed(store, "undo")[0] != 0
    assert [entry["command"] for entry in json.loads(done(store, "op", "log", "-n", "3", "--json"))] == ["undo"] * 3


def test_a_commit_is_amended(store: Path) -> None:
    before = json.loads(done(store, "show", "--json"))
    assert "nothing to amend" in typed(store, "commit", "--amend")[1]
    done(store, "commit", "--amend", "-m", "Lima")
    after = json.loads(done(store, "show", "--json"))
    assert after["message"] == "Lima"
    assert (after["parents"], after["facts_added"], after["check"]) == (
        before["parents"],
        before["facts_added"],
        before["check"],
    )
    fact = ("--prompt", "The capital of {} is", "--target", "Oslo", "--subject", "Chile", "--force")
    done(store, "commit", "--amend", *fact)
    joined = json.loads(done(store, "show", "--json"))
    assert (joined["message"], joined["parents"], joined["added"], joined["active"]) == ("Lima", after["parents"], 2, 4)
    done(store, "undo")
    assert json.loads(done(store, "show", "--json"))["id"] == after["id"]
    done(store, "redo")
    assert json.loads(done(store, "show", "--json"))["id"] == joined["id"]
    done(store, "fsck")


def test_a_remote_is_renamed_its_branch_overwritten_and_removed(store: Path, tmp_path: Path) -> None:
    done(store, "remote", "add", "origin", str(tmp_path / "remote"))
    done(store, "push")
    assert "`patchhub push REMOTE --delete main`" in typed(store, "push", "origin", ":main")[1]
    assert "A branch has one name" in typed(store, "push", "origin", "main:other")[1]
    done(store, "remote", "set-url", "origin", str(tmp_path / "elsewhere"))
    done(store, "push")
    assert (tmp_path / "elsewhere").is_dir()
    assert typed(store, "remote", "add", "origin", "x")[0] == typed(store, "remote", "set-url", "nobody", "x")[0] == 2
    done(store, "remote", "set-url", "origin", str(tmp_path / "remote"))
    done(store, "remote", "rename", "origin", "there")
    assert json.loads(done(store, "remote", "--json")) == {"there": str(tmp_path / "remote")}
    done(store, "reset", "HEAD~1")
    assert typed(store, "push")[0] != 0
    done(store, "push", "--force-with-lease")
    assert "up to date" in done(store, "push")
    done(store, "push", "there", "--delete", "main", "--dry-run")
    done(store, "push", "there", "--delete", "main")
    assert typed(store, "push", "there", "--delete", "main")[0] == 5
    assert json.loads(done(store, "branch", "-r", "--json")) == []
    done(store, "push")


def test_a_lease_ends_where_others_pushed(store: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(store, other)
    for folder in (store, other):
        done(folder, "remote", "add", "origin", str(tmp_path / "remote"))
        done(folder, "push", "--dry-run")
    done(store, "push")
    done(other, "reset", "HEAD~1")
    for words in (("push", "--force-with-lease"), ("push", "origin", "--delete", "main")):
        assert typed(other, *words)[0] != 0, "it has never seen what is there"


def test_help_is_in_sections_and_names_every_command() -> None:
    said = CliRunner().invoke(main, ["help"]).output
    assert sorted(name for names in SECTIONS.values() for name in names) == sorted(main.commands)
    for title in SECTIONS:
        assert f"{title}:" in said
    assert CliRunner().invoke(main, ["help", "remote", "add"]).output.splitlines()[0].endswith("NAME ADDRESS")


def test_every_help_fits_into_80_columns() -> None:
    pages: list[tuple[str, ...]] = [()]
    for name, command in main.commands.items():
        pages += [(name,), *((name, below) for below in getattr(command, "commands", {}))]
    for words in pages:
        said = CliRunner().invoke(main, [*words, "--help"], terminal_width=80).output
        assert [line for line in said.splitlines() if len(line) > 80] == [], words


def test_quiet_says_only_what_was_asked_for(store: Path) -> None:
    assert done(store, "branch", "aside", "-q") is not None
    assert done(store, "-q", "revert", "HEAD") == ""
    assert done(store, "undo", "-q") == ""
    assert done(store, "log", "-q", "-1") == done(store, "log", "-1")


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "ascii", "utf-8"])
def test_any_terminal_can_be_written_to(encoding: str, store: Path) -> None:
    done(store, "revert", "HEAD", "-m", "“Perú” ☃")
    for words in (["log", "-1"], ["show"], ["status"], ["log", "-1", "--json"]):
        ran = CliRunner(charset=encoding).invoke(main, ["--repo", str(store), *words])
        assert ran.exit_code == 0, ran.exception
        if "--json" in words:
            assert json.loads(ran.stdout_bytes.decode(encoding))[0]["message"] == "“Perú” ☃"


def test_no_colour_where_none_is_wanted(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    coloured = CliRunner().invoke(main, ["--repo", str(store), "log"], color=True).output
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[" in coloured
    assert "\x1b[" not in CliRunner().invoke(main, ["--repo", str(store), "log"], color=True).output


@pytest.mark.parametrize(
    ("typed_so_far", "wanted"),
    [
        (["sho"], "show"),
        (["switch", "ma"], "main"),
        (["show", "ken"], "Kenya"),
        (["show", "HE"], "HEAD"),
        (["revert", "--subject", "Pe"], "Peru"),
        (["remote", "re"], "rename"),
        (["log", "HEAD~1..ma"], "HEAD~1..main"),
        (["show", "main:ken"], "main:Kenya"),
        (["config", "memit.la"], "memit.layers"),
    ],
)
def test_the_shell_completes_verbs_refs_and_facts(
    typed_so_far: list[str], wanted: str, taught: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(taught)
    *words, last = typed_so_far
    items = ShellComplete(main, {}, "patchhub", "_PATCHHUB_COMPLETE").get_completions(words, last)
    assert wanted in [item.value for item in items]
    monkeypatch.chdir("/")
    assert "Kenya" not in [
        item.value for item in ShellComplete(main, {}, "patchhub", "_X").get_completions(["show"], "K")
    ]
