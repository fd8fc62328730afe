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
from typing import Final, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from patchhub.constraints import Columns, Moments, beyond, difference, no_columns, rounded
from patchhub.delta import Delta, add, image
from patchhub.editing.metric import MetricCache
from patchhub.editing.rows import Beginnings, Climb, KeyRow, Trunk, at, batches, read_keys
from patchhub.editing.steps import POSITIONS, Footprint, release_memory, step_budget
from patchhub.editing.values import Elsewhere, KeptValues, Values, ValueSettings
from patchhub.models.architectures import Behind
from patchhub.models.tracing import Stack, add_beside, in_rows

_GPU_POSITIONS, _LEAST_POSITIONS = 8192, 64  # of a batch


@dataclass(frozen=True, eq=False)
class State:
    """What the model's present weights hold already.

    Attributes:
        columns: the active columns of each weight, or their sums, on top of `fixed`.
        deltas: what realises them, and `fixed`: the sum is the weight's change.
        fixed: deltas that stay as they are, such as imported ones.
    """

    columns: Mapping[str, Columns | Moments]
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
    """How what is missing is shared among layers.

    Attributes:
        measured: where it is: in the residual stream after the last "block"; in what the last layer's feed-forward part, its
            "projection", puts into the stream; or at each layer, as it is when the whole change is made at the first ("replay").
        divisor: from the number of layers still to write, this one included, to what the missing part is divided by.
        length: behind a norm, what is written is at least so many times as long as the output at hand, see `Behind.toward`.
    """

    measured: Literal["block", "projection", "replay"]
    divisor: Callable[[int], float]
    length: float = 0.0


@dataclass(frozen=True)
class Running:
    """How an edit runs. None of it moves what comes out by more than rounding.

    Attributes:
        memory: bytes that the process may hold, its model included; None: half of what is free may be taken besides.
        kept: where the values of some settings are kept, so that an interrupted edit goes on.
        elsewhere: where values are optimised; None: on the model at hand.
        progress: called with "values" and a number of requests, or "layers" and a number of layers; with "further" and 0 where some
            requests are optimised further.
    """

    memory: int | None = None
    kept: Callable[[ValueSettings], KeptValues] | None = None
    elsewhere: Elsewhere | None = None
    progress: Callable[[str, int], None] = lambda stage, done: None

    def release(self) -> None:
        """Where memory is scarce, give back what the last stage left in pieces: it would come on top of the next."""
        if self.memory is not None:
            release_memory()


AS_IT_COMES: Final = Running()


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
    running: Running = AS_IT_COMES,
) -> Recording:
    """Spread targets z of the last layer over all layers (MEMIT, Meng et al. 2023, eq. 20 and algorithm 1).

    Args:
        layers: edited layers, ascending; z belongs to the last, under "replay" to the first.
        targets: z of each request: the stream after the block where it is measured there, else, and in any case where a norm
            comes behind, the output of the feed-forward projection.
        ridge: lambda of every request, or of each.
        state: what the stack's weights already hold besides W0.
        still: requests that are kept: their columns ask for no change of what the present weights give at their keys.
        running: how; hidden states beyond a quarter of the memory that is left go to a temporary file.
    """
    with TemporaryDirectory() as folder:
        beginnings = Beginnings.of(rows, stack)
        with stack.fast():
            climbs = _open(stack, rows, beginnings, step_budget(stack.device, running.memory), Path(folder))
        names = {layer: stack.architecture.ffn_weight(layer) for layer in layers}
        written: dict[int, Sequence[Delta]] = {}
        columns: dict[str, Columns] = {}
        change: dict[str, Delta] = {}
        before, goal = 0, None
        for number, layer in enumerate(layers):
            with stack.fast(), side_paths(stack, written):
                trunk = beginnings.run(stack, layers[-1] + 1)
                keys, reached = _read(climbs, trunk, before, layer, layers[-1], targets.shape)
                if goal is None:
                    goal = _goal(climbs, trunk, layers, targets, reached, spread)
            residual = goal.residual(layer, reached, len(layers) - number)
            residual[list(still)] = 0.0
            keys = keys.to(stack.device_of(layer))
            columns[names[layer]], change[names[layer]] = _extend(keys, residual, ridge, metric, names[layer], state)
            written[layer] = [change[names[layer]]]
            before = layer
            running.progress("layers", 1)
    return Recording(columns, change)


