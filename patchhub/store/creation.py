"""Making a new store: under another name first, renamed when it is complete."""

from __future__ import annotations

import contextlib
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from patchhub.errors import RepositoryError
from patchhub.fsio import TEMPORARY_SUFFIX, Disk, os_errors
from patchhub.objects import Base
from patchhub.store import index, operations
from patchhub.store.config import Config, write_config
from patchhub.store.database import connect, transaction
from patchhub.store.object_store import ObjectStore
from patchhub.store.revisions import BRANCHES, HEAD, SYMBOLIC

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
            for path in (unfinished, unfinished / "objects", unfinished / "cache"):
                disk.make_directory(path)
            base_id = ObjectStore(unfinished / "objects", disk=disk).put(base)
            _make_database(unfinished / DATABASE, author=author, time=time, disk=disk)
            write_config(unfinished / "config.json", Config({**base_info, "id": base_id}, settings), disk=disk)
            disk.rename(unfinished, root)
            disk.sync_directory(root.parent)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _make_database(path: Path, *, author: str, time: str, disk: Disk) -> None:
    with contextlib.closing(connect(path, disk=disk)) as connection, transaction(connection, path):
        for statement in operations.TABLES:
            connection.execute(statement)
        index.create(connection)
        operations.append(
            connection,
            command=operations.INIT,
            arguments={},
            changes={HEAD: (None, FIRST_HEAD)},
            author=author,
            time=time,
        )
