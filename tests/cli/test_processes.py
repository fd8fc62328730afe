"""What only a process of its own can show: which libraries a verb imports, and what an interruption leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli.conftest import FACTS, Run

LIGHT = {
    "--help": ["--help"],
    "log": ["log"],
    "status": ["status"],
    "show": ["show"],
    "diff": ["diff", "base", "HEAD"],
    "metric": ["metric"],
    "undo": ["undo"],
    "fsck": ["fsck"],
}
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


@pytest.mark.parametrize("verb", LIGHT)
def test_looking_imports_neither_torch_nor_numpy(verb: str, store: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CHECK, "--repo", str(store), *LIGHT[verb]], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_revert_imports_no_torch(store: Path) -> None:
    check = CHECK.replace('"torch", "transformers", "numpy"', '"torch", "transformers"')
    done = subprocess.run(
        [sys.executable, "-c", check, "--repo", str(store), "revert", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("seconds", [0.5, 3.0, 5.0, 7.0])
def test_an_interrupted_commit_leaves_a_sound_store(
    kind: signal.Signals, seconds: float, run: Run, store: Path
) -> None:
    (store / "more.json").write_text(json.dumps(FACTS[10:]))
    before = json.loads(run("status", "--json").stdout)["head"]["id"]
    process = subprocess.Popen(
        [sys.executable, "-m", "patchhub", "--repo", str(store), "commit", str(store / "more.json"), "-m", "x"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    time.sleep(seconds)
    process.send_signal(kind)
    _, error = process.communicate(timeout=120)
    assert "Traceback" not in error
    assert json.loads(run("fsck", "--json").stdout)["sound"]
    head = json.loads(run("status", "--json").stdout)["head"]
    assert head["id"] == before or head["message"] == "x"
