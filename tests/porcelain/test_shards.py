"""Shards in a history, without a model: storing, reverting, merging, picking, counting, staleness."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path

import numpy as np
import pytest

from patchhub.canonical import canonical_json
from patchhub.delta import Sparse, read_deltas
from patchhub.errors import BaseError, CorruptStoreError, RepositoryError, RevisionError
from patchhub.objects import Patch, Request, requests_json, set_digest
from patchhub.porcelain import refs
from patchhub.porcelain.change import cherry_pick, revert, squash
from patchhub.porcelain.exchange import export_diff, export_peft
from patchhub.porcelain.history import log, show, status
from patchhub.porcelain.merge import Merged, Stopped, continue_merge, merge, plan, predict
from patchhub.porcelain.refs import undo
from patchhub.porcelain.search import diff, search
from patchhub.progress import Silent
from patchhub.sets.elements import active_requests
from patchhub.sets.merging import Resolution
from patchhub.sets.shards import (
    active_shards,
    next_number,
    open_shard,
    plan_shards,
    shards_at,
    shrink,
    stale_shards,
    superseded,
    without_shards,
)
from patchhub.store.fsck import check, reindex
from patchhub.store.lookup import Selection, whole_patches
from patchhub.store.states import commits_read
from patchhub.store.states import whole_patches as whole_from_objects
from patchhub.who import Who
from patchhub.worktree.opening import routing_at, stored_shard
from tests.porcelain.handmade_shards import commit_shard, put_shard
from tests.porcelain.synthetic import AUTHOR, BY, SHAPES, TIME, Synthetic, distance, make_request, make_store, stamp


@pytest.fixture
def store(tmp_path: Path) -> Synthetic:
    return make_store(tmp_path)


def facts(*names: str, target: str = "French") -> list[Request]:
    return [make_request(name, target) for name in names]


def subjects(requests: tuple[Request, ...]) -> list[str]:
    return sorted(request.subject for request in requests)


def at_head(store: Synthetic) -> set[str]:
    return set(active_shards(store.repository, store.active()))


# --- storing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_a_stored_shard_is_bit_for_bit_what_was_trained(seed: int, tmp_path: Path) -> None:
    store = make_store(tmp_path, seed)
    patch = put_shard(store.repository, facts("Ada"), layer=seed % 2)
    found = stored_shard(store.repository, patch.id)
    assert isinstance(found.change, Sparse)
    assert found.weight == sorted(SHAPES)[seed % 2]
    raw = read_deltas(store.repository.objects.get(patch.tensors), patch.weights)[found.weight]
    assert isinstance(raw, Sparse)
    assert raw.values.tobytes() == found.change.values.tobytes()
    assert raw.mask.tobytes() == found.change.mask.tobytes()
    assert found.change.values.dtype == np.float32
    assert found.threshold == patch.settings["routing"]["threshold"]


def test_the_weights_of_a_commit_do_not_know_its_shards(store: Synthetic) -> None:
    """Shards change no weight, no proof and no later column: a history without them has the same deltas."""
    plain = make_store(store.repository.root.parent / "plain")
    store.commit(make_request("column 1"))
    plain.commit(make_request("column 1"))
    first = commit_shard(store.repository, facts("a"))
    assert store.repository.commit(str(store.repository.head[1])).tensors is None
    store.commit(make_request("column 2"))
    commit_shard(store.repository, facts("b"), follows=first.id)
    plain.commit(make_request("column 2"))
    revert(store.repository, None, stamp(), subjects=["column 1"])
    revert(plain.repository, None, stamp(), subjects=["column 1"])
    assert np.array_equal(store.weights(), plain.weights())
    commit = store.repository.commit(str(store.repository.head[1]))
    assert commit.check["proof"] == plain.repository.commit(str(plain.repository.head[1])).check["proof"]
    assert check(store.repository).sound


def test_columns_recorded_beside_a_shard_do_not_depend_on_it(store: Synthetic) -> None:
    first = commit_shard(store.repository, facts("a"))
    column = store.put_patch([make_request("column")], made_on=())
    assert column.made_on == set_digest(())
    store.commit(make_request("column"))
    commit_shard(store.repository, facts("b"), follows=first.id)
    assert status(store.repository).head is not None
    assert revert(store.repository, None, stamp(), requests=[make_request("b").id[:12]]).stale == 0


def test_the_settings_of_a_shard_are_pinned(store: Synthetic) -> None:
    patch = put_shard(store.repository, facts("Ada"), threshold=1.5)
    assert canonical_json(patch.settings) == (
        b'{"below":{"set":"4f53cda18c2baa0c0354bb5f9a3ecbe5ed12ab4d8e11ba873c2f11161202b945","weights":["h.0"]},'
        b'"contexts":["{}"],"follows":null,"number":0,"report":{},"routing":{"distance":"max","threshold":1.5},'
        b'"training":{"layer":0,"merge_density":0.5,"merge_method":"ties"}}'
    )
    assert patch.metric is None
    assert patch.made_on == set_digest(())


def test_a_withheld_shard_goes_as_a_whole_or_not_at_all(store: Synthetic) -> None:
    repository = store.repository
    commit_shard(repository, facts("a"))
    patch = commit_shard(repository, facts("b", "c"), number=1)
    repository.objects.path(patch.requests_blob).unlink()
    with pytest.raises(RepositoryError, match="withheld"):
        revert(repository, None, stamp(), requests=[make_request("b").id])
    assert revert(repository, "HEAD", stamp()).commit


# --- counting and looking -------------------------------------------------------------------------------------------


def test_facts_in_shards_are_counted_listed_and_found(store: Synthetic) -> None:
    store.commit(make_request("column"))
    first = commit_shard(store.repository, facts("a", "b"), message="opened")
    second = commit_shard(store.repository, facts("c"), follows=first.id, message="continued")
    found = status(store.repository)
    assert found.head is not None
    assert found.head.active == 4
    assert [(shard.patch, shard.facts, shard.number, shard.stale) for shard in found.shards] == [
        (second.id, 3, 0, False)
    ]
    newest, opened, column = log(store.repository)
    assert [(entry.added, entry.removed, entry.active) for entry in (newest, opened, column)] == [
        (1, 0, 4),
        (2, 0, 3),
        (1, 0, 1),
    ]
    shown = show(store.repository)
    assert (subjects(shown.added), subjects(shown.removed)) == (["c"], [])
    assert {patch: shown.patches[patch].kind for patch in (first.id, second.id)} == dict.fromkeys(
        (first.id, second.id), "shard"
    )
    assert subjects(diff(store.repository, "base", "HEAD").added) == ["a", "b", "c", "column"]
    assert subjects(diff(store.repository, "HEAD~1", "HEAD").added) == ["c"]
    assert not diff(store.repository, "HEAD~1", "HEAD").removed
    (hit,) = search(store.repository, "", subject="b")
    assert hit.active
    assert [change.message for change in hit.changes] == ["opened"]
    assert [e.commit.message for e in log(store.repository, only=Selection(about="tongue of c is"))] == ["continued"]


def test_the_index_is_what_the_objects_say(store: Synthetic) -> None:
    store.commit(make_request("column"))
    first = commit_shard(store.repository, facts("a", "b"))
    commit_shard(store.repository, facts("c"), follows=first.id)
    commit_shard(store.repository, facts("d"), number=1)
    repository = store.repository
    assert check(repository).sound
    before = whole_patches(repository, repository.head[1])
    reindex(repository)
    assert whole_patches(repository, repository.head[1]) == before
    assert check(repository).sound
    from_objects = whole_from_objects(repository.head[1], repository.commit, lambda identity: frozenset())
    assert sorted(from_objects) == before == sorted(at_head(store))


# --- which shard is open --------------------------------------------------------------------------------------------


def test_the_fullest_open_shard_of_the_weight_is_continued(store: Synthetic) -> None:
    made = [
        put_shard(store.repository, facts("a")),
        put_shard(store.repository, facts("b", "c", "d"), number=4),
        put_shard(store.repository, facts("e", "f"), number=1),
        put_shard(store.repository, facts("g", "h"), number=2, rank=3),
        put_shard(store.repository, facts("i"), number=7, layer=1),
    ]
    shards = {patch.id: patch for patch in made}
    assert open_shard(shards, "h.0", 4) == made[1].id
    assert open_shard(shards, "h.0", 3) == made[2].id  # the one with three is full, the recompressed one closed
    assert open_shard(shards, "h.0", 2) == made[0].id
    assert open_shard(shards, "h.0", 1) is None
    assert open_shard(shards, "h.1", 2) == made[4].id
    assert next_number(shards) == 8
    assert next_number({}) == 0


# --- revert and cherry-pick -----------------------------------------------------------------------------------------


def test_reverting_a_continuation_brings_the_old_shard_back_bit_for_bit(store: Synthetic) -> None:
    store.commit(make_request("column"))
    first = commit_shard(store.repository, facts("a", "b"))
    opened = str(store.repository.head[1])
    second = commit_shard(store.repository, facts("c"), follows=first.id)
    done = revert(store.repository, "HEAD", stamp())
    assert at_head(store) == {first.id}
    assert done.same_as == opened
    assert (subjects(done.removed), subjects(done.restored), done.trained) == (["c"], [], ())
    done = revert(store.repository, "HEAD", stamp())  # and forward again
    assert at_head(store) == {second.id}
    assert subjects(done.restored) == ["c"]
    undo(store.repository, who=Who(AUTHOR, TIME))
    assert at_head(store) == {first.id}


def test_reverting_the_first_batch_of_a_shard_is_a_change_of_what_continued_it(store: Synthetic) -> None:
    """Only the facts of the reverted commit go, and only training can take them out of the shard that holds them now."""
    first = commit_shard(store.repository, facts("a", "b"))
    second = commit_shard(store.repository, facts("c"), follows=first.id)
    third = commit_shard(store.repository, facts("d", "e"), follows=second.id)
    active = store.active()
    opening = plan_shards(store.repository, active, [first.id], [])
    assert [(change.shard, len(change.facts)) for change in opening.train] == [(third.id, 3)]
    assert {r.subject for r in opening.train[0].texts(store.repository).values()} == {"c", "d", "e"}
    assert opening.remove == opening.restore == frozenset()
    middle = plan_shards(store.repository, active, [second.id], [first.id])
    assert {r.subject for r in middle.train[0].texts(store.repository).values()} == {"a", "b", "d", "e"}
    latest = plan_shards(store.repository, active, [third.id], [second.id])
    assert (latest.remove, latest.restore, latest.train) == ({(third.id, None)}, {(second.id, None)}, ())


def test_taking_back_all_that_a_continuation_brought_needs_no_training(store: Synthetic) -> None:
    first = commit_shard(store.repository, facts("a", "b"))
    second = commit_shard(store.repository, facts("c", "d"), follows=first.id)
    chosen = frozenset(request.id for request in facts("c", "d"))
    found = shrink(store.repository, {second.id: chosen})
    assert (found.restore, found.train) == ({(first.id, None)}, ())
    done = revert(store.repository, None, stamp(), subjects=["c", "d"])
    assert at_head(store) == {first.id}
    assert subjects(done.removed) == ["c", "d"]
    assert revert(store.repository, None, stamp(), subjects=["a", "b"]).commit
    assert not store.active()


def test_nothing_is_left_to_revert_where_the_line_is_gone(store: Synthetic) -> None:
    first = commit_shard(store.repository, facts("a"))
    commit_shard(store.repository, facts("b"), follows=first.id)
    continued = str(store.repository.head[1])
    revert(store.repository, None, stamp(), subjects=["a", "b"])
    with pytest.raises(RevisionError, match=r"nothing to revert: .* not active"):
        revert(store.repository, continued, stamp())


def test_cherry_pick_brings_the_shard_as_a_whole(store: Synthetic) -> None:
    store.commit(make_request("common"))
    refs.create_branch(store.repository, "side", "HEAD", BY)
    first = commit_shard(store.repository, facts("a"))
    second = commit_shard(store.repository, facts("b"), follows=first.id)
    picked = str(store.repository.head[1])
    refs.switch(store.repository, "side", BY)
    done = cherry_pick(store.repository, picked, stamp())
    assert at_head(store) == {second.id}
    assert subjects(done.restored) == ["a", "b"]
    with pytest.raises(RevisionError, match=r"nothing to cherry-pick: .* active already"):
        cherry_pick(store.repository, picked, stamp())
    third = commit_shard(store.repository, facts("c"), follows=second.id)
    with pytest.raises(RevisionError, match=r"nothing to cherry-pick: .* active already"):
        cherry_pick(store.repository, picked, stamp())
    assert at_head(store) == {third.id}


# --- merge ----------------------------------------------------------------------------------------------------------


def both_continue(store: Synthetic) -> tuple[Patch, Patch, Patch]:
    """A shard that `main` and `side` continue, each with a fact of its own; HEAD is on `main`."""
    first = commit_shard(store.repository, facts("a"))
    refs.create_branch(store.repository, "side", "HEAD", BY)
    ours = commit_shard(store.repository, facts("here"), follows=first.id)
    refs.switch(store.repository, "side", BY)
    theirs = commit_shard(store.repository, facts("there"), follows=first.id)
    refs.switch(store.repository, "main", BY)
    return first, ours, theirs


def test_the_dry_run_counts_the_facts_of_shards_as_the_merge_does(store: Synthetic) -> None:
    first = commit_shard(store.repository, facts("a"))
    refs.create_branch(store.repository, "side", "HEAD", BY)
    commit_shard(store.repository, facts("here"), follows=first.id)
    refs.switch(store.repository, "side", BY)
    commit_shard(store.repository, facts("there", "and there", "and here"))
    refs.switch(store.repository, "main", BY)
    predicted = predict(store.repository, "side")
    done = merge(store.repository, "side", stamp())
    assert isinstance(done, Merged)
    assert (predicted.from_ours, predicted.from_theirs) == (len(done.from_ours), len(done.from_theirs)) == (1, 3)


def test_where_both_sides_continued_a_shard_both_stay_and_the_old_one_goes(store: Synthetic) -> None:
    _, ours, theirs = both_continue(store)
    done = merge(store.repository, "side", stamp())
    assert isinstance(done, Merged)
    assert at_head(store) == {ours.id, theirs.id}
    assert (subjects(done.from_ours), subjects(done.from_theirs)) == (["here"], ["there"])
    assert (done.removed_by_ours, done.removed_by_theirs) == ((), ())
    assert subjects(diff(store.repository, "base", "HEAD").added) == ["a", "here", "there"]
    assert [memory.name for memory in routing_at(store.repository, done.commit).memories] == sorted(
        (ours.id, theirs.id)
    )
    revert(store.repository, "HEAD", stamp())
    assert at_head(store) == {ours.id}


def test_merging_shards_does_not_depend_on_the_order_of_the_sides(tmp_path: Path) -> None:
    digests = []
    for number, (into, other) in enumerate((("main", "side"), ("side", "main"))):
        store = make_store(tmp_path / str(number))
        both_continue(store)
        refs.switch(store.repository, into, BY)
        merge(store.repository, other, stamp())
        digests.append(set_digest(store.active()))
    assert digests[0] == digests[1]


def test_a_shard_that_the_other_side_continued_gives_way(store: Synthetic) -> None:
    first = commit_shard(store.repository, facts("a"))
    refs.create_branch(store.repository, "side", "HEAD", BY)
    second = commit_shard(store.repository, facts("b"), follows=first.id)
    middle = str(store.repository.head[1])
    third = commit_shard(store.repository, facts("c"), follows=second.id)
    refs.switch(store.repository, "side", BY)
    cherry_pick(store.repository, middle, stamp())
    assert at_head(store) == {second.id}
    merge(store.repository, "main", stamp())
    assert at_head(store) == {third.id}
    both = frozenset({(second.id, None), (third.id, None)})
    assert superseded(store.repository, both) == {(second.id, None)}


@pytest.mark.parametrize(("side", "kept"), [("ours", "French"), ("theirs", "German")])
def test_a_column_and_a_shard_that_contradict_each_other_stop_a_merge(side: str, kept: str, store: Synthetic) -> None:
    store.commit(make_request("common"))
    refs.create_branch(store.repository, "side", "HEAD", BY)
    store.commit(make_request("Ada", "French"), message="mine")
    refs.switch(store.repository, "side", BY)
    commit_shard(store.repository, facts("Ada", target="German"), message="yours")
    refs.switch(store.repository, "main", BY)
    stopped = merge(store.repository, "side", stamp())
    assert isinstance(stopped, Stopped)
    (found,) = stopped.open
    assert [claim.message for claim in (*found.ours, *found.theirs)] == ["mine", "yours"]
    done = continue_merge(
        store.repository, stamp(), resolution=Resolution(prefer="ours" if side == "ours" else "theirs")
    )
    assert isinstance(done, Merged)
    assert store.targets() == {"common": "French", "Ada": kept}


def test_deciding_against_one_fact_of_a_shard_asks_for_its_training(store: Synthetic) -> None:
    repository = store.repository
    store.commit(make_request("common"))
    refs.create_branch(repository, "side", "HEAD", BY)
    store.commit(make_request("Ada", "French"))
    refs.switch(repository, "side", BY)
    shard = commit_shard(repository, [*facts("Ada", target="German"), *facts("Bob")])
    tips = str(repository.resolve("main")), str(repository.resolve("side"))
    (change,) = plan(repository, *tips, Resolution(prefer="ours")).shards.train
    assert (change.shard, {r.subject for r in change.texts(repository).values()}) == (shard.id, {"Bob"})
    theirs = plan(repository, *tips, Resolution(prefer="theirs"))
    assert theirs.shards.train == ()
    assert sorted(theirs.merged - theirs.ours) == [(shard.id, None)]


def test_squash_keeps_the_shards(store: Synthetic) -> None:
    store.commit(make_request("column"))
    first = commit_shard(store.repository, facts("a"))
    second = commit_shard(store.repository, facts("b"), follows=first.id)
    before = store.active()
    squash(store.repository, "2", stamp("one"))
    assert store.active() == before
    shown = show(store.repository)
    assert subjects(shown.added) == ["a", "b"]
    assert at_head(store) == {second.id}
    assert check(store.repository).sound


def play(store: Synthetic, rng: random.Random, steps: int) -> None:
    """Random columns, shards, continuations, reverts, picks and merges on two branches; what would need training is left out."""
    repository = store.repository
    store.commit(make_request("root"))
    refs.create_branch(repository, "side", "HEAD", BY)
    for step in range(steps):
        if rng.random() < 0.3:
            refs.switch(repository, "side" if repository.head[0] == "main" else "main", BY)
        commits = [identity for identity, _ in repository.log(str(repository.head[1]))]
        action = rng.choice(("column", "open", "continue", "revert", "pick", "merge"))
        here = sorted(at_head(store))
        if action == "column":
            store.commit(make_request(f"column {step}"))
        elif action == "open" or (action == "continue" and not here):
            commit_shard(repository, facts(f"fact {step}"), number=step)
        elif action == "continue":
            commit_shard(repository, facts(f"fact {step}"), follows=rng.choice(here))
        elif action == "merge":
            merge(repository, "side" if repository.head[0] == "main" else "main", stamp())
        else:
            with contextlib.suppress(
                RevisionError, BaseError
            ):  # nothing left to do; or the base would have to be loaded
                verb = revert if action == "revert" else cherry_pick
                verb(repository, rng.choice(commits), stamp())


@pytest.mark.parametrize("seed", range(12))
def test_random_histories_with_shards(seed: int, tmp_path: Path) -> None:
    """The weights are those of the columns alone; nothing superfluous is merged; a merge does not depend on its direction."""
    store = make_store(tmp_path, seed)
    repository = store.repository
    play(store, random.Random(seed), 20)
    tips = {branch: str(repository.resolve(branch)) for branch in ("main", "side")}
    digests = set()
    for ours, theirs in (("main", "side"), ("side", "main")):
        refs.switch(repository, ours, BY)
        columns = without_shards(repository, store.active())
        assert distance(store.weights(), store.solution(columns)) < 1e-6
        assert bool(repository.state(tips[ours])) == bool(columns)
        done = merge(repository, theirs, stamp(), fast_forward=False)
        assert isinstance(done, Merged)
        assert not superseded(repository, store.active())
        digests.add(set_digest(store.active()))
        refs.reset(repository, tips[ours], BY)
    assert len(digests) == 1
    assert check(repository).sound
    wanted = sorted(at_head(store))
    assert list(shards_at(repository, repository.head[1])) == wanted


# --- staleness ------------------------------------------------------------------------------------------------------


def test_a_threshold_is_stale_when_weights_at_or_below_its_layer_change(store: Synthetic) -> None:
    """The synthetic store's columns change both layers, so any of them makes both shards stale; taking it back heals both."""
    low = commit_shard(store.repository, facts("low"), layer=0)
    high = commit_shard(store.repository, facts("high"), number=1, layer=1)
    assert stale_shards(store.repository, store.active()) == []
    store.commit(make_request("column"))
    assert stale_shards(store.repository, store.active()) == sorted((low.id, high.id))
    assert [shard.stale for shard in status(store.repository).shards] == [True, True]
    done = revert(store.repository, "HEAD", stamp())
    assert done.stale_shards == ()


