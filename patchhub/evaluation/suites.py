"""Suites of scores over facts: CounterFact, zsRE, WISE. Definitions and sources are in docs/evaluation.md.

A model is read once (`read_facts`); every suite is a pure function of such readings, before and after an edit. Scores
are means over a record's prompts, then over the records that have such prompts; most are shares between 0 and 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from patchhub.editing.chat import Chat
from patchhub.errors import SettingsError
from patchhub.evaluation.estimates import (
    Combined,
    Estimate,
    arithmetic_mean,
    estimate,
    harmonic_mean,
    mean_or_none,
    means,
)
from patchhub.evaluation.metrics import BATCH_TOKENS, TargetScore, score_targets
from patchhub.objects import Request

Compare = Literal["total", "per token"]
Match = Literal["every token", "share of tokens"]
Column = list[float | None]


@dataclass(frozen=True)
class Answers:
    """One prompt: the scores of the request's new target and of the answer that was or stays true, if one is known."""

    new: TargetScore
    true: TargetScore | None


Measure = Callable[[Answers], float | None]


@dataclass(frozen=True)
class FactReading:
    """What a model says at every prompt of one request; `prompt` holds the one prompt that was edited."""

    request_id: str
    prompt: tuple[Answers, ...]
    paraphrases: tuple[Answers, ...]
    neighborhood: tuple[Answers, ...]


@dataclass(frozen=True)
class Scores:
    """The scores of one suite by name.

    Attributes:
        settings: what they depend on.
        estimates: over all records.
        columns: the records' own values, in the records' order; None where a record has none.
        combined: the scores that are computed from the means of columns.
    """

    suite: str
    settings: Mapping[str, Any]
    estimates: Mapping[str, Estimate]
    columns: Mapping[str, Sequence[float | None]]
    combined: Mapping[str, Combined]

    def of(self, rows: Sequence[int]) -> dict[str, float]:
        """The scores over some of the records, by their places."""
        return means(self.columns, self.combined, rows)


def scored(
    suite: str,
    settings: Mapping[str, Any],
    columns: Mapping[str, Sequence[float | None]],
    combined: Mapping[str, Combined],
    *,
    resamples: int,
    seed: int,
) -> Scores:
    """Means and intervals of columns that hold one value per record."""
    estimates = estimate(columns, combined, resamples=resamples, seed=seed)
    return Scores(suite, {**settings, "resamples": resamples, "seed": seed}, estimates, columns, combined)


def relations(requests: Sequence[Request]) -> dict[str, list[int]]:
    """The places of the requests of each prompt template, the most frequent template first."""
    places: dict[str, list[int]] = {}
    for place, request in enumerate(requests):
        places.setdefault(request.prompt, []).append(place)
    return dict(sorted(places.items(), key=lambda item: -len(item[1])))


def counterfact_items(request: Request) -> list[tuple[str, str]]:
    """The (prompt, target) pairs of a request, in the order in which `read_facts` takes their scores."""
    prompts = [(request.text, request.target_true), *((text, request.target_true) for text in request.paraphrases)]
    prompts += [(neighbor.prompt, neighbor.target) for neighbor in request.neighborhood]
    pairs = (((prompt, request.target_new), (prompt, true)) for prompt, true in prompts)
    return [(prompt, target) for pair in pairs for prompt, target in pair if target is not None]


def read_facts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Request],
    *,
    chat: Chat | None = None,
    batch_tokens: int = BATCH_TOKENS,
) -> list[FactReading]:
    """Score every prompt of every request, in ``chat`` the neighbours' too; errors as in `score_targets`."""
    items = [item for request in requests for item in counterfact_items(request)]
    return readings(requests, score_targets(model, tokenizer, items, chat=chat, batch_tokens=batch_tokens))


def readings(requests: Sequence[Request], scores: Iterable[TargetScore]) -> list[FactReading]:
    """Readings from the scores of all requests' `counterfact_items`, in their order."""
    remaining = iter(scores)
    return [_reading(request, remaining) for request in requests]


def counterfact_scores(
    after: Sequence[FactReading],
    before: Sequence[FactReading] | None = None,
    *,
    compare: Compare = "total",
    resamples: int = 1000,
    seed: int = 0,
) -> Scores:
    """ES, PS, NS and S; EA, PA, NA; EM, PM, NM; and, where `before` is given, `unchanged`.

    Args:
        compare: probabilities of whole targets, or geometric means over their tokens as in MEMIT's code.

    Raises:
        SettingsError: `before` is of other requests, or an unknown `compare`.
    """
    _check_choice("compare", compare, ("total", "per token"))

    def margin(answers: Answers) -> float | None:
        """P(new) - P(true)."""
        if answers.true is None:
            return None
        return _probability(answers.new, compare) - _probability(answers.true, compare)

    def new_wins(answers: Answers) -> float | None:
        return None if answers.true is None else float(_level(answers.new, compare) > _level(answers.true, compare))

    def true_wins(answers: Answers) -> float | None:
        return None if answers.true is None else float(_level(answers.true, compare) > _level(answers.new, compare))

    def kept_margin(answers: Answers) -> float | None:
        return None if (difference := margin(answers)) is None else -difference

    new_right, true_right = _new_is_argmax("every token"), _true_is_argmax("every token")
    table: dict[str, tuple[str, Measure]] = {
        "ES": ("prompt", new_wins),
        "PS": ("paraphrases", new_wins),
        "NS": ("neighborhood", true_wins),
        "EA": ("prompt", new_right),
        "PA": ("paraphrases", new_right),
        "NA": ("neighborhood", true_right),
        "EM": ("prompt", margin),
        "PM": ("paraphrases", margin),
        "NM": ("neighborhood", kept_margin),
    }
    columns = {name: _column(after, prompts, measure) for name, (prompts, measure) in table.items()}
    if before is not None:
        columns["unchanged"] = _unchanged(after, before, "every token")
    combined = {"S": Combined(("ES", "PS", "NS"), harmonic_mean)}
    return scored("counterfact", {"compare": compare}, columns, combined, resamples=resamples, seed=seed)


