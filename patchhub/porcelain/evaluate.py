"""`eval`: how well a revision holds facts, and what it costs elsewhere. Definitions are in docs/evaluation.md."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Final

import torch

from patchhub.canonical import canonical_json, object_id
from patchhub.errors import EditError, RequestError, SettingsError
from patchhub.evaluation import suites
from patchhub.evaluation.decoding import check_contexts, live_scores
from patchhub.evaluation.definitions import DEFINITIONS, SUITES
from patchhub.evaluation.drift_scores import drift_scores
from patchhub.evaluation.fluency import fluency_scores
from patchhub.evaluation.suites import Scores
from patchhub.models.placement import Placement
from patchhub.objects import Note, Request, Text, requests_json
from patchhub.porcelain.evaluation_facts import Facts
from patchhub.porcelain.measuring import (
    BASE,
    FLUENCY_FACTS,
    FLUENCY_TOKENS,
    FLUENCY_TOP_K,
    Measured,
    Measurer,
    Questions,
)
from patchhub.porcelain.progress import Progress
from patchhub.porcelain.scores import Noted, Score, notes_of, read_note
from patchhub.store.repository import Repository

VERSION: Final = 1
"""Of the definitions; raised when a score of the same name is computed differently."""
RESAMPLES: Final = 1000
_FUNCTIONS: Final[Mapping[str, Callable[..., Scores]]] = {
    "counterfact": suites.counterfact_scores,
    "zsre": suites.zsre_scores,
    "wise": suites.wise_scores,
}


@dataclass(frozen=True)
class Evaluation:
    """The scores of one revision.

    Attributes:
        commit: None for the unpatched model.
        facts: what it was measured on.
        suite: the name of what was measured with these settings.
        settings: all that the numbers depend on beside the commit.
        groups: teacher forced, live, fluency, drift.
        base: each score of the unpatched model.
        note: the note that keeps the scores, if one does.
    """

    commit: str | None
    facts: tuple[Request, ...]
    suite: str
    settings: Mapping[str, Any]
    groups: tuple[Scores, ...]
    base: Mapping[str, float]
    note: str | None = None

    @property
    def chat(self) -> bool:
        """Facts were asked in the base's chat form."""
        return "chat" in self.settings

    @property
    def scores(self) -> dict[str, Score]:
        """All scores by name, in the order of their definitions."""
        found = {name: estimate for group in self.groups for name, estimate in group.estimates.items()}
        return {
            name: Score(
                found[name].value, *_bounds(found[name].low, found[name].high), self.base.get(name), found[name].records
            )
            for name in DEFINITIONS
            if name in found
        }

    @property
    def relations(self) -> dict[str, dict[str, float]]:
        """The teacher-forced and live scores of the facts of each prompt template, with `facts`, their number."""
        return {
            template: {"facts": len(rows), **self.groups[0].of(rows), **self.groups[1].of(rows)}
            for template, rows in suites.relations(self.facts).items()
        }

    def records(self) -> Iterator[dict[str, Any]]:
        """One row per fact: what it is, and its own value of every score."""
        columns = {name: column for group in self.groups for name, column in group.columns.items()}
        for place, request in enumerate(self.facts):
            fact = {"request": request.id, "prompt": request.text, "target_new": request.target_new}
            yield {**fact, **{name: column[place] for name, column in columns.items()}}

    def to_json(self) -> dict[str, Any]:
        scores = self.scores
        return {
            "commit": self.commit,
            "facts": len(self.facts),
            "suite": self.suite,
            "settings": dict(self.settings),
            "scores": {name: score.to_json() for name, score in scores.items()},
            "definitions": {name: DEFINITIONS[name] for name in scores},
            "relations": self.relations,
            "note": self.note,
        }


@dataclass(frozen=True)
class HistoryRow:
    """One commit of a walk: its scores, and whether they were measured now; without scores where it could not be measured."""

    commit: str
    time: str
    message: str
    noted: Noted | None
    fresh: bool

    def to_json(self) -> dict[str, Any]:
        noted = self.noted.to_json() if self.noted else None
        return {"commit": self.commit, "time": self.time, "message": self.message, "fresh": self.fresh, "noted": noted}


