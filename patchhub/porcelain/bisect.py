"""`bisect`: the commit that broke something, in about log2 n checks. The search is pure; checks are functions (`bisect_checks`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from patchhub.errors import RevisionError
from patchhub.objects import Request
from patchhub.porcelain.history import Entry, request_json, show
from patchhub.porcelain.progress import Progress
from patchhub.store import graph, lookup
from patchhub.store.graph import Parents
from patchhub.store.repository import Repository

if TYPE_CHECKING:
    from patchhub.editing.chat import Chat

Verdict = Literal["good", "bad", "skip"]
Outcome = tuple[Verdict, float | None]
"""A verdict, and the number that it was read off, if there is one."""
Check = Callable[[str | None], Outcome]
"""The verdict on a commit; on the base for None."""


@dataclass(frozen=True)
class Step:
    """One check that was made; the commit is None for the base."""

    commit: str | None
    verdict: Verdict
    value: float | None

    def to_json(self) -> dict[str, Any]:
        return {"commit": self.commit, "verdict": self.verdict, "value": self.value}


@dataclass(frozen=True)
class Bisection:
    """What a bisection found.

    Attributes:
        suspects: the first bad commit; several, newest first, where skipped commits hide which one it is.
        steps: the checks in the order in which they were made.
        entry, added, removed: the first bad commit and its facts, if it is known.
        chat: the form in which the checks' prompts were asked; None: as they are, or as a command does.
    """

    suspects: tuple[str, ...]
    steps: tuple[Step, ...]
    entry: Entry | None
    added: tuple[Request, ...]
    removed: tuple[Request, ...]
    chat: Chat | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "first_bad": self.entry.id if self.entry else None,
            "suspects": list(self.suspects),
            "chat": None if self.chat is None else self.chat.to_json(),
            "steps": [step.to_json() for step in self.steps],
            "commit": self.entry.to_json() if self.entry else None,
            "facts_added": [request_json(request) for request in self.added],
            "facts_removed": [request_json(request) for request in self.removed],
        }


# --- the search: pure -----------------------------------------------------------------------------------------------


def first_bad(good: Iterable[str], bad: str, parents: Parents, verdict: Callable[[str], Verdict]) -> list[str]:
    """The commit below or at `bad` that is bad and whose parents are all good or have a good descendant.

    Each check is made at the commit that splits what is left best, as in git: the number of candidates that are
    ancestors of it is closest to half. It finds the commit exactly if every descendant of a bad commit is bad.

    Returns:
        One commit; where only skipped ones are left beside it, all that it may be, children first.
    """
    known = graph.ancestors(good, parents)
    candidates = [commit for commit in graph.oldest_first([bad], parents) if commit not in known]
    skipped: set[str] = set()
    while True:
        below = ancestor_sets(candidates, parents)
        choice = _best_split(candidates, below, skipped | {candidates[-1]})
        if choice is None:
            return candidates[::-1]
        outcome = verdict(choice)
        if outcome == "skip":
            skipped.add(choice)
            continue
        inside = below[choice]
        candidates = [c for place, c in enumerate(candidates) if bool(inside >> place & 1) == (outcome == "bad")]


def ancestor_sets(commits: Sequence[str], parents: Parents) -> dict[str, int]:
    """For each of `commits` (parents first) those of them that are it or its ancestors, as bits of their positions."""
    sets: dict[str, int] = {}
    for place, commit in enumerate(commits):
        bits = 1 << place
        for parent in parents(commit):
            bits |= sets.get(parent, 0)
        sets[commit] = bits
    return sets


def _best_split(candidates: Sequence[str], below: Mapping[str, int], excluded: Collection[str]) -> str | None:
    """The candidate for which the smaller of its two sides is largest; the newest such one."""
    best, choice = 0, None
    for commit in candidates:
        inside = bin(below[commit]).count("1")
        if commit not in excluded and min(inside, len(candidates) - inside) >= best:
            best, choice = min(inside, len(candidates) - inside), commit
    return choice


# --- the verb -------------------------------------------------------------------------------------------------------


def bisect(
    repository: Repository, good: str, bad: str, check: Check, progress: Progress, *, chat: Chat | None = None
) -> Bisection:
    """Find the first bad commit between two revisions, both of which are checked first.

    Args:
        chat: the form in which ``check`` asks, to be told with what it found.

    Raises:
        RevisionError: `good` is not an ancestor of `bad`, or `check` does not find them good and bad.
    """
    start, end = repository.resolve(good), repository.resolve(bad)
    known = lookup.whole_graph(repository)

    def parents(commit: str) -> Sequence[str]:
        return known[commit][1]

    if end is None or start == end or (start and not graph.is_ancestor(start, end, parents)):
        raise RevisionError(
            f"{good} is not an ancestor of {bad}",
            remedy="Name an older commit (or `base`) that is good, then a bad one.",
        )
    steps: list[Step] = []
    progress.stage("checking", 3 + int(math.log2(len(graph.ancestors([end], parents)))))

    def verdict(commit: str | None) -> Verdict:
        outcome, value = check(commit)
        steps.append(Step(commit, outcome, value))
        progress.advance(1)
        return outcome

    _demand(good, verdict(start), "good")
    _demand(bad, verdict(end), "bad")
    suspects = first_bad([start] if start else [], end, parents, verdict)
    progress.close()
    if len(suspects) > 1:
        return Bisection(tuple(suspects), tuple(steps), None, (), (), chat)
    shown = show(repository, suspects[0])
    return Bisection(tuple(suspects), tuple(steps), shown.entry, shown.added, shown.removed, chat)


def _demand(revision: str, found: Verdict, wanted: Verdict) -> None:
    if found != wanted:
        raise RevisionError(
            f"the check says {found!r} of {revision}, which should be {wanted}",
            remedy="Choose revisions on both sides of the change, or another check.",
            revision=revision,
            verdict=found,
        )
