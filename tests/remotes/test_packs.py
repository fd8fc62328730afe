"""Packs in remotes: few files, what lies apart stays apart, and damage or lies cost what they are about and are told by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from patchhub.canonical import object_id
from patchhub.errors import CorruptStoreError, RemoteError
from patchhub.remotes import parcels
from patchhub.remotes.remote import Remote
from patchhub.remotes.sync import open_remote
from patchhub.store import object_store
from patchhub.store.fsck import check, pack_objects
from patchhub.store.object_store import Index
from patchhub.store.store import Store
from tests.remotes.stores import add_batch, closure_of, content, make_history, make_store, move
from tests.remotes.test_conformance import fetch, push, spoil

COMMITS = 20


def long_history(folder: Path) -> Store:
    repository = make_store(folder)
    for number in range(COMMITS):
        add_batch(repository, range(2 * number, 2 * number + 2))
    return repository


def files_in(folder: Path, suffix: str = "") -> list[Path]:
    return sorted(path for path in folder.rglob(f"*{suffix}") if path.is_file())


@pytest.fixture(scope="module")
def pushed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store and a remote that was filled by one push."""
    folder = tmp_path_factory.mktemp("pushed")
    with long_history(folder / "ours") as ours:
        push(ours, open_remote(str(folder / "remote")), "main")
    return folder


@pytest.fixture
def remote(pushed: Path, tmp_path: Path) -> Path:
    """A copy of the remote that may be damaged."""
    import shutil

    shutil.copytree(pushed / "remote", tmp_path / "remote")
    return tmp_path / "remote"


def test_a_push_and_a_fetch_of_many_commits_make_few_files(pushed: Path, tmp_path: Path) -> None:
    there = [path.relative_to(pushed / "remote").parts[0] for path in files_in(pushed / "remote")]
    assert there.count("packs") == 8, "history, texts, states and columns: a pack and an index each"
    assert there.count("objects") == 0
    with Store.open(pushed / "ours") as ours, make_store(tmp_path / "theirs") as theirs:
        before = len(files_in(theirs.root / "objects"))
        fetch(theirs, open_remote(str(pushed / "remote")))
        tip = theirs.refs()["refs/remotes/origin/main"]
        assert content(theirs, tip) == content(ours, tip)
        assert len(files_in(theirs.root / "objects")) == before
        assert len(files_in(theirs.root / "packs")) == 2
        assert set(closure_of(ours, "refs/heads/main")) <= set(theirs.objects.ids())
        assert check(theirs).sound


def test_the_packs_of_a_push_follow_from_what_is_pushed(pushed: Path, tmp_path: Path) -> None:
    with Store.open(pushed / "ours") as ours:
        push(ours, open_remote(str(tmp_path / "again")), "main")
        pack_objects(ours, dry_run=False)
        push(ours, open_remote(str(tmp_path / "from packs")), "main")
    names = [
        [(path.name, path.read_bytes()) for path in files_in(folder / "packs")]
        for folder in (pushed / "remote", tmp_path / "again", tmp_path / "from packs")
    ]
    assert names[0] == names[1] == names[2]


def test_groups_lie_apart(pushed: Path) -> None:
    with Store.open(pushed / "ours") as ours:
        commits = [commit for _, commit in ours.log(ours.refs()["refs/heads/main"])]
        patches = {patch for commit in commits for patch, _ in commit.added}
        wanted = [
            {ours.patch(patch).requests_blob for patch in patches},
            {ours.patch(patch).tensors for patch in patches},
            {c.tensors for c in commits} | {c.keyframe.tensors for c in commits if c.keyframe},
        ]
        found = [set(Index(path.read_bytes()).ids()) for path in files_in(pushed / "remote", object_store.INDEX)]
        for group in wanted:
            assert group in found


def test_an_old_remote_goes_on_with_packs_beside_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, address = make_history(tmp_path / "ours"), str(tmp_path / "remote")
    monkeypatch.setattr(parcels, "PACK_FROM", 1 << 30)  # as it was before there were packs
    push(ours, open_remote(address))
    monkeypatch.undo()
    assert not (tmp_path / "remote" / "packs").exists()
    early = make_store(tmp_path / "early")
    fetch(early, open_remote(address))
    for number in range(COMMITS):
        add_batch(ours, range(100 + number, 101 + number))
    push(ours, open_remote(address), "main")
    assert files_in(tmp_path / "remote" / "packs")
    for theirs in (early, make_store(tmp_path / "late")):
        fetch(theirs, open_remote(address))
        tip = ours.refs()["refs/heads/main"]
        assert content(theirs, tip) == content(ours, tip)
        assert check(theirs).sound


