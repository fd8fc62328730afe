"""A patched model has exactly the composed weights, and taking the patch off gives back exactly the base."""

from __future__ import annotations

import copy
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from patchhub.cache import Cache
from patchhub.delta import Delta, Dense, LowRank
from patchhub.errors import BaseError, PatchhubError, SettingsError, UnsupportedModelError
from patchhub.models.checkpoint import Checkpoint, open_checkpoint
from patchhub.models.fingerprint import fingerprint, write_patched
from patchhub.models.structure import Orientation
from patchhub.runtime.compose import compose
from patchhub.runtime.patched_model import ATTRIBUTE, PatchState, attach, attached, detach, load_patched, switch

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOKENS = torch.arange(8)[None]
FACTORY: Any = AutoModelForCausalLM

LLAMA = LlamaConfig(
    hidden_size=32,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=4,
    vocab_size=96,
    bos_token_id=0,
    eos_token_id=0,
)
GPT2 = GPT2Config(n_embd=32, n_layer=3, n_head=4, n_positions=64, vocab_size=96, bos_token_id=0, eos_token_id=0)
NAMES = {"llama": "model.layers.{}.mlp.down_proj.weight", "gpt2": "transformer.h.{}.mlp.c_proj.weight"}
INNER = {"llama": 80, "gpt2": 128}
ORIENTATION: dict[str, Orientation] = {"llama": "out_in", "gpt2": "in_out"}


def make_checkpoint(folder: Path, family: str, dtype: torch.dtype, seed: int = 0) -> Checkpoint:
    torch.manual_seed(seed)
    FACTORY.from_config({"llama": LLAMA, "gpt2": GPT2}[family], dtype=dtype).save_pretrained(folder)
    return open_checkpoint(folder)


def make_state(checkpoint: Checkpoint, family: str, layers: dict[int, int], commit: str = "a" * 64) -> PatchState:
    """Layer -> seed of its deltas."""
    weights: dict[str, list[Delta]] = {}
    for layer, seed in layers.items():
        rng = np.random.default_rng(seed)
        low = [
            LowRank(
                rng.standard_normal((32, 2)).astype(np.float32),
                rng.standard_normal((2, INNER[family])).astype(np.float32),
            )
            for _ in range(2)
        ]
        dense = Dense(rng.standard_normal((32, INNER[family])).astype(np.float32))
        weights[NAMES[family].format(layer)] = [low[0], dense, low[1]]
    return PatchState(fingerprint(checkpoint), ORIENTATION[family], weights, commit)


def load(checkpoint: Checkpoint, dtype: torch.dtype | str = "auto") -> Any:
    return FACTORY.from_pretrained(checkpoint.folder, dtype=dtype)


