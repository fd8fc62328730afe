"""The commits of a report: the history below every name, as a drawing, with what was measured when each was made."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from patchhub.objects import Commit
from patchhub.porcelain import history
from patchhub.sets.elements import count_changed
from patchhub.store import lookup, states
from patchhub.store.revisions import BRANCHES, HEAD, REMOTES, SYMBOLIC, TAGS
from patchhub.store.store import Store


@dataclass(frozen=True)
class Place:
    """One commit in the drawing.

    Attributes:
        track: its column.
        lines: (column at this commit's row, column at the next row) of every line between the two.
    """

    track: int
    lines: tuple[tuple[int, int], ...]


def lay_out(commits: Iterable[tuple[str, Sequence[str]]]) -> Iterator[Place]:
    """One place per commit.

    A track waits for one commit, and no commit is waited for twice. A commit's track goes on to its first parent; where another track
    waits for that one already, the two become one in the column further left. Further parents take the leftmost free columns.

    Args:
        commits: (id, ids of its parents), every child before its parents. A parent that does not come is waited for to the end.
    """
    waiting: list[str | None] = []
    for commit, parents in commits:
        track = waiting.index(commit) if commit in waiting else _free(waiting)
        waiting[track] = None
        before = list(waiting)
        for parent in dict.fromkeys(parents):
            if parent not in waiting:
                column = track if waiting[track] is None else _free(waiting)
            elif waiting[track] is None and waiting.index(parent) > track:
                waiting[waiting.index(parent)] = None
                column = track
            else:
                continue
            waiting[column] = parent
        passing = [(column, waiting.index(awaited)) for column, awaited in enumerate(before) if awaited is not None]
        onward = [(track, waiting.index(parent)) for parent in dict.fromkeys(parents)]
        yield Place(track, (*passing, *onward))


def _free(waiting: list[str | None]) -> int:
    """The leftmost column that waits for nothing, made if there is none."""
    if None not in waiting:
        waiting.append(None)
    return waiting.index(None)


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
        state, change = (history.norms(check, kind) for kind in ("state", "change"))
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
            "proof": max(history.numbers(check, "proof"), default=None),
            "survival": min(history.numbers(check, "survival"), default=None),
            "guard": history.guard(check),
        }


def reachable(repository: Store, *also: str | None) -> list[str]:
    """Every commit below a branch, a tag, a remote branch or ``also``, newest first, every child before its parents."""
    known = lookup.whole_graph(repository)
    starts = {commit for commit in (*_labels(repository), *also) if commit is not None}
    return list(states.walk(starts, lambda commit: known[commit][1], lambda commit: known[commit][0]))


def commit_rows(repository: Store, commits: Sequence[str]) -> Iterator[CommitRow]:
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
    norms = {name: norm for row in rows for name, norm in history.base_norms(row.commit.check).items()}
    return dict(sorted(norms.items(), key=lambda item: _in_order(item[0])))


def _in_order(weight: str) -> list[tuple[int, str]]:
    """A key that sorts layer 10 after layer 9."""
    return [(int(part), "") if part.isascii() and part.isdigit() else (-1, part) for part in weight.split(".")]


def _labels(repository: Store) -> dict[str, list[tuple[str, str]]]:
    """For each commit the names that point to it."""
    found: dict[str, list[tuple[str, str]]] = {}
    for ref, target in sorted(repository.refs().items()):
        kind = next((prefix for prefix in _KINDS if ref.startswith(prefix)), None)
        if kind is not None:
            found.setdefault(target, []).append((_KINDS[kind], ref.removeprefix(kind)))
        elif ref == HEAD and not target.startswith(SYMBOLIC):
            found.setdefault(target, []).append(("head", HEAD))
    return found
