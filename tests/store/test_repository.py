"""What a repository promises its callers: names, states, histories, compare-and-swap."""

from __future__ import annotations

import dataclasses
import errno
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from builders import (
    AUTHOR,
    BASE,
    TIME,
    add_batch,
    make_commit,
    make_history,
    make_repository,
    make_request,
    move,
    put_patch,
    record,
)
from faults import QUICK

from patchhub.errors import CorruptStoreError, RepositoryError, RevisionError, StaleRefError
from patchhub.fsio import Disk
from patchhub.objects import EMPTY_SET, set_digest
from patchhub.store.config import Config, Recording
from patchhub.store.fsck import check
from patchhub.store.store import Store


@pytest.fixture
def repository(tmp_path: Path) -> Iterator[Store]:
    with make_repository(tmp_path, disk=QUICK) as opened:
        yield opened


@pytest.fixture
def history(tmp_path: Path) -> Iterator[Store]:
    with make_history(tmp_path, disk=QUICK) as opened:
        yield opened


def test_new_store_is_the_unpatched_model(repository: Store) -> None:
    assert repository.head == ("main", None)
    assert repository.resolve("HEAD") is None
    assert repository.resolve("base") is None
    assert repository.active(None) == frozenset()
    assert repository.state(None) == ()
    assert repository.objects.get(repository.config.base_id) == BASE.to_json()
    assert repository.config.base == {"name": "example/base", "id": BASE.id}


def test_a_store_is_made_once_and_found_from_below(tmp_path: Path) -> None:
    below = tmp_path / "a" / "b"
    below.mkdir(parents=True)
    with pytest.raises(RepositoryError, match="no store"):
        Store.discover(below)
    make_repository(tmp_path).close()
    with Store.discover(below) as found:
        assert found.root == tmp_path / ".patchhub"
    with pytest.raises(RepositoryError, match="exists already"):
        make_repository(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".patchhub", "a"]


