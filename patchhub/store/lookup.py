"""Questions about facts and commits that the index answers without opening objects."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import starmap
from typing import Any, Final, NamedTuple

from patchhub.objects import Element
from patchhub.results import Result, told
from patchhub.store import database
from patchhub.store.database import database_errors
from patchhub.store.store import Store

_FEWEST_DIGITS: Final = 4
_AT_ONCE: Final = 500  # SQLite's oldest limit on parameters is 999
_CHAIN: Final = (
    "WITH RECURSIVE chain(id) AS (VALUES(?) UNION ALL SELECT json_extract(commits.parents, '$[0]')"
    " FROM commits JOIN chain ON commits.id = chain.id WHERE commits.parents != '[]')"
)
"""A commit and its first parents down to the root; an active set is the sum of their changes."""

_WHOLE: Final = "IN (SELECT patch FROM changes WHERE request IS NULL)"
_NOT_CARRIED: Final = (
    f"NOT (changes.patch {_WHOLE} AND EXISTS (SELECT 1 FROM changes AS other WHERE other.request = changes.request"
    f" AND other.commit_id = changes.commit_id AND other.change = -changes.change AND other.patch {_WHOLE}))"
)
"""Of the rows of `changes`, not those of a fact that a shard hands on to the one which takes its place."""


@dataclass(frozen=True)
class Fact(Result):
    """A request as one patch holds it, in words."""

    patch: str
    request: str = field(metadata=told(name="id"))
    prompt: str
    subject: str
    target_new: str
    target_true: str | None

    def words(self) -> str:
        return f"{self.text} {self.target_new}"

    @property
    def text(self) -> str:
        """The prompt with the subject filled in."""
        return self.prompt.replace("{}", self.subject)


class Change(NamedTuple):
    """One commit that added (+1) or removed (-1) a request."""

    commit: str
    patch: str
    change: int
    author: str
    time: str
    message: str


class Selection(NamedTuple):
    """Which commits are wanted; None does not restrict.

    Attributes:
        about: part of the text or target of a fact that the commit added or removed.
        author: part of the author.
        since, until: instants in the store's form, inclusive.
    """

    about: str | None = None
    author: str | None = None
    since: str | None = None
    until: str | None = None


def selected_commits(repository: Store, selection: Selection) -> set[str] | None:
    """Ids of the commits that fit; None where nothing is restricted. Letter case does not matter (ASCII)."""
    conditions: list[str] = []
    values: list[str | None] = []
    for column, sign, value in (
        ("author", "LIKE", _part(selection.author)),
        ("time", ">=", selection.since),
        ("time", "<=", selection.until),
    ):
        if value is not None:
            conditions.append(f"commits.{column} {sign} ?" + (" ESCAPE '\\'" if sign == "LIKE" else ""))
            values.append(value)
    if selection.about is not None:
        with database_errors(repository.database):
            has_texts = database.has_texts(repository.connection)
        near = "patch IN (SELECT patch FROM texts WHERE texts LIKE ? ESCAPE '\\') AND " if has_texts else ""
        conditions.append(
            f"commits.id IN (SELECT commit_id FROM changes WHERE request IN (SELECT id FROM requests WHERE {near}"
            f"replace(prompt, '{{}}', subject) || ' ' || target_new LIKE ? ESCAPE '\\') AND {_NOT_CARRIED})"
        )
        values += [_part(selection.about)] * (2 if has_texts else 1)
    if not conditions:
        return None
    return {row[0] for row in _rows(repository, f"SELECT id FROM commits WHERE {' AND '.join(conditions)}", values)}


def patches_named(repository: Store, prefix: str) -> dict[str, str]:
    """The patches whose id begins with `prefix`, and the first commit that brought each."""
    rows = _rows(
        repository,
        "SELECT changes.patch, changes.commit_id FROM changes JOIN commits ON commits.id = changes.commit_id"
        " WHERE substr(changes.patch, 1, ?) = ? AND changes.change > 0 ORDER BY commits.rank DESC",
        [len(prefix), prefix],
    )
    return {row[0]: row[1] for row in rows}


def patches_ever_whole(repository: Store) -> list[str]:
    """The patches that were ever active as a whole: shards, and imported changes."""
    return [row[0] for row in _rows(repository, "SELECT DISTINCT patch FROM changes WHERE request IS NULL", [])]


def whole_graph(repository: Store) -> dict[str, tuple[int, tuple[str, ...]]]:
    """Rank and parents of every commit, in one read: for questions that walk most of the history."""
    rows = list(_rows(repository, "SELECT id, rank, parents FROM commits", []))
    parents = json.loads(f"[{','.join(row[2] for row in rows)}]")  # one document is read far faster than many
    return {row[0]: (row[1], tuple(above)) for row, above in zip(rows, parents, strict=True)}


def search(repository: Store, words: str, *, subject: str = "", limit: int = 50) -> list[Fact]:
    """Facts ever committed whose text or targets hold every word, and whose subject holds every word of `subject`;
    the best match first."""
    wanted = [*database.quoted(words), *(f"subject : {word}" for word in database.quoted(subject))]
    if not wanted:
        return []
    return [
        Fact(*row)
        for row in _rows(
            repository,
            "SELECT patch, id, r.prompt, r.subject, r.target_new, r.target_true FROM"
            " (SELECT rowid AS place, rank AS score FROM requests_fts WHERE requests_fts MATCH ? ORDER BY rank LIMIT ?)"
            " JOIN requests AS r ON r.rowid = place ORDER BY score, patch, id",
            [" AND ".join(wanted), limit],
        )
    ]


def named(repository: Store, name: str) -> list[Fact]:
    """Facts ever committed that a name means: all of that subject (ASCII letter case does not matter), the one of that text with or
    without its target, or the one whose request id begins so."""
    texts = "replace(prompt, '{}', subject)"
    query = (
        "SELECT patch, id, prompt, subject, target_new, target_true FROM requests WHERE lower(subject) = lower(?)"
        f" OR {texts} = ? OR {texts} || ' ' || target_new = ? OR (? AND substr(id, 1, ?) = ?) ORDER BY id, patch"
    )
    digits = len(name) >= _FEWEST_DIGITS and set(name) <= set("0123456789abcdef")
    return [Fact(*row) for row in _rows(repository, query, [name, name, name, digits, len(name), name])]


def of_target(repository: Store, target: str) -> list[Fact]:
    """Facts ever committed whose target is this (ASCII letter case does not matter)."""
    query = (
        "SELECT patch, id, prompt, subject, target_new, target_true FROM requests WHERE lower(target_new) = lower(?)"
        " ORDER BY id, patch"
    )
    return [Fact(*row) for row in _rows(repository, query, [target])]


def subjects(repository: Store, beginning: str, *, limit: int = 50) -> list[str]:
    """Subjects of facts ever committed that begin so, by name (ASCII letter case does not matter)."""
    query = (
        "SELECT DISTINCT subject FROM requests WHERE substr(lower(subject), 1, ?) = lower(?) ORDER BY subject LIMIT ?"
    )
    return [row[0] for row in _rows(repository, query, [len(beginning), beginning, limit])]


def mentioned(repository: Store, prompt: str, *, limit: int = 50) -> list[Fact]:
    """Facts ever committed whose subject occurs in `prompt`: those of just this text first, then long subjects first."""
    return [
        Fact(*row)
        for row in _rows(
            repository,
            "SELECT patch, id, prompt, subject, target_new, target_true FROM requests WHERE instr(?, subject) > 0"
            " ORDER BY replace(prompt, '{}', subject) != ?, length(subject) DESC, patch, id LIMIT ?",
            [prompt, prompt, limit],
        )
    ]


def changes(repository: Store, request: str) -> list[Change]:
    """The commits that added or removed a request, the earliest first."""
    return [
        Change(*row)
        for row in _rows(
            repository,
            "SELECT commits.id, patch, change, author, time, message FROM changes JOIN commits ON commits.id = commit_id"
            f" WHERE request = ? AND {_NOT_CARRIED} ORDER BY commits.rank, commits.id, change",
            [request],
        )
    ]


def active_among(repository: Store, commit: str | None, requests: Sequence[str]) -> set[Element]:
    """Which columns of these requests are active at a commit, without reading its set."""
    found: set[Element] = set()
    for start in range(0, len(requests) if commit else 0, _AT_ONCE):
        some = requests[start : start + _AT_ONCE]
        rows = _rows(
            repository,
            f"{_CHAIN} SELECT patch, request FROM changes WHERE request IN ({', '.join('?' * len(some))})"
            " AND commit_id IN (SELECT id FROM chain) GROUP BY patch, request HAVING SUM(change) > 0",
            [commit, *some],
        )
        found.update((patch, request) for patch, request in rows)
    return found


def whole_patches(repository: Store, commit: str | None) -> list[str]:
    """Ids of the patches that are active as a whole at a commit (shards and additive ones), without reading its set."""
    query = (
        f"{_CHAIN} SELECT patch FROM changes WHERE request IS NULL AND commit_id IN (SELECT id FROM chain)"
        " GROUP BY patch HAVING SUM(change) > 0 ORDER BY patch"
    )
    return [row[0] for row in _rows(repository, query, [commit])] if commit else []


def _part(text: str | None) -> str | None:
    """A LIKE pattern for a value that holds `text`."""
    if text is None:
        return None
    for special in ("\\", "%", "_"):
        text = text.replace(special, f"\\{special}")
    return f"%{text}%"


def _rows(repository: Store, query: str, values: Sequence[Any]) -> Iterator[sqlite3.Row]:
    with database_errors(repository.database):
        yield from repository.connection.execute(query, values)


class FactChange(NamedTuple):
    """One commit that added (+1) or removed (-1) a request of a patch."""

    commit: str
    patch: str
    request: str
    change: int


def every_fact(repository: Store) -> Iterator[Fact]:
    """The requests of every patch whose texts are here, by patch, then request id."""
    query = "SELECT patch, id, prompt, subject, target_new, target_true FROM requests ORDER BY patch, id"
    with database_errors(repository.database):
        yield from starmap(Fact, repository.connection.execute(query))


def every_change(repository: Store) -> Iterator[FactChange]:
    """The requests that every commit changed against its first parent, the earliest commit first."""
    query = (
        "SELECT commit_id, patch, request, change FROM changes JOIN commits ON commits.id = commit_id"
        " WHERE request IS NOT NULL"
        " ORDER BY commits.rank, commit_id, change, patch, request"
    )
    with database_errors(repository.database):
        yield from map(FactChange._make, repository.connection.execute(query))
