"""Reading a store: names, objects, history, and what the index knows."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, TypeVar

from patchhub.errors import CorruptStoreError
from patchhub.objects import Base, Commit, Element, Note, Operation, Patch, Request, requests_from_json, set_from_json
from patchhub.store import database, revisions, states
from patchhub.store.config import Config
from patchhub.store.database import database_errors
from patchhub.store.object_store import ObjectStore

Value = TypeVar("Value")

_REMEMBERED: Final = 256
"""How many commits, patches, sets and states an instance keeps; a keyframe is never further away than half of them."""

_MOST_TEXTS: Final = 32
"""How many patches' texts an instance keeps."""

_DERIVED: Final = 2
"""How many derived values of a kind an instance keeps: those of a commit and of the one below it."""


class Standing(NamedTuple):
    """What is known here about whether a commit's weights are those of its facts.

    Attributes:
        proof: "checked": computed here, when it was made or when it was fetched; "claimed": its author's word alone; "trusted": they are
            not, and were accepted as they are.
        trusted: the commit that was accepted, this one or one that it stands on.
    """

    proof: Literal["checked", "claimed", "trusted"]
    trusted: str | None


class Reading:
    """Abstract: everything that can be asked of an open store. `Store` opens one, and changes it.

    Attributes:
        objects: the objects on disk.
        config: the configuration as it was when the store was opened or last written here.
        database: the path of the database; `connection` is open on it, for this package alone.
    """

    objects: ObjectStore
    config: Config
    database: Path
    connection: sqlite3.Connection

    def __init__(self) -> None:
        self._commits: dict[str, Commit] = {}
        self._patches: dict[str, Patch] = {}
        self._sets: dict[str, frozenset[Element]] = {}
        self._states: dict[str, tuple[str, ...]] = {}
        self._texts: dict[str, tuple[Request, ...]] = {}
        self._derived: dict[str, dict[str, Any]] = {}

    # --- names ---------------------------------------------------------------------------------------------

    def refs(self, ago: int = 0) -> dict[str, str]:
        """Every ref and its target, now or `ago` operations before now."""
        with database_errors(self.database):
            return database.earlier_refs(self.connection, ago) if ago else database.read_refs(self.connection)

    @property
    def head(self) -> tuple[str | None, str | None]:
        """(name of the current branch or None if HEAD is detached, id of the current commit or None before any)."""
        refs = self.refs()
        target = refs[revisions.HEAD]
        symbolic = target.startswith(revisions.SYMBOLIC)
        branch = target[len(revisions.SYMBOLIC + revisions.BRANCHES) :] if symbolic else None
        return branch, revisions.follow(revisions.HEAD, refs)

    def resolve(self, revision: str) -> str | None:
        """The commit that a revision names, None for the unpatched model; `RevisionError` if that is not one thing."""
        return revisions.resolve(revision, self)

    def commits(self, prefix: str) -> list[str]:
        """Ids of commits that begin with `prefix`; a few of them where there are many."""
        with database_errors(self.database):
            return database.commits_with_prefix(self.connection, prefix)

    def operations(self) -> Iterator[tuple[str, Operation]]:
        """(id, operation), the last one first, each verified as it is read."""
        with database_errors(self.database):
            yield from database.newest_first(self.connection)

    def trusted(self) -> frozenset[str]:
        """The commits that were accepted from elsewhere although their weights are not those of their facts."""
        with database_errors(self.database):
            found = [operation.arguments.get(database.TRUSTED) for operation in database.fetches(self.connection)]
        return frozenset(str(commit) for commits in found if isinstance(commits, list) for commit in commits)

    def standing(self, commit: str) -> Standing:
        """What is known about whether a commit's weights are those of its facts."""
        with database_errors(self.database):
            brought = list(database.fetches(self.connection))
        trusted = self.trusted() if brought else frozenset()
        below = next((c for c in states.lineage(commit, self.commit) if c in trusted), None) if trusted else None
        if below is not None:
            return Standing("trusted", below)
        taken = [operation.changes for operation in brought if database.PROVEN not in operation.arguments]
        targets = {new for changes in taken for _, new in changes.values() if new is not None and self.commits(new)}
        claimed = bool(targets) and bool(states.among_ancestors([commit], targets, self.parents, self.rank))
        return Standing("claimed" if claimed else "checked", None)

    # --- objects -------------------------------------------------------------------------------------------

    def commit(self, identity: str) -> Commit:
        """A commit, verified."""
        return _remembered(self._commits, identity, lambda: Commit.from_json(self.objects.get(identity)))

    def patch(self, identity: str) -> Patch:
        """A patch, verified."""
        return _remembered(self._patches, identity, lambda: Patch.from_json(self.objects.get(identity)))

    @property
    def base(self) -> Base:
        """What the store is about."""
        identity = self.config.base_id
        return self.derived("base", identity, lambda: Base.from_json(self.objects.get(identity)))

    def requests(self, patch: Patch) -> list[Request]:
        """The texts of a patch's requests, in its order; empty where they are withheld."""
        blob = patch.requests_blob
        if blob not in self.objects:
            return []
        found = _remembered(self._texts, blob, lambda: tuple(requests_from_json(self.objects.get(blob))), _MOST_TEXTS)
        return list(found)

    def note(self, identity: str) -> Note:
        """A note, verified."""
        return Note.from_json(self.objects.get(identity))

    # --- history and states --------------------------------------------------------------------------------

    def parents(self, commit: str) -> Sequence[str]:
        """Parents of a commit, from the index where it is there."""
        with database_errors(self.database):
            indexed = database.parents(self.connection, commit)
        return self.commit(commit).parents if indexed is None else indexed

    def rank(self, commit: str) -> int:
        """The commit's time in seconds, raised where needed to exceed its parents'."""
        return self._indexed(commit)[0]

    def active_count(self, commit: str) -> int:
        """The size of a commit's active set, without reading the set."""
        return self._indexed(commit)[1]

    def set_of(self, digest: str) -> frozenset[Element] | None:
        """The active set with that digest, if a commit of this store has it."""
        with database_errors(self.database):
            found = database.commits_with_set(self.connection, digest)
        return self.active(found[0]) if found else None

    def _indexed(self, commit: str) -> tuple[int, int]:
        with database_errors(self.database):
            found = database.rank_and_active(self.connection, commit)
        if found is None:
            raise CorruptStoreError(
                f"commit {commit[:12]} is not in the index", remedy="Run `patchhub fsck --reindex`.", commit=commit
            )
        return found

    def log(self, *starts: str) -> Iterator[tuple[str, Commit]]:
        """(id, commit) of `starts` and their ancestors, latest first, every child before its parents; lazy."""
        return ((identity, self.commit(identity)) for identity in states.walk(starts, self.parents, self.rank))

    def active(self, commit: str | None) -> frozenset[Element]:
        """The active set of a commit; empty for None, the unpatched model."""
        if commit is None:
            return frozenset()
        return _remembered(
            self._sets, commit, lambda: states.active_set(commit, self.commit, self._set_object, self._sets)
        )

    def state(self, commit: str | None) -> tuple[str, ...]:
        """The ordered parts whose sum is the commit's weight change (`states.state`); empty for the unpatched model."""
        if commit is None:
            return ()
        return _remembered(self._states, commit, lambda: states.state(commit, self.commit, self._states))

    def derived(self, kind: str, key: str, derive: Callable[[], Value]) -> Value:
        """What follows from the store's content alone and is asked for again and again: the latest few are remembered.

        Args:
            kind, key: what it is, and what it follows from.
        """
        memory: dict[str, Value] = self._derived.setdefault(kind, {})
        return _remembered(memory, key, derive, _DERIVED)

    def _set_object(self, identity: str) -> frozenset[Element]:
        return set_from_json(self.objects.get(identity))

    def find_same_set(self, digest: str, *commits: str) -> str | None:
        """The latest of `commits` and their ancestors whose set has that digest: what ``same_as`` must name.

        Where that one names an earlier commit itself, the earlier one is returned.
        """
        latest = next(iter(self._with_set(digest, commits)), None)
        return None if latest is None else self.commit(latest).same_as or latest

    def same_sets(self, identity: str) -> list[str]:
        """The proper ancestors of a commit that have its set digest, the latest first."""
        return self._with_set(self.commit(identity).set_digest, self.parents(identity))

    def _with_set(self, digest: str, commits: Sequence[str]) -> list[str]:
        """Those of `commits` and their ancestors whose set has that digest, the latest first."""
        with database_errors(self.database):
            candidates = database.commits_with_set(self.connection, digest)
        below = states.among_ancestors(candidates, commits, self.parents, self.rank)
        return [candidate for candidate in candidates if candidate in below]

    def needs_keyframe(self, parent: str | None, new_blob_bytes: int, whole_delta_bytes: int) -> bool:
        """Whether a commit on `parent` with a delta of `new_blob_bytes` must carry the whole delta as well."""
        stored = sum(self.objects.size(part) for part in self.state(parent) if states.solved_commit(part) is None)
        reads = states.commits_read(parent, self.commit) + 1
        return states.needs_keyframe(reads, stored + new_blob_bytes, whole_delta_bytes)

    def search(self, text: str, *, limit: int = 50) -> list[tuple[str, str]]:
        """(patch id, request id) of requests that hold every word of `text`, the best match first."""
        with database_errors(self.database):
            return database.search(self.connection, text, limit=limit)

    def changes_of(self, request: str) -> list[tuple[str, str, int]]:
        """(commit, patch, +1 or -1) for each commit that added or removed a request, the latest first."""
        with database_errors(self.database):
            return database.changes_of(self.connection, request)

    def scores_of(self, commit: str) -> list[tuple[str, str, float]]:
        """(suite, name, value) of every score noted for a commit."""
        with database_errors(self.database):
            return database.scores_of(self.connection, commit)


def _remembered(memory: dict[str, Value], identity: str, derive: Callable[[], Value], most: int = _REMEMBERED) -> Value:
    """What `memory` holds for an id, derived if it is not there; the oldest entries make room."""
    if identity not in memory:
        value = derive()
        while len(memory) >= most:
            del memory[next(iter(memory))]
        memory[identity] = value
    return memory[identity]