def test_damage_in_a_pack_costs_what_needs_it_and_is_named(remote: Path, pushed: Path, tmp_path: Path) -> None:
    with Store.open(pushed / "ours") as ours:
        main = ours.refs()["refs/heads/main"]
        below = [identity for identity, _ in ours.log(main)][3]
        columns = ours.patch(next(iter(ours.commit(main).added))[0]).tensors
        move(ours, {"refs/heads/earlier": (ours.refs().get("refs/heads/earlier"), below)})
        push(ours, open_remote(str(remote)), "earlier")
    pack, start = next(
        (path.with_suffix(object_store.PACK), found[0])
        for path in files_in(remote, object_store.INDEX)
        if (found := Index(path.read_bytes()).find(columns))
    )
    with pack.open("r+b") as file:
        file.seek(start + 9)
        file.write(b"\x00\x01")
    with make_store(tmp_path / "theirs") as theirs:
        with pytest.raises(RemoteError, match=columns[:12]):
            fetch(theirs, open_remote(str(remote)))
        assert not any("remotes" in ref for ref in theirs.refs())
        manifest = (remote / "patchhub.json").read_bytes()
        (remote / "patchhub.json").write_bytes(manifest.replace(main.encode(), below.encode()))
        fetch(theirs, open_remote(str(remote)))  # what does not need it is read from the same pack
        assert theirs.refs()["refs/remotes/origin/main"] == below
        assert check(theirs).sound


def _enormous(index: Path) -> None:
    with index.open("r+b") as file:
        file.truncate(object_store.MOST_INDEX + 1)


LIES: dict[str, Callable[[Path], None]] = {
    "an index is damaged": lambda index: index.write_bytes(index.read_bytes()[:-1] + b"\xff"),
    "an index is cut": lambda index: index.write_bytes(index.read_bytes()[:50]),
    "a pack is cut": lambda index: index.with_suffix(object_store.PACK).write_bytes(b"12"),
    "a pack is gone": lambda index: index.with_suffix(object_store.PACK).unlink(),
    "an index is gone": lambda index: index.unlink(),
    "an index is enormous": _enormous,
}


@pytest.mark.parametrize("lie", LIES)
def test_a_pack_that_is_not_what_it_says_is_left_out_and_named(remote: Path, tmp_path: Path, lie: str) -> None:
    indexes = files_in(remote, object_store.INDEX)
    for index in indexes:
        index.chmod(0o644)
        index.with_suffix(object_store.PACK).chmod(0o644)
        LIES[lie](index)
    with make_store(tmp_path / "theirs") as theirs:
        with pytest.raises(RemoteError, match="is missing") as caught:
            fetch(theirs, open_remote(str(remote)))
        named = [index.stem[:12] in caught.value.message for index in indexes]
        assert any(named) == (lie != "an index is gone")
        assert check(theirs).sound


