"""Verbs that look at history: `log`, `show`, `status`, `diff`. They read JSON only: no torch, no NumPy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from patchhub.errors import RevisionError
from patchhub.objects import Commit, Element, Patch, Request
from patchhub.porcelain.facts import active_requests
from patchhub.store.repository import Repository
from patchhub.store.revisions import SYMBOLIC


@dataclass(frozen=True)
class Entry:
    """One commit as `log` and `show` present it; ``active`` is the number of active facts."""

    id: str
    commit: Commit
    refs: tuple[str, ...]
    active: int

    def to_json(self) -> dict[str, Any]:
        commit = self.commit
        return {
            "id": self.id,
            "refs": list(self.refs),
            "parents": list(commit.parents),
            "author": commit.author,
            "time": commit.time,
            "message": commit.message,
            "added": len(commit.added),
            "removed": len(commit.removed),
            "active": self.active,
            "same_as": commit.same_as,
        }


@dataclass(frozen=True)
class Shown:
    """`show`: a commit with its facts and what was measured when it was made."""

    entry: Entry
    patches: Mapping[str, Patch]
    added: tuple[Request, ...]
    removed: tuple[Request, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            **self.entry.to_json(),
            "patches": {identity: _patch_json(patch) for identity, patch in self.patches.items()},
            "facts_added": [request_json(request) for request in self.added],
            "facts_removed": [request_json(request) for request in self.removed],
            "check": self.entry.commit.check,
        }


@dataclass(frozen=True)
class Status:
    """`status`: where the repository is."""

    store: Path
    branch: str | None
    head: Entry | None
    base: Mapping[str, Any]
    base_found: bool
    metric: str | None
    delta_bytes: int
    last_operation: str | None

    def to_json(self) -> dict[str, Any]:
        return {
            "store": str(self.store),
            "branch": self.branch,
            "head": self.head.to_json() if self.head else None,
            "active": self.head.active if self.head else 0,
            "base": {key: value for key, value in self.base.items() if key != "weights"},
            "base_found": self.base_found,
            "metric": self.metric,
            "delta_bytes": self.delta_bytes,
            "last_operation": self.last_operation,
        }


@dataclass(frozen=True)
class Retarget:
    """One prompt and subject whose target differs between two revisions."""

    before: Request
    after: Request


@dataclass(frozen=True)
class Difference:
    """`diff`: what changes from one revision to another.

    ``norms`` holds, per weight, the Frobenius norm of the base's weight and of the change at either revision, and of the step between them where
    one is the other's first parent (None otherwise: see `patchhub diff --weights`).
    """

    old: str | None
    new: str | None
    added: tuple[Request, ...]
    removed: tuple[Request, ...]
    retargeted: tuple[Retarget, ...]
    norms: Mapping[str, Mapping[str, float | None]]

    def to_json(self) -> dict[str, Any]:
        return {
            "old": self.old,
            "new": self.new,
            "added": [request_json(request) for request in self.added],
            "removed": [request_json(request) for request in self.removed],
            "retargeted": [
                {"before": request_json(pair.before), "after": request_json(pair.after)} for pair in self.retargeted
            ],
            "norms": {weight: dict(norms) for weight, norms in self.norms.items()},
        }


def log(repository: Repository, revision: str = "HEAD", *, limit: int | None = None) -> Iterator[Entry]:
    """Commits reachable from a revision, newest first; none when there is no commit yet."""
    names = _names(repository)
    start = repository.resolve(revision)
    for identity, commit in islice(repository.log(*([start] if start else [])), limit):
        yield _entry(repository, identity, commit, names)


def show(repository: Repository, revision: str = "HEAD") -> Shown:
    """One commit with its facts.

    Raises:
        RevisionError: no such revision, or it is the unpatched model.
    """
    identity = repository.resolve(revision)
    if identity is None:
        raise RevisionError(
            f"{revision} is the unpatched model; there is no commit to show",
            remedy="Commit some facts first: `patchhub commit FILE -m TEXT`.",
        )
    commit = repository.commit(identity)
    patches = {patch: repository.patch(patch) for patch, _ in sorted(commit.added | commit.removed, key=str)}
    return Shown(
        _entry(repository, identity, commit, _names(repository)),
        patches,
        tuple(active_requests(repository, commit.added).values()),
        tuple(active_requests(repository, commit.removed).values()),
    )


def status(repository: Repository) -> Status:
    """Where HEAD is, what is active, and whether the base is where it was."""
    branch, head = repository.head
    entry = _entry(repository, head, repository.commit(head), _names(repository)) if head else None
    base: Mapping[str, Any] = repository.config.base
    state = repository.state(head)
    last = next(iter(repository.operations()), None)
    return Status(
        repository.root,
        branch,
        entry,
        base,
        Path(base["path"]).is_dir() or base["revision"] is not None,
        repository.config.recording.metric if repository.config.recording else None,
        sum(repository.objects.path(blob).stat().st_size for blob in state),
        last[1].command if last else None,
    )


def diff(repository: Repository, old: str, new: str) -> Difference:
    """The facts and norms that differ between two revisions."""
    old_id, new_id = repository.resolve(old), repository.resolve(new)
    before, after = repository.active(old_id), repository.active(new_id)
    gone = active_requests(repository, _only(before, after))
    come = active_requests(repository, _only(after, before))
    by_prompt = {(request.prompt, request.subject): request for request in gone.values()}
    retargeted, added = [], []
    for request in come.values():
        earlier = by_prompt.pop((request.prompt, request.subject), None)
        if earlier is None:
            added.append(request)
        else:
            retargeted.append(Retarget(earlier, request))
    return Difference(
        old_id, new_id, tuple(added), tuple(by_prompt.values()), tuple(retargeted), _norms(repository, old_id, new_id)
    )


def request_json(request: Request) -> dict[str, Any]:
    return {
        "id": request.id,
        "prompt": request.prompt,
        "subject": request.subject,
        "target_new": request.target_new,
        "target_true": request.target_true,
    }


def _only(a: frozenset[Element], b: frozenset[Element]) -> frozenset[Element]:
    """Elements of a whose request is not in b: the same fact recorded by another patch is no change of facts."""
    there = {request for _, request in b}
    return frozenset(element for element in a if element not in b and (element[1] is None or element[1] not in there))


def _norms(repository: Repository, old: str | None, new: str | None) -> dict[str, dict[str, float | None]]:
    sides = [repository.commit(side).check.get("norms", {}) if side else {} for side in (old, new)]
    step = None
    if new and old == next(iter(repository.commit(new).parents), None):
        step = sides[1]
    elif old and new == next(iter(repository.commit(old).parents), None):
        step = sides[0]
    weights: Mapping[str, Mapping[str, Any]] = repository.config.base["weights"]
    found = {}
    for weight in sorted(sides[0].keys() | sides[1].keys()):
        old_norm, new_norm = (float(side.get(weight, {}).get("state", 0.0)) for side in sides)
        change = None if step is None else float(step.get(weight, {}).get("change", 0.0))
        if old_norm or new_norm:
            found[weight] = {"base": weights[weight]["norm"], "old": old_norm, "new": new_norm, "change": change}
    return found


def _names(repository: Repository) -> dict[str, tuple[str, ...]]:
    """For each commit the names that point to it, as `log` shows them."""
    refs = repository.refs()
    head = refs.get("HEAD", "")
    names: dict[str, list[str]] = {}
    for ref, target in sorted(refs.items()):
        if ref == "HEAD":
            if not target.startswith(SYMBOLIC):
                names.setdefault(target, []).append("HEAD")
            continue
        short = ref.removeprefix("refs/heads/").removeprefix("refs/remotes/")
        short = f"tag: {ref.removeprefix('refs/tags/')}" if ref.startswith("refs/tags/") else short
        names.setdefault(target, []).append(f"HEAD -> {short}" if head == SYMBOLIC + ref else short)
    return {target: tuple(found) for target, found in names.items()}


def _entry(repository: Repository, identity: str, commit: Commit, names: Mapping[str, tuple[str, ...]]) -> Entry:
    return Entry(identity, commit, names.get(identity, ()), repository.active_count(identity))


def _patch_json(patch: Patch) -> dict[str, Any]:
    return {
        "kind": patch.kind,
        "method": patch.method,
        "metric": patch.metric,
        "requests": len(patch.requests),
        "settings": patch.settings,
        "weights": {weight: list(shape) for weight, shape in patch.weights.items()},
    }