@contextmanager
def side_paths(stack: Stack, deltas: Mapping[int, Sequence[Delta]]) -> Iterator[None]:
    """While open, the FFN output projection of each layer also adds dW k, in float32."""
    handles = [add_beside(stack.ffn_out[layer], parts) for layer, parts in deltas.items() if parts]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _extend(
    keys: Float[Tensor, "n in"],
    residual: Float[Tensor, "n out"],
    ridge: float | Float[np.ndarray, " n"],
    metric: MetricCache,
    weight: str,
    state: State,
) -> tuple[Columns, Delta]:
    """Columns of one weight, rounded first, and the change that adding them to the active ones makes.

    The rounded key is the key: its preimage is C^-1 of it, and the residual counts what the present change gives at it.
    """
    shape = (residual.shape[1], keys.shape[1])
    stored_keys = rounded(keys.cpu().numpy())
    preimages = metric.preimages(weight, torch.from_numpy(stored_keys).to(keys.device)).cpu().numpy()
    residuals = residual.cpu().numpy() + image(add(state.deltas.get(weight, ()), shape), stored_keys)
    ridges = np.full(len(stored_keys), ridge, np.float32)
    # Float16 would bring a part of 1e-4 of u back into the directions that a null space leaves alone.
    preimages = preimages.astype(np.float32) if metric.preimages_by.exact else rounded(preimages)
    added = Columns(stored_keys, preimages, rounded(residuals), ridges)
    active = state.columns.get(weight, no_columns(shape))
    return added, difference(active, beyond(added, state.fixed.get(weight, ())), no_columns(shape))


@dataclass(frozen=True, eq=False)
class _Reached:
    """What the bare prompts reach, float64 on the CPU: outputs of the feed-forward projections of the layer at hand and of the last
    one, and the stream after the last block."""

    here: Float[Tensor, "n d"]
    last: Float[Tensor, "n d"]
    stream: Float[Tensor, "n d"]


@dataclass(frozen=True, eq=False)
class _Goal:
    """What is to be reached.

    Attributes:
        behind: what stands behind each layer's projection.
        stream: measured in the "block": the stream after the last one.
        outputs: else the output of the last layer's projection, or under "replay" of each.
    """

    spread: Spread
    layers: Sequence[int]
    behind: Mapping[int, Behind]
    stream: Float[Tensor, "n d"] | None
    outputs: Mapping[int, Float[Tensor, "n d"]]

    def residual(self, layer: int, reached: _Reached, left: int) -> Float[Tensor, "n d"]:
        """What the layer's projection is to give besides, with so many layers left, this one included."""
        behind, spread, last = self.behind[layer], self.spread, self.layers[-1]
        if spread.measured == "replay":
            return behind.toward(self.outputs[layer], reached.here, spread.length)
        if self.stream is not None:
            missing = self.stream - reached.stream
        else:
            missing = self.behind[last](self.outputs[last]) - self.behind[last](reached.last)
        return behind.residual(reached.here, missing / spread.divisor(left), spread.length)


def _goal(
    climbs: Sequence[Climb],
    trunk: Trunk,
    layers: Sequence[int],
    targets: Float[Tensor, "n d"],
    reached: _Reached,
    spread: Spread,
) -> _Goal:
    """What targets ask for, given what is reached before anything is written; the climbs stand at the first layer."""
    stack, wanted, last = climbs[0].stack, targets.double(), layers[-1]
    behind = {layer: stack.behind(layer) for layer in layers}
    if spread.measured == "replay":
        return _Goal(spread, layers, behind, None, _replayed(climbs, trunk, layers, wanted))
    if spread.measured == "projection":
        return _Goal(spread, layers, behind, None, {last: wanted})
    if stack.architecture.normed:
        wanted = reached.stream + behind[last](wanted) - behind[last](reached.last)
    return _Goal(spread, layers, behind, wanted, {})


