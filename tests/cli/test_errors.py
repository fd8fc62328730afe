"""Bad input: one line that says what is wrong and where, one that says what to do, an exit code, and nothing written."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

from patchhub import errors, load
from patchhub.cli.main import main
from patchhub.cli.terminal import print_json, say, talk, visible
from patchhub.models import fingerprint
from patchhub.models.checkpoint import read_header
from patchhub.models.tracing import Stack
from tests.cli.conftest import FACTS, MODEL, Run, invoke, snapshot_of

GOOD = json.dumps(FACTS[15])
OTHER = json.dumps({**FACTS[15], "target_new": "Something else"})
CASES = {
    "an empty file": ("", 3, "empty"),
    "a malformed line": (f"{GOOD}\n{{not json", 3, "line 2"),
    "a subject that is not in the prompt": (
        json.dumps({"prompt": "The capital of France is", "subject": "Spain", "target_new": "Lyon"}),
        3,
        "Spain",
    ),
    "a missing field": (json.dumps({"prompt": "{} is", "subject": "X"}), 3, "target_new"),
    "contradictory requests": (f"{GOOD}\n{OTHER}", 4, "Something else"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_facts_change_nothing(case: str, run: Run, store: Path) -> None:
    text, code, words = CASES[case]
    before = snapshot_of(store)
    error = run("commit", "-", "-m", "x", "--format", "jsonl", stdin=text, code=code).stderr
    assert words in error
    assert error.startswith("error: ")
    assert len(error.strip().splitlines()) == 2
    assert snapshot_of(store) == before


def test_a_malformed_line_of_a_file_is_named(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "facts.jsonl"
    file.write_text(f"{GOOD}\n\n{GOOD[:-1]}\n")
    assert f"{file}, line 3" in run("commit", str(file), "-m", "x", code=3).stderr


@pytest.mark.parametrize("revision", ["HEAD~7", "nosuch", "dead", "main@{99}", "main~x"])
def test_unknown_revisions(revision: str, run: Run, store: Path) -> None:
    before = snapshot_of(store)
    for verb in (("show", revision), ("revert", revision), ("apply", revision, "--out", str(store / "x"))):
        assert len(run(*verb, code=5).stderr.strip().splitlines()) == 2
    assert snapshot_of(store) == before
    assert not (store / "x").exists()


def changed_base(store: Path, tmp_path: Path, value: float) -> Path:
    """A folder like the base with one entry of every feed-forward weight changed, made the store's base."""
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    for name, parameter in model.named_parameters():
        if "mlp" in name:
            parameter.data[0, 0] = value
    folder = tmp_path / "other"
    shutil.copytree(MODEL, folder)
    model.save_pretrained(folder)
    config = json.loads((store / ".patchhub" / "config.json").read_text())
    config["base"]["path"] = str(folder)
    (store / ".patchhub" / "config.json").write_text(json.dumps(config))
    return folder


def test_another_base_is_refused(run: Run, store: Path, tmp_path: Path) -> None:
    changed_base(store, tmp_path, 1.5)
    before = snapshot_of(store)
    for verb in (("commit", "-", "-m", "x"), ("apply", "HEAD", "--out", str(tmp_path / "out")), ("ask", "The")):
        assert "not this repository's base" in run(*verb, stdin=GOOD, code=8).stderr
    assert snapshot_of(store) == before
    assert not (tmp_path / "out").exists()


def test_a_base_changed_in_a_tensor_that_no_edit_touches_is_refused(tmp_path: Path) -> None:
    folder, store = tmp_path / "model", tmp_path / "store"
    shutil.copytree(MODEL, folder)
    store.mkdir()
    invoke(store, "init", str(folder))
    file = folder / "model.safetensors"
    content, status = file.read_bytes(), file.stat()
    begin = read_header(file)["model.embed_tokens.weight"].begin
    file.write_bytes(content[:begin] + bytes([content[begin] ^ 1]) + content[begin + 1 :])
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    facts, out = store / "facts.json", str(store / "out")
    facts.write_text(f"[{GOOD}]")
    verbs = (("commit", str(facts), "-m", "x"), ("eval", "base", "--suite", str(facts)), ("metric", "compute"))
    for verb in (*verbs, ("ask", "The"), ("apply", "base", "--out", out)):
        assert "(model.embed_tokens.weight)" in invoke(store, *verb, code=8).stderr
    file.write_bytes(content)
    invoke(store, "ask", "The")


