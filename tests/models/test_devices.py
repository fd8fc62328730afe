"""Blocks on several devices, without any: fake tensors have devices that this machine lacks, and refuse to mix them.

They hold shapes and devices but no numbers, so these tests say that everything meets where it must; that the numbers are right is
what the other tests of the same functions say.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import hooks
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from patchhub.delta import LowRank
from patchhub.editing.locate import Encoded
from patchhub.editing.rows import BlockOutput, Projections, Rows
from patchhub.editing.wise.texts import read_tokens
from patchhub.editing.wise.training import _edit_loss, _margin_loss, _read_texts, _rows
from patchhub.models.tracing import Prefix, SidePath, Stack
from tests.tiny_models import VOCABULARY, tiny_stack

NEAR, FAR = torch.device("cpu:1"), torch.device("cpu:2")  # only fake tensors tell them apart
ROWS, BEFORE, TIME, WIDTH = 3, 4, 5, 32


def move(module: nn.Module, device: torch.device, mode: FakeTensorMode) -> None:
    """Give a module fake parameters and buffers on a device."""
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if parameter is not None:
                child._parameters[name] = nn.Parameter(mode.from_tensor(parameter).to(device), requires_grad=False)
        for name, buffer in child._buffers.items():
            if buffer is not None:
                child._buffers[name] = mode.from_tensor(buffer).to(device)


@pytest.fixture(params=["llama", "gptj", "gpt2"])
def spread(request: pytest.FixtureRequest) -> Iterator[Stack]:
    """A model as accelerate spreads it: the first two blocks with the embedding, the others with the head."""
    stack = tiny_stack(request.param, attn_implementation="eager")
    with FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv()) as mode:  # shapes that numbers decide
        move(stack.model, NEAR, mode)
        far = [*stack.blocks[2:], stack._norm, stack.model.get_output_embeddings()]
        for module in far:
            move(module, FAR, mode)
            hook = hooks.AlignDevicesHook(execution_device=FAR, io_same_device=False, skip_keys="past_key_values")
            hooks.add_hook_to_module(module, hook)
        yield stack


def integers(*shape: int) -> torch.Tensor:
    return torch.ones(*shape, dtype=torch.long, device=NEAR)


def opened(stack: Stack, upto: int) -> Rows:
    heads = getattr(stack.model.config, "num_key_value_heads", 4)
    kept = [torch.zeros(ROWS, heads, BEFORE, 8, device=stack.device_of(layer)) for layer in range(4)]
    prefix = Prefix([(keys, keys) for keys in kept])
    ids, positions, mask = integers(ROWS, TIME), integers(ROWS, TIME), integers(ROWS, BEFORE + TIME)
    start = stack.begin(ids, mask, positions, prefix)
    return Rows(
        start, ids, mask, positions, prefix, start.run(start.hidden, 0, upto), integers(ROWS), 0 * integers(ROWS)
    )


def test_the_blocks_are_on_two_devices(spread: Stack) -> None:
    assert [spread.device_of(layer) for layer in range(4)] == [NEAR, NEAR, FAR, FAR]
    assert spread.device == NEAR


def test_hidden_states_and_logits_come_back_to_the_first_device(spread: Stack) -> None:
    rows = opened(spread, 2)
    assert rows.hidden.device == NEAR
    assert rows.start.run(rows.hidden, 2, 4).device == NEAR
    at = rows.start.finish(rows.hidden, 2, integers(2), integers(2))
    assert (at.device, at.shape) == (NEAR, (2, WIDTH))
    logits = spread.logits(at)
    assert (logits.device, logits.shape) == (NEAR, (2, VOCABULARY))


def test_kept_keys_and_values_stay_with_their_blocks(spread: Stack) -> None:
    rows = opened(spread, 0)
    assert rows.prefix is not None
    chosen: Prefix = rows.prefix.select(integers(2))
    assert [layer.keys.device for layer in chosen.layers] == [NEAR, NEAR, FAR, FAR]
    assert chosen.rearrange(integers(2, 3)).layers[3].values.device == FAR
    shorter = rows.select(integers(2), integers(2))
    assert shorter.start.run(shorter.hidden, 0, 4).shape == (2, TIME, WIDTH)


@pytest.mark.parametrize("kind", [BlockOutput, Projections])
@pytest.mark.parametrize("layer", [1, 2])
def test_a_change_on_either_device_has_its_gradient_on_the_first(spread: Stack, kind: Any, layer: int) -> None:
    site = kind(spread, layer)
    rows = opened(spread, site.first)
    assert site.unedited(rows).device == NEAR
    change = torch.zeros(ROWS, site.parts, WIDTH, device=NEAR, requires_grad=True)
    logits = spread.logits(site.run(rows, change, integers(2), integers(2)))
    [gradient] = torch.autograd.grad(logits.sum(), change)
    assert (gradient.device, gradient.shape) == (NEAR, change.shape)


def test_a_side_path_follows_its_module(spread: Stack) -> None:
    layer = 3
    out, inner = spread.architecture.shapes[layer]
    delta = LowRank(np.ones((out, 2), np.float32), np.ones((2, inner), np.float32))
    handle = spread.ffn_out[layer].register_forward_hook(SidePath([delta]))
    rows = opened(spread, 0)
    assert rows.start.run(rows.hidden, 0, 4).device == NEAR
    handle.remove()


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_the_tokens_of_side_memories_meet_where_their_layer_is(spread: Stack, layer: int) -> None:
    tokens = read_tokens(spread, layer, [[1, 2, 3], [4, 5]])
    devices = {tokens.keys.device, tokens.lengths.device, tokens.text.device}
    assert devices == {spread.device_of(layer)}
    change = torch.zeros(spread.architecture.shapes[layer], device=spread.device_of(layer))
    assert tokens.distances(change, "max").device == change.device


@pytest.mark.slow
@pytest.mark.parametrize("layer", [1, 2])  # before and behind the step from one device to the other
def test_the_descent_of_a_side_memory_runs_where_its_layer_is(spread: Stack, layer: int) -> None:
    rows = _rows(spread, layer, [(Encoded((1, 2, 3, 4), 1, (2, 4)), 1.0), (Encoded((5, 6, 7), 0, (1, 3)), 1.0)])
    texts = _read_texts(spread, layer, [[1, 2, 3], [4, 5]])
    change = torch.zeros(spread.architecture.shapes[layer], device=spread.device_of(layer), requires_grad=True)
    loss = _edit_loss(spread, layer, rows, change) + _margin_loss([rows], [texts], change, (1.0, 2.0, 3.0), "max")
    [gradient] = torch.autograd.grad(loss, change)
    assert (gradient.device, gradient.shape) == (change.device, change.shape)
