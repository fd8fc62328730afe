"""How objects lie in a remote and travel: as files of their own, or many of a kind together in packs (docs/format.md).

A push of many objects writes packs, of each group apart: history, texts, what states are made of, and columns. So texts can be withdrawn
without the rest, and who wants a state alone loads no columns. What is there is read from names and indexes; nothing of it is believed
before the bytes of an object hash to its name."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Final

from patchhub.errors import CorruptStoreError, RemoteError
from patchhub.fsio import Span
from patchhub.store import object_store
from patchhub.store.object_store import Index, pack_path, span_digest

PACK_FROM: Final = 16
"""Fewer objects of a group than this are sent as files of their own."""

GATHER_FROM: Final = 256
"""So many objects that are files of their own in a remote are gathered into packs by the next push."""

OBJECT: Final = re.compile(r"objects/([0-9a-f]{2})/([0-9a-f]{62})")
_INDEX: Final = re.compile(rf"{object_store.FOLDER}/([0-9a-f]{{64}}){re.escape(object_store.INDEX)}")
FOLDERS: Final = ("objects", object_store.FOLDER)
"""The only folders and names of objects that are ever read."""


def object_path(identity: str) -> str:
    """Where an object that is a file of its own lies in a remote."""
    return f"objects/{identity[:2]}/{identity[2:]}"


@dataclass(frozen=True)
class Parcel:
    """Objects that are to be one pack, in ascending order of their ids."""

    objects: tuple[tuple[str, Span], ...]

    @cached_property
    def index(self) -> Index:
        return Index.of({identity: place.size for identity, place in self.objects})

    def content(self) -> Iterator[bytes]:
        """The bytes of the pack.

        Raises:
            CorruptStoreError: an object is damaged here.
        """
        return object_store.content(self.objects)


def wrapped(groups: Sequence[Mapping[str, Span]]) -> tuple[dict[str, Span], list[Parcel]]:
    """What is sent as files of their own, and what as packs; the objects of two groups are never in one."""
    alone: dict[str, Span] = {}
    parcels = []
    for group in groups:
        small = {identity: place for identity, place in group.items() if place.size <= object_store.LARGEST_OBJECT}
        if len(small) < PACK_FROM:
            alone.update(group)
            continue
        alone.update((identity, place) for identity, place in group.items() if identity not in small)
        for ids in object_store.divided({identity: place.size for identity, place in small.items()}):
            parcels.append(Parcel(tuple((identity, small[identity]) for identity in ids)))
    return alone, parcels


@dataclass(frozen=True)
class Contents:
    """The objects that a remote holds.

    Attributes:
        alone: bytes of those that are files of their own.
        packs: the index of each pack by name.
        damaged: in words, the packs that cannot be read.
    """

    alone: Mapping[str, int]
    packs: Mapping[str, Index]
    damaged: tuple[str, ...] = ()

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Bytes of every object."""
        return {i: span[1] for i, (_, span) in self._packed.items()} | dict(self.alone)

    @cached_property
    def _packed(self) -> dict[str, tuple[str, tuple[int, int]]]:
        """The pack of each object, and where in it."""
        found = {}
        for name, index in sorted(self.packs.items(), reverse=True):
            found.update({identity: (name, (start, size)) for identity, start, size in index.places()})
        return found

    def grouped(self, ids: Collection[str]) -> tuple[list[str], dict[str, list[str]]]:
        """Which of some objects are files of their own, and which lie in which pack."""
        alone, packed = [], dict[str, list[str]]()
        for identity in ids:
            if identity in self.alone or identity not in self._packed:
                alone.append(identity)
            else:
                packed.setdefault(self._packed[identity][0], []).append(identity)
        return alone, packed

    def place(self, identity: str, pack: Path) -> Span:
        """Where an object lies in a local copy of its pack."""
        return Span(pack, *self._packed[identity][1])

    def without(self, gone: Collection[str], pack: Callable[[str], Path]) -> tuple[list[Parcel], list[str]]:
        """How objects are taken out: packs to write in place of those that hold them, and paths to delete then, in this order.

        Args:
            pack: a local copy of a pack, by name.
        """
        parcels, paths = [], [object_path(identity) for identity in gone if identity in self.alone]
        for name, index in self.packs.items():
            if not any(identity in gone for identity in index.ids()):
                continue
            stay = [(i, Span(pack(name), start, size)) for i, start, size in index.places() if i not in gone]
            if stay:
                parcels.append(Parcel(tuple(stay)))
            paths += [pack_path(name, object_store.INDEX), pack_path(name, object_store.PACK)]
        return parcels, paths


@dataclass
class Reader:
    """Finds out what a remote holds; an index, whose name says what is in it, is read once.

    Attributes:
        read: the bytes of a file of the remote, which has so many; None if it is gone.
        known: indexes by name.
    """

    place: str
    read: Callable[[str, int], bytes | None]
    known: dict[str, Index] = field(default_factory=dict)

    def contents(self, files: Mapping[str, int]) -> Contents:
        """From the bytes of every file of the remote, by path. What is damaged of its packs is left out, and said."""
        alone = {found[1] + found[2]: size for path, size in files.items() if (found := OBJECT.fullmatch(path))}
        indexes, damaged, read = {}, [], 0
        for path, size in sorted(files.items()):
            match = _INDEX.fullmatch(path)
            if match is None:
                continue
            try:
                read += size
                if read > object_store.MOST_INDEX:
                    raise self._refused(match[1], f"is beyond {object_store.MOST_INDEX} bytes of indexes that are read")
                index = self._index(match[1], size)
                there = files.get(pack_path(match[1], object_store.PACK))
                if there != index.size or index.size > object_store.MOST_BYTES:
                    raise self._refused(
                        match[1], f"has {there or 'no'} bytes of objects where its index says {index.size}"
                    )
                indexes[match[1]] = index
            except CorruptStoreError as error:
                damaged.append(error.message)
        return Contents(alone, indexes, tuple(damaged))

    def _index(self, name: str, size: int) -> Index:
        if name not in self.known:
            data = self.read(pack_path(name, object_store.INDEX), size)
            if data is None:
                raise self._refused(name, f"has an index of {size} bytes that cannot be read")
            self.known[name] = Index.read(data, name)
        return self.known[name]

    def _refused(self, name: str, reason: str) -> CorruptStoreError:
        return CorruptStoreError(f"pack {name[:12]} {reason}", remedy="The remote is damaged.", pack=name)


def checked(place: str, identity: str, span: Span) -> Span:
    """A span whose bytes hash to the name of an object.

    Raises:
        RemoteError: they do not.
    """
    if span_digest(span) != identity:
        raise RemoteError(
            f"object {identity[:12]} of {place} is refused: its bytes in pack {span.path.name[:12]} do not hash to its name",
            remedy="Run the command again; if it stays, push a sound store to an empty place.",
            object=identity,
            remote=place,
        )
    return span
