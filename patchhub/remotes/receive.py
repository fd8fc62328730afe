"""Taking objects from a remote: closure by closure, sizes bounded before, bytes and structure checked after download.

Nothing that a remote says is believed. An object enters the store only under the hash of its content and only if it
reads as what its referrer says it is; refs move only after everything below them has been checked."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, NamedTuple

from patchhub.cache import DOWNLOADS
from patchhub.canonical import object_id
from patchhub.errors import CorruptStoreError, RemoteError
from patchhub.fsio import Span, finish_sharing, make_directories, os_errors
from patchhub.objects import Commit, Patch
from patchhub.progress import Progress, stage_bytes
from patchhub.remotes import parcels
from patchhub.remotes.remote import Remote, Tip
from patchhub.results import Result, told
from patchhub.store.object_store import span_digest
from patchhub.store.states import KINDS, Reference, unfit
from patchhub.store.store import Store

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
