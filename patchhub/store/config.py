"""A new store and its ``config.json``: the format, which base the store is about, and the default settings.

A store is made under another name first and renamed when it is complete, so that a crash leaves no half of one."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from patchhub.canonical import FORMAT, object_id
from patchhub.errors import BaseError, CorruptStoreError, RepositoryError
from patchhub.fsio import DISK, TEMPORARY_SUFFIX, Disk, confirm, os_errors, share, write_atomically
from patchhub.objects import Base
from patchhub.store import database
from patchhub.store.database import connect, transaction
from patchhub.store.object_store import ObjectStore
from patchhub.store.revisions import BRANCHES, HEAD, SYMBOLIC


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

    def base_place(self, root: Path) -> str:
        """Where the base is: as it was said, or, where store and base were moved together, in the same place beside the store ``root``."""
        path, near = str(self.base["path"]), self.base.get("near")
        if self.base.get("revision") is None and isinstance(near, str) and not Path(path).is_dir():
            moved = (root / near).resolve()
            return str(moved) if moved.is_dir() else path
        return path

    def refuse_lost_base(self, root: Path) -> None:
        """Raise `BaseError` where the base was read from a folder that is not there any more."""
        place = self.base_place(root)
        if self.base.get("revision") is None and not Path(place).is_dir():
            raise BaseError(
                f"the base model is not at {place} any more",
                remedy="Say where it is: --base FOLDER for this once, `patchhub config base.path FOLDER` for good.",
                path=place,
            )


def beside(base: Path, root: Path) -> str | None:
    """The way from a store to its base, by which the two can be moved together; None where there is none."""
    try:
        return Path(os.path.relpath(base.resolve(), root.resolve())).as_posix()
    except ValueError:  # another drive
        return None


def read_config(path: Path) -> Config:
    """Read the file.

    Raises:
        RepositoryError: the store is of a format that this version does not know.
        CorruptStoreError: the file cannot be read as a configuration.
    """
    if path.exists() and not path.is_file():
        raise _damaged(path, "it is not a file")
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
    if value.keys() - {"digest"} != {"format", "base", "recording", "settings"}:
        raise _damaged(path, f"its fields are {', '.join(sorted(value))}")
    base, settings = value["base"], value["settings"]
    if not (isinstance(base, dict) and isinstance(settings, dict) and isinstance(base.get("id"), str)):
        raise _damaged(path, "`base`, `base.id` or `settings` is missing or of another type")
    return Config(base, settings, _recording(path, value["recording"]))


def is_as_written(path: Path) -> bool:
    """Whether the file holds what was last written into it; True of one from before it had a digest.

    People may edit it, so that this is no condition of reading it.

    Raises:
        CorruptStoreError: it cannot be read.
    """
    read_config(path)
    value = json.loads(path.read_bytes())
    return "digest" not in value or value.pop("digest") == _digest(value)


def _digest(value: Mapping[str, Any]) -> str:
    return object_id(json.dumps(value, sort_keys=True).encode("ascii"))


def write_config(path: Path, config: Config, *, disk: Disk = DISK) -> None:
    """Replace the file in one step; indented, because people read it."""
    pinned = config.recording
    value = {
        "format": FORMAT,
        "base": dict(config.base),
        "recording": None if pinned is None else {"metric": pinned.metric, "contexts": list(pinned.contexts)},
        "settings": dict(config.settings),
    }
    value["digest"] = _digest(value)
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


DATABASE: Final = "patchhub.db"
FIRST_HEAD: Final = f"{SYMBOLIC}{BRANCHES}main"


def create(
    root: Path,
    base: bytes,
    *,
    base_info: Mapping[str, Any],
    settings: Mapping[str, Any],
    author: str,
    time: str,
    shared: bool,
    disk: Disk,
) -> None:
    """Make the directory `root` a store about the base whose canonical object is `base`.

    Raises:
        RepositoryError: `root` exists, or cannot be written.
        CorruptStoreError: `base` is no base object.
    """
    if root.exists():
        raise RepositoryError(f"{root} exists already", remedy="Use it, or remove it first.", path=str(root))
    Base.from_json(base)
    unfinished = root.with_name(f"{root.name}.{secrets.token_hex(8)}{TEMPORARY_SUFFIX}")
    try:
        with os_errors(root):
            root.parent.mkdir(parents=True, exist_ok=True)
            disk.make_directory(unfinished)
            if shared:
                share(unfinished)
            for path in (unfinished / "objects", unfinished / "cache"):
                disk.make_directory(path)
            base_id = ObjectStore(unfinished / "objects", disk=disk).put(base)
            _make_database(unfinished / DATABASE, author=author, time=time, disk=disk)
            write_config(unfinished / "config.json", Config({**base_info, "id": base_id}, settings), disk=disk)
            disk.rename(unfinished, root)
        confirm(root, disk=disk)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _make_database(path: Path, *, author: str, time: str, disk: Disk) -> None:
    with contextlib.closing(connect(path, disk=disk)) as connection, transaction(connection, path):
        for statement in database.TABLES:
            connection.execute(statement)
        database.create(connection)
        database.append(
            connection,
            command=database.INIT,
            arguments={},
            changes={HEAD: (None, FIRST_HEAD)},
            author=author,
            time=time,
        )
