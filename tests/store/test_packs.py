"""Packs: one form for one set of objects, read like files, checked object by object, and written so that nothing is lost on the way."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from builders import make_commit, make_history, make_repository, put_patch, record
from faults import QUICK, CrashError, crash, failing_at
from hypothesis import given
from hypothesis import strategies as st

from patchhub.canonical import object_id
from patchhub.errors import CorruptStoreError
from patchhub.fsio import Span
from patchhub.store import object_store
from patchhub.store.fsck import check, delete_garbage, pack_objects
from patchhub.store.object_store import Index, ObjectStore, divided, write_pack
from patchhub.store.store import Store

ALWAYS, NEVER = 2.0**40, 0.0
DATA = [b"", b"a", b"bc" * 3000, b'{"a":1}']


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    (tmp_path / "objects").mkdir()
    return ObjectStore(tmp_path / "objects", disk=QUICK)


@pytest.fixture
def repository(tmp_path: Path) -> Store:
    return make_history(tmp_path)


def packed(store: ObjectStore, data: list[bytes] = DATA) -> list[str]:
    """Those objects in one pack, and no file of them."""
    identities = [store.put(part) for part in data]
    store.replace_packs([], more=identities)
    for identity in identities:
        store.delete_loose(identity)
    assert not list(store.loose())
    return identities


def test_golden_bytes(store: ObjectStore) -> None:
    packed(store, [b"one", b"three", b"two"])
    (pack,) = store.packs()
    assert pack.index.data.hex() == (
        "7061746368687562207061636b20310a"
        "3fc4ccfe745870e2c0d99f71f30ff0656c8dedd41cc1d7d3d376b0dbe685e2f3" + "0300000000000000"
        "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed" + "0600000000000000"
        "8b5b9db0c13db24256c829aa364aa90c6d2eba318b9232a4ab9313b954d3555f" + "0b00000000000000"
    ), pack.index.data.hex()
    assert pack.path.read_bytes() == b"twoonethree"
    assert pack.path.name == f"{hashlib.sha256(pack.index.data).hexdigest()}.pack"


@given(st.lists(st.binary(max_size=40), min_size=1, max_size=30, unique=True))
def test_what_is_packed_is_found_where_it_lies(data: list[bytes]) -> None:
    objects = {object_id(part): part for part in data}
    index = Index.of({identity: len(part) for identity, part in objects.items()})
    content = b"".join(part for _, part in sorted(objects.items()))
    assert Index.read(index.data, index.name) == index
    assert (list(index.ids()), len(index), index.size) == (sorted(objects), len(objects), len(content))
    for identity, part in objects.items():
        start, size = index.find(identity) or (0, -1)
        assert content[start : start + size] == part
        assert identity in index.ids(identity[:2])
    assert index.find("0" * 64) is index.find("f" * 64) is None


def test_packs_are_read_like_files(store: ObjectStore) -> None:
    identities = packed(store)
    for identity, data in zip(identities, DATA, strict=True):
        assert identity in store
        assert store.get(identity) == data
        assert store.place(identity).read() == b"".join(store.place(identity).chunks()) == data
        assert store.size(identity) == store.verify(identity) == len(data)
        assert list(store.ids(identity[:5])) == [identity]
    assert list(store.ids()) == sorted(identities)
    assert store.put(b"a") == identities[1]
    assert not list(store.loose()), "what is in a pack is not written again"
    assert "f" * 64 not in store


def test_order_and_number_of_ways_do_not_matter(tmp_path: Path) -> None:
    rng, made = random.Random(3), []
    for number in range(3):
        (tmp_path / f"{number}" / "objects").mkdir(parents=True)
        store = ObjectStore(tmp_path / f"{number}" / "objects", disk=QUICK)
        parts = [str(part).encode() for part in range(50)]
        rng.shuffle(parts)
        half = [packed(store, parts[:20]), packed(store, parts[20:])][number % 2 :]
        assert half
        store.replace_packs(store.packs())
        made.append([(p.path.name, p.path.read_bytes(), p.index.data) for p in store.packs()])
    assert made[0] == made[1] == made[2]


def test_packs_are_cut_where_they_are_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store, "LARGEST_PACK", 10)
    sizes = {f"{number:064x}": 4 for number in range(5)}
    assert [len(group) for group in divided(sizes)] == [2, 2, 1]
    assert [len(group) for group in divided({"0" * 64: 50, "1" * 64: 1})] == [1, 1]


def test_damage_costs_what_is_damaged_and_is_told_by_name(store: ObjectStore) -> None:
    identities = packed(store)
    (pack,) = store.packs()
    start, _ = pack.index.find(identities[2]) or (0, 0)
    pack.path.chmod(0o600)
    with pack.path.open("r+b") as file:
        file.seek(start + 5)
        file.write(b"!")
    for identity in identities:
        if identity == identities[2]:
            with pytest.raises(CorruptStoreError, match="does not hash"):
                store.get(identity)
        else:
            store.verify(identity)
    store.put(DATA[2])
    assert store.get(identities[2]) == DATA[2], "putting the right bytes repairs"


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data[:-1],
        lambda data: data[:16],
        lambda data: b"",
        lambda data: b"x" + data[1:],
        lambda data: data[:16] + data[56:96] + data[16:56] + data[96:],
        lambda data: data[:16] + data[16:56] + data[16:],
        lambda data: data[:48] + b"\xff" * 8 + data[56:],
    ],
)
def test_an_index_that_is_none_is_refused(store: ObjectStore, change: Callable[[bytes], bytes]) -> None:
    identities = packed(store)
    (pack,) = store.packs()
    data = change(pack.index.data)
    with pytest.raises(CorruptStoreError):
        Index.read(data, object_id(data))
    with pytest.raises(CorruptStoreError, match="hash to its name"):
        Index.read(data, pack.index.name)
    pack.index_path.chmod(0o600)
    pack.index_path.write_bytes(data)
    fresh = ObjectStore(store.root, disk=QUICK)
    (found,) = fresh.packs()
    with pytest.raises(CorruptStoreError):
        found.check()
    for identity, part in zip(identities, DATA, strict=True):  # read or refused, never wrong
        try:
            assert fresh.get(identity) == part
        except CorruptStoreError:
            continue


def test_a_pack_is_not_written_of_what_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"other")
    with pytest.raises(CorruptStoreError, match="does not hash"):
        write_pack(tmp_path / "packs", {object_id(b"bytes"): Span.of(tmp_path / "file")}, disk=QUICK)
    assert not list((tmp_path / "packs").iterdir())


def snapshot(repository: Store) -> dict[str, bytes]:
    return {identity: repository.objects.get(identity) for identity in repository.objects.ids()}


def test_gc_packs_what_is_needed_and_nothing_changes(repository: Store) -> None:
    before, log = snapshot(repository), [identity for identity, _ in repository.log(repository.head[1] or "")]
    young = repository.objects.put(b"needed by nothing")
    planned = pack_objects(repository, dry_run=True)
    assert len(list(repository.objects.loose())) == len(before) + 1
    done = pack_objects(repository, dry_run=False)
    assert done == planned
    assert (done.objects, done.packs) == (len(before), 1)
    assert list(repository.objects.loose()) == [young]
    with Store.open(repository.root.parent) as fresh:
        assert snapshot(fresh) == {**before, young: b"needed by nothing"}
        assert [identity for identity, _ in fresh.log(fresh.head[1] or "")] == log
        report = check(fresh)
        assert report.sound, report.words()
        assert pack_objects(fresh, dry_run=False).objects == 0


def test_small_packs_become_one(repository: Store) -> None:
    for number in range(3):
        added = put_patch(repository, range(300 + number, 301 + number)).elements
        record(repository, make_commit(repository, str(repository.head[1]), added=added))
        pack_objects(repository, dry_run=False)
    assert len(repository.objects.packs()) == 1
    assert not list(repository.objects.loose())
    assert check(repository).sound


def test_gc_takes_what_nothing_needs_out_of_packs_when_it_is_old(repository: Store) -> None:
    before = snapshot(repository)
    lost = packed_with_garbage(repository)
    (pack,) = repository.objects.packs()
    assert delete_garbage(repository, NEVER, dry_run=False) == []
    (found,) = delete_garbage(repository, ALWAYS, dry_run=True)
    assert (found.kind, found.path, found.size) == ("pack", pack.path, len(b"needed by nothing"))
    assert lost in repository.objects
    delete_garbage(repository, ALWAYS, dry_run=False)
    assert lost not in repository.objects
    assert snapshot(repository) == before
    assert check(repository).sound


def packed_with_garbage(repository: Store) -> str:
    lost = repository.objects.put(b"needed by nothing")
    every = list(repository.objects.loose())
    repository.objects.replace_packs([], more=every)
    for identity in every:
        repository.objects.delete_loose(identity)
    return lost


def test_putting_again_what_lies_in_an_old_pack_makes_it_young(repository: Store) -> None:
    packed_with_garbage(repository)
    (pack,) = repository.objects.packs()
    os.utime(pack.path, (1000, 1000))
    assert delete_garbage(repository, 2000.0, dry_run=True)
    repository.objects.put(b"needed by nothing")
    assert delete_garbage(repository, 2000.0, dry_run=True) == []


def test_a_reader_follows_what_others_pack_meanwhile(repository: Store) -> None:
    with Store.open(repository.root.parent) as reader:
        identities = list(reader.objects.ids())
        pack_objects(repository, dry_run=False)
        assert reader.objects.get(identities[0]) == repository.objects.get(identities[0])
        record(
            repository,
            make_commit(repository, str(repository.head[1]), added=put_patch(repository, range(70, 71)).elements),
        )
        pack_objects(repository, dry_run=False)  # the pack that the reader knows is gone
        for identity in identities:
            assert object_id(reader.objects.get(identity)) == identity
        assert list(reader.objects.ids()) == list(repository.objects.ids())


def test_fsck_names_what_is_damaged_in_a_pack(repository: Store) -> None:
    pack_objects(repository, dry_run=False)
    (pack,) = repository.objects.packs()
    damaged = next(iter(pack.index.ids("")))
    pack.path.chmod(0o600)
    data = bytearray(pack.path.read_bytes())
    data[0] ^= 1
    pack.path.write_bytes(data)
    with Store.open(repository.root.parent) as fresh:
        problems = [finding.problem for finding in check(fresh).findings]
        assert any(damaged[:12] in problem for problem in problems)
        others = [problem for problem in problems if "does not hash" in problem and damaged[:12] not in problem]
        assert others == []
    pack.path.write_bytes(data[:-3])
    with Store.open(repository.root.parent) as fresh:
        assert any(pack.name[:12] in finding.problem for finding in check(fresh).findings)
    pack.path.unlink()
    with Store.open(repository.root.parent) as fresh:
        assert any("without its objects" in finding.problem for finding in check(fresh).findings)


def test_a_crash_at_any_step_of_packing_loses_nothing(tmp_path: Path) -> None:
    made = make_history(tmp_path / "made")
    packed_with_garbage(made)
    record(made, make_commit(made, str(made.head[1]), added=put_patch(made, range(80, 82)).elements))
    before = snapshot(made)
    made.close()
    number = 0
    while True:
        copy = tmp_path / f"copy{number}"
        shutil.copytree(tmp_path / "made", copy)
        with Store.open(copy, disk=failing_at(number, crash)) as repository:
            try:
                pack_objects(repository, dry_run=False)
                survived = True
            except CrashError:
                survived = False
        with Store.open(copy, disk=QUICK) as repository:
            assert snapshot(repository) == before
            report = check(repository)
            assert report.sound, report.words()
            delete_garbage(repository, ALWAYS, dry_run=False)
            assert not list(repository.objects.temporary_files())
            pack_objects(repository, dry_run=False)
            assert check(repository).sound
        if survived:
            break
        number += 1
    assert number > 5


def test_an_empty_store_has_nothing_to_pack(tmp_path: Path) -> None:
    with make_repository(tmp_path, disk=QUICK) as repository:
        assert pack_objects(repository, dry_run=False).objects == 1  # the base
        assert pack_objects(repository, dry_run=False).objects == 0


def test_a_flipped_bit_in_a_pack_or_its_index_is_found(repository: Store) -> None:
    pack_objects(repository, dry_run=False)
    (pack,) = repository.objects.packs()
    rng = random.Random(5)
    for path in (pack.path, pack.index_path):
        data = path.read_bytes()
        path.chmod(0o644)
        for place in rng.sample(range(8 * len(data)), 40):
            changed = bytearray(data)
            changed[place // 8] ^= 1 << place % 8
            path.write_bytes(changed)
            with Store.open(repository.root.parent) as fresh:
                assert not check(fresh).sound, (path.suffix, place)
        path.write_bytes(data)
    with Store.open(repository.root.parent) as fresh:
        assert check(fresh).sound


def test_what_is_damaged_in_one_place_is_packed_from_another(store: ObjectStore) -> None:
    identities = packed(store)
    (pack,) = store.packs()
    start, _ = pack.index.find(identities[2]) or (0, 0)
    pack.path.chmod(0o600)
    with pack.path.open("r+b") as file:
        file.seek(start)
        file.write(b"!")
    store.put(DATA[2])
    store.path(identities[2]).rename(store.root / "kept")
    with pytest.raises(CorruptStoreError, match=identities[2][:12]):
        store.replace_packs(store.packs())
    assert len(store.packs()) == 1, "the pack stays while it cannot be written anew"
    (store.root / "kept").rename(store.root / identities[2][:2] / identities[2][2:])
    store.replace_packs(store.packs())
    assert [store.get(identity) for identity in identities] == DATA
