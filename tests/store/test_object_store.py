"""Both holders of objects keep the same promises; the one on disk also notices and repairs rot."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from faults import QUICK
from hypothesis import given
from hypothesis import strategies as st

from patchhub.canonical import object_id
from patchhub.errors import CorruptStoreError, RepositoryError
from patchhub.store.object_store import Objects, ObjectStore
from tests.store.memory import MemoryObjects


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    (tmp_path / "objects").mkdir()
    return ObjectStore(tmp_path / "objects", disk=QUICK)


@pytest.fixture(params=["disk", "memory"])
def objects(request: pytest.FixtureRequest, store: ObjectStore) -> Objects:
    return store if request.param == "disk" else MemoryObjects()


def test_what_is_put_is_got(objects: Objects, tmp_path: Path) -> None:
    for data in (b"", b"a", b"a" * 3_000_000, b'{"a":1}'):
        identity = objects.put(data)
        assert identity == hashlib.sha256(data).hexdigest()
        assert objects.get(identity) == data
        assert identity in objects
        source = tmp_path / "source"
        source.write_bytes(data + b"!")
        assert objects.get(objects.put_file(source)) == data + b"!"


def test_putting_again_changes_nothing(objects: Objects) -> None:
    assert objects.put(b"a") == objects.put(b"a")
    assert list(objects.ids()) == [object_id(b"a")]


def test_ids_are_sorted_and_filtered_by_prefix(objects: Objects) -> None:
    assert list(objects.ids()) == []
    every = sorted(objects.put(str(number).encode()) for number in range(300))
    assert list(objects.ids()) == every
    for prefix in ("", "a", "ab", every[7][:5], every[7], "g"):
        assert list(objects.ids(prefix)) == [identity for identity in every if identity.startswith(prefix)]


@pytest.mark.parametrize("name", ["0" * 64, "", "abc", "../../etc/passwd", "/" * 64, ("../" * 22)[:64], None, 7])
def test_what_is_not_there(objects: Objects, name: object) -> None:
    assert name not in objects
    if isinstance(name, str):
        with pytest.raises(CorruptStoreError, match="missing") as caught:
            objects.get(name)
        assert caught.value.remedy
        assert caught.value.facts["object"] == name


def test_rot_is_noticed_and_putting_repairs_it(store: ObjectStore) -> None:
    identity = store.put(b"good")
    path = store.path(identity)
    path.chmod(0o644)
    damages: list[Callable[[], object]] = [
        lambda: path.write_bytes(b"evil"),
        lambda: path.write_bytes(b""),
        lambda: path.write_bytes(b"good!"),
    ]
    for damage in damages:
        damage()
        for read in (store.get, store.verify):
            with pytest.raises(CorruptStoreError, match="does not hash") as caught:
                read(identity)
            assert caught.value.facts == {"object": identity, "path": str(path)}
        assert store.put(b"good") == identity
        assert store.get(identity) == b"good"
        assert store.verify(identity) == 4
        path.chmod(0o644)


def test_files_can_be_checked_without_patchhub(store: ObjectStore) -> None:
    for number in range(5):
        path = store.path(store.put(str(number).encode()))
        assert path.stat().st_mode & 0o777 == 0o444
        digest = subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True).stdout.split()[0]
        assert digest == path.parent.name + path.name


def test_a_source_that_changes_while_it_is_copied_is_refused(store: ObjectStore, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"first")

    class Meddling(type(QUICK)):  # type: ignore[misc]
        def make_directory(self, path: Path) -> None:
            super().make_directory(path)
            source.write_bytes(b"other")

    with pytest.raises(RepositoryError, match="changed while"):
        ObjectStore(store.root, disk=Meddling()).put_file(source)
    assert list(store.ids()) == []
    assert list(store.temporary_files()) == []


def test_foreign_files_are_no_objects(store: ObjectStore) -> None:
    identity = store.put(b"a")
    (store.root / identity[:2] / ".x.tmp").write_bytes(b"")
    (store.root / identity[:2] / "README").write_bytes(b"")
    (store.root / "zz").mkdir()
    assert list(store.ids()) == [identity]
    assert [path.name for path in store.temporary_files()] == [".x.tmp"]


@given(st.lists(st.binary(max_size=40), max_size=20))
def test_memory_is_a_set_of_contents(contents: list[bytes]) -> None:
    memory = MemoryObjects()
    for data in contents:
        memory.put(data)
    assert [memory.get(identity) for identity in memory.ids()] == sorted(set(contents), key=object_id)
