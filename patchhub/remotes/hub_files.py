"""Reading a repository of the Hub: its refs, its trees, its files, and one state of it object by object.

Calls are repeated where repeating is safe, and their many exceptions turned into `RemoteError`. Trees and files are named by a commit of
the Hub. The client that downloads compares sizes only, so every file is hashed here: against the id of an object, or against the git or
LFS digest that the tree names. What is in the client's cache is used without a network; an object that is damaged there is fetched
again, once."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from threading import Lock
from typing import TYPE_CHECKING, Any, Final, TypeVar

from patchhub.canonical import object_id
from patchhub.errors import CorruptStoreError, PatchhubError, RemoteError, RevisionError
from patchhub.fsio import Span
from patchhub.objects import Commit
from patchhub.remotes.parcels import Contents, Reader, checked, object_path
from patchhub.remotes.receive import MAX_JSON
from patchhub.remotes.remote import (
    MAX_BYTES,
    NAME,
    BranchManifest,
    Heard,
    read_branch,
    unheard,
)
from patchhub.store.object_store import (
    FOLDER,
    INDEX,
    MOST_BYTES,
    MOST_INDEX,
    PACK,
    Index,
    file_digest,
    pack_path,
    span_digest,
)

if TYPE_CHECKING:
    from huggingface_hub import HfApi


Result = TypeVar("Result")
Sleep = Callable[[float], None]

ATTEMPTS: Final = 5
MAX_WAIT: Final = 300.0
"""Seconds that a server may make us wait at once."""

DOWNLOAD_ATTEMPTS: Final = 2
"""The client repeats downloads by itself, but not one whose connection was reset."""

TRANSIENT: Final = frozenset({408, 429, 500, 502, 503, 504})

_REMEDIES: Final = {
    401: "Log in with `hf auth login`, or check the token.",
    402: "The account's storage is full; see its settings on the Hub.",
    403: "Log in with a token that may write to it: `hf auth login`.",
    404: "Check the name; if it is private, log in with `hf auth login`.",
    413: "It is larger than the Hub takes.",
    429: "The Hub asks for patience; try again later.",
}
_TRY_AGAIN: Final = "Check the connection and run the command again."
_NO_XET: Final = (
    "If the server offers no Xet, set HF_HUB_DISABLE_XET=1; else check the connection. Then run the command again."
)


def status_of(error: BaseException) -> int | None:
    """The HTTP status that an exception stands for; None if there was no answer."""
    response: Any = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    if status is None and error.__cause__ is not None:
        return status_of(error.__cause__)
    return int(status) if status is not None else None


def is_missing(error: BaseException) -> bool:
    """Whether it says that the repository is not there, or not visible."""
    from huggingface_hub.errors import RepositoryNotFoundError

    return isinstance(error, RepositoryNotFoundError)


def waiting_time(error: BaseException, attempt: int) -> float:
    """Seconds until the next attempt: what the server asks for (Retry-After), else 1, 2, 4, 8."""
    response: Any = getattr(error, "response", None)
    asked = response.headers.get("Retry-After", "") if response is not None else ""
    return min(float(asked), MAX_WAIT) if asked.isdecimal() else float(2**attempt)


def read_call(place: str, call: Callable[[], Result], *, sleep: Sleep = time.sleep, attempts: int = ATTEMPTS) -> Result:
    """The result of a call that changes nothing, repeated while it fails for reasons that pass.

    Args:
        place: what is called, for messages.
        attempts: fewer where the client repeats most of the call by itself.

    Raises:
        RemoteError: it kept failing, or failed for good.
    """
    for attempt in range(attempts):
        try:
            return call()
        except PatchhubError:
            raise
        except Exception as error:  # the client raises errors of several libraries
            if attempt == attempts - 1 or not _passes(error):
                raise explained(place, error) from error
            sleep(waiting_time(error, attempt))
    raise AssertionError("unreachable")


def write_call(call: Callable[[], Result], *, sleep: Sleep) -> Result:
    """The result of a call that changes something, repeated only while it is refused before anything is done (429).

    Raises:
        Exception: whatever the last attempt raised.
    """
    for attempt in range(ATTEMPTS - 1):
        try:
            return call()
        except Exception as error:  # the client raises errors of several libraries
            if status_of(error) != 429:
                raise
            sleep(waiting_time(error, attempt))
    return call()


def _passes(error: BaseException) -> bool:
    """Whether the same call may succeed a little later."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    if _cause(error, OfflineModeIsEnabled) or isinstance(error, ValueError):
        return False
    status = status_of(error)
    if status is not None:
        return status in TRANSIENT
    return not isinstance(error, OSError) or isinstance(error, ConnectionError | TimeoutError)


