"""A state as a set of columns: the solve, the difference of two solves, and the proof. NumPy only, no model.

For one weight W0 of shape (out, in), each request i asks that the key k_i give v_i, and r_i = v_i - W0 k_i. With the second
moment C of the base's keys, u_i = C^-1 k_i and the weight lambda_i, the change that all of a set S ask for together is

    D(S) = argmin_D ||D C^(1/2)||^2 + sum_i (1/lambda_i) ||D k_i - r_i||^2  =  R (L + K^T U)^-1 U^T       L = diag(lambda)

(MEMIT, Meng et al. 2023, eq. 14, with one lambda per request; the right-hand form by the push-through identity). It needs neither the
model nor C, only the recorded columns, so D is a function of a *set*: order, batches and branches do not matter.

Arrays here hold one request per row: keys (n, in), preimages u (n, in), residuals (n, out), ridge (n,). Stored values are
rounded to float32 first; everything after is float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.linalg import LinAlgError

from patchhub.delta import Delta, LowRank, add, image, negative, norm
from patchhub.errors import EditError

_BLOCK = 64  # below this size a triangular solve is one LAPACK call


@dataclass(frozen=True, eq=False)
class Columns:
    """What n requests ask of one weight.

    Attributes:
        labels: what each row is of, in the rows' order; none where nobody asks. The algebra carries them along and never looks.
    """

    keys: Float[np.ndarray, "n in"]
    preimages: Float[np.ndarray, "n in"]
    residuals: Float[np.ndarray, "n out"]
    ridge: Float[np.ndarray, " n"]
    labels: tuple[Any, ...] = ()

    def __len__(self) -> int:
        return len(self.ridge)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight."""
        return self.residuals.shape[1], self.keys.shape[1]

    def take(self, rows: Sequence[int]) -> Columns:
        index = np.asarray(rows, dtype=np.intp)
        labels = tuple(self.labels[row] for row in index) if self.labels else ()
        return Columns(self.keys[index], self.preimages[index], self.residuals[index], self.ridge[index], labels)


def no_columns(shape: tuple[int, int]) -> Columns:
    """The empty set for a weight of shape (out, in)."""
    out, inner = shape
    empty = np.zeros((0, inner), np.float32)
    return Columns(empty, empty, np.zeros((0, out), np.float32), np.zeros(0, np.float32))


def join(parts: Sequence[Columns]) -> Columns:
    """The rows of several column sets of one weight, one after the other."""
    return Columns(
        np.concatenate([p.keys for p in parts]),
        np.concatenate([p.preimages for p in parts]),
        np.concatenate([p.residuals for p in parts]),
        np.concatenate([p.ridge for p in parts]),
        tuple(label for p in parts for label in p.labels),
    )


def beyond(columns: Columns, deltas: Sequence[Delta]) -> Columns:
    """The columns on top of deltas that stay as they are, whose sum is X: each asks for what is left, r_i - X k_i."""
    if not deltas or not len(columns):
        return columns
    present = image(add(deltas, columns.shape), columns.keys)
    return Columns(columns.keys, columns.preimages, columns.residuals - present, columns.ridge, columns.labels)


def solve(columns: Columns) -> LowRank:
    """D(S) in float64 factors of rank <= n.

    Raises:
        EditError: the normal equations are not positive definite (NaN, or ridge <= 0).
    """
    return difference(no_columns(columns.shape), columns, no_columns(columns.shape))


def difference(common: Columns, added: Columns, removed: Columns) -> LowRank:
    """D(common + added) - D(common + removed), of rank <= |added| + |removed|, without either solve.

    Block elimination of ``common``: with W = M_cc^-1 M_cx and the Schur complement P = M_xx - M_xc W, the columns x
    contribute (R_x - R_c W) P^-1 (U_x - U_c W)^T on top of the common ones.
    """
    for columns in (common, added, removed):
        _refuse_unsound(columns)
    factor = _cholesky(_gram(common, common) + np.diag(_f64(common.ridge))) if len(common) else np.zeros((0, 0))
    gain = _contribution(common, factor, added)
    loss = negative(_contribution(common, factor, removed))
    total = add([gain, loss], added.shape)
    if isinstance(total, LowRank):
        return total
    assert isinstance(loss, LowRank)
    return LowRank(np.hstack([gain.B, loss.B]), np.vstack([gain.A, loss.A]))


