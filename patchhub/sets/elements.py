"""The elements of a set in words: the facts of a set, those that a user names, those that are stale, and what a batch changes.

Reads JSON only, so that verbs that look need neither torch nor NumPy."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias

from patchhub.canonical import nfc
from patchhub.editing.requests import Batch, Keep, contradiction_error, find_contradictions
from patchhub.errors import EditError, RequestError, RevisionError
from patchhub.objects import EMPTY_SET, Element, Request, set_digest
from patchhub.sets.shards import active_shards, without_shards
from patchhub.store.lookup import patches_ever_whole
from patchhub.store.store import Store

_LISTED: Final = 8

Place: TypeAlias = tuple[str, str | None]
"""Where a fact is kept: (patch id, request id). For a column that is its element; a shard's element is (patch id, None)."""


def active_requests(repository: Store, elements: Iterable[Element]) -> dict[Place, Request]:
    """The request at each place of a set: its columns and all that its shards hold, in order of patch and request id.

    Additive patches and withheld texts have none. A fact that two shards hold is there twice.
    """
    wanted: dict[str, set[str]] = {}
    for patch, request in elements:
        if request is not None:
            wanted.setdefault(patch, set()).add(request)
        elif repository.patch(patch).kind == "shard":
            wanted[patch] = set(repository.patch(patch).requests)
    return {
        (patch, request.id): request
        for patch, requests in sorted(wanted.items())
        for request in sorted(repository.requests(repository.patch(patch)), key=lambda request: request.id)
        if request.id in requests
    }


def places_of(repository: Store, elements: Iterable[Element]) -> frozenset[Place]:
    """Every place of a set, also those of withheld texts; an additive patch has its element alone."""
    elements = frozenset(elements)
    return without_shards(repository, elements) | shard_places(repository, elements)


def shard_places(repository: Store, elements: Iterable[Element]) -> frozenset[Place]:
    """The places of a set that are in shards."""
    shards = active_shards(repository, elements)
    return frozenset((shard, fact) for shard, patch in shards.items() for fact in patch.requests)


def distinct(requests: Mapping[Place, Request]) -> tuple[Request, ...]:
    """Each request once, in the order of its first place."""
    return tuple({request.id: request for request in requests.values()}.values())


def imports_of(repository: Store) -> frozenset[Element]:
    """The elements of all imported changes that were ever active: they hold no facts, and the index counts each as one."""
    return frozenset(
        (patch, None) for patch in patches_ever_whole(repository) if repository.patch(patch).kind == "additive"
    )


def count_changed(repository: Store, removed: frozenset[Element], added: frozenset[Element]) -> tuple[int, int]:
    """How many facts a change of elements takes out and puts in, counted as `left_and_entered` lists them."""
    out, into = ({request for _, request in shard_places(repository, side)} for side in (removed, added))
    columns = [len(without_shards(repository, side)) for side in (removed, added)]
    return columns[0] + len(out - into), columns[1] + len(into - out)


def left_and_entered(
    repository: Store, before: frozenset[Element], after: frozenset[Element]
) -> tuple[tuple[Request, ...], tuple[Request, ...]]:
    """The facts whose columns left a set or came into it, and those that its shards forgot or took in.

    A column that takes another's place counts on both sides; a shard that takes another's place counts with the facts that only one
    of the two holds.
    """
    return _beyond(repository, before, after), _beyond(repository, after, before)


def _beyond(repository: Store, one: frozenset[Element], other: frozenset[Element]) -> tuple[Request, ...]:
    """Facts of columns that the other set has not, and of shards that none of the other's shards holds."""
    held = {request for _, request in shard_places(repository, other)}
    texts = active_requests(repository, one - other)
    return distinct({place: text for place, text in texts.items() if place in one or place[1] not in held})


_PREFIX = re.compile(r"[0-9a-f]{4,64}")


@dataclass(frozen=True)
class Change:
    """What shall leave the active set, and what shall enter it.

    Attributes:
        remove, restore: elements. Of shards only those facts are meant that one side has and the other has not.
        chosen: of the shards' facts only these request ids; None: all.
    """

    remove: frozenset[Element]
    restore: frozenset[Element]
    chosen: frozenset[str] | None = None


