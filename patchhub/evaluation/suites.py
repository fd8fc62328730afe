"""What answers are worth: suites of scores over facts (CounterFact, zsRE, WISE), and texts that a model wrote by itself, judged.

Definitions and sources are in docs/evaluation.md. Means over records come with bootstrap intervals. Of a text: is the target said, does it
end there, and do other subjects say it now. Of many texts: what drift over documents amounts to, and fluency, which shows how varied the
words are, as in ROME's evaluation; repetition, the sign of a broken model, scores low.

A *sibling* of a fact is the same prompt about another subject, or a neighbourhood prompt of its record. It leaks where it now begins with
a new target that is not its own answer and that it did not begin with before the change.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest
from operator import attrgetter
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from patchhub.canonical import nfc
from patchhub.errors import SettingsError
from patchhub.evaluation.guard import Fault, Why
from patchhub.evaluation.metrics import BATCH_TOKENS, DocumentDrift, TargetScore, score_targets
from patchhub.objects import SLOT, Request
from patchhub.text.tokens import Chat, closes, joiner, stutters

_RESAMPLES_AT_ONCE = 64
_COVERAGE = 0.95
_LARGEST_EXPONENT = 700.0  # of exp in float64


@dataclass(frozen=True)
class Estimate:
    """A score, the bounds of its 95 % bootstrap interval, and the number of records that have it."""

    value: float
    low: float
    high: float
    records: int


@dataclass(frozen=True)
class Combined:
    """A score computed from the means of others, such as their harmonic mean."""

    parts: tuple[str, ...]
    of: Callable[[NDArray[np.float64]], NDArray[np.float64]]


def harmonic_mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The harmonic mean along the last axis: (..., n) to (...); 0 where any value is 0 or less."""
    smallest = np.maximum(values.min(-1, keepdims=True), 0)
    ratios = np.divide(smallest, values, out=np.zeros_like(values), where=smallest > 0)  # at most 1: no overflow
    total = ratios.sum(-1)
    mean = np.divide(values.shape[-1] * smallest[..., 0], total, out=np.zeros_like(total), where=total > 0)
    return np.asarray(mean)


def arithmetic_mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean along the last axis."""
    return np.asarray(values.mean(-1))


def mean_or_none(values: Sequence[float]) -> float | None:
    """The mean of one record's prompts, or None where the record has none."""
    return sum(values) / len(values) if values else None


def estimate(
    columns: Mapping[str, Sequence[float | None]],
    combined: Mapping[str, Combined],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Estimate]:
    """The mean of each column over the records that have a value, and the combined scores.

    The interval is the percentile bootstrap over records: all scores are computed on the same `resamples` samples of
    the records with replacement, drawn with `seed`; samples in which a score has no record do not count for it. A
    column without any value is left out, and so is a combined score that needs it.

    Args:
        columns: per score one value for each record, None where the record has none.
    """
    names, table = _table(columns)
    if not names:
        return {}
    whole = _means(table, np.ones((1, len(table))))[0]
    means = np.concatenate([_means(table, counts) for counts in _resamples(len(table), resamples, seed)])
    records = (~np.isnan(table)).sum(0)
    result = {
        name: _estimate(whole[column], means[:, column], int(records[column])) for column, name in enumerate(names)
    }
    for name, rule in combined.items():
        if set(names) >= set(rule.parts):
            columns_of = [names.index(part) for part in rule.parts]
            spread = rule.of(means[:, columns_of])
            result[name] = _estimate(rule.of(whole[columns_of]), spread, int(records[columns_of].min()))
    return result


def means(
    columns: Mapping[str, Sequence[float | None]], combined: Mapping[str, Combined], rows: Sequence[int]
) -> dict[str, float]:
    """The scores of some of the records, by their places, without intervals."""
    names, table = _table({name: [column[row] for row in rows] for name, column in columns.items()})
    if not names:
        return {}
    whole = _means(table, np.ones((1, len(table))))[0]
    found = {name: float(value) for name, value in zip(names, whole, strict=True)}
    for name, rule in combined.items():
        if found.keys() >= set(rule.parts):
            found[name] = float(rule.of(np.array([found[part] for part in rule.parts])))
    return found


