"""The active set and the state of a commit, and what a commit must satisfy. Pure over ``commit_of(id)``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Final

from patchhub.objects import EMPTY_SET, Commit, Element, set_digest

MAX_STATE_BLOBS: Final = 128
MAX_STATE_FACTOR: Final = 2
"""A state may list blobs of at most this many times the bytes of the whole delta."""

CommitOf = Callable[[str], Commit]
SetOf = Callable[[str], frozenset[Element]]
"""The elements of a set object."""


def active_set(
    commit_id: str | None, commit_of: CommitOf, set_of: SetOf, known: Mapping[str, frozenset[Element]]
) -> frozenset[Element]:
    """What is active at a commit: the changes of the first-parent chain since the last keyframe or `known` set."""
    changes: list[Commit] = []
    elements: set[Element] = set()
    cursor = commit_id
    while cursor is not None:
        if cursor in known:
            elements = set(known[cursor])
            break
        commit = commit_of(cursor)
        if commit.keyframe is not None:
            elements = set(set_of(commit.keyframe.set_id))
            break
        changes.append(commit)
        cursor = first_parent(commit)
    for commit in reversed(changes):
        elements -= commit.removed
        elements |= commit.added
    return frozenset(elements)


def state(commit_id: str | None, commit_of: CommitOf, known: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """The ordered delta blobs whose sum is the weight change of a commit (``docs/format.md``, "The state").

    `known` holds states that need not be derived again.
    """
    blobs: list[str] = []
    cursor = commit_id
    while cursor is not None:
        if cursor in known:
            blobs.extend(reversed(known[cursor]))
            break
        commit = commit_of(cursor)
        if commit.same_as is not None:
            cursor = commit.same_as
        elif commit.set_digest == EMPTY_SET:
            break
        elif commit.keyframe is not None:
            blobs.extend([commit.keyframe.tensors] if commit.keyframe.tensors is not None else [])
            break
        else:
            blobs.extend([commit.tensors] if commit.tensors is not None else [])
            cursor = first_parent(commit)
    return tuple(reversed(blobs))


def needs_keyframe(blobs: int, blob_bytes: int, whole_bytes: int) -> bool:
    """Whether a state of that many blobs and bytes is too long beside the whole delta of `whole_bytes`."""
    return blobs > MAX_STATE_BLOBS or blob_bytes > MAX_STATE_FACTOR * whole_bytes


def first_parent(commit: Commit) -> str | None:
    """The commit that a commit's changes are counted against; None for a root."""
    return commit.parents[0] if commit.parents else None


def flaws(commit: Commit, before: frozenset[Element], same_sets: frozenset[str]) -> Iterator[str]:
    """In words, what is wrong with a commit's set.

    Args:
        commit: the commit.
        before: the active set of its first parent.
        same_sets: its proper ancestors with the same set digest.
    """
    if not commit.removed <= before:
        yield "it removes what is not active in its first parent"
    if commit.added & before:
        yield "it adds what is active in its first parent"
    after = (before - commit.removed) | commit.added
    if set_digest(after) != commit.set_digest:
        yield "its set digest is not that of its first parent's set with its changes"
    counts = Counter(request for _, request in after if request is not None)
    doubled = [request for request, count in counts.items() if count > 1]
    if doubled:
        yield f"more than one column is active for request {min(doubled)[:12]}"
    if commit.keyframe is not None and commit.keyframe.set_id != commit.set_digest:
        yield "its keyframe is of another set"
    if commit.same_as is None and same_sets:
        yield f"its set is that of its ancestor {min(same_sets)[:12]}, which `same_as` must name"
    if commit.same_as is not None and commit.same_as not in same_sets:
        yield "`same_as` names a commit that is not an ancestor with the same set"
