"""Checking a whole store, and removing what it keeps for nothing.

`check` compares every byte with its hash, every reference, the operations, and all that is derived. `collect` is linear in the number of
objects and reads no tensor."""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Final, Literal

from patchhub.cache import Cache
from patchhub.canonical import object_id
from patchhub.errors import CorruptStoreError, RevisionError
from patchhub.fsio import TEMPORARY_SUFFIX, os_errors
from patchhub.objects import Operation
from patchhub.results import Result, told
from patchhub.store import database, object_store, states
from patchhub.store.config import is_as_written
from patchhub.store.database import database_errors, transaction
from patchhub.store.object_store import REMEDY
from patchhub.store.revisions import check_ref
from patchhub.store.states import NOTHING_PROVEN, Proofs, Reference, closure, recorded, references, unsound
from patchhub.store.store import Store

_READ: Final = frozenset({"commit", "patch", "note", "metric"})


@dataclass(frozen=True)
class Garbage(Result):
    """A file, or a directory, that nothing needs, and its size in bytes; of kind "pack": what nothing needs of a pack."""

    kind: Literal["object", "pack", "temporary", "cache"]
    path: Path
    size: int = field(metadata=told(name="bytes"))


def reachable(repository: Store) -> set[str]:
    """Ids of all objects that the operation log, and so any ref, note or `undo`, leads to.

    The patches of a keyframe's set are not looked up in the set: each was added by a commit on its chain of first parents, which is reached
    as well (a commit whose set digest says otherwise is refused when it is recorded).

    Raises:
        CorruptStoreError: something on the way is missing or damaged, so nothing can be said about what is needed.
    """

    def follow(reference: Reference) -> Iterable[Reference]:
        if reference.kind not in _READ:
            return ()
        return references(reference.kind, repository.objects.get(reference.id))

    roots = recorded(operation.changes for _, operation in repository.operations()) | pinned(repository)
    return {reference.id for reference in closure(roots, follow)}


def pinned(repository: Store) -> set[Reference]:
    """What the configuration leads to: the base, and the metric where there is one."""
    base, recording = Reference("base", repository.config.base_id), repository.config.recording
    return {base} if recording is None else {base, Reference("metric", recording.metric)}


def garbage(repository: Store, before: float, needed: Collection[str] | None = None) -> Iterator[Garbage]:
    """Everything that nothing needs and that was last written before an instant (seconds since 1970).

    To be called under the lock; the grace period protects what a command that has not recorded its commit yet has written.

    Args:
        needed: what is `reachable`, where that is known.
    """
    needed = reachable(repository) if needed is None else needed
    for identity in repository.objects.loose():
        if identity not in needed:
            yield from _older("object", repository.objects.path(identity), before)
    for pack in repository.objects.packs():
        lost = [found[1] for i in pack.index.ids() if i not in needed and (found := pack.index.find(i))]
        if lost:
            yield from (replace(item, size=sum(lost)) for item in _older("pack", pack.path, before))
    for path in leftovers(repository):
        yield from _older("temporary", path, before)
    for path in repository.cache.files():
        if repository.cache.owner(path) not in needed:
            yield from _older("cache", path, before)


def delete_garbage(repository: Store, before: float, *, dry_run: bool) -> list[Garbage]:
    """Find everything that is unneeded and older than an instant and, unless `dry_run`, delete it; under the lock.

    Raises:
        CorruptStoreError: the store is damaged; nothing was deleted.
        RepositoryError: a file cannot be deleted.
    """
    with repository.locked():
        needed = reachable(repository)
        found = list(garbage(repository, before, needed))
        for item in () if dry_run else found:
            with os_errors(item.path):
                if item.kind == "pack":
                    rotten = [pack for pack in repository.objects.packs() if pack.path == item.path]
                    lost = {identity for pack in rotten for identity in pack.index.ids()} - needed
                    repository.objects.replace_packs(rotten, lost)
                elif item.kind == "cache":
                    repository.cache.drop(item.path)
                elif item.path.is_dir():
                    shutil.rmtree(item.path)
                else:
                    item.path.unlink(missing_ok=True)
    return found


@dataclass(frozen=True)
class Packed(Result):
    """What was packed: objects that were files, and into how many packs, with those of before that were small."""

    objects: int
    packs: int


NOTHING_PACKED: Final = Packed(0, 0)


