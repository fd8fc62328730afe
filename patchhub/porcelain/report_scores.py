"""The scores of a report: what was noted about its commits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from patchhub.porcelain.scores import Noted, Score, noted_commits, read_note
from patchhub.store.repository import Repository


@dataclass(frozen=True)
class ScoreRow:
    """One note, and the place of its commit on the page."""

    commit: int
    noted: Noted

    def to_json(self) -> dict[str, Any]:
        """Each score as [value, low, high, the base's], null for what is not known."""
        found = self.noted
        facts = f"{found.facts:,} fact{'' if found.facts == 1 else 's'}" if found.facts else ""
        return {
            "commit": self.commit,
            "suite": found.suite,
            "title": ", ".join(filter(None, [found.kind, found.file, facts])),
            "made_by": found.made_by,
            "scores": {name: _row(score) for name, score in found.scores.items()},
        }


def score_rows(repository: Repository, places: Mapping[str, int]) -> Iterator[ScoreRow]:
    """The notes about commits that are on the page, the newest commit first."""
    noted = noted_commits(repository.refs())
    for commit, place in sorted(places.items(), key=lambda item: item[1]):
        for identity in noted.get(commit, ()):
            yield ScoreRow(place, read_note(identity, repository.note(identity)))


def _row(score: Score) -> list[float | None]:
    bounds = (score.value, score.low, score.high, score.base)
    return [None if bound is None else float(f"{bound:.5g}") for bound in bounds]
