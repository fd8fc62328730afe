"""Reading a repository of the Hub: its refs, its trees, its files. Trees and files are named by a commit of the Hub.

The client that downloads compares sizes only, so every file is hashed here: against the id of an object, or against the
git or LFS digest that the tree names."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from patchhub.errors import RemoteError
from patchhub.remotes.file import OBJECT, object_path
from patchhub.remotes.hub_calls import DOWNLOAD_ATTEMPTS, Result, Sleep, is_missing, read_call
from patchhub.remotes.remote import MAX_BYTES, NAME, BranchManifest, read_branch
from patchhub.store.object_store import file_digest

if TYPE_CHECKING:
    from collections.abc import Callable

    from huggingface_hub import HfApi


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

    def objects(self, sha: str) -> dict[str, int]:
        """Bytes of every object at a commit of the Hub; names of another form are not objects."""
        found = {}
        for path, entry in self.tree(sha).items():
            match = OBJECT.fullmatch(path)
            if match is None:
                continue
            identity = match[1] + match[2]
            if entry.lfs is not None and entry.lfs.sha256 != identity:
                raise RemoteError(
                    f"object {identity[:12]} of {self.place} is refused: the Hub says that its content has another hash",
                    remedy="The remote is damaged: push to it again from a sound store.",
                    object=identity,
                )
            found[identity] = int(entry.size)
        return found

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

    def read_objects(self, sha: str, ids: Collection[str], into: Path) -> Iterator[tuple[str, Path]]:
        """A verified local file for each object; one that arrives damaged is fetched once more.

        Raises:
            RemoteError: an object stays damaged.
        """

        def read(identity: str) -> tuple[str, Path]:
            for fresh in (False, True):
                path = self.download(sha, object_path(identity), into, fresh=fresh)
                if file_digest(path) == identity:
                    return identity, path
            raise RemoteError(
                f"object {identity[:12]} of {self.place} is refused: its bytes do not hash to its name",
                remedy="Run the command again; if it stays, push to it again from a sound store.",
                object=identity,
                remote=self.place,
            )

        with ThreadPoolExecutor(_THREADS) as pool:
            yield from pool.map(read, ids)

    def download(self, sha: str, path: str, into: Path, *, fresh: bool = False) -> Path:
        """One file at a commit of the Hub, through the client's cache in ``into``; not verified."""
        found = read_call(
            self.place,
            lambda: self.api.hf_hub_download(self.repo, path, revision=sha, cache_dir=into, force_download=fresh),
            sleep=self._sleep,
            attempts=DOWNLOAD_ATTEMPTS,
        )
        return Path(found)


def _git_digest(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
