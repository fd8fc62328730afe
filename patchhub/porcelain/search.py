"""`search` and `diff`: all facts ever committed in words, and what changes between two revisions.

Both are answered by the index and by JSON; only the weights and answers of `diff` need NumPy and a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Final

from patchhub.errors import RequestError, RevisionError, SettingsError
from patchhub.objects import Element, Request
from patchhub.porcelain.history import Shown, show
from patchhub.porcelain.scores import Compared, compare, measured_norms
from patchhub.progress import Progress
from patchhub.results import Result, in_full, told
from patchhub.sets.elements import Place, active_requests, distinct, places_of
from patchhub.store import lookup
from patchhub.store.lookup import Change, Fact
from patchhub.store.store import Store

_READ: Final = 500
"""How many rows are read at first; those that are not active are left out."""


@dataclass(frozen=True)
class Found(Result):
    """One fact, the commits that added or removed it (earliest first), and whether it is active now.

    `metadata` is what its record says besides; `show` alone reads it.
    """

    TOLD: ClassVar = {"taught": "taught"}

    fact: Fact = field(metadata=told(inline=True))
    changes: tuple[Change, ...]
    active: bool
    metadata: Mapping[str, Any] = field(default_factory=dict, metadata=told(optional=True))

    def words(self) -> str:
        return f"{self.fact.words()}, {'active' if self.active else 'not active'}"

    @property
    def taught(self) -> Change | None:
        """The commit that first added the fact."""
        return next((change for change in self.changes if change.change > 0), None)


def search(repository: Store, words: str, *, subject: str = "", revision: str = "HEAD", limit: int = 50) -> list[Found]:
    """Facts whose text or targets hold every word, the best match first.

    Args:
        subject: words that must all be in the fact's subject.
        revision: where a fact counts as active.
        limit: at most this many facts.

    Raises:
        SettingsError: neither words nor a subject.
        RevisionError: no such revision.
    """
    if not (words.strip() or subject.strip()):
        raise SettingsError("there is nothing to search for", remedy="Give words, or --subject.")
    commit = repository.resolve(revision)
    read = partial(lookup.search, repository, words, subject=subject)
    facts = _enough(lambda rows: read(limit=rows), _first_of_each, limit, first=2 * limit)
    active = {request for _, request in lookup.active_among(repository, commit, [fact.request for fact in facts])}
    return [Found(fact, tuple(lookup.changes(repository, fact.request)), fact.request in active) for fact in facts]


def named(repository: Store, name: str, revision: str = "HEAD", *, active: bool = False) -> list[Found]:
    """The facts that a name means: a subject, the text of a fact, a request id or a prefix of one, or else a target.

    Args:
        revision: where a fact counts as active.
        active: leave out the others.

    Raises:
        RevisionError: no such revision.
    """
    commit = repository.resolve(revision)
    facts = _first_of_each(lookup.named(repository, name) or lookup.of_target(repository, name))
    here = {request for _, request in lookup.active_among(repository, commit, [fact.request for fact in facts])}
    return [
        Found(fact, tuple(lookup.changes(repository, fact.request)), fact.request in here, _said(repository, fact))
        for fact in facts
        if fact.request in here or not active
    ]


def _said(repository: Store, fact: Fact) -> Mapping[str, Any]:
    """The metadata of a fact, as its patch has it."""
    texts = repository.requests(repository.patch(fact.patch))
    return next((request.metadata for request in texts if request.id == fact.request), {})


def shown(repository: Store, name: str) -> Shown | list[Found]:
    """What a name leads to: a commit, or facts; ``REV:FACT`` means facts active at REV.

    Raises:
        RevisionError: nothing has that name, or it is the unpatched model or a patch.
    """
    revision, colon, fact = name.partition(":")
    if colon:
        with suppress(RevisionError):
            repository.resolve(revision or "HEAD")
            if found := named(repository, fact.strip(), revision or "HEAD", active=True):
                return found
            raise RequestError(
                f"no fact that is active at {revision or 'HEAD'} has the subject, the text, the id or the target {fact.strip()!r}",
                remedy=f"`patchhub search {fact.strip()} --rev {revision or 'HEAD'}` looks for its words.",
            )
    try:
        return show(repository, name)
    except RevisionError as error:
        if found := named(repository, name):
            return found
        if "patch" not in error.facts and not error.facts.get("close") and " " in name:
            remedy = "It is no fact's text either; `patchhub search WORDS` looks for words of it."
            raise RevisionError(error.message, remedy=remedy, **error.facts) from None
        raise


def mentioned(repository: Store, prompt: str, revision: str = "HEAD", *, limit: int = 20) -> list[Fact]:
    """The facts active at a revision whose subject occurs in a prompt: those of just this text first.

    Raises:
        RevisionError: no such revision.
    """
    commit = repository.resolve(revision)
    read = partial(lookup.mentioned, repository, prompt.strip())

    def active_ones(facts: Sequence[Fact]) -> list[Fact]:
        active = lookup.active_among(repository, commit, sorted({fact.request for fact in facts}))
        return [fact for fact in facts if (fact.patch, fact.request) in active]

    return _enough(lambda rows: read(limit=rows), active_ones, limit, first=_READ)


def _enough(
    read: Callable[[int], Sequence[Fact]], choose: Callable[[Sequence[Fact]], list[Fact]], limit: int, *, first: int
) -> list[Fact]:
    """The first `limit` of what `choose` keeps of the best rows; `read` gives so many rows, `first` of them to begin with.

    Facts that were recorded again have many rows, so more are read until there are enough or no more.
    """
    rows = max(first, 1)
    while True:
        found = read(rows)
        kept = choose(found)
        if len(kept) >= limit or len(found) < rows:
            return kept[:limit]
        rows *= 4


def _first_of_each(facts: Iterable[Fact]) -> list[Fact]:
    """Each request once, though several patches may hold it."""
    found: dict[str, Fact] = {}
    for fact in facts:
        found.setdefault(fact.request, fact)
    return list(found.values())


NOISE: Final = 1e-6
"""Singular values below this share of a state's norm are rounding: sums of stored changes are right to about this."""


