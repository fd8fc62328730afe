"""Verbs that look at history: `log`, `show`, `status`. They read JSON only: no torch, no NumPy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Final

from patchhub.errors import RevisionError
from patchhub.objects import Commit, Element, Patch, Request
from patchhub.porcelain.scores import Noted, measured_norms, noted_commits, read_note
from patchhub.porcelain.trust.signing import Vouched, allowed_signers, signatures_by_commit, vouched
from patchhub.results import Result, in_full, told
from patchhub.sets.elements import active_requests, count_changed, distinct, imports_of, left_and_entered
from patchhub.sets.merging import StoppedMerge, stopped_merge
from patchhub.sets.shards import active_shards, shard_record, shards_at, stale_shards
from patchhub.store import lookup, states
from patchhub.store.lookup import Selection
from patchhub.store.revisions import NOTES, REMOTES, SYMBOLIC, follow
from patchhub.store.states import Parents, Rank, solved_commit
from patchhub.store.store import Standing, Store


@dataclass(frozen=True)
class Divergence(Result):
    """A branch beside a remote's branch of its name, as that was when it was last fetched or pushed.

    Attributes:
        branch: the remote's, as ``origin/main``.
        ahead: commits of the branch here that the remote's does not have.
        behind: commits of the remote's that the branch here does not have.
    """

    branch: str
    ahead: int
    behind: int


def divergences(repository: Store) -> tuple[Divergence, ...]:
    """One for each remote that has a branch of the current branch's name, by name of the remote; none where HEAD is detached."""
    branch, head = repository.head
    here = [] if head is None else [head]
    return tuple(
        Divergence(ref[len(REMOTES) :], *states.apart(here, [target], repository.parents, repository.rank))
        for ref, target in sorted(repository.refs().items())
        if ref.startswith(REMOTES) and ref[len(REMOTES) :].partition("/")[2] == branch
    )


EVERYTHING: Final = Selection()
"""The selection that leaves no commit out."""
_DIGITS: Final = 4  # of an id, at least
_LISTED: Final = 10


@dataclass(frozen=True)
class Size(Result):
    """How much a commit changes: bytes of its delta, its keyframe and the shards it brings, and the weight it changes most.

    ``ratio`` is the Frobenius norm of that weight's change over that of the base's weight; weight and ratio are None where
    no weight changes.
    """

    delta_bytes: int
    keyframe_bytes: int
    weight: str | None
    ratio: float | None
    shard_bytes: int = 0


@dataclass(frozen=True)
class Revision(Result):
    """What a revision name leads to. Its length is the number of its facts, over which it iterates.

    Attributes:
        id, commit: the commit; None for the unpatched model.
        facts: its active facts whose texts are here.
    """

    id: str | None
    commit: Commit | None = field(metadata=told(inline=True, by=lambda commit: _head_lines(commit) if commit else {}))
    facts: tuple[Request, ...] = field(metadata=told(by=in_full))

    @property
    def message(self) -> str:
        return self.commit.message if self.commit else ""

    @property
    def author(self) -> str | None:
        return self.commit.author if self.commit else None

    @property
    def time(self) -> str | None:
        """The instant of the commit, in UTC."""
        return self.commit.time if self.commit else None

    @property
    def parents(self) -> tuple[str, ...]:
        return self.commit.parents if self.commit else ()

    def __len__(self) -> int:
        return len(self.facts)

    def __iter__(self) -> Iterator[Request]:
        return iter(self.facts)

    def words(self) -> str:
        title = self.message.partition("\n")[0]
        return f"{self.id[:12] if self.id else 'the unpatched model'} {title} ({len(self.facts)} facts)"


def revision(repository: Store, name: str) -> Revision:
    """What a name leads to; `RevisionError` if there is no such revision."""
    identity = repository.resolve(name)
    facts = distinct(active_requests(repository, repository.active(identity)))
    return Revision(identity, repository.commit(identity) if identity else None, tuple(facts))


def _head_lines(commit: Commit) -> dict[str, Any]:
    return {name: getattr(commit, name) for name in ("parents", "author", "time", "message", "same_as")}


