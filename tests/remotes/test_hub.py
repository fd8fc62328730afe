"""The Hub as the unmodified client meets it: faults of every kind, missing rights, and what a repository looks like."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from patchhub.errors import PatchhubError, RemoteError
from patchhub.objects import Note
from patchhub.remotes.hub import STAGING, HubRemote
from patchhub.remotes.remote import RemoteMovedError
from patchhub.store.fsck import check
from patchhub.store.store import Store
from tests.remotes.stores import AUTHOR, TIME, add_batch, make_history, make_store
from tests.remotes.test_conformance import fetch, push

Connect = Callable[..., HubRemote]
COMMIT = r"POST .*/commit/"


def commits_of(hub: Any, branch: str = "main") -> list[str]:
    """Descriptions of a branch's commits on the Hub, the first one first."""
    repository = json.loads((hub.root / "repos" / "models" / "tester" / "facts.json").read_text())
    found, cursor = [], repository["branches"][branch]
    while cursor:
        found.append(repository["commits"][cursor]["message"])
        cursor = next(iter(repository["commits"][cursor]["parents"]), None)
    return found[::-1]


def tree_of(hub: Any, ref: str = "main") -> dict[str, Any]:
    repository = json.loads((hub.root / "repos" / "models" / "tester" / "facts.json").read_text())
    sha = {**repository["branches"], **repository["tags"]}[ref]
    found: dict[str, Any] = repository["commits"][sha]["tree"]
    return found


def test_one_commit_of_the_hub_per_branch(hub: Any, hub_remote: Connect, tmp_path: Path) -> None:
    ours = make_history(tmp_path / "ours")
    push(ours, hub_remote())
    assert len(commits_of(hub)) == 2  # the Hub's own first one, and ours
    add_batch(ours, range(60, 62))
    push(ours, hub_remote(), "main")
    assert len(commits_of(hub)) == 3
    posts = [entry for entry in hub.log if "/commit/" in entry["line"] and entry["line"].startswith("POST")]
    assert len(posts) == 4  # main, side, the tag (no branch's head is its commit), main again
    manifest = json.loads((hub.root / "blobs" / tree_of(hub)["patchhub.json"]["oid"]).read_text())
    assert manifest["commit"] == ours.refs()["refs/heads/main"]
    assert manifest["base"] == ours.config.base_id
    assert not [
        name for name in hub_remote()._api.list_repo_refs("tester/facts").branches if name.name.startswith(STAGING)
    ]


def test_no_byte_of_a_known_object_travels_again(hub: Any, hub_remote: Connect, tmp_path: Path) -> None:
    ours = make_history(tmp_path / "ours")
    push(ours, hub_remote())
    known = set(ours.objects.ids())
    add_batch(ours, range(60, 160))
    new = sum(ours.objects.path(name).stat().st_size for name in set(ours.objects.ids()) - known)
    hub.log.clear()
    push(ours, hub_remote(), "main")
    received = sum(entry["in"] for entry in hub.log)
    assert new < received < 1.5 * new + 8000  # base64 of small files, and one line of JSON per object


