"""A state as a set of columns: the solve is the textbook formula, and every law that version control rests on holds.

Every test runs three times: with the sizes at which the solve changes from the requests' space to the inputs' as they are, and with either
alone.
"""

from __future__ import annotations

import itertools
import math
import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from patchhub import constraints
from patchhub.constraints import (
    FORM_ANEW,
    Columns,
    Moments,
    blocks,
    difference,
    join,
    moments,
    no_columns,
    no_moments,
    proof,
    proof_in_parts,
    responsibilities,
    rounded,
    solve,
)
from patchhub.delta import Delta, Dense, LowRank, compact, from_factors, to_dense
from patchhub.errors import EditError

SEEDS = st.integers(0, 2**32 - 1)
SHAPE = (24, 40)  # (out, in)
TIGHT = 1e-6  # relative; what the design promises of sums of stored changes
PROVEN = 1e-5  # the proof at the solution: rounding of k and u apart and of the change, seen through a C^-1 of 1e4


@pytest.fixture(scope="module", autouse=True, params=["either", "requests", "inputs"])
def space(request: pytest.FixtureRequest) -> Iterator[str]:
    """Which space everything is solved in."""
    beyond = {"either": constraints.SUMS_BEYOND, "requests": math.inf, "inputs": 0.0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constraints, "SUMS_BEYOND", beyond[request.param])
        yield request.param


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


def norm_of(change: Delta) -> float:
    return float(np.linalg.norm(to_dense(change)))


def stored(change: Delta) -> Delta:
    """A change as a commit keeps it: rounded to float32."""
    return compact(change)


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
    assert change.shape == SHAPE
    if isinstance(change, LowRank):
        assert change.B.dtype == np.float64
        assert change.rank <= added + removed
    else:
        assert (added + removed) * sum(SHAPE) >= math.prod(SHAPE)
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
    assert norm_of(solve(nothing)) == norm_of(difference(columns, nothing, nothing)) == 0.0
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


# --- the two spaces, and sums over a set


SIZES = st.one_of(st.integers(0, 3), st.integers(SHAPE[1] - 1, SHAPE[1] + 1), st.integers(4, 400))
SPREAD = [1e-3, 1.0, 40.0, 1e6]


def both_ways(common: Columns, added: Columns, removed: Columns) -> list[Delta]:
    found = []
    for beyond in (math.inf, 0.0):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(constraints, "SUMS_BEYOND", beyond)
            found.append(difference(common, added, removed))
    return found


def with_ridge(columns: Columns, ridge: np.ndarray) -> Columns:
    return Columns(columns.keys, columns.preimages, columns.residuals, ridge.astype(np.float32))


def alike(rng: np.random.Generator, columns: Columns, C: np.ndarray, distance: float) -> Columns:
    """The same residuals at keys that all lie that near to the first one, relative to its length."""
    first = columns.keys[:1].astype(np.float64)
    away = rng.standard_normal(columns.keys.shape) * distance * np.linalg.norm(first) / math.sqrt(first.size)
    keys = (first + away).astype(np.float32)
    preimages = np.linalg.solve(C, keys.T.astype(np.float64)).T.astype(np.float32)
    return Columns(keys, preimages, columns.residuals, columns.ridge)


def assert_same(a: Moments, b: Moments, tolerance: float) -> None:
    assert len(a) == len(b)
    for one, other in ((a.X, b.X), (a.Y, b.Y)):
        assert np.linalg.norm(one - other) <= tolerance * np.linalg.norm(other)


@settings(deadline=None)
@given(SEEDS, SIZES, st.integers(0, 3), st.integers(0, 3))
def test_both_spaces_give_the_same_change(seed, common, added, removed):
    """Also where lambdas lie nine decades apart: so a history may pass from one space to the other."""
    rng = np.random.default_rng(seed)
    C = metric(rng)
    sets = [draw_columns(rng, n, C) for n in (common, added, removed)]
    mixed = [with_ridge(columns, rng.choice(SPREAD, len(columns))) for columns in sets]
    for columns, tolerance in ((sets, 1e-10), (mixed, TIGHT)):
        by_requests, by_inputs = both_ways(*columns)
        scale = norm_of(solve(join(columns))) if sum(map(len, columns)) else 1.0
        assert np.linalg.norm(to_dense(by_requests) - to_dense(by_inputs)) <= tolerance * scale


