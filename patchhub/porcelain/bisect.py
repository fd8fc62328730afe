"""`bisect`: the commit that broke something, in about log2 n checks. The search is pure; checks are functions."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from patchhub.errors import RequestError, RevisionError, SettingsError
from patchhub.objects import Request
from patchhub.porcelain.facts import active_requests, distinct, places_of
from patchhub.porcelain.history import Entry, request_json, show
from patchhub.porcelain.progress import Progress
from patchhub.store import graph, lookup
from patchhub.store.graph import Parents
from patchhub.store.repository import Repository

Verdict = Literal["good", "bad", "skip"]
Outcome = tuple[Verdict, float | None]
"""A verdict, and the number that it was read off, if there is one."""
Check = Callable[[str | None], Outcome]
"""The verdict on a commit; on the base for None."""

SKIP_CODE: Final = 125
METRICS: Final[Mapping[str, str]] = {
    "efficacy": "reliability",
    "paraphrase": "generalisation",
    "locality": "locality",
    "perplexity": "perplexity",
}
"""What can be measured, and its name in the WISE suite."""


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
    """

    suspects: tuple[str, ...]
    steps: tuple[Step, ...]
    entry: Entry | None
    added: tuple[Request, ...]
    removed: tuple[Request, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "first_bad": self.entry.id if self.entry else None,
            "suspects": list(self.suspects),
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


def bisect(repository: Repository, good: str, bad: str, check: Check, progress: Progress) -> Bisection:
    """Find the first bad commit between two revisions, both of which are checked first.

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
        return Bisection(tuple(suspects), tuple(steps), None, (), ())
    shown = show(repository, suspects[0])
    return Bisection(tuple(suspects), tuple(steps), shown.entry, shown.added, shown.removed)


def _demand(revision: str, found: Verdict, wanted: Verdict) -> None:
    if found != wanted:
        raise RevisionError(
            f"the check says {found!r} of {revision}, which should be {wanted}",
            remedy="Choose revisions on both sides of the change, or another check.",
            revision=revision,
            verdict=found,
        )


def command_check(
    repository: Repository, run: Callable[[Path, str | None], int], progress: Progress, *, base: str | None = None
) -> Check:
    """A check by a program on the applied checkpoint: exit code 0 is good, 125 skips, anything else is bad.

    Args:
        run: runs it on a checkpoint folder (deleted afterwards) and a commit's id, and returns its exit code.
    """
    from patchhub.porcelain.model import apply

    def check(commit: str | None) -> Outcome:
        with tempfile.TemporaryDirectory(prefix="patchhub-bisect-") as folder:
            model = Path(folder) / "model"
            apply(repository, commit or "base", model, progress, base=base)
            code = run(model, commit)
        return ("skip" if code == SKIP_CODE else "bad" if code else "good"), float(code)

    return check


def metric_check(
    repository: Repository,
    metric: str,
    requests: Sequence[Request],
    *,
    below: float | None = None,
    above: float | None = None,
    base: str | None = None,
) -> Check:
    """A check by a measurement: bad where it is below `below` or above `above`.

    efficacy and paraphrase are the shares of facts and of their paraphrases that are the model's answer; locality is the share of
    neighbour prompts that are answered as by the base (each token by argmax); perplexity is over the neighbours' true sentences. One
    model stays in memory and is switched from commit to commit.

    Raises:
        SettingsError: no such metric, or no bound.
        RequestError: the facts have no prompts of the kind that the metric needs.
    """
    if metric not in METRICS or (below is None and above is None):
        raise SettingsError(
            f"{metric} cannot be checked",
            remedy=f"Use --metric {', '.join(METRICS)} with --below or --above and a number.",
        )
    needed = {"efficacy": len(requests), "paraphrase": sum(len(request.paraphrases) for request in requests)}
    if not needed.get(metric, sum(len(request.neighborhood) for request in requests)):
        raise RequestError(
            f"the facts have no prompts to measure {metric} on",
            remedy="Give facts with paraphrases and neighborhood prompts by --facts.",
        )
    measure = _measurement(repository, metric, requests, base)

    def check(commit: str | None) -> Outcome:
        value = measure(commit)
        bad = (below is not None and value < below) or (above is not None and value > above)
        return ("bad" if bad else "good"), value

    return check


def facts_to_measure(repository: Repository, metric: str, good: str, bad: str) -> list[Request]:
    """The facts that a metric is about by default.

    What must hold all along, efficacy and paraphrases: the facts active at both ends. What must not be disturbed, locality
    and perplexity: the neighbours of all facts active at the bad end.
    """
    texts = active_requests(repository, repository.active(repository.resolve(bad)))
    if metric in ("efficacy", "paraphrase"):
        held = {request for _, request in places_of(repository, repository.active(repository.resolve(good)))}
        texts = {place: request for place, request in texts.items() if request.id in held}
    return list(distinct(texts))


def _measurement(
    repository: Repository, metric: str, requests: Sequence[Request], base: str | None
) -> Callable[[str | None], float]:
    """commit -> the number, on one model that is loaded now."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from patchhub.evaluation.metrics import perplexity
    from patchhub.evaluation.suites import read_facts, wise_scores
    from patchhub.porcelain.loading import open_base, state_at
    from patchhub.runtime.patched_model import attach, switch

    checkpoint = open_base(repository, base)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder, local_files_only=True)
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32, local_files_only=True)
    model.eval()
    attach(model, checkpoint, state_at(repository, "base"))
    unpatched = read_facts(model, tokenizer, requests) if metric != "perplexity" else []
    texts = [f"{near.prompt} {near.target}" for request in requests for near in request.neighborhood]

    def measure(commit: str | None) -> float:
        switch(model, checkpoint, state_at(repository, commit or "base"))
        if metric == "perplexity":
            return perplexity(model, tokenizer, texts)
        scores = wise_scores(read_facts(model, tokenizer, requests), unpatched, resamples=1)
        return scores.estimates[METRICS[metric]].value

    return measure
