"""The derived tables: what can be asked of the history without opening every object. Never the truth.

The connection to ``patchhub.db`` is made here too: its settings, its transactions, and SQLite's errors in patchhub's words."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from patchhub.errors import CorruptStoreError, RepositoryError
from patchhub.fsio import DISK, Disk
from patchhub.objects import Commit, Element, Note, Patch, Request

if TYPE_CHECKING:
    import sqlite_utils


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
        before, after = _last_operation(connection), None
        try:
            yield
            after = _last_operation(connection)
            connection.execute("COMMIT")
        except BaseException as error:
            with contextlib.suppress(sqlite3.Error):  # it is rolled back when the database is next opened
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
            if isinstance(error, sqlite3.Error) and after not in (None, before) and _landed(connection, after):
                raise RepositoryError(
                    f"the change is made, but the disk did not confirm that it will last ({error})",
                    remedy="Check the disk. `patchhub reflog` shows the change: do not run the command again before you looked.",
                    path=str(path),
                ) from error
            raise


def _last_operation(connection: sqlite3.Connection) -> int | None:
    """The number of the last operation; None where there is no table of them yet, or none in it."""
    if connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'operations'").fetchone() is None:
        return None
    found: int | None = connection.execute("SELECT max(seq) FROM operations").fetchone()[0]
    return found


def _landed(connection: sqlite3.Connection, operation: int | None) -> bool:
    try:
        return _last_operation(connection) == operation
    except sqlite3.Error:
        return False


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
    except (
        sqlite3.DatabaseError,
        UnicodeDecodeError,
    ) as error:  # the latter of text, or of the schema that an error would name
        raise _damaged(path, error) from error


_NOT_IN_OBJECTS: Final = ("no such table: operations", "no such table: refs")


def _damaged(path: Path, error: Exception) -> CorruptStoreError:
    """The index can be made again from the objects; the operation log and the refs are in the database alone."""
    restore = "Restore the file from a backup, or clone again from a remote into another folder."
    reindex = "Run `patchhub fsck --reindex`; if that fails, restore the file from a backup or clone again."
    return CorruptStoreError(
        f"the database {path} is damaged: {error}",
        remedy=restore if str(error).startswith(_NOT_IN_OBJECTS) else reindex,
        path=str(path),
    )


COLUMNS: Final[Mapping[str, Mapping[str, type]]] = {
    "commits": {
        "id": str,
        "rank": int,
        "time": str,
        "author": str,
        "message": str,
        "parents": str,
        "set_digest": str,
        "active": int,
    },
    "changes": {"commit_id": str, "patch": str, "request": str, "change": int},
    "requests": {"id": str, "patch": str, "prompt": str, "subject": str, "target_new": str, "target_true": str},
    "scores": {"note": str, "commit_id": str, "suite": str, "name": str, "value": float},
}
"""Tables and their columns. `rank` is the commit's time in seconds, raised where needed to exceed its parents'."""

_KEYS: Final = {"commits": "id", "changes": None, "requests": ("id", "patch"), "scores": ("note", "name")}
_INDEXES: Final = {"commits": ["set_digest"], "changes": ["request"], "requests": ["patch"], "scores": ["commit_id"]}
SEARCHED: Final = ("prompt", "subject", "target_new", "target_true")


@dataclass(frozen=True)
class Rows:
    """Rows to be stored, by table."""

    commits: list[dict[str, Any]] = field(default_factory=list)
    changes: list[dict[str, Any]] = field(default_factory=list)
    requests: list[dict[str, Any]] = field(default_factory=list)
    scores: list[dict[str, Any]] = field(default_factory=list)


# --- what the rows are: pure ----------------------------------------------------------------------------------------


def commit_row(identity: str, commit: Commit, parent_ranks: Iterable[int], active: int) -> dict[str, Any]:
    """The row of a commit, given its parents' ranks and how many facts are active."""
    seconds = int(datetime.fromisoformat(commit.time[:-1]).replace(tzinfo=timezone.utc).timestamp())
    return {
        "id": identity,
        "rank": max([seconds, *(rank + 1 for rank in parent_ranks)]),
        "time": commit.time,
        "author": commit.author,
        "message": commit.message,
        "parents": json.dumps(commit.parents),
        "set_digest": commit.set_digest,
        "active": active,
    }


