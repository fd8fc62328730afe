"""The active set and the state of a commit. Pure over ``commit_of(id)``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from patchhub.objects import EMPTY_SET, Commit, Element

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


def commits_read(commit_id: str | None, commit_of: CommitOf) -> int:
    """How many commits `state` and `whole_patches` read for a commit: those since the last keyframe, that one included."""
    count, cursor = 0, commit_id
    while cursor is not None:
        commit = commit_of(cursor)
        count += 1
        if commit.same_as is not None:
            cursor = commit.same_as
        elif commit.set_digest == EMPTY_SET or commit.keyframe is not None:
            break
        else:
            cursor = first_parent(commit)
    return count


def whole_patches(commit_id: str | None, commit_of: CommitOf, set_of: SetOf) -> frozenset[str]:
    """The patches that are active as a whole at a commit: shards and additive ones. Reads the commits that `state` reads."""
    changes: list[Commit] = []
    elements: set[Element] = set()
    cursor = commit_id
    while cursor is not None:
        commit = commit_of(cursor)
        if commit.same_as is not None:
            cursor = commit.same_as
        elif commit.set_digest == EMPTY_SET:
            break
        elif commit.keyframe is not None:
            elements = set(set_of(commit.keyframe.set_id))
            break
        else:
            changes.append(commit)
            cursor = first_parent(commit)
    for commit in reversed(changes):
        elements -= commit.removed
        elements |= commit.added
    return frozenset(identity for identity, request in elements if request is None)


def needs_keyframe(reads: int, blob_bytes: int, whole_bytes: int) -> bool:
    """Whether a state that takes so many commits and bytes to read is too long beside the whole delta of `whole_bytes`."""
    return reads > MAX_STATE_BLOBS or blob_bytes > MAX_STATE_FACTOR * whole_bytes


def first_parent(commit: Commit) -> str | None:
    """The commit that a commit's changes are counted against; None for a root."""
    return commit.parents[0] if commit.parents else None