@dataclass(frozen=True)
class Entry(Result):
    """One commit as `log` and `show` present it.

    Attributes:
        refs: names that point to it.
        added, removed: how many facts it wrote and took back.
        active: the number of active facts.
        imported, active_imports: imported changes that it brought, and that are active.
        shown_parents: its parents in a drawing of the log: where commits are left out, the nearest ones that are not.
        size: how much it changes, if that was asked for.
        scores: what is noted about it.
        signatures: who signed and approved it, if that was asked for.
    """

    id: str
    commit: Commit = field(metadata=told(inline=True, by=_head_lines))
    refs: tuple[str, ...]
    added: int
    removed: int
    active: int
    shown_parents: tuple[str, ...] = field(default=(), metadata=told(omit=True))
    size: Size | None = field(default=None, metadata=told(optional=True))
    scores: tuple[Noted, ...] = field(default=(), metadata=told(optional=True))
    signatures: tuple[Vouched, ...] | None = field(default=None, metadata=told(missing=True))
    imported: int = 0
    active_imports: int = 0

    def words(self) -> str:
        refs = f" ({', '.join(self.refs)})" if self.refs else ""
        title = self.commit.message.partition("\n")[0]
        return f"{self.id[:12]}{refs} {title} +{self.added} -{self.removed} ({self.active} active)"


def _patches(patches: Mapping[str, Patch]) -> dict[str, Any]:
    return {
        identity: {
            **{name: getattr(patch, name) for name in ("kind", "method", "metric", "settings", "weights")},
            "requests": len(patch.requests),
        }
        for identity, patch in patches.items()
    }


@dataclass(frozen=True)
class Shown(Result):
    """`show`: a commit with its facts and what was measured when it was made.

    Attributes:
        standing: whether its weights are known here to be those of its facts.
    """

    TOLD: ClassVar = {"check": "check"}

    entry: Entry = field(metadata=told(inline=True))
    patches: Mapping[str, Patch] = field(metadata=told(by=_patches))
    added: tuple[Request, ...] = field(metadata=told(name="facts_added", by=in_full))
    removed: tuple[Request, ...] = field(metadata=told(name="facts_removed", by=in_full))
    standing: Standing

    @property
    def check(self) -> Mapping[str, Any]:
        """What was measured when the commit was made."""
        return self.entry.commit.check

    def words(self) -> str:
        listed = [f"\n  + {request.text} {request.target_new}" for request in self.added]
        listed += [f"\n  - {request.text} {request.target_new}" for request in self.removed]
        return self.entry.words() + "".join(listed[:_LISTED]) + ("\n  ..." if len(listed) > _LISTED else "")


@dataclass(frozen=True)
class ActiveShard(Result):
    """A shard as `status` presents it: what it holds and where, and whether its threshold is of the present weights."""

    patch: str
    number: int
    facts: int
    weight: str
    threshold: float
    stale: bool
    tensor_bytes: int


def _without_weights(base: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in base.items() if key not in ("weights", "beside")}


@dataclass(frozen=True)
class Status(Result):
    """`status`: where the repository is."""

    TOLD: ClassVar = {"active": "active"}

    store: Path
    branch: str | None
    head: Entry | None
    base: Mapping[str, Any] = field(metadata=told(by=_without_weights))
    base_found: bool
    metric: str | None
    delta_bytes: int
    last_operation: str | None
    stopped_merge: StoppedMerge | None
    shards: tuple[ActiveShard, ...] = ()
    remotes: tuple[Divergence, ...] = ()

    @property
    def active(self) -> int:
        """How many facts are active."""
        return self.head.active if self.head else 0

    def words(self) -> str:
        place = f"on {self.branch}" if self.branch else "on no branch"
        stopped = f"; the merge of {self.stopped_merge.revision} is stopped" if self.stopped_merge else ""
        return f"{place}, {self.head.words() if self.head else 'no commits yet'}{stopped}"


