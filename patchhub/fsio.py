"""Writing to disk so that a crash at any instant leaves the old state or the new one, and the writers' lock.

Every step that changes the disk is one method of `Disk`; a test passes a disk that fails at the step it wants."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import sqlite3
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from patchhub.errors import RepositoryError

TEMPORARY_SUFFIX: Final = ".tmp"
READ_ONLY: Final = 0o444
READ_WRITE: Final = 0o666
"""Permissions of files, of which the user's umask takes away what it takes away anywhere."""
GROUP: Final = stat.S_ISGID | stat.S_IRWXG
"""What a directory that a group shares has: what is made in it belongs to the group, which may write it."""
CHUNK: Final = 1 << 20
"""Bytes per read where a file is streamed."""

_NO_LINK: Final = getattr(os, "O_NOFOLLOW", 0)
"""Whoever shares a folder may have put a link to somebody else's file where one is to be made: then nothing is opened."""

_CANNOT_SYNC_DIRECTORY: Final = frozenset({errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL})


class Disk:
    """The steps of durable writing, one method each; stateless."""

    def make_directory(self, path: Path) -> None:
        """Create one directory durably; one that is there is left as it is, unless whoever made it died before the group had it."""
        if path.is_dir():
            finish_sharing(path)
            return
        finish_sharing(path.parent)
        path.mkdir(exist_ok=True)
        finish_sharing(path)
        self.sync_directory(path.parent)

    def write(self, path: Path, chunks: Iterable[bytes], mode: int) -> None:
        """Create `path`, which must not exist, with permissions `mode` as far as the umask allows; return when it is on the disk."""
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), READ_WRITE)
        with open(descriptor, "wb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            _permit(path, file.fileno(), mode)
            self.sync(file.fileno())

    def sync(self, descriptor: int) -> None:
        """Return when what was written to an open file or directory is on the disk."""
        os.fsync(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        """Give `source` the name `target`, replacing what is there, in one step."""
        os.replace(source, target)

    def sync_directory(self, path: Path) -> None:
        """Make the names in `path` durable, where the file system can."""
        if os.name == "nt":  # directories cannot be opened there, and renames are journalled
            return
        descriptor = os.open(path, os.O_RDONLY)
        try:
            self.sync(descriptor)
        except OSError as error:
            if error.errno not in _CANNOT_SYNC_DIRECTORY:
                raise
        finally:
            os.close(descriptor)

    def connect(self, path: Path) -> sqlite3.Connection:
        """A connection to the database at `path` that starts transactions only when told to."""
        if not path.exists():  # SQLite would make it without the group, whatever the umask says
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | _NO_LINK, READ_WRITE)
            try:
                _permit(path, descriptor, READ_WRITE)
            finally:
                os.close(descriptor)
        return sqlite3.connect(path, isolation_level=None)


DISK: Final = Disk()


def is_shared(directory: Path) -> bool:
    """Whether a group shares a directory: `init --shared` says so by its permissions, and all that is made below inherits them."""
    return directory.stat().st_mode & GROUP == GROUP


def share(directory: Path) -> None:
    """Let the group of a directory write in it, and own what is made in it."""
    directory.chmod(directory.stat().st_mode | GROUP)


def finish_sharing(directory: Path) -> None:
    """Let the group have an empty directory that is in one that it shares."""
    if is_shared(directory.parent) and not is_shared(directory) and not any(directory.iterdir()):
        with contextlib.suppress(PermissionError):  # another user's
            share(directory)


def make_directories(path: Path, *, disk: Disk = DISK) -> None:
    """Create a directory and those above it that are missing."""
    if not path.parent.is_dir():
        make_directories(path.parent, disk=disk)
    disk.make_directory(path)


def _permit(path: Path, descriptor: int, mode: int) -> int:
    """Give an open file that was made as `READ_WRITE` what of `mode` the umask left, and the group's share of it; returns that.

    By its descriptor, so that nobody puts a link to another file in its place.
    """
    found = stat.S_IMODE(os.fstat(descriptor).st_mode) & mode
    found |= mode & (stat.S_IRGRP | stat.S_IWGRP) if is_shared(path.parent) else 0
    os.chmod(descriptor if os.chmod in os.supports_fd else path, found)
    return found


def temporary_path(target: Path) -> Path:
    """A new name in the directory of `target`; recognised by `TEMPORARY_SUFFIX` when a crash leaves it behind."""
    return target.with_name(f".{target.name}.{secrets.token_hex(8)}{TEMPORARY_SUFFIX}")


def write_atomically(target: Path, chunks: Iterable[bytes], *, mode: int = READ_WRITE, disk: Disk = DISK) -> None:
    """Make `target` hold the concatenated chunks: temporary file, fsync, rename, fsync of the directory.

    Raises:
        RepositoryError: the disk is full or refuses the write; `target` is as it was, or the error says that it is not.
    """
    temporary = temporary_path(target)
    try:
        with os_errors(target):
            disk.write(temporary, chunks, mode)
            disk.rename(temporary, target)
        confirm(target, disk=disk)
    except BaseException:
        with contextlib.suppress(OSError):  # what is wrong is said already; `gc` finds what stays
            temporary.unlink(missing_ok=True)
        raise


def confirm(target: Path, *, disk: Disk = DISK) -> None:
    """Make the name of a file or directory durable that was renamed to `target`.

    Raises:
        RepositoryError: the disk does not say that it is; the change is made all the same.
    """
    try:
        disk.sync_directory(target.parent)
    except OSError as error:
        raise RepositoryError(
            f"the change of {target} is made, but the disk did not confirm that it will last ({error.strerror or error})",
            remedy="Check the disk, and look before you run the command again.",
            path=str(target),
            errno=error.errno,
        ) from error


@contextlib.contextmanager
def os_errors(path: Path) -> Iterator[None]:
    """Turn an `OSError` of the body into a `RepositoryError` about `path`."""
    try:
        yield
    except OSError as error:
        raise RepositoryError(
            f"cannot write {path}: {error.strerror or error}",
            remedy="Free space or fix the permissions, then run the command again; the store is as it was.",
            path=str(path),
            errno=error.errno,
        ) from error


def read_chunks(path: Path) -> Iterator[bytes]:
    """The bytes of a file in pieces of at most `CHUNK`."""
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk


@dataclass(frozen=True)
class Span:
    """Bytes that lie in a file: all of it, or the part that one object of a pack is.

    Attributes:
        start, size: in bytes; what the file has less of is missing from what is read.
    """

    path: Path
    start: int
    size: int

    @classmethod
    def of(cls, path: Path) -> Span:
        """A whole file; `FileNotFoundError` where there is none."""
        return cls(path, 0, path.stat().st_size)

    def read(self, start: int = 0, size: int | None = None) -> bytes:
        """All of its bytes, or `size` of them from `start` on."""
        with open(self.path, "rb") as file:
            there = os.fstat(file.fileno()).st_size - self.start - start
            file.seek(self.start + start)
            return file.read(max(0, min(there, self.size - start, self.size if size is None else size)))

    def chunks(self) -> Iterator[bytes]:
        """Its bytes in pieces of at most `CHUNK`."""
        with open(self.path, "rb") as file:
            file.seek(self.start)
            left = self.size
            while left and (chunk := file.read(min(left, CHUNK))):
                left -= len(chunk)
                yield chunk


@contextlib.contextmanager
def writer_lock(path: Path, *, timeout: float) -> Iterator[None]:
    """Hold the lock file at `path`; the system frees it when the process ends, however it ends.

    Args:
        path: the lock file; created if missing.
        timeout: seconds to wait for another writer.

    Raises:
        RepositoryError: another process held the lock for all of `timeout`.
    """
    from filelock import FileLock, Timeout  # 15 ms that verbs which only read do not pay

    with os_errors(path):
        try:
            descriptor, mode = os.open(path, os.O_RDWR | os.O_CREAT | _NO_LINK, READ_WRITE), READ_WRITE
            try:
                with contextlib.suppress(PermissionError):  # another user's file
                    mode = _permit(path, descriptor, READ_WRITE)
            finally:
                os.close(descriptor)
            lock = FileLock(path, timeout=timeout, mode=mode)
            lock.acquire()
        except Timeout:
            raise RepositoryError(
                f"another process has been writing to the store for {timeout:g} s ({path})",
                remedy="Wait for it to finish, then run the command again.",
                path=str(path),
            ) from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # the system frees it with the process
            lock.release()