def change_rows(identity: str, commit: Commit, patch_of: Callable[[str], Patch]) -> list[dict[str, Any]]:
    """One row per element that a commit adds (+1) or removes (-1), and one per fact of each shard among them."""
    return [
        {"commit_id": identity, "patch": patch, "request": request, "change": change}
        for elements, change in ((commit.added, 1), (commit.removed, -1))
        for element in sorted(elements, key=lambda element: (element[0], element[1] or ""))
        for patch, request in (element, *facts_of_shard(element, patch_of))
    ]


def facts_of_shard(element: Element, patch_of: Callable[[str], Patch]) -> list[Element]:
    """(patch, request) of each fact that a shard holds; nothing for an element of another kind."""
    identity, request = element
    if request is not None:
        return []
    patch = patch_of(identity)
    return [(identity, fact) for fact in sorted(patch.requests)] if patch.kind == "shard" else []


def _count(elements: Iterable[Element], patch_of: Callable[[str], Patch]) -> int:
    """How many facts elements hold; an additive patch counts as one."""
    return sum(len(facts_of_shard(element, patch_of)) or 1 for element in elements)


def request_rows(patch: str, requests: Iterable[Request]) -> list[dict[str, Any]]:
    """One row per request of a patch."""
    return [
        {
            "id": request.id,
            "patch": patch,
            "prompt": request.prompt,
            "subject": request.subject,
            "target_new": request.target_new,
            "target_true": request.target_true,
        }
        for request in requests
    ]


def score_rows(identity: str, note: Note) -> list[dict[str, Any]]:
    """One row per number in a note's scores; nested names are joined by dots."""
    return [
        {"note": identity, "commit_id": note.commit, "suite": note.suite, "name": name, "value": float(value)}
        for name, value in _numbers(note.scores, "")
    ]