def log(
    repository: Store,
    revision: str = "HEAD",
    *,
    limit: int | None = None,
    everything: bool = False,
    only: Selection = EVERYTHING,
    first_parent: bool = False,
    sizes: bool = False,
    signatures: bool = False,
    allowed: Path | None = None,
) -> Iterator[Entry]:
    """Commits reachable from a revision, newest first, every child before its parents; none when there is no commit yet.

    Args:
        revision: a revision; ``FROM..TO``: what is below TO and not below FROM; or ``ONE...OTHER``: what is below one of them alone.
        limit: at most this many.
        everything: below every branch, tag and remote branch, and HEAD, instead.
        only: which commits.
        first_parent: follow first parents alone.
        sizes: say how much each commit changes.
        signatures: check who signed and approved each commit.
        allowed: the file of allowed signers; None: the config's.

    Raises:
        RevisionError: no such revision.
        SettingsError: the file of allowed signers is not there.
    """
    refs = repository.refs()
    names, notes = _names(refs), noted_commits(refs)
    starts, left_out = _ends(repository, revision)
    if everything:
        starts = sorted({target for ref in refs if not ref.startswith(NOTES) and (target := follow(ref, refs))})
    wanted = lookup.selected_commits(repository, only)
    every, rank = _graph(repository, whole=wanted is not None)
    imports = imports_of(repository)
    keys = allowed_signers(repository.config, allowed) if signatures else None
    signed = signatures_by_commit(refs) if signatures else {}
    parents: Parents = every if not first_parent else lambda commit: every(commit)[:1]
    hidden = states.ancestors(left_out, every) if left_out else frozenset()
    walk = (c for c in states.walk(starts, parents, rank) if c not in hidden and (wanted is None or c in wanted))
    for identity in islice(walk, limit):
        commit = repository.commit(identity)
        shown = tuple(parents(identity)) if wanted is None else nearest(parents(identity), wanted, parents)
        yield replace(
            _entry(repository, identity, commit, names, imports),
            shown_parents=shown,
            size=_size(repository, commit) if sizes else None,
            scores=_scores(repository, notes.get(identity, ())),
            signatures=tuple(vouched(repository, signed.get(identity, ()), keys)) if signatures else None,
        )


def _ends(repository: Store, revision: str) -> tuple[list[str], list[str]]:
    """Where a log begins, and what is left out with all that is below it."""
    if "..." in revision:
        one, other = (side or "HEAD" for side in revision.split("...", 1))
        sides = {repository.resolve(one), repository.resolve(other)} - {None}
        return sorted(map(str, sides)), merge_bases(repository, one, other)
    below, _, tip = revision.rpartition("..")
    start, left_out = repository.resolve(tip or "HEAD"), repository.resolve(below) if below else None
    return [start] if start else [], [left_out] if left_out else []


def _graph(repository: Store, *, whole: bool) -> tuple[Parents, Rank]:
    """Parents and ranks, asked for one by one or, with `whole`, read at once."""
    if not whole:
        return repository.parents, repository.rank
    known = lookup.whole_graph(repository)
    return (lambda commit: known[commit][1]), (lambda commit: known[commit][0])


def nearest(starts: Sequence[str], wanted: AbstractSet[str], parents: Parents) -> tuple[str, ...]:
    """The first wanted commits on every way back from `starts`, in the order in which they are found."""
    found: dict[str, None] = {}
    seen = set(starts)
    waiting = list(reversed(starts))
    while waiting:
        commit = waiting.pop()
        if commit in wanted:
            found[commit] = None
            continue
        fresh = [parent for parent in parents(commit) if parent not in seen]
        seen.update(fresh)
        waiting.extend(reversed(fresh))
    return tuple(found)


def merge_bases(repository: Store, one: str, other: str) -> list[str]:
    """The best common ancestors of two revisions; none where they only share the unpatched model.

    Raises:
        RevisionError: no such revision.
    """
    left, right = repository.resolve(one), repository.resolve(other)
    known = lookup.whole_graph(repository)
    return states.merge_bases(left, right, lambda commit: known[commit][1]) if left and right else []


def show(repository: Store, revision: str = "HEAD") -> Shown:
    """One commit with its facts.

    Raises:
        RevisionError: no such revision, or it is the unpatched model or a patch.
    """
    try:
        identity = repository.resolve(revision)
    except RevisionError:
        _refuse_patch(repository, revision)
        raise
    if identity is None:
        raise RevisionError(
            f"{revision} is the unpatched model; there is no commit to show",
            remedy="Commit some facts first: `patchhub commit FILE -m TEXT`.",
        )
    commit = repository.commit(identity)
    refs = repository.refs()
    noted = noted_commits(refs).get(identity, ())
    patches = {patch: repository.patch(patch) for patch, _ in sorted(commit.added | commit.removed, key=str)}
    removed, added = left_and_entered(repository, commit.removed, commit.added)
    return Shown(
        replace(
            _entry(repository, identity, commit, _names(refs), imports_of(repository)),
            size=_size(repository, commit),
            scores=_scores(repository, noted),
        ),
        patches,
        added,
        removed,
        repository.standing(identity),
    )


