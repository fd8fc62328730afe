"""`search`: all facts ever committed, in words. Answered by the index alone: no torch, no NumPy."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from patchhub.errors import SettingsError
from patchhub.store import lookup
from patchhub.store.lookup import Change, Fact
from patchhub.store.repository import Repository

_READ: Final = 500
"""How many facts are read before those that are not active are left out."""


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
    facts = _first_of_each(lookup.search(repository, words, subject=subject, limit=2 * limit))[:limit]
    active = {request for _, request in lookup.active_among(repository, commit, [fact.request for fact in facts])}
    return [Found(fact, tuple(lookup.changes(repository, fact.request)), fact.request in active) for fact in facts]


def mentioned(repository: Repository, prompt: str, revision: str = "HEAD", *, limit: int = 20) -> list[Fact]:
    """The facts active at a revision whose subject occurs in a prompt: those of just this text first.

    Raises:
        RevisionError: no such revision.
    """
    commit = repository.resolve(revision)
    facts = lookup.mentioned(repository, prompt.strip(), limit=_READ)
    active = lookup.active_among(repository, commit, sorted({fact.request for fact in facts}))
    return [fact for fact in facts if (fact.patch, fact.request) in active][:limit]


def fact_json(fact: Fact) -> dict[str, Any]:
    return {
        "id": fact.request,
        "patch": fact.patch,
        "prompt": fact.prompt,
        "subject": fact.subject,
        "target_new": fact.target_new,
        "target_true": fact.target_true,
    }


def _first_of_each(facts: Iterable[Fact]) -> list[Fact]:
    """Each request once, though several patches may hold it."""
    found: dict[str, Fact] = {}
    for fact in facts:
        found.setdefault(fact.request, fact)
    return list(found.values())
