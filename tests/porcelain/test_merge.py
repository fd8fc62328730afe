"""`merge` and `merge --dry-run` on stored columns: the laws of the weights, and what a stopped merge leaves."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from patchhub.constraints import misfit, solve
from patchhub.errors import CorruptStoreError, EditError, RepositoryError, RequestError, RevisionError
from patchhub.objects import Commit
from patchhub.porcelain import refs
from patchhub.porcelain.change import revert
from patchhub.porcelain.history import status
from patchhub.porcelain.merge import Merged, Stopped, abort_merge, continue_merge, merge, predict
from patchhub.sets.columns import read_columns
from patchhub.sets.merging import FILE, Resolution, read_choices
from patchhub.store.states import merge_bases
from tests.porcelain.synthetic import BY, Synthetic, distance, make_request, make_store, stamp

TIGHT = 1e-6  # what design promises of sums of stored changes, relative
PROVEN = 1e-5  # rounding of k and u apart, seen through a C^-1 of 1e3
OTHER = "plays the position of"


@pytest.fixture
def store(tmp_path: Path) -> Synthetic:
    return make_store(tmp_path)


def merged(store: Synthetic, revision: str, **options: Any) -> Merged:
    done = merge(store.repository, revision, stamp(), **options)
    assert isinstance(done, Merged)
    return done


def two_branches(store: Synthetic) -> None:
    """A common fact, then one fact on `main` and one on `side`; HEAD is on `main`."""
    store.commit(make_request("common"))
    refs.create_branch(store.repository, "side", "HEAD", BY)
    store.commit(make_request("here"))
    refs.switch(store.repository, "side", BY)
    store.commit(make_request("there"))
    refs.switch(store.repository, "main", BY)


def contradicting(store: Synthetic) -> None:
    """`main` and `side` answer about Ada and Bob differently; two further facts agree with everything."""
    store.commit(make_request("common"))
    refs.create_branch(store.repository, "side", "HEAD", BY)
    store.commit(make_request("Ada", "French"), make_request("Bob", "French"), message="mine")
    refs.switch(store.repository, "side", BY)
    store.commit(make_request("Ada", "German"), make_request("Bob", "Dutch"), make_request("Cid"), message="yours")
    refs.switch(store.repository, "main", BY)


# --- laws -----------------------------------------------------------------------------------------------------------


def grow(store: Synthetic, rng: random.Random, commits: int) -> list[str]:
    """Random edits, removals and merges on two branches; the tips in the end. Every subject has one target per branch name."""
    repository = store.repository
    store.commit(*(make_request(f"root {n}") for n in range(3)))
    tips = [str(repository.head[1])] * 2
    for number in range(commits):
        side, action = rng.randrange(2), rng.random()
        refs.reset(repository, tips[side], BY)
        if action < 0.2:
            merged(store, rng.choice([tips[1 - side], *repository.parents(tips[1 - side])]))
        elif action < 0.35:  # each side merges the other as it was before: two merge bases from then on
            before = list(tips)
            for here in range(2):
                refs.reset(repository, before[here], BY)
                merged(store, before[1 - here], fast_forward=False)
                tips[here] = str(repository.head[1])
            continue
        elif action < 0.5 and len(store.active()) > 2:
            gone = rng.sample(sorted(store.active(), key=str), 1)
            store.commit(make_request(f"new {number}"), remove=gone)
        else:
            twice = rng.randint(0, 3)  # the same request on both branches, by different patches
            known = {request for _, request in store.active()}
            fresh = {request.id: request for request in (make_request(f"new {number}"), make_request(f"both {twice}"))}
            store.commit(*(request for name, request in fresh.items() if name not in known))
        tips[side] = str(repository.head[1])
    return tips


@pytest.mark.parametrize("block", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 3))])
def test_merging_is_commutative_and_is_the_joint_solution_in_random_histories(block: int, tmp_path: Path) -> None:
    several = 0
    for seed in range(40 * block, 40 * block + 40):
        store = make_store(tmp_path / str(seed), seed)
        tips = grow(store, random.Random(seed), 6)
        several += len(merge_bases(*tips, store.repository.parents)) > 1
        results = []
        for left, right in (tips, tips[::-1]):
            refs.reset(store.repository, left, BY)
            done = merged(store, right)
            assert done.proof < PROVEN
            assert merged(store, right).outcome == "up to date"
            assert distance(store.weights(), store.solution(store.active())) < TIGHT
            results.append((store.active(), store.weights()))
        assert results[0][0] == results[1][0]
        assert distance(results[0][1], results[1][1]) < TIGHT
        store.repository.close()
    assert several  # criss-cross histories were among them


def test_three_branches_of_one_base_merge_to_the_same_weights_in_every_order(store: Synthetic) -> None:
    store.commit(make_request("base 0"), make_request("base 1"))
    base = str(store.repository.head[1])
    tips = []
    for name in range(3):
        refs.reset(store.repository, base, BY)
        gone = sorted(store.active())[:1] if name == 1 else []
        tips.append(store.commit(make_request(f"new {name}"), make_request("same"), remove=gone))
    weights, sets = [], set()
    for first, second, third in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        refs.reset(store.repository, tips[first], BY)
        merged(store, tips[second])
        merged(store, tips[third])
        weights.append(store.weights())
        sets.add(store.active())
    assert len(sets) == 1
    assert max(distance(weights[0], other) for other in weights[1:]) < TIGHT


def test_several_merge_bases(store: Synthetic) -> None:
    """Criss-cross: `main` took the common fact back before both sides merged each other's first commit."""
    repository = store.repository
    store.commit(make_request("common"))
    root = str(repository.head[1])
    common = store.active()
    one = store.commit(make_request("one"), remove=common)
    refs.reset(repository, root, BY)
    two = store.commit(make_request("two"))
    merged(store, one)
    left = str(repository.head[1])
    refs.reset(repository, one, BY)
    merged(store, two)
    store.commit(make_request("three"))
    assert len(merge_bases(left, str(repository.head[1]), repository.parents)) == 2
    merged(store, left)
    assert store.targets().keys() == {"one", "two", "three"}
    assert distance(store.weights(), store.solution(store.active())) < TIGHT


