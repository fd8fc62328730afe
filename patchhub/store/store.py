"""A store on disk: what can be asked of it, by name, object, history and index, and the few ways in which it changes.

Order of writing: blobs and patches (the caller, through `objects`), then the commit, then operation, refs and index in
one transaction. Whoever reads goes the other way round, so a crash leaves at most unreachable objects."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Final, Literal, NamedTuple, TypeVar

from patchhub.cache import Cache
from patchhub.errors import CorruptStoreError, RepositoryError, SettingsError
from patchhub.fsio import DISK, Disk, writer_lock
from patchhub.objects import Base, Commit, Element, Note, Operation, Patch, Request, requests_from_json, set_from_json
from patchhub.store import database, revisions, states
from patchhub.store.config import DATABASE, Config, create, read_config, write_config
from patchhub.store.database import Changes, connect, database_errors, transaction
from patchhub.store.object_store import ObjectStore
from patchhub.store.states import unsound

Value = TypeVar("Value")

DIRECTORY: Final = ".patchhub"
_IN_MEMORY: Final = 1 << 28
"""Bytes of stored objects that an open store keeps in memory: a verb reads each once."""

_REMEMBERED: Final = 256
"""How many commits, patches, sets and states an instance keeps; a keyframe is never further away than half of them."""

_MOST_TEXTS: Final = 32
"""How many patches' texts an instance keeps."""

_DERIVED: Final = 2
"""How many derived values of a kind an instance keeps: those of a commit and of the one below it."""

LOCK_SECONDS: Final = 60.0

Accept = Callable[[Sequence[str]], Mapping[str, Any]]
"""Asked about commits that come in, each after its parents, once they are sound: raises to refuse them all; what it returns joins the
arguments of the operation that brings them."""


def refuse_existing(folder: Path) -> None:
    """Raise `RepositoryError` where a folder holds a store already."""
    if (folder / DIRECTORY).exists():
        raise RepositoryError(f"{folder / DIRECTORY} exists already", remedy="Use it, or choose another folder.")


class Standing(NamedTuple):
    """What is known here about whether a commit's weights are those of its facts.

    Attributes:
        proof: "checked": computed here, when it was made or when it was fetched; "claimed": its author's word alone; "trusted": they are
            not, and were accepted as they are.
        trusted: the commit that was accepted, this one or one that it stands on.
    """

    proof: Literal["checked", "claimed", "trusted"]
    trusted: str | None


