"""`report` on the command line: a file, a line about it, and errors in words."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.cli.conftest import FACTS, Run, snapshot_of
from tests.cli.test_processes import CHECK


def test_report_writes_one_page_and_leaves_the_store_alone(run: Run, store: Path, tmp_path: Path) -> None:
    before = snapshot_of(store)
    out = tmp_path / "new folder" / "report.html"
    said = run("report", "--out", str(out)).stdout
    assert said.startswith(f"Wrote {out}: 1 commit, 10 facts, ")
    page = out.read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert all(fact["subject"] in page for fact in FACTS[:10])
    assert snapshot_of(store) == before


def test_json_says_what_the_page_holds(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    told = json.loads(run("report", "base", "--out", str(out), "--json").stdout)
    assert told == {
        "out": str(out),
        "bytes": out.stat().st_size,
        "commits": 1,
        "facts": 10,
        "scores": 0,
        "left_out": {"commits": 0, "facts": 0},
    }


def test_what_cannot_be_written_is_said(run: Run, tmp_path: Path) -> None:
    mine = tmp_path / "notes.html"
    mine.write_text("mine", encoding="utf-8")
    assert "is no report" in run("report", "--out", str(mine), code=2).stderr
    assert "holds a patchhub store" in run("report", "--out", str(tmp_path), code=2).stderr
    assert "cannot write" in run("report", "--out", str(mine / "under a file"), code=6).stderr
    assert "nowhere" in run("report", "nowhere", "--out", str(tmp_path / "page.html"), code=5).stderr
    assert mine.read_text(encoding="utf-8") == "mine"


def test_without_comparison_neither_torch_nor_numpy_is_imported(store: Path, tmp_path: Path) -> None:
    def report(check: str, *options: str) -> subprocess.CompletedProcess[str]:
        arguments = ["--repo", str(store), "report", "--out", str(tmp_path / "page.html"), *options]
        return subprocess.run([sys.executable, "-c", check, *arguments], capture_output=True, text=True, check=False)

    alone = report(CHECK, "--compare", "0")
    assert alone.returncode == 0, alone.stderr
    compared = report(CHECK.replace('"torch", "transformers", "numpy"', '"torch", "transformers"'))
    assert compared.returncode == 0, compared.stderr
