"""One sitting on the built-in model that gives every verb with --json a turn, and its documents without what differs between machines."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from patchhub.cli.main import main
from patchhub.store.store import Store
from tests.pins.history import AUTHOR
from tests.served import server

MODEL = Path(str(files("patchhub") / "demo_model"))
FACTS: list[dict[str, Any]] = json.loads((files("patchhub") / "demo_facts.json").read_text(encoding="utf-8"))
AUSTRALIA, TOWER, DRACULA, CARLSEN, FUJI = (FACTS[place] for place in (0, 1, 2, 4, 9))

FIRST, STEP = 4102444800, 60
"""SOURCE_DATE_EPOCH of the first command (the year 2100, so that `gc` finds every file old), and how much later each one is."""

STEPS = (
    f"init {{model}} --author '{AUTHOR}'",
    f"config author '{AUTHOR}'",
    "config metric.tokens 3000",
    "config memit.layers 2-3",
    "config memit.layers",
    "config --unset memit.layers",
    "config",
    "status",
    "log",
    "metric",
    "metric compute --text {folder}/text.txt",
    "metric export {folder}/exported.metric",
    "commit {folder}/first.json -m 'two facts'",
    "metric",
    "tag v1",
    "tag v2",
    "tag",
    "tag -d v2",
    "ask 'The capital of Australia is'",
    "blame 'The capital of Australia is'",
    "blame --lookup 'The capital of Australia is'",
    "branch side",
    "switch side",
    "commit {folder}/side.json -m 'two on the side'",
    "switch main",
    "branch",
    "commit -m 'one fact' --prompt 'The sport of {{}} is' --subject 'Magnus Carlsen' --target boxing",
    "bisect base HEAD --metric efficacy --above 0.5",
    'bisect base HEAD -- {python} -c \'import os; exit(os.environ["PATCHHUB_COMMIT"] != "base")\'',
    "merge-base main side",
    "merge side --dry-run",
    "merge side -m 'the side comes in'",
    "status",
    "merge --abort",
    "merge side --ours",
    "merge side",
    "refresh",
    "update --subject 'the Eiffel Tower' --target London",
    "log",
    "log --stat --graph --oneline -n 2",
    "diff base v1",
    "diff HEAD~1 HEAD --weights --ask {folder}/prompts.txt",
    "show",
    "show HEAD~2",
    "revert HEAD",
    "undo",
    "redo",
    "search Australia",
    "switch -c picks v1",
    "cherry-pick side",
    "revert --subject 'Mount Fuji'",
    "squash 2 -m 'two in one'",
    "reset v1",
    "reflog",
    "reflog main -n 2",
    "eval --suite {folder}/suite.json",
    "eval main~3 --suite {folder}/suite.json --all --limit 1",
    "log --stat -n 1",
    "bench memit --suite {folder}/suite.json --limit 1",
    "report --out {folder}/report.html",
    "apply HEAD --out {folder}/applied",
    "export checkpoint --out {folder}/checkpoint",
    "export diff --out {folder}/change.safetensors",
    "export peft --out {folder}/adapters",
    "remote add origin {folder}/remote",
    "remote list",
    "push origin main picks --dry-run",
    "push origin main picks --tags",
    "push origin main",
    f"clone {{folder}}/remote {{folder}}/clone --base {{model}} --author '{AUTHOR}'",
    f"--repo {{folder}}/clone config author '{AUTHOR}'",
    "--repo {folder}/clone commit {folder}/suite.json -m 'a shard' --method wise",
    "--repo {folder}/clone status",
    "--repo {folder}/clone show",
    "--repo {folder}/clone apply HEAD --out {folder}/routed",
    "--repo {folder}/clone push origin main",
    "fetch",
    "branch -r",
    "switch main",
    "pull",
    "pull",
    "remote remove origin",
    f"--repo {{folder}}/other init {{model}} --author '{AUTHOR}'",
    f"--repo {{folder}}/other config author '{AUTHOR}'",
    "--repo {folder}/other metric import {folder}/exported.metric",
    "--repo {folder}/other import {folder}/adapters -m 'an adapter'",
    "--repo {folder}/other show",
    "--repo {folder}/other status",
    "config memit.layers 3-4",
    "config memit.learning_rate 0.125",
    "tune {folder}/first.json --limit 2 --text {folder}/text.txt",
    "gc --dry-run",
    "gc",
    "fsck",
    "fsck --reindex",
    "show Australia",
    "show v1:Australia",
    "branch -m side aside",
    "op log -n 3",
    "log --all --oneline -n 2",
    "remote add origin {folder}/remote",
    "remote rename origin elsewhere",
    "remote set-url elsewhere {folder}/elsewhere",
    "audit",
    "audit v1 --since 2100-01-02",
    "export bom --out {folder}/bom.json",
    "export attestations v1 --out {folder}/scores.jsonl",
    "export gguf v1 --out {folder}/gguf",
    "verify-served {served} --rev v1 -n 2",
)
SIGNED = (
    "sign HEAD --key {folder}/ada",
    "approve HEAD~1..HEAD --key {folder}/bob -m 'it reads right'",
    "tag signed -s --key {folder}/ada",
    "verify --allowed {folder}/allowed",
    "verify --all",
    "log --signatures --allowed {folder}/allowed -n 1",
)
"""What needs `ssh-keygen`, after all the rest."""
CODES = {
    "merge side -m 'the side comes in'": 4,
    "verify --all": 12,
    "verify-served {served} --rev v1 -n 2": 13,
}
"""Exit codes other than 0."""

COUNTS = {"bytes", "tensor_bytes", "shard_bytes"}
"""Integers that depend on how numbers are written out, or on training: told as "int"."""
LOOSE = {"tune": {"layers", "memit.layers", "present", "score"}}
"""What depends on which of the trials is best by a hair: told by its type."""
WRITTEN = {"continuation", "old", "new"}
"""Texts that a model wrote: pinned up to the first full stop."""
SAMPLED = {"top", "contexts"}
"""Lists of which the model sampled all but the first, or ordered them by small numbers: told by their types."""
_KEY = re.compile(r"SHA256:[A-Za-z0-9+/]{43}|AAAA[A-Za-z0-9+/=]{60,}")
_ID = re.compile(r"\b([0-9a-f]{12})([0-9a-f]{52})?\b")

STORED = Path(__file__).parent / "json"
Pinned = list[dict[str, Any]]


def file_of(verb: str) -> Path:
    """Where a verb's documents are stored."""
    return STORED / f"{verb.replace(' ', '_')}.json"


