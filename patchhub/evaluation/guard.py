"""The guard's judgement: what was measured of a finished change against limits. Numbers in, sentences out; no model, no NumPy.

A share of facts fails only where chance is no excuse: where the end of its 95 % interval that is kinder to the change is still on the
wrong side of the limit (Wilson 1927, "Probable inference, the law of succession, and statistical inference")."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from math import isfinite, pow, sqrt
from typing import Any, Final, Literal

from patchhub.settings import INDEX, NOT_NEGATIVE, POSITIVE, setting

Why = Literal["not said", "runs on", "leak"]


@dataclass(frozen=True)
class Fault:
    """What does not read right.

    Attributes:
        why: the target is not said, it runs on (its last word or number goes on, or it is said again and again), or another subject's
            prompt says it now.
        request: the fact; None of a sibling that is no fact.
        prompt: what was asked.
        target: what a fact was to say, or what a sibling now says.
        continuation: what the model wrote.
    """

    why: Why
    request: str | None
    prompt: str
    target: str
    continuation: str

    def to_json(self) -> dict[str, Any]:
        return {
            "why": self.why,
            "request": self.request,
            "prompt": self.prompt,
            "target": self.target,
            "continuation": self.continuation,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Fault:
        whys: dict[str, Why] = {"not said": "not said", "runs on": "runs on", "leak": "leak"}
        request = value["request"]
        texts = (str(value[name]) for name in ("prompt", "target", "continuation"))
        return cls(whys[value["why"]], None if request is None else str(request), *texts)


_Z: Final = 1.96  # of the standard normal distribution, for 95 %
_GUESSING: Final = 0.75  # trained models lie below 0.5, random ones above 0.85

Check = Literal["own", "fewest", "closed", "leak", "all", "earlier", "misfit", "drift", "total", "spectrum", "survival"]


@dataclass(frozen=True)
class Limits:
    """What a healthy change stays within; each is a setting of its name under ``guard.`` (docs/guard.md)."""

    own: float = setting(
        NOT_NEGATIVE, "least share of the new facts that the model must answer with (0.15)", default=0.15
    )
    fewest: int = setting(INDEX, "so many new facts must hold, or all where there are fewer (1)", default=1)
    closed: float = setting(
        NOT_NEGATIVE,
        "least share of the new facts that the model must say by itself with a word's end after them (0.05)",
        default=0.05,
    )
    leak: float = setting(
        NOT_NEGATIVE, "largest share of other subjects' prompts that may now say a new target (0.3)", default=0.3
    )
    earlier: float = setting(
        NOT_NEGATIVE, "largest share of the earlier facts that a change may lose (0.5)", default=0.5
    )
    misfit: float = setting(
        NOT_NEGATIVE,
        "largest share of new and contradicted facts that may get less than half of their change (0.7)",
        default=0.7,
    )
    drift: float = setting(
        POSITIVE,
        "most that new facts may add to the drift on held text, nats per token (0.6); few facts less, over 100 more",
        default=0.6,
    )
    total: float = setting(
        POSITIVE, "most that the drift may be in all after a change that adds to it, nats per token (2.5)", default=2.5
    )
    spectrum: float = setting(
        POSITIVE, "largest singular value of a weight's change, relative to the base weight's (50)", default=50.0
    )
    survival: float = setting(
        NOT_NEGATIVE, "least share of a change that rounding to the base's type must keep (0.1)", default=0.1
    )

    def drift_limit(self, facts: int) -> float:
        """What so many new facts may add to the drift: 0.15 of `drift` and a fortieth for each fact up to the whole, and as much
        again for every hundred beyond the first, as batches of a hundred might."""
        return self.drift * max(min(1.0, 0.15 + facts / 40), facts / 100)


@dataclass(frozen=True)
class Share:
    """So many of so many facts."""

    count: int
    of: int

    @property
    def lowest(self) -> float:
        """The lower end of Wilson's 95 % interval; 0 of nothing."""
        return self._end(-1.0)

    @property
    def highest(self) -> float:
        """The upper end; 1 of nothing."""
        return self._end(1.0)

    def _end(self, sign: float) -> float:
        if not self.of:
            return 1.0 if sign > 0 else 0.0
        p, n, z2 = self.count / self.of, self.of, _Z**2
        return (p + z2 / (2 * n) + sign * _Z * sqrt(p * (1 - p) / n + z2 / (4 * n * n))) / (1 + z2 / n)