def test_both_sides_brought_one_request_and_the_smaller_patch_stays(store: Synthetic) -> None:
    store.commit(make_request("common"))
    refs.create_branch(store.repository, "side", "HEAD", BY)
    common = store.active()
    store.commit(make_request("Ada"))
    refs.switch(store.repository, "side", BY)
    store.commit(make_request("Ada"))
    sides = (store.active("main") | store.active("side")) - common
    assert len(sides) == 2
    merged(store, "main")
    assert store.active() == common | {min(sides)}


# --- the forms of a merge ---------------------------------------------------------------------------------------------


def test_up_to_date_fast_forward_and_a_merge_commit(store: Synthetic) -> None:
    store.commit(make_request("common"))
    refs.create_branch(store.repository, "side", "HEAD", BY)
    ahead = store.commit(make_request("here"))
    assert merged(store, "side").outcome == "up to date"
    assert merged(store, "base").outcome == "up to date"
    refs.switch(store.repository, "side", BY)
    before = store.repository.refs()
    done = merged(store, "main")
    assert (done.outcome, done.commit) == ("fast-forward", ahead)
    assert [request.subject for request in done.from_theirs] == ["here"]
    store.repository.undo(author="a", time=BY.time)
    assert store.repository.refs() == before
    done = merged(store, "main", fast_forward=False)
    commit = store.repository.commit(str(done.commit))
    assert done.outcome == "merged"
    assert commit.same_as == ahead
    assert commit.message == "Merge branch 'main'"
    assert store.repository.state(done.commit) == store.repository.state(ahead)


def test_a_merge_commit_says_what_came_from_where(store: Synthetic) -> None:
    two_branches(store)
    before = store.repository.refs()
    done = merged(store, "side")
    assert [r.subject for r in done.from_ours] == ["here"]
    assert [r.subject for r in done.from_theirs] == ["there"]
    assert done.stale == 0  # both were recorded on the common fact, which is below them still
    commit = store.repository.commit(str(done.commit))
    assert commit.parents == (before["refs/heads/main"], before["refs/heads/side"])
    assert max(commit.check["proof"].values()) == done.proof < PROVEN
    store.repository.undo(author="a", time=BY.time)
    assert store.repository.refs() == before