@dataclass(frozen=True)
class Retarget(Result):
    """One prompt and subject whose target differs between two revisions."""

    before: Request = field(metadata=told(by=in_full))
    after: Request = field(metadata=told(by=in_full))


@dataclass(frozen=True)
class Difference(Result):
    """`diff`: what changes from one revision to another.

    ``norms`` holds, per weight, the Frobenius norm of the base's weight and of the change at either revision, and of the step
    between them where one is the other's first parent (None otherwise: `weight_steps` computes it). ``scores`` holds, per suite that
    either was measured with, the scores of both. ``weights`` and ``answers`` are None unless they were asked for.
    """

    old: str | None
    new: str | None
    added: tuple[Request, ...] = field(metadata=told(by=in_full))
    removed: tuple[Request, ...] = field(metadata=told(by=in_full))
    retargeted: tuple[Retarget, ...]
    norms: Mapping[str, Mapping[str, float | None]]
    scores: tuple[Compared, ...] = ()
    weights: Mapping[str, WeightStep] | None = field(default=None, metadata=told(missing=True))
    answers: tuple[ChangedAnswer, ...] | None = field(default=None, metadata=told(missing=True))

    def words(self) -> str:
        ends = " -> ".join(end[:12] if end else "base" for end in (self.old, self.new))
        return f"{ends}: {len(self.added)} added, {len(self.retargeted)} retargeted, {len(self.removed)} removed"


@dataclass(frozen=True)
class WeightStep(Result):
    """One weight at two revisions, D_old and D_new its changes there (Frobenius norms).

    Attributes:
        base: the norm of the base's weight; None where it is neither recorded nor the base's files are on this machine.
        old, new, step: the norms of D_old, D_new and D_new - D_old.
        old_rank, new_rank, step_rank: how many singular values are above rounding.
        cosine: of the angle between D_old and D_new as vectors; None where one of them is zero.
    """

    base: float | None
    old: float
    new: float
    step: float
    old_rank: int
    new_rank: int
    step_rank: int
    cosine: float | None


@dataclass(frozen=True)
class ChangedAnswer(Result):
    """A prompt that two revisions answer differently: likeliest next token with its probability, greedy continuation."""

    prompt: str
    old: str
    new: str
    old_top: tuple[str, float]
    new_top: tuple[str, float]


def diff(repository: Store, old: str, new: str) -> Difference:
    """The facts and norms that differ between two revisions."""
    old_id, new_id = repository.resolve(old), repository.resolve(new)
    before, after = repository.active(old_id), repository.active(new_id)
    here, there = active_requests(repository, before - after), active_requests(repository, after - before)
    gone, come = _only(here, repository, after), _only(there, repository, before)
    by_prompt: dict[tuple[str, str], list[Request]] = {}  # several targets, where conflicting facts were kept
    for request in gone:
        by_prompt.setdefault((request.prompt, request.subject), []).append(request)
    retargeted, added = [], []
    for request in come:
        earlier = by_prompt.get((request.prompt, request.subject))
        if earlier:
            retargeted.append(Retarget(earlier.pop(0), request))
        else:
            added.append(request)
    return Difference(
        old_id,
        new_id,
        tuple(added),
        tuple(request for left in by_prompt.values() for request in left),
        tuple(retargeted),
        _norms(repository, old_id, new_id),
        compare(repository, old_id, new_id),
    )


