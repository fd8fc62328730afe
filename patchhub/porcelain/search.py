"""`search`: all facts ever committed, in words. Answered by the index alone: no torch, no NumPy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from patchhub.errors import SettingsError
from patchhub.store import lookup
from patchhub.store.lookup import Change, Fact
from patchhub.store.repository import Repository

_READ: Final = 500
"""How many rows are read at first; those that are not active are left out."""


@dataclass(frozen=True)
class Found:
    """One fact, the commits that added or removed it (earliest first), and whether it is active now."""

    fact: Fact
    changes: tuple[Change, ...]
    active: bool

    @property
    def taught(self) -> Change | None:
        """The commit that first added the fact."""
        return next((change for change in self.changes if change.change > 0), None)

    def to_json(self) -> dict[str, Any]:
        return {
            **fact_json(self.fact),
            "active": self.active,
            "taught": self.taught._asdict() if self.taught else None,
            "changes": [change._asdict() for change in self.changes],
        }


def search(
    repository: Repository, words: str, *, subject: str = "", revision: str = "HEAD", limit: int = 50
) -> list[Found]:
    """Facts whose text or targets hold every word, the best match first.

    Args:
        subject: words that must all be in the fact's subject.
        revision: where a fact counts as active.
        limit: at most this many facts.

    Raises:
        SettingsError: neither words nor a subject.
        RevisionError: no such revision.
    """
    if not (words.strip() or subject.strip()):
        raise SettingsError("there is nothing to search for", remedy="Give words, or --subject.")
    commit = repository.resolve(revision)
    read = partial(lookup.search, repository, words, subject=subject)
    facts = _enough(lambda rows: read(limit=rows), _first_of_each, limit, first=2 * limit)
    active = {request for _, request in lookup.active_among(repository, commit, [fact.request for fact in facts])}
    return [Found(fact, tuple(lookup.changes(repository, fact.request)), fact.request in active) for fact in facts]


def mentioned(repository: Repository, prompt: str, revision: str = "HEAD", *, limit: int = 20) -> list[Fact]:
    """The facts active at a revision whose subject occurs in a prompt: those of just this text first.

    Raises:
        RevisionError: no such revision.
    """
    commit = repository.resolve(revision)
    read = partial(lookup.mentioned, repository, prompt.strip())

    def active_ones(facts: Sequence[Fact]) -> list[Fact]:
        active = lookup.active_among(repository, commit, sorted({fact.request for fact in facts}))
        return [fact for fact in facts if (fact.patch, fact.request) in active]

    return _enough(lambda rows: read(limit=rows), active_ones, limit, first=_READ)


def fact_json(fact: Fact) -> dict[str, Any]:
    return {
        "id": fact.request,
        "patch": fact.patch,
        "prompt": fact.prompt,
        "subject": fact.subject,
        "target_new": fact.target_new,
        "target_true": fact.target_true,
    }


def _enough(
    read: Callable[[int], Sequence[Fact]], choose: Callable[[Sequence[Fact]], list[Fact]], limit: int, *, first: int
) -> list[Fact]:
    """The first `limit` of what `choose` keeps of the best rows; `read` gives so many rows, `first` of them to begin with.

    Facts that were recorded again have many rows, so more are read until there are enough or no more.
    """
    rows = max(first, 1)
    while True:
        found = read(rows)
        kept = choose(found)
        if len(kept) >= limit or len(found) < rows:
            return kept[:limit]
        rows *= 4


def _first_of_each(facts: Iterable[Fact]) -> list[Fact]:
    """Each request once, though several patches may hold it."""
    found: dict[str, Fact] = {}
    for fact in facts:
        found.setdefault(fact.request, fact)
    return list(found.values())
