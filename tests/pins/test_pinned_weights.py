"""The weights of one imported change as `apply`, `load`, `attach` and `detach` give them: as bytes.

The change doubles a few entries of one weight, so it is exact in every type and nothing of it depends on a BLAS.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import patchhub
from patchhub.cli.main import main
from tests.pins.history import AUTHOR
from tests.pins.verbs import MODEL

WEIGHT = "model.layers.2.mlp.down_proj.weight"
FILE = "model.safetensors"
APPLIED = "f057c779741b62a94e8a19d1925c0c0cbd539ead6775bcef956d575a45dee181"
"""SHA-256 of the applied checkpoint's weights file."""
HALF = "ff5f2d1cce09cfc44a0abedc0f7fa77610b17b3ce2911345f8adb3111b36afc7"
SINGLE = "0a874719cc7d3a46231a1ea76f0d249e3c4903a053423c5ac41748acce5d7b6e"
"""SHA-256 of the changed weight as it is loaded in float16 and in float32."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store at whose HEAD a checkpoint with the change is imported."""
    made = tmp_path_factory.mktemp("store")
    shutil.copytree(MODEL, made / "tuned")
    tensors = load_file(MODEL / FILE)
    tensors[WEIGHT].diagonal()[:24].mul_(2)
    save_file(tensors, made / "tuned" / FILE)
    for arguments in (["init", str(MODEL)], ["import", str(made / "tuned")]):
        run(made, *arguments, "--author", AUTHOR)
    return made


def run(folder: Path, *arguments: str) -> None:
    result = CliRunner().invoke(main, ["--repo", str(folder), *arguments])
    assert result.exit_code == 0, result.stderr


def digest(data: torch.Tensor | Path) -> str:
    content = data.read_bytes() if isinstance(data, Path) else data.detach().contiguous().numpy().tobytes()
    return hashlib.sha256(content).hexdigest()


def test_the_applied_checkpoint(folder: Path, tmp_path: Path) -> None:
    run(folder, "apply", "HEAD", "--out", str(tmp_path / "out"))
    assert digest(tmp_path / "out" / FILE) == APPLIED


@pytest.mark.parametrize(("dtype", "pinned"), [(torch.float16, HALF), (torch.float32, SINGLE)])
def test_the_loaded_model(folder: Path, dtype: torch.dtype, pinned: str) -> None:
    assert digest(patchhub.load(folder, dtype=dtype).get_parameter(WEIGHT)) == pinned


def test_attach_and_detach(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    weight = model.get_parameter(WEIGHT)
    before = digest(weight)
    patchhub.attach(model, folder)
    assert digest(weight) == HALF
    patchhub.detach(model)
    assert digest(weight) == before == digest(load_file(MODEL / FILE)[WEIGHT])
