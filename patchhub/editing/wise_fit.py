"""The matrix of a side memory that gives wanted outputs at edited subjects and little elsewhere.

    minimise over X under the mask:   ridge tr(X C X^T) + sum_j share_j ||X k_j - t_j||^2

C is the second moment of the keys that the side memory must leave alone, k_j the key of row j and t_j what X shall add there. The first
term is the expected square of the routing distance on unrelated text, so it is what keeps the two scopes apart. A shard that is
continued has X = what is added to its change and t_j = 0 for the requests it holds: recursive least squares, which forgets nothing
and gives what fitting all requests at once gives.

Every output has its own mask and so its own linear system; all are solved together by conjugate gradients. Where the masks leave out
little, the system without masks is nearly the same for all of them, and its Cholesky factor makes a few iterations enough.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

_ITERATIONS = 200
_TOLERANCE = 1e-4  # of the right-hand side; the next round corrects what is left
_DENSE = 0.7  # share of entries above which the factor of the whole system is the better preconditioner
_RIDGE_SHARE = 0.01  # of the median of the diagonal of C, as for the metric


@dataclass(frozen=True, eq=False)
class FitProblem:
    """The part of the problem that does not depend on what is wanted.

    Attributes:
        normal: ridge C + sum_j share_j k_j k_j^T.
        mask: 1 where an entry may change, 0 elsewhere.
        factor: the Cholesky factor of ``normal``, where the mask is dense enough for it to help.
    """

    normal: Float[Tensor, "in in"]
    mask: Float[Tensor, "out in"]
    factor: Float[Tensor, "in in"] | None

    def nearly(self, right: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """An estimate of the solution for a right-hand side: the preconditioner."""
        if self.factor is None:
            return right / self.normal.diagonal()
        return torch.cholesky_solve(right.T, self.factor).T * self.mask


def fit_problem(
    left_alone: Float[Tensor, "in in"],
    keys: Float[Tensor, "rows in"],
    shares: Float[Tensor, " rows"],
    mask: Float[Tensor, "out in"],
    ridge: float,
) -> FitProblem:
    """The problem for rows in scope; ``left_alone`` is the second moment of the keys of all other text."""
    diagonal = left_alone.diagonal()
    normal = ridge * left_alone + (keys * shares[:, None]).T @ keys
    normal.diagonal().add_(ridge * _RIDGE_SHARE * float(diagonal.median()) + torch.finfo(torch.float32).tiny)
    factor, failed = torch.linalg.cholesky_ex(normal) if float(mask.mean()) > _DENSE else (None, 1)
    return FitProblem(normal, mask, None if int(failed) else factor)


def wanted(
    keys: Float[Tensor, "rows in"], shares: Float[Tensor, " rows"], outputs: Float[Tensor, "rows out"]
) -> Float[Tensor, "out in"]:
    """The right-hand side of the normal equations: sum_j share_j t_j k_j^T."""
    return (outputs * shares[:, None]).T @ keys


def solve_masked(
    problem: FitProblem, right: Float[Tensor, "out in"], start: Float[Tensor, "out in"]
) -> Float[Tensor, "out in"]:
    """The X with X N = R under the mask, by preconditioned conjugate gradients from ``start``."""
    normal, mask = problem.normal, problem.mask
    goal = _TOLERANCE * float((right * mask).norm())
    solution = start * mask
    rest = (right - solution @ normal) * mask
    scaled = problem.nearly(rest)
    direction, product = scaled, (rest * scaled).sum(1, keepdim=True)
    for _ in range(_ITERATIONS):
        if float(rest.norm()) <= goal:
            break
        image = (direction @ normal) * mask
        step = product / (direction * image).sum(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        solution = solution + step * direction
        rest = rest - step * image
        scaled = problem.nearly(rest)
        before, product = product, (rest * scaled).sum(1, keepdim=True)
        direction = scaled + (product / before.clamp(min=torch.finfo(torch.float32).tiny)) * direction
    return solution


def subspace(shape: tuple[int, int], ratio: float, seed: int, number: int) -> Float[Tensor, "out in"]:
    """The mask of shard ``number``: each entry is 1 with probability ``ratio``, drawn from (seed, number) alone."""
    generator = torch.Generator().manual_seed((seed << 20) + number)
    return (torch.rand(shape, generator=generator) < ratio).float()