class Evaluator:
    """Evaluates revisions on one list of facts. The base is measured once; see `Measurer` for what is cached.

    Raises:
        SettingsError: there are no such metrics, a context has not one `{}`, or there is no chat template to ask in.
        RequestError: there are no facts, or the text for drift cannot be read.
    """

    def __init__(
        self,
        repository: Repository,
        facts: Facts,
        progress: Progress,
        *,
        placement: Placement | None = None,
        dtype: torch.dtype | None = None,
        chat: bool | None = None,
    ) -> None:
        if facts.metrics not in SUITES:
            raise SettingsError(
                f"there are no metrics {facts.metrics!r}", remedy=f"The metrics are {', '.join(SUITES)}."
            )
        self.requests = facts.chosen
        if not self.requests:
            raise RequestError("there are no facts to evaluate", remedy="Give --suite FILE with at least one record.")
        self._repository, self._facts, self._progress = repository, facts, progress
        check_contexts(facts.contexts)
        questions = Questions(self.requests, seed=facts.seed or 0, text=facts.text, contexts=facts.contexts)
        self._measurer = Measurer(repository, questions, progress, placement=placement, dtype=dtype, chat=chat)
        self.settings = self._settings(questions)
        named = {name: value for name, value in self.settings.items() if name != "file"}
        asked = "-chat" if self._measurer.chat else ""
        self.suite = f"{facts.metrics}{asked}-{object_id(canonical_json(named))[:12]}"

    @cached_property
    def _base(self) -> Measured:
        return self._measurer.measure(BASE)

    def evaluate(self, revision: str) -> Evaluation:
        """The scores of a revision beside the base's.

        Raises:
            RevisionError: no such revision.
            BaseError: the base is not where it was, or is another model now.
            EditError: the model's logits are not numbers.
        """
        commit = self._repository.resolve(revision)
        after = self._base if commit is None else self._measurer.measure(commit)
        groups, base = self._groups(after, RESAMPLES), self._groups(self._base, 1)
        values = {name: found.value for group in base for name, found in group.estimates.items()}
        self._progress.close()
        return Evaluation(commit, self.requests, self.suite, self.settings, groups, values)

    def keep(self, commit: str, done: Evaluation, *, author: str, time: str) -> Noted:
        """Write scores as the note of a commit for this suite.

        Scores that are not finite numbers are left out, since the format has none.
        """
        scores = {name: score.to_json() for name, score in done.scores.items() if math.isfinite(score.value)}
        note = Note(commit=commit, made_by=author, scores=scores, settings=self.settings, suite=self.suite)
        identity = self._repository.add_note(
            note, command="eval", arguments={"suite": self.suite}, author=author, time=time
        )
        return read_note(identity, note)

    def _groups(self, found: Measured, resamples: int) -> tuple[Scores, ...]:
        options = {"resamples": resamples, "seed": self._facts.seed or 0}
        forced = _FUNCTIONS[self._facts.metrics](found.facts, self._base.facts, **options)
        return (
            forced,
            live_scores(found.live, **options),
            fluency_scores(found.texts, **options),
            drift_scores(found.documents, **options),
        )

    def _settings(self, questions: Questions) -> dict[str, Any]:
        documents = self._measurer.documents
        return {
            "metrics": self._facts.metrics,
            "file": self._facts.file,
            "facts": len(self.requests),
            "items": object_id(requests_json(self.requests)),
            "seed": questions.seed,
            "resamples": RESAMPLES,
            "contexts": list(questions.contexts),
            "new_tokens": self._measurer.new_tokens,
            "fluency": {"facts": FLUENCY_FACTS, "tokens": FLUENCY_TOKENS, "top_k": FLUENCY_TOP_K},
            "text": {"id": Text(documents).id, "tokens": sum(map(len, documents))},
            **self._measurer.running,
            **self._measurer.asking,
            "version": VERSION,
        }


def evaluate(
    repository: Repository,
    revision: str,
    facts: Facts,
    progress: Progress,
    *,
    author: str,
    time: str,
    keep: bool = True,
    placement: Placement | None = None,
    dtype: torch.dtype | None = None,
    chat: bool | None = None,
) -> Evaluation:
    """Evaluate one revision; the scores of a commit are kept as its note unless told otherwise.

    Args:
        placement, dtype, chat: as in `Measurer`.

    Raises:
        SettingsError, RequestError, RevisionError, BaseError, EditError: as in `Evaluator`.
    """
    evaluator = Evaluator(repository, facts, progress, placement=placement, dtype=dtype, chat=chat)
    done = evaluator.evaluate(revision)
    if not keep or done.commit is None:
        return done
    noted = evaluator.keep(done.commit, done, author=author, time=time)
    return replace(done, note=noted.note)


def evaluate_history(
    repository: Repository,
    revision: str,
    facts: Facts,
    progress: Progress,
    *,
    author: str,
    time: str,
    placement: Placement | None = None,
    chat: bool | None = None,
) -> list[HistoryRow]:
    """Evaluate every commit below a revision that has no note of this suite yet; all of them, newest first.

    A commit whose model gives no numbers is warned about and left without scores.

    Args:
        placement, chat: as in `Measurer`.
    """
    evaluator = Evaluator(repository, facts, progress, placement=placement, chat=chat)
    start = repository.resolve(revision)
    rows = []
    for identity, commit in repository.log(start) if start else ():
        known = next((noted for noted in notes_of(repository, identity) if noted.suite == evaluator.suite), None)
        noted = known
        if known is None:
            try:
                noted = evaluator.keep(identity, evaluator.evaluate(identity), author=author, time=time)
            except EditError as error:
                progress.warn(f"commit {identity[:12]} is left out: {error.message}")
        rows.append(HistoryRow(identity, commit.time, commit.message, noted, known is None))
    return rows


def _bounds(low: float, high: float) -> tuple[float | None, float | None]:
    """An interval, or nothing where it is not finite."""
    return (low, high) if math.isfinite(low) and math.isfinite(high) else (None, None)
