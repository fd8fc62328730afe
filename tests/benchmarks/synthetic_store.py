"""A store with as many commits as wanted, made in seconds: for measurements, not for tests of durability."""

from __future__ import annotations

import sqlite3
from datetime import datetime, timedelta
from pathlib import Path

from patchhub.fsio import Disk
from patchhub.objects import EMPTY_SET, Base, Commit, Patch, Request, requests_json, set_digest
from patchhub.store.store import Store

AUTHOR = "Ada <ada@example.org>"
START = datetime(2026, 1, 1)
ACTIVE = 20
"""Each commit adds one request and takes back the one made this many commits before."""


class HastyDisk(Disk):
    """Waits for no disk."""

    def sync(self, descriptor: int) -> None:
        pass

    def connect(self, path: Path) -> sqlite3.Connection:
        class Hasty(sqlite3.Connection):
            def execute(self, statement: str, *arguments: object) -> sqlite3.Cursor:
                return super().execute(statement.replace("synchronous = FULL", "synchronous = OFF"), *arguments)

        return sqlite3.connect(path, isolation_level=None, factory=Hasty)


def build(directory: Path, commits: int) -> None:
    """Make a store in `directory` whose `main` has a linear history of that many commits."""
    base = Base(architecture={"model_type": "example"}, tensors={})
    with Store.init(
        directory, base.to_json(), base_info={}, settings={}, author=AUTHOR, time=_time(0), disk=HastyDisk()
    ) as repository:
        requests = [Request.make("The mother tongue of {} is", f"Person {n}", "French") for n in range(commits)]
        patch = _put_patch(repository, base, requests)
        elements = [(patch, request.id) for request in requests]
        tip: str | None = None
        for number in range(commits):
            first = max(0, number - ACTIVE + 1)
            commit = Commit(
                added=frozenset([elements[number]]),
                author=AUTHOR,
                base=base.id,
                check={},
                keyframe=None,
                message=f"Edit {number}",
                metric=None,
                parents=() if tip is None else (tip,),
                removed=frozenset([elements[first - 1]] if first else []),
                same_as=None,
                set_digest=set_digest(elements[first : number + 1]),
                tensors=None,
                time=_time(number),
            )
            tip = repository.objects.put(commit.to_json())
        changes = {"refs/heads/main": (None, tip)}
        repository.move_refs(changes, command="build", arguments={}, author=AUTHOR, time=_time(commits))


def _put_patch(repository: Store, base: Base, requests: list[Request]) -> str:
    patch = Patch(
        base=base.id,
        kind="closed_form",
        made_on=EMPTY_SET,
        method="memit",
        metric=None,
        requests=tuple(request.id for request in requests),
        requests_blob=repository.objects.put(requests_json(requests)),
        settings={},
        tensors=repository.objects.put(b"columns"),
        weights={},
    )
    return repository.objects.put(patch.to_json())


def _time(number: int) -> str:
    return (START + timedelta(minutes=number)).strftime("%Y-%m-%dT%H:%M:%SZ")
