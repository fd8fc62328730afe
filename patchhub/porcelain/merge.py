"""`merge`: join two histories. The merged set is three-way per request, its weights are solved from recorded columns.

NumPy only; but a contradiction that is decided against a fact of a shard trains that shard again, and loads the base for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from time import perf_counter
from typing import Any, Literal, TypeAlias

from patchhub.errors import RepositoryError
from patchhub.objects import Element, Request
from patchhub.porcelain.change import largest_proof
from patchhub.porcelain.contradictions import Contradiction, Decided, Resolution, Side, decide, find
from patchhub.porcelain.facts import left_and_entered
from patchhub.porcelain.judging import GUARDED, Guarding
from patchhub.porcelain.progress import Progress, Silent
from patchhub.porcelain.recorded import one_metric, stale_requests
from patchhub.porcelain.refs import current_ref
from patchhub.porcelain.reshape import ShardPlan, shrink
from patchhub.porcelain.shards import stale_shards, superseded
from patchhub.porcelain.snapshot import Draft, Stamp, snapshot
from patchhub.porcelain.stopped_merge import StoppedMerge, forget, keep, refuse_stopped, stopped_merge
from patchhub.porcelain.three_way import base_set, three_way
from patchhub.store.graph import is_ancestor
from patchhub.store.repository import Repository
from patchhub.store.revisions import BRANCHES, REMOTES, TAGS, resolve_ref

Outcome = Literal["up to date", "fast-forward", "merged"]

Facts: TypeAlias = tuple[Request, ...]

UNDECIDED = Resolution()


@dataclass(frozen=True)
class Merged:
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
    """

    outcome: Outcome
    commit: str | None
    from_ours: tuple[Request, ...]
    from_theirs: tuple[Request, ...]
    removed_by_ours: tuple[Request, ...]
    removed_by_theirs: tuple[Request, ...]
    decided: Mapping[Contradiction, Side]
    unchecked: int
    same_as: str | None
    stale: int
    proof: float
    seconds: float
    stale_shards: tuple[str, ...] = ()
    trained: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        names = ("from_ours", "from_theirs", "removed_by_ours", "removed_by_theirs")
        return {
            "outcome": self.outcome,
            "commit": self.commit,
            **{name: [request.id for request in getattr(self, name)] for name in names},
            "decided": [{**found.to_json(), "stays": side} for found, side in self.decided.items()],
            "unchecked": self.unchecked,
            "same_as": self.same_as,
            "stale": self.stale,
            "proof": self.proof,
            "seconds": self.seconds,
            "stale_shards": list(self.stale_shards),
            "trained": list(self.trained),
        }


@dataclass(frozen=True)
class Stopped:
    """A merge that wrote nothing but ``merge.json``, because contradictions are open."""

    merge: StoppedMerge
    open: tuple[Contradiction, ...]
    unchecked: int

    def to_json(self) -> dict[str, Any]:
        return {
            "outcome": "stopped",
            **self.merge.to_json(),
            "contradictions": [found.to_json() for found in self.open],
            "unchecked": self.unchecked,
        }


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
    repository: Repository,
    revision: str,
    stamp: Stamp,
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
        stamp: an empty message stands for "Merge branch 'NAME'".
        guarding: how the merged state is checked.

    Raises:
        RevisionError: no such revision.
        RequestError: the resolution does not fit the contradictions.
        RepositoryError: another merge waits on this commit.
        EditError: the sides' columns are of different metrics.
        GuardError: a check of the merged state failed; nothing was committed.
    """
    begun = perf_counter()
    refuse_stopped(repository)
    _, ours = repository.head
    theirs = repository.resolve(revision)
    parents = cache(repository.parents)
    if theirs is None or (ours is not None and is_ancestor(theirs, ours, parents)):
        return _moved(repository, "up to date", ours, ours, begun)
    if ours is None or (fast_forward and is_ancestor(ours, theirs, parents)):
        changes = {current_ref(repository): (ours, theirs)}
        arguments = {"revision": revision, "commit": theirs}
        repository.move_refs(changes, command="merge", arguments=arguments, author=stamp.author, time=stamp.time)
        return _moved(repository, "fast-forward", ours, theirs, begun)
    message = stamp.message or f"Merge {_describe(repository, revision)}"
    stopped = StoppedMerge(ours, theirs, revision, message)
    return _finish(repository, stopped, stamp, resolution, guarding, progress or Silent(), begun)


def continue_merge(
    repository: Repository,
    stamp: Stamp,
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
    return _finish(repository, waiting, stamp, resolution, guarding, progress or Silent(), begun)


def abort_merge(repository: Repository) -> None:
    """Forget a stopped merge; no ref moved when it stopped, so none moves now.

    Raises:
        RepositoryError: there is none.
    """
    if not forget(repository):
        raise RepositoryError("there is no stopped merge to abort", remedy="Begin one with `patchhub merge REV`.")


def plan(repository: Repository, ours: str, theirs: str, resolution: Resolution) -> Plan:
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
    repository: Repository,
    merge: StoppedMerge,
    stamp: Stamp,
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
        from patchhub.porcelain.edit_shard import train_reshaped

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
    by = Stamp(stamp.author, stamp.time, stamp.message or merge.message)
    identity = snapshot(repository, draft, by, judge=guarding.judge(repository, progress))
    forget(repository)
    commit = repository.commit(identity)
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
    )


def _moved(repository: Repository, outcome: Outcome, before: str | None, after: str | None, begun: float) -> Merged:
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
    )


def _apart(repository: Repository, planned: Plan) -> tuple[Facts, Facts, Facts, Facts]:
    """from_ours, from_theirs, removed_by_ours and removed_by_theirs of `Merged`."""
    removed_by_ours, from_ours = left_and_entered(repository, planned.theirs, planned.merged)
    removed_by_theirs, from_theirs = left_and_entered(repository, planned.ours, planned.merged)
    return from_ours, from_theirs, removed_by_ours, removed_by_theirs


def _describe(repository: Repository, revision: str) -> str:
    """What is merged, as a default message names it."""
    ref = resolve_ref(revision, repository.refs()) or ""
    for namespace, kind in ((BRANCHES, "branch"), (REMOTES, "remote branch"), (TAGS, "tag")):
        if ref.startswith(namespace):
            return f"{kind} '{ref[len(namespace) :]}'"
    return f"commit '{revision}'"
