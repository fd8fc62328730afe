"""A remote that is a folder: ``patchhub.json`` with all refs, and ``objects/`` as in a store.

The folder is on this machine or behind any address that fsspec knows."""

from __future__ import annotations

import contextlib
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Protocol

from patchhub.errors import RemoteError, RepositoryError
from patchhub.fsio import CHUNK, DISK, TEMPORARY_SUFFIX, make_directories, read_chunks, write_atomically, writer_lock
from patchhub.remotes.remote import (
    MAX_BYTES,
    NAME,
    FolderManifest,
    Publication,
    RemoteMovedError,
    Tip,
    View,
    read_folder,
)
from patchhub.store.revisions import TAGS

LOCK: Final = "lock"
LOCK_SECONDS: Final = 60.0
LOCK_ATTEMPTS: Final = 240
"""How often a lock that is a file is tried in those seconds."""


class Files(Protocol):
    """What a folder of files must be able to do; names use ``/``."""

    def read(self, name: str, limit: int) -> bytes | None:
        """A file's content; None if there is none; `RemoteError` if it is longer than ``limit``."""
        ...

    def write(self, name: str, source: bytes | Path | None) -> None:
        """Replace a file in one step; None takes it away, if it is there."""
        ...

    def sizes(self, folder: str) -> dict[str, int]:
        """Bytes of every file below a folder, by name."""
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

    def write(self, name: str, source: bytes | Path | None) -> None:
        path = self.root / name
        try:
            if source is None:
                path.unlink(missing_ok=True)
                return
            make_directories(path.parent)
            write_atomically(path, (source,) if isinstance(source, bytes) else read_chunks(source), disk=DISK)
        except OSError as error:
            raise _unwritable(str(path), error) from error
        except RepositoryError as error:
            raise RemoteError(error.message, remedy="Free space or fix the permissions.", path=str(path)) from error

    def sizes(self, folder: str) -> dict[str, int]:
        found = {}
        for path in sorted((self.root / folder).rglob("*")):
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

    def write(self, name: str, source: bytes | Path | None) -> None:
        path = self._path(name)
        temporary = f"{path}.{secrets.token_hex(8)}{TEMPORARY_SUFFIX}"
        try:
            if source is None:
                with contextlib.suppress(FileNotFoundError):
                    self._fs.rm_file(path)
                return
            self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            if isinstance(source, bytes):
                self._fs.pipe_file(temporary, source)
            else:
                self._fs.put_file(str(source), temporary)
            self._fs.mv(temporary, path)
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


OBJECT: Final = re.compile(r"objects/([0-9a-f]{2})/([0-9a-f]{62})")
"""The only names of objects that are ever read."""


def object_path(identity: str) -> str:
    """Where an object lies in a remote."""
    return f"objects/{identity[:2]}/{identity[2:]}"


class FileRemote:
    """A folder, or what fsspec makes look like one. Objects first, then the manifest in one step under a lock, then what is withdrawn."""

    def __init__(self, address: str, files: Files) -> None:
        self._address = address
        self._files = files
        self._listed: Mapping[str, int] | None = None  # of the latest view

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
        if self._listed is None:
            found = self._files.sizes("objects").items()
            self._listed = {match[1] + match[2]: size for name, size in found if (match := OBJECT.fullmatch(name))}
        return self._listed

    def read(self, tip: Tip, ids: Collection[str], into: Path) -> Iterator[tuple[str, Path]]:
        for identity in ids:
            try:
                yield identity, self._files.local(object_path(identity), into)
            except FileNotFoundError:
                raise RemoteError(
                    f"object {identity[:12]} disappeared from {self._address}", remedy="Run the command again."
                ) from None

    def publish(self, publication: Publication) -> None:
        with self._files.locked():
            self._check(self._manifest(), publication)  # before anything is sent
        for identity, file in publication.objects.items():
            self._files.write(object_path(identity), file)
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
                self._files.write(NAME, manifest.to_json())
        for identity in publication.withdrawn:
            self._files.write(object_path(identity), None)
        self._listed = None

    def remove(self, ref: str, expected: Tip) -> None:
        with self._files.locked():
            before = self._manifest()
            if before is None or before.refs.get(ref) != expected.commit:
                raise self._moved(ref, expected.commit, before.refs.get(ref) if before else None)
            refs = {name: commit for name, commit in before.refs.items() if name != ref}
            self._files.write(NAME, replace(before, refs=refs).to_json())

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
