"""Verbs that carry a commit's change of facts elsewhere: `revert` backwards, `cherry-pick` forwards. NumPy only, no model."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from patchhub.editing.requests import contradiction_error, find_contradictions
from patchhub.errors import RequestError, RevisionError
from patchhub.objects import Commit, Element, Request, set_digest
from patchhub.porcelain.facts import active_requests
from patchhub.porcelain.recorded import one_metric, recorded_again, stale_requests
from patchhub.porcelain.snapshot import Draft, Stamp, snapshot
from patchhub.store.repository import Repository

OnConflict = Literal["refuse", "replace"]

_PREFIX = re.compile(r"[0-9a-f]{4,64}")


@dataclass(frozen=True)
class Changed:
    """What `revert` or `cherry-pick` did.

    Attributes:
        commit: the new commit.
        removed, restored: facts that are no longer active, and that are active now.
        skipped: facts that were as asked already.
        same_as: the earlier commit whose weights these are bit for bit, if the set was seen before.
        stale: active facts that were recorded on a state that is no longer below them.
        proof: the largest relative residual of the joint solution over the weights.
    """

    commit: str
    removed: tuple[Request, ...]
    restored: tuple[Request, ...]
    skipped: tuple[Request, ...]
    same_as: str | None
    stale: int
    proof: float

    def to_json(self) -> dict[str, Any]:
        lists = {"removed": self.removed, "restored": self.restored, "skipped": self.skipped}
        return {
            "commit": self.commit,
            **{name: [request.id for request in requests] for name, requests in lists.items()},
            "same_as": self.same_as,
            "stale": self.stale,
            "proof": self.proof,
        }


@dataclass(frozen=True)
class _Change:
    """What shall leave the active set, and what shall enter it."""

    remove: frozenset[Element]
    restore: frozenset[Element]

    def only(self, elements: frozenset[Element]) -> _Change:
        return _Change(self.remove & elements, self.restore & elements)


def revert(
    repository: Repository,
    revision: str | None,
    stamp: Stamp,
    *,
    subjects: Sequence[str] = (),
    requests: Sequence[str] = (),
) -> Changed:
    """Undo what a commit changed against its first parent, wherever it is in history, as a new commit on HEAD.

    Args:
        revision: the commit; None to remove facts from the active set, whichever commits they are of.
        subjects: only facts about these subjects.
        requests: only these facts, by request id or a prefix of one. With a commit that gave a fact another target, both its
            old and its new request stand for that fact.

    Raises:
        RevisionError: no such commit, or nothing of it is left to revert.
        RequestError: no fact is named, or one that is not there.
        ContradictionError: a fact that would come back contradicts one that is active now.
    """
    arguments: dict[str, Any] = {"subjects": list(subjects), "requests": list(requests)}
    if revision is None:
        change = _Change(repository.active(repository.head[1]), frozenset())
        where, title = "active facts", ""
    else:
        identity, target = _commit(repository, revision)
        arguments = {"commit": identity, **arguments}
        change = _Change(target.added, target.removed)
        where, title = f"facts of {identity[:12]}", _title(identity, target)
    if subjects or requests:
        change = _selected(repository, change, subjects, requests, where)
    elif revision is None:
        raise RequestError("nothing is named to revert", remedy="Name a commit, --subject or --request.")
    message = stamp.message or f"Revert {_words(repository, change, title, bool(subjects or requests))}"
    return _carry_out(repository, change, Stamp(stamp.author, stamp.time, message), "revert", arguments)


def cherry_pick(repository: Repository, revision: str, stamp: Stamp, *, on_conflict: OnConflict = "refuse") -> Changed:
    """Do what a commit changed against its first parent once more, as a new commit on HEAD, from its recorded columns.

    Args:
        on_conflict: what a contradiction with an active fact does: refuse, or replace the active fact.

    Raises:
        RevisionError: no such commit, or all of its change is there already.
        ContradictionError: a fact contradicts an active one.
        EditError: its columns are of another metric.
    """
    identity, target = _commit(repository, revision)
    change = _Change(target.removed, target.added)
    if on_conflict == "replace":
        staying = active_requests(repository, repository.active(repository.head[1]) - change.remove)
        pairs = find_contradictions(active_requests(repository, change.restore).values(), staying.values())
        gone = {pair.earlier.id for pair in pairs}
        change = _Change(change.remove | {e for e, request in staying.items() if request.id in gone}, change.restore)
    message = stamp.message or target.message
    return _carry_out(repository, change, Stamp(stamp.author, stamp.time, message), "cherry-pick", {"commit": identity})


def largest_proof(commit: Commit) -> float:
    """The largest of a commit's proofs over its weights, 0 for the unpatched model."""
    return max((float(value) for value in commit.check["proof"].values()), default=0.0)


