"""Every family of the table, with random weights: taken apart, optimised, recorded and patched in its own shapes and orientation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from patchhub.cache import Cache
from patchhub.delta import to_dense
from patchhub.editing.editor import EDITORS
from patchhub.editing.locate import Encoded
from patchhub.editing.metric import MetricCache
from patchhub.editing.record import State, record
from patchhub.editing.rows import Fact, key_rows
from patchhub.editing.values import ValueSettings, optimise_values
from patchhub.models.architectures import FAMILIES, Site, describe
from patchhub.models.checkpoint import open_checkpoint
from patchhub.models.fingerprint import fingerprint
from patchhub.models.tracing import Stack
from patchhub.runtime.patched_model import PatchState, attach, detach
from tests.models.tiny_configs import RECENT, SUPPORTED, random_model, tiny_config

LAYERS = (0, 1)
RIDGE = 0.1
SETTINGS = ValueSettings(steps=4, learning_rate=0.5, weight_decay=0.0, kl_factor=0.0, clamp=10.0, stop_loss=0.0)
FACTS = tuple(
    Fact(
        (Encoded((seed, 7, 20, 9, 11), 2, (4, 5)), Encoded((5, seed, 7, 20, 9, 11), 3, (5, 6))),
        Encoded((20, 9), 0, (2, 2)),
    )
    for seed in (3, 40, 41)
)
TOKENS = torch.tensor([[3, 7, 20, 9, 11, 60]])


def louder(model: Any) -> Any:
    """Weights of a size at which a mistake shows."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0.0, 0.2, generator=generator)
    return model.eval()


SCANNED = ("bamba", "falcon_h1", "granitemoehybrid")  # their state is run in plain PyTorch, token by token
LONG = (pytest.mark.slow, pytest.mark.long)
CASES = [
    pytest.param(family, method, None, marks=LONG if family in (*SCANNED, *RECENT) and method != "memit" else ())
    for family in SUPPORTED
    for method in EDITORS
] + [
    pytest.param(family, "memit", "shared")
    for family in ("afmoe", "deepseek_v3", "llama4_text", "qwen2_moe", "qwen3_next")
]


def test_every_row_of_the_table_is_tried() -> None:
    assert FAMILIES.keys() == SUPPORTED.keys()


@pytest.mark.parametrize(("family", "method", "experts"), CASES)
def test_an_edit_of_every_family(family: str, method: str, experts: Site | None, tmp_path: Path) -> None:
    """Values move towards their targets; what is recorded has the weight's shape, its change is the columns' joint solution, and
    the patched model is the same whether the change is in its weights or beside them."""
    model = louder(random_model(tiny_config(family)))
    model.save_pretrained(tmp_path / "base")
    stack = Stack(model, describe(model.config, experts))
    editor = EDITORS[method]
    names = [stack.architecture.ffn_weight(layer) for layer in LAYERS]
    projections = dict(zip(names, (stack.architecture.feed_forward[layer] for layer in LAYERS), strict=True))
    stacks = {name: projection.experts for name, projection in projections.items() if projection.experts}
    metric = MetricCache(Cache(tmp_path / "metric"), "0" * 64, stacks=stacks)
    for name, projection in projections.items():
        one = torch.eye(projection.shape[1] // max(1, projection.experts), dtype=torch.float64)
        metric.store(name, one.expand(projection.experts, -1, -1) if projection.experts else one)

    way = editor.way(stack.architecture)
    site = way.site(stack, LAYERS)
    values = optimise_values(site, FACTS, SETTINGS)
    first = optimise_values(site, FACTS, ValueSettings(**{**vars(SETTINGS), "steps": 1}))
    assert (values.loss < first.loss).all()
    rows = key_rows([fact.rows for fact in FACTS])
    made = record(stack, LAYERS, rows, values.targets, RIDGE, metric, State({}, {}), way.spread)
    deltas = {name: [made.change[name]] for name in names}
    for layer, name in zip(LAYERS, names, strict=True):
        columns = made.columns[name]
        assert columns.shape == stack.architecture.shapes[layer] == to_dense(deltas[name][0]).shape
        change = to_dense(made.change[name])
        missing = columns.residuals - columns.keys.astype(float) @ change.T
        assert np.linalg.norm(change - missing.T / RIDGE @ columns.preimages) < 1e-3 * np.linalg.norm(change)

    checkpoint = open_checkpoint(tmp_path / "base")
    stored = {name: projection.orientation for name, projection in projections.items() if projection.experts}
    state = PatchState(fingerprint(checkpoint), stack.architecture.orientation, deltas, stored=stored)
    said = []
    with torch.no_grad():
        before = model(TOKENS).logits
        for beside in (False, True):
            attach(model, checkpoint, state, side_path=beside)
            said.append(model(TOKENS).logits)
            detach(model)
        assert torch.equal(model(TOKENS).logits, before)
    assert float((said[0] - said[1]).norm()) < 1e-4 * float((said[0] - before).norm())