@dataclass(frozen=True)
class Drifted:
    """Drift on held text before and after the change, both against the base (`evaluation.metrics`).

    Attributes:
        kl_before, kl: KL(p_base || p) in nats per token.
        perplexity_ratio: perplexity after the change over the base's.
        positions: tokens that were predicted.
        guessing: the base itself predicts the text hardly better than chance, as random weights do.
    """

    kl_before: float
    kl: float
    perplexity_ratio: float
    positions: int
    guessing: bool = False


def is_guessing(perplexity: float, vocabulary: int) -> bool:
    """Whether a model with that perplexity on running text has learned next to nothing: log perplexity is near the vocabulary's."""
    return perplexity > pow(vocabulary, _GUESSING)


@dataclass(frozen=True)
class Spoken:
    """What the model writes greedily after the prompts of new facts, and of their siblings (`evaluation.suites`).

    Attributes:
        said: continuations that begin with the target; of answers in a chat, that say it.
        closed: those after whose target the word ends.
        leak: siblings that now say a new target which is not theirs and that they did not say before; None: no sibling was read.
        faults: the worst of what does not read right, `KEPT_FAULTS` at most.
        chat: the same facts asked in the base's chat form, where they were written outside it; it is not judged.
        namesakes: invented names that end in the last word of a new fact's subject and say a new target now; they are not judged.
    """

    said: Share
    closed: Share
    leak: Share | None = None
    faults: tuple[Fault, ...] = ()
    chat: Spoken | None = None
    namesakes: Share | None = None

    @property
    def wrong(self) -> int:
        """How many facts and siblings do not read right."""
        return self.closed.of - self.closed.count + (self.leak.count if self.leak else 0)

    def to_json(self) -> dict[str, Any]:
        return {
            "said": asdict(self.said),
            "closed": asdict(self.closed),
            "faults": [fault.to_json() for fault in self.faults],
            **({} if self.leak is None else {"leak": asdict(self.leak)}),
            **({} if self.namesakes is None else {"namesakes": asdict(self.namesakes)}),
            **({} if self.chat is None else {"chat": self.chat.to_json()}),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Spoken:
        return cls(
            _share_of(value["said"]),
            _share_of(value["closed"]),
            _share_of(value["leak"]) if "leak" in value else None,
            tuple(Fault.from_json(fault) for fault in value["faults"]),
            Spoken.from_json(value["chat"]) if "chat" in value else None,
            _share_of(value["namesakes"]) if "namesakes" in value else None,
        )


KEPT_FAULTS: Final = 100
"""So many are kept with a commit; the shares count all."""


def worst(faults: Iterable[Fault]) -> tuple[Fault, ...]:
    """Those that are kept: first what is not said, then leaks, then what runs on."""
    places = {"not said": 0, "leak": 1, "runs on": 2}
    return tuple(sorted(faults, key=lambda fault: places[fault.why])[:KEPT_FAULTS])


@dataclass(frozen=True)
class Measured:
    """What was measured of a change; None stands for what was not.

    Attributes:
        facts: how many facts it brings.
        own: new facts that are the model's answer (argmax, teacher forced).
        spoken: what the model writes by itself.
        about: of the words that it said of the new facts' subjects before, in its chat where it has one, those that are still its most
            probable next ones; it is not judged.
        earlier: of the earlier facts that were read and held before, those that hold no more.
        active: how many earlier facts there are; `earlier` reads those that the change moves most.
        unmet: of the new facts, and those that they contradict, those that get less than half of their change at some weight.
        crushed: of the other facts that got more than half before, those that do no more.
        drift: on held text.
        spectrum: per weight, the largest singular value of the "base" weight, of the "change" and of the whole "state".
        survival: per weight, the share of the state's change that rounding to the base's type keeps.
        first_token: new facts whose subject ends at the very first token, where the keys of all texts are alike.
        routing: of the experts of held tokens in the base, those that are theirs still; None of a model without experts.
    """

    facts: int = 0
    own: Share | None = None
    spoken: Spoken | None = None
    about: Share | None = None
    earlier: Share | None = None
    active: int = 0
    unmet: Share | None = None
    crushed: Share | None = None
    drift: Drifted | None = None
    spectrum: Mapping[str, Mapping[str, float]] | None = None
    survival: Mapping[str, float] | None = None
    first_token: int = 0
    routing: Share | None = None


@dataclass(frozen=True)
class Report:
    """What a commit's ``check`` keeps of a look by the guard.

    Attributes:
        measured: what was measured.
        failed: the failed checks in words.
        forced: ``--force`` was given.
    """

    measured: Measured
    failed: tuple[str, ...] = ()
    forced: bool = False

    def to_json(self) -> dict[str, Any]:
        """The fields ``guard``, ``forced`` and ``survival`` of a ``check`` (docs/format.md); what was not measured is left out."""
        values = {name: value for name, value in asdict(self.measured).items() if value is not None}
        survival = values.pop("survival", None)
        if self.measured.spoken is not None:
            values["spoken"] = self.measured.spoken.to_json()
        check: dict[str, Any] = {"forced": self.forced, "guard": {**values, "failed": list(self.failed)}}
        return check if survival is None else {**check, "survival": survival}

    @classmethod
    def from_json(cls, check: Mapping[str, Any]) -> Report | None:
        """The inverse; None where a ``check`` has no such fields, or others than this version writes (it may come from anywhere)."""
        try:
            guard = dict(check["guard"])
            failed = tuple(map(str, guard.pop("failed")))
            found = {name: _READERS[name](value) for name, value in guard.items()}
            survival = _numbers(check["survival"]) if "survival" in check else None
            return cls(Measured(**found, survival=survival), failed, bool(check["forced"]))
        except (AttributeError, KeyError, TypeError, ValueError):
            return None


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {str(name): float(value) for name, value in values.items()}


def _share_of(values: Mapping[str, Any]) -> Share:
    return Share(int(values["count"]), int(values["of"]))


def _drifted(values: Mapping[str, Any]) -> Drifted:
    kl_before, kl, ratio = (float(values[name]) for name in ("kl_before", "kl", "perplexity_ratio"))
    return Drifted(kl_before, kl, ratio, int(values["positions"]), bool(values["guessing"]))


def _spectra(values: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    return {
        str(name): {key: float(found[key]) for key in ("base", "change", "state")} for name, found in values.items()
    }


_READERS: Final[Mapping[str, Callable[[Any], Any]]] = {
    **dict.fromkeys(("facts", "active", "first_token"), int),
    **dict.fromkeys(("own", "about", "earlier", "unmet", "crushed", "routing"), _share_of),
    "spoken": Spoken.from_json,
    "drift": _drifted,
    "spectrum": _spectra,
}
"""How each measured field is read from JSON."""


@dataclass(frozen=True)
class Finding:
    """A check that failed.

    Attributes:
        check: which; ``guard.<check>`` is its limit.
        value, limit: the number that failed and what it was held against.
        words: what is wrong, without a full stop.
    """

    check: Check
    value: float
    limit: float
    words: str


def judge(found: Measured, limits: Limits, *, all_facts: bool = False) -> tuple[Finding, ...]:
    """The checks that fail; none for a healthy change.

    What the model says is not held against it where the base has learned nothing that could be broken (`Drifted.guessing`).

    Args:
        all_facts: it fails as soon as one new fact does not hold or runs on, or one sibling leaks.
    """
    return (*_findings(found, limits), *(_every(found) if all_facts else ()))


def _every(found: Measured) -> Iterator[Finding]:
    """What fails where every fact is to read right."""
    holding, spoken = found.own, found.spoken
    lost = holding.of - holding.count if holding else 0
    wrong = max(lost, spoken.wrong if spoken else 0)
    if wrong:
        many = "new facts do not hold, run on, or are said of other subjects"
        words = many if wrong != 1 else "new fact does not hold, runs on, or is said of another subject"
        yield Finding("all", float(wrong), 0.0, f"{wrong} {words}")


def _findings(found: Measured, limits: Limits) -> Iterator[Finding]:
    learned = found.drift is None or not found.drift.guessing
    if found.drift is not None and learned:
        growth, limit = found.drift.kl - found.drift.kl_before, limits.drift_limit(found.facts)
        if not growth <= limit:
            text = (
                f"on text that has nothing to do with the facts the model moves away from the base by {_nats(growth)}"
            )
            yield Finding("drift", growth, limit, text)
        if growth > 0 and not found.drift.kl <= limits.total:
            text = f"on text that has nothing to do with the facts the model is now {_nats(found.drift.kl)} away from the base"
            yield Finding("total", found.drift.kl, limits.total, text)
    if found.own is not None and learned and found.own.highest < limits.own:
        words = ("new fact is the model's answer", "new facts are the model's answer")
        yield _share("own", found.own, limits.own, words)
    elif found.own is not None and learned and found.own.count < min(limits.fewest, found.own.of):
        held = f"{found.own.count or 'none'} of {found.own.of}"
        yield Finding("fewest", found.own.count, limits.fewest, f"{held} new facts is the model's answer")
    yield from _spoken_findings(found, limits) if learned else ()
    if found.earlier is not None and found.earlier.lowest > limits.earlier:
        words = ("earlier fact is not the model's answer any more", "earlier facts are not the model's answer any more")
        yield _share("earlier", found.earlier, limits.earlier, words)
    if found.unmet is not None and found.unmet.lowest > limits.misfit:
        many = "new and contradicted facts get less than half of the change that they ask for"
        words = ("new or contradicted fact gets less than half of the change that it asks for", many)
        yield _share("misfit", found.unmet, limits.misfit, words)
    if found.crushed is not None and found.crushed.lowest > limits.earlier:
        many = "other facts get less than half of the change that they ask for, and got more before"
        words = ("other fact gets less than half of the change that it asks for, and got more before", many)
        yield _share("earlier", found.crushed, limits.earlier, words)
    yield from _weight_findings(found, limits)


def _spoken_findings(found: Measured, limits: Limits) -> Iterator[Finding]:
    """What the model writes by itself."""
    if found.spoken is None:
        return
    closed, leak = found.spoken.closed, found.spoken.leak
    if closed.of and closed.highest < limits.closed:
        words = ("new fact is said and ends there", "new facts are said and end there")
        yield _share("closed", closed, limits.closed, words)
    if leak is not None and leak.of and leak.lowest > limits.leak:
        words = (
            "prompt about another subject now says a new target",
            "prompts about other subjects now say a new target",
        )
        yield _share("leak", leak, limits.leak, words)


def _weight_findings(found: Measured, limits: Limits) -> Iterator[Finding]:
    """The worst weight of each kind."""
    ratios = {weight: values["state"] / (values["base"] or 1.0) for weight, values in (found.spectrum or {}).items()}
    if ratios and not max(ratios.values()) <= limits.spectrum:
        weight, ratio = max(ratios.items(), key=lambda item: item[1])
        words = f"the change of {weight} is {ratio:.0f} times as large as the weight (largest singular values)"
        yield Finding("spectrum", ratio, limits.spectrum, words)
    if found.survival and not min(found.survival.values()) >= limits.survival:
        weight, share = min(found.survival.items(), key=lambda item: item[1])
        words = f"rounding to the base's type leaves {share:.0%} of the change of {weight}"
        yield Finding("survival", share, limits.survival, words)


def _share(check: Check, share: Share, limit: float, words: tuple[str, str]) -> Finding:
    """A finding about a share of the facts, with its words for one fact and for any other number."""
    return Finding(check, share.count / share.of, limit, f"{share.count} of {share.of} {words[share.of != 1]}")


def _nats(growth: float) -> str:
    return f"{growth:.2f} nats per token" if isfinite(growth) else "more than any number"