FAULTS: dict[str, dict[str, Any]] = {
    "500 before landing": {"kind": "status", "match": COMMIT, "status": 500},
    "503 for preupload": {"kind": "status", "match": "/preupload/", "status": 503},
    "connection lost during the upload": {"kind": "drop_upload", "after": 100},
    "connection lost during the commit": {"kind": "drop_upload", "match": COMMIT, "after": 100},
    "no right to write": {"kind": "status", "match": COMMIT, "status": 403},
    "storage full": {"kind": "status", "match": COMMIT, "status": 402},
    "refs cannot be read": {"kind": "status", "match": "/refs", "status": 502},
    "429": {"kind": "status", "match": COMMIT, "status": 429, "headers": {"Retry-After": "7"}},
    "answer lost": {"kind": "drop_response", "match": COMMIT},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_a_push_ends_in_success_or_a_clear_error(
    fault: str, hub: Any, hub_remote: Connect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    do_not_wait(monkeypatch)
    ours = make_history(tmp_path / "ours")
    push(ours, hub_remote(), "main")
    head = add_batch(ours, range(60, 62))
    hub.faults.append(dict(FAULTS[fault]))
    failure = failure_of(lambda: push(ours, hub_remote(), "main"))
    if failure is not None:
        assert failure.remedy
        assert "\n" not in failure.message
        assert len(commits_of(hub)) == 2
        push(ours, hub_remote(), "main")  # the same command again heals it
    assert len(commits_of(hub)) == 3, "never a second commit"
    assert hub_remote().view().tips["refs/heads/main"].commit == head
    assert ours.refs()["refs/remotes/origin/main"] == head
    theirs = make_store(tmp_path / "theirs")
    fetch(theirs, hub_remote())
    assert check(theirs).sound
    assert check(ours).sound


def test_a_lost_answer_is_resolved_by_reading(hub: Any, hub_remote: Connect, tmp_path: Path) -> None:
    """The commit landed: the push succeeds, and only one commit was ever sent."""
    ours = make_history(tmp_path / "ours")
    push(ours, hub_remote(), "main")
    add_batch(ours, range(60, 62))
    hub.faults.append({"kind": "drop_response", "match": COMMIT})
    hub.log.clear()
    assert len(push(ours, hub_remote(), "main")) == 1
    assert len([entry for entry in hub.log if "/commit/" in entry["line"]]) == 1


def test_retry_after_is_honoured(hub: Any, hub_remote: Connect, waits: list[float], tmp_path: Path) -> None:
    ours = make_history(tmp_path / "ours")
    hub.faults.append({"kind": "status", "match": COMMIT, "status": 429, "headers": {"Retry-After": "7"}, "times": 2})
    push(ours, hub_remote(), "main")
    assert waits == [7.0, 7.0]


def test_a_conflict_is_said_and_nothing_is_overwritten(hub: Any, hub_remote: Connect, tmp_path: Path) -> None:
    ours = make_history(tmp_path / "ours")
    push(ours, hub_remote(), "main")
    add_batch(ours, range(60, 62))
    hub.faults.append({"kind": "status", "match": COMMIT, "status": 412})
    with pytest.raises(RemoteMovedError, match="moved by someone else") as refused:
        push(ours, hub_remote(), "main")
    assert "pull" in str(refused.value.remedy)


def test_rights(hub: Any, hub_remote: Connect, tmp_path: Path) -> None:
    ours = make_history(tmp_path / "ours")
    with pytest.raises(RemoteError, match="permissions") as refused:
        push(ours, hub_remote("hf_read"), "main")
    assert "token" in str(refused.value.remedy)
    push(ours, hub_remote(), "main")
    add_batch(ours, range(60, 62))
    with pytest.raises(RemoteError, match="permissions"):
        push(ours, hub_remote("hf_read"), "main")
    with pytest.raises(RemoteError, match="401"):
        hub_remote("hf_unknown").view()
    assert hub_remote("hf_read").view().source is not None
    assert HubRemote("tester/facts", endpoint=hub.url, token=None).view().source is None  # private from the start


@pytest.mark.parametrize("times", [1, -1])
@pytest.mark.parametrize("match", ["patchhub.json", "GET .*/objects/", "GET /_cdn/"])
def test_corruption_on_the_way_is_found(match: str, times: int, hub: Any, hub_remote: Connect, tmp_path: Path) -> None:
    ours, theirs = make_history(tmp_path / "ours"), make_store(tmp_path / "theirs")
    push(ours, hub_remote())
    hub.faults.append({"kind": "corrupt", "match": match, "offset": 30, "times": times})
    refs = theirs.refs()
    if times == 1:
        fetch(theirs, hub_remote())
        assert len(theirs.refs()) > len(refs)
    else:
        with pytest.raises(RemoteError, match=r"hash|damaged"):
            fetch(theirs, hub_remote())
        assert theirs.refs() == refs
    assert check(theirs).sound


def test_a_download_that_breaks_off_is_no_harm(
    hub: Any, hub_remote: Connect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    do_not_wait(monkeypatch)
    ours, theirs = make_history(tmp_path / "ours"), make_store(tmp_path / "theirs")
    push(ours, hub_remote())
    hub.faults.append({"kind": "drop_download", "after": 40, "times": 2})
    fetch(theirs, hub_remote())
    assert check(theirs).sound


def test_a_new_tag_whose_answer_is_lost(hub: Any, hub_remote: Connect, tmp_path: Path) -> None:
    ours = make_history(tmp_path / "ours")
    push(ours, hub_remote(), "main")
    hub.faults.append({"kind": "drop_response", "match": "POST .*/tag/"})
    push(ours, hub_remote(), "v1")
    assert hub_remote().view().tips["refs/tags/v1"].commit == ours.refs()["refs/tags/v1"]


def test_a_new_branch_appears_complete_or_not_at_all(hub: Any, hub_remote: Connect, tmp_path: Path) -> None:
    ours = make_history(tmp_path / "ours")
    push(ours, hub_remote(), "main")
    hub.faults.append({"kind": "status", "match": COMMIT, "status": 500})
    with pytest.raises(RemoteError, match="did not land"):
        push(ours, hub_remote(), "side")
    assert set(hub_remote().view().tips) == {"refs/heads/main"}
    push(ours, hub_remote(), "side")
    assert hub_remote().view().tips["refs/heads/side"].commit == ours.refs()["refs/heads/side"]


def test_foreign_branches_are_left_out(hub: Any, hub_remote: Connect, tmp_path: Path) -> None:
    ours, theirs = make_history(tmp_path / "ours"), make_store(tmp_path / "theirs")
    push(ours, hub_remote(), "main")
    api = hub_remote()._api
    api.create_branch("tester/facts", branch="strange")
    api.upload_file(path_or_fileobj=b"{}", path_in_repo="patchhub.json", repo_id="tester/facts", revision="strange")
    api.create_branch("tester/facts", branch="notours", revision=api.list_repo_commits("tester/facts")[-1].commit_id)
    fetched = fetch(theirs, hub_remote())
    assert [warning for warning in fetched.warnings if "strange" in warning]
    assert "refs/remotes/origin/main" in theirs.refs()
    assert "refs/remotes/origin/strange" not in theirs.refs()


def test_the_page_of_a_new_commit_replaces_the_old_one(hub: Any, hub_remote: Connect, tmp_path: Path) -> None:
    ours = make_history(tmp_path / "ours")
    push(ours, hub_remote(), "main")
    text = (hub.root / "blobs" / tree_of(hub)["README.md"]["oid"]).read_text()
    assert text == f"# {ours.refs()['refs/heads/main']}\n"


def test_a_note_alone_can_be_pushed(hub: Any, hub_remote: Connect, tmp_path: Path) -> None:
    ours, theirs = make_history(tmp_path / "ours"), make_store(tmp_path / "theirs")
    push(ours, hub_remote())
    head = ours.refs()["refs/heads/main"]
    note = Note(commit=head, made_by="patchhub", scores={"S": 0.7}, settings={}, suite="zsre")
    identity = ours.add_note(note, command="evaluate", arguments={}, author=AUTHOR, time=TIME)
    assert push(ours, hub_remote(), "main")[0].objects == 1
    fetch(theirs, hub_remote())
    assert theirs.refs()[f"refs/notes/{head}/zsre"] == identity


def failure_of(verb: Callable[[], object]) -> RemoteError | None:
    try:
        verb()
    except RemoteError as error:
        return error
    return None


def do_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client's own pauses between its attempts; its module's name ``time`` is replaced, not the clock's function."""
    from types import SimpleNamespace

    from huggingface_hub.utils import _http

    monkeypatch.setattr(_http, "time", SimpleNamespace(**{**vars(_http.time), "sleep": lambda seconds: None}))


def test_every_error_is_one_of_ours(hub: Any, hub_remote: Connect, tmp_path: Path) -> None:
    hub.stop()
    ours: Store = make_history(tmp_path / "ours")
    with pytest.raises(PatchhubError, match="cannot be reached"):
        push(ours, hub_remote(), "main")
    with pytest.raises(PatchhubError, match="cannot be reached"):
        fetch(ours, hub_remote())
