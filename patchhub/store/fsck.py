"""Checking a whole store: every byte against its hash, every reference, the operations, and all that is derived."""

from __future__ import annotations

import os
import sqlite3
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final

from patchhub.errors import CorruptStoreError
from patchhub.objects import Operation, object_id
from patchhub.store import graph, index, operations
from patchhub.store.closure import Reference, closure, recorded, references
from patchhub.store.database import database_errors, transaction
from patchhub.store.gc import leftovers, pinned
from patchhub.store.object_store import REMEDY
from patchhub.store.repository import Repository
from patchhub.store.soundness import unsound

_RESTORE_DATABASE: Final = "Restore patchhub.db from a backup, or clone again from a remote."
_REINDEX: Final = "Run `patchhub fsck --reindex`."


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it should be: a sentence, what to do, and the same as data."""

    problem: str
    remedy: str
    harmless: bool = False
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """What a check found; `objects` and `size` (bytes) say how much was read."""

    findings: tuple[Finding, ...]
    objects: int
    size: int

    @property
    def sound(self) -> bool:
        """Whether nothing was found but harmless things."""
        return all(finding.harmless for finding in self.findings)


def check(repository: Repository, *, progress: Callable[[int, int], None] = lambda done, total: None) -> Report:
    """Check everything; writers wait only while the database is checked, not while objects are hashed.

    Args:
        repository: an open store; it is not changed.
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
    findings.extend(_leftovers(repository))
    with repository.locked():
        findings.extend(_check_database(repository))
    return Report(tuple(_once(findings)), len(names), size)


def reindex(repository: Repository) -> None:
    """Make the derived tables again from the objects that the operations lead to."""
    with repository.locked(), transaction(repository.connection, repository.database):
        changes = [operation.changes for _, operation in operations.newest_first(repository.connection)]
        reached = list(closure(recorded(changes), lambda reference: _history(repository, reference)))
        index.create(repository.connection)
        index.store(repository.connection, _derive(repository, reached))


def _verify_all(repository: Repository, names: Iterable[str]) -> Iterator[int | Finding]:
    """The size of each object, or what is wrong with it; hashed in threads, since hashing frees the interpreter."""

    def verify(name: str) -> int | Finding:
        try:
            return repository.objects.verify(name)
        except CorruptStoreError as error:
            return _from_error(error)

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        yield from pool.map(verify, names)


def _leftovers(repository: Repository) -> Iterator[Finding]:
    for path in leftovers(repository):
        yield Finding(
            f"{path} was left behind by an interrupted write",
            "`patchhub gc` deletes it when it is old.",
            harmless=True,
            facts={"path": str(path)},
        )


def _check_database(repository: Repository) -> list[Finding]:
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
    expected = operations.fold(operation.changes for operation in log)
    for ref in sorted(found.keys() | expected.keys()):
        if found.get(ref) != expected.get(ref):
            yield Finding(
                f"{ref} is at {found.get(ref)}, the operations say {expected.get(ref)}",
                _RESTORE_DATABASE,
                facts={"ref": ref, "found": found.get(ref), "expected": expected.get(ref)},
            )


def _reach(repository: Repository, roots: Iterable[Reference]) -> tuple[list[Reference], list[Finding]]:
    """All that can be reached from `roots`, and what of it is missing or malformed.

    Sets are not read: the walk through the commits derives them, and what they name was added by a commit below.
    """
    findings: list[Finding] = []

    def follow(reference: Reference) -> list[Reference]:
        try:
            if reference.kind in ("tensors", "set"):
                repository.objects.path(reference.id)
            elif reference.kind != "requests" or reference.id in repository.objects:
                return references(reference.kind, repository.objects.get(reference.id))
        except CorruptStoreError as error:
            findings.append(_from_error(error))
        return []

    return list(closure(roots, follow)), findings


def _history(repository: Repository, reference: Reference) -> list[Reference]:
    """From notes to commits and from commits to their parents: all that the index is made of."""
    if reference.kind == "note":
        return [Reference("commit", repository.note(reference.id).commit)]
    return [Reference("commit", parent) for parent in repository.commit(reference.id).parents]


def _check_commits(repository: Repository, reached: Iterable[Reference]) -> Iterator[Finding]:
    """Each commit's own rules; the active sets are derived again. The index is not asked."""
    parents: dict[str, tuple[str, ...]] = {}
    digests: dict[str, str] = {}
    for identity in _ids(reached, "commit"):
        commit = repository.commit(identity)
        parents[identity], digests[identity] = commit.parents, commit.set_digest
    generation: dict[str, int] = {}
    alike: dict[str, list[str]] = defaultdict(list)
    for identity in graph.oldest_first(parents, parents.__getitem__):
        generation[identity] = 1 + max((generation[parent] for parent in parents[identity]), default=0)
        alike[digests[identity]].append(identity)

    def same_sets(identity: str) -> set[str]:
        candidates = [other for other in alike[digests[identity]] if other != identity]
        return graph.among_ancestors(candidates, parents[identity], parents.__getitem__, generation.__getitem__)

    for identity, problem in unsound(repository, generation, parents.__getitem__, same_sets):
        yield Finding(f"commit {identity[:12]} is not sound: {problem}", REMEDY, facts={"commit": identity})


def _check_index(repository: Repository, reached: Iterable[Reference]) -> list[Finding]:
    expected = _derive(repository, reached)
    connection = repository.connection
    try:
        with database_errors(repository.database):
            connection.execute("BEGIN IMMEDIATE")  # asking the search index to check itself is a write to SQLite
            try:
                return [Finding(difference, _REINDEX) for difference in index.differences(connection, expected)]
            finally:
                connection.execute("ROLLBACK")
    except CorruptStoreError as error:
        return [Finding(error.message, _REINDEX)]


def _derive(repository: Repository, reached: Iterable[Reference]) -> index.Rows:
    reached = list(reached)
    commits = graph.oldest_first(_ids(reached, "commit"), lambda commit: repository.commit(commit).parents)
    return index.derive(
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
