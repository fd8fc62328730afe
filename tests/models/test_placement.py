"""Where a base goes in memory, in which type, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from transformers import AutoModelForCausalLM

from patchhub.errors import SettingsError
from patchhub.models import placement as under_test
from patchhub.models.architectures import describe
from patchhub.models.checkpoint import Checkpoint, open_checkpoint
from patchhub.models.placement import Placement, chosen_dtype, load_base, runs_beside
from patchhub.models.tracing import Stack, right_padded
from tests.tiny_models import tiny_model

CPU = Placement("cpu")


def checkpoint_in(folder: Path, dtype: torch.dtype) -> Checkpoint:
    tiny_model("llama", dtype=dtype).save_pretrained(folder)
    return open_checkpoint(folder)


def numbers(checkpoint: Checkpoint) -> int:
    return sum(entry.size // checkpoint.dtype(name).itemsize for name, entry in checkpoint.tensors.items())


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_float32_is_chosen_where_it_takes_half_of_the_memory_at_most(
    stored: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = checkpoint_in(tmp_path, stored)
    needed = 4 * numbers(checkpoint)
    for memory, expected in ((2 * needed, torch.float32), (2 * needed - 1, stored)):
        monkeypatch.setattr(under_test, "memory_of", lambda device, memory=memory: memory)
        assert chosen_dtype(checkpoint, CPU) == expected
        assert chosen_dtype(checkpoint, Placement("cpu", "bfloat16")) == torch.bfloat16
        assert chosen_dtype(checkpoint, Placement("cpu", quantization="4bit")) == stored


def test_a_large_base_keeps_its_type_on_an_accelerator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, elsewhere = checkpoint_in(tmp_path, torch.bfloat16), Placement("meta")  # any device that is no CPU
    needed = 4 * numbers(checkpoint)
    for memory, expected in ((11 * needed, torch.float32), (9 * needed, torch.bfloat16)):
        monkeypatch.setattr(under_test, "memory_of", lambda device, memory=memory: memory)
        assert chosen_dtype(checkpoint, elsewhere) == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_base_is_loaded_in_the_type_that_was_asked_for(dtype: str, tmp_path: Path) -> None:
    model = load_base(checkpoint_in(tmp_path, torch.bfloat16), Placement("cpu", dtype))
    assert {str(parameter.dtype) for parameter in model.parameters()} == {f"torch.{dtype}"}
    assert runs_beside(model) == (dtype != "float32")


def test_the_machines_memory_is_between_what_is_plausible() -> None:
    assert 1 << 28 < under_test.memory_of(torch.device("cpu")) < 1 << 50


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"device": "gpu0"}, "no device 'gpu0'"),
        ({"device": "cuda:77"}, "no device 'cuda:77'"),
        ({"dtype": "int8"}, "dtype cannot be 'int8'"),
        ({"quantization": "2bit"}, "quantization cannot be '2bit'"),
    ],
)
def test_what_cannot_be_is_refused_when_it_is_said(arguments: dict[str, str], reason: str) -> None:
    with pytest.raises(SettingsError, match=reason) as caught:
        Placement(**arguments)
    assert caught.value.remedy


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_spreading_needs_a_gpu_and_auto_does_not() -> None:
    assert Placement().devices == (torch.device("cpu"),)
    with pytest.raises(SettingsError, match="no GPU"):
        _ = Placement("spread").devices


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = checkpoint_in(tmp_path, torch.float32)
    monkeypatch.setattr(under_test, "find_spec", lambda name: None)
    with pytest.raises(SettingsError, match="bitsandbytes is needed") as caught:
        load_base(checkpoint, Placement("cpu", quantization="8bit"))
    assert caught.value.remedy == "pip install bitsandbytes"


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_a_quantised_base_has_right_gradients_before_and_after_it_is_evaluated(bits: str, tmp_path: Path) -> None:
    """Near the unquantised base's; evaluating matters, since weights may be laid out anew then."""
    pytest.importorskip("bitsandbytes")
    tiny_model("llama", hidden_size=64, intermediate_size=128, head_dim=16).save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)

    def gradient(model: Any) -> torch.Tensor:
        inputs = model.get_input_embeddings()(torch.arange(2, 12)[None]).detach().requires_grad_()
        logprob = model(inputs_embeds=inputs).logits[0, -1].float().log_softmax(-1)[7]
        [found] = torch.autograd.grad(logprob, inputs)
        return found.flatten()

    unquantised = gradient(load_base(checkpoint, Placement("cpu", "float32")).requires_grad_(False))
    model = load_base(checkpoint, Placement("cpu", "float32", bits)).requires_grad_(False)
    before = gradient(model)
    assert float(torch.cosine_similarity(before, unquantised, dim=0)) > (0.95 if bits == "8bit" else 0.7)
    with torch.no_grad():
        model(torch.arange(2, 12)[None])
    assert torch.equal(gradient(model), before)


def test_a_base_that_accelerate_dispatched_is_taken_apart_like_any_other(tmp_path: Path) -> None:
    """Its hooks replace the modules' own forwards; the pieces still make the whole, which `Stack` checks."""
    checkpoint = checkpoint_in(tmp_path, torch.float32)
    load: Any = AutoModelForCausalLM
    dispatched = dispatch_model(load.from_pretrained(checkpoint.folder), {"": "cpu"}, force_hooks=True)
    assert hasattr(dispatched.model.layers[0], "_hf_hook")
    stack = Stack(dispatched, describe(dispatched.config))
    plain = Stack(load_base(checkpoint, CPU), stack.architecture)
    batch = right_padded([[2, 3, 4, 5], [6, 7]], torch.device("cpu"))
    ends = [step.run(step.hidden, 0, 4) for step in (stack.begin(*batch), plain.begin(*batch))]
    assert torch.equal(*ends)