@settings(deadline=None)
@given(SEEDS, st.integers(2, 200), st.sampled_from([0.0, 1e-6, 1e-3]))
def test_nearly_equal_keys_share_what_they_ask_for(seed, n, distance_of_keys):
    """Equal keys are one request: the mean of the residuals at 1/lambda = the sum of the 1/lambdas."""
    rng = np.random.default_rng(seed)
    C = metric(rng)
    columns = alike(rng, draw_columns(rng, n, C), C, distance_of_keys)
    by_requests, by_inputs = both_ways(no_columns(SHAPE), columns, no_columns(SHAPE))
    assert distance(by_requests, by_inputs) < TIGHT
    assert distance(by_inputs, textbook(columns, C)) < 1e-4
    if distance_of_keys == 0.0:
        share = 1 / columns.ridge.astype(np.float64)
        mean = (share @ columns.residuals) / share.sum()
        one = Columns(columns.keys[:1], columns.preimages[:1], mean[None], np.array([1 / share.sum()]))
        assert distance(by_inputs, solve(one)) < 1e-9


@pytest.mark.parametrize("n", [SHAPE[1] - 1, SHAPE[1], SHAPE[1] + 1, 5000])
def test_any_number_of_columns_is_solved_and_grows_by_one(n):
    """5,000 columns are several blocks of rows."""
    rng = np.random.default_rng(n)
    C = metric(rng)
    columns, one, nothing = draw_columns(rng, n, C), draw_columns(rng, 1, C), no_columns(SHAPE)
    sums = moments([columns], SHAPE)
    assert distance(sums.solve(), textbook(columns, C)) < 1e-4
    change = difference(sums, one, nothing)
    assert isinstance(change, LowRank)
    assert change.rank == 1
    grown = to_dense(sums.solve()) + to_dense(change)
    assert distance(grown, sums.add(one).solve()) < 1e-11
    back = difference(sums.add(one).without(one), nothing, one)
    assert distance(grown + to_dense(back), sums.solve()) < 1e-11
    if n < 100:
        assert distance(solve(columns), sums.solve()) < 1e-10


@settings(deadline=None)
@given(SEEDS, SIZES, SIZES, SIZES)
def test_sums_may_stand_for_the_common_columns(seed, common, added, removed):
    rng = np.random.default_rng(seed)
    C = metric(rng)
    kept, new, old = (draw_columns(rng, n, C) for n in (common, added, removed))
    change = difference(moments([kept], SHAPE), new, old)
    scale = norm_of(solve(join([kept, new, old])))
    assert np.linalg.norm(to_dense(change) - to_dense(difference(kept, new, old))) <= 1e-9 * scale
    assert isinstance(change, LowRank) == ((added + removed) * sum(SHAPE) < math.prod(SHAPE))


@settings(deadline=None)
@given(SEEDS, st.lists(st.integers(0, 60), min_size=1, max_size=4))
def test_sums_are_those_of_the_set(seed, sizes):
    """In any order, in parts or as a whole; what is taken back leaves what was there."""
    rng = np.random.default_rng(seed)
    C = metric(rng)
    parts = [draw_columns(rng, n, C) for n in sizes]
    whole = moments([join(parts)], SHAPE)
    assert_same(moments(reversed(parts), SHAPE), whole, 1e-13)
    grown, steps = no_moments(SHAPE), []
    for part in parts:
        steps.append(grown)
        grown = grown.add(part)
    assert_same(grown, whole, 1e-13)
    for part, before in zip(reversed(parts), reversed(steps), strict=True):
        grown = grown.without(part)
        assert_same(grown, before, 1e-12)
    assert len(grown) == 0
    assert norm_of(grown.solve()) == 0.0
    assert not grown.X.any()
    assert not grown.Y.any()


@settings(deadline=None)
@given(SEEDS, st.integers(1, 30), st.integers(1, 300), st.sampled_from([1e-9, 1e-6, 1e-3, 1.0]))
def test_the_error_of_sums_is_known(seed, kept, taken, ridge):
    """What was taken back may have been a billion times what is left: then sums have to be formed anew, and say so."""
    rng = np.random.default_rng(seed)
    C = metric(rng)
    left, gone = draw_columns(rng, kept, C), draw_columns(rng, taken, C)
    gone = with_ridge(gone, np.full(taken, ridge))
    fresh = moments([left], SHAPE)
    assert fresh.error < 1e-15
    sums = fresh.add(gone).without(gone)
    actual = max(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in ((sums.X, fresh.X), (sums.Y, fresh.Y)))
    assert actual < 10 * sums.error
    if sums.error < FORM_ANEW:
        assert distance(sums.solve(), fresh.solve()) < 1e-8
    if ridge == 1e-9 and taken > 100:
        assert sums.error > FORM_ANEW


