"""Scores as notes: what was measured about commits, read back. JSON only: no torch, no NumPy."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from patchhub.evaluation.definitions import DEFINITIONS, headline
from patchhub.objects import Note
from patchhub.results import Result, told
from patchhub.store.revisions import NOTES, SIGNATURES
from patchhub.store.store import Store

_OPTIONAL = ("low", "high", "base")


@dataclass(frozen=True)
class Score(Result):
    """One number of a note.

    Attributes:
        low, high: the bounds of its 95 % interval, if it has one.
        base: the same measured on the unpatched model, if it was.
        records: how many records have it, if that is known.
    """

    value: float
    low: float | None = field(default=None, metadata=told(optional=True))
    high: float | None = field(default=None, metadata=told(optional=True))
    base: float | None = field(default=None, metadata=told(optional=True))
    records: int | None = field(default=None, metadata=told(optional=True))


@dataclass(frozen=True)
class Noted(Result):
    """What one note says.

    Attributes:
        note, commit: ids.
        suite: what was measured with which settings; notes of one suite can be compared.
        metrics: whose scores, such as "counterfact".
        file: the name of the file of facts.
        facts: how many.
        chat: they were asked in the base's chat form.
    """

    note: str
    commit: str = field(metadata=told(omit=True))
    suite: str
    metrics: str
    file: str
    facts: int
    made_by: str
    scores: Mapping[str, Score]
    chat: bool = False

    @property
    def kind(self) -> str:
        """Whose scores, and whether in a chat."""
        return kind(self.metrics, chat=self.chat)

    @property
    def leading(self) -> dict[str, Score]:
        """The scores that a line has room for, the summary first."""
        chosen = {name: self.scores[name] for name in headline(self.metrics) if name in self.scores}
        return chosen or dict(list(self.scores.items())[:4])


@dataclass(frozen=True)
class Compared(Result):
    """One suite's scores at two revisions; a side that was not measured has none."""

    suite: str
    metrics: str
    file: str
    facts: int
    before: Mapping[str, Score]
    after: Mapping[str, Score]
    chat: bool = False

    @property
    def kind(self) -> str:
        """Whose scores, and whether in a chat."""
        return kind(self.metrics, chat=self.chat)


def kind(metrics: str, *, chat: bool) -> str:
    """`counterfact`, or `counterfact in a chat`: what is never compared with the other."""
    return f"{metrics} in a chat" if chat else metrics


def noted_commits(refs: Mapping[str, str]) -> dict[str, list[str]]:
    """For each commit that has notes with scores their ids, in the order of their suites."""
    found: dict[str, list[str]] = {}
    for ref in sorted(refs):
        commit, _, suite = ref.removeprefix(NOTES).partition("/")
        if ref.startswith(NOTES) and not suite.startswith(SIGNATURES):
            found.setdefault(commit, []).append(refs[ref])
    return found


def notes_of(repository: Store, commit: str | None) -> tuple[Noted, ...]:
    """What is noted about a commit now; nothing about the unpatched model."""
    notes = noted_commits(repository.refs()).get(commit or "", [])
    return tuple(read_note(identity, repository.note(identity)) for identity in notes)


def read_note(identity: str, note: Note) -> Noted:
    """A note in words; what it holds that is no number is left out."""
    settings = note.settings
    return Noted(
        note=identity,
        commit=note.commit,
        suite=note.suite,
        metrics=str(settings.get("metrics", note.suite)),
        file=str(settings.get("file", "")),
        facts=settings["facts"] if isinstance(settings.get("facts"), int) else 0,
        made_by=note.made_by,
        scores=_in_order(dict(_scores(note.scores, ""))),
        chat=isinstance(settings.get("chat"), Mapping),
    )


def noted_history(repository: Store, revision: str, suite: str) -> list[Noted]:
    """The notes of one suite about the commits below a revision, the oldest first."""
    notes = noted_commits(repository.refs())
    start = repository.resolve(revision)
    walked = [identity for identity, _ in repository.log(start)] if start else []
    found = (read_note(note, repository.note(note)) for commit in reversed(walked) for note in notes.get(commit, ()))
    return [noted for noted in found if noted.suite == suite]


def compare(repository: Store, old: str | None, new: str | None) -> tuple[Compared, ...]:
    """The suites that two commits (None: the unpatched model) were measured with, each with its scores at both."""
    sides = [{found.suite: found for found in notes_of(repository, commit)} for commit in (old, new)]
    if old is None or new is None:  # what a suite says about the base stands in its notes about any commit
        bases = {found.suite: found for side in sides for found in side.values()}
        at_base = {suite: found for suite, found in bases.items() if _base(found)}
        sides = [at_base if commit is None else side for commit, side in zip((old, new), sides, strict=True)]
    rows = []
    for suite in sorted(sides[0].keys() | sides[1].keys()):
        either = sides[1].get(suite) or sides[0][suite]
        before, after = (
            ({} if suite not in side else _base(side[suite]) if commit is None else side[suite].scores)
            for commit, side in zip((old, new), sides, strict=True)
        )
        rows.append(Compared(suite, either.metrics, either.file, either.facts, before, after, either.chat))
    return tuple(rows)


def _base(noted: Noted) -> dict[str, Score]:
    return {name: Score(score.base) for name, score in noted.scores.items() if score.base is not None}


def _scores(scores: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Score]]:
    """Each number of a note, nested names joined by dots; one with an interval is ``{"value", "low", "high", ...}``."""
    for name, found in scores.items():
        if isinstance(found, Mapping) and _is_number(found.get("value")):
            extra = {key: float(found[key]) for key in _OPTIONAL if _is_number(found.get(key))}
            records = found.get("records")
            yield prefix + name, Score(found["value"], **extra, records=records if type(records) is int else None)
        elif isinstance(found, Mapping):
            yield from _scores(found, f"{prefix}{name}.")
        elif _is_number(found):
            yield prefix + name, Score(float(found))


def _in_order(scores: Mapping[str, Score]) -> dict[str, Score]:
    """In the order of the definitions; names that have none come last."""
    places = {name: place for place, name in enumerate(DEFINITIONS)}
    return {name: scores[name] for name in sorted(scores, key=lambda name: (places.get(name, len(places)), name))}


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