@pytest.mark.parametrize(("weight", "stale"), [("h.0.attn.weight", 2), ("h.1.attn.weight", 1), ("h.2.attn.weight", 0)])
def test_an_import_that_changes_any_weight_of_a_block_makes_thresholds_stale(
    store: Synthetic, weight: str, stale: int
) -> None:
    repository = store.repository
    commit_shard(repository, facts("low"), layer=0)
    high = commit_shard(repository, facts("high"), number=1, layer=1)
    patch = Patch(
        base=repository.config.base_id,
        kind="additive",
        made_on=None,
        method="lora",
        metric=None,
        requests=(),
        requests_blob=repository.objects.put(requests_json(())),
        settings={},
        tensors="0" * 64,
        weights={weight: (12, 12)},
    )
    repository.objects.put(patch.to_json())
    found = stale_shards(repository, store.active() | patch.elements)
    assert len(found) == stale
    assert stale == 0 or high.id in found


# --- what cannot be routed, and what is no shard --------------------------------------------------------------------


def test_only_plain_weights_can_be_exported(store: Synthetic, tmp_path: Path) -> None:
    store.commit(make_request("column"))
    commit_shard(store.repository, facts("a"))
    for export in (export_peft, export_diff):
        with pytest.raises(RepositoryError, match="side memory"):
            export(store.repository, "HEAD", tmp_path / "out", Silent())
    export_diff(store.repository, "HEAD~1", tmp_path / "diff.safetensors", Silent())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("number", -1),
        ("routing", {}),
        ("routing", {"threshold": -1.0}),
        ("routing", {"threshold": "1"}),
        ("follows", "abc"),
        ("below", {"set": "0" * 64}),
        ("training", None),
    ],
)
def test_settings_that_are_no_shards_are_refused(field: str, value: object, store: Synthetic) -> None:
    patch = put_shard(store.repository, facts("a"))
    broken = Patch(**{**patch.__dict__, "settings": {**patch.settings, field: value}})
    identity = store.repository.objects.put(broken.to_json())
    with pytest.raises(CorruptStoreError, match="no sound shard"):
        stored_shard(store.repository, identity)


