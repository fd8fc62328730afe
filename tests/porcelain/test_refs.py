"""Branches, tags, HEAD and the log of their moves: every verb is one operation, and `undo` gives every ref back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from patchhub.errors import PatchhubError, RepositoryError, RevisionError, StaleRefError
from patchhub.porcelain import refs
from patchhub.porcelain.refs import RefEntry, undo
from patchhub.store.store import Store
from patchhub.who import Who
from tests.porcelain.synthetic import AUTHOR, BY, TIME, Synthetic, make_request, make_store

Verb = Callable[[Store], object]

VERBS: dict[str, Verb] = {
    "branch": lambda repository: refs.create_branch(repository, "new", "HEAD~1", BY),
    "branch -d": lambda repository: refs.delete_branch(repository, "side", BY),
    "tag": lambda repository: refs.create_tag(repository, "v2", "side", BY),
    "tag -d": lambda repository: refs.delete_tag(repository, "v1", BY),
    "switch": lambda repository: refs.switch(repository, "side", BY),
    "switch -c": lambda repository: refs.switch_to_new(repository, "new", "side", BY),
    "switch -c base": lambda repository: refs.switch_to_new(repository, "new", "base", BY),
    "switch --detach": lambda repository: refs.detach(repository, "v1", BY),
    "reset": lambda repository: refs.reset(repository, "v1", BY),
    "reset base": lambda repository: refs.reset(repository, "base", BY),
}


@pytest.fixture
def store(tmp_path: Path) -> Synthetic:
    """Two commits on `main`; the first is also `side` and the tag v1."""
    store = make_store(tmp_path)
    store.commit(make_request("Ada"), message="one")
    refs.create_branch(store.repository, "side", "HEAD", BY)
    refs.create_tag(store.repository, "v1", "HEAD", BY)
    store.commit(make_request("Bob"), message="two")
    return store


@pytest.mark.parametrize("verb", VERBS)
def test_undo_gives_every_ref_back_after_every_verb(store: Synthetic, verb: str) -> None:
    before, operations = store.repository.refs(), len(list(store.repository.operations()))
    VERBS[verb](store.repository)
    after = store.repository.refs()
    assert after != before
    assert len(list(store.repository.operations())) == operations + 1
    undo(store.repository, who=Who(AUTHOR, TIME))
    assert store.repository.refs() == before
    store.repository.redo(author=AUTHOR, time=TIME)
    assert store.repository.refs() == after


def test_where_each_verb_leads(store: Synthetic) -> None:
    repository = store.repository
    two, one = (str(repository.resolve(name)) for name in ("main", "main~1"))
    assert refs.create_branch(repository, "new", "HEAD~1", BY).after == one
    assert repository.head == ("main", two)
    assert refs.switch(repository, "new", BY).before == two
    assert repository.head == ("new", one)
    assert refs.reset(repository, "main", BY).after == two
    assert repository.head == ("new", two)
    refs.detach(repository, "v1", BY)
    assert repository.head == (None, one)
    refs.reset(repository, "main", BY)
    assert repository.head == (None, two)
    refs.switch_to_new(repository, "anew", "base", BY)
    assert repository.head == ("anew", None)
    assert [branch.name for branch in refs.branches(repository)] == ["main", "new", "side"]
    store.commit(make_request("Cid"), message="three")
    first = refs.branches(repository)[0]
    assert (first.name, first.current, first.message) == ("anew", True, "three")
    assert [(t.name, t.commit) for t in refs.tags(repository)] == [("v1", one)]


def test_doing_what_is_done_already_is_no_operation(store: Synthetic) -> None:
    before = len(list(store.repository.operations()))
    refs.switch(store.repository, "main", BY)
    refs.reset(store.repository, "HEAD", BY)
    assert len(list(store.repository.operations())) == before


@pytest.mark.parametrize(
    ("verb", "error", "words"),
    [
        (lambda r: refs.create_branch(r, "side", "HEAD", BY), RepositoryError, "the branch side exists"),
        (lambda r: refs.switch_to_new(r, "side", "HEAD", BY), RepositoryError, "the branch side exists"),
        (lambda r: refs.create_tag(r, "v1", "HEAD", BY), RepositoryError, "the tag v1 exists"),
        (lambda r: refs.create_tag(r, "v2", "base", BY), RevisionError, "unpatched model"),
        (lambda r: refs.create_branch(r, "a b", "HEAD", BY), RevisionError, "cannot be the name"),
        (lambda r: refs.create_branch(r, "new", "nothing", BY), RevisionError, "nothing is named"),
        (lambda r: refs.delete_branch(r, "main", BY), RepositoryError, "is the current branch"),
        (lambda r: refs.delete_branch(r, "sid", BY), RevisionError, "there is no branch 'sid'"),
        (lambda r: refs.delete_tag(r, "v9", BY), RevisionError, "there is no tag 'v9'"),
        (lambda r: refs.switch(r, "v1", BY), RevisionError, "there is no branch 'v1'"),
        (lambda r: refs.detach(r, "base", BY), RevisionError, "unpatched model"),
        (lambda r: list(refs.reflog(r, "never")), RevisionError, "there is no branch 'never'"),
    ],
)
def test_what_cannot_be_done_is_refused_and_changes_nothing(
    store: Synthetic, verb: Verb, error: type[PatchhubError], words: str
) -> None:
    before = store.repository.refs()
    with pytest.raises(error, match=words) as caught:
        verb(store.repository)
    assert caught.value.remedy
    assert store.repository.refs() == before


def test_a_branch_that_only_a_remote_has_is_made_here(store: Synthetic) -> None:
    repository = store.repository
    commit = store.commit(make_request("Yan"))
    there = {f"refs/remotes/{name}": (None, commit) for name in ("origin/team/side", "origin/two", "other/two")}
    repository.move_refs(there, command="fetch", arguments={}, author=BY.author, time=BY.time)
    assert [found.name for found in refs.remote_branches(repository)] == ["origin/team/side", "origin/two", "other/two"]
    refs.switch(repository, "team/side", BY)
    assert repository.head == ("team/side", commit)
    with pytest.raises(RevisionError, match="several remotes: origin/two, other/two") as refused:
        refs.switch(repository, "two", BY)
    assert "switch -c two origin/two" in str(refused.value.remedy)
    refs.switch(repository, "main", BY)
    store.commit(make_request("Zoe"))
    refs.switch(repository, "team/side", BY)  # the one that is here, wherever the remote's is
    assert repository.head == ("team/side", commit)


def test_a_mistyped_branch_is_guessed(store: Synthetic) -> None:
    with pytest.raises(RevisionError) as caught:
        refs.switch(store.repository, "sied", BY)
    assert "Did you mean side?" in str(caught.value.remedy)


def test_a_ref_that_another_command_moved_is_not_overwritten(store: Synthetic) -> None:
    here = str(store.repository.resolve("main"))
    with Store.open(store.repository.root.parent) as other:
        refs.reset(other, "v1", BY)
    with pytest.raises(StaleRefError):
        store.repository.move_refs(
            {"refs/heads/main": (here, here)}, command="reset", arguments={}, author=AUTHOR, time=TIME
        )


def moves(entries: list[RefEntry]) -> list[tuple[str, str]]:
    return [(entry.command, entry.message) for entry in entries]


def test_the_reflog_lists_moves_and_its_numbers_resolve(store: Synthetic) -> None:
    repository = store.repository
    refs.switch(repository, "side", BY)
    refs.reset(repository, "main", BY)
    refs.switch(repository, "main", BY)
    refs.reset(repository, "main~1", BY)
    of_head = list(refs.reflog(repository))
    assert moves(of_head) == [
        ("reset", "one"),
        ("switch", "two"),
        ("reset", "two"),
        ("switch", "one"),
        ("commit", "two"),
        ("commit", "one"),
        ("init", ""),
    ]
    assert [entry.ago for entry in of_head] == [0, 1, 2, 3, 4, 7, 8]
    for name in ("HEAD", "main", "side"):
        for entry in refs.reflog(repository, name):
            if entry.commit is not None:
                assert repository.resolve(f"{name}@{{{entry.ago}}}") == entry.commit
    assert moves(list(refs.reflog(repository, "main", limit=2))) == [("reset", "one"), ("commit", "two")]


def test_the_reflog_finds_what_was_deleted(store: Synthetic) -> None:
    tip = store.repository.resolve("side")
    refs.delete_branch(store.repository, "side", BY)
    gone, made = refs.reflog(store.repository, "side")
    assert (gone.commit, made.commit) == (None, tip)
