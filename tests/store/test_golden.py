"""A store made by an earlier version stays readable, and making the same history again gives the same ids."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest
from builders import AUTHOR, BASE, TIME, add_batch, make_history, make_request
from faults import QUICK

from patchhub.store.fsck import check
from patchhub.store.repository import Repository

GOLDEN = Path(__file__).parent / "golden"
FORMATS = sorted(path.name for path in GOLDEN.iterdir())

TAGGED = "ca20142b4b75af9aed7153a10793f7d85e224db611e76f45dfa11282c7e3ebc6"
REFS = {
    "HEAD": "ref: refs/heads/main",
    "refs/heads/main": "e5c90102a54137dd8a3cff7c4f4120372ed9468126fbe67ce28b0e6452a0d4cb",
    "refs/heads/side": "092bd1628fd07c73406f66b5cf5015f4d6cf4306de5607af834fc4b44105f832",
    f"refs/notes/{TAGGED}/counterfact": "9d1306dcbb479e2750be4849f1c10bf8a62182303042cbb925358e534f774bb4",
    "refs/tags/v1": TAGGED,
}
LAST_OPERATION = "321bd352c230e9db39249977625af13594aa21ebaf4be4a25788b7711633e203"
MESSAGES = ["revert the merge", "merge side", "add range(4, 5)", "add range(2, 4)", "add range(0, 2)"]


@pytest.fixture(params=FORMATS)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    shutil.copytree(GOLDEN / request.param, tmp_path / "old" / ".patchhub")
    return tmp_path / "old"


def test_is_sound_and_says_what_it_said(store: Path) -> None:
    with Repository.open(store) as repository:
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
    with Repository.open(store, disk=QUICK) as repository:
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
