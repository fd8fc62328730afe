"""`squash`: one commit with the same facts and weights, whatever was squashed, and nothing lost."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from patchhub.errors import PatchhubError, RevisionError
from patchhub.porcelain.change import squash
from patchhub.sets.commits import Draft
from patchhub.store.fsck import check
from tests.porcelain.synthetic import AUTHOR, TIME, Synthetic, distance, make_request, make_store, stamp, write

SAME = 1e-6


@pytest.fixture
def store(tmp_path: Path) -> Synthetic:
    """Four commits; the third takes back one fact of the first."""
    made = make_store(tmp_path)
    made.commit(make_request("Ann"), make_request("Bob"), message="one")
    made.commit(make_request("Cleo"), message="two")
    first = sorted(element for element in made.active() if element in made.active("HEAD~1"))[:1]
    made.commit(make_request("Dan"), make_request("Eve"), remove=first, message="three")
    made.commit(make_request("Fay"), message="four")
    return made


@pytest.mark.parametrize(
    ("span", "parent", "count"),
    [
        ("2", "HEAD~2", 2),
        ("3", "HEAD~3", 3),
        ("4", "base", 4),
        ("HEAD~3..HEAD", "HEAD~3", 3),
        ("base..", "base", 4),
        ("HEAD~2..main", "HEAD~2", 2),
    ],
)
def test_facts_and_weights_stay(store: Synthetic, span: str, parent: str, count: int) -> None:
    repository = store.repository
    below, old = repository.resolve(parent), repository.resolve("HEAD")
    elements, weights = store.active(), store.weights()
    done = squash(repository, span, stamp("squashed"))
    assert repository.head == ("main", done.commit)
    assert repository.commit(done.commit).parents == ((below,) if below else ())
    assert store.active() == elements
    assert distance(store.weights(), weights) < SAME
    assert distance(store.weights(), store.solution(elements)) < SAME
    assert done.proof < 1e-4
    assert len(done.replaced) == count
    assert done.replaced[0] == old
    assert check(repository).findings == ()


def test_undo_brings_the_commits_back(store: Synthetic) -> None:
    repository = store.repository
    old, weights = repository.resolve("HEAD"), store.weights()
    squash(repository, "3", stamp())
    assert repository.commit(repository.head[1] or "").message == "two\n\nthree\n\nfour"
    repository.undo(author=AUTHOR, time=TIME)
    assert repository.resolve("HEAD") == old
    np.testing.assert_array_equal(store.weights(), weights)


def test_what_takes_itself_back_has_the_bits_from_before(tmp_path: Path) -> None:
    """A commit and its removal, squashed: the set was there before, so the weights are that commit's bit for bit."""
    store = make_store(tmp_path)
    store.commit(make_request("Ann"), message="one")
    before, weights, elements = store.repository.resolve("HEAD"), store.weights(), store.active()
    second = store.commit(make_request("Bob"), message="two")
    metric = store.repository.commit(second).metric
    write(store.repository, Draft((second,), elements, metric, "revert", {}), stamp("back"))
    done = squash(store.repository, "2", stamp("nothing"))
    assert store.repository.commit(done.commit).same_as == before
    np.testing.assert_array_equal(store.weights(), weights)


def test_a_merge_becomes_plain(store: Synthetic) -> None:
    repository = store.repository
    tip = repository.resolve("HEAD")
    assert tip is not None
    repository.move_refs({"refs/heads/side": (None, tip)}, command="branch", arguments={}, author=AUTHOR, time=TIME)
    ours = store.commit(make_request("Gil"), message="ours")
    elements = store.active()
    repository.move_refs(
        {"HEAD": ("ref: refs/heads/main", "ref: refs/heads/side")},
        command="switch",
        arguments={},
        author=AUTHOR,
        time=TIME,
    )
    theirs = store.commit(make_request("Hal"), message="theirs")
    whole = elements | store.active()
    repository.move_refs(
        {"HEAD": ("ref: refs/heads/side", "ref: refs/heads/main")},
        command="switch",
        arguments={},
        author=AUTHOR,
        time=TIME,
    )
    write(repository, Draft((ours, theirs), whole, repository.commit(ours).metric, "merge", {}), stamp("merge"))
    done = squash(repository, "2", stamp("plain"))
    assert repository.commit(done.commit).parents == (tip,)
    assert store.active() == whole
    assert repository.refs()["refs/heads/side"] == theirs
    assert check(repository).findings == ()


@settings(max_examples=25, deadline=None)
@given(span=st.text("0123456789.HEAD~base main", max_size=12))
def test_other_spans_are_refused_in_words(span: str, store_once: Synthetic) -> None:
    before = store_once.repository.refs()
    try:
        squash(store_once.repository, span, stamp())
    except PatchhubError as error:
        if not isinstance(error, RevisionError):
            raise
        assert store_once.repository.refs() == before
    else:
        store_once.repository.undo(author=AUTHOR, time=TIME)


@pytest.fixture(scope="module")
def store_once(tmp_path_factory: pytest.TempPathFactory) -> Synthetic:
    made = make_store(tmp_path_factory.mktemp("spans"))
    for name in ("Ann", "Bob", "Cleo"):
        made.commit(make_request(name), message=name)
    return made


@pytest.mark.parametrize("span", ["0", "1", "9", "HEAD", "HEAD~1..", "HEAD~1..HEAD~1", "nothing..", "..", "-1"])
def test_these_spans_are_refused(span: str, store_once: Synthetic) -> None:
    with pytest.raises(RevisionError):
        squash(store_once.repository, span, stamp())


def test_an_empty_store_has_nothing_to_squash(tmp_path: Path) -> None:
    with pytest.raises(RevisionError):
        squash(make_store(tmp_path).repository, "2", stamp())
