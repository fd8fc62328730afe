"""Where objects are kept: bytes under the SHA-256 of their content, written once, verified whenever read; alone or in packs.

A pack is many objects in one file, and beside it an index that says where each lies (docs/format.md). Both are named by the hash of the
index. The index says which objects there are, in which order and how long, and objects are named by their content, so it settles every
byte of the pack. Whoever reads an object hashes it, wherever it lies.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from time import time
from typing import Final, Protocol, TypeVar

from patchhub.canonical import object_id
from patchhub.errors import CorruptStoreError, RepositoryError
from patchhub.fsio import (
    DISK,
    READ_ONLY,
    TEMPORARY_SUFFIX,
    Disk,
    Span,
    make_directories,
    os_errors,
    read_chunks,
    write_atomically,
)

MAGIC: Final = b"patchhub pack 1\n"
FOLDER: Final = "packs"
PACK: Final = ".pack"
INDEX: Final = ".index"

LARGEST_OBJECT: Final = 64 << 20
"""Bytes of an object that is put into a pack; larger ones are files of their own."""

LARGEST_PACK: Final = 256 << 20
"""Bytes of the packs that are written here, but for one object."""

MOST_BYTES: Final = 1 << 30
"""Bytes of the largest pack that is read from elsewhere."""

MOST_INDEX: Final = 64 << 20
"""Bytes of all indexes together that are read from one place elsewhere: 1.6 million objects."""

_FARTHEST: Final = (1 << 63) - 1  # that a file can be read at; a damaged index may say more
_RECORD: Final = 40  # 32 bytes of an id, and the end of its object in the pack as eight bytes, little-endian
_NAME = re.compile(r"[0-9a-f]{64}")
_REMEDY: Final = (
    "Fetch what it holds again from a remote (`patchhub fetch --repair`); `patchhub fsck` lists all damage."
)


@dataclass(frozen=True)
class Index:
    """Where the objects of a pack lie.

    Attributes:
        data: the bytes of the file, in the form that `of` gives them or `read` has checked.
    """

    data: bytes

    @classmethod
    def of(cls, sizes: Mapping[str, int]) -> Index:
        """The index of a pack of objects with these sizes in bytes, by id."""
        records, end = [MAGIC], 0
        for identity, size in sorted(sizes.items()):
            end += size
            records.append(bytes.fromhex(identity) + end.to_bytes(8, "little"))
        return cls(b"".join(records))

    @classmethod
    def read(cls, data: bytes, name: str) -> Index:
        """An index from bytes that may be anything.

        Raises:
            CorruptStoreError: they do not hash to their name, or are no index.
        """
        if object_id(data) != name:
            raise _damaged_pack(name, "does not hash to its name")
        index = cls(data)
        if data[: len(MAGIC)] != MAGIC or (len(data) - len(MAGIC)) % _RECORD or not len(index):
            raise _damaged_pack(name, "is no index of this format")
        identities = [index._at(place)[0] for place in range(len(index))]
        ends = [0, *(index._at(place)[1] for place in range(len(index)))]
        if any(a >= b for a, b in pairwise(identities)):
            raise _damaged_pack(name, "does not name its objects in order")
        if any(a > b for a, b in pairwise(ends)):
            raise _damaged_pack(name, "has an object that ends before it begins")
        return index

    @cached_property
    def name(self) -> str:
        """What it and its pack are called."""
        return object_id(self.data)

    def __len__(self) -> int:
        return max(0, (len(self.data) - len(MAGIC)) // _RECORD)

    @property
    def size(self) -> int:
        """Bytes of the pack."""
        return self._at(len(self) - 1)[1] if len(self) else 0

    def find(self, identity: str) -> tuple[int, int] | None:
        """Where an object begins, and its size; None where the pack does not have it."""
        place = self._first(bytes.fromhex(identity))
        if place == len(self) or self._at(place)[0].hex() != identity:
            return None
        start, end = self._at(place - 1)[1] if place else 0, self._at(place)[1]
        return (start, end - start) if start <= end <= _FARTHEST else None

    def ids(self, prefix: str = "") -> Iterator[str]:
        """The ids that begin with a prefix of hexadecimal digits, ascending."""
        place = self._first(bytes.fromhex(prefix.ljust(64, "0")))
        while place < len(self):
            identity = self._at(place)[0].hex()
            if not identity.startswith(prefix):
                return
            yield identity
            place += 1

    def places(self) -> Iterator[tuple[str, int, int]]:
        """(id, where it begins, its size) of every object, in order."""
        start = 0
        for place in range(len(self)):
            identity, end = self._at(place)
            yield identity.hex(), start, end - start
            start = end

    def _first(self, identity: bytes) -> int:
        """The place of the first object that is not before an id."""
        low, high = 0, len(self)
        while low < high:
            middle = (low + high) // 2
            if self._at(middle)[0] < identity:
                low = middle + 1
            else:
                high = middle
        return low

    def _at(self, place: int) -> tuple[bytes, int]:
        start = len(MAGIC) + _RECORD * place
        return self.data[start : start + 32], int.from_bytes(self.data[start + 32 : start + _RECORD], "little")


@dataclass(frozen=True)
class Pack:
    """A pack on this disk."""

    path: Path
    index: Index

    @property
    def index_path(self) -> Path:
        return self.path.with_suffix(INDEX)

    @property
    def name(self) -> str:
        """From where it lies; whether that is the hash of its index is not looked at."""
        return self.path.stem

    def place(self, identity: str) -> Span | None:
        found = self.index.find(identity)
        return None if found is None else Span(self.path, *found)

    def check(self) -> None:
        """Its index, and its size; not its objects.

        Raises:
            CorruptStoreError: they are not what they should be.
        """
        Index.read(self.index.data, self.name)
        try:
            size = self.path.stat().st_size
        except OSError as error:
            raise _damaged_pack(self.name, f"is without its objects ({error.strerror})") from error
        if size != self.index.size:
            raise _damaged_pack(self.name, f"has {size} bytes of objects, not {self.index.size}")


def pack_path(name: str, suffix: str) -> str:
    """Where a pack or its index lies in a store and in a remote."""
    return f"{FOLDER}/{name}{suffix}"


def packs_in(folder: Path, known: Mapping[Path, Pack]) -> dict[Path, Pack]:
    """The packs in a folder by the path of their index; those that are known are not read again.

    What is too short for an index is passed over; `fsck` tells of it.
    """
    found = {}
    for path in _listed(folder):
        if path.suffix == INDEX and _NAME.fullmatch(path.stem):
            with contextlib.suppress(OSError):  # gone meanwhile
                found[path] = known.get(path) or Pack(path.with_suffix(PACK), Index(path.read_bytes()))
    return found


def strays(folder: Path) -> Iterator[Path]:
    """Packs without an index: whoever wrote them died before they counted."""
    there = _listed(folder)
    indexes = {path for path in there if path.suffix == INDEX}
    yield from (path for path in there if path.suffix == PACK and path.with_suffix(INDEX) not in indexes)


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def divided(sizes: Mapping[str, int]) -> list[list[str]]:
    """Ids in groups that make one pack each: in order, each as long as fits."""
    groups: list[list[str]] = []
    total = 0
    for identity, size in sorted(sizes.items()):
        if not groups or total + size > LARGEST_PACK:
            groups.append([])
            total = 0
        groups[-1].append(identity)
        total += size
    return groups


def content(objects: Sequence[tuple[str, Span]]) -> Iterator[bytes]:
    """The bytes of a pack of objects in ascending order of their ids.

    Raises:
        CorruptStoreError: the bytes of one are not those of its name.
    """
    for identity, place in objects:
        digest = sha256()
        for chunk in place.chunks():
            digest.update(chunk)
            yield chunk
        if digest.hexdigest() != identity:
            raise CorruptStoreError(
                f"object {identity[:12]} does not hash to its name, so it is not packed ({place.path})",
                remedy=_REMEDY,
                object=identity,
            )


def write_pack(folder: Path, objects: Mapping[str, Span], *, disk: Disk) -> Pack:
    """Write objects as one pack, the index last: without it the pack does not count.

    Raises:
        CorruptStoreError, RepositoryError: an object is damaged, or the disk refuses; there is no new pack then.
    """
    index = Index.of({identity: place.size for identity, place in objects.items()})
    pack = Pack(folder / f"{index.name}{PACK}", index)
    with os_errors(folder):
        make_directories(folder, disk=disk)
    write_atomically(pack.path, content(sorted(objects.items())), mode=READ_ONLY, disk=disk)
    write_atomically(pack.index_path, (index.data,), mode=READ_ONLY, disk=disk)
    return pack


def delete_packs(packs: Iterable[Pack]) -> None:
    """The index first: a pack without one does not count."""
    for pack in packs:
        with os_errors(pack.path):
            pack.index_path.unlink(missing_ok=True)
            pack.path.unlink(missing_ok=True)


def _damaged_pack(name: str, reason: str) -> CorruptStoreError:
    return CorruptStoreError(f"pack {name[:12]} {reason}", remedy=_REMEDY, pack=name)


Value = TypeVar("Value")

REMEDY: Final = "Fetch it again from a remote (`patchhub fetch --repair`) or copy the file from a backup; `patchhub fsck` lists all damage."

_ID = re.compile(r"[0-9a-f]{64}")
_DIRECTORY = re.compile(r"[0-9a-f]{2}")
_FILE = re.compile(r"[0-9a-f]{62}")
_TICK: Final = 3.0  # seconds: changes of a folder that are nearer to one another may have the same time
_DIGITS = re.compile(r"[0-9a-f]{1,64}")


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
    """Objects as files ``root/ab/cdef...``, read-only, and in packs in the folder ``packs`` beside it.

    Up to ``remembered`` bytes of what was read and verified are kept in memory, so that a verb reads each object once.
    A file that is there already is kept if it verifies and replaced if not, so putting the right bytes repairs rot. An object may lie at
    several places; one that is damaged is passed over for another, a file before a pack. Other processes pack and pack again while this
    one reads: what is not found, or gone, is looked for in the packs that there are then.
    """

    def __init__(self, root: Path, *, disk: Disk = DISK, remembered: int = 0) -> None:
        self.root = root
        self._disk = disk
        self._read: dict[str, bytes] = {}
        self._room = remembered
        self._folder = root.with_name(FOLDER)
        self._packs: dict[Path, Pack] = {}
        self._listed: tuple[int, float] | None = None  # when the folder of packs changed last, and when it was listed

    def put(self, data: bytes) -> str:
        identity = object_id(data)
        self._keep(identity, (data,))
        return identity

    def put_file(self, source: Path) -> str:
        """Keep the content of `source`, streamed: read once to name it and, if it is new, once to copy it."""
        return self.put_span(Span.of(source))

    def put_span(self, source: Span) -> str:
        """Keep what lies somewhere in a file, streamed likewise."""
        identity = span_digest(source)
        self._keep(identity, _same_content(source, identity))
        return identity

    def put_packed(self, objects: Mapping[str, Span]) -> None:
        """Keep many objects, as packs; those that are large as files.

        Raises:
            CorruptStoreError, RepositoryError: the bytes of one are not those of its name, or the disk refuses.
        """
        small = {identity: place for identity, place in objects.items() if place.size <= LARGEST_OBJECT}
        for identity in objects.keys() - small.keys():
            write_atomically(
                self._made(identity), content([(identity, objects[identity])]), mode=READ_ONLY, disk=self._disk
            )
        self._packed(small)

    def get(self, identity: str) -> bytes:
        known = self._read.get(identity)
        if known is not None:
            return known
        data = self._sound(identity, Span.read, object_id)
        if len(data) <= self._room:
            self._read[identity] = data
            self._room -= len(data)
        return data

    def __contains__(self, identity: object) -> bool:
        return isinstance(identity, str) and _ID.fullmatch(identity) is not None and bool(self._places(identity))

    def ids(self, prefix: str = "") -> Iterator[str]:
        found = set(self.loose(prefix))
        if not prefix or _DIGITS.fullmatch(prefix):
            for pack in self.packs():
                found.update(pack.index.ids(prefix))
        yield from sorted(found)

    def loose(self, prefix: str = "") -> Iterator[str]:
        """The ids of objects that are files of their own, ascending."""
        for directory in sorted(self.root.glob(f"{prefix[:2]}*" if prefix else "*")):
            if _DIRECTORY.fullmatch(directory.name) and directory.is_dir():
                names = (directory.name + file.name for file in directory.iterdir() if _FILE.fullmatch(file.name))
                yield from sorted(name for name in names if name.startswith(prefix))

    def packs(self) -> list[Pack]:
        """The packs that there are now, by name."""
        try:
            changed = self._folder.stat().st_mtime_ns
        except OSError:
            changed = 0
        settled = self._listed is not None and self._listed[1] - changed / 1e9 > _TICK
        if self._listed is None or self._listed[0] != changed or not settled:
            self._listed = changed, time()
            self._packs = packs_in(self._folder, self._packs)
        return list(self._packs.values())

    def place(self, identity: str) -> Span:
        """Where an object lies, for readers that map or stream it; its bytes are not verified.

        Raises:
            CorruptStoreError: there is no such object.
        """
        places = self._places(identity) if _ID.fullmatch(identity) else []
        if not places:
            raise _damaged(identity, self._file(identity), "is missing")
        return places[0]

    def path(self, identity: str) -> Path:
        """The file of an object that is a file of its own.

        Raises:
            CorruptStoreError: there is none.
        """
        path = self._file(identity)
        if _ID.fullmatch(identity) is None or not path.is_file():
            raise _damaged(identity, path, "is missing")
        return path

    def size(self, identity: str) -> int:
        """Bytes of an object that is there; `CorruptStoreError` where there is none."""
        return self.place(identity).size

    def verify(self, identity: str) -> int:
        """Read the whole object and check its hash; return its size in bytes. Raises `CorruptStoreError`."""
        return self._sound(identity, lambda place: place, span_digest).size

    def delete_loose(self, identity: str) -> None:
        """Delete the file of an object that lies in a pack too, once that copy is seen to be sound; else it stays."""
        places = [place for place in self._places(identity) if place.path.suffix == PACK]
        if any(self._is_sound(identity, place) for place in places):
            with os_errors(self._file(identity)):
                self._file(identity).unlink(missing_ok=True)

    def replace_packs(self, old: Iterable[Pack], without: Collection[str] = (), *, more: Iterable[str] = ()) -> int:
        """Write the objects of some packs, without some of them and with others that are files, as new packs, and delete the old ones.

        Returns how many packs there are in their place.

        Raises:
            RepositoryError, CorruptStoreError: an object that stays is damaged, or the disk refuses; all old packs are there still.
        """
        old = list(old)
        wanted = {identity for pack in old for identity in pack.index.ids()}.difference(without).union(more)
        try:
            new = self._packed({identity: self.place(identity) for identity in sorted(wanted)})
        except CorruptStoreError:  # one is damaged where it was read, and may lie elsewhere too
            new = self._packed({i: self._sound(i, lambda place: place, span_digest) for i in sorted(wanted)})
        kept = {pack.path for pack in new}
        delete_packs(pack for pack in old if pack.path not in kept)
        self.packs()
        return len(new)

    def _packed(self, places: Mapping[str, Span]) -> list[Pack]:
        """Packs of objects, whose bytes are checked on the way."""
        return [
            write_pack(self._folder, {identity: places[identity] for identity in group}, disk=self._disk)
            for group in divided({identity: place.size for identity, place in places.items()})
        ]

    def temporary_files(self) -> Iterator[Path]:
        """Files that interrupted writes left behind."""
        for folder in (self.root, self._folder):
            yield from (path for path in sorted(folder.glob("*/.*")) if path.suffix == TEMPORARY_SUFFIX)
        yield from strays(self._folder)

    def _places(self, identity: str) -> list[Span]:
        """Where an object lies, files first."""
        for fresh in (False, True):
            known = self.packs() if fresh or self._listed is None else self._packs.values()
            found = [place for place in (pack.place(identity) for pack in known) if place is not None]
            with contextlib.suppress(OSError):
                if self._file(identity).is_file():
                    found.insert(0, Span.of(self._file(identity)))
            if found:
                return found
        return []

    def _sound(self, identity: str, read: Callable[[Span], Value], digest: Callable[[Value], str]) -> Value:
        """What is read of the first place whose bytes hash to the name.

        Raises:
            CorruptStoreError: there is none.
        """
        reason, path = "is missing", self._file(identity)
        for _ in range(2):
            for place in self._places(identity) if _ID.fullmatch(identity) else ():
                path = place.path
                try:
                    found = read(place)
                    if digest(found) == identity:
                        return found
                    reason = "does not hash to its name"
                except OSError as error:
                    reason = f"cannot be read: {error.strerror}"
            self.packs()  # another process may have packed it anew meanwhile
        raise _damaged(identity, path, reason)

    @staticmethod
    def _is_sound(identity: str, place: Span) -> bool:
        try:
            return span_digest(place) == identity
        except OSError:
            return False

    def _file(self, identity: str) -> Path:
        return self.root / identity[:2] / identity[2:]

    def _made(self, identity: str) -> Path:
        path = self._file(identity)
        with os_errors(path):
            self._disk.make_directory(path.parent)
        return path

    def _keep(self, identity: str, chunks: Iterable[bytes]) -> None:
        path = self._file(identity)
        with os_errors(path):
            for place in self._places(identity):
                if self._is_sound(identity, place):
                    with contextlib.suppress(PermissionError):  # another user's file
                        place.path.touch()  # as young as a new one to `gc`, and so is all in the same pack
                    return
                if place.path == path:
                    break  # it is replaced
        write_atomically(self._made(identity), chunks, mode=READ_ONLY, disk=self._disk)


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content, streamed."""
    digest = hashlib.sha256()
    for chunk in read_chunks(path):
        digest.update(chunk)
    return digest.hexdigest()


def span_digest(place: Span) -> str:
    """SHA-256 of the bytes of a span, streamed."""
    digest = hashlib.sha256()
    for chunk in place.chunks():
        digest.update(chunk)
    return digest.hexdigest()


def _same_content(source: Span, identity: str) -> Iterator[bytes]:
    """The bytes of `source`; fails at the end if they are not those that were hashed as `identity`."""
    digest = hashlib.sha256()
    for chunk in source.chunks():
        digest.update(chunk)
        yield chunk
    if digest.hexdigest() != identity:
        raise RepositoryError(
            f"{source.path} changed while it was copied into the store",
            remedy="Run the command again when nothing writes to the file.",
            path=str(source.path),
        )


def _damaged(identity: str, path: Path | None, reason: str) -> CorruptStoreError:
    place = f" ({path})" if path else ""
    return CorruptStoreError(
        f"object {identity[:12]} {reason}{place}", remedy=REMEDY, object=identity, path=str(path) if path else None
    )