def test_another_format_is_refused(tmp_path: Path) -> None:
    make_repository(tmp_path).close()
    config = tmp_path / ".patchhub" / "config.json"
    config.write_text(config.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(RepositoryError, match="format 2"):
        Store.open(tmp_path)
    config.write_text("{")
    with pytest.raises(CorruptStoreError, match=r"config\.json"):
        Store.open(tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="no pipes there")
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
def test_a_config_that_is_no_file_is_refused_unread(make: Callable[[Path], None], tmp_path: Path) -> None:
    make_repository(tmp_path).close()
    config = tmp_path / ".patchhub" / "config.json"
    config.unlink()
    make(config)
    with pytest.raises(CorruptStoreError, match="not a file"):
        Store.open(tmp_path)


def test_a_file_among_the_directories_of_objects_is_passed_over(repository: Store) -> None:
    names = list(repository.objects.ids())
    free = next(f"{n:02x}" for n in range(256) if not any(name.startswith(f"{n:02x}") for name in names))
    (repository.objects.root / free).write_bytes(b"")
    assert list(repository.objects.ids()) == names
    assert check(repository).sound


def test_a_store_whose_name_the_disk_does_not_confirm_is_made_and_says_so(tmp_path: Path) -> None:
    class Forgetful(Disk):
        def sync_directory(self, path: Path) -> None:
            if (tmp_path / ".patchhub").exists():
                raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(RepositoryError, match="is made"):
        make_repository(tmp_path, disk=Forgetful())
    with Store.open(tmp_path) as store:
        assert check(store).sound


def test_a_file_that_is_no_database_is_reported(tmp_path: Path) -> None:
    make_repository(tmp_path).close()
    (tmp_path / ".patchhub" / "patchhub.db").write_bytes(b"x" * 4096)
    with pytest.raises(CorruptStoreError, match="damaged"):
        Store.open(tmp_path)
    (tmp_path / ".patchhub" / "patchhub.db").unlink()
    with pytest.raises(CorruptStoreError, match="missing"):
        Store.open(tmp_path)


def test_config_is_replaced_but_not_its_base(repository: Store, tmp_path: Path) -> None:
    repository.write_config(Config(repository.config.base, {"method": "pmet"}))
    with Store.open(tmp_path) as reopened:
        assert reopened.config.settings == {"method": "pmet"}
    with pytest.raises(RepositoryError, match="base"):
        repository.write_config(Config({"id": "0" * 64}, {}))


def test_a_change_of_the_config_keeps_what_others_changed_meanwhile(repository: Store, tmp_path: Path) -> None:
    with Store.open(tmp_path) as other:
        other.change_config(lambda config: dataclasses.replace(config, settings={"method": "pmet"}))
    recording = Recording("1" * 64, ("{}",))
    repository.change_config(lambda config: dataclasses.replace(config, recording=recording))
    with Store.open(tmp_path) as reopened:
        assert reopened.config == dataclasses.replace(repository.config, settings={"method": "pmet"})
        assert reopened.config.recording == recording


def test_a_metric_that_another_process_pinned_stays(repository: Store, tmp_path: Path) -> None:
    first, second = Recording("1" * 64, ("{}",)), Recording("2" * 64, ("{}",))
    with Store.open(tmp_path) as other:
        other.change_config(lambda config: dataclasses.replace(config, recording=first))
    for late in (second, None):
        with pytest.raises(RepositoryError, match="meanwhile") as raised:
            repository.change_config(lambda config, late=late: dataclasses.replace(config, recording=late))
        assert "again" in str(raised.value.remedy)
    repository.change_config(lambda config: dataclasses.replace(config, recording=first))
    with Store.open(tmp_path) as reopened:
        assert reopened.config.recording == first
        reopened.change_config(lambda config: dataclasses.replace(config, recording=second))


def test_recorded_commits_read_back(repository: Store, tmp_path: Path) -> None:
    patch = put_patch(repository, range(3))
    commit = make_commit(repository, added=patch.elements)
    identity = record(repository, commit)
    with Store.open(tmp_path) as reopened:
        assert reopened.head == ("main", identity)
        assert reopened.commit(identity) == commit
        assert reopened.patch(patch.id) == patch
        assert reopened.requests(patch) == [make_request(number) for number in range(3)]
        assert reopened.active(identity) == patch.elements
        assert reopened.state(identity) == (commit.tensors,)


def test_revert_takes_the_earlier_state(repository: Store) -> None:
    first = add_batch(repository, range(2))
    second = add_batch(repository, range(2, 4))
    added = repository.commit(second).added
    back = record(repository, make_commit(repository, second, removed=added))
    again = record(repository, make_commit(repository, back, added=added))
    assert repository.commit(back).same_as == first
    assert repository.state(back) == repository.state(first)
    assert repository.commit(again).same_as == second
    assert repository.state(again) == repository.state(second)
    assert repository.active(again) == repository.active(second)


def test_an_empty_set_has_no_deltas(repository: Store) -> None:
    first = add_batch(repository, range(2))
    empty = record(repository, make_commit(repository, first, removed=repository.active(first)))
    assert repository.commit(empty).set_digest == EMPTY_SET
    assert repository.state(empty) == ()


def test_keyframes_bound_the_state_and_agree_with_the_changes(repository: Store) -> None:
    patch = put_patch(repository, range(140))
    expected: frozenset[tuple[str, str | None]] = frozenset()
    tip: list[str] = []
    for element in sorted(patch.elements, key=str):
        expected |= {element}
        tip = [record(repository, make_commit(repository, *tip, added=frozenset([element])))]
        assert len(repository.state(tip[0])) <= 128
    assert repository.active(tip[0]) == expected
    keyframes = [identity for identity, commit in repository.log(*tip) if commit.keyframe]
    assert len(keyframes) == 1
    assert len(repository.state(tip[0])) == 12  # the keyframe replaces 129 blobs, 11 commits follow it


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("set_digest", "0" * 64, "set digest"),
        ("added", frozenset(), "set digest"),
        ("removed", frozenset([("0" * 64, None)]), "missing"),
        ("tensors", "0" * 64, "tensors 000000000000 is missing"),
        ("base", "0" * 64, "another base"),
        ("metric", "1" * 64, "metric 111111111111 is missing"),
        ("same_as", "self", "same_as"),
    ],
)
def test_an_unsound_commit_is_refused_and_changes_nothing(
    repository: Store, field: str, value: object, reason: str
) -> None:
    first = add_batch(repository, range(2))
    commit = make_commit(repository, first, added=put_patch(repository, range(2, 3)).elements)
    change: dict[str, Any] = {field: first if value == "self" else value}
    flawed = dataclasses.replace(commit, **change)
    before = list(repository.operations())
    with pytest.raises(RepositoryError, match=reason):
        record(repository, flawed)
    assert list(repository.operations()) == before
    assert repository.resolve("HEAD") == first
    assert record(repository, commit) == repository.resolve("main")


