"""Packs: many objects in one file, and beside it an index that says where each lies (docs/format.md).

Both are named by the hash of the index. The index says which objects there are, in which order and how long, and objects are named by their
content, so it settles every byte of the pack. Whoever reads an object hashes it, wherever it lies."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Final

from patchhub.canonical import object_id
from patchhub.errors import CorruptStoreError
from patchhub.fsio import READ_ONLY, Disk, Span, make_directories, os_errors, write_atomically

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
            raise _damaged(name, "does not hash to its name")
        index = cls(data)
        if data[: len(MAGIC)] != MAGIC or (len(data) - len(MAGIC)) % _RECORD or not len(index):
            raise _damaged(name, "is no index of this format")
        identities = [index._at(place)[0] for place in range(len(index))]
        ends = [0, *(index._at(place)[1] for place in range(len(index)))]
        if any(a >= b for a, b in pairwise(identities)):
            raise _damaged(name, "does not name its objects in order")
        if any(a > b for a, b in pairwise(ends)):
            raise _damaged(name, "has an object that ends before it begins")
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
            raise _damaged(self.name, f"is without its objects ({error.strerror})") from error
        if size != self.index.size:
            raise _damaged(self.name, f"has {size} bytes of objects, not {self.index.size}")


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


def _damaged(name: str, reason: str) -> CorruptStoreError:
    return CorruptStoreError(f"pack {name[:12]} {reason}", remedy=_REMEDY, pack=name)
