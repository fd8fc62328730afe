"""`gc`: what anything leads to stays, what nothing leads to goes, and the store is sound afterwards."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from pathlib import Path

import pytest
from builders import AUTHOR, TIME, make_commit, make_history, make_repository, move, put_patch, record
from faults import QUICK

from patchhub.cache import Kind
from patchhub.errors import CorruptStoreError
from patchhub.objects import Element, Metric, Note
from patchhub.store.config import Config, Recording
from patchhub.store.fsck import check, garbage, reachable
from patchhub.store.fsck import delete_garbage as collect
from patchhub.store.states import Reference, closure, recorded, references
from patchhub.store.store import Store

NEVER = 0.0
ALWAYS = 2.0**40
HISTORIES = 1000
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
"""A disk that does not wait for other programs, where there is one."""


def everything_below(repository: Store) -> set[str]:
    """All that the log leads to, sets included, by following every reference of every object."""

    def follow(reference: Reference) -> list[Reference]:
        return references(reference.kind, repository.objects.get(reference.id))

    roots = recorded(operation.changes for _, operation in repository.operations())
    return {reference.id for reference in closure([*roots, Reference("base", repository.config.base_id)], follow)}


def act(repository: Store, rng: random.Random) -> None:
    """One random command; some only leave objects behind that no command recorded."""
    tip = repository.head[1]
    parents = [tip] if tip else []
    match rng.randrange(8):
        case 0 | 1 | 2:
            fresh = put_patch(repository, range(start := rng.randrange(6), start + 2)).elements
            active = {request for _, request in repository.active(tip)}
            added: frozenset[Element] = frozenset(element for element in fresh if element[1] not in active)
            made = make_commit(repository, *parents, added=added, message=f"{rng.random()}")
            record(repository, made) if rng.random() < 0.7 else repository.objects.put(made.to_json())
        case 3 if tip:
            gone = frozenset(sorted(repository.active(tip))[:1])
            record(repository, make_commit(repository, tip, removed=gone, message=f"{rng.random()}"))
        case 4 if tip:
            refs = repository.refs()
            ref = f"refs/{rng.choice(['heads', 'remotes/origin'])}/b{rng.randrange(3)}"
            move(repository, {ref: (refs.get(ref), None if rng.random() < 0.4 and ref in refs else tip)}, "branch")
        case 5 if tip:
            note = Note(tip, "a test", {"S": rng.random()}, {}, "counterfact")
            repository.add_note(note, command="evaluate", arguments={}, author=AUTHOR, time=TIME)
        case 6 if tip:  # so there is something to undo
            repository.undo(author=AUTHOR, time=TIME)
        case _:
            repository.objects.put(f"lost {rng.random()}".encode())


def one_history(seed: int, folder: Path) -> None:
    rng = random.Random(seed)
    with Store.open(folder, disk=QUICK) as repository:
        for _ in range(rng.randrange(2, 7)):
            act(repository, rng)
        needed = everything_below(repository)
        kept = {identity: repository.objects.get(identity) for identity in needed}
        there = set(repository.objects.ids())
        found = collect(repository, ALWAYS, dry_run=rng.random() < 0.1)
        deleted = {path.parent.name + path.name for item in found if (path := item.path)}
        assert deleted == there - needed
        assert {identity: repository.objects.get(identity) for identity in needed} == kept
        if seed % 20 == 0:
            assert check(repository).findings == ()


def test_what_is_reachable_is_never_deleted() -> None:
    """1,000 random histories of commits, reverts, branches, remote branches, notes, undos and lost objects."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as name:
        empty = Path(name) / "empty"
        empty.mkdir()
        make_repository(empty, disk=QUICK).close()
        for seed in range(HISTORIES):
            folder = Path(name) / "store"
            shutil.copytree(empty, folder)
            one_history(seed, folder)
            shutil.rmtree(folder)


def test_every_earlier_view_can_be_restored(tmp_path: Path) -> None:
    """After gc, undo walks all the way back and forth, and every commit on the way can be read."""
    with make_history(tmp_path, disk=QUICK) as repository:
        tip = repository.head[1]
        repository.objects.put(b"lost")
        assert len(collect(repository, ALWAYS, dry_run=False)) == 1
        steps = sum(1 for _ in repository.operations()) - 1
        for _ in range(steps):
            repository.undo(author=AUTHOR, time=TIME)
            collect(repository, ALWAYS, dry_run=False)
        assert repository.head[1] is None
        for _ in range(steps):
            repository.redo(author=AUTHOR, time=TIME)
        assert repository.head[1] == tip
        assert tip is not None
        assert all(
            repository.objects.get(blob) for commit, _ in repository.log(tip) for blob in repository.state(commit)
        )
        assert check(repository).findings == ()


