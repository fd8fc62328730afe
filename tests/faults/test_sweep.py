"""A disk that dies or fails at any call of any verb that writes loses nothing and tells no lie; see `sweep`.

Every n-th call is tried; `PATCHHUB_FAULT_STRIDE=1` tries them all, `PATCHHUB_FAULT_MODEL_STRIDE=1` of the verbs that run a
model. docs/reliability.md has the table.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
NEEDS = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("cc") is None, reason="needs LD_PRELOAD and a C compiler"
)

OF_EVERY_KIND = ("merge", "revert", "push", "fetch", "gc", "tag")

COUNTS = """
import ctypes, os, sys
shim = ctypes.CDLL(sys.argv[1])
shim.counted.restype = ctypes.c_long
os.chdir(sys.argv[2])
shim.arm(os.fsencode(sys.argv[2]), 0, 0, 0)
os.write(2, b"said through a pipe")
os.write(os.open("file", os.O_WRONLY | os.O_CREAT), b"kept")
print(shim.counted())
"""


def shim_in(folder: Path) -> Path:
    shim = folder / "shim.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", shim, HERE / "shim.c", "-ldl"], check=True)
    return shim


@NEEDS
def test_only_calls_on_files_of_the_folder_are_counted(tmp_path: Path) -> None:
    """Making a file and writing it are two; what is said through a pipe is none, or a full disk would silence whoever tells of it."""
    shim, folder = shim_in(tmp_path), tmp_path / "folder"
    folder.mkdir()
    command = [sys.executable, "-c", COUNTS, str(shim), str(folder)]
    done = subprocess.run(command, env={**os.environ, "LD_PRELOAD": str(shim)}, capture_output=True, check=True)
    assert int(done.stdout) == 2


def swept(tmp_path: Path, *more: str) -> None:
    """Sweep, and see that everything was right."""
    shim = shim_in(tmp_path)
    stride = os.environ.get("PATCHHUB_FAULT_STRIDE", "41")
    model_stride = os.environ.get("PATCHHUB_FAULT_MODEL_STRIDE", "61")
    strides = ["--stride", stride, "--model-stride", model_stride]
    command = [sys.executable, "-m", "tests.faults.sweep", str(shim), *strides, *more]
    done = subprocess.run(command, env={**os.environ, "LD_PRELOAD": str(shim)}, stdout=subprocess.PIPE, check=True)
    found = json.loads(done.stdout)
    assert found["wrong"] == []
    assert all(calls > 0 for calls in found["calls"].values())
    assert all(ends["right"] >= len(found["calls"]) for ends in found["cases"].values())


@pytest.mark.slow
@NEEDS
def test_verbs_of_every_kind_survive_every_fault(tmp_path: Path) -> None:
    swept(tmp_path, "--verbs", *OF_EVERY_KIND)


@pytest.mark.slow
@pytest.mark.long
@NEEDS
def test_every_verb_survives_every_fault(tmp_path: Path) -> None:
    swept(tmp_path)
