"""`fetch` without a terminal: objects taken from a remote, sizes bounded before, bytes and structure checked after download.

Nothing that a remote says is believed. An object enters the store only under the hash of its content and only if it
reads as what its referrer says it is; refs move only after everything below them has been checked."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, NamedTuple

from patchhub.cache import DOWNLOADS
from patchhub.canonical import object_id, one_line
from patchhub.errors import CorruptStoreError, RemoteError, RevisionError
from patchhub.fsio import Span, finish_sharing, make_directories, os_errors
from patchhub.objects import Commit, Patch
from patchhub.progress import Progress, Silent, stage_bytes
from patchhub.remotes import parcels
from patchhub.remotes.remote import Remote, Tip, View
from patchhub.results import Result, told
from patchhub.store import states
from patchhub.store.database import FETCH, PROVEN, TRUSTED
from patchhub.store.object_store import span_digest
from patchhub.store.revisions import BRANCHES, NOTES, REMOTES, TAGS, check_ref, twins
from patchhub.store.states import KINDS, NOTHING_PROVEN, Proofs, Reference, unfit
from patchhub.store.store import Store
from patchhub.who import Who

MAX_JSON: Final = 64 << 20
"""Bytes of the largest JSON object that is read."""

MAX_SET: Final = 256 << 20
"""The same of a set: 67 bytes for each of four million facts."""

_AHEAD: Final = 32 << 20  # small objects are fetched together, before it is known which are needed
_SMALL: Final = 256 << 10
MAX_HEADER: Final = 1 << 20
"""Bytes that the header of a tensor file may have."""


Owner = Patch | Commit | None
CheckTensors = Callable[[Owner, Span], None]
"""Raises `CorruptStoreError` if a file is not the tensors that a patch, or a commit, says it has."""


@dataclass(frozen=True)
class Limits:
    """What a remote may cost: bytes in all, and (out, in) of each weight that facts are written into, and that a state may change."""

    total: int
    weights: Mapping[str, tuple[int, int]]
    linear: Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class Intake:
    """What is asked of all that a fetch downloads.

    Attributes:
        limits: refused before a byte is downloaded where they would be passed, by all that is taken together.
        check: what tensors must satisfy beyond their hash.
        repair: look also below known commits, and fetch again what is damaged here.
    """

    limits: Limits
    check: CheckTensors
    repair: bool = False


class _Wanted(NamedTuple):
    reference: Reference
    owner_id: str
    owner: Owner
    limit: int

    @property
    def key(self) -> tuple[Reference, str]:
        return self.reference, self.owner_id


@dataclass
class Received(Result):
    """How much came: objects that were kept, their bytes, and the bytes of everything that was downloaded."""

    objects: int = 0
    size: int = field(default=0, metadata=told(name="bytes"))
    downloaded: int = field(default=0, metadata=told(omit=True))


def delta_limit(weights: Mapping[str, tuple[int, int]]) -> int:
    """Bytes that a delta of those weights can need at most: float32 values and one bit per entry."""
    return MAX_HEADER + sum(4 * out * inner + (out * inner + 7) // 8 for out, inner in weights.values())


def columns_limit(patch: Patch) -> int:
    """Bytes that the columns of a patch can need at most: K, U, R, lambda per weight and z, in float32."""
    n = len(patch.requests)
    widest = max((max(shape) for shape in patch.weights.values()), default=0)
    return MAX_HEADER + 4 * n * (widest + sum(2 * inner + out + 1 for out, inner in patch.weights.values()))


@contextlib.contextmanager
def receiving(repository: Store, remote: Remote, intake: Intake, progress: Progress) -> Iterator[Receiver]:
    """A receiver whose downloads lie in the store's cache, and are gone at the end.

    Args:
        progress: hears of a stage of bytes for each branch or tag that is taken.
    """
    parent = repository.cache.folder
    with os_errors(parent):
        make_directories(parent)  # it can be deleted at any time
        downloads = TemporaryDirectory(dir=parent, prefix=DOWNLOADS, ignore_cleanup_errors=True)
    with downloads as folder:
        finish_sharing(Path(folder))  # who dies leaves it, and anybody of the group may take it away
        yield Receiver(repository, remote, intake, Path(folder), progress)


class Receiver:
    """Brings what roots need into the store, in the waves of a breadth-first walk, each downloaded together."""

    def __init__(self, repository: Store, remote: Remote, intake: Intake, folder: Path, progress: Progress) -> None:
        self._repository = repository
        self._remote = remote
        self._limits = intake.limits
        self._check = intake.check
        self._folder = folder
        self._repair = intake.repair
        self._progress = progress
        self._sizes: Mapping[str, int] = {}
        self._spool: dict[str, Span] = {}
        self._waiting: dict[str, Span] = {}  # checked, to be kept together
        self._copied: set[Path] = set()
        self._taken: set[Reference] = set()
        self.received = Received()

    def take(self, tip: Tip, root: Reference, *, label: str | None = None) -> None:
        """Bring a commit or a note, and everything reachable from it, into the store; what is there already does not travel.

        Args:
            label: of a branch or tag, what the stage of its bytes is called; its small objects are fetched together before it is known
                which are needed.

        Raises:
            RemoteError: something is missing there, too large, or not what its hash or the format says.
        """
        if root in self._taken or self._is_done(root):
            return
        wave = [_Wanted(root, "", None, MAX_JSON)]
        self._sizes = self._remote.sizes(tip)
        if label is not None:
            new = (size for identity, size in self._sizes.items() if identity not in self._repository.objects)
            stage_bytes(self._progress, label, sum(new))
        self._download(tip, self._small_ones() if label is not None else set())
        seen = {wanted.key for wanted in wave}
        while wave:
            lacking = [wanted for wanted in wave if not self._is_here(wanted.reference.id)]
            self._refuse(lacking)
            self._download(tip, {wanted.reference.id for wanted in lacking if self._is_there(wanted)})
            found = [child for wanted in wave for child in self._take(wanted)]
            if sum(place.size for place in self._waiting.values()) > _AHEAD:
                self._keep_waiting()  # an interrupted fetch goes on from here
            wave = []
            for child in found:
                if child.key not in seen and not self._is_done(child.reference):
                    seen.add(child.key)
                    wave.append(child)
        self._keep_waiting()
        self._taken.add(root)

    def _keep_waiting(self) -> None:
        """Put what was checked into the store: many objects as packs."""
        waiting, self._waiting = self._waiting, {}
        if len(waiting) >= parcels.PACK_FROM and not self._repair:
            try:
                self._repository.objects.put_packed(waiting)
            except CorruptStoreError as error:
                raise RemoteError(f"{error.message}: it changed while it was read", remedy="Fetch again.") from None
        else:  # as a file the right bytes come before wrong ones in a pack
            for identity, place in waiting.items():
                if self._repository.objects.put_span(place) != identity:
                    raise RemoteError(f"{place.path} changed while it was read", remedy="Fetch again.")

    def _is_here(self, identity: str) -> bool:
        objects = self._repository.objects
        if identity in self._waiting:
            return True
        if identity not in objects:
            return False
        if not self._repair:
            return True
        try:
            objects.verify(identity)
        except CorruptStoreError:
            return False
        return True

    def _is_done(self, reference: Reference) -> bool:
        """Whether all below is known to be here."""
        known = reference.kind == "commit" and not self._repair
        return known and reference.id in self._repository.commits(reference.id)

    def _is_there(self, wanted: _Wanted) -> bool:
        return wanted.reference.id in self._sizes

    def _small_ones(self) -> set[str]:
        """Small objects that are not here, up to `_AHEAD` bytes: most are needed, and one wave is faster than many."""
        chosen, total = set(), 0
        for identity, size in sorted(self._sizes.items(), key=lambda item: item[1]):
            total += size
            if size > _SMALL or total > _AHEAD:
                break
            if identity not in self._repository.objects:
                chosen.add(identity)
        return chosen

    def _refuse(self, lacking: Iterable[_Wanted]) -> None:
        """What must not be downloaded: what is not there, or larger than what it is said to be can be."""
        for wanted in lacking:
            kind, identity = wanted.reference
            if not self._is_there(wanted):
                if kind == "requests":  # withheld
                    continue
                told = "".join(f"; {problem}" for problem in self._remote.damaged)
                raise self._error(identity, f"the {kind} is missing{told}")
            if self._sizes[identity] > wanted.limit:
                raise self._error(identity, f"{self._sizes[identity]} bytes are too many for a {kind}")

    def _download(self, tip: Tip, ids: set[str]) -> None:
        needed = sorted(ids - self._spool.keys())
        self.received.downloaded += sum(self._sizes[identity] for identity in needed)
        self._refuse_beyond(self.received.downloaded)
        if needed:
            into = self._folder / str(len(self._spool))
            with os_errors(into):
                into.mkdir()
                finish_sharing(into)
            for identity, place in self._remote.read(tip, needed, into, self._progress.advance):
                self._spool[identity] = place
                if self._folder in place.path.parents:  # a pack may hold more than is needed of it
                    self._copied.add(place.path)
                    self._refuse_beyond(sum(path.stat().st_size for path in self._copied))

    def _refuse_beyond(self, size: int) -> None:
        if size > self._limits.total:
            raise RemoteError(
                f"{self._remote.address} holds more than {self._limits.total} bytes of what was asked for",
                remedy="If you trust it, fetch again with a larger --max-size.",
                limit=self._limits.total,
            )

    def _take(self, wanted: _Wanted) -> list[_Wanted]:
        """Put one object into the store, if it is new, and return what it refers to."""
        kind, identity = wanted.reference
        new = not self._is_here(identity)
        if new and identity not in self._spool:
            return []  # withheld
        try:
            return list(self._checked(wanted, self._spool[identity] if new else None))
        except CorruptStoreError as error:
            raise self._error(identity, f"it is not a valid {kind}: {error.message}") from error

    def _checked(self, wanted: _Wanted, new: Span | None) -> Iterator[_Wanted]:
        kind, identity = wanted.reference
        if new is not None and span_digest(new) != identity:
            raise self._error(identity, "its bytes do not hash to its name")
        place = new or self._waiting.get(identity) or self._repository.objects.place(identity)
        if kind not in KINDS:
            self._check(wanted.owner, place)
            if new is not None:
                self._count(identity, new)
            return
        data = place.read()
        if object_id(data) != identity:
            data = self._repository.objects.get(identity)
        value = KINDS[kind].read(data)
        self._check_value(wanted, value)
        if new is not None:
            self._count(identity, new)
        owner = value if isinstance(value, Patch | Commit) else None
        for reference in KINDS[kind].references(value):
            yield _Wanted(reference, identity, owner, self._limit_of(reference, owner))

    def _check_value(self, wanted: _Wanted, value: Any) -> None:
        """What the object must satisfy because of who refers to it, or because of this store's base."""
        identity = wanted.reference.id
        for problem in unfit(value):
            raise self._error(identity, problem)
        if isinstance(value, Patch):
            allowed = self._limits.linear if value.kind == "additive" else self._limits.weights
            for weight, shape in value.weights.items():
                if allowed.get(weight) != shape:
                    raise self._error(identity, f"{weight} of shape {shape} is no weight of this base")
        if isinstance(value, Patch | Commit) and value.base != self._repository.config.base_id:
            raise self._error(identity, f"it is about another base ({value.base[:12]})")
        if wanted.reference.kind == "requests":
            told = wanted.owner.requests if isinstance(wanted.owner, Patch) else ()
            if tuple(request.id for request in value) != told:
                raise self._error(identity, "its texts are not those of the patch's requests")

    def _limit_of(self, reference: Reference, owner: Owner) -> int:
        if reference.kind != "tensors":
            return MAX_SET if reference.kind == "set" else MAX_JSON
        if isinstance(owner, Patch):
            return columns_limit(owner) if owner.kind == "closed_form" else delta_limit(owner.weights)
        return delta_limit(self._limits.linear)

    def _count(self, identity: str, place: Span) -> None:
        self._waiting[identity] = place
        self.received.objects += 1
        self.received.size += place.size

    def _error(self, identity: str, reason: str) -> RemoteError:
        return RemoteError(
            f"object {identity[:12]} of {self._remote.address} is refused: {reason}",
            remedy="Nothing was changed here. Fetch again; if it stays, the remote is damaged: push a sound store (`push --all --tags`) to "
            "an empty place, and fetch from there.",
            object=identity,
            remote=self._remote.address,
        )


