"""The repository's base, checked whole: tensors whose files are as they were when they were last hashed are not hashed again."""

from __future__ import annotations

from pathlib import Path

from patchhub.fsio import keep
from patchhub.models.checkpoint import Checkpoint
from patchhub.models.fingerprint import check_tensors
from patchhub.models.stamps import FILE_NAME
from patchhub.porcelain.loading import base_object, open_base
from patchhub.store.repository import Repository


def open_checked(repository: Repository, path: str | Path | None = None) -> Checkpoint:
    """The repository's base model, every tensor checked.

    Raises:
        BaseError: the base is not where it was, or is another model now.
    """
    checkpoint = open_base(repository, path)
    check_base(repository, checkpoint)
    return checkpoint


def check_base(repository: Repository, checkpoint: Checkpoint) -> None:
    """Check every tensor of a checkpoint; those of files that have not changed since the last check by their files' size and time alone.

    Raises:
        BaseError: it is not the repository's base.
    """
    check_tensors(base_object(repository), checkpoint, None, cache=repository.cache)


def keep_digests(repository: Repository, folder: Path) -> None:
    """Put digests that ``fingerprint`` kept in another folder, made before there was a store, into the store's cache."""
    kept = folder / FILE_NAME
    if kept.is_file():
        keep(repository.cache / FILE_NAME, (kept.read_bytes(),))
