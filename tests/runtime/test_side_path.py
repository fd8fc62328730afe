"""Deltas beside the weights are the deltas in the weights, up to rounding, and leave no trace when they are taken off."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from patchhub.delta import Delta, Dense, LowRank, add, from_sparse, to_dense
from patchhub.errors import BaseError, SettingsError
from patchhub.models.checkpoint import Checkpoint, open_checkpoint
from patchhub.models.fingerprint import fingerprint
from patchhub.models.tracing import SidePath
from patchhub.runtime.patched_model import PatchState, attach, attached, detach, load_patched, switch
from tests.tiny_models import tiny_model

TOKENS = torch.arange(2, 12)[None]
FACTORY: Any = AutoModelForCausalLM
NAMES = {"llama": "model.layers.{}.mlp.down_proj.weight", "gpt2": "transformer.h.{}.mlp.c_proj.weight"}
SHAPES = {"llama": (32, 80), "gpt2": (32, 128), "wide": (64, 128)}
BLOCKWISE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}  # 4-bit weights come in blocks of 64


def deltas_of(out: int, inner: int, seed: int, size: float = 1.0) -> list[Delta]:
    rng = np.random.default_rng(seed)
    low = LowRank(
        size * rng.standard_normal((out, 2)).astype(np.float32), rng.standard_normal((2, inner)).astype(np.float32) / 8
    )
    return [low, LowRank(low.B[:, :1], low.A[1:])]


def state_of(checkpoint: Checkpoint, family: str, layers: dict[int, int], commit: str, size: float = 1.0) -> PatchState:
    name = NAMES.get(family, NAMES["llama"])
    weights = {name.format(layer): deltas_of(*SHAPES[family], seed, size) for layer, seed in layers.items()}
    return PatchState(fingerprint(checkpoint), "in_out" if family == "gpt2" else "out_in", weights, commit)


@pytest.fixture(params=[("llama", torch.float32), ("gpt2", torch.float32), ("llama", torch.bfloat16)], ids=str)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Checkpoint]:
    family, dtype = request.param
    tiny_model(family, dtype=dtype).save_pretrained(tmp_path / "base")
    return family, open_checkpoint(tmp_path / "base")


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(TOKENS, use_cache=False).logits.float()
    return found


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["linear", "conv"])
@torch.no_grad()
def test_the_hook_adds_the_product_with_the_dense_change(kind: str, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(0)
    dense = Dense(rng.standard_normal((6, 10)).astype(np.float32))
    sparse = from_sparse((rng.standard_normal((6, 10)) * (rng.random((6, 10)) < 0.2)).astype(np.float32))
    x = torch.randn(3, 4, 10, generator=torch.Generator().manual_seed(0)).to(dtype)
    module: Any = (nn.Linear(10, 6) if kind == "linear" else Conv1D(6, 10)).to(dtype)
    for deltas in ([dense], [sparse], deltas_of(6, 10, 1), [dense, *deltas_of(6, 10, 1), sparse]):
        expected = module(x).double() + x.double() @ torch.from_numpy(to_dense(add(deltas, (6, 10)))).T
        handle = module.register_forward_hook(SidePath(deltas))
        found = module(x)
        handle.remove()
        assert found.dtype == dtype
        assert float((found - expected).norm() / expected.norm()) < (1e-6 if dtype == torch.float32 else 4e-3)


def test_beside_and_composed_say_the_same_and_coming_off_leaves_the_base(case: tuple[str, Checkpoint]) -> None:
    family, checkpoint = case
    one, two = (
        state_of(checkpoint, family, {0: 1, 1: 2}, "1" * 64),
        state_of(checkpoint, family, {1: 3, 2: 4}, "2" * 64),
    )
    model = FACTORY.from_pretrained(checkpoint.folder)
    base, close = logits(model), 1e-5 if model.dtype == torch.float32 else 3e-2
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    attach(model, checkpoint, one, side_path=True)
    first = logits(model)
    assert attached(model) == "1" * 64
    assert distance(first, logits(load_patched(checkpoint, one))) < close
    assert torch.equal(first, logits(load_patched(checkpoint, one, side_path=True)))
    switch(model, checkpoint, two)
    assert attached(model) == "2" * 64
    assert distance(logits(model), logits(load_patched(checkpoint, two))) < close
    switch(model, checkpoint, one)
    assert torch.equal(logits(model), first)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    detach(model)
    assert attached(model) is None
    assert torch.equal(logits(model), base)
    assert not any(module._forward_hooks for module in model.modules())


def test_a_change_below_the_rounding_of_the_weights_is_kept_beside_them(tmp_path: Path) -> None:
    """In bfloat16 the composed weights lose most of it; the side path follows the float32 model."""
    tiny_model("llama").save_pretrained(tmp_path / "exact")
    model = tiny_model("llama", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    FACTORY.from_pretrained(tmp_path / "half", dtype=torch.float32).save_pretrained(tmp_path / "exact")
    exact, half = open_checkpoint(tmp_path / "exact"), open_checkpoint(tmp_path / "half")
    small = 2e-4
    wanted = state_of(exact, "llama", {1: 1}, "1" * 64, small)
    name = NAMES["llama"].format(1)
    keys: list[torch.Tensor] = []

    def change(checkpoint: Checkpoint, **how: Any) -> torch.Tensor:
        """What the patch adds to the projection's output, for one and the same input."""
        patched: Any = load_patched(checkpoint, state_of(checkpoint, "llama", {1: 1}, "1" * 64, small), **how).float()
        base: Any = FACTORY.from_pretrained(checkpoint.folder, dtype=torch.float32)
        path = name.removesuffix(".weight")
        x = keys[0] if keys else torch.randn(5, 80, generator=torch.Generator().manual_seed(1))
        keys[:] = [x]
        with torch.no_grad():
            found: torch.Tensor = patched.get_submodule(path)(x) - base.get_submodule(path)(x)
        return found

    expected = torch.from_numpy(to_dense(add(wanted.weights[name], (32, 80)))).float()
    by_cast, beside = change(half), change(half, side_path=True)
    reference = keys[0] @ expected.T
    assert distance(by_cast, reference) > 0.3
    assert distance(beside, reference) < 1e-2