def responsibilities(columns: Columns) -> Float[np.ndarray, "n out"]:
    """Rows b_i of M^-1 R, so that D(S) = sum_i b_i u_i^T: request i moves the output at a key k by b_i (u_i^T k).

    Raises:
        EditError: as in `solve`.
    """
    gram = _gram(columns, columns) + np.diag(_f64(columns.ridge))
    return _cholesky_solve(_cholesky(gram), _f64(columns.residuals))


def proof(deltas: Sequence[Delta], columns: Columns) -> float:
    """How far the stored deltas are from the joint solution, relative to their norm; it does not use the solver.

    D is the solution exactly where D = (R - D K) L^-1 U^T (the stationarity condition of the objective), so this is
    ||D - (R - D K) L^-1 U^T|| / ||D||. An empty set proves itself when D is 0; then the norm of D is returned.
    """
    total = add(deltas, columns.shape)
    size = norm(total)
    if size == 0.0 and not len(columns):
        return 0.0
    missing = (_f64(columns.residuals) - image(total, columns.keys)) / _f64(columns.ridge)[:, None]
    implied = LowRank(-missing.T, _f64(columns.preimages))
    distance = norm(add([total, implied], columns.shape))
    return distance / size if size else distance


def _refuse_unsound(columns: Columns) -> None:
    arrays = (columns.keys, columns.preimages, columns.residuals, columns.ridge)
    if not all(np.isfinite(array).all() for array in arrays) or (columns.ridge <= 0).any():
        raise EditError(
            "recorded columns are not finite, or have lambda <= 0",
            remedy="Check the settings (lambda > 0) and the base's weights for values that are not finite.",
        )


def _contribution(common: Columns, factor: Float[np.ndarray, "c c"], extra: Columns) -> LowRank:
    if not len(extra):
        out, inner = extra.shape
        return LowRank(np.zeros((out, 0)), np.zeros((0, inner)))
    gram = _gram(extra, extra) + np.diag(_f64(extra.ridge))
    residuals, preimages = _f64(extra.residuals), _f64(extra.preimages)
    if len(common):
        cross = _gram(common, extra)
        weights = _cholesky_solve(factor, cross)
        gram = gram - cross.T @ weights
        residuals = residuals - weights.T @ _f64(common.residuals)
        preimages = preimages - weights.T @ _f64(common.preimages)
    return LowRank(_cholesky_solve(_cholesky((gram + gram.T) / 2), residuals).T, preimages)


def _gram(a: Columns, b: Columns) -> Float[np.ndarray, "a b"]:
    """k_i^T C^-1 k_j, symmetrised: rounding k and u apart makes k_i^T u_j differ from u_i^T k_j."""
    forward: Float[np.ndarray, "a b"] = _f64(a.keys) @ _f64(b.preimages).T
    backward = forward.T if a is b else _f64(a.preimages) @ _f64(b.keys).T
    forward += backward
    forward /= 2
    return forward


def _cholesky(matrix: Float[np.ndarray, "n n"]) -> Float[np.ndarray, "n n"]:
    try:
        factor: Float[np.ndarray, "n n"] = np.linalg.cholesky(matrix)
    except LinAlgError as error:
        raise EditError(
            "the recorded columns do not have a positive definite Gram matrix",
            remedy="Raise lambda: the requests' keys are too much alike for the precision of what is stored.",
        ) from error
    return factor


def _cholesky_solve(factor: Float[np.ndarray, "n n"], rhs: Float[np.ndarray, "n m"]) -> Float[np.ndarray, "n m"]:
    """(F F^T)^-1 rhs."""
    lower = _solve_lower(factor, rhs)
    # F^T X = Y is lower triangular again once rows and columns are reversed.
    return _solve_lower(factor.T[::-1, ::-1], lower[::-1])[::-1]


def _solve_lower(lower: Float[np.ndarray, "n n"], rhs: Float[np.ndarray, "n m"]) -> Float[np.ndarray, "n m"]:
    """Forward substitution by halves, so that nearly all work is matrix products (NumPy has no triangular solve)."""
    n = len(lower)
    if n <= _BLOCK:
        return np.linalg.solve(lower, rhs)
    half = n // 2
    top = _solve_lower(lower[:half, :half], rhs[:half])
    bottom = _solve_lower(lower[half:, half:], rhs[half:] - lower[half:, :half] @ top)
    return np.concatenate([top, bottom])


def _f64(array: np.ndarray) -> Float[np.ndarray, ...]:
    return array.astype(np.float64, copy=False)
