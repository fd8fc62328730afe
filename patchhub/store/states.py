"""The history as a graph: the active set and the state of a commit, what an object refers to, and what commits must satisfy.

Pure functions over ``parents(commit) -> its parents``, in the order they are stored, and over ``commit_of(id)``. `ActiveSet` is changed in
place; each change costs what it changes, whatever else is active. The checks are linear in the changes of the commits that are checked
(``docs/format.md``)."""

from __future__ import annotations

import heapq
import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Protocol

from patchhub.canonical import canonical_json, has_unseen, object_id
from patchhub.objects import (
    EMPTY_SET,
    Base,
    Commit,
    Element,
    Metric,
    Note,
    Patch,
    Text,
    digest_of_sum,
    element_sum,
    groups_of,
    requests_from_json,
    set_from_json,
)
from patchhub.results import Result
from patchhub.store.config import Config
from patchhub.store.object_store import ObjectStore
from patchhub.store.revisions import NOTES, SYMBOLIC

Parents = Callable[[str], Sequence[str]]
Rank = Callable[[str], int]
"""A number larger than that of every parent, such as a time corrected for clocks that run backwards."""

_LEFT: Final = 1
_RIGHT: Final = 2


def walk(starts: Iterable[str], parents: Parents, rank: Rank) -> Iterator[str]:
    """`starts` and their ancestors, each once, by descending rank, then ascending id: every child before its parents.

    Lazy: after n commits only those n and their parents have been asked for.
    """
    seen = set(starts)
    waiting = [(-rank(commit), commit) for commit in seen]
    heapq.heapify(waiting)
    while waiting:
        commit = heapq.heappop(waiting)[1]
        yield commit
        for parent in parents(commit):
            if parent not in seen:
                seen.add(parent)
                heapq.heappush(waiting, (-rank(parent), parent))


def ancestors(starts: Iterable[str], parents: Parents) -> set[str]:
    """`starts` and everything reachable from them."""
    found = set(starts)
    waiting = list(found)
    while waiting:
        for parent in parents(waiting.pop()):
            if parent not in found:
                found.add(parent)
                waiting.append(parent)
    return found


def among_ancestors(candidates: Sequence[str], starts: Iterable[str], parents: Parents, rank: Rank) -> set[str]:
    """Those of `candidates` that are among `starts` or reachable from them; nothing below the lowest is looked at."""
    if not candidates:
        return set()
    lowest = min(rank(candidate) for candidate in candidates)
    near = itertools.takewhile(lambda commit: rank(commit) >= lowest, walk(starts, parents, rank))
    return set(candidates).intersection(near)


def is_ancestor(ancestor: str, commit: str, parents: Parents) -> bool:
    """Whether `ancestor` is `commit` or reachable from it."""
    return ancestor in ancestors([commit], parents)


def merge_bases(left: str, right: str, parents: Parents) -> list[str]:
    """The best common ancestors: those that are no proper ancestor of another common ancestor; sorted by id."""
    common = ancestors([left], parents) & ancestors([right], parents)
    covered = {parent for commit in common for parent in parents(commit)}
    return sorted(common - covered)


def apart(left: Iterable[str], right: Iterable[str], parents: Parents, rank: Rank) -> tuple[int, int]:
    """How many commits are among `left` or below it but not below `right`, and the other way round.

    Ends where all that waits is below both sides: what the two have in common is looked at no further than there.
    """
    sides = dict.fromkeys(left, _LEFT)
    for commit in right:
        sides[commit] = sides.get(commit, 0) | _RIGHT
    waiting = [(-rank(commit), commit) for commit in sides]
    heapq.heapify(waiting)
    counts = {_LEFT: 0, _RIGHT: 0, _LEFT | _RIGHT: 0}
    one_sided = {commit for commit, side in sides.items() if side != _LEFT | _RIGHT}
    while one_sided:
        commit = heapq.heappop(waiting)[1]
        counts[sides[commit]] += 1
        one_sided.discard(commit)
        for parent in parents(commit):
            if parent not in sides:
                heapq.heappush(waiting, (-rank(parent), parent))
                one_sided.add(parent)
            sides[parent] = sides.get(parent, 0) | sides[commit]
            if sides[parent] == _LEFT | _RIGHT:
                one_sided.discard(parent)
    return counts[_LEFT], counts[_RIGHT]


