"""`commit --keep`: prompts whose answers stay, given or found, are active like facts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import patchhub
from tests.cli.conftest import FACTS, Run

AUTHOR = "Ada <ada@example.org>"


def test_the_facts_prompts_about_others_are_found_and_kept(store: Path) -> None:
    fact = {name: FACTS[10][name] for name in ("prompt", "subject", "target_new")}
    repo = patchhub.open(store)
    made = repo.commit([fact], message="one", keep="auto", force=True, author=AUTHOR)
    assert 0 < len(made.kept) <= 8
    assert {keep.prompt for keep in made.kept} == {fact["prompt"]}
    assert fact["subject"] not in {keep.subject for keep in made.kept}
    assert {keep.id for keep in made.kept} < {request for _, request in repo.store.commit(made.commit).added}


@pytest.mark.slow
def test_a_file_of_keeps_is_kept_and_reverted_with_its_commit(run: Run, tmp_path: Path) -> None:
    fact, other = ({name: FACTS[place][name] for name in ("prompt", "subject", "target_new")} for place in (10, 11))
    (tmp_path / "one.json").write_text(json.dumps([fact]), encoding="utf-8")
    (tmp_path / "kept.json").write_text(json.dumps([{**other, "target_new": None}]), encoding="utf-8")
    arguments = ("commit", str(tmp_path / "one.json"), "-m", "one", "--force", "--author", AUTHOR)
    before = json.loads(run("status", "--json").stdout)["active"]
    made = json.loads(run(*arguments, "--keep", str(tmp_path / "kept.json"), "--json").stdout)
    assert len(made["kept"]) == 1
    assert json.loads(run("status", "--json").stdout)["active"] == before + 2
    run("revert", "HEAD", "--author", AUTHOR)
    assert json.loads(run("status", "--json").stdout)["active"] == before
