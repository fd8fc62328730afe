"""A state as a set of columns: the solve is the textbook formula, and every law that version control rests on holds."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from patchhub.constraints import Columns, difference, join, no_columns, proof, solve
from patchhub.delta import Delta, LowRank, from_factors, to_dense
from patchhub.errors import EditError

SEEDS = st.integers(0, 2**32 - 1)
SHAPE = (24, 40)  # (out, in)
TIGHT = 1e-6  # relative; what the design promises of sums of stored changes
PROVEN = 1e-5  # the proof at the solution: rounding of k and u apart and of the change, seen through a C^-1 of 1e4


def metric(rng: np.random.Generator, inner: int = SHAPE[1]) -> np.ndarray:
    """A second moment with a spectrum over four decades, as the keys of real models have."""
    basis = np.linalg.qr(rng.standard_normal((inner, inner)))[0]
    moment: np.ndarray = (basis * np.logspace(0, -4, inner)) @ basis.T
    return moment


def draw_columns(rng: np.random.Generator, n: int, C: np.ndarray, out: int = SHAPE[0]) -> Columns:
    """n columns with keys of covariance C, every array rounded to float32 first, as they are stored."""
    keys = (rng.standard_normal((n, len(C))) @ np.linalg.cholesky(C).T).astype(np.float32)
    preimages = np.linalg.solve(C, keys.T.astype(np.float64)).T.astype(np.float32)
    ridge = (len(C) * rng.uniform(0.05, 1.0, n)).astype(np.float32)
    return Columns(keys, preimages, rng.standard_normal((n, out)).astype(np.float32), ridge)


def textbook(columns: Columns, C: np.ndarray) -> np.ndarray:
    """R L^-1 K^T (C + K L^-1 K^T)^-1, dense, with columns of K and R as the paper writes them."""
    K, R = columns.keys.T.astype(np.float64), columns.residuals.T.astype(np.float64)
    inverse = np.diag(1 / columns.ridge.astype(np.float64))
    return R @ inverse @ K.T @ np.linalg.inv(C + K @ inverse @ K.T)


def distance(a: Delta | np.ndarray, b: Delta | np.ndarray) -> float:
    """Relative distance in the Frobenius norm."""
    x, y = (m if isinstance(m, np.ndarray) else to_dense(m) for m in (a, b))
    return float(np.linalg.norm(x - y) / max(float(np.linalg.norm(y)), 1e-30))


def stored(change: LowRank) -> Delta:
    """A change as a commit keeps it: rounded to float32."""
    return from_factors(change.B, change.A)


@settings(deadline=None)
@given(SEEDS, st.integers(1, 60))
def test_the_solve_is_the_textbook_formula(seed, n):
    rng = np.random.default_rng(seed)
    C = metric(rng)
    columns = draw_columns(rng, n, C)
    assert distance(solve(columns), textbook(columns, C)) < 1e-5  # u is rounded, C is not


def test_the_solve_is_the_least_squares_solution():
    """The objective itself, stacked: rows sqrt(C) for D C^(1/2) = 0 and k_i / sqrt(lambda_i) for D k_i = r_i."""
    rng = np.random.default_rng(0)
    C = metric(rng)
    columns = draw_columns(rng, 12, C)
    weight = 1 / np.sqrt(columns.ridge.astype(np.float64))[:, None]
    design = np.vstack([np.linalg.cholesky(C).T, columns.keys * weight])
    wanted = np.vstack([np.zeros((SHAPE[1], SHAPE[0])), columns.residuals * weight])
    assert distance(solve(columns), np.linalg.lstsq(design, wanted, rcond=None)[0].T) < 1e-5


def test_one_column_and_more_columns_than_inputs():
    rng = np.random.default_rng(1)
    C = metric(rng)
    one = draw_columns(rng, 1, C)
    gain = float(one.keys[0].astype(np.float64) @ one.preimages[0])
    expected = np.outer(one.residuals[0].astype(np.float64), one.preimages[0]) / (gain + float(one.ridge[0]))
    assert distance(solve(one), expected) < 1e-12
    many = draw_columns(rng, 3 * SHAPE[1], C)
    assert distance(solve(many), textbook(many, C)) < 1e-4


@pytest.mark.parametrize("n", [1, 63, 64, 65, 127, 128, 129, 200])
def test_every_size_of_the_blocked_substitution(n):
    rng = np.random.default_rng(n)
    C = metric(rng, 256)
    columns = draw_columns(rng, n, C, out=5)
    assert distance(solve(columns), textbook(columns, C)) < 1e-5
    half = n // 2
    common, added = columns.take(range(half)), columns.take(range(half, n))
    grown = np.asarray(to_dense(solve(common)) + to_dense(difference(common, added, no_columns(columns.shape))))
    assert distance(grown, solve(columns)) < 1e-9


@settings(deadline=None)
@given(SEEDS, st.integers(2, 30))
def test_order_does_not_matter(seed, n):
    rng = np.random.default_rng(seed)
    columns = draw_columns(rng, n, metric(rng))
    assert distance(solve(columns.take(rng.permutation(n).tolist())), solve(columns)) < 1e-10


@settings(deadline=None)
@given(SEEDS, st.lists(st.integers(0, 12), min_size=2, max_size=5))
def test_the_sum_of_the_stored_changes_of_batches_is_the_joint_solution(seed, sizes):
    rng = np.random.default_rng(seed)
    C = metric(rng)
    batches = [draw_columns(rng, n, C) for n in sizes]
    history, changes = no_columns(SHAPE), []
    for batch in batches:
        changes.append(stored(difference(history, batch, no_columns(SHAPE))))
        history = join([history, batch])
    if len(history):
        total = sum((to_dense(change) for change in changes), np.zeros(SHAPE))
        assert distance(total, solve(history)) < TIGHT
        assert distance(total, textbook(history, C)) < 1e-5
    assert proof(changes, history) < PROVEN


def test_two_branches_merge_to_the_same_state_either_way():
    rng = np.random.default_rng(3)
    C = metric(rng)
    base, ours, theirs = (draw_columns(rng, n, C) for n in (7, 5, 6))
    nothing = no_columns(SHAPE)
    start = to_dense(stored(solve(base)))
    left = start + to_dense(stored(difference(base, ours, nothing)))
    right = start + to_dense(stored(difference(base, theirs, nothing)))
    left = left + to_dense(stored(difference(join([base, ours]), theirs, nothing)))
    right = right + to_dense(stored(difference(join([base, theirs]), ours, nothing)))
    assert distance(left, right) < TIGHT
    assert distance(left, solve(join([theirs, base, ours]))) < TIGHT


@settings(deadline=None)
@given(SEEDS, st.integers(0, 20), st.integers(0, 8), st.integers(0, 8))
def test_a_difference_is_the_difference_of_two_solves(seed, common, added, removed):
    rng = np.random.default_rng(seed)
    C = metric(rng)
    kept, new, old = (draw_columns(rng, n, C) for n in (common, added, removed))
    change = difference(kept, new, old)
    assert (change.shape, change.B.dtype) == (SHAPE, np.float64)
    assert change.rank <= added + removed
    expected = to_dense(solve(join([kept, new]))) - to_dense(solve(join([kept, old])))
    scale = max(np.linalg.norm(to_dense(solve(join([kept, new, old])))), 1e-30)
    assert np.linalg.norm(to_dense(change) - expected) < 1e-9 * scale + 1e-30


@settings(deadline=None)
@given(SEEDS, st.integers(1, 12), st.integers(1, 12))
def test_removing_and_adding_back_returns(seed, kept, taken):
    rng = np.random.default_rng(seed)
    C = metric(rng)
    common, some = draw_columns(rng, kept, C), draw_columns(rng, taken, C)
    nothing = no_columns(SHAPE)
    full = to_dense(stored(solve(join([common, some]))))
    without = full + to_dense(stored(difference(common, nothing, some)))
    assert distance(without, solve(common)) < 10 * TIGHT  # relative to the smaller state that is left
    assert distance(without + to_dense(stored(difference(common, some, nothing))), full) < TIGHT


def test_replacing_a_column_with_itself_changes_nothing():
    rng = np.random.default_rng(4)
    C = metric(rng)
    common, some = draw_columns(rng, 9, C), draw_columns(rng, 4, C)
    change = to_dense(difference(common, some, some))
    assert np.linalg.norm(change) < 1e-12 * np.linalg.norm(to_dense(solve(join([common, some]))))


def test_reverting_is_not_subtracting():
    """The reason for columns: taking A's own change away leaves another state than B's columns alone."""
    rng = np.random.default_rng(5)
    C = metric(rng)
    a, b = draw_columns(rng, 15, C), draw_columns(rng, 15, C)
    both = to_dense(solve(join([a, b])))
    assert distance(both - to_dense(solve(a)), solve(b)) > 0.05
    assert distance(both + to_dense(difference(b, no_columns(SHAPE), a)), solve(b)) < 1e-9


def test_a_small_ridge_reaches_the_residuals_and_a_large_one_leaves_the_weight():
    rng = np.random.default_rng(6)
    C = metric(rng)
    columns = draw_columns(rng, 6, C)
    tiny = Columns(columns.keys, columns.preimages, columns.residuals, np.full(6, 1e-8, np.float32))
    huge = Columns(columns.keys, columns.preimages, columns.residuals, np.full(6, 1e12, np.float32))
    reached = columns.keys.astype(np.float64) @ to_dense(solve(tiny)).T
    assert distance(reached, columns.residuals.astype(np.float64)) < 1e-6
    assert np.linalg.norm(to_dense(solve(huge))) < 1e-6 * np.linalg.norm(to_dense(solve(columns)))


# --- the proof


@settings(deadline=None)
@given(SEEDS, st.integers(1, 30))
def test_the_proof_is_zero_at_the_solution_and_only_there(seed, n):
    rng = np.random.default_rng(seed)
    columns = draw_columns(rng, n, metric(rng))
    solution = stored(solve(columns))
    assert proof([solution], columns) < PROVEN
    assert isinstance(solution, LowRank) or n * sum(SHAPE) >= SHAPE[0] * SHAPE[1]
    noise = rng.standard_normal(SHAPE)
    moved = to_dense(solution) + noise * 1e-3 * np.linalg.norm(to_dense(solution)) / np.linalg.norm(noise)
    assert proof([from_factors(moved, np.eye(SHAPE[1]))], columns) > 1e-4
    assert proof([solution], columns.take(range(n - 1))) > 1e-3
    assert proof([], columns) > 1e-3
    doubled = Columns(columns.keys, columns.preimages, columns.residuals, columns.ridge * np.float32(2))
    assert proof([solution], doubled) > 1e-3


def test_the_proof_takes_the_sum_of_a_history():
    rng = np.random.default_rng(7)
    C = metric(rng)
    batches = [draw_columns(rng, n, C) for n in (4, 3, 5)]
    changes: list[Delta] = []
    for number, batch in enumerate(batches):
        changes.append(stored(difference(join([no_columns(SHAPE), *batches[:number]]), batch, no_columns(SHAPE))))
    everything = join(batches)
    for order in itertools.permutations(changes):
        assert proof(order, everything) < PROVEN
    assert proof(changes[:2], everything) > 1e-3


def test_the_proof_of_an_empty_set_is_the_norm_that_should_not_be_there():
    rng = np.random.default_rng(8)
    change = LowRank(rng.standard_normal((24, 1)), rng.standard_normal((1, 40)))
    assert proof([], no_columns(SHAPE)) == 0.0
    assert proof([change], no_columns(SHAPE)) > 0.1


# --- edges


def test_empty_sets():
    nothing, rng = no_columns(SHAPE), np.random.default_rng(9)
    columns = draw_columns(rng, 3, metric(rng))
    assert (len(nothing), nothing.shape, columns.shape) == (0, SHAPE, SHAPE)
    assert solve(nothing).rank == 0
    assert difference(columns, nothing, nothing).rank == 0
    assert distance(solve(join([nothing, columns, nothing])), solve(columns)) == 0.0
    assert distance(solve(columns.take([])), np.zeros(SHAPE)) == 0.0
    assert join([columns.take([2]), columns.take([0, 1])]).keys.tolist() == columns.keys[[2, 0, 1]].tolist()


def broken(columns: Columns, what: str) -> Columns:
    parts = {name: getattr(columns, name).copy() for name in ("keys", "preimages", "residuals", "ridge")}
    if what == "ridge 0":  # only visible where the Gram matrix alone is singular
        parts["ridge"][:] = 0
        parts["keys"][1], parts["preimages"][1] = parts["keys"][0], parts["preimages"][0]
    elif what == "ridge negative":
        parts["ridge"][:] = -1e6
    elif what == "ridge not a number":
        parts["ridge"][1] = np.nan
    else:
        parts[what][1, 2] = np.nan
    return Columns(**parts)


@pytest.mark.parametrize(
    "what",
    [
        "ridge 0",
        "ridge negative",
        "ridge not a number",
        "keys",
        "preimages",
        "residuals",
    ],
)
@pytest.mark.parametrize("place", ["solve", "common", "added", "removed"])
def test_columns_that_cannot_be_solved_are_refused(what, place):
    rng = np.random.default_rng(10)
    C = metric(rng)
    good, nothing = draw_columns(rng, 4, C), no_columns(SHAPE)
    bad = broken(draw_columns(rng, 3, C), what)
    sets = {
        "solve": (nothing, bad, nothing),
        "common": (bad, good, nothing),
        "added": (good, bad, nothing),
        "removed": (good, nothing, bad),
    }
    with pytest.raises(EditError) as caught:
        difference(*sets[place])
    assert caught.value.remedy


def test_ridge_zero_with_independent_keys_is_refused():
    """lambda <= 0 has no meaning in the objective, also where the Gram matrix happens to be invertible."""
    rng = np.random.default_rng(12)
    columns = draw_columns(rng, 3, metric(rng))
    with pytest.raises(EditError):
        solve(Columns(columns.keys, columns.preimages, columns.residuals, np.zeros(3, np.float32)))


def test_nothing_is_changed_in_place():
    rng = np.random.default_rng(13)
    C = metric(rng)
    sets = [draw_columns(rng, n, C) for n in (5, 3, 2)]
    before = [[getattr(s, name).copy() for name in ("keys", "preimages", "residuals", "ridge")] for s in sets]
    proof([difference(*sets)], sets[0])
    after = [[getattr(s, name) for name in ("keys", "preimages", "residuals", "ridge")] for s in sets]
    for old, new in zip(itertools.chain(*before), itertools.chain(*after), strict=True):
        np.testing.assert_array_equal(old, new)
