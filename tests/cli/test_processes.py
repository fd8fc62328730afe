"""What only a process of its own can show: which libraries a verb imports, and what an interruption leaves."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from patchhub.objects import Request
from tests.benchmarks.growth import invented
from tests.cli.conftest import FACTS, MODEL, Run, invoke

LIGHT = {
    "--help": ["--help"],
    "log": ["log"],
    "status": ["status"],
    "show": ["show"],
    "diff": ["diff", "base", "HEAD"],
    "metric": ["metric"],
    "undo": ["undo"],
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


def test_quiet_is_heard_by_the_client_of_the_hub(store: Path) -> None:
    """Which has bars of its own while it downloads and uploads; the variable is as it was afterwards."""
    code = (
        "import os, sys, click; from patchhub.cli.main import main\n"
        "looked = []; main.commands['status'].callback = lambda **_: looked.append(os.environ['HF_HUB_DISABLE_PROGRESS_BARS'])\n"
        "main(['status', '-q'], standalone_mode=False); print(looked, 'HF_HUB_DISABLE_PROGRESS_BARS' in os.environ)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_DISABLE_PROGRESS_BARS"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "['1'] False"


def test_fsck_imports_no_torch(store: Path) -> None:
    """It proves weights, for which it needs NumPy."""
    check = CHECK.replace(', "numpy"', "")
    done = subprocess.run(
        [sys.executable, "-c", check, "--repo", str(store), "fsck"], capture_output=True, text=True, check=False
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


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a device that is always full")
@pytest.mark.parametrize("form", [[], ["--json"]])
def test_a_full_disk_behind_the_output_is_said_in_one_error(form: list[str], store: Path) -> None:
    command = [sys.executable, "-m", "patchhub", "--repo", str(store), "log", *form]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 6
    assert "cannot write to the standard output" in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 2


def test_a_closed_pipe_behind_the_output_ends_without_a_word(store: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "patchhub", "--repo", str(store), "log"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


def test_a_wrong_editor_is_refused_before_anything_is_loaded(store: Path) -> None:
    check = CHECK.replace("assert not done.code, done.code", "assert done.code == 2, done.code")
    command = [sys.executable, "-c", check, "--repo", str(store), "bench", "foo", "--suite", str(store / "facts.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "there is no editor 'foo'" in done.stderr


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


PEAK = """
import sys
from pathlib import Path
from patchhub.cli.main import main
try:
    main(sys.argv[1:], prog_name="patchhub")
except SystemExit as done:
    lines = Path("/proc/self/status").read_text().splitlines()
    print("PEAK", 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")))
    sys.exit(done.code)
"""


def test_a_command_looks_for_garbage_in_cycles_seldom(store: Path) -> None:
    code = (
        "import gc; from patchhub.cli.main import main\n"
        f"main(['--repo', {str(store)!r}, 'status'], standalone_mode=False); print(gc.get_threshold()[0], gc.isenabled())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "10000 True", done.stderr


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_a_whole_commit_stays_within_its_memory(tmp_path: Path) -> None:
    """Optimisation, sweep and checks, on a model wide enough for a step to be large."""
    base = tmp_path / "base"
    shutil.copytree(MODEL, base)
    wide: Any = LlamaForCausalLM(
        LlamaConfig.from_pretrained(MODEL, hidden_size=512, intermediate_size=2048, num_attention_heads=16, dtype=None)
    )
    wide.save_pretrained(base)
    templates = [Request.make(fact["prompt"], fact["subject"], fact["target_new"]) for fact in FACTS]
    facts = [{"prompt": r.prompt, "subject": r.subject, "target_new": r.target_new} for r in invented(templates, 120)]
    file = tmp_path / "facts.json"
    file.write_text(json.dumps(facts), encoding="utf-8")
    text = tmp_path / "text.txt"
    text.write_text(
        "\n\n".join(f"{r.prompt} {r.subject} {r.target_new}" for r in invented(templates, 300)), encoding="utf-8"
    )
    first, peaks = tmp_path / "store", {}
    first.mkdir()
    invoke(first, "init", str(base))
    invoke(first, "metric", "compute", "--text", str(text))
    for memory in ([], ["--memory", "800MB"]):
        store = tmp_path / f"store{len(memory)}"
        shutil.copytree(first, store)
        command = ["--repo", str(store), "commit", str(file), "-m", "many", "--force", "--set", "steps=4", *memory]
        done = subprocess.run([sys.executable, "-c", PEAK, *command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        peaks[bool(memory)] = int(done.stdout.split("PEAK ")[1])
    assert peaks[True] <= 1.1 * 800e6
    assert peaks[True] < peaks[False]