def selected(repository: Store, change: Change, subjects: Sequence[str], prefixes: Sequence[str], where: str) -> Change:
    """The part of a change that is about the named facts; ``where`` says in messages what the change is.

    Raises:
        RequestError: a name fits none of its facts, or a prefix more than one.
    """
    leaving, entering = _places(repository, change)
    texts = active_requests(repository, change.remove | change.restore)
    texts = {place: request for place, request in texts.items() if place in leaving | entering}
    named = {place for prefix in prefixes for place in _with_prefix(leaving | entering, prefix, where)}
    for subject in subjects:
        found = {place for place, request in texts.items() if request.subject == subject}
        if not found:
            close = difflib.get_close_matches(subject, {request.subject for request in texts.values()}, n=1)
            hint = f"Did you mean {close[0]!r}?" if close else "`patchhub show` and `patchhub diff` list the facts."
            raise RequestError(f"none of the {where} is about {subject!r}", remedy=hint, subject=subject)
        named |= found
    named |= _about(texts, entering, named & leaving) | _about(texts, leaving, named & entering)
    in_shards = named - (change.remove | change.restore)
    whole = {(patch, None) for patch, _ in in_shards}
    chosen = frozenset(str(request) for _, request in in_shards)
    return Change(change.remove & (named | whole), change.restore & (named | whole), chosen)


def facts_of(repository: Store, change: Change) -> list[Request]:
    """The facts that a change is about, in words."""
    leaving, entering = _places(repository, change)
    elements = change.remove | change.restore
    chosen = {place for place in leaving | entering if change.chosen is None or place[1] in change.chosen}
    wanted = elements | chosen
    return [request for place, request in active_requests(repository, elements).items() if place in wanted]


def _places(repository: Store, change: Change) -> tuple[frozenset[Place], frozenset[Place]]:
    """The places that leave and that enter, without the facts of shards that stay in shards."""
    out, into = shard_places(repository, change.remove), shard_places(repository, change.restore)
    staying = {request for _, request in out} & {request for _, request in into}
    leaving = {place for place in out if place[1] not in staying}
    entering = {place for place in into if place[1] not in staying}
    return without_shards(repository, change.remove) | leaving, without_shards(repository, change.restore) | entering


def _about(texts: Mapping[Place, Request], places: frozenset[Place], named: Iterable[Place]) -> frozenset[Place]:
    """Those of some places whose fact is about the prompt and subject of a named one's."""
    facts = {(texts[place].prompt, texts[place].subject) for place in named if place in texts}
    return frozenset(p for p in places if p in texts and (texts[p].prompt, texts[p].subject) in facts)


def _with_prefix(places: frozenset[Place], prefix: str, where: str) -> set[Place]:
    valid = _PREFIX.fullmatch(prefix) is not None
    found = {place for place in places if valid and place[1] is not None and place[1].startswith(prefix)}
    if len({request for _, request in found}) != 1:
        problem = "is the id of more than one of" if found else "is no id, or prefix of one, among"
        raise RequestError(
            f"{prefix!r} {problem} the {where}",
            remedy="Write 4 to 64 digits of a request id, as `patchhub show --json` prints it.",
            request=prefix,
        )
    return found


def stale_requests(repository: Store, elements: frozenset[Element]) -> int:
    """How many columns of a set were recorded on a state that is not part of the set."""
    patches = [patch for patch, request in elements if request is not None]
    stale = {patch for patch in set(patches) if is_stale(repository, patch, elements)}
    return sum(patch in stale for patch in patches)


def is_stale(repository: Store, patch: str, elements: frozenset[Element]) -> bool:
    """Whether a patch was recorded on a state that is not part of a set, or that no commit here tells."""
    below = _recorded_on(repository, patch)
    return below is None or not below <= elements


def one_metric(repository: Store, elements: Iterable[Element]) -> str | None:
    """The metric of all columns of a set; None where nothing in it has one.

    Raises:
        EditError: they are of more than one, so nothing solves them together.
    """
    metrics = {repository.patch(patch).metric for patch in {patch for patch, _ in elements}} - {None}
    if len(metrics) > 1:
        listed = sorted(str(metric) for metric in metrics)
        raise EditError(
            f"the facts are recorded with different metrics ({', '.join(metric[:12] for metric in listed)})",
            remedy="Write one side's facts again on the other with `patchhub commit`; columns of two metrics do not mix.",
            metrics=listed,
        )
    return next(iter(metrics), None)


def _recorded_on(repository: Store, identity: str) -> frozenset[Element] | None:
    """The set that a patch was recorded on: that of a commit, or what the commit that brought the patch left of its parent's."""
    made_on = repository.patch(identity).made_on
    if made_on in (None, EMPTY_SET):
        return frozenset()
    known = repository.set_of(made_on)
    brought = (c for c, patch, sign in _changes(repository, identity) if sign > 0 and patch == identity)
    left = (without_shards(repository, repository.active(c) - repository.commit(c).added) for c in brought)
    return next((below for below in left if set_digest(below) == made_on), None) if known is None else known