# --- fetch ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moved(Result):
    """A ref that moved, or would: where it was and where it is; None where it is not."""

    ref: str
    old: str | None
    new: str | None


def short_name(ref: str) -> str:
    """A branch or tag as it is told."""
    return ref.removeprefix(BRANCHES).removeprefix(TAGS)


def local_name(ref: str, remote: str) -> str:
    """What a branch or tag of a remote is called here."""
    return f"{REMOTES}{remote}/{ref[len(BRANCHES) :]}" if ref.startswith(BRANCHES) else ref


def check_base(repository: Store, remote: Remote, view: View) -> None:
    """Refuse a remote that is about another base.

    Raises:
        RemoteError: it is.
    """
    if view.source is not None and view.source.base != repository.config.base_id:
        raise RemoteError(
            f"{remote.address} is about another base ({view.source.base[:12]}, not {repository.config.base_id[:12]})",
            remedy="Use a remote of its own for each base; `patchhub clone` makes a store for this one.",
            base=view.source.base,
        )


@dataclass(frozen=True)
class Fetched(Result):
    """What `fetch` brought.

    Attributes:
        moved: refs of this store: ``refs/remotes/...``, tags, notes.
        received: objects and bytes that travelled.
        warnings: refs that were left out, and what was trusted, in words.
        proofs: of the commits that are new here: whether their weights are those of their facts.
        left_out: refs here that were not let in, and why.
    """

    moved: tuple[Moved, ...]
    received: Received = field(metadata=told(inline=True))
    warnings: tuple[str, ...]
    proofs: Proofs = NOTHING_PROVEN
    left_out: Mapping[str, str] = field(default_factory=dict, metadata=told(optional=True))


