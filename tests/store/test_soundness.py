"""What a commit must satisfy: each rule by itself, and the walk that checks whole histories at once."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from builders import AUTHOR, TIME, make_commit, make_repository, put_patch
from faults import QUICK
from hypothesis import given
from hypothesis import strategies as st
from test_states import ANY, HISTORY, ONE, TWO, P, Q, R

from patchhub.canonical import object_id
from patchhub.objects import Commit, Element, Keyframe, set_digest, set_json
from patchhub.store import database, states
from patchhub.store.fsck import check, reindex
from patchhub.store.states import ActiveSet, flaws, misfits
from patchhub.store.store import Store

IDS = [digit * 64 for digit in "0123456789"]


# --- one commit -----------------------------------------------------------------------------------------------------


def problems(commit: Commit, before: frozenset[Element], same_sets: list[str]) -> list[str]:
    after = (before - commit.removed) | commit.added
    return [*misfits(commit, ActiveSet(before)), *flaws(commit, ActiveSet(after), same_sets)]


def test_a_sound_commit_has_no_flaws() -> None:
    assert problems(HISTORY["b"], ONE, []) == []
    assert problems(HISTORY["d"], TWO, ["a"]) == []
    whole = dataclasses.replace(HISTORY["b"], keyframe=Keyframe(object_id(set_json(TWO)), None))
    assert problems(whole, ONE, []) == []


@pytest.mark.parametrize(
    ("changes", "before", "same_sets", "flaw"),
    [
        ({"added": TWO}, ONE, [], "adds what is active"),
        ({"removed": frozenset([(Q, None)])}, ONE, [], "removes what is not active"),
        ({"set_digest": ANY}, ONE, [], "set digest"),
        ({"keyframe": Keyframe(ANY, None)}, ONE, [], "keyframe is of another set"),
        ({"same_as": "a"}, ONE, [], "names a commit that is not an ancestor"),
        ({"same_as": "x"}, ONE, ["a"], "names a commit that is not an ancestor"),
        ({}, ONE, ["a"], "which `same_as` must name"),
        (
            {"added": frozenset([(Q, R)]), "set_digest": set_digest(ONE | {(Q, R)})},
            ONE,
            [],
            "more than one column is active for request 333333333333",
        ),
        (
            {"added": frozenset([(P, None)]), "set_digest": set_digest(ONE | {(P, None)})},
            ONE,
            [],
            "patch 111111111111 is active both as a whole and by request",
        ),
    ],
)
def test_each_rule_has_its_flaw(
    changes: dict[str, Any], before: frozenset[Element], same_sets: list[str], flaw: str
) -> None:
    found = problems(dataclasses.replace(HISTORY["b"], **changes), before, same_sets)
    assert len(found) == 1
    assert flaw in found[0]


# --- the set in hand ------------------------------------------------------------------------------------------------

ELEMENTS = st.frozensets(st.tuples(st.sampled_from(IDS[:4]), st.sampled_from([*IDS[4:8], None])), max_size=12)


@given(ELEMENTS, st.lists(ELEMENTS, max_size=4))
def test_a_set_that_changes_in_place_is_the_set(first: frozenset[Element], targets: list[frozenset[Element]]) -> None:
    active, now = ActiveSet(first), first
    for target in [*targets, first]:
        active.change(removed=now - target, added=target - now)
        now = target
        columns = Counter(request for _, request in now if request)
        whole = {patch for patch, request in now if request is None}
        mixed = [patch for patch, request in now if request and patch in whole]
        assert active.digest == set_digest(now)
        assert active.doubled == min((request for request, count in columns.items() if count > 1), default=None)
        assert active.mixed == min(mixed, default=None)
        assert all((element in active) == (element in now) for element in first | target)
        if not mixed:
            assert active.data() == set_json(now)


@given(ELEMENTS, ELEMENTS)
def test_different_sets_have_different_digests(one: frozenset[Element], other: frozenset[Element]) -> None:
    assert (set_digest(one) == set_digest(other)) == (one == other)


# --- whole histories ------------------------------------------------------------------------------------------------


def plain_flaws(repository: Store, commits: list[str]) -> set[str]:
    """The same rules, commit by commit over whole sets: the oracle of the walk."""
    sets: dict[str, frozenset[Element]] = {}
    found = set()
    for identity in states.oldest_first(commits, lambda one: repository.commit(one).parents):
        commit = repository.commit(identity)
        before = sets[commit.parents[0]] if commit.parents else frozenset()
        sets[identity] = (before - commit.removed) | commit.added
        above = states.ancestors(commit.parents, lambda one: repository.commit(one).parents)
        same = [other for other in above if repository.commit(other).set_digest == commit.set_digest]
        if problems(commit, before, same):
            found.add(identity)
    return found


def forged(rng: random.Random, commit: Commit, commits: list[str], elements: frozenset[Element]) -> Commit:
    """A commit with one thing wrong, most of the time."""
    some = frozenset(rng.sample(sorted(elements, key=str), min(len(elements), 1)))
    change: dict[str, Any] = rng.choice(
        [
            {"added": commit.added | some},
            {"removed": commit.removed | some},
            {"removed": frozenset((patch, None) for patch, _ in some)},
            {"set_digest": set_digest(elements)},
            {"same_as": rng.choice(commits)},
            {"same_as": None, "tensors": commit.tensors},
            {"message": "sound after all"},
        ]
    )
    return dataclasses.replace(commit, **change)


@pytest.mark.parametrize("seed", range(40))
def test_the_walk_finds_what_the_plain_rules_find(seed: int, tmp_path: Path) -> None:
    """Edits, reverts and merges on two branches, with forged commits at the tips, past the checks of `record`."""
    rng = random.Random(seed)
    with make_repository(tmp_path, disk=QUICK) as repository:
        commits: list[str] = []
        tips: list[list[str]] = [[], []]
        for _ in range(10):
            side = rng.randrange(2)
            parents = [*tips[side], *(tips[1 - side] if rng.random() < 0.3 and tips[0] != tips[1] else [])]
            parents = parents if tips[side] else []
            active = repository.active(parents[0]) if parents else frozenset()
            fresh = put_patch(repository, range(start := rng.randrange(4), start + 2)).elements
            added = frozenset(element for element in fresh if element[1] not in {request for _, request in active})
            removed = frozenset(rng.sample(sorted(active), 1)) if active and rng.random() < 0.5 else frozenset()
            made = make_commit(repository, *parents, added=added, removed=removed, message=f"{rng.random()}")
            tips[side] = [keep(repository, made, f"refs/heads/b{len(commits)}")]
            commits += tips[side]
        for number, tip in enumerate(rng.sample(commits, 4)):
            bad = forged(rng, repository.commit(tip), commits, repository.active(commits[0]))
            commits.append(keep(repository, bad, f"refs/heads/forged{number}"))
        expected = plain_flaws(repository, commits)
        found = check(repository).findings
        assert {finding.facts["commit"] for finding in found} == expected


def keep(repository: Store, commit: Commit, ref: str) -> str:
    """Write a commit and a ref to it, past the checks of `record`, as a faulty program would."""
    identity = repository.objects.put(commit.to_json())
    connection = repository.connection
    connection.execute("BEGIN IMMEDIATE")
    if ref not in repository.refs():
        changes = {ref: (None, identity)}
        database.append(connection, command="x", arguments={}, changes=changes, author=AUTHOR, time=TIME)
    connection.execute("COMMIT")
    reindex(repository)
    assert database.rank_and_active(connection, identity) is not None
    return identity