def explained(place: str, error: BaseException) -> RemoteError:
    """What went wrong, in one sentence, and what to do."""
    from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled

    status = status_of(error)
    facts = {"remote": place, "status": status, "cause": type(error).__name__}
    if _cause(error, OfflineModeIsEnabled):
        return RemoteError(f"{place} cannot be reached: offline mode is on", remedy="Unset HF_HUB_OFFLINE.", **facts)
    if isinstance(error, GatedRepoError):
        return RemoteError(f"{place} needs its owner's permission", remedy="Ask for access on its page.", **facts)
    if is_missing(error):
        return RemoteError(f"{place} does not exist or is private", remedy=_REMEDIES[404], **facts)
    reason = _reason(error)
    if status is None:
        remedy = _NO_XET if "/xet-" in reason else _TRY_AGAIN
        return RemoteError(f"{place} cannot be reached: {reason}", remedy=remedy, **facts)
    return RemoteError(
        f"{place} answered {status}: {reason}", remedy=_REMEDIES.get(status, "Run the command again later."), **facts
    )


def _reason(error: BaseException) -> str:
    """The first line of what the server or else the client says, and of what was behind it."""
    said = (getattr(error, "server_message", None) or str(error)).strip().partition("\n")[0] or type(error).__name__
    behind = "" if error.__cause__ is None else _reason(error.__cause__)
    return said if behind in said else f"{said} ({behind})"


def _cause(error: BaseException | None, kind: type[BaseException]) -> bool:
    while error is not None:
        if isinstance(error, kind):
            return True
        error = error.__cause__
    return False


_THREADS: Final = 8


@dataclass(frozen=True)
class HubRefs:
    """Branches and tags by name, each with its commit on the Hub."""

    branches: Mapping[str, str]
    tags: Mapping[str, str]


