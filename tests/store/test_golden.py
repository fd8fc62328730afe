"""A store made by an earlier version stays readable, and making the same history again gives the same ids."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest
from builders import AUTHOR, BASE, TIME, add_batch, make_history, make_request
from faults import QUICK

from patchhub.store.fsck import check
from patchhub.store.store import Store

GOLDEN = Path(__file__).parent / "golden"
FORMATS = sorted(path.name for path in GOLDEN.iterdir())

TAGGED = "5330e9c12f4e07e4077c3db2ed4f30682d434da2c3cb6907ce160e9ae30cc85f"
REFS = {
    "HEAD": "ref: refs/heads/main",
    "refs/heads/main": "eb627e25af7b0a771af6ff9392ed9d95c33bf42ad29bc5b452d4f5899f89b860",
    "refs/heads/side": "d3e9a80fba62488d985da6123668eb6eb5188773fe6933367ec83bba20e64337",
    f"refs/notes/{TAGGED}/counterfact": "1ba121c5a25906127b5de91a2fea88b5f1a4abb0cdd50ddf75d2052b5a9101ee",
    "refs/tags/v1": TAGGED,
}
LAST_OPERATION = "bb2a2d58b07a6d1a1d3ce43cbfd0ba205fc86ecc0ff2bc5ff0377835a0986f0c"
MESSAGES = ["revert the merge", "merge side", "add range(2, 4)", "add range(4, 5)", "add range(0, 2)"]


@pytest.fixture(params=FORMATS)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    shutil.copytree(GOLDEN / request.param, tmp_path / "old" / ".patchhub")
    return tmp_path / "old"


def test_is_sound_and_says_what_it_said(store: Path) -> None:
    with Store.open(store) as repository:
        assert check(repository).findings == ()
        assert repository.refs() == REFS
        assert next(repository.operations())[0] == LAST_OPERATION
        assert repository.config.base_id == BASE.id
        assert repository.config.settings == {"method": "memit"}
        tip = repository.resolve("main")
        assert tip is not None
        assert [commit.message for _, commit in repository.log(tip)] == MESSAGES
        assert len(repository.active(tip)) == 4
        assert repository.commit(tip).same_as == repository.resolve("v1")
        assert [request for _, request in repository.search("person 3")] == [make_request(3).id]
        assert repository.scores_of(TAGGED) == [("counterfact", "S", 0.5), ("counterfact", "n.ES", 1.0)]


def test_can_be_continued(store: Path) -> None:
    with Store.open(store, disk=QUICK) as repository:
        tip = repository.resolve("HEAD")
        add_batch(repository, range(20, 22))
        repository.undo(author=AUTHOR, time=TIME)
        assert repository.resolve("HEAD") == tip
        assert check(repository).findings == ()


def test_the_same_history_has_the_same_ids(tmp_path: Path) -> None:
    with make_history(tmp_path, disk=QUICK) as repository:
        assert repository.refs() == REFS
        assert next(repository.operations())[0] == LAST_OPERATION


def test_objects_are_named_by_their_content() -> None:
    files = [path for path in GOLDEN.glob("*/objects/*/*") if path.is_file()]
    assert len(files) > 10
    for path in files:
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.parent.name + path.name