def pack_objects(repository: Store, *, dry_run: bool) -> Packed:
    """Put every object that something needs and that is a file into packs, together with packs that are less than half full.

    Objects above `object_store.LARGEST_OBJECT` stay files. Under the lock; others may read meanwhile.

    Raises:
        CorruptStoreError: the store is damaged; nothing was changed.
        RepositoryError: the disk refuses; every object is still there.
    """
    objects = repository.objects
    with repository.locked():
        needed = reachable(repository)
        loose = {i: objects.size(i) for i in objects.loose() if i in needed}
        chosen = {i: size for i, size in loose.items() if size <= object_store.LARGEST_OBJECT}
        if not chosen:
            return NOTHING_PACKED
        small = [pack for pack in objects.packs() if pack.index.size < object_store.LARGEST_PACK // 2]
        sizes = {**chosen, **{i: objects.size(i) for pack in small for i in pack.index.ids()}}
        if dry_run:
            return Packed(len(chosen), len(object_store.divided(sizes)))
        made = objects.replace_packs(small, more=chosen)
        for identity in chosen:
            objects.delete_loose(identity)
        return Packed(len(chosen), made)


def leftovers(repository: Store) -> Iterator[Path]:
    """Files and directories that interrupted writes left behind, in the store and beside it."""
    root = repository.root
    yield from repository.objects.temporary_files()
    yield from sorted(path for path in root.glob(".*") if path.suffix == TEMPORARY_SUFFIX)
    yield from sorted(root.parent.glob(f"{root.name}.*{TEMPORARY_SUFFIX}"))
    yield from repository.cache.leftovers()


def _older(kind: Literal["object", "pack", "temporary", "cache"], path: Path, before: float) -> Iterator[Garbage]:
    """The item, if its newest file is from before the instant; not what another process moves or deletes just now."""
    try:
        files = [path, *path.rglob("*")] if path.is_dir() else [path]
        stats = [file.stat() for file in files]
    except FileNotFoundError:
        return
    if max(stat.st_mtime for stat in stats) < before:
        yield Garbage(kind, path, sum(stat.st_size for stat, file in zip(stats, files, strict=True) if file.is_file()))


_RESTORE_DATABASE: Final = "Restore patchhub.db from a backup, or clone again from a remote."
_UNPROVEN: Final = "Go back before it with `patchhub reset`, or write its facts again on the commit before it."
_REINDEX: Final = "Run `patchhub fsck --reindex`."


@dataclass(frozen=True)
class Finding(Result):
    """One thing that is not as it should be: a sentence, what to do, and the same as data."""

    problem: str
    remedy: str
    harmless: bool = False
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Report(Result):
    """What a check found; `objects` and `size` (bytes) say how much was read, `proofs` whether weights are those of their facts."""

    TOLD: ClassVar = {"sound": "sound"}

    findings: tuple[Finding, ...]
    objects: int
    size: int = field(metadata=told(name="bytes"))
    proofs: Proofs = NOTHING_PROVEN

    def words(self) -> str:
        found = "; ".join(finding.problem for finding in self.findings[:3])
        verdict = "sound" if self.sound else "DAMAGED"
        return f"{self.objects} objects, {self.size / 1e6:.1f} MB: {verdict}{f' ({found})' if found else ''}"

    @property
    def sound(self) -> bool:
        """Whether nothing was found but harmless things."""
        return all(finding.harmless for finding in self.findings)


def check(repository: Store, *, progress: Callable[[int, int], None] = lambda done, total: None) -> Report:
    """Check everything; writers wait only while the database is checked, not while objects are hashed.

    Args:
        repository: an open store; damaged entries of its cache are deleted, and nothing else is changed.
        progress: called with (objects done, objects in all).
    """
    names = list(repository.objects.ids())
    findings: list[Finding] = []
    size = 0
    for position, outcome in enumerate(_verify_all(repository, names), start=1):
        if isinstance(outcome, Finding):
            findings.append(outcome)
        else:
            size += outcome
        progress(position, len(names))
    findings.extend(_check_packs(repository))
    findings.extend(_leftovers(repository))
    findings.extend(_check_cache(repository.cache))
    findings.extend(_check_config(repository.root / "config.json"))
    with repository.locked():
        findings.extend(_check_database(repository))
    return Report(tuple(_once(findings)), len(names), size)


def every_commit(repository: Store) -> list[str]:
    """All commits that the operations lead to, every parent before its children."""
    roots = recorded(operation.changes for _, operation in repository.operations())
    starts = {root.id if root.kind == "commit" else repository.note(root.id).commit for root in roots}
    return list(states.oldest_first(starts, repository.parents))


def with_proofs(repository: Store, report: Report, proofs: Proofs) -> Report:
    """A report that also says which commits do not have the weights of their facts; harmless where that was accepted with --trust."""
    trusted = repository.trusted()
    found = []
    for unproven in proofs.unproven:
        below = next((c for c in states.lineage(unproven.commit, repository.commit) if c in trusted), None)
        why = ""
        if below is not None:
            why = "; it was trusted" if below == unproven.commit else f"; it stands on {below[:12]}, which was trusted"
        found.append(Finding(unproven.words() + why, _UNPROVEN, harmless=below is not None, facts=unproven.to_json()))
    return replace(report, findings=(*report.findings, *found), proofs=proofs)


def reindex(repository: Store) -> None:
    """Make the derived tables again from the objects that the operations lead to."""
    with repository.locked(), transaction(repository.connection, repository.database):
        changes = [operation.changes for _, operation in database.newest_first(repository.connection)]
        reached = list(closure(recorded(changes), lambda reference: _history(repository, reference)))
        database.create(repository.connection)
        database.store(repository.connection, _derive(repository, reached))


def _verify_all(repository: Store, names: Iterable[str]) -> Iterator[int | Finding]:
    """The size of each object, or what is wrong with it; hashed in threads, since hashing frees the interpreter."""

    def verify(name: str) -> int | Finding:
        try:
            return repository.objects.verify(name)
        except CorruptStoreError as error:
            return _from_error(error)

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        yield from pool.map(verify, names)


def _check_packs(repository: Store) -> Iterator[Finding]:
    """Packs whose index or length is not as it was written. Objects are checked one by one, wherever they lie."""
    for pack in repository.objects.packs():
        try:
            pack.check()
        except CorruptStoreError as error:
            yield _from_error(error)


def _leftovers(repository: Store) -> Iterator[Finding]:
    for path in leftovers(repository):
        yield Finding(
            f"{path} was left behind by an interrupted write",
            "`patchhub gc` deletes it when it is old.",
            harmless=True,
            facts={"path": str(path)},
        )


def _check_cache(cache: Cache) -> Iterator[Finding]:
    """Every file of the cache that is not as it was written; each is deleted."""
    for path in cache.files():
        with suppress(OSError):  # deleted meanwhile by another process, or not ours to read
            problem = cache.damage(path)
            if problem is not None:
                cache.drop(path)
                remedy = "It was deleted; what is needed of it is made again, which costs time only."
                yield Finding(problem, remedy, harmless=True, facts={"path": str(path)})


def _check_config(path: Path) -> Iterator[Finding]:
    try:
        if not is_as_written(path):
            yield Finding(
                f"{path} is not as it was written: somebody edited it, or it is damaged",
                "Look through it (`patchhub config`); `patchhub config KEY VALUE` of any setting writes it as it then is.",
                harmless=True,
                facts={"path": str(path)},
            )
    except CorruptStoreError as error:
        yield _from_error(error)


def _check_database(repository: Store) -> list[Finding]:
    connection = repository.connection
    findings: list[Finding] = []
    try:
        with database_errors(repository.database):
            findings.extend(_check_pages(connection))
            log, damage = _read_operations(connection)
            findings.extend(damage)
            findings.extend([] if damage else _check_refs(connection, log))
    except CorruptStoreError as error:
        return [*findings, _from_error(error)]
    roots = recorded(operation.changes for operation in log) | pinned(repository)
    reached, broken = _reach(repository, roots)
    findings.extend(broken)
    if not broken:
        findings.extend(_check_commits(repository, reached))
        findings.extend(_check_index(repository, reached))
    return findings


def _check_pages(connection: sqlite3.Connection) -> Iterator[Finding]:
    for (message,) in connection.execute("PRAGMA integrity_check"):
        if message != "ok":
            yield Finding(f"the database is damaged: {message}", _RESTORE_DATABASE)


def _read_operations(connection: sqlite3.Connection) -> tuple[list[Operation], list[Finding]]:
    """The operations that can be read, oldest first, and what is wrong with the chain."""
    log: list[Operation] = []
    findings: list[Finding] = []
    previous: str | None = None
    rows = connection.execute("SELECT seq, CAST(id AS BLOB), CAST(json AS BLOB) FROM operations ORDER BY seq")
    for sequence, name, data in rows:
        facts = {"sequence": sequence}
        digest = object_id(data)
        if name != digest.encode():
            findings.append(Finding(f"operation {sequence} does not hash to its id", _RESTORE_DATABASE, facts=facts))
        try:
            operation = Operation.from_json(data)
        except CorruptStoreError as error:
            findings.append(Finding(f"operation {sequence}: {error.message}", _RESTORE_DATABASE, facts=facts))
            previous = digest
            continue
        if operation.previous != previous:
            findings.append(Finding(f"operation {sequence} does not follow the one before it", _RESTORE_DATABASE))
        log.append(operation)
        previous = digest
    if not log:
        findings.append(Finding("there are no operations", _RESTORE_DATABASE))
    return log, findings


def _check_refs(connection: sqlite3.Connection, log: Iterable[Operation]) -> Iterator[Finding]:
    found = dict(connection.execute("SELECT CAST(name AS TEXT), CAST(target AS TEXT) FROM refs"))
    expected = database.fold(operation.changes for operation in log)
    for ref in sorted(found):
        try:
            check_ref(ref)
        except RevisionError as error:
            yield Finding(error.message, error.remedy or REMEDY, facts={"ref": ref})
    for ref in sorted(found.keys() | expected.keys()):
        if found.get(ref) != expected.get(ref):
            yield Finding(
                f"{ref} is at {found.get(ref)}, the operations say {expected.get(ref)}",
                _RESTORE_DATABASE,
                facts={"ref": ref, "found": found.get(ref), "expected": expected.get(ref)},
            )


def _reach(repository: Store, roots: Iterable[Reference]) -> tuple[list[Reference], list[Finding]]:
    """All that can be reached from `roots`, and what of it is missing or malformed.

    Sets are not read: the walk through the commits derives them, and what they name was added by a commit below.
    """
    findings: list[Finding] = []

    def follow(reference: Reference) -> list[Reference]:
        try:
            if reference.kind in ("tensors", "set"):
                repository.objects.place(reference.id)
            elif reference.kind != "requests" or reference.id in repository.objects:
                return references(reference.kind, repository.objects.get(reference.id))
        except CorruptStoreError as error:
            findings.append(_from_error(error))
        return []

    return list(closure(roots, follow)), findings


def _history(repository: Store, reference: Reference) -> list[Reference]:
    """From notes to commits and from commits to their parents: all that the index is made of."""
    if reference.kind == "note":
        return [Reference("commit", repository.note(reference.id).commit)]
    return [Reference("commit", parent) for parent in repository.commit(reference.id).parents]


def _check_commits(repository: Store, reached: Iterable[Reference]) -> Iterator[Finding]:
    """Each commit's own rules; the active sets are derived again. The index is not asked."""
    parents: dict[str, tuple[str, ...]] = {}
    digests: dict[str, str] = {}
    for identity in _ids(reached, "commit"):
        commit = repository.commit(identity)
        parents[identity], digests[identity] = commit.parents, commit.set_digest
    generation: dict[str, int] = {}
    alike: dict[str, list[str]] = defaultdict(list)
    for identity in states.oldest_first(parents, parents.__getitem__):
        generation[identity] = 1 + max((generation[parent] for parent in parents[identity]), default=0)
        alike[digests[identity]].append(identity)

    def same_sets(identity: str) -> set[str]:
        candidates = [other for other in alike[digests[identity]] if other != identity]
        return states.among_ancestors(candidates, parents[identity], parents.__getitem__, generation.__getitem__)

    for identity, problem in unsound(repository, generation, parents.__getitem__, same_sets):
        yield Finding(f"commit {identity[:12]} is not sound: {problem}", REMEDY, facts={"commit": identity})


def _check_index(repository: Store, reached: Iterable[Reference]) -> list[Finding]:
    expected = _derive(repository, reached)
    connection = repository.connection
    try:
        with database_errors(repository.database):
            connection.execute("BEGIN IMMEDIATE")  # asking the search index to check itself is a write to SQLite
            try:
                return [Finding(difference, _REINDEX) for difference in database.differences(connection, expected)]
            finally:
                connection.execute("ROLLBACK")
    except CorruptStoreError as error:
        return [Finding(error.message, _REINDEX)]


def _derive(repository: Store, reached: Iterable[Reference]) -> database.Rows:
    reached = list(reached)
    commits = states.oldest_first(_ids(reached, "commit"), lambda commit: repository.commit(commit).parents)
    return database.derive(
        ((identity, repository.commit(identity)) for identity in commits),
        ((identity, repository.note(identity)) for identity in sorted(_ids(reached, "note"))),
        repository.patch,
        repository.requests,
        lambda _: None,
    )


def _ids(reached: Iterable[Reference], kind: str) -> list[str]:
    return [reference.id for reference in reached if reference.kind == kind]


def _from_error(error: CorruptStoreError) -> Finding:
    return Finding(error.message, error.remedy or REMEDY, facts=error.facts)


def _once(findings: Iterable[Finding]) -> Iterator[Finding]:
    """Each problem once: damage is met both when objects are hashed and when they are reached."""
    seen: set[str] = set()
    for finding in findings:
        if finding.problem not in seen:
            seen.add(finding.problem)
            yield finding
