"""`merge`: join two histories. The merged set is three-way per request, its weights are solved from recorded columns.

`merge --dry-run` tells from the recorded columns what a merge would bring, and writes nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from time import perf_counter
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

import numpy as np

from patchhub.constraints import Columns, interfering, misfit
from patchhub.delta import Delta
from patchhub.errors import PatchhubError, RepositoryError, RevisionError, SettingsError
from patchhub.objects import Element, Request
from patchhub.porcelain.change import largest_proof
from patchhub.porcelain.refs import current_ref
from patchhub.progress import Progress, Silent
from patchhub.results import Result, told
from patchhub.sets.columns import additive_patches, read_columns, read_state
from patchhub.sets.commits import Draft, begin, prepare, record
from patchhub.sets.elements import active_requests, left_and_entered, one_metric, stale_requests
from patchhub.sets.merging import (
    Contradiction,
    Decided,
    Resolution,
    Side,
    StoppedMerge,
    base_set,
    decide,
    find,
    forget,
    keep,
    stopped_merge,
    three_way,
)
from patchhub.sets.shards import ShardPlan, shrink, stale_shards, superseded
from patchhub.sets.sums import solve_change
from patchhub.store.revisions import BRANCHES, REMOTES, TAGS, resolve_ref
from patchhub.store.states import is_ancestor
from patchhub.store.store import Store
from patchhub.who import Who
from patchhub.worktree.judging import GUARDED, Guarding, judge

if TYPE_CHECKING:
    from patchhub.porcelain.commit import Refreshed

Outcome = Literal["up to date", "fast-forward", "merged"]

Facts: TypeAlias = tuple[Request, ...]

UNDECIDED = Resolution()


def _sides(decided: Mapping[Contradiction, Side]) -> list[dict[str, Any]]:
    return [{**found.to_json(), "stays": side} for found, side in decided.items()]


@dataclass(frozen=True)
class Merged(Result):
    """What `merge` did.

    Attributes:
        outcome: whether anything was to do, whether the branch only moved, or a commit with two parents was made.
        commit: where the branch is now; None is the unpatched model.
        from_ours, from_theirs: facts of the merged set that the other side does not have.
        removed_by_ours, removed_by_theirs: facts that one side has and the merged set does not.
        decided: the contradictions, with the side that stays.
        unchecked: facts that no contradiction could be looked for in, because their texts are withheld.
        same_as, stale, proof, stale_shards, trained: as in `Changed`.
        seconds: wall time.
        imports: the patches of imported changes that came from theirs.
        refreshed: what was recorded again then, if that was asked for.
    """

    outcome: Outcome
    commit: str | None
    from_ours: tuple[Request, ...]
    from_theirs: tuple[Request, ...]
    removed_by_ours: tuple[Request, ...]
    removed_by_theirs: tuple[Request, ...]
    decided: Mapping[Contradiction, Side] = field(metadata=told(by=_sides))
    unchecked: int
    same_as: str | None
    stale: int
    proof: float
    seconds: float
    stale_shards: tuple[str, ...] = ()
    trained: tuple[str, ...] = ()
    imports: tuple[str, ...] = ()
    refreshed: Refreshed | None = field(default=None, metadata=told(missing=True))


@dataclass(frozen=True)
class Stopped(Result):
    """A merge that wrote nothing but ``merge.json``, because contradictions are open."""

    TOLD: ClassVar = {"outcome": "outcome"}

    merge: StoppedMerge = field(metadata=told(inline=True))
    open: tuple[Contradiction, ...] = field(metadata=told(name="contradictions"))
    unchecked: int

    @property
    def outcome(self) -> Literal["stopped"]:
        """As `Merged` says what became of a merge."""
        return "stopped"


@dataclass(frozen=True)
class Aborted(Result):
    """A stopped merge that was left; nothing had changed."""

    outcome: Literal["aborted"] = "aborted"


@dataclass(frozen=True)
class Plan:
    """A three-way merge before anything is written.

    Attributes:
        ours, theirs: the two sets.
        merged: what the merge would hold, with the contradictions decided so far.
        shards: shards of it that must be trained again, since decisions leave out some of their facts.
        decided, open: contradictions with the side that stays, and without.
        unchecked: as in `Merged`.
        metric: that of the merged set's columns.
    """

    ours: frozenset[Element]
    theirs: frozenset[Element]
    merged: frozenset[Element]
    shards: ShardPlan
    decided: Mapping[Contradiction, Side]
    open: tuple[Contradiction, ...]
    unchecked: int
    metric: str | None


def merge(
    repository: Store,
    revision: str,
    who: Who,
    *,
    resolution: Resolution = UNDECIDED,
    fast_forward: bool = True,
    progress: Progress | None = None,
    guarding: Guarding = GUARDED,
) -> Merged | Stopped:
    """Bring what another revision changed into the current branch.

    There is nothing to do where it is part of HEAD already. Where HEAD is part of it and ``fast_forward`` is set, the branch moves
    there. Otherwise a commit with both as parents is made, unless ``resolution`` leaves contradictions open: then the merge stops, and
    `continue_merge` or `abort_merge` take it up.

    Args:
        who: an empty message stands for "Merge branch 'NAME'".
        guarding: how the merged state is checked.

    Raises:
        RevisionError: no such revision.
        RequestError: the resolution does not fit the contradictions.
        RepositoryError: another merge waits on this commit.
        EditError: the sides' columns are of different metrics.
        GuardError: a check of the merged state failed; nothing was committed.
    """
    begun = perf_counter()
    ours = begin(repository)
    theirs = repository.resolve(revision)
    parents = cache(repository.parents)
    if theirs is None or (ours is not None and is_ancestor(theirs, ours, parents)):
        return _moved(repository, "up to date", ours, ours, begun)
    if ours is None or (fast_forward and is_ancestor(ours, theirs, parents)):
        changes = {current_ref(repository): (ours, theirs)}
        arguments = {"revision": revision, "commit": theirs}
        repository.move_refs(changes, command="merge", arguments=arguments, author=who.author, time=who.time)
        return _moved(repository, "fast-forward", ours, theirs, begun)
    message = who.message or f"Merge {_describe(repository, revision)}"
    stopped = StoppedMerge(ours, theirs, revision, message)
    return _finish(repository, stopped, who, resolution, guarding, progress or Silent(), begun)


def refuse_unclear(revision: str | None, resume: bool, abort: bool, dry_run: bool) -> None:
    """Raise `SettingsError` unless one thing is asked for: to merge a revision, to take up a stopped merge, or to leave it."""
    if sum([revision is not None, resume, abort]) != 1 or (dry_run and revision is None):
        raise SettingsError(
            "merge takes a revision, or --continue, or --abort", remedy="Give one of them; --dry-run needs a revision."
        )


def then_refreshed(
    repository: Store, merged: Merged | Stopped, who: Who, progress: Progress, *, force: bool
) -> Merged | Stopped:
    """A merge with what `refresh` did after it, if it made a commit.

    Raises:
        PatchhubError: as `refresh` does; the merge stays, as the error says.
    """
    if isinstance(merged, Stopped) or merged.outcome != "merged":
        return merged
    from patchhub.porcelain.commit import refresh

    try:
        return replace(merged, refreshed=refresh(repository, replace(who, message=""), progress, force=force))
    except PatchhubError as error:
        error.message = f"commit {str(merged.commit)[:12]} merges the two; to refresh it failed: {error.message}"
        error.facts["merged"] = merged.commit
        raise


def continue_merge(
    repository: Store,
    who: Who,
    *,
    resolution: Resolution,
    progress: Progress | None = None,
    guarding: Guarding = GUARDED,
) -> Merged | Stopped:
    """Take a stopped merge up again, with its contradictions decided; an empty message stands for the merge's own.

    Raises:
        RepositoryError: no merge waits on this commit.
        RequestError, EditError, GuardError: as in `merge`.
    """
    begun = perf_counter()
    waiting = stopped_merge(repository)
    if waiting is None:
        raise RepositoryError("no merge waits on this commit", remedy="Begin one with `patchhub merge REV`.")
    return _finish(repository, waiting, who, resolution, guarding, progress or Silent(), begun)


def abort_merge(repository: Store) -> Aborted:
    """Forget a stopped merge; no ref moved when it stopped, so none moves now.

    Raises:
        RepositoryError: there is none.
    """
    if not forget(repository):
        raise RepositoryError("there is no stopped merge to abort", remedy="Begin one with `patchhub merge REV`.")
    return Aborted()


def plan(repository: Store, ours: str, theirs: str, resolution: Resolution) -> Plan:
    """What merging two commits would give; nothing is written.

    Raises:
        RequestError, EditError: as in `merge`.
    """
    sides = repository.active(ours), repository.active(theirs)
    merged = three_way(base_set(ours, theirs, cache(repository.parents), repository.active), *sides)
    merged -= superseded(repository, merged)
    metric = one_metric(repository, sides[0] | sides[1])
    found = find(repository, merged, (ours, sides[0]), (theirs, sides[1]))
    decided = decide(found.contradictions, resolution)
    shards = shrink(repository, _forgotten(merged, decided))
    kept = (merged - decided.dropped - shards.remove) | shards.restore
    kept -= superseded(repository, kept)
    return Plan(*sides, kept, shards, decided.sides, decided.open, found.unchecked, metric)


def _forgotten(merged: frozenset[Element], decided: Decided) -> dict[str, frozenset[str]]:
    """Per shard, the ids of the facts that are decided against."""
    places = decided.dropped - merged
    return {shard: frozenset(str(fact) for patch, fact in places if patch == shard) for shard in {p for p, _ in places}}


def _finish(
    repository: Store,
    merge: StoppedMerge,
    who: Who,
    resolution: Resolution,
    guarding: Guarding,
    progress: Progress,
    begun: float,
) -> Merged | Stopped:
    """Make the merge commit, or stop."""
    planned = plan(repository, merge.ours, merge.theirs, resolution)
    if planned.open:
        keep(repository, merge)
        return Stopped(merge, planned.open, planned.unchecked)
    trained: tuple[str, ...] = ()
    if planned.shards.train:
        from patchhub.worktree.shards import train_reshaped

        merged, trained = train_reshaped(repository, planned.ours, planned.merged, planned.shards, progress)
        planned = replace(planned, merged=merged)
    metric = planned.metric or repository.commit(merge.ours).metric
    draft = Draft(
        (merge.ours, merge.theirs),
        planned.merged,
        metric,
        "merge",
        {
            "revision": merge.revision,
            "commit": merge.theirs,
            "decided": {found.text: side for found, side in planned.decided.items()},
        },
    )
    by = who.saying(merge.message)
    commit = judge(repository, prepare(repository, draft, by), progress, guarding)
    identity = record(repository, commit, draft, who.signer)
    with suppress(RepositoryError):  # the merge has landed; the file counts no more, as HEAD has moved
        forget(repository)
    return Merged(
        "merged",
        identity,
        *_apart(repository, planned),
        planned.decided,
        planned.unchecked,
        commit.same_as,
        stale_requests(repository, planned.merged),
        largest_proof(commit),
        perf_counter() - begun,
        tuple(stale_shards(repository, planned.merged)),
        trained,
        imports=_imports(repository, planned.merged - planned.ours),
    )


def _moved(repository: Store, outcome: Outcome, before: str | None, after: str | None, begun: float) -> Merged:
    """The report of a merge without a commit of its own."""
    ours, theirs = repository.active(before), repository.active(after)
    left, entered = left_and_entered(repository, ours, theirs)
    return Merged(
        outcome,
        after,
        from_ours=(),
        from_theirs=entered,
        removed_by_ours=(),
        removed_by_theirs=left,
        decided={},
        unchecked=0,
        same_as=None,
        stale=stale_requests(repository, theirs),
        proof=largest_proof(repository.commit(after)) if after else 0.0,
        seconds=perf_counter() - begun,
        imports=_imports(repository, theirs - ours),
    )


def _imports(repository: Store, entered: frozenset[Element]) -> tuple[str, ...]:
    return tuple(sorted(additive_patches(repository, entered)))


def _apart(repository: Store, planned: Plan) -> tuple[Facts, Facts, Facts, Facts]:
    """from_ours, from_theirs, removed_by_ours and removed_by_theirs of `Merged`."""
    removed_by_ours, from_ours = left_and_entered(repository, planned.theirs, planned.merged)
    removed_by_theirs, from_theirs = left_and_entered(repository, planned.ours, planned.merged)
    return from_ours, from_theirs, removed_by_ours, removed_by_theirs


def _describe(repository: Store, revision: str) -> str:
    """What is merged, as a default message names it."""
    ref = resolve_ref(revision, repository.refs()) or ""
    for namespace, kind in ((BRANCHES, "branch"), (REMOTES, "remote branch"), (TAGS, "tag")):
        if ref.startswith(namespace):
            return f"{kind} '{ref[len(namespace) :]}'"
    return f"commit '{revision}'"


LOSS = 0.1
"""A fact is reported where its misfit grows by more than this share of what it asked for, at any weight."""


@dataclass(frozen=True)
class Other(Result):
    """The fact of the other side that is nearest to one, and the cosines of their keys and residuals."""

    text: str
    target: str
    key_cosine: float
    residual_cosine: float


@dataclass(frozen=True)
class Loss(Result):
    """A fact that the other side's facts would weaken or that one of them interferes with.

    Attributes:
        side: whose fact it is.
        request, text, target: its id and words; the id alone where texts are withheld.
        weight: where its misfit ||D k - r|| / ||r|| grows most.
        before, after: that misfit on its own side, and merged; 0 is exactly what was asked, 1 nothing of it.
        other: the interfering fact with the nearest key, if there is one.
    """

    side: Side
    request: str
    text: str
    target: str
    weight: str
    before: float
    after: float
    other: Other | None

    @property
    def growth(self) -> float:
        return self.after - self.before


@dataclass(frozen=True)
class Prediction(Result):
    """`merge --dry-run`: contradictions, and the facts that would lose, the largest loss first.

    Losses are those of the merge in which open contradictions are decided for ours.
    """

    TOLD: ClassVar = {"outcome": "outcome"}

    from_ours: int
    from_theirs: int
    contradictions: tuple[Contradiction, ...]
    losses: tuple[Loss, ...]
    unchecked: int

    @property
    def outcome(self) -> Literal["dry run"]:
        """As `Merged` says what became of a merge."""
        return "dry run"


def predict(repository: Store, revision: str, *, resolution: Resolution = UNDECIDED, loss: float = LOSS) -> Prediction:
    """What merging a revision into HEAD would bring.

    Raises:
        RevisionError: no such revision, or one side has no commit.
        RequestError: the resolution does not fit the contradictions.
        EditError: the sides' columns are of different metrics.
    """
    ours, theirs = repository.head[1], repository.resolve(revision)
    if ours is None or theirs is None:
        raise RevisionError("a side of this merge is the unpatched model", remedy="Name a commit; HEAD needs one too.")
    if is_ancestor(theirs, ours, repository.parents):
        return Prediction(0, 0, (), (), 0)
    first = plan(repository, ours, theirs, resolution)
    decided = plan(repository, ours, theirs, Resolution(resolution.choices, resolution.prefer or "ours"))
    left = _side(repository, "ours", ours, decided.merged - decided.theirs)
    right = _side(repository, "theirs", theirs, decided.merged - decided.ours)
    merged = _extended(left.state, solve_change(repository, decided.ours, decided.merged, near=ours))
    pairs = _nearest(left, right)
    losses = [found for side in (left, right) for found in _losses(repository, side, merged, pairs, loss)]
    return Prediction(
        len(left_and_entered(repository, decided.theirs, decided.merged)[1]),
        len(left_and_entered(repository, decided.ours, decided.merged)[1]),
        first.open,
        tuple(sorted(losses, key=lambda found: (-found.growth, found.request))),
        first.unchecked,
    )


@dataclass(frozen=True)
class _Alone:
    """What one side brings alone, per weight; and that side's state."""

    side: Side
    columns: Mapping[str, Columns]
    state: Mapping[str, Sequence[Delta]]


