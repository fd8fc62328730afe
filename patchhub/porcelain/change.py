"""Verbs that carry a commit's change of facts elsewhere: `revert` backwards, `cherry-pick` forwards, `squash` together. No model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from types import MappingProxyType
from typing import Any, Literal

from patchhub.editing.requests import contradiction_error, find_contradictions
from patchhub.errors import RequestError, RevisionError
from patchhub.objects import Commit, Element, Request, set_digest
from patchhub.porcelain.scores import numbers
from patchhub.progress import Progress, Silent
from patchhub.results import Result
from patchhub.sets.commits import Draft, begin, prepare, record
from patchhub.sets.elements import (
    Change,
    active_requests,
    distinct,
    facts_of,
    left_and_entered,
    one_metric,
    recorded_again,
    selected,
    stale_requests,
)
from patchhub.sets.shards import ShardPlan, plan_shards, shards_among, shrink, stale_shards, without_shards
from patchhub.store import states
from patchhub.store.database import JOINS
from patchhub.store.revisions import REMOTES
from patchhub.store.store import Store
from patchhub.who import Who
from patchhub.worktree.judging import GUARDED, Guarding, judge

OnConflict = Literal["refuse", "replace"]


@dataclass(frozen=True)
class Changed(Result):
    """What `revert` or `cherry-pick` did.

    Attributes:
        commit: the new commit.
        removed, restored: facts that are no longer active, and that are active now.
        skipped: facts that were as asked already.
        same_as: the earlier commit whose weights these are bit for bit, if the set was seen before.
        stale: active facts that were recorded on a state that is no longer below them.
        proof: the largest relative residual of the joint solution over the weights.
        trained: the shards that were trained again, since only some of their facts changed.
        stale_shards: active shards whose threshold was measured on other weights.
    """

    commit: str
    removed: tuple[Request, ...]
    restored: tuple[Request, ...]
    skipped: tuple[Request, ...]
    same_as: str | None
    stale: int
    proof: float
    trained: tuple[str, ...] = ()
    stale_shards: tuple[str, ...] = ()

    def words(self) -> str:
        weights = f"the weights of {self.same_as[:12]}" if self.same_as else f"proof {self.proof:.1e}"
        return f"{self.commit[:12]}: {len(self.removed)} removed, {len(self.restored)} restored, {weights}"


def revert(
    repository: Store,
    revision: str | None,
    who: Who,
    *,
    subjects: Sequence[str] = (),
    requests: Sequence[str] = (),
    progress: Progress | None = None,
    guarding: Guarding = GUARDED,
) -> Changed:
    """Undo what a commit changed against its first parent, wherever it is in history, as a new commit on HEAD.

    A shard that the commit brought gives way to the one it continued. Where later commits continued it, or where only some facts are
    named, it is trained again on the facts that stay, from their stored texts.

    Args:
        revision: the commit; None to remove facts from the active set, whichever commits they are of.
        subjects: only facts about these subjects.
        requests: only these facts, by request id or a prefix of one. With a commit that gave a fact another target, both its
            old and its new request stand for that fact.
        guarding: how the new state is checked.

    Raises:
        RevisionError: no such commit, or nothing of it is left to revert.
        RequestError: no fact is named, or one that is not there.
        ContradictionError: a fact that would come back contradicts one that is active now.
        RepositoryError: a shard would have to be trained again and its texts are withheld.
        GuardError: a check of the new state failed; nothing was committed.
    """
    arguments: dict[str, Any] = {"subjects": list(subjects), "requests": list(requests)}
    if revision is None:
        change = Change(repository.active(repository.head[1]), frozenset())
        where, title = "active facts", ""
    else:
        identity, target = _commit(repository, revision)
        arguments = {"commit": identity, **arguments}
        change = Change(target.added, target.removed)
        where, title = f"facts of {identity[:12]}", _title(identity, target)
    if subjects or requests:
        change = selected(repository, change, subjects, requests, where)
    elif revision is None:
        raise RequestError("nothing is named to revert", remedy="Name a commit, --subject or --request.")
    who = who.saying(f"Revert {_words(repository, change, title, bool(subjects or requests))}")
    return _carry_out(repository, change, {}, who, "revert", arguments, progress or Silent(), guarding)


def cherry_pick(
    repository: Store,
    revision: str,
    who: Who,
    *,
    on_conflict: OnConflict = "refuse",
    progress: Progress | None = None,
    guarding: Guarding = GUARDED,
) -> Changed:
    """Do what a commit changed against its first parent once more, as a new commit on HEAD, from its recorded columns.

    A shard comes as a whole, with the facts that earlier commits wrote into it.

    Args:
        on_conflict: what a contradiction with an active fact does: refuse, or replace the active fact.
        guarding: how the new state is checked.

    Raises:
        RevisionError: no such commit, or all of its change is there already.
        ContradictionError: a fact contradicts an active one.
        EditError: its columns are of another metric.
        GuardError: a check of the new state failed; nothing was committed.
    """
    identity, target = _commit(repository, revision)
    change = Change(target.removed, target.added)
    forgotten: dict[str, frozenset[str]] = {}
    if on_conflict == "replace":
        change, forgotten = _replacing(repository, change)
    arguments = {"commit": identity}
    who = who.saying(target.message)
    return _carry_out(repository, change, forgotten, who, "cherry-pick", arguments, progress or Silent(), guarding)


def _replacing(repository: Store, change: Change) -> tuple[Change, dict[str, frozenset[str]]]:
    """A change that also removes what its facts contradict: columns, and per shard the ids of facts."""
    active = repository.active(repository.head[1])
    staying = active_requests(repository, active - change.remove)
    said: dict[tuple[str, str], set[str]] = {}
    for request in active_requests(repository, change.restore).values():
        said.setdefault((request.prompt, request.subject), set()).add(request.target_new)
    places = {
        place
        for place, request in staying.items()
        if said.get((request.prompt, request.subject), {request.target_new}) != {request.target_new}
    }
    shards = {patch for patch, _ in places - active}
    forgotten = {shard: frozenset(str(request) for patch, request in places if patch == shard) for shard in shards}
    return Change(change.remove | (places & active), change.restore), forgotten


def largest_proof(commit: Commit) -> float:
    """The largest of a commit's proofs over its weights, 0 for the unpatched model."""
    return max(map(float, numbers(commit.check, "proof")), default=0.0)


