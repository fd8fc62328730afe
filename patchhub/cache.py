"""What is kept on disk only to save time. Every entry carries its hash: one that is damaged is never used, and is made again.

An entry is the file ``<kind>/<key>/<digest><suffix>``; the key hashes all that the content depends on, the digest is of the content. With
the digest in the name one rename publishes both, and readers that map a file open it in place (a trailer would make a safetensors file
invalid). Writers of one key never touch each other's files: a key may have several entries, each of them right."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from patchhub.canonical import canonical_json, object_id
from patchhub.errors import RepositoryError
from patchhub.fsio import CHUNK, READ_WRITE, TEMPORARY_SUFFIX, Disk, make_directories, os_errors, temporary_path

DOWNLOADS: Final = "receive-"
"""How the directories beside the kinds begin that hold what a fetch downloads while it runs."""

HOME: Final = "PATCHHUB_CACHE"
"""The environment's variable that names the folder of what a user keeps for all repositories."""

_ENTRY = re.compile(r"[\w-]+/(?:([0-9a-f]{64})\.)?[0-9a-f]{64}/[0-9a-f]{64}\.\w+", re.ASCII)
_ALONE: Final = 4 * CHUNK  # bytes that one thread hashes sooner than others are started


class _Unsynced(Disk):
    """A disk that is not waited for: what a power cut tears does not hash to its name."""

    def sync(self, descriptor: int) -> None:
        pass


_UNSYNCED: Final = _Unsynced()


def _log(message: str) -> None:
    import logging  # 5 ms that verbs which find no damage do not pay

    logging.getLogger("patchhub").warning(message)


@dataclass(frozen=True)
class Kind:
    """One kind of entry; each is defined beside the code that writes it.

    Attributes:
        name: of its folder.
        suffix: of its files.
        limit: bytes that all its entries together may take, the least recently used go first; None: no limit.
        version: raised when the same inputs give another content.
    """

    name: str
    suffix: str
    limit: int | None = None
    version: int = 1


METRIC: Final = Kind("metric", ".npy")
"""Of `editing.metric`; it stands here because showing what there is must not import torch."""


@dataclass(frozen=True)
class Cache:
    """A folder of entries, which can be deleted at any time.

    Attributes:
        folder: made when the first entry is written.
        tell: called with a sentence about every damaged entry that is met. The front ends hand in their own; without one it is logged.
    """

    folder: Path
    tell: Callable[[str], None] = field(default=_log, compare=False)
    disk: Disk = field(default=_UNSYNCED, compare=False)

    def slot(self, kind: Kind, *, of: str | None = None, **inputs: Any) -> Slot:
        """The place of what follows from some inputs, as JSON.

        Args:
            of: the object without which the content is of no use, and as long as which `gc` keeps it. Other entries go when they
                have not been used for long.
        """
        key = object_id(canonical_json({**inputs, "version": kind.version}))
        return Slot(self, kind, self.folder / kind.name / (f"{of}.{key}" if of else key))

    def files(self) -> Iterator[Path]:
        """All files but those that are being written or downloaded, entries or not, in order."""
        for path in sorted(self.folder.rglob("*")):
            downloaded = path.relative_to(self.folder).parts[0].startswith(DOWNLOADS)
            if path.suffix != TEMPORARY_SUFFIX and not downloaded and not path.is_dir():
                yield path

    def leftovers(self) -> Iterator[Path]:
        """What interrupted writes and downloads left behind."""
        yield from sorted(self.folder.glob(f"{DOWNLOADS}*"))
        yield from sorted(self.folder.glob(f"*/*/.*{TEMPORARY_SUFFIX}"))

    def owner(self, path: Path) -> str | None:
        """The object that the entry at a path is of, if it is an entry and of one."""
        found = _ENTRY.fullmatch(path.relative_to(self.folder).as_posix())
        return found[1] if found else None

    def damage(self, path: Path) -> str | None:
        """What is wrong with the file at a path, in words; None where it is sound.

        Raises:
            OSError: it cannot be opened, which says nothing about its bytes.
        """
        name = path.relative_to(self.folder)
        if not _ENTRY.fullmatch(name.as_posix()):
            return f"{name} is no entry of the cache"
        entry = f"entry {path.parent.name[-12:]}/{path.stem[:12]} of the cache ({name.parts[0]})"
        try:
            return None if digest_of(path) == path.stem else f"{entry} does not hash to its name"
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return f"{entry} cannot be read ({error.strerror})"

    def drop(self, path: Path) -> None:
        """Delete a file, and its folder if that is empty then; what cannot be deleted stays."""
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
            if path.parent != self.folder:
                path.parent.rmdir()


