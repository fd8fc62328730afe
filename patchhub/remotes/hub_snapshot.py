"""One state of a Hub repository, read object by object through the client's cache: what loading a model needs.

What is in the cache is used without a network. Every object is verified on every read; one that is damaged is fetched
again, once."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

from patchhub.errors import RemoteError, RevisionError
from patchhub.objects import Commit
from patchhub.remotes.file import object_path
from patchhub.remotes.hub_calls import DOWNLOAD_ATTEMPTS, Sleep, read_call
from patchhub.remotes.hub_files import HubFiles
from patchhub.remotes.receive import MAX_JSON
from patchhub.remotes.remote import MAX_BYTES, NAME, BranchManifest, read_branch
from patchhub.store.object_store import file_digest

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

    def read(self, identity: str) -> bytes:
        """The bytes of a JSON object, verified."""
        return self.file(identity, limit=MAX_JSON).read_bytes()

    def file(self, identity: str, *, limit: int) -> Path:
        """A local file with an object's bytes, verified.

        Raises:
            RemoteError: it is missing, larger than `limit` bytes, or stays damaged.
        """
        for fresh in (False, True):
            path = self._download(object_path(identity), self.sha, limit=limit, fresh=fresh)
            if file_digest(path) == identity:
                return path
        raise RemoteError(
            f"object {identity[:12]} of {self._place} is refused: its bytes do not hash to its name",
            remedy="Try again; if it stays, the repository is damaged.",
            object=identity,
        )

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
        from huggingface_hub import constants
        from huggingface_hub.file_download import repo_folder_name

        folder = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=self._repo, repo_type="model"), "snapshots")
        pattern = f"*/{object_path(digits)}*"
        found = sorted(path for path in folder.glob(pattern) if (path.parents[2] / NAME).exists())
        return [(path.parents[2].name, path.parent.name + path.name) for path in found]

    def _listed(self, digits: str) -> list[tuple[str, str]]:
        """The same of all that branches and tags of the repository hold."""
        files = HubFiles(self._repo, self._api, sleep=self._sleep)
        refs = files.refs()
        if refs is None:
            raise RemoteError(
                f"{self._place} does not exist or is private", remedy="Check the name, or run `hf auth login`."
            )
        heads = sorted({*refs.branches.values(), *refs.tags.values()})
        return [(sha, name) for sha in heads for name in files.objects(sha) if name.startswith(digits)]

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
            raise RemoteError(
                f"{path} of {self._place} is refused: {found[0].size} bytes are too many",
                remedy="The repository is damaged or not meant for patchhub.",
                size=found[0].size,
                limit=limit,
            )
