"""What every remote can do, whatever is behind it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from patchhub.errors import RemoteError
from patchhub.remotes.manifest import Source


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
