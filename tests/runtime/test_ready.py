"""Kept weights are the composed ones bit for bit, and are never used once anything about them changed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from patchhub.runtime.compose import ReadyWeights

WEIGHTS = {"a": torch.randn(6, 4), "b": torch.randn(3, 5)}


def ready(folder: Path, blobs: tuple[str, ...] = ("1" * 64,), limit: int = 1 << 20) -> ReadyWeights:
    return ReadyWeights(folder, "0" * 64, blobs, limit)


def test_what_is_kept_comes_back_bit_for_bit(tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        weights = {name: tensor.to(dtype) for name, tensor in WEIGHTS.items()}
        ready(tmp_path).keep(dtype, "cpu", weights)
        found = ready(tmp_path).open(dtype, "cpu")
        assert found is not None
        assert all(torch.equal(found[name], weights[name]) for name in weights)


def test_another_state_base_or_type_is_another_file(tmp_path: Path) -> None:
    ready(tmp_path).keep(torch.float32, "cpu", WEIGHTS)
    assert ready(tmp_path, ("2" * 64,)).open(torch.float32, "cpu") is None
    assert ready(tmp_path, ("1" * 64, "2" * 64)).open(torch.float32, "cpu") is None
    assert ready(tmp_path).open(torch.bfloat16, "cpu") is None
    assert ReadyWeights(tmp_path, "f" * 64, ("1" * 64,)).open(torch.float32, "cpu") is None
    assert ready(tmp_path).open(torch.float32, "cuda") is None


def test_a_failure_to_write_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("no folder")
    ready(tmp_path / "file").keep(torch.float32, "cpu", WEIGHTS)
    monkeypatch.setattr("patchhub.runtime.compose.temporary_path", lambda file: tmp_path / "missing" / file.name)
    ready(tmp_path).keep(torch.float32, "cpu", WEIGHTS)
    assert ready(tmp_path).open(torch.float32, "cpu") is None


def test_a_changed_or_cut_file_is_not_used(tmp_path: Path) -> None:
    ready(tmp_path).keep(torch.float32, "cpu", WEIGHTS)
    (file,) = tmp_path.glob("*.safetensors")
    data = file.read_bytes()
    status = file.stat()
    for changed in (data[:-1], data[:-4] + b"\0\0\0\0"):
        file.write_bytes(changed)
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000))
        assert ready(tmp_path).open(torch.float32, "cpu") is None


def test_writing_into_a_loaded_tensor_leaves_the_file_alone(tmp_path: Path) -> None:
    ready(tmp_path).keep(torch.float32, "cpu", WEIGHTS)
    first = ready(tmp_path).open(torch.float32, "cpu")
    assert first is not None
    first["a"].zero_()
    again = ready(tmp_path).open(torch.float32, "cpu")
    assert again is not None
    assert torch.equal(again["a"], WEIGHTS["a"])


def test_the_oldest_go_when_there_is_no_room(tmp_path: Path) -> None:
    size = sum(tensor.nbytes for tensor in WEIGHTS.values())
    for number in range(4):
        ready(tmp_path, (str(number) * 64,), limit=3 * size).keep(torch.float32, "cpu", WEIGHTS)
    kept = [ready(tmp_path, (str(number) * 64,)).open(torch.float32, "cpu") is not None for number in range(4)]
    assert not kept[0]
    assert kept[3]
    ready(tmp_path, ("9" * 64,), limit=size - 1).keep(torch.float32, "cpu", WEIGHTS)
    assert ready(tmp_path, ("9" * 64,)).open(torch.float32, "cpu") is None
