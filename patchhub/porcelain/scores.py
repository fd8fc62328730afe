"""What every score means; and what was measured about commits, as notes and as their check has it, read back. No torch, no NumPy.

The full definitions, with sources and differences from other code, are in docs/evaluation.md."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from patchhub.objects import Note
from patchhub.results import Result, told
from patchhub.store.revisions import NOTES, SIGNATURES, TAG_MESSAGES
from patchhub.store.store import Store

SUITES: Final = ("counterfact", "zsre", "wise")
"""The teacher-forced suites; live decoding, fluency and drift stand beside each."""

DEFINITIONS: Final[Mapping[str, str]] = {
    "live_efficacy": "what the model writes begins with the new target; the word may go on",
    "live_paraphrase": "the same at other phrasings",
    "closure": "it begins with the new target and the word ends there",
    "judged": "a judge behind an address says that what it writes gives the new target",
    "leak": "share of other subjects' prompts that now say a new target and did not before",
    "perplexity_ratio": "perplexity over the base's, on text kept aside; 1 is no drift",
    "kl": "KL(base || now) per token of that text, nats; 0 is no drift",
    "S": "harmonic mean of efficacy, paraphrase and neighborhood (zsRE: specificity)",
    "ES": "efficacy: P(new) > P(true) at the prompt",
    "PS": "paraphrase: P(new) > P(true) at other phrasings",
    "NS": "neighborhood: P(true) > P(new) at other subjects' prompts",
    "EA": "every token of the new target is the argmax at the prompt",
    "PA": "every token of the new target is the argmax at other phrasings",
    "NA": "every token of the true answer is the argmax at other subjects' prompts",
    "EM": "magnitude: P(new) - P(true) at the prompt",
    "PM": "magnitude: P(new) - P(true) at other phrasings",
    "NM": "magnitude: P(true) - P(new) at other subjects' prompts",
    "efficacy": "share of the new target's tokens that are the argmax at the prompt",
    "paraphrase": "share of the new target's tokens that are the argmax at other phrasings",
    "specificity": "share of the true answer's tokens that are the argmax at unrelated prompts",
    "unchanged": "the argmax along the true answers at other prompts is the base's",
    "average": "arithmetic mean of reliability, generalisation and locality",
    "reliability": "every token of the new target is the argmax at the prompt",
    "generalisation": "every token of the new target is the argmax at other phrasings",
    "locality": "the argmax along the true answers at other prompts is the base's",
    "target_perplexity": "perplexity of the new target's tokens at the prompt, mean over facts; 1 is best",
    "exact": "what the model writes begins with the new target",
    "exact_in_context": "what it writes begins with the new target, with other text before the prompt",
    "contained": "the new target occurs in what the model writes",
    "contained_in_context": "the new target occurs in what it writes, with other text before the prompt",
    "stopped": "the answer, up to where it stops, is the new target and nothing else",
    "negation": "after '... is not' what it writes does not begin with the new target",
    "fluency": "entropy of words in sampled text, bits: (2/3 H2 + 4/3 H3) / 2; repetition lowers it",
}

GROUPS: Final[Mapping[str, str]] = {
    "counterfact": "CounterFact, teacher forced: the model reads the target's own tokens",
    "zsre": "zsRE, teacher forced: the model reads the target's own tokens",
    "wise": "WISE, teacher forced: the model reads the target's own tokens",
    "live": "Live: the model reads only what it wrote, greedily",
    "judge": "Judge: a model behind an address reads what was written",
    "fluency": "Fluency",
    "drift": "Drift",
}

FIGURES: Final = ("live_efficacy", "live_paraphrase", "closure", "judged", "leak", "perplexity_ratio", "kl")
"""What a person sees first of any suite, "judged" where a judge was asked; its teacher-forced summary follows."""

LEADING: Final[Mapping[str, tuple[str, ...]]] = {
    "counterfact": ("S", "ES", "PS", "NS"),
    "zsre": ("S", "efficacy", "paraphrase", "specificity"),
    "wise": ("average", "reliability", "generalisation", "locality"),
}
"""Per suite the scores that a line has room for; the summary first."""

BESIDE: Final = ("exact", "exact_in_context", "perplexity_ratio")
"""What is always said beside them."""

GENERALITY: Final[Mapping[str, str]] = {"counterfact": "PS", "zsre": "paraphrase", "wise": "generalisation"}
SPECIFICITY: Final[Mapping[str, str]] = {"counterfact": "NS", "zsre": "specificity", "wise": "locality"}


def headline(suite: str) -> tuple[str, ...]:
    """The scores that stand for a suite, the summary first; of an unknown suite only those that every suite has."""
    return (*LEADING.get(suite, ()), *BESIDE)


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
        if ref.startswith(NOTES) and not suite.startswith((SIGNATURES, TAG_MESSAGES)):
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


# --- the check of a commit ------------------------------------------------------------------------------------------

SHARES: Final = ("own", "earlier", "crushed")
"""The guard's counts of facts, each {"count", "of"}; see docs/guard.md."""

