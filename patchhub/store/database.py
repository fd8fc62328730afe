"""The connection to ``patchhub.db``: its settings, its transactions, and SQLite's errors in patchhub's words."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from patchhub.errors import CorruptStoreError, RepositoryError
from patchhub.fsio import DISK, Disk

BUSY_MILLISECONDS: Final = 30_000
_SETTINGS: Final = ("journal_mode = DELETE", "synchronous = FULL", "foreign_keys = ON")
_PASSING: Final = {
    "locked": "Wait for the other process to finish, then run the command again.",
    "full": "Free space, then run the command again; the store is as it was.",
    "disk I/O": "Check the disk, then run the command again; the store is as it was.",
    "readonly": "Fix the permissions, then run the command again.",
    "unable to open": "Fix the permissions, then run the command again.",
}
"""Words in SQLite's messages that speak of the world and not of the bytes, and what to do."""


def connect(path: Path, *, disk: Disk = DISK) -> sqlite3.Connection:
    """Open the database: rollback journal, full synchronisation, foreign keys, half a minute of patience."""
    with database_errors(path):
        connection = disk.connect(path)
        connection.execute(f"PRAGMA busy_timeout = {BUSY_MILLISECONDS}")
        for setting in _SETTINGS:
            connection.execute(f"PRAGMA {setting}")
    return connection


@contextlib.contextmanager
def transaction(connection: sqlite3.Connection, path: Path) -> Iterator[None]:
    """Everything in the body becomes durable at its end, or nothing does if it raises."""
    with database_errors(path):
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise


@contextlib.contextmanager
def database_errors(path: Path) -> Iterator[None]:
    """Turn an error of SQLite in the body into one of patchhub about the database at `path`."""
    try:
        yield
    except sqlite3.OperationalError as error:
        remedy = next((remedy for words, remedy in _PASSING.items() if words in str(error)), None)
        if remedy is None:
            raise _damaged(path, error) from error
        raise RepositoryError(f"the database {path} cannot be used: {error}", remedy=remedy, path=str(path)) from error
    except sqlite3.DatabaseError as error:
        raise _damaged(path, error) from error


_NOT_IN_OBJECTS: Final = ("no such table: operations", "no such table: refs")


def _damaged(path: Path, error: sqlite3.Error) -> CorruptStoreError:
    """The index can be made again from the objects; the operation log and the refs are in the database alone."""
    restore = "Restore the file from a backup, or clone again from a remote into another folder."
    reindex = "Run `patchhub fsck --reindex`; if that fails, restore the file from a backup or clone again."
    return CorruptStoreError(
        f"the database {path} is damaged: {error}",
        remedy=restore if str(error).startswith(_NOT_IN_OBJECTS) else reindex,
        path=str(path),
    )
