"""The fit of a side memory to what it must add: masked least squares on the keys of one weight.

    minimise over X under the mask:  ridge tr(X C X^T) + sum_j share_j ||X k_j - t_j||^2

C is the second moment of the keys that are left alone. The experts of a layer are one stacked weight (`models.experts`) of E blocks of
inputs, and a key has a block of numbers for each expert that its token is routed to. C is then kept block by block, as the metric's is,
so an expert that no row in scope is routed to does not change; what the rows ask for goes across blocks and is not cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from patchhub.models.experts import Routed
from patchhub.models.tracing import in_rows

_ITERATIONS = 200
_TOLERANCE = 1e-4  # of the right-hand side; the next round corrects what is left
_DENSE = 0.7  # share of entries above which the factor of the whole system is the better preconditioner
_RIDGE_SHARE = 0.01  # of the median of the diagonal of C, as for the metric


@dataclass(frozen=True, eq=False)
class Keys:
    """Rows of keys, in float32.

    Attributes:
        values: the blocks of each row that are not zero; of a plain weight there is one, the key.
        blocks: which of the weight's blocks they are.
        count: how many blocks the weight has.
    """

    values: Float[Tensor, "rows slots in"]
    blocks: Int[Tensor, "rows slots"]
    count: int

    @classmethod
    def seen(cls, found: Tensor | Routed, rows: torch.Size | tuple[int, int]) -> Keys:
        """What `Stack.watch_keys` saw, (batch, time) of it in one row after the other."""
        if isinstance(found, Routed):
            return cls(found.keys.float(), found.experts, found.count)
        return cls.plain(in_rows(found, torch.Size(rows)).flatten(0, 1).float())

    @classmethod
    def plain(cls, keys: Float[Tensor, "rows in"]) -> Keys:
        return cls(keys[:, None], torch.zeros(len(keys), 1, dtype=torch.long, device=keys.device), 1)

    @classmethod
    def joined(cls, parts: Sequence[Keys]) -> Keys:
        """One after the other; rows with fewer slots than others get blocks of zeros."""
        slots = max(part.blocks.shape[1] for part in parts)
        even = [part._widened(slots) for part in parts]
        return cls(torch.cat([part.values for part in even]), torch.cat([part.blocks for part in even]), parts[0].count)

    def _widened(self, slots: int) -> Keys:
        more = slots - self.blocks.shape[1]
        return Keys(pad(self.values, (0, 0, 0, more)), pad(self.blocks, (0, more)), self.count) if more else self

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, rows: Int[Tensor, " some"] | Bool[Tensor, " rows"]) -> Keys:
        return Keys(self.values[rows], self.blocks[rows], self.count)

    @property
    def device(self) -> torch.device:
        return self.values.device

    def times(self, change: Float[Tensor, "out stacked"]) -> Float[Tensor, "rows out"]:
        """What a change of the weight gives for each row."""
        if self.count == 1:
            return self.values[:, 0] @ change.T
        return Routed(self.count, self.blocks, self.values, (len(self),)).times(change)

    def spread(self, outputs: Float[Tensor, "rows out"]) -> Float[Tensor, "out stacked"]:
        """sum_j t_j k_j^T, t_j the outputs."""
        if self.count == 1:
            return outputs.T @ self.values[:, 0]
        found = outputs.new_zeros(outputs.shape[1], self.count, self.values.shape[2])
        for block, (row, slot) in self._by_block():
            found[:, block] = outputs[row].T @ self.values[row, slot]
        return found.flatten(1)

    def moments(self, shares: Float[Tensor, " rows"] | None = None) -> Float[Tensor, "blocks in in"]:
        """sum_j share_j k_j k_j^T, each block with itself; without shares each row counts 1."""
        weighed = self.values if shares is None else self.values * shares[:, None, None]
        if self.count == 1:
            return (weighed[:, 0].T @ self.values[:, 0])[None]
        inner = self.values.shape[2]
        found = self.values.new_zeros(self.count, inner, inner)
        for block, (row, slot) in self._by_block():
            found[block] = weighed[row, slot].T @ self.values[row, slot]
        return found

    def uses(self) -> Int[Tensor, " blocks"]:
        """How many rows have numbers in each block."""
        used: Tensor = self.values.any(-1)
        return torch.bincount(self.blocks[used], minlength=self.count)

    def _by_block(self) -> list[tuple[int, tuple[Int[Tensor, " m"], Int[Tensor, " m"]]]]:
        """Of each block that occurs, the rows and slots that are of it."""
        slots = self.blocks.shape[1]
        order, sizes = self.blocks.flatten().argsort(stable=True), torch.bincount(self.blocks.flatten())
        parts = torch.split(order, sizes.tolist())
        return [(block, (part // slots, part % slots)) for block, part in enumerate(parts) if len(part)]


@dataclass(frozen=True, eq=False)
class FitProblem:
    """The part of the problem that does not depend on what is wanted.

    Attributes:
        normal: ridge C, block by block; of a plain weight with sum_j share_j k_j k_j^T.
        mask: 1 where an entry may change, 0 elsewhere.
        factor: the Cholesky factor of each block of the whole system, where the mask is dense enough for it to help.
        diagonal: of the whole system.
        rows, shares: what the sum above is of, where it is not in ``normal``.
    """

    normal: Float[Tensor, "blocks in in"]
    mask: Float[Tensor, "out stacked"]
    factor: Float[Tensor, "blocks in in"] | None
    diagonal: Float[Tensor, " stacked"]
    rows: Keys | None = None
    shares: Float[Tensor, " rows"] | None = None

    def image(self, change: Float[Tensor, "out stacked"]) -> Float[Tensor, "out stacked"]:
        """X N, N the normal matrix."""
        if self.rows is None or self.shares is None:
            return change @ self.normal[0]
        apart = change.view(len(change), *self.normal.shape[:2]).transpose(0, 1)
        alone = torch.bmm(apart, self.normal).transpose(0, 1).flatten(1)
        return alone + self.rows.spread(self.rows.times(change) * self.shares[:, None])

    def nearly(self, right: Float[Tensor, "out stacked"]) -> Float[Tensor, "out stacked"]:
        """An estimate of the solution for a right-hand side: the preconditioner."""
        if self.factor is None:
            return right / self.diagonal
        apart = right.view(len(right), *self.normal.shape[:2]).permute(1, 2, 0)
        return torch.cholesky_solve(apart, self.factor).permute(2, 0, 1).flatten(1) * self.mask


def fit_problem(
    left_alone: Float[Tensor, "blocks in in"],
    keys: Keys,
    shares: Float[Tensor, " rows"],
    mask: Float[Tensor, "out stacked"],
    ridge: float,
) -> FitProblem:
    """The problem for rows in scope; ``left_alone`` is the second moment of the keys of all other text."""
    normal = ridge * left_alone
    floor = ridge * _RIDGE_SHARE * float(left_alone.diagonal(dim1=1, dim2=2).median())
    normal.diagonal(dim1=1, dim2=2).add_(floor + torch.finfo(torch.float32).tiny)
    whole = normal + keys.moments(shares)
    factor, failed = torch.linalg.cholesky_ex(whole) if float(mask.mean()) > _DENSE else (None, torch.ones(1))
    factor = None if bool(failed.any()) else factor
    diagonal = whole.diagonal(dim1=1, dim2=2).flatten()
    if keys.count == 1:
        return FitProblem(whole, mask, factor, diagonal)
    return FitProblem(normal, mask, factor, diagonal, keys, shares)


def wanted(
    keys: Keys, shares: Float[Tensor, " rows"], outputs: Float[Tensor, "rows out"]
) -> Float[Tensor, "out stacked"]:
    """The right-hand side of the normal equations: sum_j share_j t_j k_j^T."""
    return keys.spread(outputs * shares[:, None])


def solve_masked(
    problem: FitProblem, right: Float[Tensor, "out stacked"], start: Float[Tensor, "out stacked"]
) -> Float[Tensor, "out stacked"]:
    """The X with X N = R under the mask, by preconditioned conjugate gradients from ``start``."""
    mask = problem.mask
    goal = _TOLERANCE * float((right * mask).norm())
    solution = start * mask
    rest = (right - problem.image(solution)) * mask
    scaled = problem.nearly(rest)
    direction, product = scaled, (rest * scaled).sum(1, keepdim=True)
    for _ in range(_ITERATIONS):
        if float(rest.norm()) <= goal:
            break
        image = problem.image(direction) * mask
        step = product / (direction * image).sum(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        solution = solution + step * direction
        rest = rest - step * image
        scaled = problem.nearly(rest)
        before, product = product, (rest * scaled).sum(1, keepdim=True)
        direction = scaled + (product / before.clamp(min=torch.finfo(torch.float32).tiny)) * direction
    return solution


def subspace(shape: tuple[int, int], ratio: float, seed: int, number: int) -> Float[Tensor, "out stacked"]:
    """The mask of shard ``number``: each entry is 1 with probability ``ratio``, drawn from (seed, number) alone."""
    generator = torch.Generator().manual_seed((seed << 20) + number)
    return (torch.rand(shape, generator=generator) < ratio).float()
