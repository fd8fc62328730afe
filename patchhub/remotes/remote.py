"""What every remote can do, whatever is behind it; ``patchhub.json``, what a remote says about itself; and the remote that is a folder.

The manifest is read strictly, as every object is. A folder holds ``patchhub.json`` with all refs, and ``objects/`` as in a store; it is on
this machine or behind any address that fsspec knows."""

from __future__ import annotations

import contextlib
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, ClassVar, Final, Protocol, TypeVar, cast

from patchhub.canonical import IDENTIFIER, TEXT, Codec, MalformedError, StoredObject, map_of, optional
from patchhub.errors import CorruptStoreError, RemoteError, RepositoryError, RevisionError
from patchhub.fsio import CHUNK, DISK, TEMPORARY_SUFFIX, Span, make_directories, write_atomically, writer_lock
from patchhub.remotes.parcels import FOLDERS, Contents, Parcel, Reader, object_path, wrapped
from patchhub.store.object_store import INDEX, PACK, pack_path
from patchhub.store.revisions import BRANCHES, NOTES, TAGS, check_ref

NAME: Final = "patchhub.json"
MAX_BYTES: Final = 16 << 20
"""No manifest is larger; 50,000 notes fit."""

Manifest = TypeVar("Manifest", bound="StoredObject")


def _decode_flag(value: Any, path: str) -> bool:
    if not isinstance(value, bool):
        raise MalformedError(path, "is neither true nor false")
    return value


FLAG: Final = Codec(_decode_flag)


_MODEL = re.compile(r"[A-Za-z0-9][\w.\-]*(/[A-Za-z0-9][\w.\-]*)?", re.ASCII)
_HUB_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Source:
    """The base that a remote is about: the id of its object and, if it is on the Hub, its name and commit there."""

    base: str
    model: str | None
    revision: str | None


@dataclass(frozen=True)
class BranchManifest(StoredObject):
    """``patchhub.json`` in the tree of a branch or tag on the Hub."""

    TYPE: ClassVar[str] = "branch"
    base: Annotated[str, IDENTIFIER]
    base_model: Annotated[str | None, optional(TEXT)]
    base_revision: Annotated[str | None, optional(TEXT)]
    commit: Annotated[str, IDENTIFIER]
    notes: Annotated[Mapping[str, str], map_of(IDENTIFIER)]
    private_facts: Annotated[bool, FLAG]

    @property
    def source(self) -> Source:
        return Source(self.base, self.base_model, self.base_revision)


@dataclass(frozen=True)
class FolderManifest(StoredObject):
    """``patchhub.json`` of a folder: every branch and tag at once."""

    TYPE: ClassVar[str] = "folder"
    base: Annotated[str, IDENTIFIER]
    base_model: Annotated[str | None, optional(TEXT)]
    base_revision: Annotated[str | None, optional(TEXT)]
    notes: Annotated[Mapping[str, str], map_of(IDENTIFIER)]
    private_facts: Annotated[bool, FLAG]
    refs: Annotated[Mapping[str, str], map_of(IDENTIFIER)]

    @property
    def source(self) -> Source:
        return Source(self.base, self.base_model, self.base_revision)


def read_branch(data: bytes, place: str) -> BranchManifest:
    """The manifest of one branch; `RemoteError` names ``place`` if the bytes are none."""
    return _read(BranchManifest, data, place)


def read_folder(data: bytes, place: str) -> FolderManifest:
    """The manifest of a folder; `RemoteError` names ``place`` if the bytes are none."""
    manifest = _read(FolderManifest, data, place)
    for ref in manifest.refs:
        if not ref.startswith((BRANCHES, TAGS)):
            raise _refusal(place, f"it names {ref!r}, which is neither a branch nor a tag")
        _check_name(ref, place)
    return manifest


def _read(kind: type[Manifest], data: bytes, place: str) -> Manifest:
    try:
        manifest: Any = kind.from_json(data)
    except CorruptStoreError as error:
        reason = error.message.partition(": ")[2]
        raise _refusal(place, reason) from None
    for note in manifest.notes:
        if note.partition("/")[0] == note or len(note.partition("/")[0]) != 64:
            raise _refusal(place, f"{note!r} is not the name of a note")
        _check_name(NOTES + note, place)
    if manifest.base_model is not None and _MODEL.fullmatch(manifest.base_model) is None:
        raise _refusal(place, f"{manifest.base_model!r} is not the name of a model on the Hub")
    if manifest.base_revision is not None and _HUB_COMMIT.fullmatch(manifest.base_revision) is None:
        raise _refusal(place, f"{manifest.base_revision!r} is not a commit on the Hub")
    return cast(Manifest, manifest)