def _carry_out(
    repository: Store,
    change: Change,
    forgotten: Mapping[str, frozenset[str]],
    who: Who,
    command: str,
    arguments: Mapping[str, Any],
    progress: Progress,
    guarding: Guarding,
) -> Changed:
    """Commit the active set with a change of it; what is already as the change wants it is skipped."""
    head = begin(repository)
    before = repository.active(head)
    shards = _shard_change(repository, before, change) + shrink(repository, forgotten)
    columns = Change(without_shards(repository, change.remove), without_shards(repository, change.restore))
    removed = columns.remove & before
    removed |= recorded_again(repository, columns.remove - removed, before)
    staying = {request for _, request in before - removed if request is not None}
    restored = frozenset(element for element in columns.restore - before if element[1] not in staying)
    after = (before - removed - shards.remove) | restored | shards.restore
    if after == before and not shards.train:
        raise RevisionError(
            f"nothing to {command}: {_as_it_is(repository, change)}",
            remedy="`patchhub search WORDS` says which commits added and removed a fact.",
        )
    metric = one_metric(repository, after) or (repository.commit(head).metric if head else None)
    _refuse_contradictions(repository, head, before, after, shards)
    trained: tuple[str, ...] = ()
    if shards.train:
        from patchhub.worktree.shards import train_reshaped

        after, trained = train_reshaped(repository, before, after, shards, progress)
    draft = Draft((head,) if head else (), after, metric, command, arguments)
    commit = judge(repository, prepare(repository, draft, who), progress, guarding)
    identity = record(repository, commit, draft, who.signer)
    left, entered = left_and_entered(repository, before, after)
    again = {request for _, request in removed - columns.remove}
    skipped = {e for e in columns.remove - removed if e[1] not in again} | (columns.restore - restored)
    return Changed(
        commit=identity,
        removed=left,
        restored=entered,
        skipped=distinct(active_requests(repository, skipped)) + _named(repository, change, shards.skipped),
        same_as=commit.same_as,
        stale=stale_requests(repository, after),
        proof=largest_proof(commit),
        trained=trained,
        stale_shards=tuple(stale_shards(repository, after)),
    )


