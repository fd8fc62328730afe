"""Whole tables of the index, read at once: for what is about every fact and commit, such as the report."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from patchhub.store.database import database_errors
from patchhub.store.lookup import Fact
from patchhub.store.repository import Repository


class FactChange(NamedTuple):
    """One commit that added (+1) or removed (-1) a request of a patch."""

    commit: str
    patch: str
    request: str
    change: int


def every_fact(repository: Repository) -> Iterator[Fact]:
    """The requests of every patch whose texts are here, by patch, then request id."""
    query = "SELECT patch, id, prompt, subject, target_new, target_true FROM requests ORDER BY patch, id"
    with database_errors(repository.database):
        yield from map(Fact._make, repository.connection.execute(query))


def every_change(repository: Repository) -> Iterator[FactChange]:
    """The requests that every commit changed against its first parent, the earliest commit first."""
    query = (
        "SELECT commit_id, patch, request, change FROM changes JOIN commits ON commits.id = commit_id"
        " WHERE request IS NOT NULL"
        " ORDER BY commits.rank, commit_id, change, patch, request"
    )
    with database_errors(repository.database):
        yield from map(FactChange._make, repository.connection.execute(query))