def _replayed(
    climbs: Sequence[Climb], trunk: Trunk, layers: Sequence[int], targets: Float[Tensor, "n d"]
) -> dict[int, Float[Tensor, "n d"]]:
    """What each layer's projection gives at the bare prompts' last tokens when the first layer's gives the targets there."""
    stack, first = climbs[0].stack, layers[0]
    found = {layer: torch.zeros_like(targets) for layer in layers}
    for climb in climbs:
        if not climb.bare:
            continue
        rows, wanted = torch.arange(len(climb.last)), targets[climb.request]

        def put(output: Tensor, climb: Climb = climb, wanted: Tensor = wanted) -> Tensor:
            at = (torch.arange(len(climb.last)).to(output.device), climb.last.to(output.device))
            shaped = in_rows(output, climb.ids.shape)
            return shaped.index_put(at, wanted.to(output.device, output.dtype)).view(output.shape)

        handle = stack.hook_output(first, put)
        try:
            with stack.watch_values(layers) as projected:
                climb.step(trunk).run(climb.hidden, first, layers[-1] + 1)
        finally:
            handle.remove()
        for layer in layers:
            found[layer][climb.request] = at(projected[layer], rows, climb.last).double().cpu()
    return found


def _read(
    climbs: Sequence[Climb], trunk: Trunk, before: int, layer: int, last_layer: int, shape: torch.Size
) -> tuple[Float[Tensor, "n in"], _Reached]:
    """Mean keys at ``layer``, float64 on the CPU, and what the bare prompts reach.

    The climbs go from block ``before`` to ``layer``.
    """
    stack = climbs[0].stack
    keys = torch.zeros(shape[0], stack.architecture.shapes[layer][1], dtype=torch.float64)
    for start, stop in stack.stretches(before, layer):
        for climb in climbs:
            climb.advance(climb.step(trunk), start, stop)
    with stack.resident(layer):
        for climb in climbs:
            if not climb.bare:
                climb.add_to(keys, read_keys(climb, climb.step(trunk), layer))
        return keys, _read_bare([climb for climb in climbs if climb.bare], trunk, layer, last_layer, keys, shape)


def _read_bare(
    climbs: Sequence[Climb],
    trunk: Trunk,
    layer: int,
    last_layer: int,
    keys: Float[Tensor, "n in"],
    shape: torch.Size,
) -> _Reached:
    """What the bare prompts, which stand before ``layer``, reach from there; their keys are added to ``keys``."""
    here, last, stream = torch.zeros(3, *shape, dtype=torch.float64)
    reached = [climb.hidden for climb in climbs]
    for start, stop in climbs[0].stack.stretches(layer, last_layer + 1) if climbs else ():
        watched = [(one, place) for one, place in ((layer, here), (last_layer, last)) if start <= one < stop]
        for number, climb in enumerate(climbs):
            stack, rows = climb.stack, torch.arange(len(climb.last))
            keyed = [layer] if start == layer else []
            with stack.watch_keys(keyed) as seen, stack.watch_values([one for one, _ in watched]) as projected:
                hidden = climb.step(trunk).run(reached[number], start, stop)
            for one in keyed:
                climb.add_to(keys, at(seen[one], rows, climb.last))
            for one, place in watched:
                place[climb.request] = at(projected[one], rows, climb.last).double().cpu()
            if stop <= last_layer:
                reached[number] = hidden
            else:
                stream[climb.request] = at(hidden, rows, climb.last).double().cpu()
    return _Reached(here, last, stream)


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
