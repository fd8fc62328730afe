"""The one file that a stopped merge leaves: ``merge.json`` (docs/format.md). No torch, no NumPy."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final

from patchhub.canonical import canonical_json
from patchhub.errors import CorruptStoreError, RepositoryError
from patchhub.fsio import write_atomically
from patchhub.store.repository import Repository

FILE: Final = "merge.json"
_FORMAT: Final = 1


@dataclass(frozen=True)
class StoppedMerge:
    """A merge that waits for its contradictions to be decided.

    Attributes:
        ours, theirs: the commits that are merged.
        revision: how the user named theirs.
        message: the message that the merge commit will have.
    """

    ours: str
    theirs: str
    revision: str
    message: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def stopped_merge(repository: Repository) -> StoppedMerge | None:
    """The merge that waits on the present commit. One that HEAD has left is over, whatever the file says.

    Raises:
        CorruptStoreError: the file cannot be read.
    """
    path = repository.root / FILE
    if not path.is_file():
        return None
    found = _read(path)
    return found if repository.head[1] == found.ours else None


def refuse_stopped(repository: Repository) -> None:
    """Raise `RepositoryError` where a merge waits on the present commit: another commit would abandon it."""
    waiting = stopped_merge(repository)
    if waiting is not None:
        raise RepositoryError(
            f"the merge of {waiting.revision} waits for its contradictions to be decided",
            remedy="Take it up with `patchhub merge --continue`, or leave it with `patchhub merge --abort`.",
            revision=waiting.revision,
            theirs=waiting.theirs,
        )


def keep(repository: Repository, merge: StoppedMerge) -> None:
    """Write the file, in one step."""
    document = canonical_json({**merge.to_json(), "format": _FORMAT})
    with repository.locked():
        write_atomically(repository.root / FILE, [document])


def forget(repository: Repository) -> bool:
    """Remove the file; whether there was one."""
    path = repository.root / FILE
    with repository.locked():
        present = path.is_file()
        path.unlink(missing_ok=True)
    return present


def _read(path: Path) -> StoppedMerge:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if value.pop("format") != _FORMAT or value.keys() != {field.name for field in fields(StoppedMerge)}:
            raise ValueError("its fields are not those of format 1")
        return StoppedMerge(**{name: str(text) for name, text in value.items()})
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise CorruptStoreError(
            f"{path} cannot be read: {error}", remedy="Run `patchhub merge --abort`, then merge again.", path=str(path)
        ) from error
