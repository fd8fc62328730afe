"""Random histories: whatever is recorded, merged, reverted, undone and redone, the store stays sound."""

from __future__ import annotations

import tempfile
from pathlib import Path

from builders import AUTHOR, TIME, make_commit, make_repository, move, put_patch, record
from faults import QUICK
from hypothesis import given, settings
from hypothesis import strategies as st

from patchhub.errors import RepositoryError
from patchhub.objects import Element, set_digest
from patchhub.store import states
from patchhub.store.fsck import check
from patchhub.store.store import Store

steps = st.lists(
    st.tuples(
        st.sampled_from(["add", "revert", "merge", "branch", "switch", "undo", "redo"]),
        st.integers(0, 5),
        st.integers(0, 5),
    ),
    min_size=1,
    max_size=14,
)


class Model:
    """The same history in plain dictionaries: each commit's set, written down when it was made."""

    def __init__(self, repository: Store) -> None:
        self.repository = repository
        self.sets: dict[str, frozenset[Element]] = {}

    def record(self, *parents: str, added: frozenset[Element], removed: frozenset[Element]) -> None:
        before = self.sets[parents[0]] if parents else frozenset[Element]()
        identity = record(self.repository, make_commit(self.repository, *parents, added=added, removed=removed))
        self.sets[identity] = (before - removed) | added

    def act(self, name: str, first: int, second: int) -> None:
        branches = sorted(ref for ref in self.repository.refs() if ref.startswith("refs/heads/"))
        other = branches[first % len(branches)] if branches else None
        tip = self.repository.head[1]
        if name == "add":
            elements = put_patch(self.repository, range(first, first + 1 + second)).elements
            active = {request for _, request in self.sets.get(tip or "", frozenset())}
            added = frozenset(element for element in elements if element[1] not in active)
            self.record(*([tip] if tip else []), added=added, removed=frozenset())
        elif name == "revert" and tip:
            gone = sorted(self.sets[tip], key=str)[: first + 1]
            self.record(tip, added=frozenset(), removed=frozenset(gone))
        elif name == "merge" and tip and other and self.repository.refs()[other] != tip:
            theirs = self.repository.refs()[other]
            active = {request for _, request in self.sets[tip]}
            added = frozenset(element for element in self.sets[theirs] if element[1] not in active)
            self.record(tip, theirs, added=added, removed=frozenset())
        elif name == "branch" and tip and f"refs/heads/b{first}" not in branches:
            move(self.repository, {f"refs/heads/b{first}": (None, tip)}, "branch")
        elif name == "switch" and other:
            move(self.repository, {"HEAD": (self.repository.refs()["HEAD"], f"ref: {other}")}, "switch")
        elif name in ("undo", "redo"):
            reverse = self.repository.undo if name == "undo" else self.repository.redo
            try:
                reverse(author=AUTHOR, time=TIME)
            except RepositoryError as error:
                if "nothing to" not in error.message:
                    raise


@given(steps)
@settings(max_examples=25, deadline=None)
def test_random_histories(todo: list[tuple[str, int, int]]) -> None:
    with tempfile.TemporaryDirectory() as name, make_repository(Path(name), disk=QUICK) as repository:
        model = Model(repository)
        for step in todo:
            model.act(*step)
        with Store.open(Path(name)) as fresh:
            assert check(fresh).findings == ()
            for identity, elements in model.sets.items():
                commit = fresh.commit(identity)
                assert fresh.active(identity) == elements
                assert commit.set_digest == set_digest(elements)
                assert len(fresh.state(identity)) <= 128
                if commit.same_as:
                    assert fresh.state(identity) == fresh.state(commit.same_as)
                    assert states.is_ancestor(commit.same_as, identity, fresh.parents)
                    assert fresh.commit(commit.same_as).same_as is None
