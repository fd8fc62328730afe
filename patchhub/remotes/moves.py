"""What `fetching` and `pushing` share: refs that move, their names here and there, and the base that both must be about."""

from __future__ import annotations

from dataclasses import dataclass

from patchhub.errors import RemoteError
from patchhub.remotes.remote import Remote, View
from patchhub.store.repository import Repository
from patchhub.store.revisions import BRANCHES, REMOTES


@dataclass(frozen=True)
class Moved:
    """A ref that moved, or would: where it was and where it is; None where it is not."""

    ref: str
    old: str | None
    new: str | None


def local_name(ref: str, remote: str) -> str:
    """What a branch or tag of a remote is called here."""
    return f"{REMOTES}{remote}/{ref[len(BRANCHES) :]}" if ref.startswith(BRANCHES) else ref


def check_base(repository: Repository, remote: Remote, view: View) -> None:
    """Refuse a remote that is about another base.

    Raises:
        RemoteError: it is.
    """
    if view.source is not None and view.source.base != repository.config.base_id:
        raise RemoteError(
            f"{remote.address} is about another base ({view.source.base[:12]}, not {repository.config.base_id[:12]})",
            remedy="Use a remote of its own for each base; `patchhub clone` makes a store for this one.",
            base=view.source.base,
        )
