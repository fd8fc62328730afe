"""The pages that are written from the source are as it says, and every Python example runs."""

from __future__ import annotations

import ast
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

import patchhub
from patchhub.cli.main import main
from patchhub.porcelain.share import Access, Chosen, push, remote_add
from patchhub.progress import Silent
from patchhub.store.store import Store
from patchhub.who import Who
from tests import docs
from tests.cli.conftest import MODEL, first_store  # noqa: F401  # a fixture
from tests.remotes.conftest import TOKEN, hub  # noqa: F401  # a fixture

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = {"patchhub", "repo"}


def test_the_pages_are_as_the_source_says() -> None:
    assert docs.run(check=True) == [], "run `python -m tests.docs`"


def test_the_modules_that_pages_name_are_there() -> None:
    """A room that is renamed or joined to another keeps its old name nowhere."""
    named = {
        (page.name, name)
        for page in [*PAGES, *sorted((ROOT / "docs" / "decisions").glob("*.md"))]
        for name in re.findall(r"`((?:[a-z_]+/)+[a-z_]+\.py)`?", page.read_text(encoding="utf-8"))
    }
    places = (ROOT, ROOT / "patchhub", ROOT / "tests")
    assert not {(page, name) for page, name in named if not any((place / name).is_file() for place in places)}


def examples(page: Path) -> list[str]:
    """The blocks of a page, fenced or indented, that are Python and speak of `patchhub` or `repo`."""
    text = page.read_text(encoding="utf-8")
    fenced = re.findall(r"^```python\n(.*?)^```", text, re.S | re.M)
    blocks = re.findall(r"(?:^ {4}.*\n(?:^\s*\n(?= {4}))*)+", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M), re.M)
    return [*fenced, *(block for block in map(_dedented, blocks) if _is_example(block))]


def _dedented(block: str) -> str:
    return "\n".join(line[4:] for line in block.split("\n"))


def _is_example(block: str) -> bool:
    try:
        tree = ast.parse(block)
    except SyntaxError:
        return False
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return any(
        isinstance(call, ast.Attribute) and isinstance(call.value, ast.Name) and call.value.id in NAMES
        for call in calls
    )


WITH_EXAMPLES = [page for page in PAGES if examples(page)]


def test_the_pages_that_show_python_are_found() -> None:
    assert {page.name for page in WITH_EXAMPLES} >= {"README.md", "python.md", "hub.md", "models.md"}


def test_the_first_example_of_the_readme_is_written_with_the_front_door() -> None:
    assert "patchhub.Repository.init(" in examples(ROOT / "README.md")[0]


SUBSTITUTES = (
    ('"HuggingFaceTB/SmolLM2-135M-Instruct"', repr(str(MODEL))),
    ('"user/facts"', f'"tester/facts", base={str(MODEL)!r}'),
)
"""The demo model for one that is not on this machine, and a Hub that is."""


@pytest.fixture
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where a page's examples run: a copy of a store with one commit, and the page's own folder `facts` not yet there."""
    here = tmp_path / "here"
    shutil.copytree(request.getfixturevalue("first_store"), here)
    with patchhub.Repository(here, progress=False) as repo:
        repo.config("author", "Ada <ada@example.org>")
    monkeypatch.chdir(here)
    return here


def _pushed(folder: Path, endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Push the store in a folder to the Hub on this machine, which is the one that the client knows."""
    from huggingface_hub import constants, hf_api

    template = endpoint + constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants.ENDPOINT)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(hf_api.api, "endpoint", endpoint)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with Store.open(folder) as repository:
        remote_add(repository, "origin", "hf://tester/facts")
        who = Who("Ada <ada@example.org>", "2026-11-21T09:30:00Z")
        push(repository, "origin", Chosen(["main"]), Silent(), who=who, access=Access(endpoint, TOKEN))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore:Use 'content=:DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("page", WITH_EXAMPLES, ids=lambda page: page.name)
def test_every_example_runs(
    page: Path, folder: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the demo model; the examples of one page share their names."""
    session: dict[str, Any] = {"patchhub": patchhub}
    found = examples(page)
    if any("user/facts" in example for example in found):
        _pushed(folder, request.getfixturevalue("hub").url, monkeypatch)
    for example in found:
        source = example
        for name, substitute in SUBSTITUTES:
            source = source.replace(name, substitute)
        if "repo." in source and "repo =" not in source:
            session.setdefault("repo", patchhub.open(folder, progress=False))
        exec(compile(source, str(page), "exec"), session)


def test_every_line_of_the_threat_model_names_a_test_that_there_is() -> None:
    text = (ROOT / "docs" / "threat-model.md").read_text(encoding="utf-8")
    rows = [
        line for line in text.splitlines() if line.startswith("|") and not line.startswith(("|---", "| it ", "| they "))
    ]
    assert len(rows) > 15
    for row in rows:
        named = re.findall(r"`([\w/]+\.py)::(\w+)`", row)
        assert named, row
        for file, name in named:
            assert f"def {name}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), (file, name)


def test_the_readme_is_narrow() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if len(line) > 119] == []


def command_lines(page: Path) -> list[str]:
    """The command lines of a page: what begins with `patchhub` in an indented or fenced block."""
    text = page.read_text(encoding="utf-8")
    fenced = "\n".join(re.findall(r"^```\w*\n(.*?)^```", text, re.S | re.M))
    lines = [line.strip() for line in [*re.findall(r"^ {4,}.*", text, re.M), *fenced.splitlines()]]
    return [line.removeprefix("$ ") for line in lines if re.match(r"(\$ )?patchhub [a-z]", line)]


def _command_of(words: list[str]) -> tuple[click.Command, list[str]]:
    command: click.Command = main
    while isinstance(command, click.Group) and words and words[0] in command.commands:
        command, words = command.commands[words[0]], words[1:]
    return command, words


COMMAND_LINES = sorted({(page.name, line) for page in PAGES if page.name != "cli.md" for line in command_lines(page)})


@pytest.mark.parametrize(("page", "line"), COMMAND_LINES)
def test_every_command_line_names_commands_and_options_that_are_there(page: str, line: str) -> None:
    words = shlex.split(
        re.split(r"\s{2,}|;", line.removeprefix("patchhub "))[0].replace("[", "").replace("]", ""), comments=True
    )
    if words[0] == "help":
        return
    command, rest = _command_of(words)
    assert command is not main, f"{page} names a command that is not there: {line}"
    known = {option for param in command.params for option in (*param.opts, *param.secondary_opts)} | {"--help", "--"}
    known |= {f"-{number}" for number in range(10)} if command.name == "log" else set()
    if command.name != "bisect":  # what follows is a command of its own
        assert not [word for word in rest if word.startswith("-") and word.partition("=")[0] not in known], line


def test_the_session_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is under "Your own model", on the demo model: every command line, in order."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Your own model")[2]
    lines = iter(re.findall(r"^ {4}(.*)$", text.partition("The first commit")[0], re.M))
    (tmp_path / "facts").mkdir()
    monkeypatch.chdir(tmp_path / "facts")
    ran = []
    for line in lines:
        if line.startswith("cat > "):
            name = line.split()[2]
            Path(name).write_text("\n".join(iter(lambda: next(lines), "END")), encoding="utf-8")
        elif line.startswith("patchhub "):
            words = shlex.split(line.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(MODEL)), comments=True)[1:]
            done = CliRunner().invoke(main, [*words, *(["--force"] if words[0] == "commit" else [])])
            assert done.exit_code == 0, f"{line}: {done.output}"
            ran.append(words[0])
    assert ran == ["init", "commit", "ask", "apply", "revert"]