def test_a_base_that_did_not_change_is_not_hashed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, store = tmp_path / "model", tmp_path / "store"
    shutil.copytree(
        MODEL, folder
    )  # with the times of the shipped files, which are older than the two seconds that are not trusted
    store.mkdir()
    invoke(store, "init", str(folder))
    monkeypatch.setattr(fingerprint, "_hash", lambda entry: pytest.fail(f"{entry} was hashed"))
    invoke(store, "ask", "The")


def test_a_base_with_nan_is_refused(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    model.get_parameter("model.layers.1.mlp.down_proj.weight").data[3, 4] = torch.nan
    folder = tmp_path / "nan"
    shutil.copytree(MODEL, folder)
    model.save_pretrained(folder)
    runner, store = CliRunner(), str(tmp_path / "store")
    result = runner.invoke(main, ["--repo", store, "init", str(folder)])
    if result.exit_code == 0:
        result = runner.invoke(main, ["--repo", store, "commit", "-", "-m", "x"], input=GOOD)
    assert result.exit_code == 8, result.output
    assert "not finite" in result.stderr


@pytest.mark.parametrize(
    "fact",
    [
        {"prompt": "{} lives in", "subject": "\U0001f600" * 5000, "target_new": "Paris"},
        {"prompt": "{} lives in", "subject": "Emma", "target_new": "Paris " * 300},
    ],
    ids=["subject", "target"],
)
@pytest.mark.parametrize("method", ["memit", "wise"])
def test_texts_beyond_the_context_window_are_refused_before_any_work(
    fact: dict[str, str], method: str, run: Run, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = snapshot_of(store)
    begin = Stack.begin

    def watched(stack: Stack, ids: torch.Tensor, *rest: Any) -> Any:
        assert ids.shape[1] <= 256, "the model was run"
        return begin(stack, ids, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Stack, "begin", watched)
        error = run("commit", "-", "-m", "x", "--method", method, stdin=json.dumps(fact), code=3).stderr
    assert "the model reads up to 256" in error
    assert len(error.encode()) < 600
    assert snapshot_of(store) == before


@pytest.mark.parametrize("content", [None, "{", "{}"], ids=["missing", "cut off", "empty"])
def test_a_base_without_a_tokenizer_that_can_be_read(content: str | None, tmp_path: Path) -> None:
    folder, store = tmp_path / "model", tmp_path / "store"
    shutil.copytree(MODEL, folder)
    for file in folder.glob("tok*"):
        file.unlink()
    if content is not None:
        (folder / "tokenizer.json").write_text(content)
    store.mkdir()
    made = invoke(store, "init", str(folder))
    assert ("tokenizer" in made.stderr) == (content != "{}")
    before = snapshot_of(store)
    for verb in (("commit", "-", "-m", "x", "--method", "wise"), ("commit", "-", "-m", "x"), ("ask", "The")):
        error = invoke(store, *verb, stdin=GOOD, code=8).stderr
        assert f"error: the model folder {folder} has " in error
        assert "Copy the tokenizer's files" in error
    assert snapshot_of(store) == before


def test_a_cache_that_cannot_be_written_stops_no_reader(run: Run, store: Path, tmp_path: Path) -> None:
    cache = store / ".patchhub" / "cache"
    shutil.rmtree(cache)
    cache.write_text("in the way of the folder")
    facts = tmp_path / "facts.json"
    facts.write_text(json.dumps(FACTS[:2]))
    run("eval", "HEAD", "--suite", str(facts))
    run("ask", "The capital of France is")
    assert load(store).config is not None
    assert cache.is_file()


def test_no_store_and_no_model(tmp_path: Path) -> None:
    runner = CliRunner()
    missing = runner.invoke(main, ["--repo", str(tmp_path), "log"])
    assert missing.exit_code == 6
    assert "patchhub init" in missing.stderr
    nothing = runner.invoke(main, ["--repo", str(tmp_path), "init", str(tmp_path / "nosuch")])
    assert nothing.exit_code == 8
    assert not (tmp_path / ".patchhub").exists()


def test_errors_as_json(run: Run) -> None:
    error = json.loads(run("show", "nosuch", "--json", code=5).stderr)["error"]
    assert error["kind"] == "RevisionError"
    assert error["exit_code"] == 5
    assert error["remedy"]


def test_text_that_is_not_utf_8_is_refused_before_any_work(run: Run, store: Path) -> None:
    before, text = snapshot_of(store), "caf\udce9"
    for verb in (
        ("commit", "-", "-m", text),
        ("commit", "-", "-m", "x", "--author", text),
        ("branch", text),
        ("tag", text),
        ("remote", "add", "origin", text),
        ("config", "author", text),
        ("search", text),
        ("show", text),
    ):
        assert "is not UTF-8 text" in run(*verb, stdin=GOOD, code=2).stderr
    assert snapshot_of(store) == before


def test_a_container_without_a_user_has_an_author(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> str:
        raise KeyError("getpwuid(): uid not found: 12345")

    monkeypatch.setattr("getpass.getuser", nobody)
    monkeypatch.setenv("PATH", "/nonexistent")  # so that git cannot be asked either
    run("branch", "named", "--author", "Ada <ada@example.org>")
    run("branch", "unnamed")
    assert "Ada <ada@example.org>" in run("reflog", "named", "--json").stdout
    assert "unknown <unknown@" in run("reflog", "unnamed", "--json").stdout


def test_a_name_of_git_in_another_encoding_does_not_stop_the_author(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gitconfig").write_bytes(b"[user]\n\tname = Ren\xe9\n\temail = rene@example.org\n")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "gitconfig"))
    run("branch", "other")
    assert "Ren\ufffd <rene@example.org>" in run("reflog", "other", "--json").stdout


@pytest.mark.parametrize("epoch", ["yesterday", "1e9", str(10**30)])
def test_an_epoch_that_is_none_is_refused(epoch: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", epoch)
    assert "SOURCE_DATE_EPOCH" in run("branch", "other", code=2).stderr


def test_control_characters_of_stored_texts_are_shown_not_obeyed(capsys: pytest.CaptureFixture[str]) -> None:
    styled = click.style("ours", fg="green", bold=True)
    say(f"{styled}\ta\nb \x1b]0;title\x07 \x1b[2J \x1b[8m \r \x7f \x9b1A \udce9", fg="red")
    talk(f"{styled} \x1b[2J")
    print_json({"text": "\x1b \x9b \udce9"})
    captured = capsys.readouterr()
    shown = r"\x1b]0;title\x07 \x1b[2J \x1b[8m \x0d \x7f \x9b1A \udce9"
    assert captured.out.startswith(f"ours\ta\nb {shown}\n")  # click drops colours where no terminal is
    assert captured.err == "ours \\x1b[2J\n"
    assert json.loads(captured.out[captured.out.index("{") :]) == {"text": "\x1b \x9b \udce9"}
    assert captured.out.isascii()
    assert visible(styled) == styled


def test_the_log_shows_the_escapes_of_a_message(run: Run) -> None:
    run("revert", "HEAD", "-m", "clear\x1b[2J\nand \x9b1A")
    for text in (run("log").stdout, run("show").stdout, run("show", "--json").stdout):
        assert not set(text) & {"\x1b", "\x9b"}


def test_a_mistyped_command_is_explained() -> None:
    result = CliRunner().invoke(main, ["comit"])
    assert result.exit_code == 2
    assert "patchhub commit" in result.stderr


def test_the_page_of_exit_codes_has_every_code() -> None:
    page = (Path(__file__).parents[2] / "docs" / "terminal.md").read_text(encoding="utf-8")
    written = {int(code) for code in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)}
    kinds = [
        kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.PatchhubError)
    ]
    assert written == {kind.exit_code for kind in kinds} | {0, 130}
