"""Raw results of measurements, kept by the state that was measured and the item that was asked. Losing them costs time only."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from patchhub.canonical import canonical_json, object_id
from patchhub.fsio import keep
from patchhub.store.gc import SCORE_CACHE

VERSION: Final = 1
"""Raised whenever an item's result is computed differently."""


def state_key(**inputs: Any) -> str:
    """The identity of a measured model: of its base, changes, type, tokenizer and whatever else decides what it says."""
    return object_id(canonical_json({**inputs, "version": VERSION}))


def item_key(kind: str, **inputs: Any) -> str:
    """The identity of one question to a model, with every setting that the answer depends on."""
    return object_id(canonical_json({**inputs, "kind": kind}))


class StateResults(Mapping[str, Any]):
    """Results of one state by item key, as JSON values; those of a missing or damaged file are simply not there.

    The file is the SHA-256 of what follows in its first line, then one JSON object.
    """

    def __init__(self, cache: Path, state: str) -> None:
        self._path = cache / SCORE_CACHE / f"{state}.json"
        self._known = _read(self._path)

    def __getitem__(self, item: str) -> Any:
        return self._known[item]

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)

    def keep(self, found: Mapping[str, Any]) -> None:
        """Add results; the file is replaced in one step."""
        if found:
            self._known = {**_read(self._path), **self._known, **found}
            data = json.dumps(self._known, separators=(",", ":")).encode("utf-8")
            keep(self._path, (object_id(data).encode("ascii"), b"\n", data))


def _read(path: Path) -> dict[str, Any]:
    try:
        digest, _, data = path.read_bytes().partition(b"\n")
    except OSError:
        return {}
    return dict(json.loads(data)) if digest.decode("ascii", "replace") == object_id(data) else {}