class HubFiles:
    """One repository of the Hub, read. Trees and manifests, which cannot change, are asked for once."""

    def __init__(self, repo: str, api: HfApi, *, sleep: Sleep = time.sleep) -> None:
        self.repo = repo
        self.api = api
        self.place = f"hf://{repo}"
        self._sleep = sleep
        self._trees: dict[str, dict[str, Any]] = {}
        self._manifests: dict[str, BranchManifest | None] = {}
        self._contents: dict[str, Contents] = {}
        self._indexes: dict[str, Index] = {}
        self._copies: dict[str, Path] = {}

    def call(self, call: Callable[[], Result]) -> Result:
        """`read_call` about this repository."""
        return read_call(self.place, call, sleep=self._sleep)

    def refs(self) -> HubRefs | None:
        """Where everything is now; None if there is no such repository, or none that we may see."""
        from huggingface_hub.errors import RepositoryNotFoundError

        def ask() -> Any:
            try:
                return self.api.list_repo_refs(self.repo)
            except RepositoryNotFoundError as error:
                if is_missing(error) and getattr(error.response, "status_code", None) in (401, 404):
                    return None
                raise

        found = self.call(ask)
        if found is None:
            return None
        return HubRefs(
            {ref.name: ref.target_commit for ref in found.branches}, {ref.name: ref.target_commit for ref in found.tags}
        )

    def tree(self, sha: str) -> Mapping[str, Any]:
        """Every file at a commit of the Hub, by path."""
        if sha not in self._trees:
            listed = self.call(lambda: list(self.api.list_repo_tree(self.repo, recursive=True, revision=sha)))
            self._trees[sha] = {entry.path: entry for entry in listed if hasattr(entry, "blob_id")}
        return self._trees[sha]

    def contents(self, sha: str) -> Contents:
        """Every object at a commit of the Hub; names of another form are not objects."""
        if sha not in self._contents:
            tree = self.tree(sha)
            with TemporaryDirectory(prefix="patchhub-") as folder:
                reader = Reader(self.place, lambda path, size: self._index(sha, path, Path(folder)))
                reader.known = self._indexes
                found = reader.contents({path: int(entry.size) for path, entry in tree.items()})
            for identity in found.alone:
                entry = tree[object_path(identity)]
                if entry.lfs is not None and entry.lfs.sha256 != identity:
                    raise RemoteError(
                        f"object {identity[:12]} of {self.place} is refused: the Hub says that its content has another hash",
                        remedy="The remote is damaged: push a sound store to an empty one.",
                        object=identity,
                    )
            self._contents[sha] = found
        return self._contents[sha]

    def manifest(self, sha: str, into: Path) -> BranchManifest | None:
        """``patchhub.json`` at a commit of the Hub; None if there is none.

        Raises:
            RemoteError: it is none of this format, or its bytes are not those that the tree names.
        """
        if sha not in self._manifests:
            found = self.call(lambda: self.api.get_paths_info(self.repo, [NAME], revision=sha))
            self._manifests[sha] = self._read_manifest(sha, found[0], into) if found else None
        return self._manifests[sha]

    def _read_manifest(self, sha: str, entry: Any, into: Path) -> BranchManifest:
        place = f"{self.place} at {sha[:7]}"
        if not hasattr(entry, "blob_id") or entry.size > MAX_BYTES:
            raise RemoteError(f"{NAME} of {place} is too large or a folder", remedy="It is not of patchhub's format.")
        for fresh in (False, True):
            data = self.download(sha, NAME, into, fresh=fresh).read_bytes()
            if _git_digest(data) == entry.blob_id or (
                entry.lfs and entry.lfs.sha256 == hashlib.sha256(data).hexdigest()
            ):
                return read_branch(data, place)
        raise RemoteError(f"{NAME} of {place} arrives damaged", remedy="Run the command again.", remote=self.place)

    def read_objects(
        self, sha: str, ids: Collection[str], into: Path, heard: Heard = unheard
    ) -> Iterator[tuple[str, Span]]:
        """Where each object's bytes are on this machine, verified; a file that arrives damaged is fetched once more.

        Args:
            heard: called with bytes as they arrive, by one thread at a time.

        Raises:
            RemoteError: an object stays damaged.
        """

        bar, contents = _bar_of(heard), self.contents(sha)
        alone, packed = contents.grouped(ids)

        def read(identity: str) -> tuple[str, Span]:
            for fresh in (False, True):
                path = self.download(sha, object_path(identity), into, fresh=fresh, bar=bar)
                if file_digest(path) == identity:
                    return identity, Span.of(path)
            raise RemoteError(
                f"object {identity[:12]} of {self.place} is refused: its bytes do not hash to its name",
                remedy="Run the command again; if it stays, push a sound store to an empty one.",
                object=identity,
                remote=self.place,
            )

        with ThreadPoolExecutor(_THREADS) as pool:
            yield from pool.map(read, alone)
        for name, inside in packed.items():
            pack = self._pack(sha, name, into)
            if any(span_digest(contents.place(identity, pack)) != identity for identity in inside):
                pack = self._pack(sha, name, into, fresh=True)
            for identity in inside:
                place = checked(self.place, identity, contents.place(identity, pack))
                heard(place.size)
                yield identity, place

    def _index(self, sha: str, path: str, into: Path) -> bytes:
        """An index, fetched once more where it arrives damaged."""
        data = self.download(sha, path, into).read_bytes()
        if object_id(data) != PurePosixPath(path).stem:
            data = self.download(sha, path, into, fresh=True).read_bytes()
        return data

    def _pack(self, sha: str, name: str, into: Path, *, fresh: bool = False) -> Path:
        """A pack on this machine; a copy that was made before is used while it is there."""
        known = self._copies.get(name)
        if fresh or known is None or not known.exists():
            known = self._copies[name] = self.download(sha, pack_path(name, PACK), into, fresh=fresh)
        return known

    def pack(self, sha: str, name: str, into: Path) -> Path:
        """A pack on this machine, not verified."""
        return self._pack(sha, name, into)

    def download(self, sha: str, path: str, into: Path, *, fresh: bool = False, bar: Any = None) -> Path:
        """One file at a commit of the Hub, through the client's cache in ``into``; not verified.

        Args:
            bar: the client's class for bars, see `_bar_of`; None: it shows none.
        """
        options = {"cache_dir": into, "force_download": fresh, "tqdm_class": bar or _bar_of(unheard)}
        found = read_call(
            self.place,
            lambda: self.api.hf_hub_download(self.repo, path, revision=sha, **options),
            sleep=self._sleep,
            attempts=DOWNLOAD_ATTEMPTS,
        )
        return Path(found)


