"""A state as a set of columns: the solve, the difference of two solves, and the proof. NumPy only, no model.

For one weight W0 of shape (out, in), each request i asks that the key k_i give v_i, and r_i = v_i - W0 k_i. With the second
moment C of the base's keys, u_i = C^-1 k_i and the weight lambda_i, the change that all of a set S ask for together is

    D(S) = argmin_D ||D C^(1/2)||^2 + sum_i (1/lambda_i) ||D k_i - r_i||^2

(MEMIT, Meng et al. 2023, eq. 14, with one lambda per request). It is stationary where D = (R - D K) L^-1 U^T, L = diag(lambda), which needs
neither the model nor C, only the recorded columns, and can be solved in either of two spaces:

    D(S) = R (L + U^T K)^-1 U^T        n x n: one row and column per request
         = Y (I + X)^-1                in x in, from the sums X = K L^-1 U^T = sum_i k_i u_i^T / lambda_i and Y = R L^-1 U^T

Both are the same function of the recorded numbers (the push-through identity), so a history may change from one to the other as it grows;
U^T K is therefore not symmetrised, although it is symmetric but for the rounding of k and u. D is a function of a *set*: order, batches and
branches do not matter. See docs/methods.md and decision 6.

Arrays here hold one request per row: keys (n, in), preimages u (n, in), residuals (n, out), ridge (n,). Stored values are
rounded to float32 first; everything after is float64, and no array of n rows is made in it: columns are read in blocks of rows.

How two sets of columns get in each other's way, told from K, U and R alone. NumPy only, no model.

Two requests interfere where their keys point the same way in the metric and their residuals do not: the weight is then asked for two
different outputs at nearly one input, and the joint solution gives both up in part. Arrays are rows as in `constraints`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from numpy.linalg import LinAlgError

from patchhub.delta import Delta, Dense, LowRank, add, image, negative, norm
from patchhub.errors import EditError

_ROWS = 2048  # of columns that are in float64 at a time

SUMS_BEYOND = 1.0
"""Sets of more columns than this times d_in are solved in the space of the inputs. Both ways take as many operations at n = d_in.
Measured at d_in 384, 1,536 and 3,072: n x n takes 0.7 to 0.8 of the other's time at n = 0.8 d_in, 1.2 times at d_in, 1.3 to 1.5 times at
1.2 d_in."""

FORM_ANEW = 1e-12
"""Sums whose relative rounding error (`Moments.error`) is above this have to be formed anew from the columns."""

_EPSILON = float(np.finfo(np.float64).eps)

_HALF = 2.0**-11  # float16's own rounding of a number; more is lost where numbers are beyond its range


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
    """The rows of several column sets of one weight, one after the other; labelled where every row is."""
    labelled = all(p.labels or not len(p) for p in parts)
    return Columns(
        np.concatenate([p.keys for p in parts]),
        np.concatenate([p.preimages for p in parts]),
        np.concatenate([p.residuals for p in parts]),
        np.concatenate([p.ridge for p in parts]),
        tuple(label for p in parts for label in p.labels) if labelled else (),
    )


def beyond(columns: Columns, deltas: Sequence[Delta]) -> Columns:
    """The columns on top of deltas that stay as they are, whose sum is X: each asks for what is left, r_i - X k_i."""
    if not deltas or not len(columns):
        return columns
    present = image(add(deltas, columns.shape), columns.keys)
    return Columns(columns.keys, columns.preimages, columns.residuals - present, columns.ridge, columns.labels)


def rounded(array: Float[np.ndarray, "n width"]) -> Float[np.ndarray, "n width"]:
    """Float32 numbers that a column is recorded as: those of float16 where it holds every row to `_HALF` of its norm, else of float32.

    Columns are solved after they were rounded, so what is solved is exact whatever they are rounded to. How little float16 moves it is
    measured in decision 13.
    """
    single = np.ascontiguousarray(array, np.float32)
    with np.errstate(over="ignore"):
        half = single.astype(np.float16).astype(np.float32)
    off, size = (np.linalg.norm(found, axis=1) for found in (half - single, single))
    return half if np.isfinite(half).all() and (off <= _HALF * size).all() else single


def blocks(columns: Columns) -> Iterator[Columns]:
    """The same rows in order, a few at a time, without a copy."""
    for start in range(0, len(columns), _ROWS):
        rows = slice(start, start + _ROWS)
        yield Columns(columns.keys[rows], columns.preimages[rows], columns.residuals[rows], columns.ridge[rows])


@dataclass(frozen=True, eq=False)
class Moments:
    """The sums over a set that its solution follows from, in float64: what n columns ask of a weight, in a size that n does not change.

    Adding m columns or taking them back costs O(m in (in + out)), whatever n is. Sums that were reached in another order or by taking back
    are the same up to `error`, not bit for bit.

    Attributes:
        X: sum_i k_i u_i^T / lambda_i.
        Y: sum_i r_i u_i^T / lambda_i.
        count: n.
        rounding: Frobenius norms of the rounding errors of X and of Y, as estimated.
    """

    X: Float[np.ndarray, "in in"]
    Y: Float[np.ndarray, "out in"]
    count: int
    rounding: tuple[float, float]

    def __len__(self) -> int:
        return self.count

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight."""
        return self.Y.shape[0], self.Y.shape[1]

    @property
    def error(self) -> float:
        """The larger relative rounding error of X and Y.

        Each step adds about an epsilon of the larger of the sums before and after it, so this is large where what was taken back was much
        more than what is left. Beyond `FORM_ANEW` the solution may be wrong in digits that count.
        """
        sizes = [float(np.linalg.norm(total)) for total in (self.X, self.Y)]
        return max((lost / size for lost, size in zip(self.rounding, sizes, strict=True) if size), default=0.0)

    def add(self, columns: Columns) -> Moments:
        """With more columns.

        Raises:
            EditError: a column is not finite, or has lambda <= 0.
        """
        return self._changed(columns, 1.0)

    def without(self, columns: Columns) -> Moments:
        """With columns taken back that are among those summed; see `error`.

        Raises:
            EditError: a column is not finite, or has lambda <= 0.
        """
        return self._changed(columns, -1.0)

    def beyond(self, deltas: Sequence[Delta]) -> Moments:
        """The sums of the same columns on top of deltas that stay as they are, as `beyond` says of columns: Y - A X, A the deltas' sum."""
        if not deltas or not self.count:
            return self
        present = image(add(deltas, self.shape), self.X.T).T
        lost = float(np.hypot(self.rounding[1], _EPSILON * max(np.linalg.norm(present), np.linalg.norm(self.Y))))
        return Moments(self.X, self.Y - present, self.count, (self.rounding[0], lost))

    def solve(self) -> Dense:
        """D(S).

        Raises:
            EditError: I + X is singular, or the solution is not finite.
        """
        if not self.count:
            return Dense(np.zeros(self.shape))
        return Dense(_solve(_plus_identity(self.X).T, self.Y.T).T)

    def _changed(self, columns: Columns, sign: float) -> Moments:
        count = self.count + int(sign) * len(columns)
        if not len(columns):
            return self
        if not count:
            return no_moments(self.shape)
        X, Y = self.X.copy(), self.Y.copy()
        for part in blocks(columns):
            _accumulate(X, Y, part, sign)
        rounding = tuple(
            float(np.hypot(lost, _EPSILON * max(np.linalg.norm(before), np.linalg.norm(after))))
            for lost, before, after in zip(self.rounding, (self.X, self.Y), (X, Y), strict=True)
        )
        return Moments(X, Y, count, (rounding[0], rounding[1]))