def test_another_model_or_a_missing_module_is_refused_and_nothing_is_attached(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "base")
    checkpoint = open_checkpoint(tmp_path / "base")
    state = state_of(checkpoint, "llama", {1: 1}, "1" * 64)
    other = tiny_model("llama", seed=1)
    with pytest.raises(BaseError, match="differ"):
        attach(other, checkpoint, state, side_path=True)
    model = FACTORY.from_pretrained(checkpoint.folder)
    shorter = copy.deepcopy(model)
    shorter.model.layers = shorter.model.layers[:1]
    with pytest.raises(BaseError, match="missing"):
        attach(shorter, checkpoint, state, side_path=True)
    for refused in (other, shorter):
        assert attached(refused) is None
        assert not any(module._forward_hooks for module in refused.modules())


def test_a_second_attach_is_refused_beside_too(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "base")
    checkpoint = open_checkpoint(tmp_path / "base")
    state = state_of(checkpoint, "llama", {1: 1}, "1" * 64)
    model = load_patched(checkpoint, state, side_path=True)
    with pytest.raises(SettingsError, match="already"):
        attach(model, checkpoint, state, side_path=True)
    detach(model)
    attach(model, checkpoint, state)
    assert torch.equal(logits(model), logits(load_patched(checkpoint, state)))


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_a_quantised_model_takes_deltas_beside_its_weights(bits: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    tiny_model("llama", **BLOCKWISE).save_pretrained(tmp_path / "base")
    checkpoint = open_checkpoint(tmp_path / "base")
    one, two = state_of(checkpoint, "wide", {0: 1, 1: 2}, "1" * 64), state_of(checkpoint, "wide", {1: 3}, "2" * 64)
    quantised = {
        "quantization_config": BitsAndBytesConfig(load_in_8bit=bits == "8bit", load_in_4bit=bits == "4bit"),
        "dtype": torch.float32,
    }
    model = FACTORY.from_pretrained(checkpoint.folder, **quantised)
    base = logits(model)
    attach(model, checkpoint, one)
    first = logits(model)
    from_the_start = load_patched(checkpoint, one, **quantised)
    assert torch.equal(first, logits(from_the_start))
    assert type(model) is type(from_the_start) is type(FACTORY.from_pretrained(checkpoint.folder))
    switch(model, checkpoint, two)
    switch(model, checkpoint, one)
    assert torch.equal(logits(model), first)
    projection = model.get_submodule(NAMES["llama"].format(1).removesuffix(".weight"))
    x = torch.randn(7, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        patched = projection(x)
        detach(model)
        added = patched - projection(x)
    change = to_dense(add(one.weights[NAMES["llama"].format(1)], (64, 128)))
    assert distance(added, x @ torch.from_numpy(change).float().T) < 1e-5
    assert torch.equal(logits(model), base)
    tiny_model("llama", seed=1, **BLOCKWISE).save_pretrained(tmp_path / "other")
    other = FACTORY.from_pretrained(tmp_path / "other", **quantised)
    with pytest.raises(BaseError, match="differ"):
        attach(other, checkpoint, one)
