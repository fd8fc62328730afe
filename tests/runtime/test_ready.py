"""Kept weights are the composed ones bit for bit, and are never used once anything about them changed."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from patchhub.cache import Cache
from patchhub.runtime import compose
from patchhub.runtime.compose import ReadyWeights

WEIGHTS = {"a": torch.randn(6, 4), "b": torch.randn(3, 5)}


def ready(folder: Path, blobs: tuple[str, ...] = ("1" * 64,)) -> ReadyWeights:
    return ReadyWeights(Cache(folder), "0" * 64, blobs)


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
    assert ReadyWeights(Cache(tmp_path), "f" * 64, ("1" * 64,)).open(torch.float32, "cpu") is None
    assert ready(tmp_path).open(torch.float32, "cuda") is None


def test_a_failure_to_write_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    ready(tmp_path / "file").keep(torch.float32, "cpu", WEIGHTS)


def test_a_changed_or_cut_file_is_not_used(tmp_path: Path) -> None:
    for change in (lambda data: data[:-1], lambda data: data[:-4] + b"\0\0\0\0", lambda data: b""):
        ready(tmp_path).keep(torch.float32, "cpu", WEIGHTS)
        (file,) = tmp_path.rglob("*.safetensors")
        status = file.stat()
        file.write_bytes(change(file.read_bytes()))
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert ready(tmp_path).open(torch.float32, "cpu") is None
        assert not file.exists()


def test_writing_into_a_loaded_tensor_leaves_the_file_alone(tmp_path: Path) -> None:
    ready(tmp_path).keep(torch.float32, "cpu", WEIGHTS)
    first = ready(tmp_path).open(torch.float32, "cpu")
    assert first is not None
    first["a"].zero_()
    again = ready(tmp_path).open(torch.float32, "cpu")
    assert again is not None
    assert torch.equal(again["a"], WEIGHTS["a"])


def test_what_alone_is_larger_than_all_may_be_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = sum(tensor.nbytes for tensor in WEIGHTS.values())
    monkeypatch.setattr(compose, "KIND", replace(compose.KIND, limit=size - 1))
    ready(tmp_path).keep(torch.float32, "cpu", WEIGHTS)
    assert ready(tmp_path).open(torch.float32, "cpu") is None


def test_the_file_is_one_that_other_readers_of_its_format_read(tmp_path: Path) -> None:
    """Bit for bit, whatever the sizes: single values, empty rows, and tensors that are views of others."""
    whole = torch.randn(7, 6)
    weights = {"view": whole[::2, 1:4], "one": torch.randn(1, 1), "none": torch.zeros(0, 4), "t": whole.T}
    ready(tmp_path).keep(torch.float32, "cpu", weights)
    (file,) = tmp_path.rglob("*.safetensors")
    found = load(file.read_bytes())
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in weights)