Prove = Callable[[Sequence[str], Collection[str]], Proofs]
"""Proves commits that are new here, each after its parents; also told which commits refs will lead to."""

Admit = Callable[[Mapping[str, str]], Mapping[str, str]]
"""Of the refs that are to come and their targets, which are here by then, those that may not, each with the reason."""


@dataclass(frozen=True)
class Entry:
    """What a fetch lets in.

    Attributes:
        prove: called with the commits that are new here, and where refs will lead, before any ref moves.
        trust: accept commits that are not proven; the operation names them.
        admit: which refs may come.
    """

    prove: Prove = lambda commits, tips: NOTHING_PROVEN
    trust: bool = False
    admit: Admit = lambda wanted: {}


_OPEN: Final = Entry()


class _Judge:
    """What a fetch asks of the commits that it brings; `proofs` is what was found."""

    def __init__(self, address: str, prove: Prove, *, trust: bool) -> None:
        self._address = address
        self._prove = prove
        self._trust = trust
        self.proofs = NOTHING_PROVEN

    def __call__(self, commits: Sequence[str], tips: Collection[str]) -> Mapping[str, Any]:
        try:
            self.proofs = self._prove(commits, tips)
        except CorruptStoreError as error:
            raise RemoteError(
                f"{self._address} is refused: {error.message}", remedy="Nothing was changed here.", remote=self._address
            ) from error
        unproven = self.proofs.unproven
        if unproven and not self._trust:
            raise RemoteError(
                f"{self._address} is refused: {unproven[0].words()}{f', and {len(unproven) - 1} more' if unproven[1:] else ''}",
                remedy="Nothing was changed here. Ask who pushed it; if you trust the weights as they are, say so with --trust.",
                unproven=[found.to_json() for found in unproven],
                remote=self._address,
            )
        return {PROVEN: self.proofs.commits, **({TRUSTED: [found.commit for found in unproven]} if unproven else {})}


