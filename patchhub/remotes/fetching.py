"""From a remote into a store: what `fetch` does, without a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from patchhub.errors import RemoteError, RevisionError
from patchhub.remotes.moves import Moved, check_base, local_name
from patchhub.remotes.receive import CheckTensors, Limits, Received, Receiver, receiving
from patchhub.remotes.remote import Remote, View
from patchhub.store.closure import Reference
from patchhub.store.repository import Repository
from patchhub.store.revisions import NOTES, REMOTES, TAGS, check_ref


@dataclass(frozen=True)
class Fetched:
    """What `fetch` brought.

    Attributes:
        moved: refs of this store: ``refs/remotes/...``, tags, notes.
        received: objects and bytes that travelled.
        warnings: refs that were left out, in words.
    """

    moved: tuple[Moved, ...]
    received: Received
    warnings: tuple[str, ...]


def fetch(
    repository: Repository,
    remote: Remote,
    name: str,
    limits: Limits,
    check: CheckTensors,
    *,
    author: str,
    time: str,
    repair: bool = False,
    prune: bool = False,
    progress: Callable[[int], None] = lambda size: None,
) -> Fetched:
    """Bring all branches, tags and notes of a remote here: branches as ``refs/remotes/<name>/*``.

    Args:
        limits: of all that is downloaded, whatever branch it belongs to.
        repair: look also below known commits, and fetch again what is damaged here.
        prune: forget branches that the remote does not have any more.

    Raises:
        RemoteError: unreachable, about another base, or it holds something the format does not allow.
    """
    view = remote.view()
    check_base(repository, remote, view)
    warnings = [f"{ref} of {remote.address} is left out: {reason}" for ref, reason in view.skipped.items()]
    wanted: dict[str, str] = {}
    with receiving(repository, remote, limits, check, repair=repair, progress=progress) as receiver:
        for ref, tip in sorted(view.tips.items()):
            local = local_name(ref, name)
            try:
                check_ref(local)
            except RevisionError as error:
                warnings.append(f"{ref} of {remote.address} is left out: {error.message}")
                continue
            receiver.take(tip, Reference("commit", tip.commit))
            wanted[local] = tip.commit
        wanted |= _fetch_notes(repository, remote, view, receiver)
    moved = list(_changes(repository.refs(), wanted, warnings))
    moved += _gone(repository.refs(), view, name) if prune else []
    if moved:
        changes = {move.ref: (move.old, move.new) for move in moved}
        repository.move_refs(changes, command="fetch", arguments={"remote": name}, author=author, time=time)
    return Fetched(tuple(moved), receiver.received, tuple(warnings))


def _fetch_notes(repository: Repository, remote: Remote, view: View, receiver: Receiver) -> dict[str, str]:
    """Notes that are not set here: about commits that are here by now. Notes set here stay."""
    refs = repository.refs()
    wanted: dict[str, str] = {}
    for key, note in view.notes.items():
        commit, _, suite = key.partition("/")
        if NOTES + key in refs or commit not in repository.objects:
            continue
        holder = next(
            (tip for tip in view.tips.values() if note in repository.objects or note in remote.sizes(tip)), None
        )
        if holder is None:
            continue
        receiver.take(holder, Reference("note", note), ahead=False)
        found = repository.note(note)
        if (found.commit, found.suite) != (commit, suite):
            raise RemoteError(f"note {note[:12]} of {remote.address} is not about {key}", remedy="Push it again.")
        wanted[NOTES + key] = note
    return wanted


def _changes(refs: Mapping[str, str], wanted: Mapping[str, str], warnings: list[str]) -> Iterator[Moved]:
    for ref, target in wanted.items():
        old = refs.get(ref)
        if old == target:
            continue
        if ref.startswith(TAGS) and old is not None:
            warnings.append(f"the tag {ref[len(TAGS) :]} is at {old[:12]} here and at {target[:12]} there; it stays")
            continue
        yield Moved(ref, old, target)


def _gone(refs: Mapping[str, str], view: View, name: str) -> Sequence[Moved]:
    """The branches of a remote that are known here and that it does not have any more."""
    there = {local_name(ref, name) for ref in (*view.tips, *view.skipped)}
    prefix = f"{REMOTES}{name}/"
    return [Moved(ref, target, None) for ref, target in refs.items() if ref.startswith(prefix) and ref not in there]