def no_moments(shape: tuple[int, int]) -> Moments:
    """The sums over the empty set for a weight of shape (out, in)."""
    out, inner = shape
    return Moments(np.zeros((inner, inner)), np.zeros((out, inner)), 0, (0.0, 0.0))


def moments(parts: Iterable[Columns], shape: tuple[int, int]) -> Moments:
    """The sums over a set that is read part by part, of which one is held at a time.

    Raises:
        EditError: a column is not finite, or has lambda <= 0.
    """
    start = no_moments(shape)
    X, Y, count = start.X, start.Y, 0
    for columns in parts:
        for part in blocks(columns):
            _accumulate(X, Y, part, 1.0)
        count += len(columns)
    return Moments(X, Y, count, (_EPSILON * float(np.linalg.norm(X)), _EPSILON * float(np.linalg.norm(Y))))


def solve(columns: Columns) -> Delta:
    """D(S) in float64: factors of rank n, or dense where n is larger than d_in.

    Raises:
        EditError: the normal equations are not positive definite (NaN, or ridge <= 0).
    """
    return difference(no_columns(columns.shape), columns, no_columns(columns.shape))


def difference(common: Columns | Moments, added: Columns, removed: Columns) -> Delta:
    """D(common + added) - D(common + removed): of rank <= |added| + |removed|, or dense where factors would not be smaller.

    For columns x on top of the common ones, block elimination gives V_x = (I + X_c)^-T U_x and P = L_x + V_x^T K_x, and they contribute
    (R_x - D_c K_x) P^-1 V_x^T: nothing is lost in a difference of two nearly equal solutions. Few common columns are eliminated as n x n,
    many, or their sums where those are at hand, as in x in.

    Raises:
        EditError: as in `solve`.
    """
    out, inner = added.shape
    few = len(common) + max(len(added), len(removed)) <= SUMS_BEYOND * inner
    if isinstance(common, Columns) and not few:
        common = moments([common], common.shape)
    if isinstance(common, Moments) and (len(added) + len(removed)) * (out + inner) >= out * inner:
        return add([common.add(added).solve(), negative(common.add(removed).solve())], added.shape)
    extra = join([added, removed])
    _refuse_unsound(extra)
    if isinstance(common, Columns):
        _refuse_unsound(common)
        reached, lifted = _through_columns(common, extra)
    else:
        reached, lifted = _through_sums(common, extra)
    split = len(added)
    gain = _contribution(added, reached[:split], lifted[:split])
    loss = _contribution(removed, reached[split:], lifted[split:])
    return LowRank(np.hstack([gain.B, -loss.B]), np.vstack([gain.A, loss.A]))