def fetch(
    repository: Store,
    remote: Remote,
    name: str,
    intake: Intake,
    *,
    who: Who,
    entry: Entry = _OPEN,
    prune: bool = False,
    progress: Progress | None = None,
) -> Fetched:
    """Bring all branches, tags and notes of a remote here: branches as ``refs/remotes/<name>/*``.

    Args:
        intake: what is asked of all that is downloaded, whatever branch it belongs to.
        entry: what is asked of commits, and of where refs will lead, before any ref moves.
        prune: forget branches that the remote does not have any more.

    Raises:
        RemoteError: unreachable, about another base, it holds something the format does not allow, or weights that are not those of
            their facts.
    """
    view = remote.view()
    check_base(repository, remote, view)
    judge = _Judge(remote.address, entry.prove, trust=entry.trust)
    warnings = [f"{ref} of {remote.address} is left out: {reason}" for ref, reason in view.skipped.items()]
    _refuse_twins(remote, view)
    with receiving(repository, remote, intake, progress or Silent()) as receiver:
        wanted = _fetch_branches(remote, name, view, receiver, warnings)
        wanted |= _fetch_notes(repository, remote, view, receiver)
    left_out = entry.admit(wanted)
    if left_out:
        warnings += [f"{ref} is left out: {reason}" for ref, reason in left_out.items()]
        wanted = _let_in(repository, wanted, left_out)
    moved = list(_changes(repository.refs(), wanted, warnings))
    moved += _gone(repository.refs(), view, name) if prune else []
    if moved:
        changes = {move.ref: (move.old, move.new) for move in moved}
        arguments = {"remote": name}
        repository.move_refs(
            changes,
            command=FETCH,
            arguments=arguments,
            author=who.author,
            time=who.time,
            accept=lambda fresh: judge(fresh, wanted.values()),
        )
    warnings += [f"{found.words()}; it was trusted" for found in judge.proofs.unproven]
    warnings += _moved_aside(repository, remote, moved)
    return Fetched(tuple(moved), receiver.received, tuple(warnings), judge.proofs, left_out)


