"""Where a value enters the last edited layer, and the batch of rows that runs from there on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from patchhub.models.tracing import Pass, Prefix, Stack


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of one batch from the subject's last token on (column 0), over a frozen prefix."""

    start: Pass
    ids: Int[Tensor, "rows time"]
    mask: Int[Tensor, "rows all"]
    positions: Int[Tensor, "rows time"]
    prefix: Prefix | None
    hidden: Float[Tensor, "rows time d"]  # before the first block that runs at each step
    fact: Int[Tensor, " rows"]  # index into the batch's facts

    def select(self, rows: Int[Tensor, " kept"], fact: Int[Tensor, " kept"]) -> Rows:
        prefix = self.prefix.select(rows) if self.prefix is not None else None
        ids, mask, positions = self.ids[rows], self.mask[rows], self.positions[rows]
        start = self.start.stack.begin(ids, mask, positions, prefix)
        return Rows(start, ids, mask, positions, prefix, self.hidden[rows], fact)


class Site(ABC):
    """Where the change enters a layer: which blocks run again at each step, and what the change is added to.

    A change has one vector per part; part 0 is the one that is written into weights.
    """

    parts: int

    def __init__(self, stack: Stack, layer: int) -> None:
        self.stack, self.layer = stack, layer

    @property
    @abstractmethod
    def first(self) -> int:
        """The first block that runs at each step."""

    @abstractmethod
    def run(
        self, rows: Rows, change: Float[Tensor, "rows parts d"], row: Int[Tensor, " m"], column: Int[Tensor, " m"]
    ) -> Float[Tensor, "m d"]:
        """Hidden states after the last block at some positions, with the change added in column 0."""

    @abstractmethod
    def unedited(self, rows: Rows) -> Float[Tensor, "rows parts d"]:
        """What the change is added to."""


class BlockOutput(Site):
    """The output of the layer's block: MEMIT's site."""

    parts = 1

    @property
    def first(self) -> int:
        return self.layer + 1

    def run(
        self, rows: Rows, change: Float[Tensor, "rows parts d"], row: Int[Tensor, " m"], column: Int[Tensor, " m"]
    ) -> Float[Tensor, "m d"]:
        first = (rows.hidden[:, 0].float() + change[:, 0]).to(rows.hidden.dtype)
        hidden = torch.cat([first[:, None], rows.hidden[:, 1:]], dim=1)
        return rows.start.finish(hidden, self.first, row, column)

    def unedited(self, rows: Rows) -> Float[Tensor, "rows parts d"]:
        return rows.hidden[:, :1].float()


class Projections(Site):
    """The outputs of the layer's feed-forward (part 0) and attention (part 1) projections: PMET's site."""

    parts = 2

    @property
    def first(self) -> int:
        return self.layer

    @property
    def _modules(self) -> tuple[nn.Module, nn.Module]:
        block = self.stack.blocks[self.layer]
        return self.stack.ffn_out[self.layer], block.get_submodule(self.stack.architecture.attn_out)

    def run(
        self, rows: Rows, change: Float[Tensor, "rows parts d"], row: Int[Tensor, " m"], column: Int[Tensor, " m"]
    ) -> Float[Tensor, "m d"]:
        def adding(part: int) -> Any:
            def add(module: nn.Module, args: Any, output: Tensor) -> Tensor:
                found = output.view(rows.hidden.shape)  # OPT's feed-forward part has no rows
                first = (found[:, 0].float() + change[:, part].to(output.device)).to(output.dtype)
                return torch.cat([first[:, None], found[:, 1:]], dim=1).view(output.shape)

            return add

        handles = [module.register_forward_hook(adding(part)) for part, module in enumerate(self._modules)]
        blocks = len(self.stack.blocks)
        try:
            if self.layer < blocks - 1:
                return rows.start.finish(rows.hidden, self.first, row, column)
            # The change enters the last feed-forward part itself, which then runs everywhere.
            return rows.start.run(rows.hidden, self.first, blocks)[row, column]
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def unedited(self, rows: Rows) -> Float[Tensor, "rows parts d"]:
        found: dict[int, Tensor] = {}

        def keeping(part: int) -> Any:
            def keep(module: nn.Module, args: Any, output: Tensor) -> None:
                found[part] = output.view(rows.hidden.shape)[:, 0].float().to(self.stack.device)

            return keep

        handles = [module.register_forward_hook(keeping(part)) for part, module in enumerate(self._modules)]
        try:
            rows.start.run(rows.hidden, self.layer, self.layer + 1)
        finally:
            for handle in handles:
                handle.remove()
        return torch.stack([found[0], found[1]], dim=1)