def test_one_column_per_request(repository: Store) -> None:
    first = add_batch(repository, range(2))
    patch = dataclasses.replace(put_patch(repository, range(2)), settings={"again": True})
    repository.objects.put(patch.to_json())
    with pytest.raises(RepositoryError, match="more than one column"):
        record(repository, make_commit(repository, first, added=patch.elements))


def test_same_as_must_be_named(repository: Store) -> None:
    first = add_batch(repository, range(2))
    second = add_batch(repository, range(2, 3))
    commit = make_commit(repository, second, removed=repository.commit(second).added)
    with pytest.raises(RepositoryError, match=f"{first[:12]}, which `same_as` must name"):
        record(repository, dataclasses.replace(commit, same_as=None))


def test_a_moved_ref_is_not_overwritten(repository: Store, tmp_path: Path) -> None:
    first = add_batch(repository, range(2))
    with Store.open(tmp_path) as other:
        commit = make_commit(other, first, added=put_patch(other, range(5, 6)).elements)
        second = add_batch(repository, range(2, 3))
        with pytest.raises(StaleRefError, match="refs/heads/main moved"):
            record(other, commit)
        with pytest.raises(StaleRefError):
            move(other, {"refs/heads/main": (first, None)}, "delete")
        assert other.head == ("main", second)


def test_all_refs_of_a_move_change_or_none(repository: Store) -> None:
    first = add_batch(repository, range(2))
    with pytest.raises(StaleRefError):
        move(repository, {"refs/heads/a": (None, first), "refs/heads/main": (None, first)}, "move")
    assert set(repository.refs()) == {"HEAD", "refs/heads/main"}


def test_tags_do_not_move(history: Store) -> None:
    tagged = history.refs()["refs/tags/v1"]
    with pytest.raises(RepositoryError, match="does not move"):
        move(history, {"refs/tags/v1": (tagged, history.resolve("side"))}, "tag")
    move(history, {"refs/tags/v1": (tagged, None)}, "tag --delete")
    with pytest.raises(RevisionError):
        history.resolve("v1")


def test_a_ref_needs_an_object_of_its_kind(repository: Store) -> None:
    with pytest.raises(CorruptStoreError, match="missing"):
        move(repository, {"refs/heads/a": (None, "0" * 64)}, "branch")
    with pytest.raises(CorruptStoreError, match="cannot be read as a commit"):
        move(repository, {"refs/heads/a": (None, repository.config.base_id)}, "branch")
    with pytest.raises(RevisionError):
        move(repository, {"refs/heads/a": (None, "ref: refs/heads/main")}, "branch")


def test_detached_head_moves_itself(history: Store) -> None:
    side = history.resolve("side")
    assert side is not None
    move(history, {"HEAD": ("ref: refs/heads/main", side)}, "switch")
    assert history.head == (None, side)
    tip = add_batch(history, range(7, 8))
    assert history.head == (None, tip)
    assert history.resolve("side") == side


def test_log_is_latest_first_and_children_precede_parents(history: Store) -> None:
    tip = history.resolve("HEAD")
    assert tip is not None
    log = [identity for identity, _ in history.log(tip)]
    assert len(log) == 5
    position = {identity: place for place, identity in enumerate(log)}
    assert all(position[identity] < position[parent] for identity in log for parent in history.commit(identity).parents)


