"""``config.json``: the format, which base the store is about, and the default settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patchhub.errors import CorruptStoreError, RepositoryError
from patchhub.fsio import DISK, Disk, write_atomically
from patchhub.objects import FORMAT


@dataclass(frozen=True)
class Recording:
    """What all columns of a store are recorded with: the id of its one metric, and its contexts."""

    metric: str
    contexts: tuple[str, ...]


@dataclass(frozen=True)
class Config:
    """`base` says where the base came from and holds its object's ``id``; `settings` are the user's defaults.

    `recording` is pinned by the first commit and None before it.
    """

    base: Mapping[str, Any]
    settings: Mapping[str, Any]
    recording: Recording | None = None

    @property
    def base_id(self) -> str:
        """Id of the base object."""
        return str(self.base["id"])


def read_config(path: Path) -> Config:
    """Read the file.

    Raises:
        RepositoryError: the store is of a format that this version does not know.
        CorruptStoreError: the file cannot be read as a configuration.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path, str(error)) from error
    if not isinstance(value, dict):
        raise _damaged(path, "it is not a JSON object")
    if value.get("format") != FORMAT:
        raise RepositoryError(
            f"{path.parent} is a store of format {value.get('format')!r}; this version reads format {FORMAT}",
            remedy="Use the version of patchhub that made it, or a newer one.",
            format=value.get("format"),
        )
    if value.keys() != {"format", "base", "recording", "settings"}:
        raise _damaged(path, f"its fields are {', '.join(sorted(value))}")
    base, settings = value["base"], value["settings"]
    if not (isinstance(base, dict) and isinstance(settings, dict) and isinstance(base.get("id"), str)):
        raise _damaged(path, "`base`, `base.id` or `settings` is missing or of another type")
    return Config(base, settings, _recording(path, value["recording"]))


def write_config(path: Path, config: Config, *, disk: Disk = DISK) -> None:
    """Replace the file in one step; indented, because people read it."""
    pinned = config.recording
    value = {
        "format": FORMAT,
        "base": dict(config.base),
        "recording": None if pinned is None else {"metric": pinned.metric, "contexts": list(pinned.contexts)},
        "settings": dict(config.settings),
    }
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(path, (text.encode("utf-8"),), disk=disk)


def _recording(path: Path, value: Any) -> Recording | None:
    if value is None:
        return None
    contexts = value.get("contexts") if isinstance(value, dict) else None
    if not (isinstance(contexts, list) and all(isinstance(text, str) for text in contexts) and len(value) == 2):
        raise _damaged(path, "`recording` is not a metric and a list of contexts")
    return Recording(str(value["metric"]), tuple(contexts))


def _damaged(path: Path, reason: str) -> CorruptStoreError:
    return CorruptStoreError(
        f"{path} cannot be read: {reason}", remedy="Restore it from a backup or clone again.", path=str(path)
    )