def _changes(repository: Store, identity: str) -> list[tuple[str, str, int]]:
    requests = repository.patch(identity).requests
    return repository.changes_of(requests[0]) if requests else []


def recorded_again(repository: Store, gone: frozenset[Element], active: frozenset[Element]) -> frozenset[Element]:
    """The active elements that `refresh` put in the place of some that are not active any more."""
    requests = {request for _, request in gone}
    return frozenset(
        (patch, request)
        for patch, request in active
        if request in requests and any((earlier, request) in gone for earlier in _refreshed(repository, patch))
    )


def _refreshed(repository: Store, identity: str) -> Iterator[str]:
    """The patches whose columns a patch holds anew, as far back as this store has them."""
    if identity not in repository.objects:
        return
    for earlier in repository.patch(identity).settings.get("refreshes", ()):
        yield earlier
        yield from _refreshed(repository, earlier)


OnConflict = Literal["refuse", "replace", "keep"]


@dataclass(frozen=True)
class Plan:
    """What a batch changes about the active set.

    Attributes:
        parent: the commit at HEAD; None before any.
        requests: the facts to write: those of the batch, then those of ``again``.
        kept: HEAD's elements without the columns of replaced facts and of those that are written again.
        replaced: the facts that go, because a fact of the batch says otherwise.
        again: active facts of the batch's subjects, which are optimised and recorded once more together with the new ones.
        keeps: prompts whose answers must stay, without those that an active fact or keep answers.
        shrunk: per kept shard, the ids of the replaced facts that it holds.
        already_active: facts of the batch that are left out.
        openings: what answers in a chat say before their targets, as far as it is known, by request id.
    """

    parent: str | None
    requests: tuple[Request, ...]
    kept: frozenset[Element]
    replaced: Mapping[Place, Request]
    shrunk: Mapping[str, frozenset[str]]
    already_active: int
    again: Mapping[Place, Request]
    keeps: tuple[Keep, ...] = ()
    openings: Mapping[str, str] = field(default_factory=dict)


def plan_batch(
    repository: Store,
    batch: Batch,
    on_conflict: OnConflict,
    *,
    by_subject: bool = False,
    keeps: Sequence[Keep] = (),
) -> Plan:
    """What committing ``batch`` on HEAD would change.

    Args:
        by_subject: write the active facts of the batch's subjects again, since facts of one subject need one value.
        keeps: prompts whose answers must stay.

    Raises:
        RequestError: every fact is active already, or a fact of the batch answers a prompt that is to be kept.
        ContradictionError: two facts of the batch contradict each other, or one contradicts an active one under "refuse".
    """
    _, parent = repository.head
    elements = repository.active(parent)
    active = active_requests(repository, elements)
    here = {request for _, request in places_of(repository, elements)}
    new = tuple(request for request in batch.requests if request.id not in here)
    if not new:
        raise RequestError(
            "every one of these facts is active already, so there is nothing to commit",
            remedy="See `patchhub status`; to write a fact again, revert it first.",
        )
    replaced: dict[Place, Request] = {}
    if on_conflict != "keep":
        if inner := find_contradictions(new):
            raise contradiction_error(inner, active=False)
        outer = find_contradictions(new, active.values())
        if outer and on_conflict == "refuse":
            raise contradiction_error(outer, active=True)
        asked = {(request.prompt, request.subject) for request in new}
        replaced = {place: request for place, request in active.items() if (request.prompt, request.subject) in asked}
    shards = {patch for patch, _ in replaced.keys() - elements}
    shrunk = {
        shard: frozenset(r.id for (patch, _), r in replaced.items() if patch == shard) for shard in sorted(shards)
    }
    already = len(batch.requests) - len(new)
    again = _again(new, active, elements - replaced.keys()) if by_subject else {}
    kept = elements - replaced.keys() - again.keys()
    told = {(request.prompt, request.subject): request for request in new}
    for keep in keeps:
        fact = told.get((keep.prompt, keep.subject))
        if fact is not None:
            raise RequestError(
                f"'{fact.text}' is to be kept, and to be '{fact.target_new}'",
                remedy="Take it out of the facts, or out of the keeps.",
            )
    answered = {(request.prompt, request.subject) for request in active.values()}
    left = tuple(keep for keep in keeps if (keep.prompt, keep.subject) not in answered)
    openings = {**openings_of(repository, again), **batch.openings}
    return Plan(parent, (*new, *again.values()), kept, replaced, shrunk, already, again, left, openings)