def verbs_with_json() -> set[str]:
    """Every command that has --json, such as `metric compute`."""
    return {" ".join(path) for path, command in _commands(main, ()) if any("--json" in o.opts for o in command.params)}


def run_all(folder: Path) -> dict[str, Pinned]:
    """Run `STEPS` in an empty folder; for each verb its command lines and their normalised documents, in order."""
    domain = [text for fact in FACTS for text in (*fact["paraphrases"], *(n["prompt"] for n in fact["neighborhood"]))]
    texts = {
        "text.txt": "\n".join(domain),
        "prompts.txt": "You will find the Eiffel Tower in the city of\nThe capital of France is\n",
        "first.json": json.dumps([AUSTRALIA, TOWER]),
        "side.json": json.dumps([{**CARLSEN, "target_new": "tennis"}, FUJI]),
        "suite.json": json.dumps([AUSTRALIA, TOWER, DRACULA]),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    places = {"model": str(MODEL), "folder": str(folder), "python": sys.executable}
    verbs = sorted(verbs_with_json(), key=len, reverse=True)
    found: dict[str, Pinned] = defaultdict(list)
    with server(lambda prompt: " nothing at all") as served:
        places["served"] = served
        _run_steps(folder, places, verbs, found)
    return dict(found)


def _run_steps(folder: Path, places: Mapping[str, Any], verbs: Sequence[str], found: dict[str, Pinned]) -> None:
    for number, step in enumerate([*STEPS, *(SIGNED if keys_in(folder) else ())]):
        words = shlex.split(step.format(**places))
        typed = words if words[0] == "--repo" else ["--repo", str(folder), *words]
        verb = next(verb for verb in verbs if f"{' '.join(typed[2:])} ".startswith(f"{verb} "))
        result = _run(typed, FIRST + STEP * number, CODES.get(step, 0))
        document = Normal(places, LOOSE.get(verb, set())).of(json.loads(result))
        found[verb].append({"command": step, "document": document})
        if verb == "init":
            with Store.open(Path(typed[1])) as repository:
                repository.objects.put(b"for gc: nothing refers to this")


def keys_in(folder: Path) -> bool:
    """Make Ada's key, Bob's, and a file that allows both; False where `ssh-keygen` is not there."""
    if shutil.which("ssh-keygen") is None:
        return False
    lines = []
    for name in ("ada", "bob"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
        lines.append(f"{name}@example.org {(folder / f'{name}.pub').read_text(encoding='utf-8')}")
    (folder / "allowed").write_text("".join(lines), encoding="utf-8")
    return True


def verbs_of(steps: Sequence[str]) -> set[str]:
    """The verbs that are asked for in steps and in no others."""
    return {step.split()[0] for step in steps} - {step.split()[0] for step in STEPS}


class Normal:
    """What a document says on every machine: ids, paths and floats give way to placeholders, the rest stays.

    Ids are numbered by first appearance. Entries of a dict whose keys are ids are taken in an order that does not depend on the ids, and
    three or more equal items in a row are written once.
    """

    def __init__(self, places: Mapping[str, str], loose: set[str]) -> None:
        self._places = sorted(((path, f"<{name}>") for name, path in places.items()), key=lambda pair: -len(pair[0]))
        self._loose = loose
        self._ids: dict[str, int] = {}

    def of(self, value: Any, key: str = "") -> Any:
        if key == "near":  # the way from one of these folders to the other
            return type(value).__name__
        if key in self._loose:
            return "number" if isinstance(value, int | float) else type(value).__name__
        if isinstance(value, float) or (key in COUNTS and isinstance(value, int) and value):
            return type(value).__name__
        if isinstance(value, dict):
            entries = sorted(
                value.items(), key=lambda entry: (_ID.sub("", entry[0]), _ID.sub("", json.dumps(entry[1])))
            )
            return {self._text(name): self.of(found, name) for name, found in entries}
        if isinstance(value, list):
            sampled = key in SAMPLED
            return list(
                _folded([self.of(item) if not n or not sampled else _shape(item) for n, item in enumerate(value)])
            )
        if isinstance(value, str):
            return self._text(value.partition(".")[0] if key in WRITTEN else value)
        return value

    def _text(self, text: str) -> str:
        for path, name in self._places:
            text = text.replace(path, name)
        text = re.sub(r"(/cache/[\w-]+)/.*", r"\1/<entry>", text)  # by hashes, whose order says nothing
        return _ID.sub(self._name, _KEY.sub("<key>", text))

    def _name(self, found: re.Match[str]) -> str:
        number = self._ids.setdefault(found[1], len(self._ids) + 1)
        return f"<id {number}>" if found[2] else f"<id {number}, short>"


def _shape(value: Any) -> Any:
    """The types alone: of words that a model wrote and numbers beside them."""
    return [_shape(item) for item in value] if isinstance(value, list) else type(value).__name__


def _folded(items: Sequence[Any]) -> Iterator[Any]:
    for item, run in groupby(items):
        equal = len(list(run))
        yield from [item] * equal if equal < 3 else (item, f"and {equal - 1} more of these")


def _run(typed: Sequence[str], epoch: int, code: int) -> str:
    """The document that a command line prints with --json."""
    cut = typed.index("--") if "--" in typed else len(typed)
    arguments = [*typed[:cut], "--json", *typed[cut:]]
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("SOURCE_DATE_EPOCH", str(epoch))
        result = CliRunner().invoke(main, arguments)
    assert result.exit_code == code, f"{arguments}: exit {result.exit_code}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def _commands(group: click.Group, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command below a group with its path, groups among them."""
    for name, command in group.commands.items():
        yield (*path, name), command
        if isinstance(command, click.Group):
            yield from _commands(command, (*path, name))