def _refuse_patch(repository: Store, name: str) -> None:
    """Raise `RevisionError` where a name is the id of one patch, or a prefix of it: it says which commit brought that."""
    found = lookup.patches_named(repository, name) if len(name) >= _DIGITS else {}
    if len(found) == 1:
        ((patch, commit),) = found.items()
        raise RevisionError(
            f"{name} is a patch, not a commit",
            remedy=f"Commit {commit[:12]} brought it: `patchhub show {commit[:12]}`.",
            patch=patch,
            commit=commit,
        ) from None


def status(repository: Store) -> Status:
    """Where HEAD is, also beside the remotes, what is active, and whether the base is where it was."""
    branch, head = repository.head
    names = _names(repository.refs())
    entry = _entry(repository, head, repository.commit(head), names, imports_of(repository)) if head else None
    base: Mapping[str, Any] = {**repository.config.base, "path": repository.config.base_place(repository.root)}
    last = next(iter(repository.operations()), None)
    return Status(
        repository.root,
        branch,
        entry,
        base,
        Path(base["path"]).is_dir() or base["revision"] is not None,
        repository.config.recording.metric if repository.config.recording else None,
        _state_bytes(repository, repository.state(head)),
        last[1].command if last else None,
        stopped_merge(repository),
        _shards(repository, head),
        divergences(repository),
    )


def _state_bytes(repository: Store, state: Sequence[str]) -> int:
    """Bytes that are read for a state: delta blobs, or the columns that it is solved from."""
    blobs = {part for part in state if solved_commit(part) is None}
    for commit in filter(None, map(solved_commit, state)):
        patches = {patch for patch, request in repository.active(commit) if request is not None}
        blobs |= {repository.patch(patch).tensors for patch in patches}
    return sum(map(repository.objects.size, blobs))


def _shards(repository: Store, head: str | None) -> tuple[ActiveShard, ...]:
    shards = shards_at(repository, head)
    stale = set(stale_shards(repository, repository.active(head))) if shards else set()
    return tuple(
        ActiveShard(
            identity,
            shard_record(patch).number,
            len(patch.requests),
            next(iter(patch.weights)),
            shard_record(patch).routing["threshold"],
            identity in stale,
            repository.objects.size(patch.tensors),
        )
        for identity, patch in shards.items()
    )


def _names(refs: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """For each commit the names that point to it, as `log` shows them."""
    head = refs.get("HEAD", "")
    names: dict[str, list[str]] = {}
    for ref, target in sorted(refs.items()):
        if ref == "HEAD":
            if not target.startswith(SYMBOLIC):
                names.setdefault(target, []).append("HEAD")
            continue
        short = ref.removeprefix("refs/heads/").removeprefix("refs/remotes/")
        short = f"tag: {ref.removeprefix('refs/tags/')}" if ref.startswith("refs/tags/") else short
        names.setdefault(target, []).append(f"HEAD -> {short}" if head == SYMBOLIC + ref else short)
    return {target: tuple(found) for target, found in names.items()}


def _entry(
    repository: Store,
    identity: str,
    commit: Commit,
    names: Mapping[str, tuple[str, ...]],
    imports: AbstractSet[Element],
) -> Entry:
    removed, added = count_changed(repository, commit.removed - imports, commit.added - imports)
    whole = lookup.whole_patches(repository, identity) if imports else []
    active_imports = sum((patch, None) in imports for patch in whole)
    return Entry(
        identity,
        commit,
        names.get(identity, ()),
        added,
        removed,
        repository.active_count(identity) - active_imports,
        imported=len(commit.added & imports),
        active_imports=active_imports,
    )


def _scores(repository: Store, notes: Sequence[str]) -> tuple[Noted, ...]:
    return tuple(read_note(identity, repository.note(identity)) for identity in notes)


def _size(repository: Store, commit: Commit) -> Size:
    delta, keyframe = (
        repository.objects.size(blob) if blob is not None else 0
        for blob in (commit.tensors, commit.keyframe.tensors if commit.keyframe else None)
    )
    norms = measured_norms(commit.check)
    ratios = {weight: norm["change"] / (norm["base"] or 1.0) for weight, norm in norms.items()}
    largest = max(ratios, key=ratios.__getitem__, default=None)
    ratio = None if largest is None else ratios[largest]
    shards = active_shards(repository, commit.added).values()
    shard_bytes = sum(repository.objects.size(patch.tensors) for patch in shards)
    return Size(delta, keyframe, largest if ratio else None, ratio or None, shard_bytes)
