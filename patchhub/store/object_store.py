"""Where objects are kept: bytes under the SHA-256 of their content, written once, verified whenever read."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final, Protocol

from patchhub.canonical import object_id
from patchhub.errors import CorruptStoreError, RepositoryError
from patchhub.fsio import DISK, READ_ONLY, TEMPORARY_SUFFIX, Disk, os_errors, read_chunks, write_atomically

REMEDY: Final = "Fetch it again from a remote (`patchhub fetch --repair`) or copy the file from a backup; `patchhub fsck` lists all damage."

_ID = re.compile(r"[0-9a-f]{64}")
_DIRECTORY = re.compile(r"[0-9a-f]{2}")
_FILE = re.compile(r"[0-9a-f]{62}")


class Objects(Protocol):
    """What every holder of objects can do."""

    def put(self, data: bytes) -> str:
        """Keep `data` and return its id; putting the same bytes again changes nothing."""
        ...

    def put_file(self, source: Path) -> str:
        """Keep the content of a file, however large, and return its id."""
        ...

    def get(self, identity: str) -> bytes:
        """The bytes of an object, verified; `CorruptStoreError` if they are missing or do not hash to their name."""
        ...

    def __contains__(self, identity: object) -> bool: ...

    def ids(self, prefix: str = "") -> Iterator[str]:
        """The ids that begin with `prefix`, ascending."""
        ...


class ObjectStore:
    """Objects as files ``root/ab/cdef...``, read-only.

    Up to ``remembered`` bytes of what was read and verified are kept in memory, so that a verb reads each object once.
    A file that is there already is kept if it verifies and replaced if not, so putting the right bytes repairs rot.
    """

    def __init__(self, root: Path, *, disk: Disk = DISK, remembered: int = 0) -> None:
        self.root = root
        self._disk = disk
        self._read: dict[str, bytes] = {}
        self._room = remembered

    def put(self, data: bytes) -> str:
        identity = object_id(data)
        self._keep(identity, (data,))
        return identity

    def put_file(self, source: Path) -> str:
        """Keep the content of `source`, streamed: read once to name it and, if it is new, once to copy it."""
        identity = file_digest(source)
        self._keep(identity, _same_content(source, identity))
        return identity

    def get(self, identity: str) -> bytes:
        path = self.path(identity)
        known = self._read.get(identity)
        if known is not None:
            return known
        try:
            data = path.read_bytes()
        except OSError as error:
            raise _damaged(identity, path, f"cannot be read: {error.strerror}") from error
        if object_id(data) != identity:
            raise _damaged(identity, path, "does not hash to its name")
        if len(data) <= self._room:
            self._read[identity] = data
            self._room -= len(data)
        return data

    def __contains__(self, identity: object) -> bool:
        return isinstance(identity, str) and _ID.fullmatch(identity) is not None and self._file(identity).is_file()

    def ids(self, prefix: str = "") -> Iterator[str]:
        for directory in sorted(self.root.glob(f"{prefix[:2]}*" if prefix else "*")):
            if _DIRECTORY.fullmatch(directory.name) and directory.is_dir():
                names = (directory.name + file.name for file in directory.iterdir() if _FILE.fullmatch(file.name))
                yield from sorted(name for name in names if name.startswith(prefix))

    def path(self, identity: str) -> Path:
        """The file of an object that is there, for readers that map or stream it; its bytes are not verified.

        Raises:
            CorruptStoreError: there is no such object.
        """
        if identity not in self:
            raise _damaged(identity, self._file(identity), "is missing")
        return self._file(identity)

    def verify(self, identity: str) -> int:
        """Read the whole object and check its hash; return its size in bytes. Raises `CorruptStoreError`."""
        path = self.path(identity)
        try:
            intact = file_digest(path) == identity
        except OSError as error:
            raise _damaged(identity, path, f"cannot be read: {error.strerror}") from error
        if not intact:
            raise _damaged(identity, path, "does not hash to its name")
        return path.stat().st_size

    def temporary_files(self) -> Iterator[Path]:
        """Files that interrupted writes left behind."""
        return (path for path in sorted(self.root.glob("*/.*")) if path.suffix == TEMPORARY_SUFFIX)

    def _file(self, identity: str) -> Path:
        return self.root / identity[:2] / identity[2:]

    def _keep(self, identity: str, chunks: Iterable[bytes]) -> None:
        path = self._file(identity)
        with os_errors(path):
            if path.is_file() and file_digest(path) == identity:
                with contextlib.suppress(PermissionError):  # another user's file
                    path.touch()  # as young as a new one to `gc`
                return
            self._disk.make_directory(path.parent)
        write_atomically(path, chunks, mode=READ_ONLY, disk=self._disk)


class MemoryObjects:
    """Objects in a dictionary: the twin of `ObjectStore` without a disk."""

    def __init__(self) -> None:
        self._objects: dict[str, bytes] = {}

    def put(self, data: bytes) -> str:
        identity = object_id(data)
        self._objects[identity] = data
        return identity

    def put_file(self, source: Path) -> str:
        return self.put(source.read_bytes())

    def get(self, identity: str) -> bytes:
        if identity not in self._objects:
            raise _damaged(identity, None, "is missing")
        return self._objects[identity]

    def __contains__(self, identity: object) -> bool:
        return identity in self._objects

    def ids(self, prefix: str = "") -> Iterator[str]:
        return (identity for identity in sorted(self._objects) if identity.startswith(prefix))


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content, streamed."""
    digest = hashlib.sha256()
    for chunk in read_chunks(path):
        digest.update(chunk)
    return digest.hexdigest()


def _same_content(source: Path, identity: str) -> Iterator[bytes]:
    """The bytes of `source`; fails at the end if they are not those that were hashed as `identity`."""
    digest = hashlib.sha256()
    for chunk in read_chunks(source):
        digest.update(chunk)
        yield chunk
    if digest.hexdigest() != identity:
        raise RepositoryError(
            f"{source} changed while it was copied into the store",
            remedy="Run the command again when nothing writes to the file.",
            path=str(source),
        )


def _damaged(identity: str, path: Path | None, reason: str) -> CorruptStoreError:
    place = f" ({path})" if path else ""
    return CorruptStoreError(
        f"object {identity[:12]} {reason}{place}", remedy=REMEDY, object=identity, path=str(path) if path else None
    )