def _carry_out(
    repository: Repository, change: _Change, stamp: Stamp, command: str, arguments: Mapping[str, Any]
) -> Changed:
    """Commit the active set with a change of it; what is already as the change wants it is skipped."""
    _, head = repository.head
    before = repository.active(head)
    removed = change.remove & before
    removed |= recorded_again(repository, change.remove - removed, before)
    staying = {request for _, request in before - removed if request is not None}
    restored = frozenset(element for element in change.restore - before if element[1] not in staying)
    after = (before - removed) | restored
    if after == before:
        raise RevisionError(
            f"nothing is left to {command}: these facts are as it would make them already",
            remedy="See `patchhub status` for what is active.",
        )
    metric = one_metric(repository, after) or (repository.commit(head).metric if head else None)
    _refuse_contradictions(repository, head, before - removed, restored)
    identity = snapshot(repository, Draft((head,) if head else (), after, metric, command, arguments), stamp)
    commit = repository.commit(identity)
    again = {request for _, request in removed - change.remove}
    skipped = {e for e in change.remove - removed if e[1] not in again} | (change.restore - restored)
    return Changed(
        commit=identity,
        removed=_texts(repository, removed),
        restored=_texts(repository, restored),
        skipped=_texts(repository, skipped),
        same_as=commit.same_as,
        stale=stale_requests(repository, after),
        proof=largest_proof(commit),
    )


def _refuse_contradictions(
    repository: Repository, head: str | None, staying: frozenset[Element], restored: frozenset[Element]
) -> None:
    """Refuse what would come in beside a fact that says otherwise, unless the two were active together below HEAD before."""
    active = active_requests(repository, staying).values()
    here = {request.id for request in active}
    pairs = find_contradictions(active_requests(repository, restored).values(), active)
    found = [pair for pair in pairs if pair.earlier.id in here]
    seen = found and head and repository.find_same_set(set_digest(staying | restored), head)
    if found and not seen:
        raise contradiction_error(found)


def _texts(repository: Repository, elements: Iterable[Element]) -> tuple[Request, ...]:
    return tuple(active_requests(repository, elements).values())


def _commit(repository: Repository, revision: str) -> tuple[str, Commit]:
    identity = repository.resolve(revision)
    if identity is None:
        raise RevisionError(f"{revision} is the unpatched model; it changes nothing", remedy="Name a commit.")
    return identity, repository.commit(identity)


def _selected(
    repository: Repository, change: _Change, subjects: Sequence[str], prefixes: Sequence[str], where: str
) -> _Change:
    """The part of a change that is about the named facts."""
    elements = change.remove | change.restore
    texts = active_requests(repository, elements)
    named = {element for prefix in prefixes for element in _with_prefix(elements, prefix, where)}
    for subject in subjects:
        found = {element for element, request in texts.items() if request.subject == subject}
        if not found:
            close = difflib.get_close_matches(subject, {request.subject for request in texts.values()}, n=1)
            hint = f"Did you mean {close[0]!r}?" if close else "`patchhub show` and `patchhub diff` list the facts."
            raise RequestError(f"none of the {where} is about {subject!r}", remedy=hint, subject=subject)
        named |= found
    counterparts = _about(texts, change.restore, named & change.remove) | _about(
        texts, change.remove, named & change.restore
    )
    return change.only(frozenset(named) | counterparts)


def _about(
    texts: Mapping[Element, Request], elements: frozenset[Element], named: Iterable[Element]
) -> frozenset[Element]:
    """Those of some elements that are about the prompt and subject of a named one."""
    facts = {(texts[element].prompt, texts[element].subject) for element in named if element in texts}
    return frozenset(e for e in elements if e in texts and (texts[e].prompt, texts[e].subject) in facts)


def _with_prefix(elements: frozenset[Element], prefix: str, where: str) -> set[Element]:
    found = (
        {e for e in elements if e[1] is not None and e[1].startswith(prefix)} if _PREFIX.fullmatch(prefix) else set()
    )
    if len({request for _, request in found}) != 1:
        problem = "is the id of more than one of" if found else "is no id, or prefix of one, among"
        raise RequestError(
            f"{prefix!r} {problem} the {where}",
            remedy="Write 4 to 64 digits of a request id, as `patchhub show --json` prints it.",
            request=prefix,
        )
    return found


def _title(identity: str, commit: Commit) -> str:
    return f"“{next(iter(commit.message.splitlines()), '') or identity[:12]}”"


def _words(repository: Repository, change: _Change, title: str, partly: bool) -> str:
    """What is reverted: a commit, some facts of one, or some facts."""
    if not partly:
        return title
    requests = list(active_requests(repository, change.remove | change.restore).values())
    texts, subjects = {request.text for request in requests}, {request.subject for request in requests}
    count = len(change.remove | change.restore)
    if len(texts) == 1:
        facts = f"“{texts.pop()}”"
    else:
        facts = f"{count} facts about {subjects.pop()}" if len(subjects) == 1 else f"{count} facts"
    return f"{facts} of {title}" if title else facts