def _as_it_is(repository: Store, change: Change) -> str:
    """Why a change changes nothing: what it would take away is not active, what it would bring is."""
    parts = []
    for elements, state in ((change.remove, "not active"), (change.restore, "active already")):
        facts = distinct(active_requests(repository, elements))
        if facts:
            others = f" and {len(facts) - 1} more are" if facts[1:] else " is"
            parts.append(f"“{facts[0].text} {facts[0].target_new}”{others} {state}")
    return ", ".join(parts) or "its change is in effect already, or taken back already"


def _shard_change(repository: Store, active: frozenset[Element], change: Change) -> ShardPlan:
    leaving, entering = shards_among(repository, change.remove), shards_among(repository, change.restore)
    return plan_shards(repository, active, leaving, entering, change.chosen)


def _refuse_contradictions(
    repository: Store, head: str | None, before: frozenset[Element], after: frozenset[Element], shards: ShardPlan
) -> None:
    """Refuse what would come in beside a fact that says otherwise, unless the two were active together below HEAD before."""
    entering = dict(active_requests(repository, after - before))
    staying = active_requests(repository, after & before)
    for reshape in shards.train:
        for request in reshape.texts(repository).values():
            if (reshape.shard, request.id) not in staying:
                entering[reshape.shard, request.id] = request
        forgotten = set(repository.patch(reshape.shard).requests) - reshape.facts
        staying = {p: request for p, request in staying.items() if p[0] != reshape.shard or p[1] not in forgotten}
    here = {request.id for request in staying.values()}
    pairs = find_contradictions(entering.values(), staying.values())
    found = [pair for pair in pairs if pair.earlier.id in here]
    seen = found and head and not shards.train and repository.find_same_set(set_digest(after), head)
    if found and not seen:
        raise contradiction_error(found, active=True)


def _named(repository: Store, change: Change, requests: frozenset[str]) -> tuple[Request, ...]:
    texts = active_requests(repository, change.remove | change.restore)
    return distinct({place: request for place, request in texts.items() if request.id in requests})


def _commit(repository: Store, revision: str) -> tuple[str, Commit]:
    identity = repository.resolve(revision)
    if identity is None:
        raise RevisionError(f"{revision} is the unpatched model; it changes nothing", remedy="Name a commit.")
    return identity, repository.commit(identity)


def _title(identity: str, commit: Commit) -> str:
    return f"“{next(iter(commit.message.splitlines()), '') or identity[:12]}”"


def _words(repository: Store, change: Change, title: str, partly: bool) -> str:
    """What is reverted: a commit, some facts of one, or some facts."""
    if not partly:
        return title
    requests = facts_of(repository, change)
    texts, subjects = {request.text for request in requests}, {request.subject for request in requests}
    if len(texts) == 1:
        facts = f"“{texts.pop()}”"
    else:
        facts = f"{len(requests)} facts about {subjects.pop()}" if len(subjects) == 1 else f"{len(requests)} facts"
    return f"{facts} of {title}" if title else facts


@dataclass(frozen=True)
class Squashed(Result):
    """What `squash` did.

    Attributes:
        commit: the new commit.
        replaced: the commits that it stands for, newest first, along first parents.
        active: how many facts are active.
        proof: the largest relative residual of the joint solution over the weights.
    """

    commit: str
    replaced: tuple[str, ...]
    active: int
    proof: float


def squash(
    repository: Store, span: str, who: Who, progress: Progress | None = None, *, guarding: Guarding = GUARDED
) -> Squashed:
    """Replace the commits of `span` by one and move the current branch to it.

    Args:
        span: a number, the last so many commits along first parents; or ``FROM..TO``, those after FROM up to TO, which must be
            HEAD (or left out).
        who: without a message, the messages of the squashed commits are joined.
        guarding: how the new state is checked.

    Raises:
        RevisionError: the span is not at least two commits that end at HEAD.
        RepositoryError: a stopped merge waits on HEAD.
        GuardError: a check of the new state failed; nothing was committed.
    """
    head = begin(repository)
    replaced, parent = _span(repository, span, head)
    who = who.saying("\n\n".join(repository.commit(commit).message for commit in reversed(replaced)))
    tip = repository.commit(replaced[0])
    draft = Draft((parent,) if parent else (), repository.active(replaced[0]), tip.metric, "squash", {})
    commit = judge(repository, prepare(repository, draft, who), progress or Silent(), guarding)
    identity = _put_in_place(repository, commit, draft, replaced, who)
    proofs = [float(value) for value in commit.check["proof"].values()]
    return Squashed(identity, tuple(replaced), repository.active_count(identity), max(proofs, default=0.0))


