"""Which objects an object refers to, and everything reachable from some of them. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final, NamedTuple

from patchhub.objects import Base, Commit, Metric, Note, Patch, Text, requests_from_json, set_from_json
from patchhub.store.revisions import NOTES, SYMBOLIC


class Reference(NamedTuple):
    """An object as another one refers to it."""

    kind: str
    id: str


def _nothing(_: Any) -> Iterator[Reference]:
    return iter(())


def _of_metric(metric: Metric) -> Iterator[Reference]:
    yield Reference("base", metric.base)
    sampled = metric.source.get("kind") == "sampled"
    if sampled and metric.text is not None:  # the user's own text is known by its hash alone
        yield Reference("text", metric.text)


def _of_patch(patch: Patch) -> Iterator[Reference]:
    yield Reference("base", patch.base)
    if patch.metric is not None:
        yield Reference("metric", patch.metric)
    yield Reference("requests", patch.requests_blob)
    yield Reference("tensors", patch.tensors)


def _of_set(elements: frozenset[tuple[str, str | None]]) -> Iterator[Reference]:
    return (Reference("patch", patch) for patch in sorted({patch for patch, _ in elements}))


def _of_commit(commit: Commit) -> Iterator[Reference]:
    yield Reference("base", commit.base)
    if commit.metric is not None:
        yield Reference("metric", commit.metric)
    yield from (Reference("commit", parent) for parent in commit.parents)
    if commit.same_as is not None:
        yield Reference("commit", commit.same_as)
    yield from _of_set(commit.added | commit.removed)
    if commit.keyframe is not None:
        yield Reference("set", commit.keyframe.set_id)
        if commit.keyframe.tensors is not None:
            yield Reference("tensors", commit.keyframe.tensors)
    if commit.tensors is not None:
        yield Reference("tensors", commit.tensors)


def _of_note(note: Note) -> Iterator[Reference]:
    yield Reference("commit", note.commit)


class Kind(NamedTuple):
    """How an object is read from its bytes, and what it refers to."""

    read: Callable[[bytes], Any]
    references: Callable[[Any], Iterator[Reference]]


KINDS: Final = {
    "base": Kind(Base.from_json, _nothing),
    "text": Kind(Text.from_json, _nothing),
    "metric": Kind(Metric.from_json, _of_metric),
    "requests": Kind(requests_from_json, _nothing),
    "patch": Kind(Patch.from_json, _of_patch),
    "set": Kind(set_from_json, _of_set),
    "commit": Kind(Commit.from_json, _of_commit),
    "note": Kind(Note.from_json, _of_note),
}
"""Every kind of object that is JSON; what remains is ``tensors``, which is never read here."""


def references(kind: str, data: bytes) -> list[Reference]:
    """What an object refers to; `CorruptStoreError` if its bytes are not an object of that kind."""
    if kind not in KINDS:
        return []
    reader = KINDS[kind]
    return list(reader.references(reader.read(data)))


def missing(commit: Commit, patch_of: Callable[[str], Patch], has: Callable[[str], bool]) -> Iterator[Reference]:
    """What a commit needs and the store lacks: what it refers to, and what its patches refer to.

    Texts of requests may be withheld, so their absence is no lack.
    """
    for reference in _of_commit(commit):
        if not has(reference.id):
            yield reference
        elif reference.kind == "patch":
            wanted = _of_patch(patch_of(reference.id))
            yield from (part for part in wanted if part.kind != "requests" and not has(part.id))


def closure(roots: Iterable[Reference], follow: Callable[[Reference], Iterable[Reference]]) -> Iterator[Reference]:
    """`roots` and all that `follow` leads to from them, each once, every object before what only it refers to."""
    seen = set(roots)
    waiting = sorted(seen, reverse=True)
    while waiting:
        reference = waiting.pop()
        yield reference
        for found in follow(reference):
            if found not in seen:
                seen.add(found)
                waiting.append(found)


def recorded(changes: Iterable[Mapping[str, tuple[str | None, str | None]]]) -> set[Reference]:
    """The commits and notes that operations' changes name: what every earlier view needs, so what must be kept."""
    return {
        Reference("note" if ref.startswith(NOTES) else "commit", target)
        for change in changes
        for ref, targets in change.items()
        for target in targets
        if target is not None and not target.startswith(SYMBOLIC)
    }
