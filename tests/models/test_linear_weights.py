"""The linear weights of every family's blocks, told from names and shapes, are those of the model that transformers builds."""

from __future__ import annotations

from pathlib import Path

import pytest

from patchhub.models.architectures import describe
from patchhub.models.checkpoint import open_checkpoint
from patchhub.models.structure import orientation_of
from patchhub.objects import linear_shapes
from tests.models.tiny_configs import SUPPORTED, random_model, tiny_config

RENAMED = ("kimi_linear",)  # whose checkpoints call most weights otherwise, so that of the others nothing is told


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("family", SUPPORTED)
def test_they_are_the_linear_modules_of_the_blocks(family: str, bare: bool, tmp_path: Path) -> None:
    """Of a checkpoint of the bare decoder too, whose names lack the prefix that the parameters have."""
    model = random_model(tiny_config(family))
    (model.base_model if bare else model).save_pretrained(tmp_path)
    architecture = describe(model.config)
    expected, orientations = {}, set()
    for name, module in model.named_modules():
        orientation = orientation_of(module)
        # Llama 4's router is a linear module, but gives more than a product; Trinity's and DBRX's are told from their names as others are.
        router = name.endswith((".router", ".router.gate", ".router.layer"))
        if orientation and name.startswith(architecture.blocks + ".") and not router:
            rows, columns = module.weight.shape
            expected[f"{name}.weight"] = (rows, columns) if orientation == "out_in" else (columns, rows)
            orientations.add(orientation)
    assert orientations == {architecture.orientation}
    outputs = {architecture.ffn_weight(layer): architecture.shapes[layer] for layer in range(architecture.n_layers)}
    stacked = {name: shape for name, shape in outputs.items() if not name.endswith(".weight")}
    if family in RENAMED:
        expected = outputs
    assert linear_shapes(open_checkpoint(tmp_path).tensors, outputs, architecture.orientation) == expected | stacked


def test_of_other_names_nothing_is_told() -> None:
    outputs = {"h.0.out.weight": (6, 48)}
    assert linear_shapes({}, outputs, "out_in") == outputs
    assert linear_shapes({}, {}, "out_in") == {}