def test_a_shard_of_another_weight_or_shape_is_refused(store: Synthetic) -> None:
    patch = put_shard(store.repository, facts("a"))
    for weights in ({"h.9": (12, 24)}, {"h.0": (24, 12)}, {}):
        broken = Patch(**{**patch.__dict__, "weights": weights})
        identity = store.repository.objects.put(broken.to_json())
        with pytest.raises(CorruptStoreError):
            stored_shard(store.repository, identity)


def test_two_places_of_one_fact_are_two_memories_and_one_fact(store: Synthetic) -> None:
    both_continue(store)
    merge(store.repository, "side", stamp())
    places = active_requests(store.repository, store.active())
    assert len(places) == 4
    assert len({request.id for request in places.values()}) == 3


def test_reading_a_state_never_takes_more_than_128_commits(store: Synthetic) -> None:
    """Shards leave no delta behind, so commits are counted, not deltas."""
    made = {commit_shard(store.repository, facts(str(number)), number=number).id for number in range(130)}
    head = str(store.repository.head[1])
    assert commits_read(head, store.repository.commit) < 128
    assert commits_read(str(store.repository.resolve("HEAD~2")), store.repository.commit) > 120
    assert whole_patches(store.repository, head) == sorted(made)
    assert check(store.repository).sound