def first_parents(start: str, parents: Parents) -> Iterator[str]:
    """`start`, its first parent, that one's first parent, and so on to the root."""
    commit: str | None = start
    while commit is not None:
        yield commit
        commit = next(iter(parents(commit)), None)


def oldest_first(starts: Iterable[str], parents: Parents) -> Iterator[str]:
    """`starts` and their ancestors, each once, every parent before its children."""
    done: set[str] = set()
    for start in sorted(starts):
        waiting = [(start, False)]
        while waiting:
            commit, expanded = waiting.pop()
            if commit in done:
                continue
            if expanded:
                done.add(commit)
                yield commit
            else:
                waiting.append((commit, True))
                waiting.extend((parent, False) for parent in reversed(parents(commit)) if parent not in done)


class ActiveSet:
    """Some elements, with what is asked of them kept up: their digest, their bytes, and what no sound set has."""

    def __init__(self, elements: Iterable[Element]) -> None:
        self._patches: dict[str, set[str | None]] = {}
        self._columns: Counter[str] = Counter()
        self._encoded: dict[str, bytes] = {}  # a patch's part of `data`, while it is up to date
        self._doubled: set[str] = set()
        self._whole: set[str] = set()
        self._mixed: set[str] = set()
        self._sum = 0
        self.change(removed=(), added=frozenset(elements))

    def __contains__(self, element: Element) -> bool:
        return element[1] in self._patches.get(element[0], ())

    def change(self, *, removed: Iterable[Element], added: Iterable[Element]) -> None:
        """Take out what is in the set, then put in what is not."""
        for patch, request in removed:
            self._patches[patch].remove(request)
            self._changed(patch, request, -1)
        for patch, request in added:
            self._patches.setdefault(patch, set()).add(request)
            self._changed(patch, request, 1)

    @property
    def digest(self) -> str:
        """The set digest."""
        return digest_of_sum(self._sum)

    @property
    def doubled(self) -> str | None:
        """A request with more than one column in the set, the smallest id; None if there is none."""
        return min(self._doubled, default=None)

    @property
    def whole(self) -> frozenset[str]:
        """The patches that are there as a whole."""
        return frozenset(self._whole)

    @property
    def mixed(self) -> str | None:
        """A patch that is there both as a whole and by request, the smallest id; None if there is none."""
        return min(self._mixed, default=None)

    def data(self) -> bytes:
        """The canonical bytes of the set object.

        Raises:
            ValueError: a patch is `mixed`.
        """
        for patch in self._patches.keys() - self._encoded.keys():
            (group,) = groups_of((patch, request) for request in self._patches[patch])
            self._encoded[patch] = canonical_json(group)
        return b"[" + b",".join(self._encoded[patch] for patch in sorted(self._patches)) + b"]"

    def _changed(self, patch: str, request: str | None, by: int) -> None:
        """Keep up what is derived from the elements after one of them came (`by` 1) or went (-1)."""
        self._sum += by * element_sum([(patch, request)])
        self._encoded.pop(patch, None)
        requests = self._patches[patch]
        _keep(self._whole, patch, None in requests)
        if not requests:
            del self._patches[patch]
        _keep(self._mixed, patch, None in requests and len(requests) > 1)
        if request is not None:
            self._columns[request] += by
            _keep(self._doubled, request, self._columns[request] > 1)
            if not self._columns[request]:
                del self._columns[request]


def _keep(names: set[str], name: str, belongs: bool) -> None:
    if belongs:
        names.add(name)
    else:
        names.discard(name)


MAX_STATE_BLOBS: Final = 128
MAX_STATE_FACTOR: Final = 2
"""A state may list blobs of at most this many times the bytes of the whole delta."""

_SOLVED: Final = "solved:"

CommitOf = Callable[[str], Commit]
SetOf = Callable[[str], frozenset[Element]]
"""The elements of a set object."""


def active_set(
    commit_id: str | None, commit_of: CommitOf, set_of: SetOf, known: Mapping[str, frozenset[Element]]
) -> frozenset[Element]:
    """What is active at a commit: the changes of the first-parent chain since the last keyframe or `known` set."""
    changes: list[Commit] = []
    elements: set[Element] = set()
    cursor = commit_id
    while cursor is not None:
        if cursor in known:
            elements = set(known[cursor])
            break
        commit = commit_of(cursor)
        if commit.keyframe is not None:
            elements = set(set_of(commit.keyframe.set_id))
            break
        changes.append(commit)
        cursor = first_parent(commit)
    for commit in reversed(changes):
        elements -= commit.removed
        elements |= commit.added
    return frozenset(elements)


