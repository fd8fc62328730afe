"""Digests of tensors kept between runs, each valid while its file's path, size and time of change stay the same."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypedDict

from patchhub.fsio import keep
from patchhub.models.safetensors_file import TensorEntry

FILE_NAME: Final = "tensor-digests.json"

_SETTLED_NS = 2_000_000_000  # a file that changed later than this before it was read may change with the same time


class _FileRecord(TypedDict):
    size: int
    mtime_ns: int
    digests: dict[str, str]


@dataclass(frozen=True)
class Stamps:
    """The content of one cache file. Without a folder nothing is found and nothing is kept.

    The file is cache: whatever cannot be read in it is ignored and written anew.
    """

    folder: Path | None
    records: dict[str, _FileRecord]
    seen: dict[str, _FileRecord] = field(default_factory=dict)  # stamps as they were when first asked for

    @classmethod
    def load(cls, folder: Path | None) -> Stamps:
        """Read the cache file of a folder, if there is one."""
        try:
            records = json.loads((folder / FILE_NAME).read_bytes()) if folder else {}
        except (OSError, ValueError):
            records = {}
        return cls(folder, {path: r for path, r in records.items() if _valid(r)} if isinstance(records, dict) else {})

    def get(self, entry: TensorEntry) -> str | None:
        """The digest of a tensor, if its file is as it was when the digest was made."""
        path = str(entry.file.resolve())
        now = self.seen.setdefault(path, _stamp(entry.file))
        known = self.records.get(path)
        if known is None or not _same(known, now):
            return None
        return known["digests"].get(_place(entry))

    def add(self, entry: TensorEntry, digest: str) -> None:
        """Keep the digest of a tensor that `get` was asked for before it was read."""
        self.seen[str(entry.file.resolve())]["digests"][_place(entry)] = digest

    def save(self) -> None:
        """Write what was added for files that did not change meanwhile and have not changed for two seconds."""
        if self.folder is None or not any(record["digests"] for record in self.seen.values()):
            return
        limit = time.time_ns() - _SETTLED_NS
        merged = dict(self.records)
        for path, record in self.seen.items():
            if record["mtime_ns"] < limit and _same(record, _stamp(Path(path))):
                before = merged.get(path)
                known = before["digests"] if before and _same(before, record) else {}
                merged[path] = {**record, "digests": {**known, **record["digests"]}}
        keep(self.folder / FILE_NAME, [json.dumps(merged, sort_keys=True).encode()])


def _stamp(file: Path) -> _FileRecord:
    status = file.stat()
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "digests": {}}


def _same(one: _FileRecord, other: _FileRecord) -> bool:
    return (one["size"], one["mtime_ns"]) == (other["size"], other["mtime_ns"])


def _place(entry: TensorEntry) -> str:
    return f"{entry.begin}-{entry.end}"


def _valid(record: Any) -> bool:
    match record:
        case {"size": int(), "mtime_ns": int(), "digests": dict(digests), **rest} if not rest:
            return all(isinstance(digest, str) for digest in digests.values())
    return False
