"""States without deltas: solved from the columns of their sets, they obey the laws that stored ones do, and some more."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load, save

from patchhub.delta import Dense, add, to_dense, write_deltas
from patchhub.errors import EditError, RepositoryError
from patchhub.objects import Commit, Element, Patch, set_digest
from patchhub.porcelain import refs
from patchhub.porcelain.change import revert
from patchhub.porcelain.merge import merge
from patchhub.porcelain.refs import fsck
from patchhub.progress import Silent
from patchhub.sets import commits
from patchhub.sets.columns import read_columns, read_state, solved
from patchhub.sets.proofs import TOLERANCE, prove
from patchhub.store import states
from patchhub.store.fsck import check, every_commit
from tests.porcelain.synthetic import AUTHOR, BY, SHAPES, TIME, Synthetic, distance, make_request, make_store, stamp

ALL_KEPT = 1 << 40
TIGHT, PROVEN = 1e-6, 1e-5


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Synthetic]:
    """An empty store whose commits keep no delta where they need none."""
    monkeypatch.setattr(commits, "WORTH_KEEPING", 0)
    made = make_store(tmp_path / "store")
    yield made
    made.repository.close()


def commit_at(store: Synthetic, revision: str = "HEAD") -> Commit:
    return store.repository.commit(str(store.repository.resolve(revision)))


def edits(store: Synthetic, count: int = 3) -> None:
    """A few commits of two facts, of which one takes a fact back."""
    for number in range(count):
        gone = sorted(store.active())[:1] if number == 1 else []
        store.commit(make_request(f"Ada {number}"), make_request(f"Bob {number}"), remove=gone)


def test_nothing_is_kept_and_the_state_is_the_solution_of_the_set(store: Synthetic) -> None:
    edits(store)
    for identity in every_commit(store.repository):
        made = store.repository.commit(identity)
        assert (made.solved, made.tensors, made.keyframe) == (True, None, None)
        assert max(made.check["proof"].values()) < PROVEN
    assert distance(store.weights(), store.solution(store.active())) < TIGHT
    assert fsck(store.repository, Silent()).sound


def test_what_is_kept_and_what_is_solved_are_one_history(tmp_path: Path, store: Synthetic, monkeypatch) -> None:
    edits(store)
    monkeypatch.setattr(commits, "WORTH_KEEPING", ALL_KEPT)
    kept = make_store(tmp_path / "kept")
    edits(kept)
    for ago in range(3):
        ours, theirs = (commit_at(one, f"HEAD~{ago}") for one in (store, kept))
        assert (ours.set_digest, theirs.solved) == (theirs.set_digest, False)
        assert distance(store.weights(f"HEAD~{ago}"), kept.weights(f"HEAD~{ago}")) < TIGHT


def test_equal_sets_have_equal_bits_whatever_led_to_them(store: Synthetic) -> None:
    """A stored chain of deltas gives that only where `same_as` says so."""
    root = store.commit(make_request("Ada"), message="root")
    first = store.commit(make_request("Bob"))
    refs.reset(store.repository, root, BY)
    store.commit(make_request("Cleo"))
    second = str(store.repository.head[1])
    tips = []
    for ours, theirs in ((first, second), (second, first)):
        refs.reset(store.repository, ours, BY)
        merge(store.repository, theirs, stamp())
        tips.append(store.weights())
    np.testing.assert_array_equal(*tips)
    before = store.weights()
    merged = str(store.repository.head[1])
    store.commit(make_request("Dora"))
    revert(store.repository, "HEAD", stamp())
    np.testing.assert_array_equal(store.weights(), before)
    assert commit_at(store).same_as == merged


def test_stored_deltas_stand_on_solved_states_and_the_other_way_round(store: Synthetic, monkeypatch) -> None:
    """Old histories go on without deltas, and sets that grow too large go on with them."""
    for keeping in (ALL_KEPT, 0, ALL_KEPT, ALL_KEPT, 0):
        monkeypatch.setattr(commits, "WORTH_KEEPING", keeping)
        edits(store, 1) if not store.active() else store.commit(make_request(f"Eve {len(store.active())}"))
        assert commit_at(store).solved == (keeping == 0)
        assert distance(store.weights(), store.solution(store.active())) < TIGHT
    assert prove(store.repository, every_commit(store.repository)).unproven == ()
    assert fsck(store.repository, Silent()).sound
    monkeypatch.setattr(commits, "WORTH_KEEPING", 0)
    most = min(SHAPES["h.0"])
    store.commit(*(make_request(f"Finn {number}") for number in range(most)))
    assert not commit_at(store).solved
    assert distance(store.weights(), store.solution(store.active())) < TIGHT


def test_a_lie_on_top_of_a_solved_state_is_found(store: Synthetic, monkeypatch) -> None:
    edits(store, 2)
    below = str(store.repository.head[1])
    monkeypatch.setattr(commits, "WORTH_KEEPING", ALL_KEPT)
    store.commit(make_request("Eve"))
    honest = commit_at(store)
    state = read_state(store.repository, str(store.repository.head[1]))
    double = {w: Dense(to_dense(add(found, SHAPES[w])).astype(np.float32)) for w, found in state.items()}
    lie = replace(honest, tensors=store.repository.objects.put(write_deltas(double)))
    identity = store.repository.objects.put(lie.to_json())
    move = {"refs/heads/main": (store.repository.head[1], identity)}
    store.repository.move_refs(move, command="reset", arguments={}, author=AUTHOR, time=TIME)
    (found,) = prove(store.repository, [identity]).unproven
    assert found.commit == identity
    assert found.distance > 10 * TOLERANCE
    assert prove(store.repository, [below]).unproven == ()


def test_a_solved_commit_has_no_other_state_besides(store: Synthetic) -> None:
    edits(store, 2)
    honest, nothing = commit_at(store), frozenset[Element]()
    delta = store.repository.objects.put(write_deltas({"h.0": Dense(np.zeros(SHAPES["h.0"], np.float32))}))
    imported = Patch(
        honest.base, "additive", None, "import", None, (), store.repository.objects.put(b"[]"), {}, delta, SHAPES
    )
    beside = store.repository.objects.put(imported.to_json())
    with_import = store.active() | imported.elements
    wrong = {
        "another one besides": [
            replace(honest, tensors=delta),
            replace(honest, same_as=honest.parents[0]),
            replace(honest, added=nothing, removed=store.active("HEAD~1"), set_digest=states.EMPTY_SET),
        ],
        "that no facts ask for": [
            replace(honest, added=honest.added | {(beside, None)}, set_digest=set_digest(with_import))
        ],
    }
    for problem, lies in wrong.items():
        for commit in lies:
            move = {"refs/heads/lie": (None, store.repository.objects.put(commit.to_json()))}
            with pytest.raises(RepositoryError, match=problem):
                store.repository.move_refs(move, command="branch", arguments={}, author=AUTHOR, time=TIME)


def test_columns_without_a_finite_solution_are_no_proof(store: Synthetic) -> None:
    edits(store, 2)
    commit = commit_at(store)
    (name,) = {patch for patch, _ in commit.added}
    patch = store.repository.patch(name)
    tensors = load(store.repository.objects.get(patch.tensors))
    tensors["h.1.r"] = np.full_like(tensors["h.1.r"], 3e38, np.float32)
    tensors["h.1.lambda"] = np.full_like(tensors["h.1.lambda"], 1e-30)
    wild = replace(patch, tensors=store.repository.objects.put(save(tensors)))
    added = frozenset((store.repository.objects.put(wild.to_json()), request) for _, request in commit.added)
    elements = store.active("HEAD~1") | added
    lie = replace(commit, added=added, removed=frozenset(), set_digest=set_digest(elements))
    identity = store.repository.objects.put(lie.to_json())
    move = {"refs/heads/wild": (None, identity)}
    store.repository.move_refs(move, command="branch", arguments={}, author=AUTHOR, time=TIME)
    (found,) = prove(store.repository, [identity], tips=[identity]).unproven
    assert (found.commit, found.weight) == (identity, "h.1")
    with pytest.raises(EditError, match="too large for float32"):
        read_state(store.repository, identity)


def test_how_many_commits_are_read_for_a_set_stays_bounded(store: Synthetic, monkeypatch) -> None:
    monkeypatch.setattr(states, "MAX_STATE_BLOBS", 3)
    for number in range(9):
        gone = sorted(store.active())[:1] if number > 2 else []
        store.commit(make_request(f"Ada {number}"), remove=gone)
    made = [store.repository.commit(identity) for identity in every_commit(store.repository)]
    framed = [commit.keyframe for commit in made if commit.keyframe is not None]
    assert len(framed) >= 2
    assert all(frame.tensors is None for frame in framed)
    assert states.commits_read(store.repository.head[1], store.repository.commit) <= 4
    assert check(store.repository).findings == ()


def test_the_solution_does_not_depend_on_what_was_read_before(store: Synthetic) -> None:
    edits(store)
    fresh = solved(read_columns(store.repository, store.active()))
    for revision in ("HEAD~2", "HEAD~1", "HEAD"):
        state = read_state(store.repository, store.repository.resolve(revision))
    assert state.keys() == fresh.keys()
    for weight, (delta,) in state.items():
        np.testing.assert_array_equal(to_dense(delta), to_dense(fresh[weight]))
