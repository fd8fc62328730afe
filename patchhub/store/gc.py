"""What a store keeps for nothing, and its removal. Linear in the number of objects; no tensor is read.

Kept is all that the operation log reaches: every commit and note that a ref has ever named, with everything below. Refs,
remote refs and notes are views of that log, so whatever they name is kept, and every `undo` finds what it needs.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from patchhub.fsio import TEMPORARY_SUFFIX, os_errors
from patchhub.store.closure import Reference, closure, recorded, references
from patchhub.store.repository import Repository

METRIC_CACHE: Final = "metric"
"""The directory in the cache that holds one directory per metric id."""
SCORE_CACHE: Final = "scores"
"""The directory in the cache that holds what was measured, one file per state."""
DOWNLOADS: Final = "receive-"
"""How the directories in the cache begin that hold what a fetch downloads while it runs."""

_READ: Final = frozenset({"commit", "patch", "note", "metric"})


@dataclass(frozen=True)
class Garbage:
    """A file, or a directory, that nothing needs, and its size in bytes."""

    kind: Literal["object", "temporary", "cache"]
    path: Path
    size: int


def reachable(repository: Repository) -> set[str]:
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


def pinned(repository: Repository) -> set[Reference]:
    """What the configuration leads to: the base, and the metric where there is one."""
    base, recording = Reference("base", repository.config.base_id), repository.config.recording
    return {base} if recording is None else {base, Reference("metric", recording.metric)}


def garbage(repository: Repository, before: float) -> Iterator[Garbage]:
    """Everything that nothing needs and that was last written before an instant (seconds since 1970).

    To be called under the lock; the grace period protects what a command that has not recorded its commit yet has written.
    """
    needed = reachable(repository)
    for identity in repository.objects.ids():
        if identity not in needed:
            yield from _older("object", repository.objects.path(identity), before)
    for path in leftovers(repository):
        yield from _older("temporary", path, before)
    for path in sorted((repository.cache / METRIC_CACHE).glob("*")):
        if path.name not in needed:
            yield from _older("cache", path, before)
    for path in sorted((repository.cache / SCORE_CACHE).glob("*")):
        yield from _older("cache", path, before)


def collect(repository: Repository, before: float, *, dry_run: bool) -> list[Garbage]:
    """Find everything that is unneeded and older than an instant and, unless `dry_run`, delete it; under the lock.

    Raises:
        CorruptStoreError: the store is damaged; nothing was deleted.
        RepositoryError: a file cannot be deleted.
    """
    with repository.locked():
        found = list(garbage(repository, before))
        for item in () if dry_run else found:
            with os_errors(item.path):
                if item.path.is_dir():
                    shutil.rmtree(item.path)
                else:
                    item.path.unlink(missing_ok=True)
    return found


def leftovers(repository: Repository) -> Iterator[Path]:
    """Files and directories that interrupted writes left behind, in the store and beside it."""
    root = repository.root
    yield from repository.objects.temporary_files()
    yield from sorted(path for path in root.glob(".*") if path.suffix == TEMPORARY_SUFFIX)
    yield from sorted(root.parent.glob(f"{root.name}.*{TEMPORARY_SUFFIX}"))
    yield from sorted(repository.cache.glob(f"{DOWNLOADS}*"))


def _older(kind: Literal["object", "temporary", "cache"], path: Path, before: float) -> Iterator[Garbage]:
    """The item, if its newest file is from before the instant; not what another process moves or deletes just now."""
    try:
        files = [path, *path.rglob("*")] if path.is_dir() else [path]
        stats = [file.stat() for file in files]
    except FileNotFoundError:
        return
    if max(stat.st_mtime for stat in stats) < before:
        yield Garbage(kind, path, sum(stat.st_size for stat, file in zip(stats, files, strict=True) if file.is_file()))
