"""A remote on the Hugging Face Hub: a branch or tag is a branch or tag there, its tree holds all that its commit needs.

A push is one commit of the Hub per ref, guarded by the parent that was seen. A ref that is new is made on a staging
branch first and appears when it is complete. When an answer is lost, the head is read again; nothing is sent twice."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from patchhub.errors import RemoteError
from patchhub.fsio import Span, os_errors
from patchhub.remotes.card import kept
from patchhub.remotes.hub_files import TRANSIENT, HubFiles, HubRefs, Sleep, explained, status_of, write_call
from patchhub.remotes.parcels import Contents, object_path, wrapped
from patchhub.remotes.remote import (
    NAME,
    BranchManifest,
    Heard,
    Publication,
    RemoteMovedError,
    Tip,
    View,
    unheard,
)
from patchhub.store.packs import INDEX, PACK, pack_path
from patchhub.store.revisions import BRANCHES, TAGS

STAGING: Final = "patchhub-staging/"
"""Branches on which new refs are made; never read, and left behind only when a push is cut short."""

CARD: Final = "README.md"
_LARGEST_CARD: Final = 1 << 20  # bytes of a card that is read; a larger one is written anew
_MARK: Final = "patchhub commit "
_MOVED: Final = "Run `patchhub pull`, then push again."


class HubRemote:
    """A model repository of the Hub."""

    def __init__(
        self, repo: str, *, endpoint: str | None = None, token: str | None = None, sleep: Sleep = time.sleep
    ) -> None:
        """`repo` is ``user/name``; endpoint and token are huggingface_hub's own where None."""
        from huggingface_hub import HfApi

        self._api: Any = HfApi(endpoint=endpoint, token=token)
        self._repo = repo
        self._files = HubFiles(repo, self._api, sleep=sleep)
        self._sleep = sleep
        self._damaged: Sequence[str] = ()

    @property
    def address(self) -> str:
        return self._files.place

    def view(self) -> View:
        refs = self._files.refs()
        tips: dict[str, Tip] = {}
        manifests: dict[str, BranchManifest] = {}
        skipped: dict[str, str] = {}
        empty = set()
        for ref, sha in _named(refs).items():
            try:
                manifest = self._manifest(sha)
            except RemoteError as error:
                if error.facts.get("place") is None:  # not what it says, but that it cannot be had
                    raise
                skipped[ref] = error.message
                continue
            if manifest is not None:
                tips[ref], manifests[ref] = Tip(manifest.commit, sha), manifest
            elif ref.startswith(BRANCHES):
                empty.add(ref)
        source = next((manifest.source for manifest in manifests.values()), None)
        for ref, manifest in manifests.items():
            if source is not None and manifest.base != source.base:
                skipped[ref] = f"it is about another base ({manifest.base[:12]})"
                del tips[ref]
        notes = {key: note for manifest in manifests.values() for key, note in manifest.notes.items()}
        private = frozenset(ref for ref, manifest in manifests.items() if manifest.private_facts)
        return View(source, tips, notes, private, frozenset(empty), skipped)

    def sizes(self, tip: Tip) -> Mapping[str, int]:
        return self._read(tip).sizes

    @property
    def damaged(self) -> Sequence[str]:
        return self._damaged

    def alone(self, tip: Tip) -> Collection[str]:
        return self._read(tip).alone

    def _read(self, tip: Tip) -> Contents:
        found = self._files.contents(tip.token)
        self._damaged = found.damaged
        return found

    def read(self, tip: Tip, ids: Collection[str], into: Path, heard: Heard = unheard) -> Iterator[tuple[str, Span]]:
        return self._files.read_objects(tip.token, ids, into, heard)

    def publish(self, publication: Publication, heard: Heard = unheard) -> None:
        """``heard`` is called once, at the end: while it sends, the Hub's client has bars of its own."""
        refs = self._files.refs()
        if refs is None:
            self._create_repository()
            refs = self._files.refs() or HubRefs({}, {})
        found = _named(refs).get(publication.ref)
        if publication.expected is not None:
            self._commit(publication.ref[len(BRANCHES) :], publication.expected.token, publication)
        elif found is None:
            self._create(publication)
        elif publication.ref.startswith(TAGS) or self._manifest(found) is not None:
            raise self._moved(publication)
        else:
            self._commit(publication.ref[len(BRANCHES) :], found, publication)
        heard(publication.size)

    # --- writing ----------------------------------------------------------------------------------------------------

    def remove(self, ref: str, expected: Tip) -> None:
        found = _named(self._files.refs()).get(ref)
        if found != expected.token:
            raise RemoteMovedError(
                f"{ref} of {self.address} was moved by someone else",
                remedy="Run `patchhub fetch`, then look again.",
                ref=ref,
            )
        try:
            if ref.startswith(TAGS):
                take = partial(self._api.delete_tag, self._repo, tag=ref[len(TAGS) :])
            else:
                take = partial(self._api.delete_branch, self._repo, branch=ref[len(BRANCHES) :])
            write_call(take, sleep=self._sleep)
        except Exception as error:  # the client raises errors of several libraries
            raise explained(self.address, error) from error

    def _create_repository(self) -> None:
        try:
            write_call(lambda: self._api.create_repo(self._repo, private=True, exist_ok=True), sleep=self._sleep)
        except Exception as error:  # the client raises errors of several libraries
            if self._files.refs() is None:
                raise explained(self.address, error) from error

    def _commit(self, branch: str, parent: str, publication: Publication) -> str:
        """One commit on a branch of the Hub whose head must be `parent`; returns its name there."""
        with TemporaryDirectory(prefix="patchhub-") as name:
            files, gone = self._objects(parent, publication, Path(name))
            try:
                made = write_call(
                    lambda: self._api.create_commit(
                        self._repo,
                        self._operations(parent, publication, files, gone),
                        commit_message=publication.message,
                        commit_description=_MARK + publication.commit,
                        revision=branch,
                        parent_commit=parent,
                    ),
                    sleep=self._sleep,
                )
            except Exception as error:  # the client raises errors of several libraries
                return self._resolve(branch, parent, publication, error)
        return str(made.oid)

    def _objects(self, parent: str, publication: Publication, into: Path) -> tuple[dict[str, bytes | str], list[str]]:
        """What is sent of objects, by path, and what is deleted. Packs are written into a folder first."""
        alone, parcels = wrapped(publication.groups)
        contents = self._files.contents(parent)
        again, gone = contents.without(publication.withdrawn, lambda name: self._files.pack(parent, name, into))
        files: dict[str, bytes | str] = {
            object_path(identity): place.read() if place.path.suffix == PACK else str(place.path)
            for identity, place in alone.items()
        }
        gathered = wrapped(publication.gathered)[1]
        gone += [object_path(identity) for parcel in gathered for identity, _ in parcel.objects]
        for parcel in (*parcels, *again, *gathered):
            file = into / f"{parcel.index.name}{PACK}"
            with os_errors(file), file.open("wb") as stream:
                stream.writelines(parcel.content())
            files[pack_path(parcel.index.name, PACK)] = str(file)
            files[pack_path(parcel.index.name, INDEX)] = parcel.index.data
        return files, [path for path in gone if path not in files]

    def _resolve(self, branch: str, parent: str, publication: Publication, error: Exception) -> str:
        """After a failure: what really happened. The name of our commit if it landed, else the right error."""
        status = status_of(error)
        if status is not None and status != 412 and status not in TRANSIENT:
            raise explained(self.address, error) from error
        newer = self._newer(branch, parent)
        landed = next((sha for sha, text in newer if _MARK + publication.commit in text), None)
        if landed is not None:
            return landed
        if status == 412 or newer:
            raise self._moved(publication) from error
        cause = explained(self.address, error)
        raise RemoteError(
            f"the push of {branch} did not land: {cause.message}",
            remedy=f"{cause.remedy} What has arrived is not sent twice.",
            **cause.facts,
        ) from error

    def _newer(self, branch: str, parent: str) -> list[tuple[str, str]]:
        """(name, description) of the Hub's commits on a branch after `parent`."""
        listed = self._files.call(lambda: list(self._api.list_repo_commits(self._repo, revision=branch)))
        names = [commit.commit_id for commit in listed]
        new = listed[: names.index(parent)] if parent in names else listed
        return [(commit.commit_id, commit.message) for commit in new]

    def _operations(
        self, parent: str, publication: Publication, objects: Mapping[str, bytes | str], withdrawn: Collection[str]
    ) -> list[Any]:
        """What the commit changes; made anew for each attempt, since the client marks them."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        before = self._manifest(parent)
        source = publication.source
        manifest = BranchManifest(
            base=source.base,
            base_model=source.model,
            base_revision=source.revision,
            commit=publication.commit,
            notes={**(before.notes if before else {}), **publication.notes},
            private_facts=publication.private_facts,
        )
        files: dict[str, bytes | str] = {**objects, NAME: manifest.to_json()}
        there = self._files.tree(parent)
        files |= {path: self._page(parent, path, data) for path, data in publication.pages.items() if data is not None}
        unwanted = [path for path, data in publication.pages.items() if data is None]
        gone = [path for path in (*unwanted, *withdrawn) if path in there]
        return [
            *(CommitOperationAdd(path_in_repo=path, path_or_fileobj=data) for path, data in files.items()),
            *(CommitOperationDelete(path_in_repo=path) for path in gone),
        ]

    def _page(self, parent: str, path: str, data: bytes) -> bytes:
        """A page as it shall be: of the card that is there, what its owner wrote stays."""
        if path != CARD or path not in self._files.tree(parent):
            return data
        with TemporaryDirectory(prefix="patchhub-") as folder:
            before = self._files.download(parent, path, Path(folder))
            return kept(before.read_bytes(), data) if before.stat().st_size <= _LARGEST_CARD else data

    def _create(self, publication: Publication) -> None:
        """Make a new branch or tag, complete from its first moment."""
        near = publication.near
        changes = publication.groups or publication.notes or publication.withdrawn
        if near is not None and near.commit == publication.commit and not changes:
            self._create_ref(publication, near.token)
            return
        start = near.token if near is not None else self._first_commit()
        staging = STAGING + secrets.token_hex(8)
        self._files.call(lambda: self._api.create_branch(self._repo, branch=staging, revision=start, exist_ok=True))
        try:
            self._create_ref(publication, self._commit(staging, start, publication))
        finally:
            with contextlib.suppress(Exception):  # what is left behind is never read
                self._api.delete_branch(self._repo, branch=staging)

    def _create_ref(self, publication: Publication, sha: str) -> None:
        ref = publication.ref
        try:
            if ref.startswith(TAGS):
                make = partial(self._api.create_tag, self._repo, tag=ref[len(TAGS) :], revision=sha)
            else:
                make = partial(self._api.create_branch, self._repo, branch=ref[len(BRANCHES) :], revision=sha)
            write_call(make, sleep=self._sleep)
        except Exception as error:  # the client raises errors of several libraries
            found = _named(self._files.refs()).get(ref)
            if found is None:
                raise explained(self.address, error) from error
            manifest = self._manifest(found)
            if manifest is None or manifest.commit != publication.commit:
                raise self._moved(publication) from error

    def _first_commit(self) -> str:
        """The oldest commit of the repository, which holds nothing of patchhub."""
        listed = self._files.call(lambda: list(self._api.list_repo_commits(self._repo)))
        return str(listed[-1].commit_id)

    def _manifest(self, sha: str) -> BranchManifest | None:
        with TemporaryDirectory(prefix="patchhub-") as folder:
            return self._files.manifest(sha, Path(folder))

    def _moved(self, publication: Publication) -> RemoteMovedError:
        name = publication.ref.removeprefix(BRANCHES).removeprefix(TAGS)
        now = self.view().tips.get(publication.ref)
        place = f"at {now.commit[:12]}" if now else "not there"
        return RemoteMovedError(
            f"{name} of {self.address} was moved by someone else; it is {place} now",
            remedy=_MOVED,
            ref=publication.ref,
            now=now.commit if now else None,
        )


def _named(refs: HubRefs | None) -> dict[str, str]:
    """Full ref names; staging branches and the Hub's own refs are left out."""
    if refs is None:
        return {}
    branches = {BRANCHES + name: sha for name, sha in sorted(refs.branches.items()) if not name.startswith(STAGING)}
    return {**branches, **{TAGS + name: sha for name, sha in sorted(refs.tags.items())}}