def _check_name(ref: str, place: str) -> None:
    try:
        check_ref(ref)
    except RevisionError as error:
        raise _refusal(place, error.message) from None


def _refusal(place: str, reason: str) -> RemoteError:
    return RemoteError(
        f"{NAME} of {place} cannot be read: {reason}",
        remedy="It was made by a newer version of patchhub, or is damaged or not meant for patchhub.",
        place=place,
    )


class RemoteMovedError(RemoteError):
    """A branch of the remote was moved by someone else between reading and writing it."""


@dataclass(frozen=True)
class Tip:
    """Where a branch or tag of a remote is.

    Attributes:
        commit: the patchhub commit.
        token: what the remote itself calls this state, to notice that it moved; on the Hub, a commit of the Hub.
    """

    commit: str
    token: str


@dataclass(frozen=True)
class View:
    """All that a remote says about itself.

    Attributes:
        source: its base; None while it is empty.
        tips: every branch and tag by full ref name (``refs/heads/main``).
        notes: note ids by ``commit/suite``.
        private: the branches and tags that say of themselves that the texts of their facts are withheld.
        empty: branches that are there and hold nothing of patchhub, such as ``main`` of a new repository.
        skipped: refs that cannot be used here, each with the reason.
    """

    source: Source | None
    tips: Mapping[str, Tip]
    notes: Mapping[str, str]
    private: frozenset[str]
    empty: frozenset[str] = frozenset()
    skipped: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Publication:
    """One ref that is to be moved, with all that must be there before it is.

    Attributes:
        ref: full name of a branch or tag.
        commit: where it shall be.
        expected: where it was seen; None if it was not there.
        near: the tip that ``objects`` were compared with; where a new ref starts from.
        groups: the objects to send, those that ``near`` lacks: id -> where its bytes are; in groups whose objects never share a pack.
        gathered: objects that ``near`` has as files of their own and that shall lie in packs from then on, in such groups too.
        withdrawn: objects to take out, which ``near`` has: texts that shall be read no more.
        source: the base.
        notes: notes to set beside those that are there.
        private_facts: mark the remote as one from which texts are withheld.
        pages: files for readers of the Hub, by path; None deletes one that is there. Folders have no readers.
        message: one line on what is new.
    """

    ref: str
    commit: str
    expected: Tip | None
    near: Tip | None
    groups: Sequence[Mapping[str, Span]]
    gathered: Sequence[Mapping[str, Span]]
    withdrawn: Collection[str]
    source: Source
    notes: Mapping[str, str]
    private_facts: bool
    pages: Mapping[str, bytes | None]
    message: str

    @property
    def size(self) -> int:
        """Bytes of all objects."""
        return sum(place.size for group in self.groups for place in group.values())


Heard = Callable[[int], None]
"""Called with the bytes that travelled."""


def unheard(size: int) -> None:
    """Nobody wants to know."""


class Remote(Protocol):
    """A place that holds branches, tags, notes and the objects they need."""

    @property
    def address(self) -> str:
        """How the user names it."""
        ...

    def view(self) -> View:
        """What is there now."""
        ...

    def sizes(self, tip: Tip) -> Mapping[str, int]:
        """Bytes of every object that can be read at ``tip``."""
        ...

    @property
    def damaged(self) -> Sequence[str]:
        """In words, what the last `sizes` left out: packs that are damaged."""
        ...

    def alone(self, tip: Tip) -> Collection[str]:
        """Those objects of `sizes` that are files of their own."""
        ...

    def read(self, tip: Tip, ids: Collection[str], into: Path, heard: Heard = unheard) -> Iterator[tuple[str, Span]]:
        """Where each object's bytes are on this machine, each of which `sizes` named; not verified. ``into`` is an empty folder to use."""
        ...

    def publish(self, publication: Publication, heard: Heard = unheard) -> None:
        """Send what is new and move the ref, in one step as seen by readers.

        Raises:
            RemoteMovedError: the ref is not where it was expected; nothing was moved.
            RemoteError: not permitted, unreachable, or interrupted; the ref is where it was.
        """
        ...

    def remove(self, ref: str, expected: Tip) -> None:
        """Take a branch or tag away; the objects that it needed stay.

        Raises:
            RemoteMovedError: it is not where it was expected.
            RemoteError: not permitted or unreachable.
        """
        ...