def parameters(model: Any) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Bit for bit."""
    return one.keys() == other.keys() and all(
        one[n].dtype == other[n].dtype
        and torch.equal(one[n].contiguous().view(torch.uint8), other[n].contiguous().view(torch.uint8))
        for n in one
    )


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> set[str]:
    return {name for name in one if not torch.equal(one[name], other[name])}


@pytest.fixture(params=[(f, d) for f in NAMES for d in DTYPES], ids=lambda p: f"{p[0]}-{str(p[1])[6:]}")
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Checkpoint]:
    """Each family in each stored type."""
    family, dtype = request.param
    return family, make_checkpoint(tmp_path / "base", family, dtype)


@pytest.fixture
def llama(tmp_path: Path) -> Checkpoint:
    return make_checkpoint(tmp_path / "base", "llama", torch.bfloat16)


def test_attach_switch_and_detach_are_exact(case: tuple[str, Checkpoint]) -> None:
    family, checkpoint = case
    one = make_state(checkpoint, family, {0: 1, 1: 2}, "1" * 64)
    two = make_state(checkpoint, family, {1: 3, 2: 4}, "2" * 64)
    model = load(checkpoint)
    base = parameters(model)
    logits = model(TOKENS).logits

    attach(model, checkpoint, one)
    assert attached(model) == "1" * 64
    first = parameters(model)
    assert differing(base, first) == set(one.weights)
    assert not torch.equal(model(TOKENS).logits, logits)

    switch(model, checkpoint, two)
    assert attached(model) == "2" * 64
    assert differing(base, parameters(model)) == set(two.weights)
    fresh = load(checkpoint)
    attach(fresh, checkpoint, two)
    assert same(parameters(model), parameters(fresh))

    switch(model, checkpoint, one)
    assert same(parameters(model), first)
    detach(model)
    assert attached(model) is None
    assert not hasattr(model, ATTRIBUTE)
    assert same(parameters(model), base)
    assert torch.equal(model(TOKENS).logits, logits)


def test_loading_equals_writing_and_loading(case: tuple[str, Checkpoint], tmp_path: Path) -> None:
    family, checkpoint = case
    state = make_state(checkpoint, family, {0: 1, 2: 2})

    def composed(name: str) -> Any:
        return lambda w0: compose(w0, state.weights[name], orientation=state.orientation, dtype=w0.dtype)

    write_patched(checkpoint, tmp_path / "out", {name: composed(name) for name in state.weights})
    model: Any = load_patched(checkpoint, state)
    assert type(model) is type(load(checkpoint))
    assert attached(model) == state.commit
    written = load(open_checkpoint(tmp_path / "out"))
    assert same(parameters(model), parameters(written))
    attached_model = load(checkpoint)
    attach(attached_model, checkpoint, state)
    assert same(parameters(model), parameters(attached_model))


def test_a_model_that_was_loaded_patched_can_be_switched_and_detached(case: tuple[str, Checkpoint]) -> None:
    family, checkpoint = case
    one, two = make_state(checkpoint, family, {0: 1, 1: 2}), make_state(checkpoint, family, {1: 3, 2: 4})
    model: Any = load_patched(checkpoint, one)
    switch(model, checkpoint, two)
    assert same(parameters(model), parameters(load_patched(checkpoint, two)))
    detach(model)
    assert same(parameters(model), parameters(load(checkpoint)))


@pytest.mark.parametrize("running", DTYPES)
def test_the_running_type_may_be_wider_or_narrower_and_is_rounded_to_once(
    case: tuple[str, Checkpoint], running: torch.dtype
) -> None:
    family, checkpoint = case
    state = make_state(checkpoint, family, {1: 5})
    name = NAMES[family].format(1)
    expected = compose(checkpoint.read(name), state.weights[name], orientation=state.orientation, dtype=running)
    loaded: Any = load_patched(checkpoint, state, dtype=running)
    model = load(checkpoint, running)
    base = parameters(model)
    attach(model, checkpoint, state)
    for patched in (loaded, model):
        assert patched.dtype == running
        assert torch.equal(patched.get_parameter(name), expected)
        detach(patched)
        assert same(parameters(patched), base)


def test_detaching_puts_the_very_tensors_back_without_the_checkpoint(llama: Checkpoint) -> None:
    model = load(llama)
    pointers = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    attach(model, llama, make_state(llama, "llama", {0: 1, 1: 2}))
    shutil.rmtree(llama.folder)
    detach(model)
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == pointers


def test_a_model_cast_while_attached_is_detached_in_its_new_type(llama: Checkpoint) -> None:
    model = load(llama)
    attach(model, llama, make_state(llama, "llama", {0: 1}))
    model.float()
    detach(model)
    assert same(parameters(model), parameters(load(llama, torch.float32)))


def test_keyword_arguments_reach_transformers_and_progress_is_told(llama: Checkpoint) -> None:
    calls: list[tuple[int, int]] = []
    state = make_state(llama, "llama", {0: 1, 2: 2})
    model: Any = load_patched(
        llama, state, dtype=torch.float16, attn_implementation="eager", progress=lambda a, b: calls.append((a, b))
    )
    assert model.dtype == torch.float16
    assert model.config._attn_implementation == "eager"
    assert calls == [(1, 2), (2, 2)]


def test_an_empty_state_is_the_base(llama: Checkpoint) -> None:
    model: Any = load_patched(llama, make_state(llama, "llama", {}, "0" * 64))
    assert attached(model) == "0" * 64
    assert same(parameters(model), parameters(load(llama)))
    switch(model, llama, make_state(llama, "llama", {1: 1}))
    detach(model)
    assert same(parameters(model), parameters(load(llama)))


def test_parameters_stay_parameters(llama: Checkpoint) -> None:
    """Optimisers, hooks and ties hold on to the objects; only their content changes."""
    model = load(llama)
    before = {name: (id(parameter), parameter.requires_grad) for name, parameter in model.named_parameters()}
    attach(model, llama, make_state(llama, "llama", {0: 1}))
    assert {name: (id(parameter), parameter.requires_grad) for name, parameter in model.named_parameters()} == before


# --- refusals -------------------------------------------------------------------------------------------------------


def test_another_checkpoint_is_refused_by_load_and_attach(llama: Checkpoint, tmp_path: Path) -> None:
    state = make_state(llama, "llama", {1: 1})
    other = make_checkpoint(tmp_path / "other", "llama", torch.bfloat16, seed=1)
    model = load(other)
    before = parameters(model)
    with pytest.raises(BaseError, match="not this repository's base"):
        load_patched(other, state)
    with pytest.raises(BaseError, match="not this repository's base"):
        attach(model, other, state)
    assert same(parameters(model), before)


def test_known_digests_do_not_hide_a_change(llama: Checkpoint, tmp_path: Path) -> None:
    state = make_state(llama, "llama", {1: 1})
    for file in llama.files:  # old enough for its digests to be kept
        os.utime(file, ns=(0, 0))
    for _ in range(2):
        load_patched(llama, state, cache=Cache(tmp_path / "cache"))
    entry = llama.tensors[NAMES["llama"].format(1)]
    with open(entry.file, "r+b") as stream:
        stream.seek(entry.begin)
        stream.write(bytes(16))
    with pytest.raises(BaseError, match="1 tensor differs"):
        load_patched(llama, state, cache=Cache(tmp_path / "cache"))


@pytest.mark.parametrize("running", DTYPES)
def test_a_model_that_is_not_the_base_is_refused_and_left_as_it_is(llama: Checkpoint, running: torch.dtype) -> None:
    state = make_state(llama, "llama", {0: 1, 1: 2})
    model = load(llama, running)
    with torch.no_grad():  # the smallest change there is, in an entry of the second weight
        entry = model.get_parameter(NAMES["llama"].format(1))[3, 5]
        entry.copy_(torch.nextafter(entry, torch.tensor(torch.inf, dtype=running)))
    before = parameters(model)
    with pytest.raises(BaseError, match="the model in memory") as caught:
        attach(model, llama, state)
    assert caught.value.facts["differing"] == [NAMES["llama"].format(1)]
    assert same(parameters(model), before)
    assert attached(model) is None


def test_a_failed_switch_leaves_the_old_patch(llama: Checkpoint, tmp_path: Path) -> None:
    model = load(llama)
    attach(model, llama, make_state(llama, "llama", {0: 1}, "1" * 64))
    before = parameters(model)
    with torch.no_grad():
        model.get_parameter(NAMES["llama"].format(2)).mul_(2)
    other = make_checkpoint(tmp_path / "other", "llama", torch.bfloat16, seed=1)
    for checkpoint, state in (
        (llama, make_state(llama, "llama", {1: 1, 2: 2})),
        (other, make_state(other, "llama", {0: 1})),
        (other, make_state(llama, "llama", {0: 1})),
    ):
        with pytest.raises(BaseError):
            switch(model, checkpoint, state)
        assert attached(model) == "1" * 64
        assert differing(parameters(model), before) == {NAMES["llama"].format(2)}


def test_attaching_twice_and_detaching_nothing_are_refused(llama: Checkpoint) -> None:
    model = load(llama)
    state = make_state(llama, "llama", {0: 1})
    with pytest.raises(SettingsError, match="has no patch"):
        detach(model)
    with pytest.raises(SettingsError, match="has no patch"):
        switch(model, llama, state)
    attach(model, llama, state)
    with pytest.raises(SettingsError, match="already"):
        attach(model, llama, state)


def test_parameters_that_cannot_be_patched_are_refused(llama: Checkpoint) -> None:
    state = make_state(llama, "llama", {0: 1})
    name = NAMES["llama"].format(0)
    missing, meta, integers = (load(llama) for _ in range(3))
    del missing.model.layers[0].mlp.down_proj
    meta.model.layers[0].to("meta")
    down = integers.model.layers[0].mlp.down_proj
    down.weight = torch.nn.Parameter(down.weight.to(torch.int8), requires_grad=False)
    expected: list[tuple[Any, type[PatchhubError], str]] = [
        (missing, BaseError, "missing"),
        (meta, SettingsError, "offloaded"),
        (integers, UnsupportedModelError, "quantised"),
    ]
    for model, kind, message in expected:
        with pytest.raises(kind, match=message) as caught:
            attach(model, llama, state)
        assert name in caught.value.message
        assert caught.value.remedy


def test_a_copy_of_a_patched_model_can_be_detached_by_itself(llama: Checkpoint) -> None:
    model = load(llama)
    attach(model, llama, make_state(llama, "llama", {0: 1}))
    twin = copy.deepcopy(model)
    detach(twin)
    assert same(parameters(twin), parameters(load(llama)))
    assert attached(model) is not None
