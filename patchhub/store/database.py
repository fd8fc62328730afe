"""The derived tables: what can be asked of the history without opening every object. Never the truth.

The connection to ``patchhub.db`` is made here too: its settings, its transactions, and SQLite's errors in patchhub's words.

The operation log: every change of refs as a row of a hash chain, compare-and-swap, undo and redo.

All functions work inside the caller's transaction. The table ``refs`` is the fold of all rows' changes.

An operation that undoes Z restores the view from before Z. So the position of an operation in history is: itself if
it undoes nothing, else the position of the operation before Z. `undo` reverses the operation at the position of the
last one; `redo` reverses the last `undo` that has not been reversed.
"""

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

from patchhub.canonical import object_id
from patchhub.errors import CorruptStoreError, RepositoryError, RevisionError, StaleRefError
from patchhub.fsio import DISK, Disk
from patchhub.objects import Commit, Element, Note, Operation, Patch, Request
from patchhub.store.revisions import BRANCHES, HEAD, SYMBOLIC, TAGS, check_ref, check_target, twins

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
    "texts": {"patch": str, "texts": str},
}
"""Tables and their columns. `rank` is the commit's time in seconds, raised where needed to exceed its parents'. `texts` has all facts of a
patch in words, one after the other: looking for a part of a text in so few rows takes a tenth of the time. Databases that were made before
there was such a table get it from `fsck --reindex`."""

_KEYS: Final = {
    "commits": "id",
    "changes": None,
    "requests": ("id", "patch"),
    "scores": ("note", "name"),
    "texts": "patch",
}
_INDEXES: Final = {"commits": ["set_digest"], "changes": ["request"], "requests": ["patch"], "scores": ["commit_id"]}
_BETWEEN: Final = "\x1f"  # texts
SEARCHED: Final = ("prompt", "subject", "target_new", "target_true")


@dataclass(frozen=True)
class Rows:
    """Rows to be stored, by table."""

    commits: list[dict[str, Any]] = field(default_factory=list)
    changes: list[dict[str, Any]] = field(default_factory=list)
    requests: list[dict[str, Any]] = field(default_factory=list)
    scores: list[dict[str, Any]] = field(default_factory=list)
    texts: list[dict[str, Any]] = field(default_factory=list)


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


def texts_row(patch: str, requests: Iterable[Request]) -> dict[str, Any]:
    """The row of a patch's facts in words: the filled prompt, a space and the target of each."""
    return {"patch": patch, "texts": _BETWEEN.join(f"{request.text} {request.target_new}" for request in requests)}


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
        requests = requests_of(patch_of(identity))
        rows.requests.extend(request_rows(identity, requests))
        rows.texts.extend([texts_row(identity, requests)] if requests else [])
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
        if name in _INDEXES:
            table.create_index(_INDEXES[name])
    database.table("requests").enable_fts(list(SEARCHED), create_triggers=True)


def store(connection: sqlite3.Connection, rows: Rows) -> None:
    """Insert rows; those that are there already stay as they are."""
    database = _wrap(connection)
    for name in _present(connection):
        if found := getattr(rows, name):
            database.table(name).insert_all(found, pk=_KEYS[name], ignore=True)


def _wrap(connection: sqlite3.Connection) -> sqlite_utils.Database:
    import sqlite_utils

    return sqlite_utils.Database(connection, execute_plugins=False)


def _present(connection: sqlite3.Connection) -> list[str]:
    """The tables that there must be, and `texts` where there is one."""
    return [name for name in COLUMNS if name != "texts" or has_texts(connection)]


def has_texts(connection: sqlite3.Connection) -> bool:
    """Whether there is a table of texts."""
    return connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'texts'").fetchone() is not None


def differences(connection: sqlite3.Connection, expected: Rows) -> Iterator[str]:
    """In words, each table that does not hold exactly the rows it should."""
    for name in _present(connection):
        columns = COLUMNS[name]
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


Changes = Mapping[str, tuple[str | None, str | None]]
"""For each ref its target before and after; None where it does not exist."""

INIT: Final = "init"
UNDO: Final = "undo"
REDO: Final = "redo"
FETCH: Final = "fetch"
PROVEN: Final = "proven"
"""In the arguments of a fetch: how many of the commits that it brought are proven to have the weights of their facts."""
JOINS: Final = "joins"
"""In the arguments of an operation: the one before it, which the same command made; undo takes both back."""
TRUSTED: Final = "trusted"
"""In the arguments of a fetch: the commits that it brought which do not, and were accepted as they are."""

