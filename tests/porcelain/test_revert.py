"""`revert` and `cherry-pick`: of commits, of single facts, anywhere in history; on stored columns, without a model."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from patchhub.errors import ContradictionError, EditError, RequestError, RevisionError
from patchhub.porcelain import refs
from patchhub.porcelain.change import cherry_pick, revert
from patchhub.porcelain.merge import Merged, merge
from patchhub.porcelain.refs import undo
from patchhub.who import Who
from tests.porcelain.synthetic import AUTHOR, BY, TIME, Synthetic, distance, make_request, make_store, stamp

TIGHT = 1e-6
PROVEN = 1e-5
BORN = "{} was born in"


@pytest.fixture
def store(tmp_path: Path) -> Synthetic:
    return make_store(tmp_path)


def state(store: Synthetic, revision: str = "HEAD") -> tuple[str, ...]:
    return store.repository.state(store.repository.resolve(revision))


@pytest.mark.parametrize("block", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 3))])
def test_random_histories_of_reverts(block: int, tmp_path: Path) -> None:
    """The weights are always those of what stays; a set that was seen before gives its bits; undo gives every ref back."""
    seen_again = 0
    for seed in range(30 * block, 30 * block + 30):
        rng, store = random.Random(seed), make_store(tmp_path / str(seed), seed)
        for number in range(3):
            store.commit(*(make_request(f"{number}.{n}") for n in range(rng.randint(1, 3))))
        for _ in range(5):
            commits = [identity for identity, _ in store.repository.log(str(store.repository.head[1]))]
            before, active, refs_before = commits[0], store.active(), store.repository.refs()
            target = rng.choice(commits)
            change = store.repository.commit(target)
            expected = (active - change.added) | change.removed
            if expected == active:
                with pytest.raises(RevisionError):
                    revert(store.repository, target, stamp())
                continue
            done = revert(store.repository, target, stamp())
            assert store.active() == expected
            assert done.proof < PROVEN
            assert distance(store.weights(), store.solution(expected)) < TIGHT
            alike = [c for c in commits if store.repository.commit(c).set_digest == _digest(store, done.commit)]
            assert bool(alike) == (done.same_as is not None)
            assert all(store.repository.state(done.commit) == store.repository.state(c) for c in alike)
            seen_again += bool(alike)
            undo(store.repository, who=Who(AUTHOR, TIME))
            assert store.repository.refs() == refs_before
            assert store.repository.head[1] == before
            store.repository.redo(author=AUTHOR, time=TIME)
            assert store.repository.head[1] == done.commit
        store.repository.close()
    assert seen_again


def _digest(store: Synthetic, commit: str) -> str:
    return store.repository.commit(commit).set_digest


def test_revert_of_a_revert_brings_the_bits_back(store: Synthetic) -> None:
    store.commit(make_request("Ada"))
    store.commit(make_request("Bob"))
    store.commit(make_request("Cid"))
    before = state(store)
    first = revert(store.repository, "HEAD~1", stamp())
    assert [request.subject for request in first.removed] == ["Bob"]
    assert first.stale == 1  # Cid was recorded with Bob below
    again = revert(store.repository, "HEAD", stamp())
    assert state(store) == before
    assert again.same_as == store.repository.resolve("HEAD~2")
    json.dumps(again.to_json())


def test_revert_of_everything_is_the_base(store: Synthetic) -> None:
    store.commit(make_request("Ada"))
    revert(store.repository, "HEAD", stamp())
    assert state(store) == ()
    with pytest.raises(RevisionError, match="nothing to revert: “The mother tongue of Ada is French” is not active"):
        revert(store.repository, "HEAD~1", stamp())
    with pytest.raises(RevisionError, match="unpatched"):
        revert(store.repository, "base", stamp())


def test_a_merge_commit_is_reverted_against_its_first_parent(store: Synthetic) -> None:
    store.commit(make_request("common"))
    refs.create_branch(store.repository, "side", "HEAD", BY)
    store.commit(make_request("here"))
    here = state(store)
    refs.switch(store.repository, "side", BY)
    store.commit(make_request("there"))
    refs.switch(store.repository, "main", BY)
    assert isinstance(merge(store.repository, "side", stamp()), Merged)
    revert(store.repository, "HEAD", stamp())
    assert store.targets().keys() == {"common", "here"}
    assert state(store) == here


def test_single_facts_of_a_commit(store: Synthetic) -> None:
    requests = [make_request("Ada"), make_request("Ada", "London", BORN), make_request("Bob"), make_request("Cid")]
    store.commit(*requests)
    store.commit(make_request("Dan"))
    done = revert(store.repository, "HEAD~1", stamp(), subjects=["Ada"])
    assert sorted(request.target_new for request in done.removed) == ["French", "London"]
    revert(store.repository, "HEAD~2", stamp(), requests=[requests[2].id[:10]])
    assert store.targets().keys() == {"Cid", "Dan"}
    assert distance(store.weights(), store.solution(store.active())) < TIGHT
    assert "Bob" in store.repository.commit(str(store.repository.head[1])).message


def test_single_facts_whichever_commit_wrote_them(store: Synthetic) -> None:
    store.commit(make_request("Ada"), make_request("Bob"))
    before = state(store)
    store.commit(make_request("Ada", "London", BORN))
    done = revert(store.repository, None, stamp(), requests=[make_request("Ada", "London", BORN).id])
    assert len(done.removed) == 1
    assert state(store) == before
    revert(store.repository, None, stamp(), subjects=["Ada"])
    assert store.targets().keys() == {"Bob"}


def test_a_retarget_is_taken_back_as_one_fact(store: Synthetic) -> None:
    store.commit(make_request("Ada", "French"), make_request("Bob"))
    before = state(store)
    old = {element for element in store.active() if element[1] == make_request("Ada", "French").id}
    store.commit(make_request("Ada", "German"), make_request("Cid"), remove=old)
    done = revert(store.repository, "HEAD", stamp(), requests=[make_request("Ada", "German").id[:6]])
    assert [request.target_new for request in done.restored] == ["French"]
    assert store.targets() == {"Ada": "French", "Bob": "French", "Cid": "French"}
    revert(store.repository, "HEAD~1", stamp())
    assert state(store) == before


def test_what_is_gone_or_back_already_is_skipped_and_listed(store: Synthetic) -> None:
    store.commit(make_request("Ada"), make_request("Bob"))
    target = str(store.repository.head[1])
    revert(store.repository, target, stamp(), subjects=["Ada"])
    done = revert(store.repository, target, stamp())
    assert [request.subject for request in done.removed] == ["Bob"]
    assert [request.subject for request in done.skipped] == ["Ada"]


@pytest.mark.parametrize(
    ("named", "problem"),
    [
        ({"subjects": ["Adam"]}, "about 'Adam'"),
        ({"requests": ["zzzz"]}, "no id"),
        ({"requests": ["abc"]}, "no id"),
        ({}, "nothing is named"),
    ],
)
def test_names_that_fit_nothing_are_refused(store: Synthetic, named: dict[str, list[str]], problem: str) -> None:
    store.commit(make_request("Ada"))
    with pytest.raises(RequestError, match=problem):
        revert(store.repository, None, stamp(), **named)


def test_a_fact_does_not_come_back_beside_one_that_contradicts_it(store: Synthetic) -> None:
    store.commit(make_request("Ada", "French"))
    revert(store.repository, "HEAD", stamp())
    store.commit(make_request("Ada", "German"))
    with pytest.raises(ContradictionError, match="'German' and 'French'"):
        revert(store.repository, "HEAD~1", stamp())


def test_facts_that_were_kept_side_by_side_come_back_so(store: Synthetic) -> None:
    store.commit(make_request("Ada", "French"))
    store.commit(make_request("Ada", "German"), message="side by side, on purpose")
    before = state(store)
    revert(store.repository, "HEAD", stamp())
    revert(store.repository, "HEAD", stamp())
    assert state(store) == before
    store.commit(make_request("Bob"))
    revert(store.repository, None, stamp(), subjects=["Ada"])
    revert(store.repository, "HEAD", stamp())
    assert len(store.active()) == 3


def test_withheld_texts_can_be_reverted_by_request(store: Synthetic) -> None:
    store.commit(make_request("Ada"), make_request("Bob"), withheld=True)
    revert(store.repository, "HEAD", stamp(), requests=[make_request("Ada").id[:8]])
    assert {request for _, request in store.active()} == {make_request("Bob").id}


# --- cherry-pick ----------------------------------------------------------------------------------------------------


def test_cherry_pick_brings_one_commit_over(store: Synthetic) -> None:
    store.commit(make_request("common"))
    refs.create_branch(store.repository, "side", "HEAD", BY)
    store.commit(make_request("here"))
    picked = store.commit(make_request("good"), message="the good one")
    refs.switch(store.repository, "side", BY)
    before = store.repository.refs()
    done = cherry_pick(store.repository, picked, stamp())
    assert store.targets().keys() == {"common", "good"}
    assert store.repository.commit(done.commit).message == "the good one"
    assert done.stale == 1
    assert done.proof < PROVEN
    assert distance(store.weights(), store.solution(store.active())) < TIGHT
    undo(store.repository, who=Who(AUTHOR, TIME))
    assert store.repository.refs() == before


def test_cherry_pick_and_its_revert_cancel(store: Synthetic) -> None:
    store.commit(make_request("Ada", "French"))
    old = store.active()
    picked = store.commit(make_request("Ada", "German"), remove=old)
    refs.reset(store.repository, "HEAD~1", BY)
    before = state(store)
    cherry_pick(store.repository, picked, stamp())
    assert store.targets() == {"Ada": "German"}
    revert(store.repository, "HEAD", stamp())
    assert state(store) == before
    with pytest.raises(RevisionError, match="nothing to cherry-pick"):
        cherry_pick(store.repository, "HEAD", stamp())


def test_cherry_pick_refuses_a_contradiction_or_replaces(store: Synthetic) -> None:
    store.commit(make_request("Bob"))
    refs.create_branch(store.repository, "side", "HEAD", BY)
    store.commit(make_request("Ada", "French"))
    refs.switch(store.repository, "side", BY)
    store.commit(make_request("Ada", "German"))
    with pytest.raises(ContradictionError, match="Ada"):
        cherry_pick(store.repository, "main", stamp())
    done = cherry_pick(store.repository, "main", stamp(), on_conflict="replace")
    assert [request.target_new for request in done.removed] == ["German"]
    assert store.targets() == {"Ada": "French", "Bob": "French"}


def test_cherry_pick_replaces_every_active_fact_that_says_otherwise(store: Synthetic) -> None:
    store.commit(make_request("Bob"))
    refs.create_branch(store.repository, "side", "HEAD", BY)
    store.commit(make_request("Ada", "French"))
    refs.switch(store.repository, "side", BY)
    store.commit(make_request("Ada", "German"))
    store.commit(make_request("Ada", "Dutch"))  # kept on purpose beside the other
    done = cherry_pick(store.repository, "main", stamp(), on_conflict="replace")
    assert sorted(request.target_new for request in done.removed) == ["Dutch", "German"]
    assert store.targets() == {"Ada": "French", "Bob": "French"}


def test_cherry_pick_begins_a_branch_that_has_no_commit(store: Synthetic) -> None:
    store.commit(make_request("Ada"))
    store.commit(make_request("Bob"))
    refs.switch_to_new(store.repository, "anew", "base", BY)
    done = cherry_pick(store.repository, "main", stamp())
    assert store.repository.commit(done.commit).parents == ()
    assert store.targets().keys() == {"Bob"}


def test_columns_of_another_metric_are_refused(store: Synthetic) -> None:
    picked = store.commit(make_request("Ada"), metric=store.put_metric("other text"))
    refs.switch_to_new(store.repository, "anew", "base", BY)
    store.commit(make_request("Bob"))
    with pytest.raises(EditError, match="different metrics"):
        cherry_pick(store.repository, picked, stamp())
