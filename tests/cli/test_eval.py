"""`eval`: the numbers are those of the library, before and after, and are kept with the commit."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.conftest import FACTS, Run


def test_scores_rise_with_the_edit_and_are_kept(run: Run, store: Path) -> None:
    file = store / "suite.json"
    file.write_text(json.dumps(FACTS[:10]), encoding="utf-8")
    after = json.loads(run("eval", "--suite", str(file), "--json").stdout)
    before = json.loads(run("eval", "base", "--suite", str(file), "--json").stdout)
    assert before["note"] is None
    assert before["scores"]["ES"]["value"] == 0
    assert after["scores"]["ES"]["value"] >= 0.9
    assert after["scores"]["exact"]["value"] >= 0.8
    assert all(found["low"] <= found["value"] <= found["high"] for found in after["scores"].values())
    assert set(after["definitions"]) == set(after["scores"])
    assert "kept as note" in run("eval", "--suite", str(file), "--limit", "3").stdout
    assert "sound" in run("fsck").stdout


def test_wise_and_zsre_scores(run: Run, store: Path) -> None:
    file = store / "suite.json"
    file.write_text(json.dumps(FACTS[:4]), encoding="utf-8")
    wise = json.loads(run("eval", "--suite", str(file), "--metrics", "wise", "--no-note", "--json").stdout)
    assert wise["note"] is None
    assert wise["scores"]["reliability"]["value"] >= 0.75
    zsre = json.loads(run("eval", "--suite", str(file), "--metrics", "zsre", "--no-note", "--json").stdout)
    assert zsre["scores"]["efficacy"]["value"] >= 0.75
