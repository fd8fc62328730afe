"""What every remote can do, whatever is behind it, and ``patchhub.json``: what a remote says about itself.

The manifest is read strictly, as every object is."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Protocol, TypeVar, cast

from patchhub.canonical import IDENTIFIER, TEXT, Codec, MalformedError, StoredObject, map_of, optional
from patchhub.errors import CorruptStoreError, RemoteError, RevisionError
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
        objects: the objects to send, those that ``near`` lacks: id -> file.
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
    objects: Mapping[str, Path]
    withdrawn: Collection[str]
    source: Source
    notes: Mapping[str, str]
    private_facts: bool
    pages: Mapping[str, bytes | None]
    message: str


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

    def read(self, tip: Tip, ids: Collection[str], into: Path) -> Iterator[tuple[str, Path]]:
        """A local file for each object, each of which `sizes` named; not verified. ``into`` is an empty folder to use."""
        ...

    def publish(self, publication: Publication) -> None:
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
