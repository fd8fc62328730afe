"""`tune`: try layers, step sizes and lambda on a few facts, and write the best into the config.

Which settings to try, and how the best of many is found on few facts, is pure; a trial edits a model in memory and commits nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import harmonic_mean
from time import perf_counter
from typing import Any, ClassVar, Final, Generic, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from patchhub.editing.editor import EDITORS, encode_facts
from patchhub.editing.record import State, record, side_paths
from patchhub.editing.rows import key_rows
from patchhub.editing.settings import EditSettings
from patchhub.editing.values import optimise_values
from patchhub.errors import EditError, RequestError, SettingsError
from patchhub.evaluation.metrics import score_targets
from patchhub.evaluation.suites import Answers, FactReading, counterfact_items, readings
from patchhub.models.architectures import additive_probe
from patchhub.objects import Request
from patchhub.progress import Progress
from patchhub.results import Result
from patchhub.store.store import Store
from patchhub.text.tokens import context_length
from patchhub.worktree.metric import Recorder, open_recorder
from patchhub.worktree.opening import BaseFiles, Worktree, base_files, open_worktree
from patchhub.worktree.recording import chosen_settings

Candidate = TypeVar("Candidate")

STEP_SIZES: Final = (0.5, 1.0, 2.0)
"""Multiples of the learning rate that are tried."""
RIDGES: Final = (0.25, 1.0, 4.0)
"""Multiples of lambda that are tried."""


@dataclass(frozen=True)
class Standing(Generic[Candidate]):
    """A candidate, the most facts that it was scored on, and its score there."""

    candidate: Candidate
    facts: int
    score: float


def candidates(present: EditSettings, depth: int) -> list[EditSettings]:
    """The present settings first, then every band of layers with every multiple of step size and lambda."""
    found = [
        replace(present, layers=band, learning_rate=step * present.learning_rate, ridge=ridge * present.ridge)
        for band in bands(present.layers, depth)
        for step in STEP_SIZES
        for ridge in RIDGES
    ]
    return [present, *(settings for settings in found if settings != present)]


def bands(present: Sequence[int], depth: int) -> list[tuple[int, ...]]:
    """Bands of layers to try: the present one, moved by about an eighth of the depth, and narrower and wider ones.

    All leave at least one block above them; none is listed twice.
    """
    first, last = present[0], present[-1]
    step, width = max(1, round(depth / 8)), last - first + 1
    ends = [
        (first, last),
        *((first + shift, last + shift) for shift in (-step, step, 2 * step)),
        (last - width // 2, last),
        (last, last),
        (first, last + step),
    ]
    highest = max(depth - 2, 0)
    inside = {(max(a, 0), min(b, highest)): None for a, b in ends if b >= 0 and a <= highest}
    return [tuple(present), *(band for a, b in inside if (band := tuple(range(a, b + 1))) != tuple(present))]


def sizes(facts: int) -> tuple[int, ...]:
    """How many facts each round scores on: a quarter, half, and all of them, but never fewer than four where there are four."""
    return tuple(sorted({min(facts, max(4, math.ceil(facts / part))) for part in (4, 2, 1)}))


def successive_halving(
    tried: Sequence[Candidate],
    score: Callable[[Candidate, int], float],
    rounds: Sequence[int],
    *,
    kept: float = 0.25,
    least: int = 3,
) -> list[Standing[Candidate]]:
    """Score all candidates on few facts and the better ones on more (Jamieson and Talwalkar, 2016); the best first.

    The first candidate goes through every round whatever it scores, so that the winner is compared with it on all facts. Ties go to the
    earlier candidate.

    Args:
        score: of a candidate on the first so many facts.
        rounds: how many facts each round scores on, ascending.
        kept: share of the candidates that a round passes on.
        least: but so many at least.
    """
    standing: dict[int, Standing[Candidate]] = {}
    going = list(range(len(tried)))
    for number, facts in enumerate(rounds):
        for index in going:
            standing[index] = Standing(tried[index], facts, score(tried[index], facts))
        if number < len(rounds) - 1:
            best = sorted(going, key=lambda index: (-standing[index].score, index))
            going = sorted({0, *best[: max(least, math.ceil(kept * len(going)))]})
    order = sorted(standing, key=lambda index: (-standing[index].facts, -standing[index].score, index))
    return [standing[index] for index in order]


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
class Trial(Result):
    """One setting that was tried, on how many facts, and how it did there; no marks where the edit itself failed."""

    TOLD: ClassVar = {"score": "score"}

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
        tree: Worktree,
        recorder: Recorder,
        method: str,
        requests: Sequence[Request],
        held_back: Sequence[Request],
    ) -> None:
        self._opened, self._recorder, self._editor = tree, recorder, EDITORS[method]
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
        tree, requests = self._opened, self._requests[:facts]
        limit = context_length(tree.model)
        encoded = encode_facts(tree.tokenizer, requests, self._recorder.contexts, chat=tree.chat, limit=limit)
        recording = record(
            tree.stack,
            settings.layers,
            key_rows([fact.rows for fact in encoded]),
            self._targets(settings, facts),
            settings.ridge,
            self._recorder.cache,
            State({}, {}),
            self._editor.way(tree.stack.architecture).spread,
        )
        changes = {layer: [recording.change[tree.architecture.ffn_weight(layer)]] for layer in settings.layers}
        items = [item for request in requests for item in counterfact_items(request)]
        with side_paths(tree.stack, changes):
            scores = score_targets(tree.model, tree.tokenizer, items, chat=tree.chat)
            return _marks(readings(requests, scores), self._before, self._answers())

    def _targets(self, settings: EditSettings, facts: int) -> Float[Tensor, "n d"]:
        """z of the first facts; only those that were not optimised for this layer and step size before are now."""
        stack = self._opened.stack
        way = self._editor.way(stack.architecture)
        key = way.layer(settings.layers), settings.learning_rate
        known = self._values.get(key)
        start = 0 if known is None else len(known)
        if start < facts:
            new = self._requests[start:facts]
            found = optimise_values(
                way.site(stack, settings.layers),
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


FACTS: Final = 24
"""How many facts are tried at most."""
TUNED: Final = ("layers", "learning_rate", "ridge")

_HELD_BACK: Final = 3  # of so many facts one is held back as a neighbour, where the facts bring none


@dataclass(frozen=True)
class Tuned(Result):
    """What `tune` found.

    Attributes:
        method: the editor.
        trials: all settings that were tried, those on all facts first and the best of them at the head.
        present: the place in ``trials`` of the settings as they are.
        written: the config's keys that were set; empty where nothing is better, or in a dry run.
        facts, held_back: how many facts were written in each trial of the last round, and how many served as neighbours.
        seconds: wall time.
    """

    method: str
    trials: tuple[Trial, ...]
    present: int
    written: Mapping[str, Any]
    facts: int
    held_back: int
    seconds: float


def tune(
    repository: Store,
    requests: Sequence[Request],
    progress: Progress,
    *,
    method: str = "memit",
    limit: int = FACTS,
    dry_run: bool = False,
    text: Sequence[Path] = (),
) -> Tuned:
    """Find the layers, step size and lambda that write some facts best, by successive halving, on the unpatched base.

    Values are optimised once for each last layer and step size and used for every band and lambda; nothing is committed. Where
    the facts bring no neighbourhood prompts, a third of them is held back and must keep the base's answers.

    Args:
        requests: facts with, if possible, paraphrases and neighbourhood prompts.
        limit: use at most so many, from the first on.
        dry_run: leave the config as it is.
        text: as in `commit`.

    Raises:
        SettingsError: there is no such editor.
        RequestError: there are no facts.
    """
    if method not in EDITORS:
        raise SettingsError(f"tune does not know the editor {method!r}", remedy=f"Use {' or '.join(EDITORS)}.")
    if not requests:
        raise RequestError("there are no facts to try settings on", remedy="Give a file of facts.")
    begun = perf_counter()
    files = base_files(repository)
    architecture = files.architecture
    present = chosen_settings(repository, method, architecture, {})
    tried = candidates(present, architecture.n_layers)
    layers = sorted({layer for settings in tried for layer in settings.layers})
    tree = _open(repository, files, layers, progress)
    recorder = open_recorder(repository, tree.stack, tree.tokenizer, layers, text, progress)
    written, held_back = _split(requests[:limit])
    trials = Trials(tree, recorder, method, written, held_back)
    standings = successive_halving(tried, _counted(trials.score, progress, len(tried)), sizes(len(written)))
    found = tuple(trials.trial(standing) for standing in standings)
    place = next(i for i, standing in enumerate(standings) if standing.candidate is present)
    chosen: dict[str, Any] = {}
    if not dry_run and place > 0 and found[0].score > found[place].score:
        chosen = _write(repository, method, standings[0].candidate, present)
    progress.close()
    return Tuned(method, found, place, chosen, len(written), len(held_back), perf_counter() - begun)


def _open(repository: Store, files: BaseFiles, layers: Sequence[int], progress: Progress) -> Worktree:
    """The unpatched base, with the layers that will be tried checked."""
    weights = [files.architecture.ffn_weight(layer) for layer in layers]
    tree = open_worktree(repository, progress, base=files, edits=weights)
    for layer in layers:
        additive_probe(tree.model, files.architecture, layer)
    return tree


def _split(requests: Sequence[Request]) -> tuple[list[Request], list[Request]]:
    """The facts to write, and those that are held back as neighbours because none bring any."""
    if any(request.neighborhood for request in requests) or len(requests) < _HELD_BACK:
        return list(requests), []
    held_back = [request for place, request in enumerate(requests, 1) if place % _HELD_BACK == 0]
    return [request for request in requests if request not in held_back], held_back


def _counted(
    score: Callable[[EditSettings, int], float], progress: Progress, count: int
) -> Callable[[EditSettings, int], float]:
    """The score, with a stage of the progress for every round."""
    round_of = 0

    def counting(settings: EditSettings, facts: int) -> float:
        nonlocal round_of
        if facts != round_of:
            progress.stage(f"settings on {facts} fact{'' if facts == 1 else 's'}", count if not round_of else 0)
            round_of = facts
        result = score(settings, facts)
        progress.advance(1)
        return result

    return counting


def _write(repository: Store, method: str, best: EditSettings, present: EditSettings) -> dict[str, Any]:
    """Set what differs from the present settings in the config."""
    values = {name: value for name in TUNED if (value := getattr(best, name)) != getattr(present, name)}
    keys = {f"{method}.{name}": list(value) if name == "layers" else value for name, value in values.items()}
    repository.change_config(lambda config: replace(config, settings={**config.settings, **keys}))
    return keys
