"""Recording: what a batch of requests asks of each edited weight, as columns (docs/methods.md).

The sweep goes up through the edited layers. At each it reads the keys and the present hidden states, sets every request's
share of what is still missing, solves, and goes on from the layer's input with the new weight in place, never from the embedding.
The model's own weights are not touched: changes run beside them as a float32 path, so a half-precision or quantised base
gives the same columns up to the precision of its activations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from patchhub.constraints import Columns, beyond, difference, no_columns
from patchhub.delta import Delta, LowRank, add, image
from patchhub.editing.budget import Footprint, step_budget
from patchhub.editing.locate import Encoded
from patchhub.editing.metric import MetricCache
from patchhub.editing.values import Values
from patchhub.models.side_path import SidePath
from patchhub.models.tracing import Pass, Stack, right_padded

_TOKENS_PER_CHUNK, _LEAST_TOKENS = 8192, 64


@dataclass(frozen=True, eq=False)
class KeyRow:
    """One context of one request, cut after the subject's last token."""

    tokens: tuple[int, ...]
    request: int
    weight: float  # in the mean key of the request
    bare: bool  # whether the request's residual is read here


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
    change: dict[str, LowRank]


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


def key_rows(encoded: Sequence[Sequence[Encoded]]) -> list[KeyRow]:
    """The contexts of each request as rows; the bare prompt comes first and weighs half, the others share the rest.

    That is the published mean over the two context types (compute_ks.py): first within a type, then over types.
    """
    rows = []
    for request, contexts in enumerate(encoded):
        others = len(contexts) - 1
        for number, row in enumerate(contexts):
            weight = 1.0 if not others else (0.5 if number == 0 else 0.5 / others)
            rows.append(KeyRow(row.input_ids[: row.subject_last + 1], request, weight, number == 0))
    return rows


@dataclass(eq=False)
class _Chunk:
    """Rows on their way up through the layers; ``hidden`` is the input of the next block."""

    step: Pass
    hidden: Float[Tensor, "rows time d"]
    last: Int[Tensor, " rows"]
    request: Int[Tensor, " rows"]
    weight: Float[Tensor, " rows"]
    bare: bool
    spilled: bool  # ``hidden`` is a file

    def advance(self, start: int, stop: int) -> None:
        """Run the blocks from ``start`` to before ``stop``."""
        if start == stop:
            return
        hidden = self.step.run(self.hidden, start, stop)
        self.hidden = self.hidden.copy_(hidden) if self.spilled else hidden


@torch.no_grad()
def record(
    stack: Stack,
    layers: Sequence[int],
    rows: Sequence[KeyRow],
    targets: Float[Tensor, "n d"],
    ridge: float,
    metric: MetricCache,
    state: State,
    spread: Spread,
    *,
    memory: int | None = None,
    progress: Callable[[int], None] = lambda layers: None,
) -> Recording:
    """Spread targets z of the last layer over all layers (MEMIT, Meng et al. 2023, eq. 20 and algorithm 1).

    Args:
        layers: edited layers, ascending; z belongs to the last.
        targets: z of each request, where ``spread`` measures.
        ridge: lambda of every request.
        state: what the stack's weights already hold besides W0.
        memory: bytes that the process may hold, see `budget.step_budget`; hidden states beyond a quarter of what is left go to a
            temporary file.
    """
    with TemporaryDirectory() as folder:
        budget = step_budget(stack.device, memory)
        with stack.fast():
            chunks = _open_chunks(stack, rows, budget, Path(folder))
        return _sweep(stack, layers, chunks, targets, ridge, metric, state, spread, progress)


