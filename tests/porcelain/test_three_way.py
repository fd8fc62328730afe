"""The merge of sets, as laws on thousands of random histories: no store, no arrays."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from patchhub.objects import Element
from patchhub.sets.merging import base_set, three_way
from patchhub.store.states import is_ancestor, merge_bases

ActiveSet = frozenset[Element]

REQUESTS = "abcde"
VALUES = st.sampled_from([None, "p0", "p1", "p2", "p3"])
SETS = st.fixed_dictionaries(dict.fromkeys(REQUESTS, VALUES)).map(
    lambda values: frozenset((patch, request) for request, patch in values.items() if patch)
)


@dataclass
class History:
    """Commits in memory: parents and sets by name."""

    parents_of: dict[str, tuple[str, ...]] = field(default_factory=dict)
    sets: dict[str, ActiveSet] = field(default_factory=dict)

    def parents(self, commit: str) -> tuple[str, ...]:
        return self.parents_of[commit]

    def add(self, elements: ActiveSet, *parents: str) -> str:
        name = f"{len(self.sets):04}"
        self.parents_of[name], self.sets[name] = parents, elements
        return name

    def merged(self, left: str, right: str) -> ActiveSet:
        base = base_set(left, right, self.parents, self.sets.__getitem__)
        return three_way(base, self.sets[left], self.sets[right])

    def merge(self, left: str, right: str) -> str:
        """As the verb does: nothing to do, fast-forward, or a commit."""
        if is_ancestor(right, left, self.parents):
            return left
        if is_ancestor(left, right, self.parents):
            return right
        return self.add(self.merged(left, right), left, right)


def edited(rng: random.Random, elements: ActiveSet, batch: int) -> ActiveSet:
    """Some requests taken out and some recorded by a new patch, at most one column each."""
    values = {request: patch for patch, request in elements}
    for request in rng.sample(REQUESTS, rng.randint(1, 3)):
        if rng.random() < 0.4:
            values.pop(request, None)
        else:
            values[request] = f"p{rng.randint(0, 9)}{batch}"
    return frozenset((patch, request) for request, patch in values.items())


def random_history(seed: int, commits: int = 14) -> tuple[History, random.Random]:
    """A root, then edits and merges on three branches; many of them criss-cross."""
    rng = random.Random(seed)
    history = History()
    tips = [history.add(edited(rng, frozenset(), 0))] * 3
    for number in range(commits):
        here = rng.randrange(3)
        if rng.random() < 0.45:
            other = rng.choice(sorted(history.sets)[-6:])
            tips[here] = history.merge(tips[here], other)
        else:
            tips[here] = history.add(edited(rng, history.sets[tips[here]], number), tips[here])
    return history, rng


def columns_per_request(elements: ActiveSet) -> int:
    requests = [request for _, request in elements]
    return max((requests.count(request) for request in requests), default=1)


def test_one_thousand_random_histories_merge_commutatively_and_idempotently():
    several = 0
    for seed in range(1500):
        history, rng = random_history(seed)
        left, right = rng.choices(sorted(history.sets)[-5:], k=2)
        merged = history.merged(left, right)
        assert merged == history.merged(right, left)
        assert columns_per_request(merged) == 1
        assert history.merged(left, left) == history.sets[left]
        done = history.merge(left, right)
        assert history.merge(done, right) == history.merge(done, left) == done
        assert history.merged(done, right) == history.merged(done, left) == history.sets[done]
        several += len(merge_bases(left, right, history.parents)) > 1
    assert several > 50  # the criss-cross case was among them


def test_three_branches_of_one_base_merge_associatively_in_a_thousand_histories():
    for seed in range(1000):
        rng = random.Random(seed)
        history = History()
        base = history.add(edited(rng, frozenset(), 0))
        tips = [history.add(edited(rng, history.sets[base], number), base) for number in range(1, 4)]
        tips = [history.add(edited(rng, history.sets[tip], 9), tip) for tip in tips]
        results = {history.sets[history.merge(history.merge(a, b), c)] for a, b, c in permutations(tips)}
        results |= {history.sets[history.merge(a, history.merge(b, c))] for a, b, c in permutations(tips)}
        assert len(results) == 1


@given(SETS, SETS, SETS)
def test_what_one_side_changed_is_kept_and_what_neither_did_stays(base, ours, theirs):
    merged = three_way(base, ours, theirs)
    for request in REQUESTS:
        was, left, right, now = ({p for p, r in side if r == request} for side in (base, ours, theirs, merged))
        if left == was:
            assert now == right
        elif right == was:
            assert now == left
        else:
            assert now in (left, right)


@given(SETS, SETS)
def test_both_sides_recorded_the_same_request_and_the_smaller_patch_stays(ours, theirs):
    merged = three_way(frozenset(), ours, theirs)
    both = {(a, b, request) for a, request in ours for b, same in theirs if same == request}
    assert all((min(a, b), request) in merged for a, b, request in both)
    assert {request for _, request in merged} == {request for _, request in ours | theirs}


def test_whole_patches_are_merged_as_elements():
    shard, other = ("s", None), ("t", None)
    assert three_way(frozenset({shard}), frozenset({shard, other}), frozenset()) == {other}


def test_a_column_made_since_wins_over_a_removal():
    assert three_way(frozenset({("p0", "a")}), frozenset(), frozenset({("p1", "a")})) == {("p1", "a")}


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("changed", [{("p", "a"), ("q", "b")}, set()])
def test_several_merge_bases_are_merged_first(swap, changed):
    """Criss-cross over two bases, {} and {a, b}, which merged are {b}: against either of them alone, one of the changes gets lost."""
    history = History()
    fact, other = ("p", "a"), ("q", "b")
    root = history.add(frozenset({fact}))
    without = history.add(frozenset(), root)
    more = history.add(frozenset({fact, other}), root)
    left = history.merge(without, more)
    right = history.merge(more, without)
    assert history.sets[left] == history.sets[right] == {other}
    edited_left = history.add(frozenset(changed), left)
    tips = (right, edited_left) if swap else (edited_left, right)
    assert len(merge_bases(*tips, history.parents)) == 2
    assert history.merged(*tips) == changed