@settings(deadline=None)
@given(SEEDS, SIZES)
def test_the_proof_is_the_same_from_columns_in_parts_and_sums(seed, n):
    rng = np.random.default_rng(seed)
    columns = draw_columns(rng, n, metric(rng))
    exact, other = solve(columns), Dense(rng.standard_normal(SHAPE))
    for deltas in ([exact], [stored(exact)], [exact, other], [other], []):
        expected = proof(deltas, columns)
        parts = [columns.take(range(n // 3)), columns.take(range(n // 3, n))]
        assert proof(deltas, moments([columns], SHAPE)) == pytest.approx(expected, rel=1e-6, abs=1e-9)
        assert proof_in_parts(deltas, SHAPE, parts) == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert proof([exact], columns) < 1e-9


@settings(deadline=None)
@given(SEEDS, SIZES)
def test_responsibilities_add_up_to_the_solution(seed, n):
    rng = np.random.default_rng(seed)
    columns = draw_columns(rng, n, metric(rng))
    shares = responsibilities(columns)
    assert shares.shape == (n, SHAPE[0])
    assert np.linalg.norm(shares.T @ columns.preimages - to_dense(solve(columns))) <= 1e-9 * norm_of(solve(columns))


def test_the_same_columns_in_the_same_order_give_the_same_bits():
    rng = np.random.default_rng(14)
    C = metric(rng)
    for n in (30, 1200):
        columns = draw_columns(rng, n, C)
        again = Columns(*(np.array(getattr(columns, name)) for name in ("keys", "preimages", "residuals", "ridge")))
        np.testing.assert_array_equal(to_dense(solve(columns)), to_dense(solve(again)))


def test_blocks_are_the_rows():
    columns = draw_columns(np.random.default_rng(15), 5000, np.eye(3), out=2)
    assert sum(map(len, blocks(columns))) == 5000
    np.testing.assert_array_equal(join(list(blocks(columns))).keys, columns.keys)
    assert all(part.keys.base is not None for part in blocks(columns))
    assert not list(blocks(no_columns(SHAPE)))


def test_memory_does_not_grow_with_the_columns():
    """Beyond the columns themselves: no array of n rows is made in float64."""
    rng = np.random.default_rng(16)
    keys = rng.standard_normal((60_000, 24)).astype(np.float32)
    columns = Columns(keys, keys, keys[:, :8], np.full(len(keys), 3.0, np.float32))
    peaks = []
    for n in (20_000, 60_000):
        some = Columns(columns.keys[:n], columns.preimages[:n], columns.residuals[:n], columns.ridge[:n])
        tracemalloc.start()
        solution = moments([some], some.shape).solve()
        assert proof([solution], some) < 1e-9
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.05 * peaks[0]
    assert peaks[1] < keys.nbytes


@pytest.mark.parametrize("what", ["ridge 0", "ridge negative", "ridge not a number", "keys", "preimages", "residuals"])
def test_sums_refuse_columns_that_cannot_be_solved(what):
    rng = np.random.default_rng(17)
    C = metric(rng)
    good, bad = draw_columns(rng, 4, C), broken(draw_columns(rng, 3, C), what)
    sums = moments([good], SHAPE)
    nothing = no_columns(SHAPE)
    for attempt in (
        lambda: moments([good, bad], SHAPE),
        lambda: sums.add(bad),
        lambda: sums.without(bad),
        lambda: difference(sums, bad, nothing),
        lambda: difference(sums, nothing, bad),
    ):
        with pytest.raises(EditError):
            attempt()


def test_sums_without_a_solution_are_refused():
    singular = Moments(-np.eye(3), np.ones((2, 3)), 1, (0.0, 0.0))
    overflown = Moments(np.full((3, 3), np.inf), np.ones((2, 3)), 1, (0.0, 0.0))
    for sums in (singular, overflown):
        with pytest.raises(EditError) as caught:
            sums.solve()
        assert caught.value.remedy


def test_columns_are_rounded_to_float16_unless_that_loses_more_than_its_own_rounding():
    rng = np.random.default_rng(18)
    rows = rng.standard_normal((4, 50)) * np.logspace(-2, 3, 50)
    half = rounded(rows)
    assert half.dtype == np.float32
    np.testing.assert_array_equal(half, half.astype(np.float16))
    assert (np.linalg.norm(half - rows, axis=1) <= 2**-11 * np.linalg.norm(rows, axis=1)).all()
    np.testing.assert_array_equal(rounded(np.zeros((2, 5))), 0)
    for beyond_range in (1e6 * rows, 1e-9 * rows, np.vstack([rows, 1e-9 * rows[:1]])):
        np.testing.assert_array_equal(rounded(beyond_range), beyond_range.astype(np.float32))