def test_taking_the_first_branch_back_leaves_the_solution_of_the_second(store: Synthetic) -> None:
    two_branches(store)
    side = store.repository.state(store.repository.resolve("side"))
    done = merged(store, "side")
    revert(store.repository, "HEAD^1", stamp())
    assert store.active() == store.active("side")
    assert store.repository.state(store.repository.head[1]) == side  # seen before, so bit for bit
    revert(store.repository, str(done.commit), stamp())
    assert store.targets().keys() == {"common"}


def test_a_branch_with_no_commit_takes_the_other_over(store: Synthetic) -> None:
    two_branches(store)
    refs.switch_to_new(store.repository, "anew", "base", BY)
    assert merged(store, "side").outcome == "fast-forward"
    assert store.active() == store.active("side")


def test_histories_without_a_common_commit_meet_at_the_unpatched_model(store: Synthetic) -> None:
    store.commit(make_request("here"))
    refs.switch_to_new(store.repository, "anew", "base", BY)
    store.commit(make_request("there"))
    merged(store, "main")
    assert store.targets().keys() == {"here", "there"}


def test_columns_of_two_metrics_are_not_merged(store: Synthetic) -> None:
    store.commit(make_request("common"))
    refs.create_branch(store.repository, "side", "HEAD", BY)
    store.commit(make_request("here"))
    refs.switch_to_new(store.repository, "anew", "base", BY)
    store.commit(make_request("there"), metric=store.put_metric("other text"))
    with pytest.raises(EditError, match="different metrics"):
        merge(store.repository, "main", stamp())


def test_a_commit_about_another_base_never_comes_near_a_merge(store: Synthetic) -> None:
    first = store.repository.commit(store.commit(make_request("here")))
    foreign = Commit(**{**vars(first), "base": "1" * 64})
    store.repository.objects.put(foreign.to_json())
    with pytest.raises(RepositoryError, match="another base"):
        store.repository.move_refs(
            {"refs/heads/foreign": (None, foreign.id)}, command="x", arguments={}, author="a", time=BY.time
        )
    with pytest.raises(RevisionError):
        merge(store.repository, foreign.id, stamp())


# --- contradictions -------------------------------------------------------------------------------------------------


def stopped(store: Synthetic, revision: str = "side") -> Stopped:
    done = merge(store.repository, revision, stamp())
    assert isinstance(done, Stopped)
    return done


def test_a_contradiction_stops_the_merge_and_says_who_says_what(store: Synthetic) -> None:
    contradicting(store)
    before = store.repository.refs()
    done = stopped(store)
    assert store.repository.refs() == before
    assert [found.text for found in done.open] == ["The mother tongue of Ada is", "The mother tongue of Bob is"]
    (ours,), (theirs,) = done.open[0].ours, done.open[0].theirs
    assert (ours.request.target_new, ours.message, ours.commit) == ("French", "mine", before["refs/heads/main"])
    assert (theirs.request.target_new, theirs.message, theirs.author) == ("German", "yours", BY.author)
    json.dumps(done.to_json())
    assert status(store.repository).to_json()["stopped_merge"]["revision"] == "side"
    with pytest.raises(RepositoryError, match="waits"):
        merge(store.repository, "side", stamp())


@pytest.mark.parametrize(
    ("resolution", "expected"),
    [
        (Resolution(prefer="ours"), {"Ada": "French", "Bob": "French"}),
        (Resolution(prefer="theirs"), {"Ada": "German", "Bob": "Dutch"}),
        (Resolution({"The mother tongue of Ada is": "theirs"}, "ours"), {"Ada": "German", "Bob": "French"}),
        (
            Resolution({"The mother tongue of Ada is": "German", make_request("Bob").id[:8]: "ours"}),
            {"Ada": "German", "Bob": "French"},
        ),
    ],
)
@pytest.mark.parametrize("at_once", [True, False])
def test_contradictions_are_decided(
    store: Synthetic, resolution: Resolution, expected: dict[str, str], at_once: bool
) -> None:
    contradicting(store)
    if at_once:
        done = merge(store.repository, "side", stamp(), resolution=resolution)
    else:
        stopped(store)
        done = continue_merge(store.repository, stamp(), resolution=resolution)
    assert isinstance(done, Merged)
    assert store.targets() == {"common": "French", "Cid": "French", **expected}
    assert len(done.decided) == 2
    assert not (store.repository.root / FILE).exists()
    assert distance(store.weights(), store.solution(store.active())) < TIGHT
    assert store.repository.commit(str(done.commit)).message == "Merge branch 'side'"
    json.dumps(done.to_json())


