"""Every verb that asks the model does so in the repository's chat form, on its device, in its type and quantisation.

The model is not loaded here: what is asked of `worktree.opening` is recorded, and the verb ends there.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import patchhub.worktree.measuring as measuring
import patchhub.worktree.opening as opening
from patchhub.models.placement import Placement
from patchhub.repository import Repository
from tests.cli.conftest import FACTS, first_store  # noqa: F401  # a fixture
from tests.laws.verbs import commands

pytestmark = pytest.mark.usefixtures("short_texts")

AUTHOR = "Ada <ada@example.org>"
FACT = FACTS[10]


class Asked(Exception):
    """A verb came to the point at which the model is loaded."""


@pytest.fixture(scope="module")
def made(first_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """Ten facts on main; two branches with some of them each, merged; an adapter; chat and bfloat16 in the config."""
    folder = tmp_path_factory.mktemp("forms") / "store"
    shutil.copytree(first_store, folder)
    with Repository(folder, progress=False) as repo:
        repo.config("author", AUTHOR)
        subjects = [fact["subject"] for fact in FACTS[:10]]
        for name, gone in (("left", subjects[:3]), ("right", subjects[7:])):
            repo.switch(name, "base", create=True)
            repo.cherry_pick("main", message=name)  # else the same second makes the same commit of both
            repo.revert(subject=gone)
        repo.switch("merged", "left", create=True)
        assert repo.merge("right").outcome == "merged"
        exported = repo.export_peft("main", out=folder / "adapters")
        exported.out.rename(folder / "adapter")
        repo.switch("left")
        for key, value in (("chat", True), ("dtype", "bfloat16"), ("device", "cpu"), ("quantization", "none")):
            repo.config(key, value)
    (folder / "facts.json").write_text(json.dumps(FACTS[:4]), encoding="utf-8")
    return folder


@pytest.fixture
def repo(made: Path, tmp_path: Path) -> Repository:
    folder = tmp_path / "store"
    shutil.copytree(made, folder)
    return Repository(folder, progress=False)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, Placement]]:
    """Whether each model is opened to be asked in a chat, and where."""
    chats: list[bool] = []
    found: list[tuple[bool, Placement]] = []

    def chat_form(repository: Any, tokenizer: Any, wanted: bool | None) -> None:
        chats.append(opening.in_chat(repository, wanted))

    def load_base(checkpoint: Any, placement: Placement) -> None:
        found.append((chats.pop(), placement))
        raise Asked

    monkeypatch.setattr(opening, "chat_form", chat_form)
    monkeypatch.setattr(measuring, "chat_form", chat_form)
    monkeypatch.setattr(opening, "load_base", load_base)
    return found


def switched(name: str, verb: Callable[[Repository], Any]) -> Callable[[Repository], Any]:
    def run(repo: Repository) -> Any:
        repo.switch(name)
        return verb(repo)

    return run


SUITE = FACTS[:4]
VERBS: dict[str, Callable[[Repository], Any]] = {
    "commit": lambda repo: repo.commit([FACT], message="one"),
    "update": lambda repo: repo.update(FACTS[5]["subject"], "Nowhere"),
    "ask": lambda repo: repo.ask("The capital of France is"),
    "diff": lambda repo: repo.diff(ask=["The capital of France is"]),
    "blame": lambda repo: repo.blame("The capital of France is"),
    "bisect": lambda repo: repo.bisect("base", "HEAD", metric="efficacy", below=0.5),
    "eval": lambda repo: repo.eval(suite=SUITE),
    "bench": lambda repo: repo.bench("memit", suite=SUITE),
    "tune": lambda repo: repo.tune(SUITE),
    "metric_compute": lambda repo: repo.metric_compute(layers=[4]),
    "refresh": switched("merged", lambda repo: repo.refresh()),
    "revert": lambda repo: repo.revert(subject=FACTS[5]["subject"], check=True),
    "cherry_pick": lambda repo: repo.cherry_pick("main", check=True),
    "merge": lambda repo: repo.merge("right", check=True),
    "squash": lambda repo: repo.squash(2, check=True),
    "import_": lambda repo: repo.import_(repo.store.root.parent / "adapter", check=True),
}
IN_A_FORM_OF_THEIR_OWN = {"refresh": "facts are recorded again, and asked, in the form in which each was written"}
NO_MODEL = {
    "apply": "tensors are streamed", "approve": "", "audit": "", "branch": "", "clone": "", "config": "", "demo": "it shows the others",
    "export_attestations": "", "export_bom": "", "export_checkpoint": "as apply", "export_gguf": "",
    "export_diff": "", "export_peft": "", "fetch": "", "fsck": "", "gc": "", "init": "bytes are hashed", "log": "", "merge_base": "",
    "verify_served": "the server's model is asked",
    "metric": "", "metric_export": "", "metric_import": "asked for text that continues itself, outside any chat", "op_log": "",
    "pull": "as merge",
    "push": "", "redo": "", "reflog": "", "remote_add": "", "remote_list": "", "remote_remove": "", "remote_rename": "",
    "remote_set_url": "",
    "report": "", "reset": "", "search": "",
    "show": "", "sign": "", "status": "", "switch": "", "tag": "", "undo": "", "verify": "",
}  # fmt: skip


def test_every_verb_is_one_or_the_other() -> None:
    assert {name for name, _ in commands()} == VERBS.keys() | NO_MODEL.keys()
    assert not VERBS.keys() & NO_MODEL.keys()


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_the_model_is_asked_in_the_form_of_the_repository(
    verb: str, repo: Repository, asked: list[tuple[bool, Placement]]
) -> None:
    with pytest.raises(Asked):
        VERBS[verb](repo)
    placement = Placement(device="cpu", dtype="bfloat16", quantization="none")
    assert asked == [(verb not in IN_A_FORM_OF_THEIR_OWN, placement)]


@pytest.mark.parametrize("verb", ["commit", "ask", "blame", "bisect", "eval"])
def test_what_is_asked_for_goes_before_the_config(
    verb: str, repo: Repository, asked: list[tuple[bool, Placement]], monkeypatch: pytest.MonkeyPatch
) -> None:
    method = getattr(Repository, verb)
    monkeypatch.setattr(Repository, verb, lambda self, *a, **k: method(self, *a, **k, chat=False, dtype="float32"))
    with pytest.raises(Asked):
        VERBS[verb](repo)
    assert asked == [(False, Placement(device="cpu", dtype="float32", quantization="none"))]