def _bar_of(heard: Heard) -> Any:
    """A class of bars for the client, which shows nothing and passes on what it is told."""
    from tqdm import tqdm

    lock = Lock()

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *given: Any, **options: Any) -> None:
            options.pop("name", None)
            super().__init__(*given, **{**options, "disable": True})

        def update(self, n: float | None = 1) -> None:
            with lock:
                heard(int(n or 0))

    return Bar


def _git_digest(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


_DIGITS = re.compile(r"[0-9a-f]{8,64}")
_HUB_COMMIT = 40
_FULL = 64


class HubSnapshot:
    """A branch, a tag, a commit of the Hub (40 digits) or a patchhub commit (64 digits, or their beginning) of a Hub repository.

    Attributes:
        sha: the commit of the Hub that everything is read from.
        manifest: its ``patchhub.json``.
        commit: the patchhub commit that was asked for.
    """

    def __init__(
        self,
        repo: str,
        revision: str,
        *,
        endpoint: str | None = None,
        token: str | None = None,
        sleep: Sleep = time.sleep,
    ) -> None:
        """Find the revision.

        Raises:
            RemoteError: unreachable and not in the cache, or nothing of patchhub.
            RevisionError: no such revision.
        """
        from huggingface_hub import HfApi

        self._api: Any = HfApi(endpoint=endpoint, token=token)
        self._repo = repo
        self._place = f"hf://{repo}"
        self._sleep = sleep
        self._packs: Contents | None = None  # listed when an object is no file of its own
        at, commit = self._find(revision)
        file = self._download(NAME, at, limit=MAX_BYTES)
        self.sha = file.parent.name
        self.manifest: BranchManifest = read_branch(file.read_bytes(), f"{self._place} at {at}")
        self.commit = commit or self.manifest.commit

    def read_commit(self, identity: str) -> Commit:
        """A commit, verified; `RemoteError` if it is about another base than the manifest says."""
        commit = Commit.from_json(self.read(identity))
        if commit.base != self.manifest.base:
            raise RemoteError(f"commit {identity[:12]} of {self._place} is about another base", remedy="Do not use it.")
        return commit

    def read(self, identity: str, *, limit: int = MAX_JSON) -> bytes:
        """The bytes of a JSON object, verified."""
        return self.place(identity, limit=limit).read()

    def place(self, identity: str, *, limit: int) -> Span:
        """Where an object's bytes are on this machine, verified.

        Raises:
            RemoteError: it is missing, larger than `limit` bytes, or stays damaged.
        """
        packed = self._packs.grouped([identity])[1] if self._packs else {}
        if not packed:
            try:
                return self._sound(identity, object_path(identity), limit, Span.of)
            except RemoteError:
                self._packs = self._packs or self._listed_packs()
                packed = self._packs.grouped([identity])[1]
                if not packed:
                    raise
        (name,), contents = packed, self._packs
        assert contents is not None
        size = contents.sizes[identity]
        if size > limit:
            raise self._too_large(f"object {identity[:12]}", size, limit)
        return self._sound(identity, pack_path(name, PACK), MOST_BYTES, lambda pack: contents.place(identity, pack))

    def _sound(self, identity: str, path: str, limit: int, place: Callable[[Path], Span]) -> Span:
        """Where an object is in a file of the repository, which is fetched again where it arrives damaged."""
        for fresh in (False, True):
            found = place(self._download(path, self.sha, limit=limit, fresh=fresh))
            if span_digest(found) == identity:
                return found
        raise RemoteError(
            f"object {identity[:12]} of {self._place} is refused: its bytes do not hash to its name",
            remedy="Try again; if it stays, the repository is damaged.",
            object=identity,
        )

    def _listed_packs(self) -> Contents:
        """What the packs hold; those of the client's cache where there is no network. A damaged index is passed over."""
        try:
            paths = HubFiles(self._repo, self._api, sleep=self._sleep).tree(self.sha)
            names = [path for path in paths if path.startswith(f"{FOLDER}/") and path.endswith(INDEX)]
        except RemoteError:
            names = [
                path.relative_to(path.parents[1]).as_posix()
                for path in self._cached_files(f"{self.sha}/{FOLDER}/*{INDEX}")
            ]
        found: dict[str, Index] = {}
        for path in names:
            name, left = PurePosixPath(path).stem, MOST_INDEX - sum(len(index.data) for index in found.values())
            with suppress(CorruptStoreError):
                found[name] = Index.read(self._download(path, self.sha, limit=left).read_bytes(), name)
        return Contents({}, found)

    def _find(self, revision: str) -> tuple[str, str | None]:
        """What to read from the Hub, and the patchhub commit if `revision` names one: in the cache, else there."""
        if _DIGITS.fullmatch(revision) is None or len(revision) == _HUB_COMMIT:
            return revision, None
        found = self._cached(revision) or self._listed(revision)
        if len({commit for _, commit in found}) > 1:
            raise RevisionError(f"{revision!r} is ambiguous in {self._place}", remedy="Write more digits of the id.")
        if found:
            return found[0]
        if len(revision) == _FULL:
            raise RevisionError(f"{self._place} has no commit {revision[:12]}", remedy="Use a branch or a tag of it.")
        return revision, None

    def _cached(self, digits: str) -> list[tuple[str, str]]:
        """(commit of the Hub, patchhub object) of all that is in the client's cache and begins with those digits."""
        files = [path for path in self._cached_files(f"*/{object_path(digits)}*") if (path.parents[2] / NAME).exists()]
        found = [(path.parents[2].name, path.parent.name + path.name) for path in files]
        for path in self._cached_files(f"*/{FOLDER}/*{INDEX}"):
            if (path.parents[1] / NAME).exists():
                found += [(path.parents[1].name, identity) for identity in Index(path.read_bytes()).ids(digits)]
        return found

    def _cached_files(self, pattern: str) -> list[Path]:
        """What the client's cache has of this repository's files, below the commit of the Hub."""
        from huggingface_hub import constants
        from huggingface_hub.file_download import repo_folder_name

        folder = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=self._repo, repo_type="model"), "snapshots")
        return sorted(folder.glob(pattern))

    def _listed(self, digits: str) -> list[tuple[str, str]]:
        """The same of all that branches and tags of the repository hold."""
        files = HubFiles(self._repo, self._api, sleep=self._sleep)
        refs = files.refs()
        if refs is None:
            raise RemoteError(
                f"{self._place} does not exist or is private", remedy="Check the name, or run `hf auth login`."
            )
        heads = sorted({*refs.branches.values(), *refs.tags.values()})
        return [(sha, name) for sha in heads for name in files.contents(sha).sizes if name.startswith(digits)]

    def _download(self, path: str, revision: str, *, limit: int, fresh: bool = False) -> Path:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RevisionNotFoundError

        def ask() -> Path:
            try:
                cached = (
                    len(revision) == 40 and not fresh and try_to_load_from_cache(self._repo, path, revision=revision)
                )
                if not isinstance(cached, str):
                    self._refuse_large(path, revision, limit)
                return Path(self._api.hf_hub_download(self._repo, path, revision=revision, force_download=fresh))
            except RevisionNotFoundError:
                raise RevisionError(
                    f"{self._place} has no revision {revision}", remedy="Use a branch, a tag or a commit of it."
                ) from None
            except LocalEntryNotFoundError:
                raise
            except EntryNotFoundError:
                raise RemoteError(
                    f"{self._place} at {revision} has no {path}", remedy="It is not a whole patchhub repository."
                ) from None

        return read_call(self._place, ask, sleep=self._sleep, attempts=DOWNLOAD_ATTEMPTS)

    def _refuse_large(self, path: str, revision: str, limit: int) -> None:
        """Ask for a file's size before it is downloaded, where there is a network."""
        from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

        if path == NAME:
            return  # the smallest of all; its size is checked when it is here
        try:
            found = self._api.get_paths_info(self._repo, [path], revision=revision)
        except (OfflineModeIsEnabled, HfHubHTTPError):
            return  # the download says what is wrong
        if found and found[0].size > limit:
            raise self._too_large(path, found[0].size, limit)

    def _too_large(self, what: str, size: int, limit: int) -> RemoteError:
        return RemoteError(
            f"{what} of {self._place} is refused: {size} bytes are too many",
            remedy="The repository is damaged or not meant for patchhub.",
            size=size,
            limit=limit,
        )
