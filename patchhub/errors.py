"""The error tree: everything that patchhub raises on bad input or a bad world.

Each error is one sentence on what was wrong and where, one sentence on what to do (``remedy``), the facts as
fields (``facts``, which ``--json`` prints) and an exit code per kind. A traceback on the terminal is a bug."""

from __future__ import annotations

from typing import Any, ClassVar


class PatchhubError(Exception):
    """Root of the tree.

    Args:
        message: what was wrong and where, one sentence without a final full stop.
        remedy: what to do next, one sentence; omitted only where nothing can be done.
        facts: the same as data; values are JSON-serialisable.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, remedy: str | None = None, **facts: Any) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy
        self.facts = facts

    @property
    def kind(self) -> str:
        """The class name, the stable name of this kind of error in ``--json`` output."""
        return type(self).__name__


class SettingsError(PatchhubError):
    """An option or a setting has a value that cannot be used."""

    exit_code = 2


class RequestError(PatchhubError):
    """The facts to write cannot be used: malformed input, or a subject that is not in its prompt."""

    exit_code = 3


class ContradictionError(RequestError):
    """Two requests ask for different targets at the same prompt and subject."""

    exit_code = 4


class InterferenceError(RequestError):
    """Facts of different targets compete for nearly the same key, and that was to be refused."""


class RevisionError(PatchhubError):
    """A revision name resolves to nothing, or to more than one object."""

    exit_code = 5


class RepositoryError(PatchhubError):
    """The store is missing, already there, locked, of another format, or the command does not fit its state."""

    exit_code = 6


class StaleRefError(RepositoryError):
    """A ref moved between reading and writing it (compare-and-swap failed)."""


class CorruptStoreError(RepositoryError):
    """Stored bytes are missing or do not hash to their name, or the operation chain is broken."""

    exit_code = 7


class BaseError(PatchhubError):
    """The model is not the repository's base, or cannot be read as one."""

    exit_code = 8


class UnsupportedModelError(BaseError):
    """The architecture cannot be edited; the message says why."""


class EditError(PatchhubError):
    """The edit itself failed: not finite, out of memory at the smallest batch, or another metric's columns."""

    exit_code = 9


class GuardError(EditError):
    """A check of the finished edit failed and the commit was refused."""

    exit_code = 10


class SignatureError(PatchhubError):
    """A signature or an approval is missing where it is required, or broken, or by a key that is not allowed."""

    exit_code = 12


class RemoteError(PatchhubError):
    """A remote could not be reached, refused, or holds something the format does not allow."""

    exit_code = 11


class ServedError(PatchhubError):
    """A server does not answer with a revision's facts."""

    exit_code = 13
