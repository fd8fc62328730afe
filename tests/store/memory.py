"""Objects in a dictionary, which need no disk: the twin that `ObjectStore` is compared with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from patchhub.canonical import object_id
from patchhub.errors import CorruptStoreError
from patchhub.store.object_store import REMEDY


class MemoryObjects:
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
            raise CorruptStoreError(f"object {identity[:12]} is missing", remedy=REMEDY, object=identity)
        return self._objects[identity]

    def __contains__(self, identity: object) -> bool:
        return identity in self._objects

    def ids(self, prefix: str = "") -> Iterator[str]:
        return (identity for identity in sorted(self._objects) if identity.startswith(prefix))
