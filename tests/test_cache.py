"""The cache on disk: what is read is what was written, whoever writes beside, and whatever happens to the files."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from patchhub.cache import DOWNLOADS, Cache, Kind, Slot, digest_of, user_folder
from patchhub.errors import RepositoryError
from patchhub.fsio import CHUNK, Disk

KIND = Kind("things", ".bin")
LARGE = 6 * CHUNK + 17  # hashed by several threads


class Told:
    """Listens, and keeps what was said."""

    def __init__(self) -> None:
        self.words: list[str] = []

    def __call__(self, message: str) -> None:
        self.words.append(message)


def slot_in(folder: Path, tell: Callable[[str], None] = print, disk: Disk | None = None, **inputs: object) -> Slot:
    cache = Cache(folder, tell) if disk is None else Cache(folder, tell, disk)
    return cache.slot(KIND, **inputs)


def flip(path: Path, place: int, bit: int) -> None:
    """Change one bit as a disk does: neither size nor times tell."""
    status, data = path.stat(), bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


# --- the digest


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 4 * CHUNK, 4 * CHUNK + 1, LARGE])
def test_the_digest_is_of_every_byte_whoever_hashes_it(tmp_path: Path, size: int) -> None:
    data = os.urandom(size)
    (tmp_path / "file").write_bytes(data)
    leaves = [hashlib.sha256(data[start : start + CHUNK]).digest() for start in range(0, size, CHUNK)]
    assert digest_of(tmp_path / "file") == hashlib.sha256(b"".join(leaves)).hexdigest()


# --- reading and writing


def test_what_was_put_comes_back_under_its_inputs_alone(tmp_path: Path) -> None:
    slot = slot_in(tmp_path, a=1, b=[2.5, "x"])
    slot.put([b"one", b"", b"two"])
    assert list(slot_in(tmp_path, b=[2.5, "x"], a=1).contents()) == [b"onetwo"]
    path = slot.path()
    assert path is not None
    assert path.read_bytes() == b"onetwo"
    others = [slot_in(tmp_path, a=1), slot_in(tmp_path, a=1, b=[2.5, "y"]), slot_in(tmp_path / "other", a=1)]
    cache = Cache(tmp_path)
    others += [cache.slot(KIND, of="0" * 64, a=1, b=[2.5, "x"]), cache.slot(Kind("others", ".bin"), a=1, b=[2.5, "x"])]
    others += [cache.slot(Kind("things", ".bin", version=2), a=1, b=[2.5, "x"])]
    assert not any(list(other.contents()) for other in others)


def test_a_key_may_have_several_entries_the_newest_first(tmp_path: Path) -> None:
    slot = slot_in(tmp_path)
    for number in range(4):
        slot.put([b"%d" % number])
        (file,) = (path for path in slot.paths() if path.read_bytes() == b"%d" % number)
        os.utime(file, (number, number))
    for path in slot.folder.iterdir():  # using them made them all young
        os.utime(path, (int(path.read_bytes()),) * 2)
    assert list(slot.contents()) == [b"3", b"2", b"1", b"0"]
    slot.put([b"3"])
    assert len(list(slot.contents())) == 4


def test_the_least_recently_used_go_when_there_are_too_many(tmp_path: Path) -> None:
    kind = Kind("things", ".bin", limit=300)
    slots = [Cache(tmp_path).slot(kind, number=number) for number in range(4)]
    for number, slot in enumerate(slots[:3]):
        slot.put([bytes([number]) * 100])
        for path in slot.folder.iterdir():
            os.utime(path, (number, number))
    assert slots[0].path(), "which is a use"
    slots[3].put([b"x" * 100])
    assert [slot.path() is not None for slot in slots] == [True, False, True, True]
    assert not slots[1].folder.exists()
    slots[1].put([b"x" * 1000])
    assert [slot.path() is not None for slot in slots] == [False, True, False, False], "the newest stays"


def test_what_is_of_an_object_says_so(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    for of in ("a" * 64, None):
        slot = cache.slot(KIND, of=of)
        slot.put([b"x"])
        path = slot.path()
        assert path is not None
        assert cache.owner(path) == of
    assert cache.owner(tmp_path / "things" / "x.bin") is None


# --- damage


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(min_size=1, max_size=200), st.data())
def test_any_flipped_bit_is_found(tmp_path: Path, content: bytes, data: st.DataObject) -> None:
    told = Told()
    slot = slot_in(tmp_path, told)
    slot.put([content])
    path = slot.path()
    assert path is not None
    flip(path, data.draw(st.integers(0, len(content) - 1)), data.draw(st.integers(0, 7)))
    assert list(slot.contents()) == []
    assert not path.exists()
    assert len(told.words) == 1


@pytest.mark.parametrize("place", [0, CHUNK - 1, CHUNK, 3 * CHUNK + 5, LARGE - 1])
def test_a_flipped_bit_of_a_large_entry_is_found(tmp_path: Path, place: int) -> None:
    told, slot = Told(), slot_in(tmp_path)
    slot.put([os.urandom(LARGE)])
    path = slot.path()
    assert path is not None
    flip(path, place, 3)
    assert slot_in(tmp_path, told).path() is None
    assert "hash" in told.words[0]


@pytest.mark.parametrize("content", [b"", b"shorte", b"shorter and longer", b"another"])
def test_a_cut_or_foreign_file_is_not_read(tmp_path: Path, content: bytes) -> None:
    told, slot = Told(), slot_in(tmp_path)
    slot.put([b"shorter"])
    path = slot.path()
    assert path is not None
    path.write_bytes(content)
    (slot.folder / "foreign.bin").write_bytes(b"shorter")
    (slot.folder / f"{'0' * 64}.bin").write_bytes(b"shorter")
    assert list(slot_in(tmp_path, told).contents()) == []
    assert len(told.words) == 3
    assert not slot.folder.exists()
    slot.put([b"shorter"])
    assert list(slot.contents()) == [b"shorter"]


def test_damage_is_logged_where_nobody_listens(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    slot = Cache(tmp_path).slot(KIND)
    slot.put([b"x"])
    for path in slot.folder.iterdir():
        path.write_bytes(b"y")
    assert slot.path() is None
    assert [record.name for record in caplog.records] == ["patchhub"]


def test_an_entry_that_only_cannot_be_opened_is_neither_used_nor_deleted(tmp_path: Path) -> None:
    slot = slot_in(tmp_path)
    folder = slot.folder / f"{'0' * 64}.bin"
    folder.mkdir(parents=True)
    assert list(slot.contents()) == []
    assert folder.is_dir()


# --- disks that fail, processes that end


class Stopped(BaseException):
    """As an interrupt."""


class FailingDisk(Disk):
    """Raises before it does one step."""

    def __init__(self, step: str, error: BaseException) -> None:
        self._step, self._error = step, error

    def write(self, path: Path, chunks: Iterable[bytes], mode: int) -> None:
        super().write(path, chunks, mode)
        if self._step == "write":
            raise self._error

    def rename(self, source: Path, target: Path) -> None:
        if self._step == "rename":
            raise self._error
        super().rename(source, target)


@pytest.mark.parametrize("step", ["write", "rename"])
def test_a_disk_that_refuses_leaves_what_was_there(tmp_path: Path, step: str) -> None:
    slot_in(tmp_path).put([b"old"])
    slot = slot_in(tmp_path, disk=FailingDisk(step, OSError(28, "full")))
    with pytest.raises(RepositoryError, match="full"):
        slot.put([b"new"])
    slot.keep([b"new"])
    with pytest.raises(Stopped):
        slot_in(tmp_path, disk=FailingDisk(step, Stopped())).keep([b"new"])
    assert [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()] == [b"old"]


def test_a_folder_that_cannot_be_made_stops_nothing_that_is_kept(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"in the way")
    slot = slot_in(tmp_path / "file")
    slot.keep([b"x"])
    assert slot.path() is None
    assert list(Cache(tmp_path / "file").files()) == list(Cache(tmp_path / "none").leftovers()) == []
    with pytest.raises(RepositoryError):
        slot.put([b"x"])


def test_what_a_check_refuses_is_never_an_entry(tmp_path: Path) -> None:
    def refuse(path: Path) -> None:
        assert path.read_bytes() == b"bad"
        raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011  # its own
        slot_in(tmp_path).put([b"bad"], check=refuse)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


KILLED = """
import os, sys
from pathlib import Path
from patchhub.cache import Cache, Kind
from patchhub.fsio import Disk
class Killed(Disk):
    def rename(self, source, target): os._exit(9)