def user_folder(environment: Mapping[str, str]) -> Path | None:
    """Where a user keeps what follows from a base alone: ``PATCHHUB_CACHE``, else patchhub's in the folder for caches of all programs.

    None where neither is named and there is no home.
    """
    if environment.get(HOME):
        return Path(environment[HOME])
    caches = environment.get("XDG_CACHE_HOME", "")
    if Path(caches).is_absolute():  # the specification has others ignored
        return Path(caches) / "patchhub"
    try:
        return Path.home() / ".cache" / "patchhub"
    except RuntimeError:
        return None


@dataclass(frozen=True)
class Slot:
    """The place of one key's entries."""

    cache: Cache
    kind: Kind
    folder: Path

    def paths(self) -> Iterator[Path]:
        """The sound entries, the newest first. Each is read once from beginning to end; damaged ones are deleted."""
        for _, _, path in reversed(_by_age(self.folder.glob(f"*{self.kind.suffix}"))):
            try:
                problem = self.cache.damage(path)
            except OSError:  # deleted by another process meanwhile, or not ours to read
                continue
            if problem is None:
                if self.cache.owner(path) is None:
                    with contextlib.suppress(OSError):  # a cache that may only be read is of use all the same
                        os.utime(path)
                yield path
            else:
                self.cache.drop(path)
                self.cache.tell(f"{problem}; it is deleted, and is made again when it is needed")

    def path(self) -> Path | None:
        """A sound entry, to be opened in place."""
        return next(self.paths(), None)

    def contents(self) -> Iterator[bytes]:
        """The bytes of every sound entry."""
        for path in self.paths():
            with contextlib.suppress(OSError):
                yield path.read_bytes()

    def put(self, chunks: Iterable[bytes], *, check: Callable[[Path], None] = lambda written: None) -> None:
        """Add an entry.

        Args:
            check: called with the complete file before it becomes an entry, which it does not if this raises.

        Raises:
            RepositoryError: the disk refuses the write.
        """
        temporary = temporary_path(self.folder / "entry")
        try:
            with os_errors(self.folder):
                make_directories(self.folder, disk=self.cache.disk)
                self.cache.disk.write(temporary, chunks, READ_WRITE)
            check(temporary)
            with os_errors(self.folder):
                entry = self.folder / f"{digest_of(temporary)}{self.kind.suffix}"
                self.cache.disk.rename(temporary, entry)
                self._evict(entry)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise

    def keep(self, chunks: Iterable[bytes]) -> None:
        """`put`, where a disk that refuses the write stops nothing."""
        with contextlib.suppress(RepositoryError):
            self.put(chunks)

    def _evict(self, newest: Path) -> None:
        if self.kind.limit is None:
            return
        files = _by_age(self.folder.parent.glob(f"*/*{self.kind.suffix}"))
        total = sum(size for _, size, _ in files)
        for _, size, path in files:
            if total <= self.kind.limit:
                return
            if path != newest:
                self.cache.drop(path)
                total -= size


def _by_age(paths: Iterable[Path]) -> list[tuple[int, int, Path]]:
    """(time of the last use in ns, size in bytes, path) of each file, the oldest first."""
    found = []
    for path in paths:
        with contextlib.suppress(OSError):  # deleted by another process meanwhile
            status = path.stat()
            found.append((status.st_mtime_ns, status.st_size, path))
    return sorted(found)


def digest_of(path: Path) -> str:
    """The SHA-256 of the SHA-256 of each MiB of a file, so that as many threads as there are processors can share a large one.

    The file is read, not mapped: a disk that cannot give the bytes back is an `OSError` here, and would end the process there.
    """
    size = path.stat().st_size

    def leaf(start: int) -> bytes:
        with path.open("rb") as file:
            file.seek(start)
            return hashlib.sha256(file.read(CHUNK)).digest()

    starts = range(0, size, CHUNK)
    if size <= _ALONE:
        return hashlib.sha256(b"".join(map(leaf, starts))).hexdigest()
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return hashlib.sha256(b"".join(pool.map(leaf, starts))).hexdigest()
