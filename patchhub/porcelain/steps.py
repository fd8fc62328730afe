"""Verbs over the operation log: `undo`, `redo`. No torch, no NumPy."""

from __future__ import annotations

from patchhub.objects import Operation
from patchhub.store.repository import Repository


def undo(repository: Repository, *, author: str, time: str) -> Operation:
    """Put every ref back to where it was before the last operation; repeated, it walks further back."""
    return repository.undo(author=author, time=time)


def redo(repository: Repository, *, author: str, time: str) -> Operation:
    """Reverse the last `undo`."""
    return repository.redo(author=author, time=time)