def diff_in_full(
    repository: Store,
    old: str,
    new: str,
    progress: Progress,
    *,
    weights: bool = False,
    prompts: Sequence[str] | None = None,
    base: str | None = None,
) -> Difference:
    """`diff`, with `weight_steps` under ``weights`` and, where there are prompts, with `changed_answers`; errors as theirs."""
    found = diff(repository, old, new)
    if weights:
        found = replace(found, weights=weight_steps(repository, old, new))
    if prompts is not None:
        found = replace(found, answers=tuple(changed_answers(repository, old, new, prompts, progress, base=base)))
    return found


def weight_steps(repository: Store, old: str, new: str) -> dict[str, WeightStep]:
    """How each weight that either revision changes differs between them; from the stored deltas, without the model.

    Raises:
        RevisionError: no such revision.
    """
    from patchhub.delta import add, inner, negative, norm, numerical_rank
    from patchhub.sets.columns import read_state, tensor_shapes
    from patchhub.sets.guard import base_norms

    shapes = tensor_shapes(repository)
    before, after = (read_state(repository, repository.resolve(revision)) for revision in (old, new))
    steps = {}
    norms = base_norms(repository, before.keys() | after.keys())
    for weight in sorted(before.keys() | after.keys()):
        then, now = (add(side.get(weight, ()), shapes[weight]) for side in (before, after))
        step = add([now, negative(then)], shapes[weight])
        noise = NOISE * max(norm(then), norm(now))
        steps[weight] = WeightStep(
            base=norms.get(weight),
            old=norm(then),
            new=norm(now),
            step=norm(step),
            old_rank=numerical_rank(then, noise),
            new_rank=numerical_rank(now, noise),
            step_rank=numerical_rank(step, noise),
            cosine=inner(then, now) / (norm(then) * norm(now)) if norm(then) and norm(now) else None,
        )
    return steps


def changed_answers(
    repository: Store, old: str, new: str, prompts: Sequence[str], progress: Progress, *, base: str | None = None
) -> list[ChangedAnswer]:
    """The prompts whose greedy continuation or likeliest next token differs; one model, switched from state to state.

    Raises:
        RevisionError: no such revision.
        RequestError: there is no prompt.
    """
    from patchhub.porcelain.model import answers

    asked = [prompt for prompt in prompts if prompt.strip()]
    if not asked:
        raise RequestError("there are no prompts to ask", remedy="Write one prompt per line.")
    before, after = answers(repository, asked, (old, new), progress, base=base)
    return [
        ChangedAnswer(prompt, then.continuation, now.continuation, then.top[0], now.top[0])
        for prompt, then, now in zip(asked, before, after, strict=True)
        if then.continuation != now.continuation or then.top[0][0] != now.top[0][0]
    ]


def _only(texts: Mapping[Place, Request], repository: Store, other: frozenset[Element]) -> tuple[Request, ...]:
    """The requests of one side that the other set has not: the same fact in another patch is no change of facts."""
    there = {request for _, request in places_of(repository, other)}
    return tuple(request for request in distinct(texts) if request.id not in there)


def _changed_weights(repository: Store, *commits: str | None) -> set[str]:
    """The weights that facts are written into, and those of the patches that commits hold as a whole."""
    whole = {patch for commit in commits if commit for patch, request in repository.active(commit) if request is None}
    return {weight for patch in whole for weight in repository.patch(patch).weights} | set(
        repository.config.base["weights"]
    )


def _norms(repository: Store, old: str | None, new: str | None) -> dict[str, dict[str, float | None]]:
    sides = [measured_norms(repository.commit(side).check) if side else {} for side in (old, new)]
    step = None
    if new and old == next(iter(repository.commit(new).parents), None):
        step = sides[1]
    elif old and new == next(iter(repository.commit(old).parents), None):
        step = sides[0]
    base = {weight: norms["base"] for side in sides for weight, norms in side.items()}
    found = {}
    for weight in sorted(base.keys() & _changed_weights(repository, old, new)):
        old_norm, new_norm = (side.get(weight, {}).get("state", 0.0) for side in sides)
        change = None if step is None else step.get(weight, {}).get("change", 0.0)
        if old_norm or new_norm:
            found[weight] = {"base": base[weight], "old": old_norm, "new": new_norm, "change": change}
    return found