def responsibilities(columns: Columns) -> Float[np.ndarray, "n out"]:
    """Rows b_i with D(S) = sum_i b_i u_i^T: request i moves the output at a key k by b_i (u_i^T k).

    Raises:
        EditError: as in `solve`.
    """
    if len(columns) <= SUMS_BEYOND * columns.shape[1]:
        _refuse_unsound(columns)
        scale = _scale(columns)
        found: Float[np.ndarray, "n out"] = scale * _solve_definite(
            _scaled_gram(columns, scale), scale * columns.residuals
        )
        return found
    return _missing(moments([columns], columns.shape).solve(), columns)


def proof(deltas: Sequence[Delta], columns: Columns | Moments) -> float:
    """How far the stored deltas are from the joint solution, relative to their norm; it does not use the solver.

    D is the solution exactly where D = (R - D K) L^-1 U^T (the stationarity condition of the objective), so this is
    ||D - (R - D K) L^-1 U^T|| / ||D||, which is ||D (I + X) - Y|| / ||D|| where sums are given in place of columns. An empty set proves
    itself when D is 0; then the norm of D is returned.
    """
    if isinstance(columns, Columns):
        return proof_in_parts(deltas, columns.shape, [columns])
    total = add(deltas, columns.shape)
    implied = columns.Y - image(total, columns.X.T).T
    return _relative(norm(add([total, Dense(-implied)], columns.shape)), norm(total))


def proof_in_parts(deltas: Sequence[Delta], shape: tuple[int, int], parts: Iterable[Columns]) -> float:
    """`proof` of a set that is read part by part, of which one is held at a time."""
    total = add(deltas, shape)
    rest = total
    for columns in parts:
        for part in blocks(columns):
            rest = add([rest, LowRank(-_missing(total, part).T, _f64(part.preimages))], shape)
    return _relative(norm(rest), norm(total))


def _relative(distance: float, size: float) -> float:
    return distance / size if size else distance


def _missing(delta: Delta, columns: Columns) -> Float[np.ndarray, "n out"]:
    """(r - D k) / lambda of each row."""
    missing: Float[np.ndarray, "n out"] = columns.residuals - image(delta, columns.keys)
    missing /= _f64(columns.ridge)[:, None]
    return missing


def _refuse_unsound(columns: Columns) -> None:
    for part in blocks(columns):
        arrays = (part.keys, part.preimages, part.residuals, part.ridge)
        if not all(np.isfinite(array).all() for array in arrays) or (part.ridge <= 0).any():
            raise EditError(
                "recorded columns are not finite, or have lambda <= 0",
                remedy="Check the settings (lambda > 0) and the base's weights for values that are not finite.",
            )


