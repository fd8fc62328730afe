"""The commits of a report: the history below every name, as a drawing, with what was measured when each was made."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from patchhub.objects import Commit
from patchhub.porcelain import report_checks
from patchhub.porcelain.facts import count_changed
from patchhub.porcelain.tracks import Place, lay_out
from patchhub.store import graph, lookup
from patchhub.store.repository import Repository
from patchhub.store.revisions import BRANCHES, HEAD, REMOTES, SYMBOLIC, TAGS

_KINDS = {BRANCHES: "branch", TAGS: "tag", REMOTES: "remote"}


@dataclass(frozen=True)
class CommitRow:
    """One commit.

    Attributes:
        labels: (kind, name) of what points to it: branch, tag, remote, or head where HEAD names the commit itself.
        methods: the editors of the patches that it adds from.
        added, removed: how many facts; an additive patch counts as one.
        active: the number of active facts.
        place: where it is in the drawing.
    """

    id: str
    commit: Commit
    labels: tuple[tuple[str, str], ...]
    methods: tuple[str, ...]
    added: int
    removed: int
    active: int
    place: Place

    def to_json(self, places: Mapping[str, int], weights: Sequence[str]) -> dict[str, Any]:
        """For the page: parents by their place there, norms relative to the base's weight in the order of ``weights``."""
        commit, check = self.commit, self.commit.check
        state, change = (report_checks.norms(check, kind) for kind in ("state", "change"))
        return {
            "id": self.id,
            "parents": [places.get(parent, parent[:12]) for parent in commit.parents],
            "author": commit.author,
            "time": commit.time,
            "message": commit.message,
            "labels": [list(label) for label in self.labels],
            "methods": list(self.methods),
            "added": self.added,
            "removed": self.removed,
            "active": self.active,
            "track": self.place.track,
            "lines": [list(line) for line in self.place.lines],
            "state": [state.get(weight) for weight in weights],
            "change": [change.get(weight) for weight in weights],
            "proof": max(report_checks.numbers(check, "proof"), default=None),
            "survival": min(report_checks.numbers(check, "survival"), default=None),
            "guard": report_checks.guard(check),
        }


def reachable(repository: Repository, *also: str | None) -> list[str]:
    """Every commit below a branch, a tag, a remote branch or ``also``, newest first, every child before its parents."""
    known = lookup.whole_graph(repository)
    starts = {commit for commit in (*_labels(repository), *also) if commit is not None}
    return list(graph.walk(starts, lambda commit: known[commit][1], lambda commit: known[commit][0]))


def commit_rows(repository: Repository, commits: Sequence[str]) -> Iterator[CommitRow]:
    """The rows of commits that come every child before its parents.

    Raises:
        CorruptStoreError: a commit, or a patch that it adds to, is damaged.
    """
    labels = _labels(repository)
    loaded = [(identity, repository.commit(identity)) for identity in commits]
    drawing = lay_out((identity, commit.parents) for identity, commit in loaded)
    for (identity, commit), place in zip(loaded, drawing, strict=True):
        methods = {repository.patch(patch).method for patch in {patch for patch, _ in commit.added}}
        removed, added = count_changed(repository, commit.removed, commit.added)
        yield CommitRow(
            identity,
            commit,
            tuple(labels.get(identity, ())),
            tuple(sorted(methods)),
            added,
            removed,
            repository.active_count(identity),
            place,
        )


def edited_weights(rows: Iterable[CommitRow]) -> dict[str, float]:
    """The norm of the base's weight for every weight that a commit measured, in the order of their layers."""
    norms = {name: norm for row in rows for name, norm in report_checks.base_norms(row.commit.check).items()}
    return dict(sorted(norms.items(), key=lambda item: _in_order(item[0])))


def _in_order(weight: str) -> list[tuple[int, str]]:
    """A key that sorts layer 10 after layer 9."""
    return [(int(part), "") if part.isascii() and part.isdigit() else (-1, part) for part in weight.split(".")]


def _labels(repository: Repository) -> dict[str, list[tuple[str, str]]]:
    """For each commit the names that point to it."""
    found: dict[str, list[tuple[str, str]]] = {}
    for ref, target in sorted(repository.refs().items()):
        kind = next((prefix for prefix in _KINDS if ref.startswith(prefix)), None)
        if kind is not None:
            found.setdefault(target, []).append((_KINDS[kind], ref.removeprefix(kind)))
        elif ref == HEAD and not target.startswith(SYMBOLIC):
            found.setdefault(target, []).append(("head", HEAD))
    return found
