"""Writing is all or nothing, and one writer at a time."""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from patchhub.errors import RepositoryError
from patchhub.fsio import (
    DISK,
    READ_ONLY,
    TEMPORARY_SUFFIX,
    Disk,
    is_shared,
    make_directories,
    read_chunks,
    share,
    temporary_path,
    write_atomically,
    writer_lock,
)


class FailingDisk(Disk):
    """Raises at one named step."""

    def __init__(self, step: str, number: int) -> None:
        self._step = step
        self._number = number

    def _at(self, step: str) -> None:
        if step == self._step:
            raise OSError(self._number, os.strerror(self._number))

    def write(self, path: Path, chunks: Iterable[bytes], mode: int) -> None:
        self._at("write")
        super().write(path, chunks, mode)

    def rename(self, source: Path, target: Path) -> None:
        self._at("rename")
        super().rename(source, target)

    def sync(self, descriptor: int) -> None:
        self._at("sync")
        super().sync(descriptor)


@pytest.mark.parametrize("old", [None, b"old"])
def test_write_replaces_the_whole_content(tmp_path: Path, old: bytes | None) -> None:
    target = tmp_path / "file"
    if old is not None:
        write_atomically(target, [old], mode=READ_ONLY)
    write_atomically(target, [b"new ", b"", b"bytes"], mode=READ_ONLY)
    assert target.read_bytes() == b"new bytes"
    assert target.stat().st_mode & 0o777 == READ_ONLY
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("step", ["write", "rename", "sync"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EIO])
def test_a_failed_write_leaves_the_old_content(tmp_path: Path, step: str, number: int) -> None:
    target = tmp_path / "file"
    target.write_bytes(b"old")
    with pytest.raises(RepositoryError, match="cannot write") as caught:
        write_atomically(target, [b"new"], disk=FailingDisk(step, number))
    assert caught.value.facts == {"path": str(target), "errno": number}
    assert caught.value.remedy
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_an_error_of_the_source_leaves_the_old_content(tmp_path: Path) -> None:
    def chunks() -> Iterator[bytes]:
        yield b"half"
        raise KeyError

    target = tmp_path / "file"
    target.write_bytes(b"old")
    with pytest.raises(KeyError):
        write_atomically(target, chunks())
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_directory_that_cannot_be_synced_is_tolerated(tmp_path: Path) -> None:
    class NoDirectorySync(Disk):
        def sync(self, descriptor: int) -> None:
            if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                raise OSError(errno.ENOTSUP, "not supported")
            super().sync(descriptor)

    write_atomically(tmp_path / "file", [b"new"], disk=NoDirectorySync())
    assert (tmp_path / "file").read_bytes() == b"new"


def test_temporary_files_are_hidden_beside_their_target(tmp_path: Path) -> None:
    names = {temporary_path(tmp_path / "file") for _ in range(100)}
    assert len(names) == 100
    assert all(path.parent == tmp_path and path.name[0] == "." and path.suffix == TEMPORARY_SUFFIX for path in names)


def test_directories_are_made_once(tmp_path: Path) -> None:
    Disk().make_directory(tmp_path / "a")
    Disk().make_directory(tmp_path / "a")
    assert (tmp_path / "a").is_dir()


def test_read_chunks_is_the_content(tmp_path: Path) -> None:
    data = os.urandom(3 * (1 << 20) + 17)
    (tmp_path / "file").write_bytes(data)
    chunks = list(read_chunks(tmp_path / "file"))
    assert b"".join(chunks) == data
    assert max(map(len, chunks)) == 1 << 20


def test_only_one_writer_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with writer_lock(path, timeout=1):
            held.set()
            release.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(10)
    with pytest.raises(RepositoryError, match="another process") as caught, writer_lock(path, timeout=0.05):
        pass
    assert caught.value.remedy
    release.set()
    thread.join()
    with writer_lock(path, timeout=0.05):
        pass


def test_the_lock_is_freed_when_the_body_raises(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(KeyError), writer_lock(tmp_path / "lock", timeout=0.05):
            raise KeyError


@pytest.mark.skipif(os.name == "nt", reason="no umask there")
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_are_as_the_umask_says_and_a_group_shares_what_is_shared(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        for shared in (False, True):
            folder = tmp_path / f"shared {shared}"
            folder.mkdir()
            if shared:
                share(folder)
            make_directories(folder / "a" / "b")
            write_atomically(folder / "a" / "b" / "new", [b"x"])
            write_atomically(folder / "a" / "b" / "old", [b"x"], mode=READ_ONLY)
            DISK.connect(folder / "a" / "db").close()
            with writer_lock(folder / "a" / "lock", timeout=1):
                pass
            group = 0o060 if shared else 0
            for name, mode in {"a/b/new": 0o666, "a/b/old": 0o444, "a/db": 0o666, "a/lock": 0o666}.items():
                found = stat.S_IMODE((folder / name).stat().st_mode)
                assert found == (mode & ~umask) | (mode & group), name
            assert is_shared(folder / "a" / "b") == shared
    finally:
        os.umask(before)


@pytest.mark.skipif(os.name == "nt", reason="no groups there")
def test_a_directory_whose_maker_died_is_given_to_the_group_by_the_next(tmp_path: Path) -> None:
    """Died between making it and sharing it; what somebody keeps in a directory of their own stays theirs."""
    share(tmp_path)
    for name in ("left", "own"):
        (tmp_path / name).mkdir()
        (tmp_path / name).chmod(0o700)
    (tmp_path / "own" / "file").write_bytes(b"")
    make_directories(tmp_path / "left")
    make_directories(tmp_path / "own")
    assert is_shared(tmp_path / "left")
    assert not is_shared(tmp_path / "own")
    (tmp_path / "left").chmod(0o700)
    make_directories(tmp_path / "left" / "below")
    assert is_shared(tmp_path / "left" / "below")


@pytest.mark.skipif(os.name == "nt", reason="no links there")
@pytest.mark.parametrize("there", [True, False])
def test_a_link_in_place_of_the_lock_leads_nowhere(there: bool, tmp_path: Path) -> None:
    """Whoever shares a folder cannot have another's private file opened to the group, emptied or made."""
    shared, private = tmp_path / "shared", tmp_path / "private"
    shared.mkdir()
    share(shared)
    if there:
        private.write_bytes(b"a key")
        private.chmod(0o600)
    (shared / "lock").symlink_to(private)
    with pytest.raises(RepositoryError, match="lock"), writer_lock(shared / "lock", timeout=0.05):
        pass
    assert private.exists() == there
    assert not there or (private.read_bytes(), stat.S_IMODE(private.stat().st_mode)) == (b"a key", 0o600)


def test_a_disk_that_keeps_failing_says_so_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clean-up fails as the write did; what is told is the write."""

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "unlink", fail)
    with pytest.raises(RepositoryError, match="cannot write"):
        write_atomically(tmp_path / "file", [b"x"], disk=FailingDisk("rename", errno.ENOSPC))