def _put_in_place(
    repository: Store,
    commit: Commit,
    draft: Draft,
    replaced: Sequence[str],
    who: Who,
    arguments: Mapping[str, Any] = MappingProxyType({}),
) -> str:
    """Store a commit, signed where that is asked for, and put it where the newest of the replaced ones is; returns its id."""
    named = replace(draft, arguments={"commits": list(replaced), **arguments})
    return record(repository, commit, named, who.signer, instead_of=replaced[0])


def amend(repository: Store, who: Who, progress: Progress, amended: str, *, guarding: Guarding = GUARDED) -> str:
    """Put one commit in the place of ``amended`` and of what was committed onto it since; returns its id.

    Where nothing was, the commit is the same but for its message, author and time. The parents are those of ``amended``, and its
    message is kept where there is no other.

    Raises:
        RepositoryError: a stopped merge waits on HEAD.
        GuardError: a check of the new state failed; the commits are as they were.
    """
    head = begin(repository)
    old = repository.commit(amended)
    who = who.saying(old.message)
    _warn_of_pushed(repository, amended, progress)
    if head is None or head == amended:
        commit = replace(old, message=who.message, author=who.author, time=who.time)
        as_it_was = Draft(old.parents, repository.active(amended), old.metric, "amend", {})
        return amended if commit == old else _put_in_place(repository, commit, as_it_was, (amended,), who)
    draft = Draft(old.parents, repository.active(head), repository.commit(head).metric, "amend", {})
    commit = judge(repository, prepare(repository, draft, who), progress, guarding)
    last, _ = next(iter(repository.operations()))
    return _put_in_place(repository, commit, draft, (head, amended), who, {JOINS: last})


def _warn_of_pushed(repository: Store, commit: str, progress: Progress) -> None:
    for ref, target in repository.refs().items():
        if ref.startswith(REMOTES) and states.is_ancestor(commit, target, repository.parents):
            progress.warn(
                f"{commit[:12]} was pushed already ({ref[len(REMOTES) :]}): the next push is refused until a pull merges the two, "
                "or with --force-with-lease"
            )
            return


def _span(repository: Store, span: str, head: str | None) -> tuple[Sequence[str], str | None]:
    """The commits to replace, newest first, and the one below them (None: they go down to the base)."""
    if head is None:
        raise RevisionError("there is no commit yet", remedy="Commit some facts first.")
    chain = states.first_parents(head, repository.parents)
    if span.isdigit():
        found = list(islice(chain, int(span) + 1))
        commits, below = found[: int(span)], found[int(span) :]
        if len(commits) < int(span):
            raise RevisionError(
                f"HEAD has {len(commits)} commits along first parents, not {span}",
                remedy="Name fewer, or write `base..` for all of them.",
            )
        parent = below[0] if below else None
    else:
        parent = _below(repository, span, head)
        whole = list(chain)
        if parent is not None and parent not in whole:
            raise RevisionError(
                f"{span.partition('..')[0]} is not below HEAD along first parents",
                remedy="See `patchhub log --first-parent`.",
            )
        commits = whole[: whole.index(parent)] if parent is not None else whole
    if len(commits) < 2:
        raise RevisionError(f"{span} is not more than one commit", remedy="Name at least two commits to squash.")
    return commits, parent


def _below(repository: Store, span: str, head: str) -> str | None:
    """FROM of ``FROM..TO``, after checking that TO is HEAD."""
    start, dots, end = span.partition("..")
    if not (start and dots):
        raise RevisionError(
            f"{span!r} is neither a number of commits nor FROM..TO", remedy="For example: patchhub squash 3 -m TEXT"
        )
    if end and repository.resolve(end) != head:
        raise RevisionError(
            f"{end} is not the commit at HEAD", remedy="Switch to it first; only the newest commits can be squashed."
        )
    return repository.resolve(start)