def state(commit_id: str | None, commit_of: CommitOf, known: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """The ordered parts whose sum is the weight change of a commit (``docs/format.md``, "The state").

    A part is the id of a delta blob; the first one may be the name of a commit whose state is solved (`solved_commit`).
    `known` holds states that need not be derived again.
    """
    blobs: list[str] = []
    cursor = commit_id
    while cursor is not None:
        if cursor in known:
            blobs.extend(reversed(known[cursor]))
            break
        commit = commit_of(cursor)
        if commit.same_as is not None:
            cursor = commit.same_as
        elif commit.set_digest == EMPTY_SET:
            break
        elif commit.solved:
            blobs.append(_SOLVED + cursor)
            break
        elif commit.keyframe is not None:
            blobs.extend([commit.keyframe.tensors] if commit.keyframe.tensors is not None else [])
            break
        else:
            blobs.extend([commit.tensors] if commit.tensors is not None else [])
            cursor = first_parent(commit)
    return tuple(reversed(blobs))


def solved_commit(part: str) -> str | None:
    """The commit whose set a part of a state is solved from; None where the part is a delta blob."""
    return part.removeprefix(_SOLVED) if part.startswith(_SOLVED) else None


def lineage(commit_id: str, commit_of: CommitOf) -> Iterator[str]:
    """The commits that a commit's weights go back to: itself, the one that it repeats or its first parent, and so on."""
    cursor: str | None = commit_id
    while cursor is not None:
        yield cursor
        commit = commit_of(cursor)
        ends = commit.set_digest == EMPTY_SET or commit.solved
        cursor = None if ends else commit.same_as or first_parent(commit)


def commits_read(commit_id: str | None, commit_of: CommitOf) -> int:
    """How many commits `state` and `whole_patches` read for a commit: those since the last keyframe, that one included."""
    count, cursor = 0, commit_id
    while cursor is not None:
        commit = commit_of(cursor)
        count += 1
        if commit.same_as is not None:
            cursor = commit.same_as
        elif commit.set_digest == EMPTY_SET or commit.keyframe is not None:
            break
        else:
            cursor = first_parent(commit)
    return count


def whole_patches(commit_id: str | None, commit_of: CommitOf, set_of: SetOf) -> frozenset[str]:
    """The patches that are active as a whole at a commit: shards and additive ones. Reads the commits that `state` reads."""
    changes: list[Commit] = []
    elements: set[Element] = set()
    cursor = commit_id
    while cursor is not None:
        commit = commit_of(cursor)
        if commit.same_as is not None:
            cursor = commit.same_as
        elif commit.set_digest == EMPTY_SET:
            break
        elif commit.keyframe is not None:
            elements = set(set_of(commit.keyframe.set_id))
            break
        else:
            changes.append(commit)
            cursor = first_parent(commit)
    for commit in reversed(changes):
        elements -= commit.removed
        elements |= commit.added
    return frozenset(identity for identity, request in elements if request is None)


def needs_keyframe(reads: int, blob_bytes: int, whole_bytes: int) -> bool:
    """Whether a state that takes so many commits and bytes to read is too long beside the whole delta of `whole_bytes`."""
    return reads > MAX_STATE_BLOBS or blob_bytes > MAX_STATE_FACTOR * whole_bytes


def first_parent(commit: Commit) -> str | None:
    """The commit that a commit's changes are counted against; None for a root."""
    return commit.parents[0] if commit.parents else None


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


SameSets = Callable[[str], Collection[str]]
"""The proper ancestors of a commit that have its set digest."""


@dataclass(frozen=True)
class Unproven(Result):
    """A commit whose weights are not those of its facts, and that follows from none of the others that are not.

    Attributes:
        commit: its id.
        weight: the weight that is farthest off.
        distance: the norm of the difference over that of the deltas that make up the weight's change.
    """

    commit: str
    weight: str
    distance: float

    def words(self) -> str:
        off = f"{self.distance:.2g} times" if self.distance >= 2 else f"{self.distance:.2%} of"
        return f"commit {self.commit[:12]}: its weights are not those of its facts, {self.weight} is off by {off} the change"


@dataclass(frozen=True)
class Unprovable(Result):
    """An imported change or a shard: it follows from no facts, so its author alone vouches for what it does."""

    patch: str
    kind: str
    method: str

    def words(self) -> str:
        what = "imported change" if self.kind == "additive" else "shard"
        return f"{what} {self.patch[:12]} ({self.method})"


@dataclass(frozen=True)
class Proofs(Result):
    """What was proven of the weights of some commits.

    Attributes:
        commits: how many have the weights of their facts.
        unproven: the first of those that do not.
        unprovable: what they brought that no facts prove.
    """

    commits: int
    unproven: tuple[Unproven, ...]
    unprovable: tuple[Unprovable, ...]


NOTHING_PROVEN: Final = Proofs(0, (), ())


_METHOD = re.compile(r"[a-z0-9][a-z0-9 _.+-]{0,63}")
_SETTING = re.compile(r"[A-Za-z0-9_][\w.-]{0,199}", re.ASCII)
_WEIGHT = re.compile(r"[A-Za-z0-9_][\w.:/-]{0,511}", re.ASCII)
_LONGEST = 200  # characters of an author
_LONGEST_MESSAGE = 100_000


def unfit(value: Any) -> Iterator[str]:
    """In words, which names of an object nobody here would have written: they have a grammar and a length."""
    if isinstance(value, Patch):
        if _METHOD.fullmatch(value.method) is None:
            yield f"its method {_brief(value.method)} is no name of lower-case letters, digits and `-`"
        yield from _bad_names("setting", value.settings, _SETTING)
        yield from _bad_names("weight", value.weights, _WEIGHT)
    elif isinstance(value, Commit):
        yield from _bad_author(value.author)
        if len(value.message) > _LONGEST_MESSAGE:
            yield f"its message of {len(value.message)} characters is too long"
        if len(set(value.parents)) < len(value.parents):
            yield "it names a parent twice"
    elif isinstance(value, Note):
        yield from _bad_author(value.made_by)
        yield from _bad_names("setting", value.settings, _SETTING)
    elif isinstance(value, Base):
        yield from _bad_names("tensor", value.tensors, _WEIGHT)


def _bad_author(author: str) -> Iterator[str]:
    if not author.strip():
        yield "its author is empty"
    elif len(author) > _LONGEST or has_unseen(author):
        yield f"its author {_brief(author)} is too long, or has characters that are not shown"


def _bad_names(kind: str, names: Iterable[str], grammar: re.Pattern[str]) -> Iterator[str]:
    for name in names:
        if grammar.fullmatch(name) is None or name == "__metadata__":
            yield f"{_brief(name)} is no name of a {kind}"


def _brief(text: str) -> str:
    """Text as a literal, cut: nothing in it is acted upon."""
    return ascii(text if len(text) <= 40 else text[:37] + "...")


class Flaw(NamedTuple):
    """A commit, and in words what is wrong with it."""

    commit: str
    problem: str


class Holding(Protocol):
    """What the rules ask of a store; `Reading` has it."""

    objects: ObjectStore
    config: Config

    def commit(self, identity: str) -> Commit: ...
    def patch(self, identity: str) -> Patch: ...
    def active(self, commit: str | None) -> frozenset[Element]: ...
    def state(self, commit: str | None) -> tuple[str, ...]: ...


def unsound(store: Holding, commits: Iterable[str], parents: Parents, same_sets: SameSets) -> Iterator[Flaw]:
    """Everything that is wrong with those commits of a store, given that their other ancestors are sound."""
    commits = list(commits)
    known = set(commits)
    above: dict[str | None, list[str]] = defaultdict(list)
    for identity in commits:
        above[next(iter(parents(identity)), None)].append(identity)
    for start in [parent for parent in above if parent not in known]:
        yield from _Walk(store, ActiveSet(store.active(start)), above, same_sets).run(above[start])


class _Walk:
    """One walk through a part of the forest: where it is, the set there, and the sets on the way from where it began."""

    def __init__(
        self, store: Holding, active: ActiveSet, above: Mapping[str | None, Sequence[str]], same_sets: SameSets
    ) -> None:
        self._store = store
        self._active = active
        self._above = above
        self._same_sets = same_sets
        self._below: dict[str, set[str]] = defaultdict(set)  # set digest -> commits on the way here

    def run(self, roots: Sequence[str]) -> Iterator[Flaw]:
        waiting: list[tuple[str, _Change | None]] = [(root, None) for root in roots]
        while waiting:
            identity, made = waiting.pop()
            commit = self._store.commit(identity)
            if made is not None:
                self._below[commit.set_digest].remove(identity)
                self._active.change(removed=made.added, added=made.removed)
                continue
            change = _Change.of(commit, self._active)
            yield from (Flaw(identity, problem) for problem in self._problems(identity, commit, change))
            self._below[commit.set_digest].add(identity)
            waiting.append((identity, change))
            waiting.extend((child, None) for child in self._above.get(identity, ()))

    def _problems(self, identity: str, commit: Commit, change: _Change) -> Iterator[str]:
        """What is wrong with one commit; its changes are made to the active set on the way."""
        store = self._store
        if commit.base != store.config.base_id:
            yield f"it is about another base ({commit.base[:12]})"
        lacking = list(missing(commit, store.patch, store.objects.__contains__))
        yield from (f"its {part.kind} {part.id[:12]} is missing" for part in lacking)
        yield from unfit(commit)
        for patch in {patch for patch, _ in commit.added} if not lacking else ():
            yield from (f"patch {patch[:12]}: {problem}" for problem in unfit(store.patch(patch)))
        yield from misfits(commit, self._active)
        self._active.change(removed=change.removed, added=change.added)
        yield from flaws(commit, self._active, self._ancestors_like(identity, commit))
        if commit.solved and not lacking and any(store.patch(p).kind == "additive" for p in self._active.whole):
            yield "its state is solved, although changes are active that no facts ask for"
        if not lacking and len(store.state(identity)) > MAX_STATE_BLOBS:
            yield f"its state lists more than {MAX_STATE_BLOBS} blobs without a keyframe"

    def _ancestors_like(self, identity: str, commit: Commit) -> Collection[str]:
        """Proper ancestors with the commit's set digest: enough of them to tell whether `same_as` is right."""
        near = self._below[commit.set_digest]
        settled = commit.same_as in near if commit.same_as is not None else bool(near)
        return near if settled else self._same_sets(identity)


class _Change(NamedTuple):
    """What a commit really takes out of its first parent's set and puts in."""

    removed: frozenset[Element]
    added: frozenset[Element]

    @classmethod
    def of(cls, commit: Commit, before: ActiveSet) -> _Change:
        removed = frozenset(element for element in commit.removed if element in before)
        added = frozenset(element for element in commit.added if element not in before or element in removed)
        return cls(removed, added)


def misfits(commit: Commit, before: ActiveSet) -> Iterator[str]:
    """In words, which of a commit's changes do not fit its first parent's set."""
    if any(element not in before for element in commit.removed):
        yield "it removes what is not active in its first parent"
    if any(element in before for element in commit.added):
        yield "it adds what is active in its first parent"


def flaws(commit: Commit, after: ActiveSet, same_sets: Collection[str]) -> Iterator[str]:
    """In words, what is wrong with a commit whose set is `after`; `same_sets`: its proper ancestors with its set digest."""
    if after.digest != commit.set_digest:
        yield "its set digest is not that of its first parent's set with its changes"
    if after.doubled is not None:
        yield f"more than one column is active for request {after.doubled[:12]}"
    if after.mixed is not None:
        yield f"patch {after.mixed[:12]} is active both as a whole and by request"
    elif commit.keyframe is not None and commit.keyframe.set_id != object_id(after.data()):
        yield "its keyframe is of another set"
    kept = commit.tensors or commit.same_as or (commit.keyframe and commit.keyframe.tensors)
    if commit.solved and (kept or commit.set_digest == EMPTY_SET):
        yield "its state is solved, and it says another one besides"
    if commit.same_as is None and same_sets:
        yield f"its set is that of its ancestor {min(same_sets)[:12]}, which `same_as` must name"
    if commit.same_as is not None and commit.same_as not in same_sets:
        yield "`same_as` names a commit that is not an ancestor with the same set"
