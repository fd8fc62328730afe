"""Laws of the sums of a set: they follow from the history alone, kept or not, and are those of all its columns."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from patchhub.constraints import join, moments, no_columns, proof
from patchhub.delta import add, negative, norm
from patchhub.objects import Element
from patchhub.porcelain.change import revert
from patchhub.sets import sums
from patchhub.sets.columns import read_columns, read_state, weight_shapes
from patchhub.sets.sums import asked_for, solve_change, sums_at, sums_near
from patchhub.store.fsck import check
from patchhub.store.store import Store
from patchhub.who import Who
from tests.porcelain import taught
from tests.porcelain.synthetic import SHAPES, Synthetic, make_request, make_store

INNER = 24
MANY = 3 * INNER  # facts, so that every later set is solved by its sums


@pytest.fixture(autouse=True)
def every_sum_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sums, "WORTH", 0)
    monkeypatch.setattr(sums, "STEP", 4)


def requests(start: int, count: int) -> list:
    return [make_request(f"Person {number}") for number in range(start, start + count)]


def grow(store: Synthetic, steps: int = 14, *, forget: bool = False) -> list[str]:
    """A history that adds facts and takes some back; with `forget`, nothing is kept from one commit to the next."""
    rng = np.random.default_rng(7)
    made = [store.commit(*requests(0, MANY))]
    for step in range(steps):
        if forget:
            shutil.rmtree(store.repository.cache.folder, ignore_errors=True)
        active = sorted(store.active())
        gone = [active[row] for row in rng.choice(len(active), step % 3, replace=False)]
        made.append(store.commit(*requests(MANY + 3 * step, 3), remove=gone))
    return made


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Synthetic]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sums, "WORTH", 0)
        patch.setattr(sums, "STEP", 4)
        store = make_store(tmp_path_factory.mktemp("grown"))
        grow(store)
        yield store


def test_a_history_has_the_same_ids_whether_its_sums_were_kept_or_not(tmp_path: Path) -> None:
    kept, forgotten = (make_store(tmp_path / name) for name in ("kept", "forgotten"))
    assert grow(kept) == grow(forgotten, forget=True)
    assert list((kept.repository.cache.folder / "sums").iterdir())


def test_the_sums_of_a_commit_are_the_same_bits_from_whatever_is_kept(grown: Synthetic, tmp_path: Path) -> None:
    shutil.copytree(grown.repository.root, tmp_path / ".patchhub")
    with Store.open(tmp_path) as store:
        tip = store.resolve("HEAD")
        wanted = sums_at(store, tip)
        folders = sorted((store.cache.folder / "sums").iterdir())
        for lost in ([], [tip], folders[::2], folders):
            for one in lost:
                name = one if isinstance(one, str) else one.name
                for folder in (store.cache.folder / "sums").glob(f"{name}*"):
                    shutil.rmtree(folder)
            found = sums_at(store, tip)
            for weight, part in wanted.items():
                assert found[weight].X.tobytes() == part.X.tobytes()
                assert found[weight].Y.tobytes() == part.Y.tobytes()


def test_sums_are_those_of_all_columns_and_their_rounding_is_known(grown: Synthetic) -> None:
    store = grown.repository
    columns = read_columns(store, grown.active())
    for weight, found in sums_at(store, store.resolve("HEAD")).items():
        whole = moments([columns[weight]], SHAPES[weight])
        assert len(found) == len(columns[weight])
        for ours, theirs in ((found.X, whole.X), (found.Y, whole.Y)):
            assert np.linalg.norm(ours - theirs) <= 10 * found.error * np.linalg.norm(theirs)
        assert found.error < sums.FORM_ANEW


def test_a_change_from_kept_sums_is_the_change_from_all_columns(grown: Synthetic) -> None:
    store, tip = grown.repository, grown.repository.resolve("HEAD")
    before = grown.active()
    patch = grown.put_patch(requests(900, 2), made_on=before)
    after = frozenset(sorted(before)[2:]) | patch.elements
    near, far = (solve_change(store, before, after, near=commit) for commit in (tip, None))
    assert near.keys() == far.keys() == SHAPES.keys()
    for weight, change in near.items():
        assert norm(add([change, negative(far[weight])], SHAPES[weight])) < 1e-9 * norm(change)


def test_the_stored_proof_is_that_of_all_columns(grown: Synthetic) -> None:
    store, tip = grown.repository, grown.repository.resolve("HEAD")
    columns, state = read_columns(store, grown.active()), read_state(store, tip)
    for weight, told in store.commit(tip).check["proof"].items():
        assert told == pytest.approx(proof(state[weight], columns[weight]), rel=1e-6, abs=1e-12)
        assert told < 1e-4


def test_columns_of_the_others_are_not_read(grown: Synthetic, tmp_path: Path) -> None:
    shutil.copytree(grown.repository.root, tmp_path / ".patchhub")
    with Store.open(tmp_path) as store:
        tip = store.resolve("HEAD")
        before, fresh = store.active(tip), max(p for p, _ in store.commit(tip).added)
        sums_at(store, tip)
        for patch in {patch for patch, _ in before} - {fresh}:
            (store.objects.path(store.patch(patch).tensors)).unlink()
        gone = frozenset(element for element in before if element[0] == fresh)
        assert solve_change(store, before, before - gone, near=tip).keys() == SHAPES.keys()
        assert asked_for(store, tip, before - gone, {}).keys() == SHAPES.keys()


def test_sets_of_few_columns_are_read_as_columns(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    tip = store.commit(*requests(0, INNER))
    found = asked_for(store.repository, tip, store.active(), {})
    assert all(len(found[weight].keys) == INNER for weight in SHAPES)
    assert not (store.repository.cache.folder / "sums").exists()


def test_what_was_taken_back_leaves_no_rounding_behind(grown: Synthetic, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where more rounding error would be left than allowed, sums are formed anew."""
    store, tip = grown.repository, grown.repository.resolve("HEAD")
    some = frozenset(sorted(grown.active())[: 2 * MANY // 3])
    monkeypatch.setattr(sums, "FORM_ANEW", 0.0)
    whole = sums_near(store, None, some)
    for weight, found in sums_near(store, tip, some).items():
        assert found.X.tobytes() == whole[weight].X.tobytes()


def test_reading_whole_is_paid_for_by_what_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many facts are active, a commit reads few columns besides its own, on the whole."""
    store, read = make_store(tmp_path), []
    original = sums.read_patches

    def counted(repository: Store, elements: frozenset[Element]) -> Iterator[dict]:
        for part in original(repository, elements):
            read.append(len(next(iter(part.values()))))
            yield part

    monkeypatch.setattr(sums, "read_patches", counted)
    store.commit(*requests(0, MANY))
    read.clear()
    steps = 40
    for step in range(steps):
        store.commit(*requests(MANY + step, 1))
    assert sum(read) <= steps * (2 * (sums.STEP + 1) + 4)


def test_additive_deltas_below_are_taken_off_the_sums(grown: Synthetic) -> None:
    store, tip = grown.repository, grown.repository.resolve("HEAD")
    below = {weight: list(deltas) for weight, deltas in read_state(store, tip).items()}  # any will do
    found = asked_for(store, tip, grown.active(), below)
    columns = read_columns(store, grown.active())
    for weight, part in found.items():
        solved = [part.solve()]
        assert proof(solved, sums.columns_beside(store, grown.active(), below)[weight]) < 1e-9
        assert len(part) == len(columns[weight])
        assert no_columns(weight_shapes(store)[weight]).shape == part.shape


def test_columns_read_a_few_at_a_time_are_all_columns(grown: Synthetic, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sums, "_ROWS", 10)
    store, whole = grown.repository, read_columns(grown.repository, grown.active())
    found = sums.recorded_columns(store, grown.active())
    for _ in range(2):
        parts: dict[str, list] = {}
        for weight, part in found:
            assert len(part) < MANY + 10, "a patch and less than a block"
            parts.setdefault(weight, []).append(part)
        assert parts.keys() == whole.keys()
        for weight, some in parts.items():
            joined = join(some)
            assert joined.labels == whole[weight].labels
            assert joined.keys.tobytes() == whole[weight].keys.tobytes()
            assert joined.residuals.tobytes() == whole[weight].residuals.tobytes()


@pytest.mark.slow
def test_facts_are_recorded_on_sums_as_on_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model's facts, added to and taken back, by whichever way the state is solved."""
    taught.make_store(tmp_path / "columns").close()
    shutil.copytree(tmp_path / "columns", tmp_path / "sums")
    found = []
    for name, beyond in (("columns", 1.0), ("sums", 0.0)):
        monkeypatch.setattr(sums, "SUMS_BEYOND", beyond)
        with Store.open(tmp_path / name) as store:
            taught.teach(store, [("Paris", "Dutch"), ("Rome is where the city", "Milan")], "two more")
            revert(store, None, Who(taught.AUTHOR, taught.TIME, "back"), subjects=["Manila"])
            shapes = weight_shapes(store)
            state = {w: add(d, shapes[w]) for w, d in read_state(store, store.head[1]).items()}
            found.append((sorted(str(request) for _, request in store.active(store.head[1])), state))
            assert any(store.cache.folder.glob("sums/*")) == (name == "sums")
            assert check(store).sound
    (facts, plain), (same, summed) = found
    assert facts == same
    for weight, delta in plain.items():
        assert norm(add([delta, negative(summed[weight])], delta.shape)) < 1e-4 * norm(delta)