def _accumulate(X: Float[np.ndarray, "in in"], Y: Float[np.ndarray, "out in"], part: Columns, sign: float) -> None:
    """Add a block of columns to the sums, in place, or take it off."""
    _refuse_unsound(part)
    preimages = _f64(part.preimages) * (sign / _f64(part.ridge))[:, None]
    X += _f64(part.keys).T @ preimages
    Y += _f64(part.residuals).T @ preimages


def _through_columns(common: Columns, extra: Columns) -> tuple[Float[np.ndarray, "x out"], Float[np.ndarray, "x in"]]:
    """D_c k and (I + X_c)^-T u of each further column, by way of the n x n matrix of the common ones."""
    out = extra.shape[0]
    keys, preimages = _f64(extra.keys), _f64(extra.preimages)
    if not len(common) or not len(extra):
        return np.zeros((len(extra), out)), preimages
    scale = _scale(common)
    scaled_preimages = scale * common.preimages
    right = np.hstack([scale * common.residuals, (scale * common.keys) @ preimages.T])
    solved = _solve_definite(_scaled_gram(common, scale), right)
    reached = (keys @ scaled_preimages.T) @ solved[:, :out]
    return reached, preimages - solved[:, out:].T @ scaled_preimages


def _through_sums(sums: Moments, extra: Columns) -> tuple[Float[np.ndarray, "x out"], Float[np.ndarray, "x in"]]:
    """The same by way of the common columns' sums."""
    out = extra.shape[0]
    keys, preimages = _f64(extra.keys), _f64(extra.preimages)
    if not len(sums) or not len(extra):
        return np.zeros((len(extra), out)), preimages
    solved = _solve(_plus_identity(sums.X).T, np.hstack([sums.Y.T, preimages.T]))
    return keys @ solved[:, :out], solved[:, out:].T


def _contribution(extra: Columns, reached: Float[np.ndarray, "x out"], lifted: Float[np.ndarray, "x in"]) -> LowRank:
    scale = _scale(extra)
    gram = _plus_identity((scale * extra.keys) @ (scale * lifted).T)
    return LowRank((scale * _solve_definite(gram, scale * (extra.residuals - reached))).T, lifted)


def _scale(columns: Columns) -> Float[np.ndarray, "n 1"]:
    """lambda^-1/2, which takes very different lambdas out of the condition of L + U^T K."""
    scale: Float[np.ndarray, "n 1"] = 1 / np.sqrt(_f64(columns.ridge))[:, None]
    return scale


def _scaled_gram(columns: Columns, scale: Float[np.ndarray, "n 1"]) -> Float[np.ndarray, "n n"]:
    """I + L^-1/2 K^T U L^-1/2, whose rows belong to keys."""
    return _plus_identity((scale * columns.keys) @ (scale * columns.preimages).T)


def _plus_identity(matrix: Float[np.ndarray, "n n"]) -> Float[np.ndarray, "n n"]:
    result: Float[np.ndarray, "n n"] = matrix.copy()
    result.flat[:: len(result) + 1] += 1.0
    return result


def _solve_definite(matrix: Float[np.ndarray, "n n"], right: Float[np.ndarray, "n m"]) -> Float[np.ndarray, "n m"]:
    """M^-1 B, M symmetric and positive definite but for the rounding of what it was made from; refused where that spoils it."""
    try:
        np.linalg.cholesky((matrix + matrix.T) / 2)
    except LinAlgError as error:
        raise _indefinite() from error
    return _solve(matrix, right)


def _solve(matrix: Float[np.ndarray, "n n"], right: Float[np.ndarray, "n m"]) -> Float[np.ndarray, "n m"]:
    try:
        solved: Float[np.ndarray, "n m"] = np.linalg.solve(matrix, right)
    except LinAlgError as error:
        raise _indefinite() from error
    if not np.isfinite(solved).all():
        raise _indefinite()
    return solved


def _indefinite() -> EditError:
    return EditError(
        "the recorded columns do not have a positive definite Gram matrix",
        remedy="Raise lambda: the requests' keys are too much alike for the precision of what is stored.",
    )


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
