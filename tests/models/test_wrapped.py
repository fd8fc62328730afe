"""Models that see images and write text are edited in their language model, under the names of their own checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

from patchhub.delta import from_factors
from patchhub.models.architectures import additive_probe, describe, read_model
from patchhub.models.checkpoint import open_checkpoint
from patchhub.models.fingerprint import fingerprint
from patchhub.models.tracing import Stack
from patchhub.runtime.patched_model import PatchState, attach, detach
from tests.models.tiny_configs import tiny_config

SIGHT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,  # as deep as the language model
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
WRAPPED = {"gemma3": "gemma3_text", "mistral3": "mistral", "llava": "llama", "paligemma": "gemma"}


def wrapped(family: str) -> Any:
    text = {**tiny_config(WRAPPED[family]).to_dict(), "model_type": WRAPPED[family]}
    config = CONFIG_MAPPING[family](text_config=text, vision_config=dict(SIGHT))
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