def test_choices_may_leave_some_open(store: Synthetic) -> None:
    contradicting(store)
    stopped(store)
    choice = Resolution({"The mother tongue of Ada is": "ours"})
    again = continue_merge(store.repository, stamp(), resolution=choice)
    assert isinstance(again, Stopped)
    assert [found.subject for found in again.open] == ["Bob"]


@pytest.mark.parametrize(
    ("choices", "problem"),
    [
        ({"The mother tongue of Ada": "ours"}, "names no contradiction"),
        ({"The mother tongue of Ada is": "Latin"}, "neither a side nor"),
        ({"0000": "ours"}, "names no contradiction"),
    ],
)
def test_choices_that_fit_nothing_are_refused(store: Synthetic, choices: dict[str, str], problem: str) -> None:
    contradicting(store)
    with pytest.raises(RequestError, match=problem):
        merge(store.repository, "side", stamp(), resolution=Resolution(choices))
    assert not (store.repository.root / FILE).exists()


def test_a_choices_file_is_one_object_of_texts(tmp_path: Path) -> None:
    file = tmp_path / "choices.json"
    file.write_text('{"a": "ours"}')
    assert read_choices(file) == {"a": "ours"}
    for text in ("[1]", '{"a": 1}', "{", ""):
        file.write_text(text)
        with pytest.raises(RequestError):
            read_choices(file)


def test_abort_forgets_the_merge_and_moving_on_ends_it(store: Synthetic) -> None:
    contradicting(store)
    stopped(store)
    abort_merge(store.repository)
    with pytest.raises(RepositoryError, match="no stopped merge"):
        abort_merge(store.repository)
    with pytest.raises(RepositoryError, match="no merge waits"):
        continue_merge(store.repository, stamp(), resolution=Resolution(prefer="ours"))
    stopped(store)
    store.commit(make_request("another"))
    with pytest.raises(RepositoryError, match="no merge waits"):
        continue_merge(store.repository, stamp(), resolution=Resolution(prefer="ours"))
    stopped(store)  # a new one can begin


def test_a_damaged_note_of_a_stopped_merge_is_named_and_can_be_aborted(store: Synthetic) -> None:
    contradicting(store)
    stopped(store)
    for damage in ("", "[]", "{}", '{"format": 2}'):
        (store.repository.root / FILE).write_text(damage)
        with pytest.raises(CorruptStoreError, match=r"merge\.json"):
            status(store.repository)
    abort_merge(store.repository)
    status(store.repository)


def test_a_fact_retargeted_on_one_side_is_no_contradiction(store: Synthetic) -> None:
    store.commit(make_request("Ada", "French"), make_request("common"))
    old = {element for element in store.active() if element[1] == make_request("Ada", "French").id}
    refs.create_branch(store.repository, "side", "HEAD", BY)
    store.commit(make_request("here"))
    refs.switch(store.repository, "side", BY)
    store.commit(make_request("Ada", "German"), remove=old)
    refs.switch(store.repository, "main", BY)
    merged(store, "side")
    assert store.targets() == {"Ada": "German", "common": "French", "here": "French"}


def test_a_fact_retargeted_differently_on_both_sides_is_one(store: Synthetic) -> None:
    store.commit(make_request("Ada", "French"))
    old = store.active()
    refs.create_branch(store.repository, "side", "HEAD", BY)
    store.commit(make_request("Ada", "German"), remove=old)
    refs.switch(store.repository, "side", BY)
    store.commit(make_request("Ada", "Dutch"), remove=old)
    assert [found.subject for found in stopped(store, "main").open] == ["Ada"]