@pytest.fixture
def repository(tmp_path: Path) -> Store:
    return make_history(tmp_path, disk=QUICK)


def test_a_keyframes_patches_are_reached(repository: Store) -> None:
    """Sets are not read, so this must hold of the commits around them."""
    tip = repository.head[1]
    for number in range(140):
        added = put_patch(repository, range(100 + number, 101 + number)).elements
        tip = record(repository, make_commit(repository, *([tip] if tip else []), added=added))
    assert any(commit.keyframe for _, commit in repository.log(tip or ""))
    assert reachable(repository) == everything_below(repository)


def test_the_grace_period_protects_what_is_young(repository: Store) -> None:
    old, young = (repository.objects.path(repository.objects.put(data)) for data in (b"old", b"young"))
    os.utime(old, (1000, 1000))
    assert [item.path for item in garbage(repository, 2000.0)] == [old]
    assert list(garbage(repository, NEVER)) == []
    assert young.exists()


def test_putting_an_old_object_again_makes_it_young(repository: Store) -> None:
    path = repository.objects.path(repository.objects.put(b"again"))
    os.utime(path, (1000, 1000))
    repository.objects.put(b"again")
    assert list(garbage(repository, 2000.0)) == []


def test_a_dry_run_deletes_nothing(repository: Store) -> None:
    path = repository.objects.path(repository.objects.put(b"lost"))
    assert [item.size for item in collect(repository, ALWAYS, dry_run=True)] == [4]
    assert path.exists()
    assert [item.size for item in collect(repository, ALWAYS, dry_run=False)] == [4]
    assert not path.exists()


def test_leftovers_and_unused_factors_go(repository: Store) -> None:
    metric = Metric(repository.config.base_id, "covariance", {"epsilon": 0.01}, {"kind": "file"}, "0" * 64, 1, 1)
    kind = Kind("metric", ".npy")
    used, unused, fleeting = (repository.cache.slot(kind, of=of, weight="w") for of in (metric.id, "1" * 64, None))
    for slot in (used, unused, fleeting):
        slot.put([b"123"])
    earlier = repository.cache.folder / "metric" / "w.npy"  # as versions before had them
    earlier.write_bytes(b"12345")
    gone = [slot.path() for slot in (unused, fleeting)]
    config = repository.config
    repository.objects.put(metric.to_json())
    repository.write_config(Config(config.base, config.settings, Recording(metric.id, ("{}",))))
    inside = repository.root / ".config.json.00.tmp"
    beside = repository.root.with_name(f"{repository.root.name}.00.tmp")
    inside.write_bytes(b"12")
    beside.mkdir()
    (beside / "x").write_bytes(b"1")
    download = repository.cache.folder / "receive-abc"
    (download / "0").mkdir(parents=True)
    (download / "0" / "object").write_bytes(b"1234")
    found = collect(repository, ALWAYS, dry_run=False)
    assert {(item.kind, item.path, item.size) for item in found} == {
        *(("cache", path, 3) for path in gone),
        ("cache", earlier, 5),
        ("temporary", inside, 2),
        ("temporary", beside, 1),
        ("temporary", download, 4),
    }
    assert list(used.contents()) == [b"123"]
    assert not any(path.exists() for path in (unused.folder, fleeting.folder, earlier, inside, beside, download))


def test_files_that_a_writer_renames_meanwhile_are_skipped(repository: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = repository.root / "objects" / "ab" / ".ab00.tmp"
    monkeypatch.setattr(repository.objects, "temporary_files", lambda: iter([gone]))
    assert gone not in {item.path for item in collect(repository, ALWAYS, dry_run=True)}


def test_a_pinned_metric_that_is_lost_is_found(repository: Store) -> None:
    metric = Metric(repository.config.base_id, "covariance", {"epsilon": 0.01}, {"kind": "file"}, "0" * 64, 1, 1)
    identity = repository.objects.put(metric.to_json())
    config = repository.config
    repository.write_config(Config(config.base, config.settings, Recording(identity, ("{}",))))
    assert check(repository).sound
    repository.objects.path(identity).unlink()
    with Store.open(repository.root.parent) as fresh:
        assert not check(fresh).sound


def test_a_damaged_store_loses_nothing_more(repository: Store) -> None:
    lost = repository.objects.path(repository.objects.put(b"lost"))
    tip = repository.head[1]
    assert tip is not None
    repository.objects.path(tip).unlink()
    with Store.open(repository.root.parent) as fresh, pytest.raises(CorruptStoreError):
        collect(fresh, ALWAYS, dry_run=False)
    assert lost.exists()
