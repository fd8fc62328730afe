"""The guard without a model: misfits of contradictory and of crushed facts, the cast, singular values, and what a refusal leaves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from patchhub.delta import Delta, Dense, LowRank, add, from_sparse, to_dense, write_deltas
from patchhub.errors import GuardError
from patchhub.evaluation.guard import Measured, Report, Share
from patchhub.models.checkpoint import open_checkpoint
from patchhub.models.structure import Orientation
from patchhub.objects import Patch, Request, requests_json
from patchhub.porcelain import refs
from patchhub.porcelain.change import revert
from patchhub.porcelain.merge import Merged, merge
from patchhub.porcelain.refs import config_set
from patchhub.runtime import compose
from patchhub.sets.columns import read_state
from patchhub.sets.commits import Draft, prepare
from patchhub.sets.guard import (
    from_vectors,
    largest_of_delta,
    largest_singular_value,
    most_moved,
    open_weight,
    prepared,
    survival,
)
from patchhub.worktree.judging import Guarding
from tests.porcelain.synthetic import BY, SHAPES, Synthetic, make_request, make_store, stamp, write

NAMES = [f"person {number}" for number in range(5)]


@pytest.fixture
def store(tmp_path: Path) -> Synthetic:
    return make_store(tmp_path)


def look(store: Synthetic, *requests: Request) -> Measured:
    """What the guard measures of a commit of those requests on HEAD, which is not written."""
    repository = store.repository
    _, head = repository.head
    before = repository.active(head)
    patch = store.put_patch(requests, made_on=before)
    draft = Draft((head,) if head else (), before | patch.elements, patch.metric, "commit", {})
    return from_vectors(repository, prepared(repository, prepare(repository, draft, stamp())))


def test_facts_that_agree_are_met(store: Synthetic) -> None:
    found = look(store, *map(make_request, NAMES[:3]))
    assert found.unmet == Share(0, 3)
    assert found.crushed == Share(0, 0)


def test_contradicting_facts_that_are_all_kept_are_not(store: Synthetic) -> None:
    for target in ("French", "German", "Dutch"):
        store.commit(make_request("Ada", target))
    store.commit(make_request("Bob"))
    found = look(store, make_request("Ada", "Greek"))
    assert found.unmet == Share(4, 4)
    assert found.crushed == Share(0, 1)


def test_what_is_prepared_is_what_is_recorded(store: Synthetic) -> None:
    store.commit(*map(make_request, NAMES[:2]))
    repository = store.repository
    before = store.active()
    patch = store.put_patch([make_request("Eve")], made_on=before)
    draft = Draft((repository.head[1],), before | patch.elements, patch.metric, "commit", {})
    found = prepared(repository, prepare(repository, draft, stamp("x")))
    identity = repository.record(found.commit, command="commit", arguments={}, author=BY.author, time=BY.time)
    state = read_state(repository, identity)
    assert found.elements == repository.active(identity)
    assert state.keys() == found.after.keys()
    for weight, shape in SHAPES.items():
        assert np.array_equal(to_dense(add(state[weight], shape)), to_dense(add(found.after[weight], shape)))


def test_facts_beside_an_imported_change_are_held_against_the_whole_state(store: Synthetic) -> None:
    """Their columns are solved on top of it, so facts of before and of after it get what they ask for."""
    store.commit(*map(make_request, NAMES))
    repository, rng = store.repository, np.random.default_rng(1)
    deltas = {weight: Dense(0.7 * rng.standard_normal(shape).astype(np.float32)) for weight, shape in SHAPES.items()}
    patch = Patch(
        base=repository.config.base_id,
        kind="additive",
        made_on=None,
        method="difference",
        metric=None,
        requests=(),
        requests_blob=repository.objects.put(requests_json(())),
        settings={},
        tensors=repository.objects.put(write_deltas(deltas)),
        weights=SHAPES,
    )
    repository.objects.put(patch.to_json())
    _, head = repository.head
    metric = repository.commit(str(head)).metric
    draft = Draft((str(head),), store.active() | patch.elements, metric, "import", {"patch": patch.id})
    found = from_vectors(repository, prepared(repository, prepare(repository, draft, stamp())))
    assert (found.unmet, found.crushed) == (Share(0, 0), Share(0, len(NAMES)))
    write(repository, draft, stamp())
    found = look(store, make_request("Eve"), make_request("Zoe"))
    assert (found.unmet, found.crushed) == (Share(0, 2), Share(0, len(NAMES)))


def test_those_that_the_change_moves_most_come_first(store: Synthetic) -> None:
    """A fact with nearly the key of the new one is moved more than those with keys of their own."""
    store.commit(*map(make_request, NAMES))
    for keys in store.keys.values():
        keys[make_request("twin").text] = keys[make_request(NAMES[3]).text] * 0.98
    repository, before = store.repository, store.active()
    patch = store.put_patch([make_request("twin", "Greek")], made_on=before)
    draft = Draft((repository.head[1],), before | patch.elements, patch.metric, "commit", {})
    found = prepared(repository, prepare(repository, draft, stamp()))
    assert most_moved(repository, found, before)[0][1] == make_request(NAMES[3]).id


def test_a_merge_that_crushes_facts_is_refused_and_can_be_forced(store: Synthetic) -> None:
    repository = store.repository
    store.commit(make_request("common"))
    refs.create_branch(repository, "side", "HEAD", BY)
    store.commit(*map(make_request, NAMES))
    refs.switch(repository, "side", BY)
    for keys in store.keys.values():
        for name in NAMES:
            keys[make_request(name, prompt="{} speaks").text] = -1.5 * keys[make_request(name).text]
    store.commit(*(make_request(name, "Greek", "{} speaks") for name in NAMES))
    refs.switch(repository, "main", BY)
    config_set(repository, "guard.misfit", "0.2")
    head = repository.head
    with pytest.raises(GuardError) as caught:
        merge(repository, "side", stamp())
    assert caught.value.exit_code == 10
    assert "guard.misfit" in caught.value.message
    assert "--force" in str(caught.value.remedy)
    assert caught.value.facts["findings"][0]["check"] == "misfit"
    assert repository.head == head
    done = merge(repository, "side", stamp(), guarding=Guarding(force=True))
    assert isinstance(done, Merged)
    report = Report.from_json(repository.commit(str(done.commit)).check)
    assert report is not None
    assert report.forced
    assert "less than half" in report.failed[0]


def test_a_state_that_was_there_before_is_not_measured_again(store: Synthetic) -> None:
    first = store.commit(make_request("Ada"))
    store.commit(make_request("Bob"))
    config_set(store.repository, "guard.misfit", "0")
    done = revert(store.repository, "HEAD", stamp())
    assert done.same_as == first
    report = Report.from_json(store.repository.commit(done.commit).check)
    assert report is not None
    assert report.measured.unmet is None
    assert not report.forced


# --- the base's files -----------------------------------------------------------------------------------------------

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@pytest.mark.parametrize("orientation", ["out_in", "in_out"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.03, 1.0])
def test_survival_is_that_of_the_composed_weight(
    tmp_path: Path, dtype: torch.dtype, orientation: Orientation, scale: float
) -> None:
    rng = np.random.default_rng(3)
    stored = torch.from_numpy(rng.standard_normal((14, 10))).to(dtype)
    shape = (14, 10) if orientation == "out_in" else (10, 14)
    low = LowRank(*(scale * rng.standard_normal(size).astype(np.float32) for size in ((shape[0], 2), (2, shape[1]))))
    sparse = from_sparse((rng.random(shape) < 0.2) * scale * rng.standard_normal(shape).astype(np.float32))
    weight = open_weight(checkpoint_of(tmp_path, stored), "w", orientation)
    assert weight is not None
    for deltas in ([low], [low, sparse], [Dense(to_dense(low).astype(np.float32))]):
        composed = compose.compose(stored, deltas, orientation=orientation, dtype=dtype)
        expected = compose.survival(stored, deltas, composed, orientation=orientation)
        assert survival(weight, deltas) == pytest.approx(max(expected, 0.0), abs=1e-3)


def test_survival_on_some_rows_is_near_that_on_all(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    stored = torch.from_numpy(rng.standard_normal((600, 40))).to(torch.bfloat16)
    delta: Delta = Dense(1e-3 * rng.standard_normal((600, 40)).astype(np.float32))
    weight = open_weight(checkpoint_of(tmp_path, stored), "w", "out_in")
    assert weight is not None
    assert survival(weight, [delta], entries=4000) == pytest.approx(survival(weight, [delta]), abs=0.03)


def test_a_change_beyond_the_type_does_not_survive(tmp_path: Path) -> None:
    weight = open_weight(checkpoint_of(tmp_path, torch.ones(3, 2, dtype=torch.float16)), "w", "out_in")
    assert weight is not None
    assert survival(weight, [Dense(np.full((3, 2), 1e6, np.float32))]) == 0.0


def test_a_change_that_is_rounding_errors_is_not_judged(tmp_path: Path) -> None:
    weight = open_weight(checkpoint_of(tmp_path, torch.ones(3, 2, dtype=torch.float16)), "w", "out_in")
    assert weight is not None
    assert survival(weight, [Dense(np.full((3, 2), 5e-7, np.float32))]) == 1.0
    assert survival(weight, [Dense(np.full((3, 2), 5e-6, np.float32))]) == 0.0


def test_bfloat16_is_rounded_as_torch_rounds_it(tmp_path: Path) -> None:
    bits = torch.arange(0, 1 << 31, 9973, dtype=torch.int64).to(torch.int32)
    values = bits.view(torch.float32)
    values = values[values.isfinite() & (values < 3e38)].reshape(1, -1)
    weight = open_weight(checkpoint_of(tmp_path, torch.zeros(1, 1, dtype=torch.bfloat16)), "w", "out_in")
    assert weight is not None
    assert np.array_equal(weight.kind.rounded(values.numpy()), values.bfloat16().float().numpy())


def test_types_that_are_not_read_are_left_out(tmp_path: Path) -> None:
    assert open_weight(checkpoint_of(tmp_path, torch.ones(2, 2, dtype=torch.float64)), "w", "out_in") is None


def test_largest_singular_values_are_those_of_an_svd() -> None:
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((30, 12)).astype(np.float32)
    assert largest_singular_value(matrix) == pytest.approx(np.linalg.norm(matrix, 2), rel=0.02)
    low = LowRank(rng.standard_normal((30, 3)), rng.standard_normal((3, 12)))
    for delta in (low, Dense(to_dense(low)), from_sparse(to_dense(low))):
        assert largest_of_delta(delta) == pytest.approx(np.linalg.norm(to_dense(low), 2), rel=0.02)
    assert largest_of_delta(LowRank(np.zeros((4, 0)), np.zeros((0, 5)))) == 0.0
    for stored in (np.float32, np.float16):  # as they are, though a step of float16 would overflow
        narrow = LowRank((200 * low.B).astype(stored), (200 * low.A).astype(stored))
        assert largest_of_delta(narrow) == pytest.approx(4e4 * np.linalg.norm(to_dense(low), 2), rel=0.02)


def checkpoint_of(folder: Path, tensor: torch.Tensor):
    save_file({"w": tensor}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return open_checkpoint(folder)