NORMS: Final = ("base", "change", "state")


def norms(check: Mapping[str, Any], kind: str) -> dict[str, float]:
    """Per weight the norm of its "state" or "change" over that of the base's weight, to four digits."""
    return {
        weight: float(f"{found[kind] / (found['base'] or 1.0):.4g}")
        for weight, found in _mappings(check.get("norms"))
        if _is_number(found.get(kind)) and _is_number(found.get("base"))
    }


def base_norms(check: Mapping[str, Any]) -> dict[str, float]:
    """The norm of the base's weight for each weight that was measured."""
    return {weight: found["base"] for weight, found in _mappings(check.get("norms")) if _is_number(found.get("base"))}


def measured_norms(check: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Per weight the norms "base", "change" and "state" as they were measured, of weights that have all three."""
    return {
        weight: {kind: float(found[kind]) for kind in NORMS}
        for weight, found in _mappings(check.get("norms"))
        if all(_is_number(found.get(kind)) for kind in NORMS)
    }


def numbers(check: Mapping[str, Any], name: str) -> list[float]:
    """The number of each weight under a name, such as "proof" or "survival"."""
    found = check.get(name)
    return [value for value in found.values() if _is_number(value)] if isinstance(found, Mapping) else []


def guard(check: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the guard measured: counts as [count, of], growth of the drift in nats per token, perplexity over the base's, the largest
    ratio of the state's largest singular value to the base weight's, what failed in words, and whether that was overruled."""
    found = check.get("guard")
    if not isinstance(found, Mapping):
        return None
    drift = dict(_mappings(found)).get("drift", {})
    growth = [drift.get("kl"), drift.get("kl_before", 0.0)]
    ratio = drift.get("perplexity_ratio")
    failed = found.get("failed")
    return {
        **{name: _share(found.get(name)) for name in SHARES},
        "drift": growth[0] - growth[1] if all(map(_is_number, growth)) else None,
        "perplexity_ratio": ratio if _is_number(ratio) else None,
        "stretch": max(_ratios(found.get("spectrum")), default=None),
        "failed": [str(words) for words in failed] if isinstance(failed, list) else [],
        "forced": check.get("forced") is True,
    }


def _ratios(spectrum: Any) -> Iterator[float]:
    for _, values in _mappings(spectrum):
        if _is_number(values.get("state")) and _is_number(values.get("base")):
            yield values["state"] / (values["base"] or 1.0)


def _share(value: Any) -> list[int] | None:
    if not isinstance(value, Mapping):
        return None
    parts = [part for part in (value.get("count"), value.get("of")) if type(part) is int]
    return parts if len(parts) == 2 and parts[1] else None


def _mappings(value: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The entries of a mapping that are mappings themselves."""
    for name, found in value.items() if isinstance(value, Mapping) else ():
        if isinstance(found, Mapping):
            yield name, found


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