def openings_of(repository: Store, places: Iterable[Place]) -> dict[str, str]:
    """What the answers of facts that were written in a chat say before their targets, by request id."""
    found: dict[str, str] = {}
    for identity in sorted({patch for patch, request in places if request is not None}):
        patch = repository.patch(identity)
        if patch.kind == "closed_form":
            found |= patch.settings.get("openings", {})
    return found


def _again(
    new: Sequence[Request], active: Mapping[Place, Request], elements: frozenset[Element]
) -> dict[Place, Request]:
    """The active facts with columns of their own that are about the subjects of ``new`` and do not answer the same prompt."""
    subjects, asked = {request.subject for request in new}, {(request.prompt, request.subject) for request in new}
    return {
        place: request
        for place, request in active.items()
        if place in elements and request.subject in subjects and (request.prompt, request.subject) not in asked
    }


def due(repository: Store, head: str | None) -> frozenset[Element]:
    """The facts of a commit that `refresh` records again: those whose recording is stale, and on a merge those that it brought."""
    active = repository.active(head)
    commit = repository.commit(head) if head else None
    brought = commit.added if commit is not None and len(commit.parents) > 1 else frozenset()
    stale = {patch for patch in {patch for patch, _ in active} if is_stale(repository, patch, active)}
    return frozenset(e for e in active if e[1] is not None and (e in brought or e[0] in stale))


def nothing_due() -> RevisionError:
    """The error that `refresh` has nothing to do."""
    return RevisionError(
        "nothing of HEAD is due to be recorded or measured again",
        remedy="Columns are due when the state they were recorded on is gone, or right after a merge; shards when the weights below "
        "them changed.",
    )


def retargeted(
    repository: Store, subject: str, target: str, *, prompt: str | None = None
) -> tuple[list[Request], Request]:
    """The active facts about a subject that are meant, all of one prompt, and what is said there with another target.

    Args:
        subject: as it is in the facts.
        prompt: which of the subject's facts, with ``{}`` or with the subject filled in; needed only where it has several.

    Raises:
        RequestError: no active fact is meant, or several are, or it says so already.
    """
    facts = distinct(active_requests(repository, repository.active(repository.head[1])))
    chosen = _chosen(facts, nfc(subject).strip(), None if prompt is None else nfc(prompt).strip())
    new = _retargeted(chosen[0], target)
    if any(fact.target_new == new.target_new for fact in chosen):
        raise RequestError(
            f"'{new.text}' is '{new.target_new}' already",
            remedy="Give another target; `patchhub revert --request` takes back one of several that contradict each other."
            if len(chosen) > 1
            else "Give another target.",
        )
    return chosen, new


def _chosen(facts: Sequence[Request], subject: str, prompt: str | None) -> list[Request]:
    """The active requests of the one prompt about a subject that is meant."""
    about = [fact for fact in facts if fact.subject == subject]
    if not about:
        close = difflib.get_close_matches(subject, sorted({fact.subject for fact in facts}), n=1)
        remedy = f"Did you mean '{close[0]}'?" if close else "`patchhub commit` writes a new fact."
        raise RequestError(f"no active fact is about '{subject}'", remedy=remedy, subject=subject)
    found = [fact for fact in about if prompt is None or prompt in (fact.prompt, fact.text)]
    prompts = sorted({fact.prompt for fact in found or about})
    if len(prompts) == 1 and found:
        return found
    listed = "; ".join(prompts[:_LISTED]) + ("; ..." if len(prompts) > _LISTED else "")
    problem = f"{len(prompts)} active facts are" if found else f"no active fact with the prompt {prompt!r} is"
    raise RequestError(
        f"{problem} about '{subject}'", remedy=f"Say which with --prompt: {listed}", subject=subject, prompts=prompts
    )


def _retargeted(fact: Request, target: str) -> Request:
    """The request with another target. Where that is the true answer, there is nothing left to compare it with."""
    new = Request.make(fact.prompt, fact.subject, target)
    return Request(
        prompt=fact.prompt,
        subject=fact.subject,
        target_new=new.target_new,
        target_true=None if new.target_new == fact.target_true else fact.target_true,
        paraphrases=fact.paraphrases,
        neighborhood=fact.neighborhood,
    )
