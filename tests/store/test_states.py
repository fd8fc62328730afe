"""The active set and the state of a commit, over dictionaries."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from patchhub.objects import EMPTY_SET, Commit, Element, Keyframe, set_digest
from patchhub.store.states import active_set, needs_keyframe, state

P, Q, R, S, ANY = ("1" * 64, "2" * 64, "3" * 64, "4" * 64, "f" * 64)
ONE: frozenset[Element] = frozenset([(P, R)])
TWO: frozenset[Element] = frozenset([(P, R), (P, S)])


def commit(**changes: Any) -> Commit:
    """A root commit that adds nothing, with some fields replaced."""
    made = Commit(
        added=frozenset(),
        author="",
        base=ANY,
        check={},
        keyframe=None,
        message="",
        metric=None,
        parents=(),
        removed=frozenset(),
        same_as=None,
        set_digest=EMPTY_SET,
        tensors=None,
        time="2026-11-21T09:30:00Z",
    )
    return dataclasses.replace(made, **changes)


HISTORY = {
    "a": commit(added=ONE, set_digest=set_digest(ONE), tensors="da"),
    "b": commit(parents=("a",), added=TWO - ONE, set_digest=set_digest(TWO), tensors="db"),
    "c": commit(parents=("b", "x"), set_digest=set_digest(TWO), same_as="b"),
    "d": commit(parents=("c",), removed=TWO - ONE, set_digest=set_digest(ONE), same_as="a"),
    "e": commit(parents=("d",), removed=ONE, set_digest=EMPTY_SET, tensors="de"),
    "f": commit(parents=("e",), added=TWO, set_digest=set_digest(TWO), tensors="df", keyframe=Keyframe("set", "kf")),
    "g": commit(parents=("f",), added=frozenset([(Q, None)]), set_digest=ANY, tensors="dg"),
    "h": commit(parents=("g",), set_digest=ANY, tensors=None),
    "i": commit(parents=("e",), added=ONE, set_digest=set_digest(ONE), tensors="di"),
    "k": commit(parents=("a",), added=TWO - ONE, set_digest=set_digest(TWO), keyframe=Keyframe("set", None)),
}
STATES = {
    "a": ("da",),
    "b": ("da", "db"),
    "c": ("da", "db"),
    "d": ("da",),
    "e": (),
    "f": ("kf",),
    "g": ("kf", "dg"),
    "h": ("kf", "dg"),
    "i": ("di",),
    "k": (),
}
SETS = {"a": ONE, "b": TWO, "c": TWO, "d": ONE, "e": frozenset(), "f": TWO, "g": TWO | {(Q, None)}, "i": ONE, "k": TWO}


@pytest.mark.parametrize("name", STATES)
def test_state_follows_the_rule_of_the_format(name: str) -> None:
    assert state(name, HISTORY.__getitem__, {}) == STATES[name]
    for known, blobs in STATES.items():
        assert state(name, HISTORY.__getitem__, {known: blobs}) == STATES[name]


@pytest.mark.parametrize("name", SETS)
def test_active_set_is_the_sum_of_the_changes(name: str) -> None:
    for known in [{}, *({each: elements} for each, elements in SETS.items())]:
        assert active_set(name, HISTORY.__getitem__, {"set": TWO}.__getitem__, known) == SETS[name]


def test_a_keyframe_spares_what_is_below_it() -> None:
    above = {name: HISTORY[name] for name in "fg"}
    assert active_set("g", above.__getitem__, {"set": TWO}.__getitem__, {}) == SETS["g"]
    assert state("g", above.__getitem__, {}) == STATES["g"]


def test_the_unpatched_model_has_neither() -> None:
    assert active_set(None, HISTORY.__getitem__, SETS.__getitem__, {}) == frozenset()
    assert state(None, HISTORY.__getitem__, {}) == ()


@pytest.mark.parametrize(
    ("blobs", "blob_bytes", "whole_bytes", "needed"),
    [(1, 10, 10, False), (128, 20, 10, False), (129, 20, 10, True), (2, 21, 10, True), (1, 1, 0, True)],
)
def test_when_a_keyframe_is_needed(blobs: int, blob_bytes: int, whole_bytes: int, needed: bool) -> None:
    assert needs_keyframe(blobs, blob_bytes, whole_bytes) is needed
