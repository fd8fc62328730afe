"""The laws of version control on stored columns, each on a thousand random histories: merge, revert and undo as the verbs do them."""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from patchhub.porcelain import refs
from patchhub.porcelain.change import revert
from patchhub.porcelain.merge import Merged, merge
from patchhub.porcelain.refs import undo
from patchhub.store.fsck import check
from patchhub.store.states import merge_bases
from patchhub.who import Who
from tests.porcelain.synthetic import AUTHOR, BY, TIME, Synthetic, distance, make_request, make_store, stamp

HISTORIES = 1000
PER_STORE = 50
TIGHT = 1e-6  # of sums of stored changes, relative
PROVEN = 1e-5
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
"""A disk that does not wait for other programs, where there is one."""


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=MEMORY) as name:
        yield Path(name)


def head(store: Synthetic) -> str:
    return str(store.repository.head[1])


def edit(store: Synthetic, rng: random.Random, tip: str, name: str) -> str:
    """One or two new facts on a commit, sometimes one that other branches write too, and sometimes one fact taken out."""
    refs.reset(store.repository, tip, BY)
    active = store.active()
    gone = rng.sample(sorted(active, key=str), 1) if len(active) > 2 and rng.random() < 0.4 else []
    fresh = {request.id: request for request in (make_request(name), make_request(f"both {rng.randrange(3)}"))}
    known = {request for _, request in active}
    return store.commit(*(request for key, request in fresh.items() if key not in known), remove=gone)


def joined(store: Synthetic, left: str, right: str) -> str:
    """Both commits merged; the weights are the joint solution of the merged set."""
    refs.reset(store.repository, left, BY)
    done = merge(store.repository, right, stamp())
    assert isinstance(done, Merged)
    assert done.proof < PROVEN
    if done.outcome == "merged":
        assert distance(store.weights(), store.solution(store.active())) < TIGHT
    return head(store)


def grow(store: Synthetic, rng: random.Random) -> tuple[str, str, list[str]]:
    """Two tips, in every other history with edits and criss-cross merges behind them, and three branches of one base."""
    refs.switch_to_new(store.repository, f"h{rng.random()}", "base", BY)
    root = store.commit(*(make_request(f"root {number}") for number in range(2)))
    tips = [edit(store, rng, root, f"first {side}") for side in range(2)]
    branches = list(tips)
    for number in range(rng.choice([0, 0, 1, 2])):
        if rng.random() < 0.5:  # each side merges the other as it was: two merge bases from then on
            tips = [joined(store, tips[side], tips[1 - side]) for side in range(2)]
        side = rng.randrange(2)
        tips[side] = edit(store, rng, tips[side], f"later {number}")
    return tips[0], tips[1], [*branches, edit(store, rng, root, "third")]


def merges_obey(store: Synthetic, left: str, right: str, branches: list[str]) -> None:
    """Commutative and idempotent always; associative for branches of one base."""
    repository = store.repository
    both = [joined(store, left, right), joined(store, right, left)]
    assert repository.active(both[0]) == repository.active(both[1])
    assert distance(store.weights(both[0]), store.weights(both[1])) < TIGHT
    for part in (left, right, both[1]):
        assert joined(store, both[1], part) == both[1]
    a, b, c = branches
    first = both[0] if (a, b) == (left, right) else joined(store, a, b)
    grouped = [joined(store, first, c), joined(store, a, joined(store, b, c))]
    assert repository.active(grouped[0]) == repository.active(grouped[1])
    assert distance(store.weights(grouped[0]), store.weights(grouped[1])) < TIGHT


def reverts_obey(store: Synthetic, rng: random.Random, tip: str) -> int:
    """The solve of the set without what the commit changed; the same bits where the set was seen before; undo restores refs.

    Returns how many sets had been seen before.
    """
    repository, seen = store.repository, 0
    refs.reset(repository, tip, BY)
    target = rng.choice([identity for identity, _ in repository.log(tip)])
    for _ in range(2):  # the second is the revert of the revert
        before, view = head(store), repository.refs()
        change, active = repository.commit(target), store.active()
        expected = (active - change.added) | change.removed
        if expected == active or len({request for _, request in expected}) < len(expected):
            return seen
        done = revert(repository, target, stamp())
        assert store.active() == expected
        assert distance(store.weights(), store.solution(expected)) < TIGHT
        alike = [c for c, commit in repository.log(before) if repository.active(c) == expected]
        assert all(repository.state(head(store)) == repository.state(other) for other in alike)
        assert bool(alike) == (done.same_as is not None)
        seen += bool(alike)
        after = repository.refs()
        undo(repository, who=Who(AUTHOR, TIME))
        assert repository.refs() == view
        repository.redo(author=AUTHOR, time=TIME)
        assert repository.refs() == after
        target = head(store)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("block", range(HISTORIES // PER_STORE))
def test_merge_and_revert_obey_their_laws_in_a_thousand_histories(block: int, folder: Path) -> None:
    store = make_store(folder, block)
    several = seen = 0
    for seed in range(PER_STORE * block, PER_STORE * (block + 1)):
        rng = random.Random(seed)
        left, right, branches = grow(store, rng)
        several += len(merge_bases(left, right, store.repository.parents)) > 1
        merges_obey(store, left, right, branches)
        seen += reverts_obey(store, rng, head(store))
    assert several  # criss-cross histories
    assert seen  # and sets that came back were among them
    assert check(store.repository).sound
    store.repository.close()
