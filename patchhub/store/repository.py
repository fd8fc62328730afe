"""A store on disk: reading it, and the few ways in which it changes.

Order of writing: blobs and patches (the caller, through `objects`), then the commit, then operation, refs and index in
one transaction. Whoever reads goes the other way round, so a crash leaves at most unreachable objects.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, TypeVar

from patchhub.errors import CorruptStoreError, RepositoryError
from patchhub.fsio import DISK, Disk, writer_lock
from patchhub.objects import (
    Commit,
    Element,
    Note,
    Operation,
    Patch,
    Request,
    requests_from_json,
    set_from_json,
)
from patchhub.store import graph, index, operations, revisions, states
from patchhub.store.closure import missing
from patchhub.store.config import Config, read_config, write_config
from patchhub.store.creation import DATABASE, create
from patchhub.store.database import connect, database_errors, transaction
from patchhub.store.object_store import ObjectStore
from patchhub.store.operations import Changes

Value = TypeVar("Value")

DIRECTORY: Final = ".patchhub"
LOCK_SECONDS: Final = 60.0
_REMEMBERED: Final = 256
"""How many commits, patches, sets and states an instance keeps; a keyframe is never further away than half of them."""


class Repository:
    """An open store. One instance serves one thread; close it, or use it as a context manager.

    Attributes:
        root: the ``.patchhub`` directory.
        objects: the objects on disk.
        cache: a directory whose content can be deleted at any time.
        config: the configuration as it was when the store was opened or last written here.
        database: the path of the database; `connection` is open on it, for this package alone.
    """

    def __init__(self, root: Path, *, disk: Disk = DISK) -> None:
        """Open `root`, which is a ``.patchhub`` directory; see `open` and `discover`."""
        self.root = root
        self.cache = root / "cache"
        self.objects = ObjectStore(root / "objects", disk=disk)
        self.config: Config = read_config(root / "config.json")
        self._disk = disk
        self.database = root / DATABASE
        if not self.database.is_file():
            raise CorruptStoreError(
                f"{self.database} is missing", remedy="Restore it from a backup or clone again.", path=str(root)
            )
        self.connection = connect(self.database, disk=disk)
        self._commits: dict[str, Commit] = {}
        self._patches: dict[str, Patch] = {}
        self._sets: dict[str, frozenset[Element]] = {}
        self._states: dict[str, tuple[str, ...]] = {}

    # --- opening and closing ----------------------------------------------------------------------------------------

    @classmethod
    def init(
        cls,
        directory: Path,
        base: bytes,
        *,
        base_info: Mapping[str, Any],
        settings: Mapping[str, Any],
        author: str,
        time: str,
        disk: Disk = DISK,
    ) -> Repository:
        """Make ``directory/.patchhub`` for the base whose canonical object is `base`, and open it.

        Raises:
            RepositoryError: there is a store already.
        """
        root = directory / DIRECTORY
        create(root, base, base_info=base_info, settings=settings, author=author, time=time, disk=disk)
        return cls(root, disk=disk)

    @classmethod
    def open(cls, directory: Path, *, disk: Disk = DISK) -> Repository:
        """Open ``directory/.patchhub``; `RepositoryError` if there is none."""
        root = directory / DIRECTORY
        if not root.is_dir():
            raise RepositoryError(
                f"there is no store in {directory}", remedy="Make one with `patchhub init BASE`.", path=str(directory)
            )
        return cls(root, disk=disk)

    @classmethod
    def discover(cls, start: Path, *, disk: Disk = DISK) -> Repository:
        """Open the store of `start` or of the nearest directory above it; `RepositoryError` if there is none."""
        start = start.absolute()
        for directory in (start, *start.parents):
            if (directory / DIRECTORY).is_dir():
                return cls.open(directory, disk=disk)
        raise RepositoryError(
            f"there is no store in {start} or above it", remedy="Make one with `patchhub init BASE`.", path=str(start)
        )

    def close(self) -> None:
        """Close the database."""
        self.connection.close()

    def __enter__(self) -> Repository:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- reading: names ---------------------------------------------------------------------------------------------

    def refs(self, ago: int = 0) -> dict[str, str]:
        """Every ref and its target, now or `ago` operations before now."""
        with database_errors(self.database):
            return operations.earlier_refs(self.connection, ago) if ago else operations.read_refs(self.connection)

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
            return index.commits_with_prefix(self.connection, prefix)

    def operations(self) -> Iterator[tuple[str, Operation]]:
        """(id, operation), the last one first, each verified as it is read."""
        with database_errors(self.database):
            yield from operations.newest_first(self.connection)

    # --- reading: objects -------------------------------------------------------------------------------------------

    def commit(self, identity: str) -> Commit:
        """A commit, verified."""
        return _remembered(self._commits, identity, lambda: Commit.from_json(self.objects.get(identity)))

    def patch(self, identity: str) -> Patch:
        """A patch, verified."""
        return _remembered(self._patches, identity, lambda: Patch.from_json(self.objects.get(identity)))

    def requests(self, patch: Patch) -> list[Request]:
        """The texts of a patch's requests, in its order; empty where they are withheld."""
        if patch.requests_blob not in self.objects:
            return []
        return requests_from_json(self.objects.get(patch.requests_blob))

    def note(self, identity: str) -> Note:
        """A note, verified."""
        return Note.from_json(self.objects.get(identity))

    # --- reading: history and states --------------------------------------------------------------------------------

    def parents(self, commit: str) -> Sequence[str]:
        """Parents of a commit, from the index where it is there."""
        with database_errors(self.database):
            indexed = index.parents(self.connection, commit)
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
            found = index.commits_with_set(self.connection, digest)
        return self.active(found[0]) if found else None

    def _indexed(self, commit: str) -> tuple[int, int]:
        with database_errors(self.database):
            found = index.rank_and_active(self.connection, commit)
        if found is None:
            raise CorruptStoreError(
                f"commit {commit[:12]} is not in the index", remedy="Run `patchhub fsck --reindex`.", commit=commit
            )
        return found

    def log(self, *starts: str) -> Iterator[tuple[str, Commit]]:
        """(id, commit) of `starts` and their ancestors, latest first, every child before its parents; lazy."""
        return ((identity, self.commit(identity)) for identity in graph.walk(starts, self.parents, self.rank))

    def active(self, commit: str | None) -> frozenset[Element]:
        """The active set of a commit; empty for None, the unpatched model."""
        if commit is None:
            return frozenset()
        return _remembered(
            self._sets, commit, lambda: states.active_set(commit, self.commit, self._set_object, self._sets)
        )

    def state(self, commit: str | None) -> tuple[str, ...]:
        """The ordered delta blobs whose sum is the commit's weight change; empty for the unpatched model."""
        if commit is None:
            return ()
        return _remembered(self._states, commit, lambda: states.state(commit, self.commit, self._states))

    def _set_object(self, identity: str) -> frozenset[Element]:
        return set_from_json(self.objects.get(identity))

    def find_same_set(self, digest: str, *commits: str) -> str | None:
        """The latest of `commits` and their ancestors whose set has that digest: what ``same_as`` must name.

        Where that one names an earlier commit itself, the earlier one is returned.
        """
        latest = next(iter(self._with_set(digest, commits)), None)
        return None if latest is None else self.commit(latest).same_as or latest

    def _with_set(self, digest: str, commits: Sequence[str]) -> list[str]:
        """Those of `commits` and their ancestors whose set has that digest, the latest first."""
        with database_errors(self.database):
            candidates = index.commits_with_set(self.connection, digest)
        if not candidates:
            return []
        lowest = min(self.rank(candidate) for candidate in candidates)
        walk = graph.walk(commits, self.parents, self.rank)
        below = set(itertools.takewhile(lambda commit: self.rank(commit) >= lowest, walk))
        return [candidate for candidate in candidates if candidate in below]

    def flaws(self, identity: str, same_sets: frozenset[str]) -> Iterator[str]:
        """In words, what is wrong with a commit of this store, given its proper ancestors with the same set digest."""
        commit = self.commit(identity)
        if commit.base != self.config.base_id:
            yield f"it is about another base ({commit.base[:12]})"
        lacking = list(missing(commit, self.patch, self.objects.__contains__))
        for reference in lacking:
            yield f"its {reference.kind} {reference.id[:12]} is missing"
        if not lacking:
            yield from states.flaws(commit, self.active(states.first_parent(commit)), same_sets)
            if len(self.state(identity)) > states.MAX_STATE_BLOBS:
                yield f"its state lists more than {states.MAX_STATE_BLOBS} blobs without a keyframe"

    def needs_keyframe(self, parent: str | None, new_blob_bytes: int, whole_delta_bytes: int) -> bool:
        """Whether a commit on `parent` with a delta of `new_blob_bytes` must carry the whole delta as well."""
        below = self.state(parent)
        stored = sum(self.objects.path(blob).stat().st_size for blob in below)
        return states.needs_keyframe(len(below) + 1, stored + new_blob_bytes, whole_delta_bytes)

    def search(self, text: str, *, limit: int = 50) -> list[tuple[str, str]]:
        """(patch id, request id) of requests that hold every word of `text`, the best match first."""
        with database_errors(self.database):
            return index.search(self.connection, text, limit=limit)

    def changes_of(self, request: str) -> list[tuple[str, str, int]]:
        """(commit, patch, +1 or -1) for each commit that added or removed a request, the latest first."""
        with database_errors(self.database):
            return index.changes_of(self.connection, request)

    def scores_of(self, commit: str) -> list[tuple[str, str, float]]:
        """(suite, name, value) of every score noted for a commit."""
        with database_errors(self.database):
            return index.scores_of(self.connection, commit)

    # --- writing ----------------------------------------------------------------------------------------------------

    def write_config(self, config: Config) -> None:
        """Replace the configuration; the base's identity cannot change."""
        if config.base_id != self.config.base_id:
            raise RepositoryError(
                "a store cannot change its base", remedy="Make another one with `patchhub init BASE`."
            )
        with self.locked():
            write_config(self.root / "config.json", config, disk=self._disk)
        self.config = config

    def record(
        self,
        commit: Commit,
        *,
        command: str,
        arguments: Mapping[str, Any],
        author: str,
        time: str,
        ref: str | None = None,
    ) -> str:
        """Write a commit and move `ref` (default: the current branch) from its first parent to it; return its id.

        All that the commit refers to must be in the store.

        Raises:
            StaleRefError: the ref is not at the commit's first parent.
            RepositoryError: the commit is not sound in itself, such as a set digest that is not that of its set.
        """
        with self.locked():
            identity = self.objects.put(commit.to_json())
            with transaction(self.connection, self.database):
                moved = ref if ref is not None else self._current_ref()
                old = commit.parents[0] if commit.parents else None
                self._append(command, arguments, {moved: (old, identity)}, author, time)
        return identity

    def add_note(self, note: Note, *, command: str, arguments: Mapping[str, Any], author: str, time: str) -> str:
        """Write a note and make ``refs/notes/<commit>/<suite>`` name it; return its id."""
        ref = f"{revisions.NOTES}{note.commit}/{note.suite}"
        with self.locked():
            self.commit(note.commit)
            identity = self.objects.put(note.to_json())
            with transaction(self.connection, self.database):
                old = operations.read_refs(self.connection).get(ref)
                self._append(command, arguments, {ref: (old, identity)}, author, time)
        return identity

    def move_refs(
        self,
        changes: Changes,
        *,
        command: str,
        arguments: Mapping[str, Any],
        author: str,
        time: str,
    ) -> Operation:
        """Change refs, each from its old to its new target, all or none; None stands for no target.

        Targets may be commits or notes that were fetched: everything below them must be in the store and is checked.

        Raises:
            StaleRefError: a ref is not at its old target.
            RepositoryError: a tag would move.
            CorruptStoreError: something below a new target is missing or not sound.
        """
        with self.locked(), transaction(self.connection, self.database):
            return self._append(command, arguments, changes, author, time)

    def undo(self, *, author: str, time: str) -> Operation:
        """Reverse the last operation that stands; repeated, the one before it. Returns the new operation."""
        with self.locked(), transaction(self.connection, self.database):
            return operations.undo(self.connection, author=author, time=time)

    def redo(self, *, author: str, time: str) -> Operation:
        """Reverse the last undo that stands. Returns the new operation."""
        with self.locked(), transaction(self.connection, self.database):
            return operations.redo(self.connection, author=author, time=time)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep every other writer out."""
        with writer_lock(self.root / "lock", timeout=LOCK_SECONDS):
            yield

    def _current_ref(self) -> str:
        target = operations.read_refs(self.connection)[revisions.HEAD]
        symbolic = target.startswith(revisions.SYMBOLIC)
        return target[len(revisions.SYMBOLIC) :] if symbolic else revisions.HEAD

    def _append(
        self, command: str, arguments: Mapping[str, Any], changes: Changes, author: str, time: str
    ) -> Operation:
        """Add the operation and bring the index up to the new targets; inside the transaction."""
        targets = {new for _, new in changes.values() if new is not None and not new.startswith(revisions.SYMBOLIC)}
        notes = {new for ref, (_, new) in changes.items() if new is not None and ref.startswith(revisions.NOTES)}
        self._bring_in(sorted(targets - notes), sorted(notes))
        return operations.append(
            self.connection, command=command, arguments=arguments, changes=changes, author=author, time=time
        )

    def _bring_in(self, commits: Sequence[str], notes: Sequence[str]) -> None:
        """Index those commits and notes, and all below them, that are not yet; `RepositoryError` if one is unsound."""

        def unknown_parents(commit: str) -> list[str]:
            return [parent for parent in self.commit(commit).parents if not self._is_indexed(parent)]

        noted = [self.note(identity).commit for identity in notes]
        fresh = list(graph.oldest_first([c for c in (*commits, *noted) if not self._is_indexed(c)], unknown_parents))
        if not fresh and not notes:
            return
        rows = index.derive(
            ((identity, self.commit(identity)) for identity in fresh),
            ((identity, self.note(identity)) for identity in notes),
            self.patch,
            self.requests,
            lambda commit: index.rank_and_active(self.connection, commit),
        )
        index.store(self.connection, rows)
        for identity in fresh:
            commit = self.commit(identity)
            same_sets = frozenset(self._with_set(commit.set_digest, commit.parents))
            for flaw in self.flaws(identity, same_sets):
                raise RepositoryError(
                    f"commit {identity[:12]} is not sound: {flaw}",
                    remedy="Nothing was changed; fetch it again, or report it if patchhub made it.",
                    commit=identity,
                )

    def _is_indexed(self, commit: str) -> bool:
        return index.rank_and_active(self.connection, commit) is not None


def _remembered(memory: dict[str, Value], identity: str, derive: Callable[[], Value]) -> Value:
    """What `memory` holds for an id, derived if it is not there; the oldest entries make room."""
    if identity not in memory:
        value = derive()
        while len(memory) >= _REMEMBERED:
            del memory[next(iter(memory))]
        memory[identity] = value
    return memory[identity]
