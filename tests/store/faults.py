"""Disks that die: an exception, or the end of the process, before a chosen step of writing."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from patchhub.fsio import Disk

SURVIVED = 0
DIED = 77


class CrashError(BaseException):
    """The simulated crash; not an `Exception`, so nothing handles it by accident."""


def die() -> None:
    """End the process as a power failure would: no cleanup, no rollback."""
    os._exit(DIED)


def crash() -> None:
    raise CrashError


class QuickDisk(Disk):
    """Waits for no disk: for tests of what a dying process leaves, which the system keeps without being told to."""

    def sync(self, descriptor: int) -> None:
        pass

    def connect(self, path: Path) -> sqlite3.Connection:
        return sqlite3.connect(path, isolation_level=None, factory=QuickConnection)


class QuickConnection(sqlite3.Connection):
    def execute(self, statement: str, *arguments: Any) -> sqlite3.Cursor:
        return super().execute(statement.replace("synchronous = FULL", "synchronous = OFF"), *arguments)


QUICK = QuickDisk()


class CountingDisk(QuickDisk):
    """Calls `step(name)` before each step, SQL statements included; half of a file is written before its step fails."""

    def __init__(self, step: Callable[[str], None]) -> None:
        self._step = step

    def make_directory(self, path: Path) -> None:
        self._step(f"make_directory {path.name}")
        super().make_directory(path)

    def write(self, path: Path, chunks: Iterable[bytes], mode: int) -> None:
        self._step(f"write {path.name}")
        data = b"".join(chunks)
        try:
            self._step(f"write half of {path.name}")
        except BaseException:
            path.write_bytes(data[: len(data) // 2])
            raise
        super().write(path, (data,), mode)

    def rename(self, source: Path, target: Path) -> None:
        self._step(f"rename {target.name}")
        super().rename(source, target)

    def sync_directory(self, path: Path) -> None:
        self._step(f"sync_directory {path.name}")
        super().sync_directory(path)

    def connect(self, path: Path) -> sqlite3.Connection:
        step = self._step

        class Counted(QuickConnection):
            def execute(self, statement: str, *arguments: Any) -> sqlite3.Cursor:
                if not statement.startswith(("SELECT", "select", "PRAGMA", "ROLLBACK")):
                    step(f"sql {statement[:40]}")
                return super().execute(statement, *arguments)

        return sqlite3.connect(path, isolation_level=None, factory=Counted)


def failing_at(number: int, fail: Callable[[], None]) -> CountingDisk:
    """A disk whose step `number`, counted from 0, calls `fail` instead."""
    steps = iter(range(number))

    def step(_: str) -> None:
        if next(steps, None) is None:
            fail()

    return CountingDisk(step)


def in_child(action: Callable[[], None]) -> int:
    """Run `action` in a forked process; `SURVIVED` if it returned, `DIED` if it called `die`, 1 if it raised."""
    process = os.fork()
    if process == 0:
        try:
            action()
        except BaseException:
            os._exit(1)
        os._exit(SURVIVED)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
