"""The operation log alone: a hash chain whose fold is the view, and undo and redo against a model of two stacks."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from patchhub.errors import CorruptStoreError, RepositoryError, StaleRefError
from patchhub.objects import Operation
from patchhub.store import database

AUTHOR, TIME = "Ada", "2026-11-21T09:30:00Z"
MAIN = "refs/heads/main"


def new_log() -> sqlite3.Connection:
    connection = sqlite3.connect(":memory:", isolation_level=None)
    for statement in database.TABLES:
        connection.execute(statement)
    do(connection, {"HEAD": (None, "ref: refs/heads/main")}, command=database.INIT)
    return connection


def do(connection: sqlite3.Connection, changes: database.Changes, command: str = "move") -> Operation:
    return database.append(connection, command=command, arguments={}, changes=changes, author=AUTHOR, time=TIME)


@pytest.fixture
def log() -> Iterator[sqlite3.Connection]:
    with closing(new_log()) as connection:
        yield connection


def target(number: int) -> str:
    return f"{number:064x}"


actions = st.lists(
    st.tuples(st.sampled_from(["refs/heads/a", "refs/heads/b", "refs/heads/c"]), st.none() | st.integers(0, 3))
    | st.sampled_from(["undo", "redo"]),
    max_size=30,
)


@given(actions)
@settings(max_examples=200, deadline=None)
def test_undo_and_redo_are_two_stacks_of_views(todo: list[tuple[str, int | None] | Literal["undo", "redo"]]) -> None:
    with closing(new_log()) as connection:
        done: list[dict[str, str]] = []
        undone: list[dict[str, str]] = []
        view = database.read_refs(connection)
        views = [view]
        for action in todo:
            if isinstance(action, str):
                source, sink = (done, undone) if action == "undo" else (undone, done)
                reverse = database.undo if action == "undo" else database.redo
                if not source:
                    with pytest.raises(RepositoryError, match=f"nothing to {action}"):
                        reverse(connection, author=AUTHOR, time=TIME)
                    continue
                reverse(connection, author=AUTHOR, time=TIME)
                sink.append(view)
                view = source.pop()
            else:
                ref, number = action
                new = None if number is None else target(number)
                do(connection, {ref: (view.get(ref), new)})
                done.append(view)
                undone.clear()
                view = {name: value for name, value in {**view, ref: new}.items() if value is not None}
            views.append(view)
            assert database.read_refs(connection) == view
        for ago in range(len(views)):
            assert database.earlier_refs(connection, ago) == views[-1 - ago]
        assert database.earlier_refs(connection, len(views)) == {}
        chain = [operation for _, operation in database.newest_first(connection)]
        assert database.fold(operation.changes for operation in reversed(chain)) == view


def test_rows_are_a_hash_chain(log: sqlite3.Connection) -> None:
    made = [do(log, {MAIN: (None if number == 0 else target(number - 1), target(number))}) for number in range(4)]
    rows = list(database.newest_first(log))
    assert [operation for _, operation in rows][:-1] == made[::-1]
    assert [name for name, _ in rows][1:] == [operation.previous for _, operation in rows][:-1]
    assert rows[-1][1].previous is None
    assert all(operation.id == name for name, operation in rows)


def test_undo_names_what_it_undoes(log: sqlite3.Connection) -> None:
    first = do(log, {MAIN: (None, target(1))})
    second = do(log, {MAIN: (target(1), target(2))})
    undone = database.undo(log, author=AUTHOR, time=TIME)
    assert (undone.command, undone.undoes) == ("undo", second.id)
    assert database.undo(log, author=AUTHOR, time=TIME).undoes == first.id


def test_operations_of_one_command_are_taken_back_and_done_again_together(log: sqlite3.Connection) -> None:
    do(log, {MAIN: (None, target(1))})
    first = do(log, {MAIN: (target(1), target(2)), "refs/notes/a": (None, target(4))}, "commit")
    how = {"command": "amend", "author": AUTHOR, "time": TIME}
    database.append(log, arguments={database.JOINS: first.id}, changes={MAIN: (target(2), target(3))}, **how)
    before = database.read_refs(log)
    assert database.undo(log, author=AUTHOR, time=TIME).undoes == first.id
    assert database.read_refs(log) == {"HEAD": "ref: refs/heads/main", MAIN: target(1)}
    database.redo(log, author=AUTHOR, time=TIME)
    assert database.read_refs(log) == before
    do(log, {"refs/heads/other": (None, target(1))})
    database.append(log, arguments={database.JOINS: first.id}, changes={MAIN: (target(3), target(5))}, **how)
    database.undo(log, author=AUTHOR, time=TIME)  # what it joins is not the operation before it
    assert database.read_refs(log)[MAIN] == target(3)


def test_taking_back_facts_leaves_head_where_a_switch_put_it(log: sqlite3.Connection) -> None:
    """However many steps it takes: `switch -c side`, a commit there, `switch main`, `undo`, `undo`."""
    side, head = "refs/heads/side", "ref: refs/heads/"
    do(log, {MAIN: (None, target(1))})
    do(log, {"HEAD": (f"{head}main", f"{head}side"), side: (None, target(1))}, "switch")
    do(log, {side: (target(1), target(2))}, "commit")
    do(log, {"HEAD": (f"{head}side", f"{head}main")}, "switch")
    for left in (target(1), None):
        database.undo(log, author=AUTHOR, time=TIME, everything=False)
        refs = database.read_refs(log)
        assert (refs["HEAD"], refs[MAIN], refs.get(side)) == (f"{head}main", target(1), left)
    do(log, {side: (None, target(1))}, "branch")
    do(log, {"HEAD": (f"{head}main", f"{head}side")}, "switch")
    database.undo(log, author=AUTHOR, time=TIME, everything=False)  # HEAD is not left on a branch that is no more
    assert database.read_refs(log) == {"HEAD": f"{head}main", MAIN: target(1)}


@pytest.mark.parametrize("old", [None, target(2), "ref: refs/heads/main"])
def test_compare_and_swap(log: sqlite3.Connection, old: str | None) -> None:
    do(log, {MAIN: (None, target(1))})
    with pytest.raises(StaleRefError) as caught:
        do(log, {MAIN: (old, target(3))})
    assert caught.value.facts == {"ref": MAIN, "expected": old, "current": target(1)}
    assert database.read_refs(log)[MAIN] == target(1)


def test_a_tag_can_go_and_come_but_not_move(log: sqlite3.Connection) -> None:
    tag = "refs/tags/v1"
    do(log, {tag: (None, target(1))})
    do(log, {tag: (target(1), target(1))})
    with pytest.raises(RepositoryError, match="v1 exists"):
        do(log, {tag: (target(1), target(2))})
    do(log, {tag: (target(1), None)})
    do(log, {tag: (None, target(2))})


def test_reading_stops_at_damage(log: sqlite3.Connection) -> None:
    do(log, {MAIN: (None, target(1))})
    do(log, {MAIN: (target(1), target(2))})
    log.execute("UPDATE operations SET json = replace(json, 'move', 'love') WHERE seq = 2")
    rows = database.newest_first(log)
    next(rows)
    with pytest.raises(CorruptStoreError, match="does not hash"):
        next(rows)
    log.execute("DELETE FROM operations WHERE seq = 2")
    with pytest.raises(CorruptStoreError, match="successor"):
        list(database.newest_first(log))
