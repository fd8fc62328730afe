"""Recording: what a batch of requests asks of each edited weight, as columns (docs/methods.md).

The sweep goes up through the edited layers. At each it reads the keys and the present hidden states, sets every request's
share of what is still missing, solves, and goes on from the layer's input with the new weight in place, never from the embedding.
The model's own weights are not touched: changes run beside them as a float32 path, so a half-precision or quantised base
gives the same columns up to the precision of its activations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from patchhub.constraints import Columns, beyond, difference, no_columns
from patchhub.delta import Delta, add, image
from patchhub.editing.budget import POSITIONS, Footprint, step_budget
from patchhub.editing.keys import Beginnings, Climb, KeyRow, at, batches, read_keys
from patchhub.editing.metric import MetricCache
from patchhub.editing.rows import Trunk
from patchhub.editing.values import Values
from patchhub.models.tracing import Pass, SidePath, Stack

_GPU_POSITIONS, _LEAST_POSITIONS = 8192, 64  # of a batch


@dataclass(frozen=True, eq=False)
class State:
    """What the model's present weights hold already.

    Attributes:
        columns: the active columns of each weight, on top of `fixed`.
        deltas: what realises them, and `fixed`: the sum is the weight's change.
        fixed: deltas that stay as they are, such as imported ones.
    """

    columns: Mapping[str, Columns]
    deltas: Mapping[str, Sequence[Delta]]
    fixed: Mapping[str, Sequence[Delta]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Recording:
    """Columns per weight in request order, and the change of each weight that adding them makes (float64)."""

    columns: dict[str, Columns]
    change: dict[str, Delta]


@dataclass(frozen=True, eq=False)
class Edit:
    """What an editor made: columns and changes per weight, and the optimised values."""

    recording: Recording
    values: Values


@dataclass(frozen=True)
class Spread:
    """How what is missing at the last layer is shared among layers.

    Attributes:
        measured: where values live: in the residual stream after the last "block", or at its feed-forward "projection".
        divisor: from the number of layers still to write, this one included, to what the missing part is divided by.
    """

    measured: Literal["block", "projection"]
    divisor: Callable[[int], float]


@torch.no_grad()
def record(
    stack: Stack,
    layers: Sequence[int],
    rows: Sequence[KeyRow],
    targets: Float[Tensor, "n d"],
    ridge: float | Float[np.ndarray, " n"],
    metric: MetricCache,
    state: State,
    spread: Spread,
    *,
    still: Sequence[int] = (),
    memory: int | None = None,
    progress: Callable[[int], None] = lambda layers: None,
) -> Recording:
    """Spread targets z of the last layer over all layers (MEMIT, Meng et al. 2023, eq. 20 and algorithm 1).

    Args:
        layers: edited layers, ascending; z belongs to the last.
        targets: z of each request, where ``spread`` measures.
        ridge: lambda of every request, or of each.
        state: what the stack's weights already hold besides W0.
        still: requests that are kept: their columns ask for no change of what the present weights give at their keys.
        memory: bytes that the process may hold, see `budget.step_budget`; hidden states beyond a quarter of what is left go to a
            temporary file.
    """
    with TemporaryDirectory() as folder:
        beginnings = Beginnings.of(rows)
        with stack.fast():
            climbs = _open(stack, rows, beginnings, step_budget(stack.device, memory), Path(folder))
        names = {layer: stack.architecture.ffn_weight(layer) for layer in layers}
        written: dict[int, Sequence[Delta]] = {}
        columns: dict[str, Columns] = {}
        change: dict[str, Delta] = {}
        before = 0
        for number, layer in enumerate(layers):
            with stack.fast(), side_paths(stack, written):
                trunk = beginnings.run(stack)
                keys, reached = _read(climbs, trunk, before, layer, layers[-1], targets.shape, spread)
            share = (targets.double() - reached) / spread.divisor(len(layers) - number)
            share[list(still)] = 0.0
            columns[names[layer]], change[names[layer]] = _extend(keys, share, ridge, metric, names[layer], state)
            written[layer] = [change[names[layer]]]
            before = layer
            progress(1)
    return Recording(columns, change)


@contextmanager
def side_paths(stack: Stack, deltas: Mapping[int, Sequence[Delta]]) -> Iterator[None]:
    """While open, the FFN output projection of each layer also adds dW k, in float32."""
    handles = [stack.ffn_out[layer].register_forward_hook(SidePath(parts)) for layer, parts in deltas.items() if parts]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _extend(
    keys: Float[Tensor, "n in"],
    share: Float[Tensor, "n out"],
    ridge: float | Float[np.ndarray, " n"],
    metric: MetricCache,
    weight: str,
    state: State,
) -> tuple[Columns, Delta]:
    """Columns of one weight, rounded to float32 first, and the change that adding them to the active ones makes."""
    shape = (share.shape[1], keys.shape[1])
    stored_keys = keys.cpu().numpy().astype(np.float32)
    preimages = metric.preimages(weight, torch.from_numpy(stored_keys).to(keys.device)).cpu().numpy()
    residuals = share.cpu().numpy() + image(add(state.deltas.get(weight, ()), shape), stored_keys)
    added = Columns(
        stored_keys,
        preimages.astype(np.float32),
        residuals.astype(np.float32),
        np.full(len(stored_keys), ridge, np.float32),
    )
    active = state.columns.get(weight, no_columns(shape))
    return added, difference(active, beyond(added, state.fixed.get(weight, ())), no_columns(shape))


def _read(
    climbs: Sequence[Climb], trunk: Trunk, before: int, layer: int, last_layer: int, shape: torch.Size, spread: Spread
) -> tuple[Float[Tensor, "n in"], Float[Tensor, "n d"]]:
    """Mean keys at ``layer`` and what the bare prompts reach at ``last_layer``, float64 on the CPU.

    The climbs go from block ``before`` to ``layer``.
    """
    stack = climbs[0].stack
    keys = torch.zeros(shape[0], stack.architecture.shapes[layer][1], dtype=torch.float64)
    reached = torch.zeros(shape, dtype=torch.float64)
    for climb in climbs:
        step = climb.step(trunk)
        climb.advance(step, before, layer)
        if climb.bare:
            found, hidden = _read_reached(climb, step, layer, last_layer, spread)
            reached[climb.request] = hidden.double().cpu()
        else:
            found = read_keys(climb, step, layer)
        climb.add_to(keys, found)
    return keys, reached


def _read_reached(
    climb: Climb, step: Pass, layer: int, last_layer: int, spread: Spread
) -> tuple[Float[Tensor, "rows in"], Float[Tensor, "rows d"]]:
    """Keys at the rows' last tokens, and what is reached there."""
    rows, stack = torch.arange(len(climb.last)), climb.stack
    with stack.watch_keys([layer]) as keys, stack.watch_values([last_layer]) as projected:
        hidden = step.run(climb.hidden, layer, last_layer + 1)
    reached = projected[last_layer] if spread.measured == "projection" else hidden
    return at(keys[layer], rows, climb.last), at(reached, rows, climb.last)


def _open(stack: Stack, rows: Sequence[KeyRow], beginnings: Beginnings, budget: int, folder: Path) -> list[Climb]:
    """The rows embedded, in memory or, where they would take more than a quarter of the budget, in files of ``folder``."""
    footprint = Footprint.of(stack, len(stack.blocks) - 1)
    most = POSITIONS if stack.device.type == "cpu" else _GPU_POSITIONS
    positions = max(_LEAST_POSITIONS, min(most, budget // (2 * footprint.position)))
    groups = list(batches(rows, beginnings, positions))
    size = next(stack.blocks[0].parameters()).element_size() * stack.architecture.d_model
    total = size * sum(len(group) * max(len(beginnings.own(row)) for row in group) for group in groups)
    spilled = total > budget // 4
    return [
        Climb.of(stack, group, beginnings, folder / str(number) if spilled else None)
        for number, group in enumerate(groups)
    ]