Cache(Path(sys.argv[1]), print, Killed()).slot(Kind("things", ".bin")).put([b"whole"])
"""


def test_a_process_that_dies_before_the_rename_leaves_nothing_that_is_read(tmp_path: Path) -> None:
    assert subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False).returncode == 9
    cache, slot = Cache(tmp_path), slot_in(tmp_path)
    assert list(slot.contents()) == list(cache.files()) == []
    assert [path.read_bytes() for path in cache.leftovers()] == [b"whole"]
    (tmp_path / f"{DOWNLOADS}1").mkdir()
    (tmp_path / f"{DOWNLOADS}1" / "part").write_bytes(b"x")
    assert len(list(cache.leftovers())) == 2
    assert list(cache.files()) == []


WRITER = """
import sys
from pathlib import Path
from patchhub.cache import Cache, Kind
folder, name, limit = Path(sys.argv[1]), sys.argv[2].encode(), int(sys.argv[3])
slot = Cache(folder, sys.exit).slot(Kind("things", ".bin", limit=limit or None))
for number in range(150):
    slot.put([b"both", b"%d" % number])
    slot.put([name, b"%d" % number])
    assert all(content[:4] in (b"both", b"left", b"rght") for content in slot.contents())
"""


@pytest.mark.parametrize("limit", [0, 200])
def test_two_writers_of_one_key_never_damage_anything(tmp_path: Path, limit: int) -> None:
    """They write the same and different entries, read, and make room, at the same time; ``sys.exit`` hears of any damage."""
    commands = [[sys.executable, "-c", WRITER, str(tmp_path), name, str(limit)] for name in ("left", "rght")]
    running = [subprocess.Popen(command) for command in commands]
    assert [process.wait() for process in running] == [0, 0]
    told = Told()
    found = set(slot_in(tmp_path, told).contents())
    expected = {b"%s%d" % (name, number) for name in (b"both", b"left", b"rght") for number in range(150)}
    assert found <= expected
    assert not told.words
    assert found == expected if not limit else 0 < sum(map(len, found)) <= limit + 7


def test_a_users_folder_is_named_by_the_environment(tmp_path: Path) -> None:
    home = Path.home() / ".cache" / "patchhub"
    assert user_folder({}) == home
    assert user_folder({"XDG_CACHE_HOME": str(tmp_path)}) == tmp_path / "patchhub"
    assert user_folder({"XDG_CACHE_HOME": "not/absolute"}) == home
    assert user_folder({"XDG_CACHE_HOME": str(tmp_path), "PATCHHUB_CACHE": str(tmp_path / "mine")}) == tmp_path / "mine"