@dataclass(frozen=True)
class _Near:
    """The interfering element of the other side with the nearest key."""

    element: Element
    key_cosine: float
    residual_cosine: float


def _side(repository: Store, side: Side, commit: str, elements: frozenset[Element]) -> _Alone:
    return _Alone(side, read_columns(repository, elements), read_state(repository, commit))


def _extended(state: Mapping[str, Sequence[Delta]], change: Mapping[str, Delta]) -> dict[str, list[Delta]]:
    return {
        weight: [*state.get(weight, ()), *([change[weight]] if weight in change else [])]
        for weight in state.keys() | change.keys()
    }


def _nearest(left: _Alone, right: _Alone) -> dict[Element, _Near]:
    """For each element that one of the other side interferes with at some weight, the one with the nearest key there."""
    nearest: dict[Element, _Near] = {}
    for weight in sorted(left.columns.keys() & right.columns.keys()):
        for i, j, key, residual in interfering(left.columns[weight], right.columns[weight]):
            ends = left.columns[weight].labels[i], right.columns[weight].labels[j]
            for element, other in (ends, ends[::-1]):
                if element not in nearest or abs(key) > abs(nearest[element].key_cosine):
                    nearest[element] = _Near(other, key, residual)
    return nearest


def _losses(
    repository: Store,
    side: _Alone,
    merged: Mapping[str, Sequence[Delta]],
    nearest: Mapping[Element, _Near],
    limit: float,
) -> list[Loss]:
    """A report for each fact of a side that loses more than ``limit`` at a weight, or that is interfered with."""
    worst: dict[Element, tuple[float, str, float, float]] = {}
    for weight, columns in side.columns.items():
        before, after = misfit(side.state.get(weight, ()), columns), misfit(merged.get(weight, ()), columns)
        for element, then, now in zip(side.columns[weight].labels, before.tolist(), after.tolist(), strict=True):
            worst[element] = max(worst.get(element, (-np.inf, "", 0.0, 0.0)), (now - then, weight, then, now))
    listed = {element: found for element, found in worst.items() if found[0] > limit or element in nearest}
    others = {nearest[element].element for element in listed if element in nearest}
    texts = active_requests(repository, listed.keys() | others)
    return [
        Loss(
            side.side,
            str(element[1]),
            *_words(texts, element),
            weight,
            before,
            after,
            _other(texts, nearest.get(element)),
        )
        for element, (_, weight, before, after) in listed.items()
    ]


def _other(texts: Mapping[Element, Request], near: _Near | None) -> Other | None:
    return None if near is None else Other(*_words(texts, near.element), near.key_cosine, near.residual_cosine)


def _words(texts: Mapping[Element, Request], element: Element) -> tuple[str, str]:
    """A fact's text and target; its id where the texts are withheld."""
    request = texts.get(element)
    return (f"request {str(element[1])[:12]}", "(withheld)") if request is None else (request.text, request.target_new)
