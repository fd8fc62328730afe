"""`gc`: delete what nothing needs. No torch, no NumPy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Any, Final

from patchhub.porcelain.times import FORMAT
from patchhub.store import gc
from patchhub.store.gc import Garbage
from patchhub.store.repository import Repository

GRACE: Final = timedelta(days=14)


@dataclass(frozen=True)
class Collected:
    """What was deleted, or would be (`dry_run`)."""

    items: tuple[Garbage, ...]
    dry_run: bool

    @property
    def size(self) -> int:
        """Bytes in all."""
        return sum(item.size for item in self.items)

    @property
    def counts(self) -> Mapping[str, int]:
        """How many of each kind."""
        return Counter(item.kind for item in self.items)

    def to_json(self) -> dict[str, Any]:
        return {
            "dry_run": self.dry_run,
            "bytes": self.size,
            "items": [{"kind": item.kind, "path": str(item.path), "bytes": item.size} for item in self.items],
        }


def collect(repository: Repository, *, now: str, grace: timedelta = GRACE, dry_run: bool = False) -> Collected:
    """Delete objects that neither refs, notes nor any operation of the log lead to, leftovers of interrupted writes, and cached
    factors of metrics that nothing names; all of them only if older than `grace`.

    What the operation log reaches is never deleted, however old: `undo` always works.

    Raises:
        CorruptStoreError: the store is damaged; nothing was deleted.
    """
    before = (datetime.strptime(now, FORMAT).replace(tzinfo=timezone.utc) - grace).timestamp()
    return Collected(tuple(gc.collect(repository, before, dry_run=dry_run)), dry_run)
