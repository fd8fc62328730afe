"""The keys of requests: the texts that they are read in, and batches of these on their way up through the blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from patchhub.editing.locate import Encoded
from patchhub.editing.rows import Trunk, common_beginning, run_trunk
from patchhub.models.tracing import Pass, Stack, right_padded


@dataclass(frozen=True, eq=False)
class KeyRow:
    """One context of one request, cut after the subject's last token. Context 0 is the bare prompt."""

    tokens: tuple[int, ...]
    request: int
    context: int
    weight: float  # in the mean key of the request


def key_rows(encoded: Sequence[Sequence[Encoded]]) -> list[KeyRow]:
    """The contexts of each request as rows; the bare prompt comes first and weighs half, the others share the rest.

    That is the published mean over the two context types (compute_ks.py): first within a type, then over types.
    """
    rows = []
    for request, contexts in enumerate(encoded):
        others = len(contexts) - 1
        for context, row in enumerate(contexts):
            weight = 1.0 if not others else (0.5 if context == 0 else 0.5 / others)
            rows.append(KeyRow(row.input_ids[: row.subject_last + 1], request, context, weight))
    return rows


@dataclass(frozen=True, eq=False)
class Beginnings:
    """What the rows of each context have in front; a row's own tokens, at least its last one, come after it."""

    tokens: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, rows: Sequence[KeyRow], stack: Stack) -> Beginnings:
        """Nothing is in front where a block's state cannot be kept."""
        if stack.architecture.recurrent:
            return cls(((),) * (1 + max(row.context for row in rows)))
        groups: list[list[tuple[int, ...]]] = [[] for _ in range(1 + max(row.context for row in rows))]
        for row in rows:
            groups[row.context].append(row.tokens[:-1])
        return cls(tuple(common_beginning(group) if group else () for group in groups))

    def own(self, row: KeyRow) -> tuple[int, ...]:
        return row.tokens[len(self.tokens[row.context]) :]

    def run(self, stack: Stack) -> Trunk:
        """Their keys and values on the model's present weights."""
        return run_trunk(stack, self.tokens)


@dataclass(eq=False)
class Climb:
    """A batch of rows on its way up; ``hidden`` is the input of the next block for the rows' own tokens.

    Attributes:
        ids, mask, positions: of the rows' own tokens, padded on the right.
        last: column of each row's last token.
        bare: whether these are bare prompts; a batch holds only such or none.
        spilled: ``hidden`` is a file.
    """

    stack: Stack
    ids: Int[Tensor, "rows time"]
    mask: Int[Tensor, "rows time"]
    positions: Int[Tensor, "rows time"]
    last: Int[Tensor, " rows"]
    request: Int[Tensor, " rows"]
    context: Int[Tensor, " rows"]
    weight: Float[Tensor, " rows"]
    bare: bool
    hidden: Float[Tensor, "rows time d"]
    spilled: bool

    @classmethod
    def of(cls, stack: Stack, rows: Sequence[KeyRow], beginnings: Beginnings, file: Path | None = None) -> Climb:
        """The rows embedded.

        Args:
            file: where hidden states are kept; None: in memory.
        """
        own = [beginnings.own(row) for row in rows]
        ids, mask, positions = right_padded(own, stack.device)
        before = torch.tensor([len(row.tokens) for row in rows]) - torch.tensor([len(tokens) for tokens in own])
        climb = cls(
            stack,
            ids,
            mask,
            positions + before.to(stack.device)[:, None],
            last=torch.tensor([len(tokens) - 1 for tokens in own]),
            request=torch.tensor([row.request for row in rows]),
            context=torch.tensor([row.context for row in rows]),
            weight=torch.tensor([row.weight for row in rows], dtype=torch.float64),
            bare=rows[0].context == 0,
            hidden=torch.zeros(0),
            spilled=file is not None,
        )
        climb.hidden = stack.begin(ids, mask, climb.positions).hidden
        if file is not None:
            kept = torch.from_file(str(file), shared=True, size=climb.hidden.numel(), dtype=climb.hidden.dtype)
            climb.hidden = kept.view(climb.hidden.shape).copy_(climb.hidden)
        return climb

    def step(self, trunk: Trunk) -> Pass:
        """What the blocks are called with after these beginnings."""
        if trunk.prefix is None:
            return self.stack.begin(self.ids, self.mask, self.positions)
        of_row = self.context.to(trunk.mask.device)
        mask = torch.cat([trunk.mask[of_row], self.mask], dim=1)
        return self.stack.begin(self.ids, mask, self.positions, trunk.prefix.lend(of_row))

    def advance(self, step: Pass, start: int, stop: int) -> None:
        """Run the blocks from ``start`` to before ``stop``."""
        if start == stop:
            return
        hidden = step.run(self.hidden, start, stop)
        self.hidden = self.hidden.copy_(hidden) if self.spilled else hidden

    def add_to(self, keys: Float[Tensor, "n in"], found: Float[Tensor, "rows in"]) -> None:
        """Add each row's key, as it weighs, to the mean key of its request (float64, on the CPU)."""
        keys.index_add_(0, self.request, found.double().cpu() * self.weight[:, None])


def read_keys(climb: Climb, step: Pass, layer: int) -> Float[Tensor, "rows in"]:
    """The keys at the rows' last tokens; nothing after them is needed, so the feed-forward part runs at those tokens only."""
    rows, stack = torch.arange(len(climb.last)), climb.stack
    with stack.watch_keys([layer]) as seen, stack.feed_forward_at(layer, rows, climb.last) as shortened:
        step.run(climb.hidden, layer, layer + 1)
    return seen[layer][0, : len(rows)] if shortened else at(seen[layer], rows, climb.last)


def at(states: Float[Tensor, "rows time d"], row: Int[Tensor, " m"], column: Int[Tensor, " m"]) -> Float[Tensor, "m d"]:
    """States at some positions, wherever they live."""
    return states[row.to(states.device), column.to(states.device)]


def batches(rows: Sequence[KeyRow], beginnings: Beginnings, positions: int) -> Iterator[list[KeyRow]]:
    """Rows with equally many tokens of their own or nearly so together, bare ones apart, at most so many positions each."""
    batch: list[KeyRow] = []
    for row in sorted(rows, key=lambda row: (row.context == 0, len(beginnings.own(row)))):
        full = (len(batch) + 1) * len(beginnings.own(row)) > positions
        if batch and (full or (batch[0].context == 0) != (row.context == 0)):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


_TOKENS = 8192  # positions of a batch


@torch.no_grad()
def mean_keys(stack: Stack, layer: int, rows: Sequence[KeyRow]) -> Float[Tensor, "n in"]:
    """For each request the weighted mean over its rows of the FFN output projection's input at the row's last token, float64 on the CPU.

    At the lowest edited layer these are the keys that recording will store.
    """
    requests = 1 + max(row.request for row in rows)
    keys = torch.zeros(requests, stack.architecture.shapes[layer][1], dtype=torch.float64)
    beginnings = Beginnings.of(rows, stack)
    with stack.fast():
        trunk = beginnings.run(stack)
        for batch in batches(rows, beginnings, _TOKENS):
            climb = Climb.of(stack, batch, beginnings)
            step = climb.step(trunk)
            climb.advance(step, 0, layer)
            climb.add_to(keys, read_keys(climb, step, layer))
    return keys