def zsre_scores(
    after: Sequence[FactReading],
    before: Sequence[FactReading] | None = None,
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> Scores:
    """efficacy, paraphrase, specificity (shares of target tokens), S; and, where `before` is given, `unchanged`.

    Raises:
        SettingsError: `before` is of other requests.
    """
    columns = {
        "efficacy": _column(after, "prompt", _new_is_argmax("share of tokens")),
        "paraphrase": _column(after, "paraphrases", _new_is_argmax("share of tokens")),
        "specificity": _column(after, "neighborhood", _true_is_argmax("share of tokens")),
    }
    combined = {"S": Combined(tuple(columns), harmonic_mean)}
    if before is not None:
        columns["unchanged"] = _unchanged(after, before, "share of tokens")
    return scored("zsre", {}, columns, combined, resamples=resamples, seed=seed)


def wise_scores(
    after: Sequence[FactReading],
    before: Sequence[FactReading],
    *,
    match: Match = "every token",
    resamples: int = 1000,
    seed: int = 0,
) -> Scores:
    """reliability, generalisation, locality and `average`, their arithmetic mean.

    Args:
        match: a prompt counts as right when every token is (the paper's formulas), or by its share of right tokens
            (EasyEdit's code).

    Raises:
        SettingsError: `before` is of other requests, or an unknown `match`.
    """
    _check_choice("match", match, ("every token", "share of tokens"))
    columns = {
        "reliability": _column(after, "prompt", _new_is_argmax(match)),
        "generalisation": _column(after, "paraphrases", _new_is_argmax(match)),
        "locality": _unchanged(after, before, match),
    }
    combined = {"average": Combined(tuple(columns), arithmetic_mean)}
    return scored("wise", {"match": match}, columns, combined, resamples=resamples, seed=seed)


def _reading(request: Request, scores: Iterator[TargetScore]) -> FactReading:
    """Take the scores of `request` off the front of `scores`, in the order of `counterfact_items`."""

    def answers(true: str | None) -> Answers:
        return Answers(next(scores), next(scores) if true is not None else None)

    return FactReading(
        request_id=request.id,
        prompt=(answers(request.target_true),),
        paraphrases=tuple(answers(request.target_true) for _ in request.paraphrases),
        neighborhood=tuple(answers(neighbor.target) for neighbor in request.neighborhood),
    )


def _column(facts: Sequence[FactReading], prompts: str, measure: Measure) -> Column:
    """Per fact, the mean of `measure` over those of its prompts that have it."""
    prompts_of: Callable[[FactReading], tuple[Answers, ...]] = attrgetter(prompts)
    return [mean_or_none([value for value in map(measure, prompts_of(fact)) if value is not None]) for fact in facts]


def _unchanged(after: Sequence[FactReading], before: Sequence[FactReading], match: Match) -> Column:
    """Per fact, how far argmax along the neighbours' true answers is what it was before the edit."""
    if [fact.request_id for fact in after] != [fact.request_id for fact in before]:
        raise SettingsError(
            "the readings before and after are not of the same requests",
            remedy="read both models with the same list of requests",
        )
    return [
        mean_or_none(
            [
                _agreement(new.true.argmax, old.true.argmax, match)
                for new, old in zip(fact.neighborhood, earlier.neighborhood, strict=True)
                if new.true is not None and old.true is not None
            ]
        )
        for fact, earlier in zip(after, before, strict=True)
    ]


def _new_is_argmax(match: Match) -> Measure:
    return lambda answers: _agreement(answers.new.argmax, answers.new.tokens, match)


def _true_is_argmax(match: Match) -> Measure:
    return lambda answers: None if answers.true is None else _agreement(answers.true.argmax, answers.true.tokens, match)


def _agreement(tokens: Sequence[int], others: Sequence[int], match: Match) -> float:
    """1 or 0 for every token, or the share of equal tokens."""
    equal = [one == other for one, other in zip(tokens, others, strict=True)]
    return float(all(equal)) if match == "every token" else sum(equal) / len(equal)


def _level(score: TargetScore, compare: Compare) -> float:
    return score.logprob if compare == "total" else score.logprob / score.n_tokens


def _probability(score: TargetScore, compare: Compare) -> float:
    return math.exp(_level(score, compare))


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise SettingsError(f"{name} is '{value}'", remedy=f"use one of: {', '.join(choices)}")
