"""The active set and the state of a commit. Pure over ``commit_of(id)``.

`ActiveSet` is changed in place; each change costs what it changes, whatever else is active."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Final

from patchhub.canonical import canonical_json
from patchhub.objects import EMPTY_SET, Commit, Element, digest_of_sum, element_sum, groups_of


class ActiveSet:
    """Some elements, with what is asked of them kept up: their digest, their bytes, and what no sound set has."""

    def __init__(self, elements: Iterable[Element]) -> None:
        self._patches: dict[str, set[str | None]] = {}
        self._columns: Counter[str] = Counter()
        self._encoded: dict[str, bytes] = {}  # a patch's part of `data`, while it is up to date
        self._doubled: set[str] = set()
        self._mixed: set[str] = set()
        self._sum = 0
        self.change(removed=(), added=frozenset(elements))

    def __contains__(self, element: Element) -> bool:
        return element[1] in self._patches.get(element[0], ())

    def change(self, *, removed: Iterable[Element], added: Iterable[Element]) -> None:
        """Take out what is in the set, then put in what is not."""
        for patch, request in removed:
            self._patches[patch].remove(request)
            self._changed(patch, request, -1)
        for patch, request in added:
            self._patches.setdefault(patch, set()).add(request)
            self._changed(patch, request, 1)

    @property
    def digest(self) -> str:
        """The set digest."""
        return digest_of_sum(self._sum)

    @property
    def doubled(self) -> str | None:
        """A request with more than one column in the set, the smallest id; None if there is none."""
        return min(self._doubled, default=None)

    @property
    def mixed(self) -> str | None:
        """A patch that is there both as a whole and by request, the smallest id; None if there is none."""
        return min(self._mixed, default=None)

    def data(self) -> bytes:
        """The canonical bytes of the set object.

        Raises:
            ValueError: a patch is `mixed`.
        """
        for patch in self._patches.keys() - self._encoded.keys():
            (group,) = groups_of((patch, request) for request in self._patches[patch])
            self._encoded[patch] = canonical_json(group)
        return b"[" + b",".join(self._encoded[patch] for patch in sorted(self._patches)) + b"]"

    def _changed(self, patch: str, request: str | None, by: int) -> None:
        """Keep up what is derived from the elements after one of them came (`by` 1) or went (-1)."""
        self._sum += by * element_sum([(patch, request)])
        self._encoded.pop(patch, None)
        requests = self._patches[patch]
        if not requests:
            del self._patches[patch]
        _keep(self._mixed, patch, None in requests and len(requests) > 1)
        if request is not None:
            self._columns[request] += by
            _keep(self._doubled, request, self._columns[request] > 1)
            if not self._columns[request]:
                del self._columns[request]


def _keep(names: set[str], name: str, belongs: bool) -> None:
    if belongs:
        names.add(name)
    else:
        names.discard(name)


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


def lineage(commit_id: str, commit_of: CommitOf) -> Iterator[str]:
    """The commits that a commit's weights go back to: itself, the one that it repeats or its first parent, and so on."""
    cursor: str | None = commit_id
    while cursor is not None:
        yield cursor
        commit = commit_of(cursor)
        cursor = None if commit.set_digest == EMPTY_SET else commit.same_as or first_parent(commit)


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