LOCK: Final = "lock"
LOCK_SECONDS: Final = 60.0
LOCK_ATTEMPTS: Final = 240
"""How often a lock that is a file is tried in those seconds."""


class Files(Protocol):
    """What a folder of files must be able to do; names use ``/``."""

    def read(self, name: str, limit: int) -> bytes | None:
        """A file's content; None if there is none; `RemoteError` if it is longer than ``limit``."""
        ...

    def write(self, name: str, source: Iterable[bytes] | None) -> None:
        """Replace a file in one step by the concatenated pieces; None takes it away, if it is there."""
        ...

    def sizes(self, folder: str) -> dict[str, int]:
        """Bytes of every file one or two levels below a folder, by name."""
        ...

    def local(self, name: str, into: Path) -> Path:
        """A file on this machine with the content of ``name``; where a copy is needed it is made in ``into``."""
        ...

    def locked(self) -> contextlib.AbstractContextManager[None]:
        """Keep other writers out."""
        ...


class LocalFiles:
    """A folder on this machine."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def read(self, name: str, limit: int) -> bytes | None:
        path = self.root / name
        try:
            with _reading(str(path)):
                if not stat.S_ISREG(path.stat().st_mode):
                    raise RemoteError(f"{path} is not a file", remedy="Remove it.", path=str(path))
                with open(path, "rb") as file:
                    return _bounded(file.read(limit + 1), limit, str(path))
        except FileNotFoundError:
            return None

    def write(self, name: str, source: Iterable[bytes] | None) -> None:
        path = self.root / name
        try:
            if source is None:
                path.unlink(missing_ok=True)
                return
            make_directories(path.parent)
            write_atomically(path, source, disk=DISK)
        except OSError as error:
            raise _unwritable(str(path), error) from error
        except CorruptStoreError:  # what is to be sent is damaged here
            raise
        except RepositoryError as error:
            raise RemoteError(error.message, remedy="Free space or fix the permissions.", path=str(path)) from error

    def sizes(self, folder: str) -> dict[str, int]:
        found = {}
        for below in _listed(self.root / folder):
            for path in _listed(below) if below.is_dir() else (below,):
                try:
                    facts = path.stat()
                except OSError:  # a link that leads nowhere
                    continue
                if stat.S_ISREG(facts.st_mode):
                    found[path.relative_to(self.root).as_posix()] = facts.st_size
        return found

    def local(self, name: str, into: Path) -> Path:
        return self.root / name

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        try:
            make_directories(self.root)
        except OSError as error:
            raise _unwritable(str(self.root), error) from error
        with writer_lock(self.root / LOCK, timeout=LOCK_SECONDS):
            yield


def _listed(directory: Path) -> list[Path]:
    """What is in a directory; nothing where there is none. Only as deep as objects lie is looked, wherever links lead."""
    try:
        with _reading(str(directory)):
            return sorted(directory.iterdir()) if directory.is_dir() else []
    except FileNotFoundError:  # gone meanwhile
        return []


class FsspecFiles:
    """A folder behind an fsspec address such as ``s3://bucket/facts`` or ``memory://facts``."""

    def __init__(self, address: str, *, sleep: Callable[[float], None] = time.sleep) -> None:
        import fsspec

        try:
            filesystem, root = fsspec.core.url_to_fs(address)
        except Exception as error:  # each file system has errors of its own
            raise RemoteError(
                f"{address} cannot be opened: {error}",
                remedy="Give a folder, hf://user/repo or an fsspec address, with its library installed.",
                address=address,
            ) from error
        self.address = address
        self._sleep = sleep
        self._fs: Any = filesystem
        self._prefix = f"{root.rstrip('/')}/" if root.strip("/") else ""

    def read(self, name: str, limit: int) -> bytes | None:
        try:
            with _reading(f"{self.address}/{name}"), self._fs.open(self._path(name), "rb") as file:
                return _bounded(file.read(limit + 1), limit, name)
        except FileNotFoundError:
            return None

    def write(self, name: str, source: Iterable[bytes] | None) -> None:
        path = self._path(name)
        temporary = f"{path}.{secrets.token_hex(8)}{TEMPORARY_SUFFIX}"
        try:
            if source is None:
                with contextlib.suppress(FileNotFoundError):
                    self._fs.rm_file(path)
                return
            self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            with self._fs.open(temporary, "wb") as file:
                for chunk in source:
                    file.write(chunk)
            self._fs.mv(temporary, path)
        except CorruptStoreError:
            raise
        except Exception as error:  # each file system has errors of its own
            raise _unwritable(f"{self.address}/{name}", error) from error

    def sizes(self, folder: str) -> dict[str, int]:
        with _reading(self.address):
            try:
                self._fs.invalidate_cache()
                listed = self._fs.find(self._path(folder), detail=True)
            except FileNotFoundError:
                return {}
        found = {path[len(self._prefix) :]: facts.get("size") for path, facts in sorted(listed.items())}
        for name, size in found.items():
            if not isinstance(size, int):
                raise RemoteError(
                    f"{self.address} does not say how large {name} is", remedy="Use another file system.", name=name
                )
        return found

    def local(self, name: str, into: Path) -> Path:
        target = into / secrets.token_hex(8)
        with (
            _reading(f"{self.address}/{name}"),
            self._fs.open(self._path(name), "rb") as source,
            open(target, "wb") as file,
        ):
            shutil.copyfileobj(source, file, CHUNK)
        return target

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        path = self._path(LOCK)
        for attempt in range(LOCK_ATTEMPTS):
            try:
                self._fs.makedirs(self._prefix.rstrip("/"), exist_ok=True)
                with self._fs.open(path, "xb") as file:
                    file.write(b"a push is under way\n")
                break
            except FileExistsError:
                if attempt == LOCK_ATTEMPTS - 1:
                    raise RemoteError(
                        f"someone else is pushing to {self.address}",
                        remedy=f"Try again; if nobody is, a push was interrupted: delete the file {LOCK} there.",
                        address=self.address,
                    ) from None
                self._sleep(LOCK_SECONDS / LOCK_ATTEMPTS)
            except Exception as error:
                raise _unwritable(f"{self.address}/{LOCK}", error) from error
        try:
            yield
        finally:
            self._fs.rm_file(path)

    def _path(self, name: str) -> str:
        return self._prefix + name


