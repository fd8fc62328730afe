"""Which facts of a change a user names: by subject, or by request id. Reads JSON only."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from patchhub.errors import RequestError
from patchhub.objects import Element, Request
from patchhub.porcelain.facts import Place, active_requests, shard_places
from patchhub.porcelain.shards import without_shards
from patchhub.store.repository import Repository

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


def selected(
    repository: Repository, change: Change, subjects: Sequence[str], prefixes: Sequence[str], where: str
) -> Change:
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


def facts_of(repository: Repository, change: Change) -> list[Request]:
    """The facts that a change is about, in words."""
    leaving, entering = _places(repository, change)
    elements = change.remove | change.restore
    chosen = {place for place in leaving | entering if change.chosen is None or place[1] in change.chosen}
    wanted = elements | chosen
    return [request for place, request in active_requests(repository, elements).items() if place in wanted]


def _places(repository: Repository, change: Change) -> tuple[frozenset[Place], frozenset[Place]]:
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
