"""A crash before any step of any write leaves a sound store with either the old view or the new one."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time as clock
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from builders import AUTHOR, TIME, add_batch, make_commit, make_history, make_repository, move, put_patch, record
from faults import DIED, QUICK, SURVIVED, CountingDisk, CrashError, crash, die, failing_at, in_child

from patchhub.errors import RepositoryError
from patchhub.fsio import Disk
from patchhub.objects import Note
from patchhub.store.config import Config
from patchhub.store.fsck import check
from patchhub.store.store import Store

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

MAX_STEPS = 200


def _record(repository: Store) -> None:
    add_batch(repository, range(10, 12))


def _branch(repository: Store) -> None:
    move(repository, {"refs/heads/other": (None, repository.head[1])}, "branch")


def _note(repository: Store) -> None:
    tip = repository.head[1] or ""
    note = Note(commit=tip, made_by="patchhub", scores={"S": 1.0}, settings={}, suite="zsre")
    repository.add_note(note, command="evaluate", arguments={}, author=AUTHOR, time=TIME)


def _undo(repository: Store) -> None:
    repository.undo(author=AUTHOR, time=TIME)


def _configure(repository: Store) -> None:
    repository.write_config(Config(repository.config.base, {"method": "pmet"}))


ACTIONS: dict[str, Callable[[Store], None]] = {
    "record": _record,
    "branch": _branch,
    "note": _note,
    "undo": _undo,
    "configure": _configure,
}


def _act(directory: Path, action: Callable[[Store], None], disk: Disk) -> None:
    with Store.open(directory, disk=disk) as repository:
        action(repository)


def _init(directory: Path, disk: Disk) -> None:
    make_repository(directory, disk=disk).close()


def _crash_here(run: Callable[[Disk], None], number: int) -> bool:
    """Whether `run` survived a disk that raises at step `number`."""
    try:
        run(failing_at(number, crash))
    except CrashError:
        return False
    return True


def _die_in_child(run: Callable[[Disk], None], number: int) -> bool:
    """The same with a process that ends at that step."""
    status = in_child(lambda: run(failing_at(number, die)))
    assert status in (SURVIVED, DIED)
    return status == SURVIVED


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("template")
    make_history(directory, disk=QUICK).close()
    return directory


@pytest.mark.parametrize("attempt", [_crash_here, pytest.param(_die_in_child, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ACTIONS)
def test_crash_at_every_step(
    template: Path, tmp_path: Path, name: str, attempt: Callable[[Callable[[Disk], None], int], bool]
) -> None:
    with Store.open(template) as repository:
        before = repository.refs(), repository.config.settings
    action = ACTIONS[name]
    views = []
    for number in range(MAX_STEPS):
        directory = tmp_path / str(number)
        shutil.copytree(template, directory)
        survived = attempt(partial(_act, directory, action), number)
        with Store.open(directory, disk=QUICK) as repository:
            report = check(repository)
            assert report.sound, (number, report.findings)
            views.append((repository.refs(), repository.config.settings))
            if views[-1] == before:
                action(repository)
                assert check(repository).sound
        if survived:
            break
    assert survived
    assert number > 1, "the action has no steps to crash at"
    assert views[0] == before
    assert views[-1] != before
    assert all(view in (before, views[-1]) for view in views)


@pytest.mark.parametrize("attempt", [_crash_here, pytest.param(_die_in_child, marks=pytest.mark.slow)])
def test_crash_at_every_step_of_init(tmp_path: Path, attempt: Callable[[Callable[[Disk], None], int], bool]) -> None:
    survived = False
    for number in range(MAX_STEPS):
        directory = tmp_path / str(number)
        directory.mkdir()
        survived = attempt(partial(_init, directory), number)
        if not (directory / ".patchhub").exists():
            make_repository(directory, disk=QUICK).close()
        with Store.open(directory, disk=QUICK) as repository:
            assert check(repository).sound
            add_batch(repository, range(1))
        if survived:
            break
    assert survived
    assert number > 10


def test_everything_is_on_the_disk_before_the_operation_names_it(tmp_path: Path) -> None:
    steps: list[str] = []
    make_repository(tmp_path).close()
    with Store.open(tmp_path, disk=CountingDisk(steps.append)) as repository:
        identity = add_batch(repository, range(3))
    final = identity[2:]
    rename = steps.index(f"rename {final}")
    write = next(place for place, step in enumerate(steps) if step.startswith("write ") and final in step)
    operation = next(place for place, step in enumerate(steps) if step.startswith("sql INSERT INTO operations"))
    assert write < rename
    assert steps[rename + 1] == f"sync_directory {identity[:2]}"
    assert rename + 1 < operation
    assert not [step for step in steps[operation:] if not step.startswith("sql")]


@pytest.mark.slow
def test_processes_killed_at_random_lose_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    make_repository(tmp_path).close()
    acknowledged = tmp_path / "acknowledged"
    acknowledged.touch()
    generator = random.Random(0)

    def work(start: int) -> None:
        with Store.open(tmp_path) as repository:
            for number in range(start, start + 1000):
                identity = add_batch(repository, range(number, number + 1))
                with open(acknowledged, "a") as file:
                    file.write(identity + "\n")

    for attempt in range(40):
        process = os.fork()
        if process == 0:
            work(attempt * 1000)
            os._exit(0)
        clock.sleep(generator.uniform(0.05, 0.4))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        with Store.open(tmp_path) as repository:
            assert check(repository).sound
            tip = repository.head[1]
            present = {identity for identity, _ in repository.log(*([tip] if tip else []))}
            assert set(acknowledged.read_text().split()) <= present


def test_two_writers_lose_nothing(tmp_path: Path) -> None:
    make_repository(tmp_path).close()

    def work(start: int) -> None:
        with Store.open(tmp_path) as repository:
            for number in range(start, start + 8):
                patch = put_patch(repository, range(number, number + 1))
                while True:
                    tip = repository.head[1]
                    try:
                        record(repository, make_commit(repository, *([tip] if tip else []), added=patch.elements))
                        break
                    except RepositoryError as error:
                        if error.kind != "StaleRefError":
                            raise

    process = os.fork()
    if process == 0:
        status = 1
        try:
            work(100)
            status = 0
        finally:
            os._exit(status)
    work(0)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
    with Store.open(tmp_path) as repository:
        tip = repository.head[1]
        assert tip is not None
        assert len(list(repository.log(tip))) == 16
        assert len(repository.active(tip)) == 16
        assert check(repository).sound