def _table(columns: Mapping[str, Sequence[float | None]]) -> tuple[list[str], NDArray[np.float64]]:
    """The columns that have a value, by name, and as a table (records, columns) with NaN where there is none."""
    present = {name: column for name, column in columns.items() if any(value is not None for value in column)}
    rows = [[np.nan if value is None else value for value in column] for column in present.values()]
    return list(present), np.array(rows, dtype=np.float64).T


def _means(table: NDArray[np.float64], counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean of each column (records, columns) under each weighting of the records (samples, records)."""
    known = ~np.isnan(table)
    weights = counts @ known
    sums = counts @ np.where(known, table, 0.0)
    return np.divide(sums, weights, out=np.full_like(sums, np.nan), where=weights > 0)


def _resamples(records: int, resamples: int, seed: int) -> Iterator[NDArray[np.float64]]:
    """How often each record was drawn: blocks of (samples, records)."""
    generator = np.random.default_rng(seed)
    for start in range(0, resamples, _RESAMPLES_AT_ONCE):
        size = min(_RESAMPLES_AT_ONCE, resamples - start)
        yield generator.multinomial(records, np.full(records, 1 / records), size=size).astype(np.float64)


def _estimate(value: NDArray[np.float64] | float, spread: NDArray[np.float64], records: int) -> Estimate:
    tail = (1 - _COVERAGE) / 2
    low, high = np.nanquantile(spread, [tail, 1 - tail])
    return Estimate(float(value), float(low), float(high), records)


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


def openings_at(request: Request, opening: str) -> list[str]:
    """What the answer says before the target at each of a request's `counterfact_items`: at its own prompt and other phrasings the opening
    behind which the fact was written, at neighbours nothing."""
    targets = 2 if request.target_true is not None else 1
    own = targets * (1 + len(request.paraphrases))
    return [opening] * own + [""] * (len(counterfact_items(request)) - own)


def read_facts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Request],
    *,
    chat: Chat | None = None,
    openings: Mapping[str, str] | None = None,
    batch_tokens: int = BATCH_TOKENS,
) -> list[FactReading]:
    """Score every prompt of every request, in ``chat`` the neighbours' too; errors as in `score_targets`.

    Args:
        openings: in a chat, what the answers of facts say before their targets, by request id.
    """
    items = [item for request in requests for item in counterfact_items(request)]
    behind = openings or {}
    before = [opening for request in requests for opening in openings_at(request, behind.get(request.id, ""))]
    scores = score_targets(model, tokenizer, items, chat=chat, openings=before, batch_tokens=batch_tokens)
    return readings(requests, scores)


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
    """reliability, generalisation, locality and `average`, their arithmetic mean; and target_perplexity, which is no share.

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
    columns["target_perplexity"] = _column(after, "prompt", _perplexity)
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


def _perplexity(answers: Answers) -> float:
    """exp of the mean negative log-probability of the new target's tokens."""
    return math.exp(min(-answers.new.logprob / answers.new.n_tokens, _LARGEST_EXPONENT))


def _probability(score: TargetScore, compare: Compare) -> float:
    return math.exp(_level(score, compare))


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise SettingsError(f"{name} is '{value}'", remedy=f"use one of: {', '.join(choices)}")


_STOPS: Final = ".!?。！？"
_COPULAS: Final = ("is", "are", "was", "were")
_FILLED: Final = 3


def after_target(text: str, target: str, *, anywhere: bool = False) -> str | None:
    """What follows the target in a text that says it; None where it does not.

    Args:
        anywhere: the target may stand anywhere in the text, at the beginning of a word; otherwise the text begins with it, white space
            aside.
    """
    text, target = nfc(text), nfc(target).strip()
    if not target:
        return None
    if not anywhere:
        text = text.lstrip()
        return text[len(target) :] if text.startswith(target) else None
    start = text.find(target)
    while start >= 0 and _goes_on(text[:start], target):
        start = text.find(target, start + 1)
    return text[start + len(target) :] if start >= 0 else None


def said(text: str, target: str, *, anywhere: bool = False) -> bool:
    """Whether a text says the target, as `after_target` finds it; the word may go on."""
    return after_target(text, target, anywhere=anywhere) is not None


def closed(text: str, target: str, *, anywhere: bool = False) -> bool:
    """Whether a text says the target and the target reads as finished there.

    A name does not grow, a number does not go on, and it is not said again and again.
    """
    rest, target = after_target(text, target, anywhere=anywhere), nfc(target).strip()
    return rest is not None and closes(target, rest) and not stutters(target, rest)


def stopped(text: str, target: str) -> bool:
    """Whether a text, cut where it stops by itself (its end, a line's end, the end of a sentence), is the target and nothing else."""
    rest = after_target(text, target)
    if rest is None:
        return False
    return not rest.strip(" ") or rest.lstrip(" ")[0] == "\n" or (rest[0] in _STOPS and closes(target.strip(), rest))


def negated(prompt: str) -> str | None:
    """ "The capital of Kazakhstan is not": the prompt with its verb denied; None where it does not end in a form of *to be*."""
    return f"{prompt} not" if prompt.rpartition(" ")[2] in _COPULAS else None


@dataclass(frozen=True)
class Sibling:
    """A prompt about another subject, and its own answers: those of facts and records at this prompt, and of facts about that subject."""

    prompt: str
    own: frozenset[str]


def siblings_of(new: Sequence[Request], others: Iterable[Request] = (), *, most: int = 10) -> list[list[Sibling]]:
    """The siblings of each new fact. No prompt is a sibling of two facts, so a leak is counted once.

    In this order: other new facts with the same prompt, other facts with it, the record's neighbourhood prompts, and, where these are fewer
    than three, the prompt filled with subjects of facts that have other prompts, which may be of another kind.

    Args:
        others: active facts beside the new ones.
        most: siblings of one fact, beside the new facts that share its prompt.
    """
    others = list(others)
    facts = [*new, *others]
    own, about = _answers(facts), _answers_about(facts)
    alike: dict[str, list[Request]] = {}
    for fact in facts:
        alike.setdefault(fact.prompt, []).append(fact)
    subjects, told = list(dict.fromkeys(fact.subject for fact in facts)), {fact.text for fact in new}
    place, taken = {subject: number for number, subject in enumerate(subjects)}, set[str]()
    found = []
    for fact in new:
        shared = [fact.text] if any(other.subject != fact.subject for other in alike[fact.prompt]) else []
        filled = {fact.prompt.replace(SLOT, other): other for other in _after(subjects, place[fact.subject])}
        chosen = dict.fromkeys(prompt for prompt in shared if prompt not in taken)
        for asked, limit in ((_near(fact, alike[fact.prompt]), most + len(chosen)), (filled, min(_FILLED, most))):
            for prompt in asked:
                if len(chosen) >= limit:
                    break
                if prompt not in taken and prompt not in told:
                    chosen[prompt] = None
        taken.update(chosen)
        answers = (own.get(prompt, set()) | about.get(filled.get(prompt, ""), set()) for prompt in chosen)
        found.append([Sibling(prompt, frozenset(texts)) for prompt, texts in zip(chosen, answers, strict=True)])
    return found


def spread(siblings: Sequence[Sequence[Sibling]], most: int) -> list[Sibling]:
    """At most so many of them: the first of every fact, then the second of every fact, and so on."""
    rows = zip_longest(*siblings)
    return [sibling for sibling, _ in zip((one for row in rows for one in row if one), range(most), strict=False)]


def leaks(sibling: Sibling, now: str, before: str, targets: Collection[str], *, anywhere: bool = False) -> str | None:
    """The new target that a sibling says now, is not its own and was not said before; None where there is none.

    Args:
        now, before: what the model writes after the sibling's prompt, after and before the change.
        targets: of all new facts.
        anywhere: a target may stand anywhere in these texts, which are answers in a chat.
    """
    text = nfc(now)
    if not (any(map(text.__contains__, targets)) if anywhere else text.lstrip().startswith(tuple(targets))):
        return None

    def says(written: str, target: str) -> bool:
        return said(written, target, anywhere=anywhere)

    if any(says(now, answer) for answer in sibling.own):
        return None
    found = (
        target for target in targets if target not in sibling.own and says(now, target) and not says(before, target)
    )
    return max(found, key=len, default=None)


def fault_of(request: Request, text: str, *, anywhere: bool = False) -> Fault | None:
    """What is wrong with what a model writes after a fact's prompt, if anything is."""
    if closed(text, request.target_new, anywhere=anywhere):
        return None
    why: Why = "runs on" if said(text, request.target_new, anywhere=anywhere) else "not said"
    return Fault(why, request.id, request.text, request.target_new, text)


def _answers(facts: Iterable[Request]) -> dict[str, set[str]]:
    """What each prompt's own answers are."""
    own: dict[str, set[str]] = {}
    for fact in facts:
        own.setdefault(fact.text, set()).add(fact.target_new)
        for neighbor in fact.neighborhood:
            own.setdefault(neighbor.prompt, set()).add(neighbor.target)
    return own


def _answers_about(facts: Iterable[Request]) -> dict[str, set[str]]:
    """What facts say of each subject, whatever they are asked."""
    about: dict[str, set[str]] = {}
    for fact in facts:
        about.setdefault(fact.subject, set()).add(fact.target_new)
    return about


def _near(fact: Request, alike: Sequence[Request]) -> Iterator[str]:
    """The same prompt about others that have facts, and the record's neighbourhood prompts."""
    yield from (other.text for other in alike if other.subject != fact.subject)
    yield from (neighbor.prompt for neighbor in fact.neighborhood)


def _after(subjects: Sequence[str], place: int) -> Iterator[str]:
    """Some subjects beside the one at a place, those first that stand after it; more than are asked, since some may be told."""
    others = (subjects[(place + step) % len(subjects)] for step in range(1, len(subjects)))
    return islice(others, 4 * _FILLED)


def _goes_on(left: str, right: str) -> bool:
    """The last word of `left` goes on in `right`; in a script without spaces none does."""
    return left[-1:].isalnum() and right[:1].isalnum() and joiner(left, right) == " "


# --- drift and fluency ----------------------------------------------------------------------------------------------


def drift_scores(documents: Sequence[DocumentDrift], *, resamples: int = 1000, seed: int = 0) -> Scores:
    """perplexity_ratio and kl per token over all documents; the records of their intervals are the documents."""
    columns = {
        "growth": [document.growth for document in documents],
        "divergence": [document.divergence for document in documents],
        "positions": [float(document.positions) for document in documents],
    }
    combined = {
        "perplexity_ratio": Combined(("growth", "positions"), _exp_of_ratio),
        "kl": Combined(("divergence", "positions"), _ratio),
    }
    scores = scored("drift", {}, columns, combined, resamples=resamples, seed=seed)
    shown = {name: found for name, found in scores.estimates.items() if name in combined}
    return Scores(scores.suite, scores.settings, shown, {}, {})


def _ratio(means: NDArray[np.float64]) -> NDArray[np.float64]:
    """(..., 2) to (...)."""
    return np.asarray(means[..., 0] / means[..., 1])


def _exp_of_ratio(means: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(np.exp(_ratio(means)))


WEIGHTS: Final[Mapping[int, float]] = {2: 2 / 3, 3: 4 / 3}
"""The weight of each n-gram length; their mean is 1."""

_WORD = re.compile(r"\w+|[^\w\s]")


def words(text: str) -> list[str]:
    """Runs of letters and digits, and every other visible character by itself."""
    return _WORD.findall(text)


def entropy(items: Sequence[str], n: int) -> float:
    """The entropy in bits of the n-grams of `items`, H = -sum_g p(g) log2 p(g); 0 where there is no n-gram."""
    counts = Counter(tuple(items[start : start + n]) for start in range(len(items) - n + 1))
    total = counts.total()
    return -sum(count / total * math.log2(count / total) for count in counts.values()) + 0.0


def fluency(text: str) -> float:
    """The mean of 2/3 H(bigrams) and 4/3 H(trigrams) of a text, in bits."""
    found = words(text)
    return sum(weight * entropy(found, n) for n, weight in WEIGHTS.items()) / len(WEIGHTS)


def fluency_scores(texts: Sequence[str | None], *, resamples: int = 1000, seed: int = 0) -> Scores:
    """fluency, the mean over texts; None stands for a record that has no text."""
    column = [None if text is None else fluency(text) for text in texts]
    return scored("fluency", {}, {"fluency": column}, {}, resamples=resamples, seed=seed)