TABLES: Final = (
    "CREATE TABLE operations (seq INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, json TEXT NOT NULL)",
    "CREATE TABLE refs (name TEXT PRIMARY KEY, target TEXT NOT NULL) WITHOUT ROWID",
)

_ROW = "SELECT id, CAST(json AS BLOB) FROM operations"
_NOTHING_PASSED = "`patchhub undo --all` takes those back too; `patchhub op log` lists what was done."
_REMEDY = "Run `patchhub fsck`; restore patchhub.db from a backup or clone again from a remote."


def append(
    connection: sqlite3.Connection,
    *,
    command: str,
    arguments: Mapping[str, Any],
    changes: Changes,
    author: str,
    time: str,
    undoes: str | None = None,
) -> Operation:
    """Add one operation and move the refs it changes.

    Raises:
        StaleRefError: a ref is not where `changes` says it was.
        RepositoryError: a tag would move.
        RevisionError: a ref's name or target cannot be used.
    """
    for ref, (old, new) in changes.items():
        _check_change(connection, ref, old, new)
    previous = connection.execute("SELECT id FROM operations ORDER BY seq DESC LIMIT 1").fetchone()
    operation = Operation(
        arguments=arguments,
        author=author,
        changes=changes,
        command=command,
        previous=previous[0] if previous else None,
        time=time,
        undoes=undoes,
    )
    data = operation.to_json()
    Operation.from_json(data)  # never store what could not be read back
    connection.execute("INSERT INTO operations (id, json) VALUES (?, ?)", (object_id(data), data.decode("utf-8")))
    for ref, (_, new) in changes.items():
        if new is None:
            connection.execute("DELETE FROM refs WHERE name = ?", (ref,))
        else:
            connection.execute("INSERT OR REPLACE INTO refs (name, target) VALUES (?, ?)", (ref, new))
    return operation


def read_refs(connection: sqlite3.Connection) -> dict[str, str]:
    """The present view: every ref and its target."""
    return dict(connection.execute("SELECT name, target FROM refs ORDER BY name"))


def earlier_refs(connection: sqlite3.Connection, ago: int) -> dict[str, str]:
    """The view `ago` operations before now; empty before the first operation."""
    refs = read_refs(connection)
    for step, (_, operation) in enumerate(newest_first(connection)):
        if step == ago:
            return refs
        _apply(refs, invert(operation.changes))
    return {}


def newest_first(connection: sqlite3.Connection) -> Iterator[tuple[str, Operation]]:
    """(id, operation), the last one first, read lazily and each verified against its id and its successor.

    Raises:
        CorruptStoreError: a row does not hash to its id, or the chain is broken.
    """
    expected: str | None = None
    for position, (name, data) in enumerate(connection.execute(f"{_ROW} ORDER BY seq DESC")):
        if position and name != expected:
            raise _broken(str(name), "is not the one that its successor names")
        operation = _verified(name, data)
        yield name, operation
        expected = operation.previous
    if expected is not None:
        raise _broken(expected, "is missing")


def fetches(connection: sqlite3.Connection) -> Iterator[Operation]:
    """The operations that brought commits from elsewhere, oldest first, each verified against its id."""
    for name, data in connection.execute(f"{_ROW} WHERE json_extract(json, '$.command') = ? ORDER BY seq", (FETCH,)):
        yield _verified(name, data)


def read(connection: sqlite3.Connection, identity: str) -> Operation:
    """One operation, verified."""
    row = connection.execute(f"{_ROW} WHERE id = ?", (identity,)).fetchone()
    if row is None:
        raise _broken(identity, "is missing")
    return _verified(*row)


def fold(changes: Iterator[Changes]) -> dict[str, str]:
    """The view after `changes`, oldest first, have been applied to nothing."""
    refs: dict[str, str] = {}
    for change in changes:
        _apply(refs, change)
    return refs


def invert(changes: Changes) -> Changes:
    """The change that leads back."""
    return {ref: (new, old) for ref, (old, new) in changes.items()}


