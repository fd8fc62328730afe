"""What every remote must do, whatever is behind it."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from patchhub.errors import RemoteError
from patchhub.objects import Base, Request, TensorRecord
from patchhub.porcelain.change import revert
from patchhub.porcelain.merge import merge
from patchhub.progress import Silent
from patchhub.remotes import receive, sync
from patchhub.remotes.receive import Fetched, Intake, Limits
from patchhub.remotes.remote import LOCK, LOCK_SECONDS, FileRemote, FsspecFiles, Remote, RemoteMovedError, Source
from patchhub.remotes.sync import Pushed, open_remote
from patchhub.sets.columns import tensor_check
from patchhub.sets.elements import active_requests
from patchhub.store.fsck import check
from patchhub.store.store import Store
from patchhub.who import Who
from tests.remotes.stores import (
    AUTHOR,
    SHAPES,
    STAMP,
    TIME,
    add_batch,
    add_patch,
    closure_of,
    content,
    make_history,
    make_request,
    make_store,
    move,
    published,
    switch,
)

Connect = Callable[[], Remote]


def push(repository: Store, remote: Remote, *names: str, **options: bool | None) -> list[Pushed]:
    refs = sync.refs_to_push(repository, names, everything=not names, tags=False)
    source = Source(repository.config.base_id, "gpt2", "a" * 40)
    return sync.push(
        repository,
        remote,
        "origin",
        refs,
        sync.Shown(source, lambda commit, withheld: {"README.md": f"# {commit}\n".encode()}),
        who=Who(AUTHOR, TIME),
        manner=sync.Manner(**options),  # type: ignore[arg-type]
    )


def fetch(
    repository: Store, remote: Remote, *, total: int = 1 << 30, repair: bool = False, prune: bool = False
) -> Fetched:
    intake = Intake(Limits(total, SHAPES, SHAPES), tensor_check(SHAPES, SHAPES), repair)
    return receive.fetch(repository, remote, "origin", intake, who=Who(AUTHOR, TIME), prune=prune)


def test_a_round_trip_gives_the_same_ids_and_states(connect: Connect, tmp_path: Path) -> None:
    ours, theirs = make_history(tmp_path / "ours"), make_store(tmp_path / "theirs")
    pushed = push(ours, connect())
    assert {done.moved.ref for done in pushed} == set(published(ours))
    fetch(theirs, connect())
    arrived = {ref.replace("remotes/origin", "heads"): commit for ref, commit in theirs.refs().items()}
    for ref, commit in published(ours).items():
        assert arrived[ref] == commit
        assert content(theirs, commit) == content(ours, commit)
        assert all(theirs.objects.get(blob) == ours.objects.get(blob) for blob in ours.state(commit))
    notes = {ref: note for ref, note in ours.refs().items() if "notes" in ref}
    assert notes
    assert notes.items() <= theirs.refs().items()
    assert check(theirs).sound
    assert theirs.search("Person 7") == ours.search("Person 7") != []


def test_a_second_push_and_fetch_move_nothing(connect: Connect, tmp_path: Path) -> None:
    ours, theirs = make_history(tmp_path / "ours"), make_store(tmp_path / "theirs")
    push(ours, connect())
    before = connect().view()
    assert push(ours, connect()) == []
    assert connect().view() == before
    fetch(theirs, connect())
    again = fetch(theirs, connect())
    assert (again.moved, again.received.objects) == ((), 0)


def test_only_what_is_missing_travels(connect: Connect, tmp_path: Path) -> None:
    ours, theirs = make_history(tmp_path / "ours"), make_store(tmp_path / "theirs")
    push(ours, connect())
    fetch(theirs, connect())
    known = set(ours.objects.ids())
    add_batch(ours, range(10, 14))
    new = set(ours.objects.ids()) - known
    (planned,) = push(ours, connect(), "main", dry_run=True)
    assert connect().view().tips["refs/heads/main"].commit == planned.moved.old
    (pushed,) = push(ours, connect(), "main")
    assert planned == pushed
    assert pushed.objects == len(new)
    assert pushed.size == sum(ours.objects.path(name).stat().st_size for name in new)
    assert fetch(theirs, connect()).received.objects == len(new)


def test_a_new_branch_sends_only_its_own(connect: Connect, tmp_path: Path) -> None:
    ours = make_history(tmp_path / "ours")
    push(ours, connect(), "main")
    (done,) = push(ours, connect(), "side")
    side, main = (set(closure_of(ours, f"refs/heads/{name}")) for name in ("side", "main"))
    assert done.objects == len(side - main)
    assert set(connect().view().tips) == {"refs/heads/main", "refs/heads/side"}
    assert push(ours, connect(), "v1")[0].moved.new == ours.refs()["refs/tags/v1"]
    assert fetch(make_store(tmp_path / "theirs"), connect()).warnings == ()


def test_the_first_branch_may_be_any(connect: Connect, tmp_path: Path) -> None:
    ours = make_history(tmp_path / "ours")
    push(ours, connect(), "side")
    assert set(connect().view().tips) == {"refs/heads/side"}
    push(ours, connect(), "v1")
    push(ours, connect(), "main")
    theirs = make_store(tmp_path / "theirs")
    fetch(theirs, connect())
    assert theirs.refs()["refs/remotes/origin/main"] == ours.refs()["refs/heads/main"]


def test_what_is_not_fast_forward_is_refused(connect: Connect, tmp_path: Path) -> None:
    ours, theirs = make_history(tmp_path / "ours"), make_store(tmp_path / "theirs")
    push(ours, connect())
    fetch(theirs, connect())
    move(theirs, {"refs/heads/main": (None, ours.refs()["refs/heads/main"])})
    add_batch(theirs, range(20, 22))
    push(theirs, connect(), "main")
    tips = connect().view().tips
    add_batch(ours, range(30, 33))
    with pytest.raises(RemoteMovedError, match="do not have") as refused:
        push(ours, connect(), "main")
    assert "pull" in str(refused.value.remedy)
    fetch(ours, connect())
    with pytest.raises(RemoteMovedError, match="not in yours"):
        push(ours, connect(), "main")
    assert connect().view().tips == tips
    merge(ours, "refs/remotes/origin/main", STAMP)
    push(ours, connect(), "main")
    fetch(theirs, connect())
    assert theirs.refs()["refs/remotes/origin/main"] == ours.refs()["refs/heads/main"]


def test_a_branch_that_moves_during_a_push_is_not_overwritten(connect: Connect, tmp_path: Path) -> None:
    ours, theirs = make_history(tmp_path / "ours"), make_store(tmp_path / "theirs")
    push(ours, connect())
    fetch(theirs, connect())
    move(theirs, {"refs/heads/main": (None, ours.refs()["refs/heads/main"])})
    winner = add_batch(theirs, range(20, 22))
    add_batch(ours, range(30, 33))
    slow = connect()
    view = slow.view()
    slow.view = lambda: view  # type: ignore[method-assign]
    push(theirs, connect(), "main")
    with pytest.raises(RemoteMovedError, match="moved by someone else"):
        push(ours, slow, "main")
    assert connect().view().tips["refs/heads/main"].commit == winner


def test_tags_do_not_move(connect: Connect, tmp_path: Path) -> None:
    ours, theirs = make_history(tmp_path / "ours"), make_store(tmp_path / "theirs")
    push(ours, connect())
    first, second = ours.refs()["refs/tags/v1"], ours.refs()["refs/heads/main"]
    move(ours, {"refs/tags/v1": (first, None)})
    move(ours, {"refs/tags/v1": (None, second)})
    with pytest.raises(RemoteError, match="tags do not move"):
        push(ours, connect(), "v1")
    add_batch(theirs, range(9))
    mine = theirs.refs()["refs/heads/main"]
    move(theirs, {"refs/tags/v1": (None, mine)})
    assert any("stays" in warning for warning in fetch(theirs, connect()).warnings)
    assert theirs.refs()["refs/tags/v1"] == mine


def test_texts_can_be_withheld_and_stay_withheld(connect: Connect, tmp_path: Path) -> None:
    ours, theirs = make_history(tmp_path / "ours"), make_store(tmp_path / "theirs")
    push(ours, connect(), "main", private_facts=True)
    add_batch(ours, range(40, 42))
    push(ours, connect(), "main")  # a later push that does not say so gives nothing away
    fetch(theirs, connect())
    head = theirs.refs()["refs/remotes/origin/main"]
    patches = [theirs.patch(patch) for patch in {patch for patch, _ in theirs.active(head)}]
    assert [theirs.requests(patch) for patch in patches] == [[]] * len(patches)
    assert content(theirs, head) == content(ours, head)
    assert check(theirs).sound
    push(ours, connect(), "main", private_facts=False)
    late = make_store(tmp_path / "late")
    fetch(late, connect())
    subjects: list[Request] = [request for patch in patches for request in late.requests(patch)]
    assert len(subjects) == 7


def test_a_fetch_needs_no_cache(connect: Connect, tmp_path: Path) -> None:
    push(make_history(tmp_path / "ours"), connect())
    theirs = make_store(tmp_path / "theirs")
    shutil.rmtree(theirs.cache.folder)
    fetch(theirs, connect())
    assert check(theirs).sound


def test_a_tag_that_shows_texts_is_no_success_of_withholding(connect: Connect, tmp_path: Path) -> None:
    ours = make_history(tmp_path / "ours")
    push(ours, connect())
    with pytest.raises(RemoteError, match="shows the texts"):
        push(ours, connect(), "v1", private_facts=True)
    assert push(ours, connect(), "v1") == []


def test_texts_that_were_pushed_before_are_taken_out(connect: Connect, tmp_path: Path) -> None:
    ours, theirs = make_history(tmp_path / "ours"), make_store(tmp_path / "theirs")
    push(ours, connect())
    branches = [ref for ref in published(ours) if ref.startswith("refs/heads/")]
    active = [ours.active(ours.refs()[ref]) for ref in branches]
    texts = {ours.patch(patch).requests_blob for patch, _ in frozenset().union(*active)}
    (planned, *_) = push(ours, connect(), "main", private_facts=True, dry_run=True)
    assert planned.withdrawn
    assert texts & set(connect().sizes(connect().view().tips["refs/heads/main"]))
    push(ours, connect(), "main", private_facts=True)
    push(ours, connect(), "side")
    view = connect().view()
    for ref in branches:
        assert not texts & set(connect().sizes(view.tips[ref])), ref
    assert push(ours, connect(), "main", "side") == []
    fetch(theirs, connect())
    heads = [theirs.refs()[f"refs/remotes/origin/{name}"] for name in ("main", "side")]
    assert [content(theirs, commit) for commit in heads] == [content(ours, ours.refs()[ref]) for ref in branches]
    assert check(theirs).sound
    for name in ("main", "side"):
        push(ours, connect(), name, private_facts=False)
        assert push(ours, connect(), name, private_facts=False) == []
    view = connect().view()
    assert texts <= {name for ref in branches for name in connect().sizes(view.tips[ref])}
    assert not view.private
    assert push(ours, connect(), "main", "side") == []


def test_branches_that_are_gone_are_forgotten_when_told_so(connect: Connect, tmp_path: Path) -> None:
    ours, theirs = make_history(tmp_path / "ours"), make_store(tmp_path / "theirs")
    push(ours, connect(), "main")
    fetch(theirs, connect())
    gone = theirs.refs()["refs/remotes/origin/main"]
    move(theirs, {"refs/remotes/origin/old": (None, gone), "refs/remotes/other/old": (None, gone)})
    assert fetch(theirs, connect()).moved == ()
    (moved,) = fetch(theirs, connect(), prune=True).moved
    assert (moved.ref, moved.old, moved.new) == ("refs/remotes/origin/old", gone, None)
    assert {"refs/remotes/origin/main", "refs/remotes/other/old"} <= theirs.refs().keys()
    assert fetch(theirs, connect(), prune=True).moved == ()


def test_another_base_is_refused(connect: Connect, tmp_path: Path) -> None:
    ours = make_history(tmp_path / "ours")
    push(ours, connect())
    other = Base(
        architecture={}, tensors={name: TensorRecord("F32", shape, "1" * 64) for name, shape in SHAPES.items()}
    )
    theirs = make_store(tmp_path / "theirs", base=other)
    add_batch(theirs, range(2))
    for verb in (lambda: fetch(theirs, connect()), lambda: push(theirs, connect(), "main")):
        with pytest.raises(RemoteError, match="another base"):
            verb()
    assert len(published(theirs)) == 1


def test_a_limit_is_kept(connect: Connect, tmp_path: Path) -> None:
    ours, theirs = make_history(tmp_path / "ours"), make_store(tmp_path / "theirs")
    push(ours, connect())
    refs = theirs.refs()
    everything = sum(ours.objects.path(name).stat().st_size for name in ours.objects.ids())
    for total in (2000, everything - 1500):  # the base is here: what is downloaded for one branch alone fits
        with pytest.raises(RemoteError, match=f"more than {total} bytes"):
            fetch(theirs, connect(), total=total)
        assert theirs.refs() == refs
        theirs.close()
        theirs = make_store(tmp_path / str(total))
    assert fetch(theirs, connect(), total=everything).received.downloaded <= everything


def test_an_empty_remote_brings_nothing(connect: Connect, tmp_path: Path) -> None:
    theirs = make_store(tmp_path / "theirs")
    assert connect().view().tips == {}
    assert fetch(theirs, connect()).moved == ()


def test_an_archive_can_be_fetched_from(tmp_path: Path) -> None:
    """A folder remote packed into a zip file, which is read but not written."""
    ours, theirs = make_history(tmp_path / "ours"), make_store(tmp_path / "theirs")
    push(ours, open_remote(str(tmp_path / "remote")))
    archive = shutil.make_archive(str(tmp_path / "remote"), "zip", tmp_path / "remote")
    packed = open_remote(f"zip://::{archive}")
    fetch(theirs, packed)
    assert theirs.refs()["refs/remotes/origin/main"] == ours.refs()["refs/heads/main"]
    assert check(theirs).sound
    add_batch(ours, range(20, 21))
    with pytest.raises(RemoteError, match="cannot be written"):
        push(ours, packed, "main")


def test_a_lock_that_stays_is_waited_for_and_then_named(tmp_path: Path) -> None:
    address, waits = f"file://{tmp_path}/remote", list[float]()
    remote = FileRemote(address, FsspecFiles(address, sleep=waits.append))
    ours = make_history(tmp_path / "ours")
    (tmp_path / "remote").mkdir()
    (tmp_path / "remote" / LOCK).touch()
    with pytest.raises(RemoteError, match="someone else is pushing") as refused:
        push(ours, remote, "main")
    assert LOCK in str(refused.value.remedy)
    assert LOCK_SECONDS * 0.9 < sum(waits) < LOCK_SECONDS
    (tmp_path / "remote" / LOCK).unlink()
    push(ours, remote, "main")


def test_an_address_that_nothing_can_open() -> None:
    for address in ("nosuch://bucket/facts", "s3://", "zip://::/nowhere.zip"):
        with pytest.raises(RemoteError) as refused:
            open_remote(address).view()
        assert refused.value.remedy


def spoil(repository: Store, identity: str) -> None:
    """Change one byte of an object, in a file or in a pack."""
    place = repository.objects.place(identity)
    place.path.chmod(0o644)
    with place.path.open("r+b") as file:
        file.seek(place.start)
        first = file.read(1)
        file.seek(place.start)
        file.write(bytes([first[0] ^ 1]))


def test_damage_here_is_repaired(connect: Connect, tmp_path: Path) -> None:
    ours, theirs = make_history(tmp_path / "ours"), make_store(tmp_path / "theirs")
    push(ours, connect())
    fetch(theirs, connect())
    for identity in (theirs.state(ours.refs()["refs/heads/main"])[0], ours.refs()["refs/tags/v1"]):
        spoil(theirs, identity)
    lost = sorted(theirs.objects.loose())[-1:]
    for identity in lost:
        theirs.objects.path(identity).unlink()
    theirs.close()
    theirs = Store.open(tmp_path / "theirs")
    assert not check(theirs).sound
    fetch(theirs, connect(), repair=True)
    assert check(theirs).sound


def test_branches_may_have_slashes(connect: Connect, tmp_path: Path) -> None:
    ours, theirs = make_history(tmp_path / "ours"), make_store(tmp_path / "theirs")
    move(ours, {"refs/heads/team/ada": (None, ours.refs()["refs/heads/side"])})
    switch(ours, "team/ada")
    add_batch(ours, range(50, 51))
    push(ours, connect())
    fetch(theirs, connect())
    assert theirs.refs()["refs/remotes/origin/team/ada"] == ours.refs()["refs/heads/team/ada"]


def test_a_listing_without_sizes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = FsspecFiles(f"file://{tmp_path}/remote")
    files.write("objects/ab/cd", (b"data",))
    assert files.sizes("objects") == {"objects/ab/cd": 4}
    monkeypatch.setattr(files._fs, "find", lambda path, detail: {path + "/ab/cd": {"size": None}})
    with pytest.raises(RemoteError, match="how large"):
        files.sizes("objects")


def test_a_folder_is_listed_once_for_each_view(tmp_path: Path) -> None:
    ours = make_history(tmp_path / "ours")
    files = FsspecFiles(f"file://{tmp_path}/remote")
    remote, listed, sizes = FileRemote("there", files), list[str](), files.sizes
    files.sizes = lambda folder: (listed.append(folder), sizes(folder))[1]  # type: ignore[method-assign]
    push(ours, remote, "main")
    listed.clear()
    for expected in (1, 2):
        tip = remote.view().tips["refs/heads/main"]
        assert remote.sizes(tip) == remote.sizes(tip) != {}
        assert Counter(listed) == {"objects": expected, "packs": expected}


def test_a_branch_is_removed_and_overwritten_only_where_it_was_seen(connect: Connect, tmp_path: Path) -> None:
    ours, theirs = make_history(tmp_path / "ours"), make_store(tmp_path / "theirs")
    push(ours, connect())
    before = connect().view().tips
    with pytest.raises(RemoteMovedError):
        sync.delete(theirs, connect(), "origin", ["main"], who=Who(AUTHOR, TIME))
    gone = next(ref for ref in sorted(before) if ref.startswith("refs/heads/") and ref != "refs/heads/main")
    sync.delete(ours, connect(), "origin", [gone], who=Who(AUTHOR, TIME))
    after = connect().view().tips
    assert after.keys() == before.keys() - {gone}
    with pytest.raises(RemoteMovedError):
        connect().remove("refs/heads/main", replace(before["refs/heads/main"], commit="0" * 64, token="0" * 40))
    old = ours.parents(before["refs/heads/main"].commit)[0]
    move(ours, {"refs/heads/main": (before["refs/heads/main"].commit, old)}, "reset")
    with pytest.raises(RemoteMovedError):
        push(ours, connect(), "main")
    push(ours, connect(), "main", lease=True)
    assert connect().view().tips["refs/heads/main"].commit == old
    fetch(theirs, connect())
    assert theirs.refs()["refs/remotes/origin/main"] == old
    assert check(theirs).sound


class Heard(Silent):
    """Keeps the bytes of each stage: those that were announced, and those that came."""

    def __init__(self) -> None:
        super().__init__()
        self.stages: dict[str, list[int]] = {}
        self._now = [0, 0]

    def stage_bytes(self, label: str, total: int) -> None:
        self._now = self.stages[label] = [total, 0]

    def advance(self, amount: int) -> None:
        self._now[1] += amount


def test_as_many_bytes_are_told_as_travel(connect: Connect, tmp_path: Path) -> None:
    ours, theirs = make_history(tmp_path / "ours"), make_store(tmp_path / "theirs")
    shown, heard = sync.Shown(Source(ours.config.base_id, None, None), lambda commit, withheld: {}), Heard()
    sent = sync.push(ours, connect(), "origin", ["refs/heads/main"], shown, who=Who(AUTHOR, TIME), progress=heard)
    assert heard.stages == {"pushing main": [sent[0].size, sent[0].size]}
    intake, heard = Intake(Limits(1 << 30, SHAPES, SHAPES), tensor_check(SHAPES, SHAPES)), Heard()
    found = receive.fetch(theirs, connect(), "origin", intake, who=Who(AUTHOR, TIME), progress=heard)
    ((announced, came),) = heard.stages.values()
    assert announced == came == found.received.downloaded


def test_metadata_travels_with_the_texts_and_is_withheld_with_them(connect: Connect, tmp_path: Path) -> None:
    """Through push, fetch, merge and revert; a reader whom the texts are withheld from has no metadata either."""
    noted = [replace(make_request(number), metadata={"source": f"page {number}"}) for number in range(50, 53)]
    ours, theirs, others = make_history(tmp_path / "ours"), make_store(tmp_path / "a"), make_store(tmp_path / "b")
    add_patch(ours, noted)
    merged = merge(ours, "side", STAMP)
    assert said(ours, "HEAD") == {f"page {number}" for number in range(50, 53)}
    push(ours, connect(), "main", private_facts=True)
    fetch(others, connect())
    assert said(others, "origin/main") == set()
    push(ours, connect(), "main", private_facts=False)
    fetch(theirs, connect())
    assert said(theirs, "origin/main") == said(ours, "HEAD")
    assert check(theirs).sound
    move(theirs, {"refs/heads/main": (theirs.refs().get("refs/heads/main"), merged.commit)}, "reset")
    revert(theirs, None, STAMP, requests=[noted[0].id])
    assert said(theirs, "HEAD") == {"page 51", "page 52"}
    revert(theirs, "HEAD", STAMP)
    assert said(theirs, "HEAD") == said(ours, "HEAD")


def said(repository: Store, revision: str) -> set[str]:
    """The sources of the facts that are active at a revision."""
    active = active_requests(repository, repository.active(repository.resolve(revision)))
    return {str(request.metadata["source"]) for request in active.values() if request.metadata}
