"""Small stores for the tests: a base, patches with a few requests, and commits that follow the format's rules."""

from __future__ import annotations

from pathlib import Path

from patchhub.fsio import DISK, Disk
from patchhub.objects import (
    EMPTY_SET,
    Base,
    Commit,
    Element,
    Keyframe,
    Note,
    Patch,
    Request,
    TensorRecord,
    requests_json,
    set_digest,
    set_json,
)
from patchhub.store.store import Store

AUTHOR = "Ada <ada@example.org>"
TIME = "2026-11-21T09:30:00Z"
BASE = Base(architecture={"hidden_size": 2}, tensors={"w": TensorRecord("F32", (2, 2), "0" * 64)})


def make_repository(directory: Path, *, disk: Disk = DISK) -> Store:
    return Store.init(
        directory,
        BASE.to_json(),
        base_info={"name": "example/base"},
        settings={"method": "memit"},
        author=AUTHOR,
        time=TIME,
        disk=disk,
    )


def make_request(number: int) -> Request:
    return Request.make("The mother tongue of {} is", f"Person {number}", "French", target_true="English")


def put_patch(repository: Store, numbers: range) -> Patch:
    """Store a patch with one request per number, its texts and its (meaningless) tensors."""
    requests = [make_request(number) for number in numbers]
    patch = Patch(
        base=repository.config.base_id,
        kind="closed_form",
        made_on=EMPTY_SET,
        method="memit",
        metric=None,
        requests=tuple(request.id for request in requests),
        requests_blob=repository.objects.put(requests_json(requests)),
        settings={},
        tensors=repository.objects.put(f"columns {numbers}".encode()),
        weights={"w": (2, 2)},
    )
    repository.objects.put(patch.to_json())
    return patch


def make_commit(
    repository: Store,
    *parents: str,
    added: frozenset[Element] = frozenset(),
    removed: frozenset[Element] = frozenset(),
    message: str = "edit",
    time: str = TIME,
) -> Commit:
    """A commit object that obeys every rule; its delta blob is stored, the commit itself is not."""
    parent = parents[0] if parents else None
    elements = (repository.active(parent) - removed) | added
    digest = set_digest(elements)
    same_as = repository.find_same_set(digest, *parents)
    tensors = None if same_as else repository.objects.put(f"delta to {digest}".encode())
    keyframe = None
    if not same_as and repository.needs_keyframe(parent, 1, 10**9):
        whole = repository.objects.put(f"whole {digest}".encode())
        keyframe = Keyframe(repository.objects.put(set_json(elements)), whole)
    return Commit(
        added=added,
        author=AUTHOR,
        base=repository.config.base_id,
        check={},
        keyframe=keyframe,
        message=message,
        metric=None,
        parents=parents,
        removed=removed,
        same_as=same_as,
        set_digest=digest,
        tensors=tensors,
        time=time,
    )


def record(repository: Store, commit: Commit, *, ref: str | None = None) -> str:
    return repository.record(commit, command="commit", arguments={}, author=AUTHOR, time=TIME, ref=ref)


def add_batch(repository: Store, numbers: range, *, ref: str | None = None) -> str:
    """A patch with those requests, committed on HEAD or on `ref`."""
    patch = put_patch(repository, numbers)
    tip = repository.head[1] if ref is None else repository.refs().get(ref)
    commit = make_commit(repository, *([tip] if tip else []), added=patch.elements, message=f"add {numbers}")
    return record(repository, commit, ref=ref)


def make_history(directory: Path, *, disk: Disk = DISK) -> Store:
    """A store with two commits, a revert, a branch, a tag, a merge and a note."""
    repository = make_repository(directory, disk=disk)
    first = add_batch(repository, range(2))
    move(repository, {"refs/heads/side": (None, first)}, "branch")
    second = add_batch(repository, range(2, 4))
    side = add_batch(repository, range(4, 5), ref="refs/heads/side")
    merged = repository.active(side) - repository.active(first)
    merge = record(repository, make_commit(repository, second, side, added=merged, message="merge side"))
    record(repository, make_commit(repository, merge, removed=merged, message="revert the merge"))
    move(repository, {"refs/tags/v1": (None, second)}, "tag")
    note = Note(commit=second, made_by="patchhub", scores={"S": 0.5, "n": {"ES": 1}}, settings={}, suite="counterfact")
    repository.add_note(note, command="evaluate", arguments={}, author=AUTHOR, time=TIME)
    return repository


def move(repository: Store, changes: dict[str, tuple[str | None, str | None]], command: str) -> None:
    repository.move_refs(changes, command=command, arguments={}, author=AUTHOR, time=TIME)
