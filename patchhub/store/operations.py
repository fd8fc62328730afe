"""The operation log: every change of refs as a row of a hash chain, compare-and-swap, undo and redo.

All functions work inside the caller's transaction. The table ``refs`` is the fold of all rows' changes.

An operation that undoes Z restores the view from before Z. So the position of an operation in history is: itself if
it undoes nothing, else the position of the operation before Z. `undo` reverses the operation at the position of the
last one; `redo` reverses the last `undo` that has not been reversed."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping
from typing import Any, Final

from patchhub.canonical import object_id
from patchhub.errors import CorruptStoreError, RepositoryError, RevisionError, StaleRefError
from patchhub.objects import Operation
from patchhub.store.revisions import BRANCHES, HEAD, SYMBOLIC, TAGS, check_ref, check_target, twins

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