def _refuse_twins(remote: Remote, view: View) -> None:
    alike = twins(view.tips)
    if alike is not None:
        raise RemoteError(
            f"{remote.address} is refused: {alike[0]} and {alike[1]} differ in the case of letters alone",
            remedy="Rename or delete one of them there.",
            refs=list(alike),
        )


def _fetch_branches(remote: Remote, name: str, view: View, receiver: Receiver, warnings: list[str]) -> dict[str, str]:
    """Bring all branches and tags that can have a name here; returns where each will lead, and adds what is left out to ``warnings``."""
    wanted: dict[str, str] = {}
    for ref, tip in sorted(view.tips.items()):
        local = local_name(ref, name)
        try:
            check_ref(local)
        except RevisionError as error:
            warnings.append(f"{ref} of {remote.address} is left out: {error.message}")
            continue
        receiver.take(tip, Reference("commit", tip.commit), label=f"fetching {one_line(short_name(ref))}")
        wanted[local] = tip.commit
    return wanted


def _let_in(repository: Store, wanted: Mapping[str, str], left_out: Mapping[str, str]) -> dict[str, str]:
    """What may come: refs that are not left out, and notes about commits that are here then."""
    refs = {ref: target for ref, target in wanted.items() if not ref.startswith(NOTES) and ref not in left_out}
    below = states.ancestors(refs.values(), lambda commit: repository.commit(commit).parents)
    notes = {ref: ref[len(NOTES) :].partition("/")[0] for ref in wanted if ref.startswith(NOTES)}
    kept = {ref for ref, commit in notes.items() if commit in below or repository.commits(commit)}
    return {**refs, **{ref: target for ref, target in wanted.items() if ref in kept}}


def _fetch_notes(repository: Store, remote: Remote, view: View, receiver: Receiver) -> dict[str, str]:
    """Notes that are not set here: about commits that are here by now. Notes set here stay."""
    refs = repository.refs()
    wanted: dict[str, str] = {}
    for key, note in view.notes.items():
        commit, _, suite = key.partition("/")
        if NOTES + key in refs or commit not in repository.objects:
            continue
        holder = next(
            (tip for tip in view.tips.values() if note in repository.objects or note in remote.sizes(tip)), None
        )
        if holder is None:
            continue
        receiver.take(holder, Reference("note", note))
        found = repository.note(note)
        if (found.commit, found.suite) != (commit, suite):
            raise RemoteError(f"note {note[:12]} of {remote.address} is not about {key}", remedy="Push it again.")
        wanted[NOTES + key] = note
    return wanted


def _changes(refs: Mapping[str, str], wanted: Mapping[str, str], warnings: list[str]) -> Iterator[Moved]:
    for ref, target in wanted.items():
        old = refs.get(ref)
        if old == target:
            continue
        if ref.startswith(TAGS) and old is not None:
            warnings.append(f"the tag {ref[len(TAGS) :]} is at {old[:12]} here and at {target[:12]} there; it stays")
            continue
        yield Moved(ref, old, target)


def _moved_aside(repository: Store, remote: Remote, moved: Iterable[Moved]) -> Iterator[str]:
    """In words, which branches of a remote do not lead to where they were any more."""
    for move in moved:
        if move.ref.startswith(REMOTES) and move.old is not None and move.new is not None:
            _, lost = states.apart([move.new], [move.old], repository.parents, repository.rank)
            if lost:
                yield (
                    f"{move.ref[len(REMOTES) :]} was moved back or aside at {remote.address}: {lost} of the commits that it had at "
                    f"{move.old[:12]} are not below {move.new[:12]}; they stay here"
                )


def _gone(refs: Mapping[str, str], view: View, name: str) -> Sequence[Moved]:
    """The branches of a remote that are known here and that it does not have any more."""
    there = {local_name(ref, name) for ref in (*view.tips, *view.skipped)}
    prefix = f"{REMOTES}{name}/"
    return [Moved(ref, target, None) for ref, target in refs.items() if ref.startswith(prefix) and ref not in there]
