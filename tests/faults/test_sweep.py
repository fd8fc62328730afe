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


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or shutil.which("cc") is None, reason="needs LD_PRELOAD and a C compiler")
def test_every_verb_survives_every_fault(tmp_path: Path) -> None:
    shim = tmp_path / "shim.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", shim, HERE / "shim.c", "-ldl"], check=True)
    stride = os.environ.get("PATCHHUB_FAULT_STRIDE", "41")
    model_stride = os.environ.get("PATCHHUB_FAULT_MODEL_STRIDE", "61")
    strides = ["--stride", stride, "--model-stride", model_stride]
    command = [sys.executable, "-m", "tests.faults.sweep", str(shim), *strides]
    done = subprocess.run(command, env={**os.environ, "LD_PRELOAD": str(shim)}, stdout=subprocess.PIPE, check=True)
    found = json.loads(done.stdout)
    assert found["wrong"] == []
    assert all(calls > 0 for calls in found["calls"].values())
    assert all(ends["right"] >= len(found["calls"]) for ends in found["cases"].values())
