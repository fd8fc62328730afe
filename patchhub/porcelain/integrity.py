"""`fsck`: every stored byte and every link between objects. No torch, no NumPy."""

from __future__ import annotations

from patchhub.porcelain.progress import Progress, increments
from patchhub.store.fsck import Report, check, reindex
from patchhub.store.repository import Repository


def fsck(repository: Repository, progress: Progress, *, rebuild: bool = False) -> Report:
    """Check a whole store; with ``rebuild``, make its derived tables again first."""
    if rebuild:
        reindex(repository)
    progress.stage("checking objects", sum(1 for _ in repository.objects.ids()))
    report = check(repository, progress=increments(progress))
    progress.close()
    return report