def _numbers(scores: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    for name, value in sorted(scores.items()):
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{name}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield prefix + name, value


def derive(
    commits: Iterable[tuple[str, Commit]],
    notes: Iterable[tuple[str, Note]],
    patch_of: Callable[[str], Patch],
    requests_of: Callable[[Patch], Sequence[Request]],
    known: Callable[[str], tuple[int, int] | None],
) -> Rows:
    """All rows of `commits`, which come parents first, of their patches and of `notes`.

    `known` gives (rank, active) of a commit outside `commits`; `requests_of` gives nothing where texts are withheld.
    """
    rows = Rows()
    made: dict[str, tuple[int, int]] = {}
    patches: set[str] = set()
    for identity, commit in commits:
        parents = [made.get(parent) or known(parent) or (0, 0) for parent in commit.parents]
        below = parents[0][1] if parents else 0
        active = below + _count(commit.added, patch_of) - _count(commit.removed, patch_of)
        row = commit_row(identity, commit, [rank for rank, _ in parents], active)
        made[identity] = (row["rank"], row["active"])
        rows.commits.append(row)
        rows.changes.extend(change_rows(identity, commit, patch_of))
        patches.update(patch for patch, _ in commit.added)
    for identity in sorted(patches):
        rows.requests.extend(request_rows(identity, requests_of(patch_of(identity))))
    for identity, note in notes:
        rows.scores.extend(score_rows(identity, note))
    return rows


# --- writing --------------------------------------------------------------------------------------------------------


def create(connection: sqlite3.Connection) -> None:
    """Make the derived tables anew, empty, with full-text search over the requests."""
    database = _wrap(connection)
    for name in ("requests_fts", *COLUMNS):
        connection.execute(f"DROP TABLE IF EXISTS {name}")
    for name, columns in COLUMNS.items():
        table = database.table(name)
        table.create(dict(columns), pk=_KEYS[name])
        table.create_index(_INDEXES[name])
    database.table("requests").enable_fts(list(SEARCHED), create_triggers=True)


def store(connection: sqlite3.Connection, rows: Rows) -> None:
    """Insert rows; those that are there already stay as they are."""
    database = _wrap(connection)
    for name in COLUMNS:
        if found := getattr(rows, name):
            database.table(name).insert_all(found, pk=_KEYS[name], ignore=True)


def _wrap(connection: sqlite3.Connection) -> sqlite_utils.Database:
    import sqlite_utils

    return sqlite_utils.Database(connection, execute_plugins=False)


def differences(connection: sqlite3.Connection, expected: Rows) -> Iterator[str]:
    """In words, each table that does not hold exactly the rows it should."""
    for name, columns in COLUMNS.items():
        listed = ", ".join(f"CAST({column} AS TEXT)" if kind is str else column for column, kind in columns.items())
        found = Counter(connection.execute(f"SELECT {listed} FROM {name}"))
        wanted = Counter(tuple(row[column] for column in columns) for row in getattr(expected, name))
        surplus, lack = (found - wanted).total(), (wanted - found).total()
        if surplus or lack:
            yield f"table {name} has {surplus} rows too many and {lack} too few"
    try:
        connection.execute("INSERT INTO requests_fts (requests_fts, rank) VALUES ('integrity-check', 1)")
    except sqlite3.DatabaseError as error:
        yield f"the full-text search does not match the requests ({error})"


# --- reading --------------------------------------------------------------------------------------------------------


def rank_and_active(connection: sqlite3.Connection, commit: str) -> tuple[int, int] | None:
    """A commit's rank and the number of its active facts; None if it is not in the index."""
    row = connection.execute("SELECT rank, active FROM commits WHERE id = ?", (commit,)).fetchone()
    return None if row is None else (row[0], row[1])


def parents(connection: sqlite3.Connection, commit: str) -> tuple[str, ...] | None:
    """A commit's parents; None if it is not in the index."""
    row = connection.execute("SELECT parents FROM commits WHERE id = ?", (commit,)).fetchone()
    return None if row is None else tuple(json.loads(row[0]))


def commits_with_prefix(connection: sqlite3.Connection, prefix: str, *, limit: int = 6) -> list[str]:
    """Ids of indexed commits that begin with hexadecimal digits; at most `limit`."""
    rows = connection.execute(
        "SELECT id FROM commits WHERE id >= ? AND id < ? ORDER BY id LIMIT ?", (prefix, prefix + "g", limit)
    )
    return [row[0] for row in rows]


def commits_with_set(connection: sqlite3.Connection, digest: str) -> list[str]:
    """Ids of indexed commits with that set digest, the highest rank first."""
    rows = connection.execute("SELECT id FROM commits WHERE set_digest = ? ORDER BY rank DESC, id", (digest,))
    return [row[0] for row in rows]


def search(connection: sqlite3.Connection, text: str, *, limit: int = 50) -> list[tuple[str, str]]:
    """(patch id, request id) of the requests that hold every word of `text`, the best match first."""
    words = " ".join(quoted(text))
    if not words:
        return []
    rows = connection.execute(
        "SELECT requests.patch, requests.id FROM requests_fts JOIN requests ON requests.rowid = requests_fts.rowid"
        " WHERE requests_fts MATCH ? ORDER BY requests_fts.rank, requests.patch, requests.id LIMIT ?",
        (words, limit),
    )
    return [(row[0], row[1]) for row in rows]


def quoted(text: str) -> list[str]:
    """The words of `text`, each as a string of SQLite's search language, which ends at a NUL."""
    return ['"' + word.replace('"', '""') + '"' for word in text.replace("\0", " ").split()]


def changes_of(connection: sqlite3.Connection, request: str) -> list[tuple[str, str, int]]:
    """(commit, patch, +1 or -1) for each commit that added or removed a request, the latest first."""
    rows = connection.execute(
        "SELECT commit_id, patch, change FROM changes JOIN commits ON commits.id = changes.commit_id"
        " WHERE request = ? ORDER BY commits.rank DESC, commit_id, change DESC",
        (request,),
    )
    return [(row[0], row[1], row[2]) for row in rows]


def scores_of(connection: sqlite3.Connection, commit: str) -> list[tuple[str, str, float]]:
    """(suite, name, value) of every score noted for a commit."""
    rows = connection.execute(
        "SELECT suite, name, value FROM scores WHERE commit_id = ? ORDER BY suite, note, name", (commit,)
    )
    return [(row[0], row[1], row[2]) for row in rows]