def test_indexes_are_read_up_to_a_bound(remote: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [path.stat().st_size for path in files_in(remote, object_store.INDEX)]
    monkeypatch.setattr(object_store, "MOST_INDEX", sum(sizes[:2]))
    opened = open_remote(str(remote))
    tip = opened.view().tips["refs/heads/main"]
    assert 0 < len(opened.sizes(tip)) == sum((size - 16) // 40 for size in sizes[:2])
    assert len(opened.damaged) == len(sizes) - 2


def test_an_index_that_lies_about_sizes_is_refused_by_hash(remote: Path, tmp_path: Path) -> None:
    for path in files_in(remote, object_store.INDEX):
        index, pack = Index(path.read_bytes()), path.with_suffix(object_store.PACK)
        sizes = {identity: (index.find(identity) or (0, 0))[1] for identity in index.ids()}
        first, second, *_ = sizes
        forged = Index.of({**sizes, first: sizes[first] + 1, second: sizes[second] - 1})
        pack.rename(remote / object_store.pack_path(forged.name, object_store.PACK))
        path.unlink()
        (remote / object_store.pack_path(forged.name, object_store.INDEX)).write_bytes(forged.data)
    with make_store(tmp_path / "theirs") as theirs:
        with pytest.raises(RemoteError, match="hash"):
            fetch(theirs, open_remote(str(remote)))
        assert check(theirs).sound


def test_what_nothing_needs_of_a_pack_counts_as_downloaded(tmp_path: Path, packing: None) -> None:
    """A pack that must be copied may hold more than is needed of it; no more is taken than was allowed."""
    ours, address = make_history(tmp_path / "ours"), f"file://{tmp_path}/remote"
    needed = sum(ours.objects.size(identity) for identity in closure_of(ours, "refs/heads/main"))
    ours.objects.put(ballast := b"x" * 10 * needed)
    push(ours, open_remote(address), "main")
    for path in files_in(tmp_path / "remote", object_store.INDEX):
        index, pack = Index(path.read_bytes()), path.with_suffix(object_store.PACK)
        parts = {i: pack.read_bytes()[s : s + n] for i in index.ids() for s, n in [index.find(i) or (0, 0)]}
        parts[object_id(ballast)] = ballast
        fat = Index.of({identity: len(part) for identity, part in parts.items()})
        (remote := tmp_path / "remote" / "packs" / fat.name).with_suffix(object_store.PACK).write_bytes(
            b"".join(p for _, p in sorted(parts.items()))
        )
        remote.with_suffix(object_store.INDEX).write_bytes(fat.data)
        path.unlink()
        pack.unlink()
    with make_store(tmp_path / "theirs") as theirs, pytest.raises(RemoteError, match="holds more than"):
        fetch(theirs, open_remote(address), total=5 * needed)


def test_what_is_damaged_here_is_not_pushed_in_a_pack(packing: None, tmp_path: Path) -> None:
    with make_history(tmp_path / "ours") as ours:
        tensors = ours.state(ours.refs()["refs/heads/main"])[0]
        spoil(ours, tensors)
        with pytest.raises(CorruptStoreError, match=tensors[:12]):
            push(ours, open_remote(str(tmp_path / "remote")), "main")
        assert not (tmp_path / "remote" / "patchhub.json").exists()


def test_many_small_pushes_are_gathered_into_packs(
    connect: Callable[[], Remote], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However a history came there, a commit at a time, few files are left; who reads meanwhile, and who fetches later, gets all."""
    monkeypatch.setattr(parcels, "GATHER_FROM", 40)
    monkeypatch.setattr(parcels, "PACK_FROM", 6)
    ours = make_history(tmp_path / "ours")
    push(ours, connect(), "side")
    reader = connect()
    before = set(reader.sizes(reader.view().tips["refs/heads/side"]))
    counts = []
    for number in range(16):
        add_batch(ours, range(100 + number, 101 + number))
        push(ours, connect(), "main")
        remote = connect()
        counts.append(len(remote.alone(remote.view().tips["refs/heads/main"])))
    assert max(counts) < 40 + 10
    assert counts[-1] < 40 < 5 * 16
    tip = connect().view().tips["refs/heads/main"]
    assert set(closure_of(ours, "refs/heads/main")) <= set(connect().sizes(tip))
    assert before <= set(reader.sizes(reader.view().tips["refs/heads/side"]))
    with make_store(tmp_path / "theirs") as theirs:
        fetch(theirs, connect())
        assert content(theirs, tip.commit) == content(ours, tip.commit)
        assert check(theirs).sound


def test_who_reads_while_files_are_gathered_finds_them_in_packs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, address = make_history(tmp_path / "ours"), str(tmp_path / "remote")
    push(ours, open_remote(address), "main")
    reader = open_remote(address)
    tip = reader.view().tips["refs/heads/main"]
    ids = set(reader.sizes(tip))
    monkeypatch.setattr(parcels, "GATHER_FROM", 1)
    monkeypatch.setattr(parcels, "PACK_FROM", 1)
    add_batch(ours, range(50, 51))
    push(ours, open_remote(address), "main")
    (tmp_path / "into").mkdir()
    assert {identity: object_id(place.read()) for identity, place in reader.read(tip, ids, tmp_path / "into")} == {
        identity: identity for identity in ids
    }