class Store:
    """An open store. One instance serves one thread; close it, or use it as a context manager.

    Attributes:
        root: the ``.patchhub`` directory.
        objects: the objects on disk.
        config: the configuration as it was when the store was opened or last written here.
        database: the path of the database; `connection` is open on it, for this package alone.
        cache: a directory whose content can be deleted at any time. Front ends replace it by one that tells the user of damage.
        shared: the same for what follows from a base alone, whatever the repository. Front ends replace it by the user's own.
    """

    def __init__(self, root: Path, *, disk: Disk = DISK) -> None:
        """Open `root`, which is a ``.patchhub`` directory; see `open` and `discover`."""
        self.root = root
        self.cache = self.shared = Cache(root / "cache")
        self.objects = ObjectStore(root / "objects", disk=disk, remembered=_IN_MEMORY)
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
        self._texts: dict[str, tuple[Request, ...]] = {}
        self._derived: dict[str, dict[str, Any]] = {}

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
        shared: bool = False,
        disk: Disk = DISK,
    ) -> Store:
        """Make ``directory/.patchhub`` for the base whose canonical object is `base`, and open it.

        Args:
            shared: let the group of the directory write in it.

        Raises:
            RepositoryError: there is a store already.
        """
        root = directory / DIRECTORY
        create(root, base, base_info=base_info, settings=settings, author=author, time=time, shared=shared, disk=disk)
        return cls(root, disk=disk)

    @classmethod
    def open(cls, directory: Path, *, disk: Disk = DISK) -> Store:
        """Open ``directory/.patchhub``; `RepositoryError` if there is none."""
        root = directory / DIRECTORY
        if not root.is_dir():
            raise RepositoryError(
                f"there is no store in {directory}", remedy="Make one with `patchhub init BASE`.", path=str(directory)
            )
        return cls(root, disk=disk)

    @classmethod
    def discover(cls, start: Path, *, disk: Disk = DISK) -> Store:
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

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

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

    # --- writing ----------------------------------------------------------------------------------------------------

    def write_config(self, config: Config) -> None:
        """Replace the whole configuration; `change_config` keeps what other processes changed meanwhile."""
        self.change_config(lambda _: config)

    def change_config(self, change: Callable[[Config], Config]) -> None:
        """Replace the configuration by `change` of what is on the disk now.

        Raises:
            RepositoryError: the change is to the base's identity, or to a metric that another process pinned since this
                store was opened.
        """
        path = self.root / "config.json"
        with self.locked():
            present = read_config(path)
            config = change(present)
            if config.base_id != present.base_id:
                raise RepositoryError(
                    "a store cannot change its base", remedy="Make another one with `patchhub init BASE`."
                )
            if present.recording not in (config.recording, self.config.recording):
                raise RepositoryError(
                    "another process changed the metric of this repository meanwhile",
                    remedy="Run the command again: it then uses the metric that is there.",
                    path=str(path),
                )
            write_config(path, config, disk=self._disk)
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
        instead_of: str | None = None,
        beside: Changes = MappingProxyType({}),
    ) -> str:
        """Write a commit and move `ref` (default: the current branch) from its first parent to it; return its id.

        All that the commit refers to must be in the store.

        Args:
            instead_of: the commit that it takes the place of, from which the ref moves.
            beside: changes of other refs in the same operation, such as a note about the commit.

        Raises:
            StaleRefError: the ref is not at the commit's first parent.
            RepositoryError: the commit is not sound in itself, such as a set digest that is not that of its set.
        """
        with self.locked():
            identity = self.objects.put(commit.to_json())
            with transaction(self.connection, self.database):
                moved = ref if ref is not None else self._current_ref()
                old = instead_of or (commit.parents[0] if commit.parents else None)
                self._append(command, arguments, {moved: (old, identity), **beside}, author, time)
        return identity

    def add_note(self, note: Note, *, command: str, arguments: Mapping[str, Any], author: str, time: str) -> str:
        """Write a note and make ``refs/notes/<commit>/<suite>`` name it; return its id."""
        ref = f"{revisions.NOTES}{note.commit}/{note.suite}"
        with self.locked():
            self.commit(note.commit)
            identity = self.objects.put(note.to_json())
            with transaction(self.connection, self.database):
                old = database.read_refs(self.connection).get(ref)
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
        accept: Accept | None = None,
    ) -> Operation:
        """Change refs, each from its old to its new target, all or none; None stands for no target.

        Targets may be commits or notes that were fetched: everything below them must be in the store and is checked.

        Args:
            accept: asked about the commits that are new here.

        Raises:
            StaleRefError: a ref is not at its old target.
            RepositoryError: a tag would move.
            CorruptStoreError: something below a new target is missing or not sound.
        """
        with self.locked(), transaction(self.connection, self.database):
            return self._append(command, arguments, changes, author, time, accept)

    def undo(self, *, author: str, time: str, everything: bool = True) -> Operation:
        """Reverse the last operation that stands; repeated, the one before it. Returns the new operation."""
        return self.undo_several(1, author=author, time=time, everything=everything)[0]

    def undo_several(self, steps: int, *, author: str, time: str, everything: bool = True) -> list[Operation]:
        """Reverse the last operations that stand, all of them or, where there are not so many, none."""
        with self.locked(), transaction(self.connection, self.database):
            how = {"author": author, "time": time}
            return [database.undo(self.connection, everything=everything, **how) for _ in range(steps)]

    def redo(self, *, author: str, time: str) -> Operation:
        """Reverse the last undo that stands. Returns the new operation."""
        with self.locked(), transaction(self.connection, self.database):
            return database.redo(self.connection, author=author, time=time)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep every other writer out."""
        with writer_lock(self.root / "lock", timeout=LOCK_SECONDS):
            yield

    def _current_ref(self) -> str:
        target = database.read_refs(self.connection)[revisions.HEAD]
        symbolic = target.startswith(revisions.SYMBOLIC)
        return target[len(revisions.SYMBOLIC) :] if symbolic else revisions.HEAD

    def _append(
        self,
        command: str,
        arguments: Mapping[str, Any],
        changes: Changes,
        author: str,
        time: str,
        accept: Accept | None = None,
    ) -> Operation:
        """Add the operation and bring the index up to the new targets; inside the transaction."""
        targets = {new for _, new in changes.values() if new is not None and not new.startswith(revisions.SYMBOLIC)}
        notes = {new for ref, (_, new) in changes.items() if new is not None and ref.startswith(revisions.NOTES)}
        fresh = self._bring_in(sorted(targets - notes), sorted(notes))
        told = {} if accept is None else accept(fresh)
        return database.append(
            self.connection, command=command, arguments={**arguments, **told}, changes=changes, author=author, time=time
        )

    def _bring_in(self, commits: Sequence[str], notes: Sequence[str]) -> list[str]:
        """Index those commits and notes, and all below them, that are not yet; returns the commits, each after its parents.

        Raises:
            RepositoryError: one is unsound.
        """

        def unknown_parents(commit: str) -> list[str]:
            return [parent for parent in self.commit(commit).parents if not self._is_indexed(parent)]

        noted = [self.note(identity).commit for identity in notes]
        fresh = list(states.oldest_first([c for c in (*commits, *noted) if not self._is_indexed(c)], unknown_parents))
        if not fresh and not notes:
            return fresh
        rows = database.derive(
            ((identity, self.commit(identity)) for identity in fresh),
            ((identity, self.note(identity)) for identity in notes),
            self.patch,
            self.requests,
            lambda commit: database.rank_and_active(self.connection, commit),
        )
        database.store(self.connection, rows)
        for commit, problem in unsound(self, fresh, self.parents, self.same_sets):
            raise RepositoryError(
                f"commit {commit[:12]} is not sound: {problem}",
                remedy="Nothing was changed; fetch it again, or report it if patchhub made it.",
                commit=commit,
            )
        return fresh

    def _is_indexed(self, commit: str) -> bool:
        return database.rank_and_active(self.connection, commit) is not None


def refuse_store(repository: Store, out: Path) -> None:
    """Refuse a file or folder to write that is in a store, is one, or holds one; symbolic links are followed.

    Raises:
        SettingsError: writing or replacing ``out`` would damage a store.
    """
    target, store = Path(os.path.realpath(out)), Path(os.path.realpath(repository.root))
    if store in (target, *target.parents) or DIRECTORY in target.parts:
        what = "is in a patchhub store"
    elif target in store.parents or (target / DIRECTORY).exists():
        what = "holds a patchhub store"
    else:
        return
    raise SettingsError(f"{out} {what}", remedy="Choose a place outside of it, such as a new folder.", out=str(out))


def _remembered(memory: dict[str, Value], identity: str, derive: Callable[[], Value], most: int = _REMEMBERED) -> Value:
    """What `memory` holds for an id, derived if it is not there; the oldest entries make room."""
    if identity not in memory:
        value = derive()
        while len(memory) >= most:
            del memory[next(iter(memory))]
        memory[identity] = value
    return memory[identity]
