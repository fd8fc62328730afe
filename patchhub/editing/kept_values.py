"""Optimised values kept on disk while they are made, so that an interrupted edit goes on where it stopped.

One file holds the values of one model state, site and setting; one record a fact, under a hash of its tokens. Records are appended as
batches finish, and each carries a checksum: what a crash leaves half written is cut off and made again. It is cache and can
be deleted at any time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from patchhub.canonical import canonical_json, object_id

LIMIT: Final = 1 << 30
"""Bytes that all files together may take; the oldest go first."""

_KEY, _CHECK = 32, 8  # bytes of a fact's hash and of a record's checksum


@dataclass(frozen=True, eq=False)
class KeptValue:
    """What was optimised for one fact: target z and unedited h (d,), float32, the last objective and the number of steps."""

    target: np.ndarray
    hidden: np.ndarray
    loss: float
    steps: int


@dataclass(frozen=True)
class KeptValues:
    """The values of one model state under one setting.

    Attributes:
        folder: where all files are.
        inputs: everything that a value depends on besides its fact, as JSON.
        width: d, floats of a value.
        limit: bytes that all files together may take.
    """

    folder: Path
    inputs: Mapping[str, Any]
    width: int
    limit: int = LIMIT

    @property
    def path(self) -> Path:
        return self.folder / f"{object_id(canonical_json(self.inputs))}.values"

    @property
    def _record(self) -> int:
        return _KEY + 4 * (2 * self.width + 2) + _CHECK

    def read(self) -> dict[str, KeptValue]:
        """Key -> value of every sound record."""
        try:
            content = self.path.read_bytes()
        except OSError:
            return {}
        size, found = self._record, {}
        for start in range(0, len(content) - size + 1, size):
            key, numbers, check = _split(content[start : start + size])
            if check == _checksum(key + numbers):
                floats = np.frombuffer(numbers, np.float32)
                target, hidden = floats[: self.width], floats[self.width : -2]
                found[key.hex()] = KeptValue(target, hidden, float(floats[-2]), int(floats[-1]))
        return found

    def add(self, values: Mapping[str, KeptValue]) -> None:
        """Append records; a failure to write is no error."""
        records = b"".join(_encoded(key, value) for key, value in values.items())
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.truncate(file.tell() - file.tell() % self._record)
                file.write(records)
            self._evict()
        except OSError:
            return

    def _evict(self) -> None:
        files = sorted(self.folder.glob("*.values"), key=lambda path: path.stat().st_mtime_ns)
        total = sum(path.stat().st_size for path in files)
        for path in files:
            if total <= self.limit or path == self.path:
                break
            total -= path.stat().st_size
            path.unlink()


def fact_key(rows: Sequence[tuple[Sequence[int], int, tuple[int, int]]]) -> str:
    """SHA-256 of a fact's texts: token ids, place of the subject's last token, and the target's tokens [start, stop) of each."""
    return object_id(canonical_json([[list(ids), place, list(target)] for ids, place, target in rows]))


def _encoded(key: str, value: KeptValue) -> bytes:
    tail = np.array([value.loss, value.steps], np.float32)
    numbers = b"".join(part.astype(np.float32).tobytes() for part in (value.target, value.hidden, tail))
    record = bytes.fromhex(key) + numbers
    return record + _checksum(record)


def _split(record: bytes) -> tuple[bytes, bytes, bytes]:
    return record[:_KEY], record[_KEY:-_CHECK], record[-_CHECK:]


def _checksum(record: bytes) -> bytes:
    return hashlib.sha256(record).digest()[:_CHECK]