def test_a_clock_that_runs_backwards_does_not_disturb_the_order(repository: Store) -> None:
    first = add_batch(repository, range(1))
    commit = make_commit(
        repository, first, added=put_patch(repository, range(1, 2)).elements, time="1999-01-01T00:00:00Z"
    )
    second = record(repository, commit)
    assert [identity for identity, _ in repository.log(second)] == [second, first]


def test_search_changes_and_scores(history: Store) -> None:
    request = make_request(4)
    assert [found for _, found in history.search("person 4")] == [request.id]
    assert history.search('" OR *') == []
    assert history.search(" ") == []
    changes = [(history.commit(commit).message, change) for commit, _, change in history.changes_of(request.id)]
    assert changes == [("revert the merge", -1), ("merge side", 1), ("add range(4, 5)", 1)]
    tagged = history.resolve("v1")
    assert tagged is not None
    assert history.scores_of(tagged) == [("counterfact", "S", 0.5), ("counterfact", "n.ES", 1.0)]


def test_histories_brought_from_another_store_are_checked_and_indexed(history: Store, tmp_path: Path) -> None:
    tip = history.resolve("HEAD")
    assert tip is not None
    with make_repository(tmp_path / "clone") as clone:
        for identity in history.objects.ids():
            clone.objects.put_file(history.objects.path(identity))
        move(clone, {"refs/remotes/origin/main": (None, tip)}, "fetch")
        assert clone.resolve("origin/main~1") == history.resolve("HEAD~1")
        assert list(clone.log(tip)) == list(history.log(tip))
        assert clone.search("person 4") == history.search("person 4")
        assert clone.active(tip) == history.active(tip)


def test_withheld_texts_do_not_stop_recording(repository: Store) -> None:
    patch = put_patch(repository, range(2))
    repository.objects.path(patch.requests_blob).unlink()
    tip = record(repository, make_commit(repository, added=patch.elements))
    assert repository.requests(patch) == []
    assert set_digest(repository.active(tip)) == repository.commit(tip).set_digest


def test_undo_and_redo_walk_through_the_history(history: Store) -> None:
    views = [history.refs(ago) for ago in range(len(list(history.operations())))]
    for view in views[1:]:
        history.undo(author=AUTHOR, time=TIME)
        assert history.refs() == view
    with pytest.raises(RepositoryError, match="nothing to undo"):
        history.undo(author=AUTHOR, time=TIME)
    for view in reversed(views[:-1]):
        history.redo(author=AUTHOR, time=TIME)
        assert history.refs() == view
    with pytest.raises(RepositoryError, match="nothing to redo"):
        history.redo(author=AUTHOR, time=TIME)


def test_reading_loads_neither_numpy_nor_sqlite_utils(tmp_path: Path) -> None:
    make_history(tmp_path).close()
    script = (
        "import sys, pathlib\n"
        "from patchhub.store.store import Store\n"
        "with Store.discover(pathlib.Path(sys.argv[1])) as r:\n"
        "    tip = r.resolve('HEAD'); list(r.log(tip)); r.active(tip); r.state(tip); r.search('person')\n"
        "    r.move_refs({'refs/heads/b': (None, tip)}, command='branch', arguments={}, author='A', time=sys.argv[2])\n"
        "heavy = {'numpy', 'torch', 'transformers', 'sqlite_utils'} & set(sys.modules)\n"
        "print(*heavy)\n"
    )
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), TIME],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert (run.returncode, run.stdout.strip(), run.stderr) == (0, "", "")


def test_the_database_is_durable_by_its_settings(tmp_path: Path) -> None:
    make_repository(tmp_path).close()
    with Store.open(tmp_path) as repository:

        def setting(name: str) -> object:
            return repository.connection.execute(f"PRAGMA {name}").fetchone()[0]

        assert (setting("journal_mode"), setting("synchronous"), setting("foreign_keys")) == ("delete", 2, 1)


def test_a_locked_database_is_an_error_of_the_repository(repository: Store, tmp_path: Path) -> None:
    repository.connection.execute("PRAGMA busy_timeout = 1")
    other = sqlite3.connect(tmp_path / ".patchhub" / "patchhub.db", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(RepositoryError, match="locked"):
        add_batch(repository, range(1))
    other.execute("ROLLBACK")
    other.close()
    add_batch(repository, range(1))