@contextlib.contextmanager
def _reading(place: str) -> Iterator[None]:
    """Turn a failure to read into a `RemoteError`; a file that is missing stays `FileNotFoundError`."""
    try:
        yield
    except (RemoteError, FileNotFoundError):
        raise
    except Exception as error:  # each file system has errors of its own
        raise RemoteError(f"{place} cannot be read: {error}", remedy="Check the address.", place=place) from error


def _bounded(data: bytes, limit: int, name: str) -> bytes:
    if len(data) > limit:
        raise RemoteError(f"{name} is longer than {limit} bytes", remedy="It is not of patchhub's format.", name=name)
    return data


def _unwritable(place: str, error: Exception) -> RemoteError:
    return RemoteError(
        f"{place} cannot be written: {error}", remedy="Check the address and your permissions there.", place=place
    )


def _told(chunks: Iterable[bytes], heard: Heard) -> Iterator[bytes]:
    """The same pieces, each told when the next one is asked for."""
    for chunk in chunks:
        yield chunk
        heard(len(chunk))


class FileRemote:
    """A folder, or what fsspec makes look like one. Objects first, then the manifest in one step under a lock, then what is withdrawn."""

    def __init__(self, address: str, files: Files) -> None:
        self._address = address
        self._files = files
        self._listed: Contents | None = None  # of the latest view
        self._reader = Reader(address, files.read)
        self._copies: dict[str, Path] = {}  # of packs, where they are read or wherever they were copied to

    @property
    def address(self) -> str:
        return self._address

    def view(self) -> View:
        self._listed = None
        manifest = self._manifest()
        if manifest is None:
            return View(None, {}, {}, frozenset())
        tips = {ref: Tip(commit, commit) for ref, commit in manifest.refs.items()}
        return View(manifest.source, tips, manifest.notes, frozenset(tips if manifest.private_facts else ()))

    def sizes(self, tip: Tip) -> Mapping[str, int]:
        return self._contents().sizes

    @property
    def damaged(self) -> Sequence[str]:
        return self._contents().damaged

    def alone(self, tip: Tip) -> Collection[str]:
        return self._contents().alone

    def _contents(self) -> Contents:
        if self._listed is None:
            found = [self._files.sizes(folder) for folder in FOLDERS]
            self._listed = self._reader.contents({name: size for part in found for name, size in part.items()})
        return self._listed

    def read(self, tip: Tip, ids: Collection[str], into: Path, heard: Heard = unheard) -> Iterator[tuple[str, Span]]:
        alone, _ = self._contents().grouped(ids)
        for identity in alone:
            try:
                place = Span.of(self._files.local(object_path(identity), into))
            except FileNotFoundError:  # it may lie in a pack by now
                self._listed = None
                if identity in self._contents().alone or identity not in self._contents().sizes:
                    raise self._disappeared(f"object {identity[:12]}") from None
                continue
            heard(place.size)
            yield identity, place
        contents = self._contents()
        packed = contents.grouped(ids)[1]
        for name, inside in packed.items():
            pack = self._pack(name, into)
            for identity in inside:
                place = contents.place(identity, pack)
                heard(place.size)
                yield identity, place

    def _pack(self, name: str, into: Path) -> Path:
        """A pack on this machine; a copy that was made before is used while it is there."""
        known = self._copies.get(name)
        if known is None or not known.exists():
            known = self._copies[name] = self._local(pack_path(name, PACK), into)
        return known

    def _local(self, name: str, into: Path) -> Path:
        try:
            path = self._files.local(name, into)
            path.stat()
            return path
        except FileNotFoundError:
            raise self._disappeared(name) from None

    def _disappeared(self, what: str) -> RemoteError:
        return RemoteError(f"{what} disappeared from {self._address}", remedy="Run the command again.")

    def publish(self, publication: Publication, heard: Heard = unheard) -> None:
        with self._files.locked():
            self._check(self._manifest(), publication)  # before anything is sent
        alone, parcels = wrapped(publication.groups)
        for identity, place in alone.items():
            self._files.write(object_path(identity), _told(place.chunks(), heard))
        for parcel in parcels:
            self._send(parcel, heard)
        gathered = wrapped(publication.gathered)[1]
        for parcel in gathered:
            self._send(parcel)
        with self._files.locked():
            before = self._manifest()
            self._check(before, publication)
            source, old_notes = publication.source, before.notes if before else {}
            manifest = FolderManifest(
                base=source.base,
                base_model=source.model,
                base_revision=source.revision,
                notes={**old_notes, **publication.notes},
                private_facts=publication.private_facts,
                refs={**(before.refs if before else {}), publication.ref: publication.commit},
            )
            if manifest != before:
                self._files.write(NAME, (manifest.to_json(),))
        self._withdraw(publication.withdrawn)
        for parcel in gathered:
            for identity, _ in parcel.objects:
                self._files.write(object_path(identity), None)
        self._listed = None

    def _send(self, parcel: Parcel, heard: Heard = unheard) -> None:
        """The pack, then its index: without it the pack does not count."""
        self._files.write(pack_path(parcel.index.name, PACK), _told(parcel.content(), heard))
        self._files.write(pack_path(parcel.index.name, INDEX), (parcel.index.data,))

    def _withdraw(self, gone: Collection[str]) -> None:
        """Take objects away, out of packs too: those that stay are there in another one first."""
        if not gone:
            return
        self._listed = None
        with TemporaryDirectory(prefix="patchhub-") as folder:
            parcels, paths = self._contents().without(gone, lambda name: self._pack(name, Path(folder)))
            for parcel in parcels:
                self._send(parcel)
        for path in paths:
            self._files.write(path, None)

    def remove(self, ref: str, expected: Tip) -> None:
        with self._files.locked():
            before = self._manifest()
            if before is None or before.refs.get(ref) != expected.commit:
                raise self._moved(ref, expected.commit, before.refs.get(ref) if before else None)
            refs = {name: commit for name, commit in before.refs.items() if name != ref}
            self._files.write(NAME, (replace(before, refs=refs).to_json(),))

    def _moved(self, ref: str, expected: str | None, found: str | None) -> RemoteMovedError:
        return RemoteMovedError(
            f"{ref} of {self._address} was moved by someone else",
            remedy="Run `patchhub pull`, then push again.",
            ref=ref,
            expected=expected,
            found=found,
        )

    def _manifest(self) -> FolderManifest | None:
        data = self._files.read(NAME, MAX_BYTES)
        return None if data is None else read_folder(data, self._address)

    def _check(self, manifest: FolderManifest | None, publication: Publication) -> None:
        found = manifest.refs.get(publication.ref) if manifest else None
        expected = publication.expected.commit if publication.expected else None
        if manifest is not None and manifest.base != publication.source.base:
            raise RemoteError(f"{self._address} is about another base", remedy="Push to another folder.")
        if found != expected or (publication.ref.startswith(TAGS) and found not in (None, publication.commit)):
            raise self._moved(publication.ref, expected, found)
