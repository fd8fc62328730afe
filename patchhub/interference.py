"""How two sets of columns get in each other's way, told from K, U and R alone. NumPy only, no model.

Two requests interfere where their keys point the same way in the metric and their residuals do not: the weight is then asked for two
different outputs at nearly one input, and the joint solution gives both up in part. Arrays are rows as in `constraints`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from patchhub.constraints import Columns
from patchhub.delta import Delta, image

KEY_COSINE = 0.5
"""Keys with a larger cosine (in absolute value) count as near: facts about one subject, see docs/version-control.md."""
RESIDUAL_COSINE = 0.9
"""Residuals with a smaller cosine count as different: different targets have less than 0.6."""

NEGLIGIBLE = 1e-5
"""A residual shorter than this share of its key asks for nothing but rounding errors: what the model answered already."""

_BLOCK = 1024  # rows of a cosine matrix that are held at a time
_TINY = 1e-30  # of a squared norm: a key that is 0 is near nothing


class Pair(NamedTuple):
    """Row ``left`` of one set and row ``right`` of the other, with the cosines of their keys and of their residuals."""

    left: int
    right: int
    key_cosine: float
    residual_cosine: float


def key_cosines(left: Columns, right: Columns) -> Float[np.ndarray, "left right"]:
    """k_i^T C^-1 k_j / sqrt(k_i^T C^-1 k_i  k_j^T C^-1 k_j), from the recorded u = C^-1 k; 0 for a key that is 0."""
    cross = _f64(left.keys) @ _f64(right.preimages).T + _f64(left.preimages) @ _f64(right.keys).T
    return _normalised(cross / 2, _squares(left.keys, left.preimages), _squares(right.keys, right.preimages))


def residual_cosines(left: Columns, right: Columns) -> Float[np.ndarray, "left right"]:
    """r_i^T r_j / (||r_i|| ||r_j||); 0 for a residual that is 0."""
    cross = _f64(left.residuals) @ _f64(right.residuals).T
    squares = [_squares(side.residuals, side.residuals) for side in (left, right)]
    return _normalised(cross, *squares)


def interfering(
    left: Columns, right: Columns, *, key_limit: float = KEY_COSINE, residual_limit: float = RESIDUAL_COSINE
) -> list[Pair]:
    """Pairs whose keys are near and whose residuals differ, the nearest keys first.

    A key and its opposite ask for the same where their residuals are opposite, so the residuals' cosine is taken with the sign of the
    keys'.
    """
    pairs: list[Pair] = []
    for start in range(0, len(left), _BLOCK):
        part = left.take(range(start, min(start + _BLOCK, len(left))))
        keys, residuals = key_cosines(part, right), residual_cosines(part, right)
        found = (np.abs(keys) > key_limit) & (np.sign(keys) * residuals < residual_limit)
        pairs.extend(
            Pair(start + int(i), int(j), float(keys[i, j]), float(residuals[i, j])) for i, j in np.argwhere(found)
        )
    return sorted(pairs, key=lambda pair: (-abs(pair.key_cosine), pair.left, pair.right))


class Near(NamedTuple):
    """Row ``left`` of one set and row ``right`` of another with the cosine of their keys."""

    left: int
    right: int
    key_cosine: float


def near_keys(left: Columns, right: Columns, *, limit: float = KEY_COSINE) -> list[Near]:
    """Pairs of rows whose keys have a cosine above the limit in absolute value; residuals are not read.

    In float32: the cosines are for comparing with a limit, and a batch of thousands is compared with thousands.
    """
    scaled = [
        (array / np.sqrt(np.maximum(_squares(side.keys, side.preimages), _TINY))[:, None]).astype(np.float32)
        for side, array in ((left, left.keys), (right, right.preimages))
    ]
    pairs: list[Near] = []
    for start in range(0, len(left), _BLOCK):
        cosines = scaled[0][start : start + _BLOCK] @ scaled[1].T
        rows, columns = np.nonzero(np.abs(cosines) > limit)
        pairs += [
            Near(start + i, j, float(cosines[i, j])) for i, j in zip(rows.tolist(), columns.tolist(), strict=True)
        ]
    return pairs


def expected_misfit(columns: Columns, row: int, unknown: Sequence[int]) -> float:
    """||D k - r|| / ||r|| of one row in the joint solution of a few columns, some of whose residuals are not known yet.

    With h = (L + K^T U)^-1 K^T u_row the solution gives D k_row = R h, so what the row misses is R (h - e_row). Known residuals
    enter as they are. An unknown one is taken to be as long as the known ones are in the mean (1 where none is known), those apart that
    are negligible, and at a right angle to all others: what residuals of different targets nearly are. A negligible row misses nothing.
    """
    gram = _f64(columns.keys) @ _f64(columns.preimages).T
    gram = (gram + gram.T) / 2
    residuals = _f64(columns.residuals)
    inner = residuals @ residuals.T
    asks = _asks(columns)
    if row not in set(unknown) and not asks[row]:
        return 0.0
    known = [index for index in range(len(columns)) if asks[index] and index not in set(unknown)]
    length = float(np.mean(inner.diagonal()[known])) if known else 1.0
    for index in unknown:
        inner[index, :] = inner[:, index] = 0.0
        inner[index, index] = length
    missing = np.linalg.solve(gram + np.diag(_f64(columns.ridge)), gram[:, row])
    missing[row] -= 1.0
    wanted = inner[row, row]
    return float(np.sqrt(max(missing @ inner @ missing, 0.0) / wanted)) if wanted > 0 else 0.0


def misfit(deltas: Sequence[Delta], columns: Columns) -> Float[np.ndarray, " n"]:
    """||D k_i - r_i|| / ||r_i|| for D the sum of the deltas: the share of its residual that each request does not get.

    0 is exactly what was asked, 1 is nothing of it; 0 where nothing was asked, or next to nothing (`NEGLIGIBLE`).
    """
    missing = -_f64(columns.residuals)
    for delta in deltas:
        missing = missing + image(delta, columns.keys)
    wanted = np.linalg.norm(_f64(columns.residuals), axis=1)
    share: Float[np.ndarray, " n"] = np.linalg.norm(missing, axis=1) / np.where(_asks(columns), wanted, np.inf)
    return share


def _asks(columns: Columns) -> Bool[np.ndarray, " n"]:
    """Whether each residual is more than negligible beside its key."""
    keys, residuals = _squares(columns.keys, columns.keys), _squares(columns.residuals, columns.residuals)
    asks: Bool[np.ndarray, " n"] = residuals > NEGLIGIBLE**2 * keys
    return asks


def _squares(left: Float[np.ndarray, "n width"], right: Float[np.ndarray, "n width"]) -> Float[np.ndarray, " n"]:
    squares: Float[np.ndarray, " n"] = np.einsum("nw,nw->n", _f64(left), _f64(right))
    return squares


def _normalised(
    cross: Float[np.ndarray, "left right"], left: Float[np.ndarray, " left"], right: Float[np.ndarray, " right"]
) -> Float[np.ndarray, "left right"]:
    scale = np.sqrt(np.maximum(np.outer(left, right), 0.0))
    cosines: Float[np.ndarray, "left right"] = cross / np.where(scale > 0, scale, np.inf)
    return cosines


def _f64(array: np.ndarray) -> Float[np.ndarray, ...]:
    return array.astype(np.float64, copy=False)