def _sweep(
    stack: Stack,
    layers: Sequence[int],
    chunks: Sequence[_Chunk],
    targets: Float[Tensor, "n d"],
    ridge: float,
    metric: MetricCache,
    state: State,
    spread: Spread,
    progress: Callable[[int], None],
) -> Recording:
    names = {layer: stack.architecture.ffn_weight(layer) for layer in layers}
    written: dict[int, Sequence[Delta]] = {}
    columns: dict[str, Columns] = {}
    change: dict[str, LowRank] = {}
    before = 0
    for number, layer in enumerate(layers):
        with stack.fast(), side_paths(stack, written):
            for chunk in chunks:
                chunk.advance(before, layer)
            keys, reached = _read(stack, chunks, layer, layers[-1], targets.shape, spread)
        share = (targets.double() - reached) / spread.divisor(len(layers) - number)
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
    ridge: float,
    metric: MetricCache,
    weight: str,
    state: State,
) -> tuple[Columns, LowRank]:
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
    stack: Stack, chunks: Sequence[_Chunk], layer: int, last_layer: int, shape: torch.Size, spread: Spread
) -> tuple[Float[Tensor, "n in"], Float[Tensor, "n d"]]:
    """Mean keys at ``layer`` and what the bare prompts reach at ``last_layer``, float64 on the CPU."""
    keys: Tensor | None = None
    reached = torch.zeros(shape, dtype=torch.float64)
    for chunk in chunks:
        found, hidden = _read_chunk(stack, chunk, layer, last_layer, spread)
        if keys is None:
            keys = torch.zeros(shape[0], found.shape[1], dtype=torch.float64)
        keys.index_add_(0, chunk.request, found.double().cpu() * chunk.weight[:, None])
        if hidden is not None:
            reached[chunk.request] = hidden.double().cpu()
    assert keys is not None
    return keys, reached


def _read_chunk(
    stack: Stack, chunk: _Chunk, layer: int, last_layer: int, spread: Spread
) -> tuple[Float[Tensor, "rows in"], Float[Tensor, "rows d"] | None]:
    """Keys at the subjects' last tokens, and for bare prompts what is reached there.

    For the others nothing after the keys is needed, so the feed-forward part runs at those tokens only.
    """
    rows = torch.arange(len(chunk.last))
    with ExitStack() as opened:
        seen = opened.enter_context(stack.watch_keys([layer]))
        if not chunk.bare:
            opened.enter_context(stack.feed_forward_at(layer, rows, chunk.last))
            chunk.step.run(chunk.hidden, layer, layer + 1)
            keys = seen[layer]
            return (keys[0] if keys.shape[:2] == (1, len(rows)) else _at(keys, rows, chunk.last)), None
        projected = opened.enter_context(stack.watch_values([last_layer]))
        hidden = chunk.step.run(chunk.hidden, layer, last_layer + 1)
        reached = projected[last_layer] if spread.measured == "projection" else hidden
        return _at(seen[layer], rows, chunk.last), _at(reached, rows, chunk.last)


def _at(
    states: Float[Tensor, "rows time d"], row: Int[Tensor, " rows"], column: Int[Tensor, " rows"]
) -> Float[Tensor, "rows d"]:
    return states[row.to(states.device), column.to(states.device)]


def _open_chunks(stack: Stack, rows: Sequence[KeyRow], budget: int, folder: Path) -> list[_Chunk]:
    """The rows embedded, in memory or, where they would take more than a quarter of the budget, in files of ``folder``."""
    footprint = Footprint.of(stack, len(stack.blocks) - 1)
    groups = _groups(rows, max(_LEAST_TOKENS, min(_TOKENS_PER_CHUNK, budget // (2 * footprint.position))))
    size = next(stack.blocks[0].parameters()).element_size() * stack.architecture.d_model
    total = size * sum(len(group) * max(len(row.tokens) for row in group) for group in groups)
    spilled = total > budget // 4
    return [_open_chunk(stack, group, folder / str(number) if spilled else None) for number, group in enumerate(groups)]


def _open_chunk(stack: Stack, rows: Sequence[KeyRow], file: Path | None) -> _Chunk:
    ids, mask, positions = right_padded([row.tokens for row in rows], stack.device)
    step = stack.begin(ids, mask, positions)
    hidden = step.hidden
    if file is not None:
        hidden = torch.from_file(str(file), shared=True, size=step.hidden.numel(), dtype=step.hidden.dtype)
        hidden = hidden.view(step.hidden.shape).copy_(step.hidden)
    return _Chunk(
        replace(step, hidden=step.hidden[:0]),
        hidden,
        torch.tensor([len(row.tokens) - 1 for row in rows]),
        torch.tensor([row.request for row in rows]),
        torch.tensor([row.weight for row in rows], dtype=torch.float64),
        rows[0].bare,
        file is not None,
    )


def _groups(rows: Sequence[KeyRow], tokens: int) -> list[list[KeyRow]]:
    """Rows of similar length together, bare ones apart, at most so many positions each."""
    groups: list[list[KeyRow]] = []
    for row in sorted(rows, key=lambda row: (row.bare, len(row.tokens))):
        full = groups and (len(groups[-1]) + 1) * len(row.tokens) > tokens
        if not groups or full or groups[-1][0].bare != row.bare:
            groups.append([])
        groups[-1].append(row)
    return groups
