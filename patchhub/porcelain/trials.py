"""Settings tried on a few facts, one after another, without committing anything; what `tune` compares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import harmonic_mean

import torch
from jaxtyping import Float
from torch import Tensor

from patchhub.editing.editors import EDITORS
from patchhub.editing.facts import encode_facts
from patchhub.editing.key_rows import key_rows
from patchhub.editing.lengths import context_length
from patchhub.editing.record import State, record, side_paths
from patchhub.editing.settings import EditSettings
from patchhub.editing.tuning import Standing
from patchhub.editing.values import optimise_values
from patchhub.errors import EditError
from patchhub.evaluation.metrics import score_targets
from patchhub.evaluation.suites import Answers, FactReading, counterfact_items, readings
from patchhub.objects import Request
from patchhub.porcelain.opened import Opened
from patchhub.porcelain.recording import Recorder


@dataclass(frozen=True)
class Marks:
    """How one setting does, each between 0 and 1; None where the facts bring no such prompts.

    Each is the mean of two shares: of prompts where the wanted answer is more probable than the other one, where another is known, and of
    prompts where it is the model's answer. At neighbours the wanted answer is the one of before.

    Attributes:
        efficacy, paraphrase, neighborhood: at the facts' own prompts, their paraphrases, and prompts about other subjects.
    """

    efficacy: float
    paraphrase: float | None
    neighborhood: float | None

    @property
    def score(self) -> float:
        """The harmonic mean of what there is."""
        parts = [self.efficacy, self.paraphrase, self.neighborhood]
        return harmonic_mean([part for part in parts if part is not None])


@dataclass(frozen=True)
class Trial:
    """One setting that was tried, on how many facts, and how it did there; no marks where the edit itself failed."""

    layers: tuple[int, ...]
    learning_rate: float
    ridge: float
    facts: int
    marks: Marks | None

    @property
    def score(self) -> float:
        return self.marks.score if self.marks else 0.0


class Trials:
    """Settings scored on the same model and facts; z and what the base says are kept between trials."""

    def __init__(
        self,
        opened: Opened,
        recorder: Recorder,
        method: str,
        requests: Sequence[Request],
        held_back: Sequence[Request],
    ) -> None:
        self._opened, self._recorder, self._editor = opened, recorder, EDITORS[method]
        self._requests, self._held_back = requests, held_back
        self._before = self._answers()
        self._values: dict[tuple[int, float], Float[Tensor, "n d"]] = {}
        self._marks: dict[tuple[EditSettings, int], Marks | None] = {}

    def score(self, settings: EditSettings, facts: int) -> float:
        """The score of settings on the first ``facts`` facts; 0 where the edit fails."""
        try:
            marks = self._tried(settings, facts)
        except EditError:
            marks = None
        self._marks[settings, facts] = marks
        return marks.score if marks else 0.0

    def trial(self, standing: Standing[EditSettings]) -> Trial:
        settings, facts = standing.candidate, standing.facts
        marks = self._marks[settings, facts]
        return Trial(settings.layers, settings.learning_rate, settings.ridge, facts, marks)

    def _tried(self, settings: EditSettings, facts: int) -> Marks:
        opened, requests = self._opened, self._requests[:facts]
        limit = context_length(opened.model)
        encoded = encode_facts(opened.tokenizer, requests, self._recorder.contexts, chat=opened.chat, limit=limit)
        recording = record(
            opened.stack,
            settings.layers,
            key_rows([fact.rows for fact in encoded]),
            self._targets(settings, facts),
            settings.ridge,
            self._recorder.cache,
            State({}, {}),
            self._editor.spread,
        )
        changes = {layer: [recording.change[opened.architecture.ffn_weight(layer)]] for layer in settings.layers}
        items = [item for request in requests for item in counterfact_items(request)]
        with side_paths(opened.stack, changes):
            scores = score_targets(opened.model, opened.tokenizer, items, chat=opened.chat)
            return _marks(readings(requests, scores), self._before, self._answers())

    def _targets(self, settings: EditSettings, facts: int) -> Float[Tensor, "n d"]:
        """z of the first facts; only those that were not optimised for this layer and step size before are now."""
        key = settings.layers[-1], settings.learning_rate
        known = self._values.get(key)
        start = 0 if known is None else len(known)
        if start < facts:
            new = self._requests[start:facts]
            found = optimise_values(
                self._editor.site(self._opened.stack, key[0]),
                encode_facts(self._opened.tokenizer, new, self._recorder.contexts, chat=self._opened.chat),
                settings.values(until_sure=self._editor.until_sure),
            ).targets
            self._values[key] = known = found if known is None else torch.cat([known, found])
        assert known is not None
        return known[:facts]

    def _answers(self) -> list[int]:
        """The model's next token at the prompt of each fact that is held back."""
        asked = [(request.text, request.target_new) for request in self._held_back]
        scores = score_targets(self._opened.model, self._opened.tokenizer, asked, chat=self._opened.chat)
        return [score.argmax[0] for score in scores]


def _marks(read: Sequence[FactReading], before: Sequence[int], after: Sequence[int]) -> Marks:
    prompts = [answers for reading in read for answers in reading.prompt]
    paraphrases = [answers for reading in read for answers in reading.paraphrases]
    neighbors = [answers for reading in read for answers in reading.neighborhood]
    kept = [float(now == then) for then, now in zip(before, after, strict=True)]
    kept += [_wins(answers, new=False) for answers in neighbors]
    return Marks(
        efficacy=_mean([_wins(answers, new=True) for answers in prompts]) or 0.0,
        paraphrase=_mean([_wins(answers, new=True) for answers in paraphrases]),
        neighborhood=_mean(kept),
    )


def _wins(answers: Answers, *, new: bool) -> float:
    """Half for being more probable than the other answer, half for being the model's answer; all for that where there is no other."""
    wanted, other = (answers.new, answers.true) if new else (answers.true, answers.new)
    if wanted is None:
        return 0.0
    right = float(wanted.argmax_right)
    return right if other is None else (right + float(wanted.logprob > other.logprob)) / 2


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
