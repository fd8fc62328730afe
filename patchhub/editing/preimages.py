"""How a preimage u of a key k follows from the mean M of k k^T over a text: what makes one kind of metric another.

Each kind turns M once into a matrix that is kept (`prepare`), and later reads preimages off that matrix (`of`). A recorded column needs
nothing else of its metric: the solve uses k, u, r and lambda alone (`constraints`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.linalg import solve_triangular

from patchhub.errors import EditError

_BLOCK = 1024  # rows of a factor that are in float64 at a time


class Preimages(ABC):
    """One kind of metric with its settings.

    Attributes:
        keeps: what the kept matrix is called in file names.
    """

    keeps: ClassVar[str]

    @abstractmethod
    def prepare(self, moment: Float[Tensor, "in in"], weight: str) -> Float[Tensor, "in kept"]:
        """The matrix that is kept of a weight's second moment, in float64. ``moment`` is left as it was.

        Raises:
            EditError: this moment gives no preimages; ``weight`` is named.
        """

    @abstractmethod
    def of(self, kept: Float[Tensor, "in kept"], keys: Float[Tensor, "n in"]) -> Float[Tensor, "n in"]:
        """u of each row k, in float64."""


@dataclass(frozen=True)
class Covariance(Preimages):
    """u = C^-1 k with C = M + epsilon m I, see `regularised`; kept is the Cholesky factor of C (MEMIT, PMET)."""

    epsilon: float = 0.0

    keeps: ClassVar[str] = "factor"

    def prepare(self, moment: Float[Tensor, "in in"], weight: str) -> Float[Tensor, "in kept"]:
        """F with C = F F^T.

        Raises:
            EditError: C is not positive definite (the text is shorter than the width and epsilon is zero).
        """
        factor: Tensor
        factor, failed = torch.linalg.cholesky_ex(regularised(moment, self.epsilon))
        if int(failed):
            raise EditError(
                f"the second moment of {weight} is not positive definite",
                remedy="Use more text, or a larger `metric.epsilon`.",
                weight=weight,
            )
        return factor

    def of(self, kept: Float[Tensor, "in kept"], keys: Float[Tensor, "n in"]) -> Float[Tensor, "n in"]:
        solved = keys.double().T.clone()
        blocks = [slice(start, start + _BLOCK) for start in range(0, len(kept), _BLOCK)]
        for rows in blocks:  # L y = k
            solved[rows] -= kept[rows, : rows.start].double() @ solved[: rows.start]
            solved[rows] = solve_triangular(kept[rows, rows].double(), solved[rows], upper=False)
        for rows in reversed(blocks):  # L^T u = y
            solved[rows] -= kept[rows.stop :, rows].double().T @ solved[rows.stop :]
            solved[rows] = solve_triangular(kept[rows, rows].double().T, solved[rows], upper=True)
        return solved.T


@dataclass(frozen=True)
class NullSpace(Preimages):
    """u = P k / l2, P the projection on the eigenvectors of M whose eigenvalue is below ``threshold`` (AlphaEdit, Fang et al. 2025).

    AlphaEdit's update for keys K, residuals R and all earlier keys K_0 is R K^T P ((K K^T + K_0 K_0^T) P + l2 I)^-1. That is
    what adding the columns (k, u, r, lambda = 1) to the earlier ones changes about D(S), by the same identity as MEMIT's form. Kept is an
    orthonormal basis of the eigenvectors at or above the threshold, which are few where text uses few directions.
    """

    threshold: float
    l2: float

    keeps: ClassVar[str] = "complement"

    def prepare(self, moment: Float[Tensor, "in in"], weight: str) -> Float[Tensor, "in kept"]:
        """V with P = I - V V^T.

        Raises:
            EditError: the moment is not finite, or no eigenvalue is below the threshold.
        """
        if not bool(torch.isfinite(moment).all()):
            raise EditError(
                f"the second moment of {weight} is not finite", remedy="Check the base for NaN.", weight=weight
            )
        vectors: Tensor
        values, vectors = torch.linalg.eigh(moment.double())
        free = int((values < self.threshold).sum())
        if not free:
            raise EditError(
                f"no direction of {weight} has a second moment below {self.threshold:g}; the smallest is {float(values[0]):.3g}",
                remedy="Raise `metric.threshold`.",
                weight=weight,
                smallest=float(values[0]),
            )
        return vectors[:, free:]

    def of(self, kept: Float[Tensor, "in kept"], keys: Float[Tensor, "n in"]) -> Float[Tensor, "n in"]:
        used, keys = kept.double(), keys.double()
        projected: Tensor = keys - (keys @ used) @ used.T
        return projected / self.l2


def regularised(moment: Float[Tensor, "in in"], epsilon: float) -> Float[Tensor, "in in"]:
    """C = M + epsilon m I in float64, m the median of M's diagonal.

    The median, because the first position of a text gives a few inputs second moments that are orders of magnitude larger in many
    models; their mean would drown all other directions.
    """
    metric = moment.to(torch.float64, copy=True)
    metric.diagonal().add_(epsilon * float(moment.diagonal().median()))
    return metric
