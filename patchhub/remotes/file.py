"""A remote that is a folder: ``patchhub.json`` with all refs, and ``objects/`` as in a store."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Final

from patchhub.errors import RemoteError
from patchhub.remotes.files import Files
from patchhub.remotes.manifest import MAX_BYTES, NAME, FolderManifest, read_folder
from patchhub.remotes.remote import Publication, RemoteMovedError, Tip, View
from patchhub.store.revisions import TAGS

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

    def _manifest(self) -> FolderManifest | None:
        data = self._files.read(NAME, MAX_BYTES)
        return None if data is None else read_folder(data, self._address)

    def _check(self, manifest: FolderManifest | None, publication: Publication) -> None:
        found = manifest.refs.get(publication.ref) if manifest else None
        expected = publication.expected.commit if publication.expected else None
        if manifest is not None and manifest.base != publication.source.base:
            raise RemoteError(f"{self._address} is about another base", remedy="Push to another folder.")
        if found != expected or (publication.ref.startswith(TAGS) and found not in (None, publication.commit)):
            raise RemoteMovedError(
                f"{publication.ref} of {self._address} was moved by someone else",
                remedy="Run `patchhub pull`, then push again.",
                ref=publication.ref,
                expected=expected,
                found=found,
            )