def undo(connection: sqlite3.Connection, *, author: str, time: str, everything: bool = True) -> Operation:
    """Append the reversal of the operation at the log's position (see above) and return it.

    Args:
        everything: take back whatever it was; else pass over operations that moved no branch and no tag, and leave HEAD where it is
            unless the operation that is taken back put it there, or made the branch that it was put on.

    Raises:
        RepositoryError: nothing is left that could be taken back.
    """
    target = _position(connection)
    passed, came_from = False, None
    while target is not None and not everything and not moves_facts(read(connection, target)):
        passed, came_from = True, read(connection, target).changes.get(HEAD, (came_from,))[0]
        below = _before(connection, target)
        target = _position(connection, below) if below else None
    if target is None or read(connection, target).command == INIT:
        what = "there is nothing to undo" + (" but moves of HEAD, remote branches and notes" if passed else "")
        raise RepositoryError(what, remedy=_NOTHING_PASSED if passed else "`patchhub op log` lists what was done.")
    changes = dict(invert(read(connection, target).changes))
    while (joined := read(connection, target).arguments.get(JOINS)) is not None and joined == _before(
        connection, target
    ):
        target = joined
        for ref, (now, before) in invert(read(connection, target).changes).items():
            changes[ref] = (changes.get(ref, (now, now))[0], before)
    if not everything and HEAD in changes and changes[HEAD][0] != read_refs(connection).get(HEAD):
        del changes[HEAD]
    head = read_refs(connection).get(HEAD, "")
    if (
        came_from is not None
        and HEAD not in changes
        and changes.get(head.removeprefix(SYMBOLIC), (None, ""))[1] is None
    ):
        changes[HEAD] = (head, came_from)  # the branch that HEAD is on is no more
    return append(connection, command=UNDO, arguments={}, changes=changes, author=author, time=time, undoes=target)


def moves_facts(operation: Operation) -> bool:
    """Whether an operation moved a branch or a tag; else it only moved HEAD, remote branches or notes."""
    return operation.command == INIT or any(ref.startswith((BRANCHES, TAGS)) for ref in operation.changes)


def redo(connection: sqlite3.Connection, *, author: str, time: str) -> Operation:
    """Append the reversal of the last undo that still stands and return it.

    Raises:
        RepositoryError: the last operation is not an undo or redo, or every undo was redone.
    """
    target = _last(connection)
    while target is not None and (operation := read(connection, target)).command == REDO:
        target = _before(connection, operation.undoes)
    if target is None or read(connection, target).command != UNDO:
        raise RepositoryError("there is nothing to redo", remedy="Only an `undo` that nothing followed can be redone.")
    changes = invert(read(connection, target).changes)
    return append(connection, command=REDO, arguments={}, changes=changes, author=author, time=time, undoes=target)


def _position(connection: sqlite3.Connection, start: str | None = None) -> str | None:
    """The operation whose effect is the last one that stands, of those up to ``start`` (None: all)."""
    position = start or _last(connection)
    while position is not None and (undoes := read(connection, position).undoes) is not None:
        position = _before(connection, undoes)
    return position


def _before(connection: sqlite3.Connection, identity: str | None) -> str | None:
    return None if identity is None else read(connection, identity).previous


def _last(connection: sqlite3.Connection) -> str | None:
    row = connection.execute("SELECT id FROM operations ORDER BY seq DESC LIMIT 1").fetchone()
    return None if row is None else str(row[0])


def _check_change(connection: sqlite3.Connection, ref: str, old: str | None, new: str | None) -> None:
    row = connection.execute("SELECT target FROM refs WHERE name = ?", (ref,)).fetchone()
    current = row[0] if row else None
    if current != old:
        raise StaleRefError(
            f"{ref} moved while the command ran: it is at {_brief(current)}, not at {_brief(old)}",
            remedy="Run the command again; it will start from where the ref is now.",
            ref=ref,
            expected=old,
            current=current,
        )
    if ref.startswith(TAGS) and old is not None and new is not None and old != new:
        raise RepositoryError(
            f"the tag {ref[len(TAGS) :]} exists and does not move",
            remedy="Delete it first, or use another name.",
            ref=ref,
            current=old,
        )
    if new is not None:
        check_ref(ref)
        check_target(ref, new)
        if current is None:
            _refuse_twin(connection, ref)


def _refuse_twin(connection: sqlite3.Connection, ref: str) -> None:
    """Refuse a new ref whose name is that of another but for the case of letters: people and file systems take them for one."""
    alike = twins([ref, *read_refs(connection)])
    if alike is not None and ref in alike:
        other = alike[alike[0] == ref]
        raise RevisionError(
            f"{ref} differs from {other} in the case of letters alone", remedy="Use another name.", ref=ref, other=other
        )


def _brief(target: str | None) -> str:
    return "nothing" if target is None else target if target.startswith("ref:") else target[:12]


def _apply(refs: dict[str, str], changes: Changes) -> None:
    for ref, (_, new) in changes.items():
        if new is None:
            refs.pop(ref, None)
        else:
            refs[ref] = new


def _verified(name: str, data: bytes) -> Operation:
    if object_id(data) != name:
        raise _broken(name, "does not hash to its id")
    return Operation.from_json(data)


def _broken(identity: str, reason: str) -> CorruptStoreError:
    return CorruptStoreError(f"operation {identity[:12]} {reason}", remedy=_REMEDY, operation=identity)