def test_two_true_facts_about_one_subject_are_no_contradiction(store: Synthetic) -> None:
    store.commit(make_request("common"))
    refs.create_branch(store.repository, "side", "HEAD", BY)
    store.commit(make_request("Ada", "French"))
    refs.switch(store.repository, "side", BY)
    store.commit(make_request("Ada", "goalkeeper", f"{{}} {OTHER}"))
    merged(store, "main")
    assert len(store.active()) == 3


def test_facts_kept_side_by_side_on_one_side_are_left_alone(store: Synthetic) -> None:
    store.commit(make_request("common"))
    refs.create_branch(store.repository, "side", "HEAD", BY)
    store.commit(make_request("Ada", "French"), make_request("Ada", "German"))
    refs.switch(store.repository, "side", BY)
    store.commit(make_request("there"))
    merged(store, "main")
    assert len(store.active()) == 4


def test_withheld_texts_are_counted_and_merged(store: Synthetic) -> None:
    store.commit(make_request("common"))
    refs.create_branch(store.repository, "side", "HEAD", BY)
    store.commit(make_request("Ada", "French"))
    refs.switch(store.repository, "side", BY)
    store.commit(make_request("Ada", "German"), make_request("Bob"), withheld=True)
    assert predict(store.repository, "main").unchecked == 2
    done = merged(store, "main")
    assert done.unchecked == 2
    assert len(store.active()) == 4


# --- the dry run ----------------------------------------------------------------------------------------------------


def files(store: Synthetic) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in store.repository.root.rglob("*") if p.is_file()}


def test_a_dry_run_writes_nothing_and_lists_contradictions(store: Synthetic) -> None:
    contradicting(store)
    before = files(store)
    found = predict(store.repository, "side")
    assert files(store) == before
    assert [c.subject for c in found.contradictions] == ["Ada", "Bob"]
    assert (found.from_ours, found.from_theirs) == (2, 1)
    json.dumps(found.to_json())


def test_near_keys_with_other_residuals_are_predicted_to_lose(store: Synthetic) -> None:
    """Two prompts with almost one key: each side holds its own, merged neither can."""
    store.commit(make_request("common"))
    refs.create_branch(store.repository, "side", "HEAD", BY)
    store.commit(make_request("Ada", "French"), make_request("far"))
    for keys in store.keys.values():
        near = keys["The mother tongue of Ada is"]
        keys["Ada was born in"] = near + 0.05 * np.linalg.norm(near) * store.rng.standard_normal(len(near)) / len(near)
    refs.switch(store.repository, "side", BY)
    store.commit(make_request("Ada", "Paris", "{} was born in"))
    found = predict(store.repository, "main")
    assert found.losses[0].growth > 0.2
    assert {loss.text for loss in found.losses[:2]} == {"The mother tongue of Ada is", "Ada was born in"}
    for loss in found.losses[:2]:
        assert loss.other is not None
        assert loss.other.key_cosine > 0.9
        assert loss.other.text != loss.text
        assert loss.before < loss.after
    growths = [loss.growth for loss in found.losses]
    assert growths == sorted(growths, reverse=True)


def test_the_predicted_misfit_is_that_of_the_merge(store: Synthetic) -> None:
    two_branches(store)
    found = predict(store.repository, "side", loss=-1.0)
    merged(store, "side")
    assert len(found.losses) == 2
    for loss in found.losses:
        element = {e for e in store.active() if e[1] == loss.request}
        whole = solve(read_columns(store.repository, store.active())[loss.weight])
        expected = misfit([whole], read_columns(store.repository, element)[loss.weight])[0]
        assert loss.after == pytest.approx(expected, rel=1e-5)


def test_a_dry_run_against_the_base_or_what_is_there_already(store: Synthetic) -> None:
    two_branches(store)
    refs.create_branch(store.repository, "old", "HEAD~1", BY)
    assert predict(store.repository, "old").losses == ()
    with pytest.raises(RevisionError, match="unpatched"):
        predict(store.repository, "base")
