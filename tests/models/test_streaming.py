"""Blocks that stay in the base's files until they are run give what the base in memory gives, and hold one block."""

from __future__ import annotations

import os
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from patchhub.errors import BaseError, SettingsError
from patchhub.models import placement as under_test
from patchhub.models import streaming
from patchhub.models.architectures import describe
from patchhub.models.checkpoint import Checkpoint, TensorEntry, open_checkpoint, read_tensor
from patchhub.models.placement import Placement, load_base, settled
from patchhub.models.tracing import Stack
from tests.tiny_models import tiny_model

IDS = torch.arange(2, 20)[None]


def made(folder: Path, family: str = "llama") -> Checkpoint:
    """A base with a file for each block or so."""
    tiny_model(family).save_pretrained(folder, max_shard_size="40KB")
    return open_checkpoint(folder)


def opened(checkpoint: Checkpoint, device: str = "stream", dtype: str = "float32") -> Stack:
    model = load_base(checkpoint, Placement(device, dtype))
    return Stack(model, describe(model.config))


def in_memory(stack: Stack) -> list[int]:
    return [index for index, block in enumerate(stack.blocks) if not any(p.is_meta for p in block.parameters())]


def said(model: Any) -> tuple[Tensor, Tensor]:
    """Logits, and a gradient that went back through every block."""
    inputs = model.get_input_embeddings()(IDS).detach().requires_grad_()
    logits = model(inputs_embeds=inputs).logits
    [gradient] = torch.autograd.grad(logits[0, -1].float().log_softmax(-1)[7], inputs)
    return logits, gradient


@pytest.mark.parametrize(
    ("family", "dtype"),
    [("gpt2", "float32"), ("llama", "bfloat16"), ("mixtral", "float32"), ("llama4_text", "float32")],
)
def test_logits_and_gradients_are_those_of_the_base_in_memory_bit_for_bit(
    family: str, dtype: str, tmp_path: Path
) -> None:
    """Of experts too, which transformers makes of many tensors while it loads."""
    checkpoint = made(tmp_path, family)
    whole, parts = opened(checkpoint, "cpu", dtype), opened(checkpoint, dtype=dtype)
    with whole.fast(), parts.fast():
        for expected, found in zip(said(whole.model), said(parts.model), strict=True):
            assert torch.equal(expected, found)
    assert in_memory(whole) == [0, 1, 2, 3]
    assert in_memory(parts) == []
    assert parts.model.dtype == whole.model.dtype


def test_one_block_is_in_memory_at_a_time_and_the_way_back_reads_each_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So autograd keeps no weights of blocks."""
    checkpoint = made(tmp_path)
    places = {(entry.file, entry.begin): name for name, entry in checkpoint.tensors.items()}
    stack, seen, read = opened(checkpoint), list[list[int]](), list[int]()
    for block in stack.blocks:
        block.mlp.register_forward_hook(lambda module, args, output: seen.append(in_memory(stack)))  # type: ignore[operator]

    def reading(entry: TensorEntry) -> Tensor:
        read.append(int(places[entry.file, entry.begin].split(".")[2]))
        return read_tensor(entry)

    monkeypatch.setattr(streaming, "read_tensor", reading)
    said(stack.model)
    assert seen == [[0], [1], [2], [3]]
    assert [index for index, _ in groupby(read)] == [0, 1, 2, 3, 2, 1, 0]
    assert all(read.count(index) == 2 * len(list(stack.blocks[index].parameters())) for index in range(4))


def test_a_resident_block_is_read_once_and_goes_when_an_error_ends_the_pass(tmp_path: Path) -> None:
    checkpoint = made(tmp_path)
    stack = opened(checkpoint)
    states = torch.ones(1, 3, 32)
    start = stack.begin(IDS[:, :3], torch.ones(1, 3, dtype=torch.long), torch.arange(3)[None])
    expected = start.run(states, 1, 2)
    [file] = {checkpoint.tensors[f"model.layers.1.mlp.{name}_proj.weight"].file for name in ("down",)}
    with stack.resident(1):
        os.truncate(file, file.stat().st_size // 2)
        assert torch.equal(start.run(states, 1, 2), expected)
        assert in_memory(stack) == [1]
    for _ in range(2):
        with pytest.raises(BaseError, match=f"{file.name} became shorter while it was read"):
            start.run(states, 1, 2)
        assert in_memory(stack) == []
    file.unlink()
    with pytest.raises(BaseError, match="cannot be read"):
        start.run(states, 1, 2)


def test_values_that_are_not_finite_are_found_when_their_block_is_read(tmp_path: Path) -> None:
    checkpoint = made(tmp_path)
    name = "model.layers.2.mlp.up_proj.weight"
    file = checkpoint.tensors[name].file
    tensors = load_file(file)
    tensors[name][3, 3] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(BaseError, match=r"mlp.up_proj.weight that are not finite"):
        load_base(open_checkpoint(tmp_path), Placement("stream", "float32"))(IDS)


def test_auto_streams_what_is_larger_than_the_free_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = made(tmp_path)
    needed = sum(entry.size for entry in checkpoint.tensors.values())
    for free, dtype, expected in (
        (needed, "float32", "auto"),
        (needed - 1, "float32", "stream"),
        (needed // 2, "bfloat16", "auto"),
    ):
        monkeypatch.setattr(under_test, "free_memory", lambda free=free: free)
        assert settled(checkpoint, Placement(dtype=dtype)).device == expected
        assert settled(checkpoint, Placement("cpu", dtype)).device == "cpu"
    monkeypatch.setattr(under_test, "find_spec", lambda name: None)
    assert settled(checkpoint, Placement(dtype="float32")).device == "auto"
    with pytest.raises(SettingsError, match="accelerate is needed to stream"):
        load_base(checkpoint, Placement("stream"))


def test_a_quantised_base_is_not_streamed() -> None:
    with pytest.raises(SettingsError, match="cannot be quantised"):
        Placement("stream", quantization="4bit")
