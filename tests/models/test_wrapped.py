"""Models that see images and write text are edited in their language model, under the names of their own checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

import patchhub
from patchhub.delta import from_factors
from patchhub.models.architectures import additive_probe, describe, read_model
from patchhub.models.checkpoint import open_checkpoint
from patchhub.models.fingerprint import fingerprint
from patchhub.models.tracing import Stack
from patchhub.repository import Repository
from patchhub.runtime.patched_model import PatchState, attach, detach
from tests.models.test_experts import PLACES, fact, said, tensors_of
from tests.models.tiny_configs import tiny_config
from tests.tiny_models import tiny_tokenizer

SIGHT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,  # as deep as the language model
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
SIGHT_OF_QWEN = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 4,
    "out_hidden_size": 32,
    "patch_size": 14,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
}
SIGHT_OF_LLAMA = {
    **SIGHT,
    "intermediate_size": 128,
    "vision_output_dim": 32,
    "projector_input_dim": 32,
    "projector_output_dim": 32,
}
ROTATED = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
WRAPPED = {"gemma3": "gemma3_text", "mistral3": "mistral", "llava": "llama", "paligemma": "gemma"}
MORE: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "aya_vision": ("cohere2", SIGHT, {}),
    "idefics3": ("llama", SIGHT, {}),
    "internvl": ("qwen2", SIGHT, {}),
    "lfm2_vl": ("lfm2", SIGHT, {}),
    "llama4": ("llama4_text", SIGHT_OF_LLAMA, {}),
    "qwen2_5_vl": ("qwen2", SIGHT_OF_QWEN, {"model_type": "qwen2_5_vl_text", **ROTATED}),
    "qwen3_5": ("qwen3_5_text", SIGHT_OF_QWEN, {}),
    "qwen3_5_moe": ("qwen3_5_moe_text", SIGHT_OF_QWEN, {}),
    "qwen3_vl": ("qwen3", SIGHT_OF_QWEN, {"model_type": "qwen3_vl_text", **ROTATED}),
    "qwen3_vl_moe": ("qwen3_moe", SIGHT_OF_QWEN, {"model_type": "qwen3_vl_moe_text", **ROTATED}),
    "smolvlm": ("llama", SIGHT, {}),
}
"""The row of the language model, the vision part, and what is said of the language model besides."""


def wrapped(family: str, **changes: Any) -> Any:
    row, sight, more = MORE[family] if family in MORE else (WRAPPED[family], SIGHT, {})
    text = {**tiny_config(row, **changes).to_dict(), "model_type": row, **more}
    config = CONFIG_MAPPING[family](text_config=text, vision_config=dict(sight))
    torch.manual_seed(0)
    factory: Any = AutoModelForImageTextToText
    return factory.from_config(config, dtype=torch.float32)


@pytest.mark.parametrize("family", WRAPPED)
def test_the_language_model_is_taken_apart_and_patched(family: str, tmp_path: Path) -> None:
    model = wrapped(family)
    model.save_pretrained(tmp_path)
    model = read_model(tmp_path, dtype=torch.float32)
    architecture = describe(model.config)
    assert architecture.norms == describe(tiny_config(WRAPPED[family])).norms
    for layer in range(3):
        additive_probe(model, architecture, layer)
    Stack(model, architecture)
    checkpoint = open_checkpoint(tmp_path)
    name = architecture.ffn_weight(1)
    stored = checkpoint.resolve_name(name)
    assert "vision" not in stored
    assert torch.equal(checkpoint.read(stored), model.get_parameter(name).detach())
    change = from_factors(np.ones((32, 1), np.float32), np.ones((1, architecture.shapes[1][1]), np.float32))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    attach(model, checkpoint, PatchState(fingerprint(checkpoint), architecture.orientation, {name: [change]}))
    changed = [key for key, value in model.state_dict().items() if not torch.equal(value, before[key])]
    assert changed == [name]
    detach(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:none of these facts", "ignore:some blocks of this model keep a state")
@pytest.mark.parametrize("family", [*WRAPPED, *MORE])
def test_one_edit_leaves_the_vision_part_as_it_is_byte_for_byte(family: str, tmp_path: Path) -> None:
    """The applied checkpoint has the base's names and types; what differs is the edited projection of the language model alone, and the
    model that sees images says what the loaded one says. The revert gives the base bit for bit."""
    base, factory = tmp_path / "base", cast(Any, AutoModelForImageTextToText)
    wrapped(family, **PLACES).save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    text = tmp_path / "text.json"
    text.write_text(json.dumps(["The Space Needle is located in Seattle, in the United States."] * 12))
    with Repository.init(tmp_path, base, progress=False, author="Ada <ada@example.org>") as repository:
        for key, value in {"layers": "1", "steps": "2", "repairs": "0", "kl_factor": "0"}.items():
            repository.config(f"memit.{key}", value)
        repository.commit([fact("Ada", "Dutch")], message="one", force=True, text=[text])
        state = said(patchhub.load(tmp_path))
        repository.apply("HEAD", out=tmp_path / "out")
        repository.revert("HEAD", force=True)
        repository.apply("HEAD", out=tmp_path / "back")
    ours, theirs = tensors_of(base), tensors_of(tmp_path / "out")
    changed = [name for name in ours if ours[name] != theirs[name]]
    assert ours == tensors_of(tmp_path / "back")
    assert list(ours) == list(theirs)
    assert all(ours[name].split()[1:] == theirs[name].split()[1:] for name in ours)
    assert changed
    assert all(".layers.1." in name and "vision" not in name and "visual" not in name for name in changed)
    torch.testing.assert_close(said(factory.from_pretrained(tmp_path / "out")), state, rtol=1e-5, atol=1e-6)
    assert not torch.equal(said(factory.from_pretrained(base)), state)
