"""Signatures travel with their branch; a remote brings no broken one, and nothing that is required to be signed and is not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from patchhub.errors import RemoteError, RevisionError, SettingsError, SignatureError
from patchhub.repository import Repository
from patchhub.signing import ssh
from patchhub.signing.statements import kept
from tests.pins.history import AUTHOR, TIME, commit_facts, init
from tests.signing.conftest import public


@pytest.fixture
def shared(repo: Repository, tmp_path: Path) -> Repository:
    repo.remote_add("origin", str(tmp_path / "remote"))
    return repo


@pytest.fixture
def theirs(shared: Repository, tmp_path: Path) -> Repository:
    """Bob's empty repository of the same base and remote."""
    (tmp_path / "theirs").mkdir()
    init(tmp_path / "theirs")
    found = Repository(tmp_path / "theirs", progress=False)
    found.config("author", "Bob <bob@example.org>")
    found.remote_add("origin", str(tmp_path / "remote"))
    return found


def test_sign_push_fetch_verify(shared: Repository, theirs: Repository, keys: Path) -> None:
    shared.sign("base..HEAD")
    shared.tag("v1", sign=True)
    shared.push(all=True)
    assert theirs.pull(require_signed=keys / "allowed").merged is not None
    assert theirs.verify(allowed=keys / "allowed", all=True).unsigned == ()
    assert theirs.verify("v1", allowed=keys / "allowed").trusted
    theirs.approve(key=keys / "bob")
    theirs.push()
    shared.fetch()
    assert {entry.kind for entry in shared.verify().signatures} == {"commit", "tag", "approval"}


def test_clone_takes_what_is_signed_alone(shared: Repository, keys: Path, tmp_path: Path, monkeypatch: Any) -> None:
    def started(folder: Path, *_: Any, **__: Any) -> None:
        folder.mkdir()
        init(folder)

    monkeypatch.setattr("patchhub.porcelain.model.init", started)
    shared.push()
    with pytest.warns(UserWarning, match="left out"), pytest.raises(SignatureError, match="origin/main is refused"):
        Repository.clone(
            str(tmp_path / "remote"), tmp_path / "no", base="x", require_signed=keys / "allowed", progress=False
        )
    assert not (tmp_path / "no").exists()
    with pytest.raises(SettingsError, match="allowed signers"):
        Repository.clone(
            str(tmp_path / "remote"), tmp_path / "no", base="x", require_signed=keys / "none", progress=False
        )
    shared.sign()
    shared.push()
    made = Repository.clone(
        str(tmp_path / "remote"), tmp_path / "yes", base="x", require_signed=keys / "allowed", progress=False
    )
    assert made.verify(allowed=keys / "allowed").trusted


def test_what_is_not_signed_by_an_allowed_key_is_left_out(shared: Repository, theirs: Repository, keys: Path) -> None:
    shared.tag("v1")
    shared.push(all=True)
    with pytest.warns(UserWarning, match="left out"), pytest.raises(SignatureError, match="origin/main is refused"):
        theirs.pull(require_signed=keys / "allowed")
    assert theirs.store.refs() == {"HEAD": "ref: refs/heads/main"}
    shared.sign(key=keys / "eve")
    shared.push()
    with pytest.warns(UserWarning, match="left out"):
        assert theirs.fetch(require_signed=keys / "allowed").left_out.keys() == {
            "refs/remotes/origin/main",
            "refs/tags/v1",
        }
    shared.sign()
    shared.push()
    with pytest.warns(UserWarning, match="signed the tag"):
        fetched = theirs.fetch(require_signed=keys / "allowed")
    assert fetched.left_out.keys() == {"refs/tags/v1"}
    assert "refs/remotes/origin/main" in theirs.store.refs()


def test_what_came_unsigned_before_is_not_merged_later(shared: Repository, theirs: Repository, keys: Path) -> None:
    shared.push()
    theirs.fetch()
    with pytest.warns(UserWarning, match="left out"), pytest.raises(SignatureError, match="origin/main is refused"):
        theirs.pull(require_signed=keys / "allowed")
    assert "refs/heads/main" not in theirs.store.refs()


def test_a_remote_with_many_signatures_does_not_start_as_many_programs(
    shared: Repository, theirs: Repository, keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that a branch comes in by are checked; of the others it is said that they were not."""
    monkeypatch.setattr("patchhub.porcelain.trust.signing.MOST_AT_ONCE", 1)
    asked: list[str] = []
    checked = ssh.verify
    monkeypatch.setattr(ssh, "verify", lambda *given: (asked.append(given[2]), checked(*given))[1])
    shared.sign("base..HEAD", key=keys / "eve")
    shared.sign()
    shared.push()
    with pytest.warns(UserWarning, match="2 signatures were not checked: 1 others were checked"):
        fetched = theirs.fetch(require_signed=keys / "allowed")
    assert fetched.left_out == {}
    assert asked == [public(keys / "ada")]
    assert {s.status for s in theirs.verify("origin/main", allowed=keys / "allowed", all=True).signatures} == {
        "good",
        "unknown",
    }


FORGED: Mapping[str, Mapping[str, Any]] = {
    "another time": {"time": "2026-11-21T09:30:01Z"},
    "another name": {"by": "Eve"},
}


@pytest.mark.parametrize("how", FORGED)
def test_a_broken_signature_is_refused_by_name(how: str, shared: Repository, theirs: Repository) -> None:
    shared.sign()
    store = shared.store
    ref = next(ref for ref in store.refs() if "/signature/" in ref)
    note = store.note(store.refs()[ref])
    statement = {**note.settings["statement"], **FORGED[how]}
    forged = replace(note, made_by=statement["by"], settings={**note.settings, "statement": statement})
    store.move_refs(kept(store, forged), command="eval", arguments={}, author=AUTHOR, time=TIME)
    shared.push()
    with pytest.raises(SignatureError, match=f"BROKEN signature {forged.id[:12]} at {ref}") as caught:
        theirs.fetch()
    assert caught.value.facts["commit"] == note.commit
    assert theirs.store.refs() == {"HEAD": "ref: refs/heads/main"}


def test_a_signature_of_another_commit_is_refused(shared: Repository, theirs: Repository, tmp_path: Path) -> None:
    """A remote that names a true signature as one of another commit."""
    shared.sign("HEAD~1")
    shared.push()
    manifest = tmp_path / "remote" / "patchhub.json"
    document = json.loads(manifest.read_bytes())
    ((key, note),) = document["notes"].items()
    document["notes"] = {key.replace(str(shared["HEAD~1"].id), str(shared["HEAD"].id)): note}
    manifest.write_bytes(json.dumps(document, sort_keys=True, separators=(",", ":")).encode())
    with pytest.raises(RemoteError, match="is not about"):
        theirs.fetch()
    assert theirs.store.refs() == {"HEAD": "ref: refs/heads/main"}


# --- approvals ------------------------------------------------------------------------------------------------------


def test_a_policy_refuses_what_too_few_approved(shared: Repository, theirs: Repository, keys: Path) -> None:
    shared.push()
    shared.config("policy.main.approvals", 1)
    shared.push()  # nothing new
    folder = shared.store.root.parent
    commit_facts(folder, "one more", {"Finn": "Irish"})
    commit_facts(folder, "and one", {"Cleo": "Dutch"})
    first, last = str(shared["HEAD~1"].id), str(shared["HEAD"].id)
    with pytest.raises(SignatureError, match=f"{first[:12]} is signed by no allowed key.*{last[:12]} is signed by no"):
        shared.push()
    shared.sign("HEAD~2..HEAD")
    with pytest.raises(SignatureError, match="wants 1 approval of each commit") as caught:
        shared.push()
    assert caught.value.facts["lacking"] == {first: "lacks 1", last: "lacks 1"}
    shared.branch("review")
    shared.push(None, "review")
    theirs.fetch()
    theirs.approve("origin/review", key=keys / "bob")
    theirs.switch("review")
    theirs.push(None, "review")
    shared.fetch()
    with pytest.raises(SignatureError) as caught:
        shared.push()
    assert caught.value.facts["lacking"] == {first: "lacks 1"}
    shared.approve("HEAD~1", key=keys / "eve")  # not allowed
    with pytest.raises(SignatureError):
        shared.push()
    shared.approve("HEAD~1", key=keys / "bob")
    assert [done.moved.new for done in shared.push()] == [last]


def test_nobody_approves_what_they_made(shared: Repository, keys: Path, tmp_path: Path) -> None:
    """Neither with the key that signed it, nor with another key of the same person, nor as its author."""
    shared.config("policy.main.approvals", 1)
    lines = (keys / "allowed").read_text(encoding="utf-8")
    eve = (keys / "eve.pub").read_text(encoding="utf-8")
    (tmp_path / "allowed").write_text(f"{lines}ada@example.org {eve}", encoding="utf-8")
    shared.config("sign.allowed", str(tmp_path / "allowed"))
    shared.sign("base..HEAD")
    shared.approve("base..HEAD", key=keys / "eve")
    with pytest.raises(SignatureError):
        shared.push()
    shared.sign("base..HEAD", key=keys / "bob")  # signed by both now
    shared.approve("base..HEAD", key=keys / "eve")
    with pytest.raises(SignatureError):
        shared.push()


def test_a_policy_has_a_branch_a_number_and_allowed_signers(shared: Repository) -> None:
    for key, value in (
        ("policy.main.approvals", "none"),
        ("policy.main.approvals", 0),
        ("policy.a b.approvals", 1),
        ("policy.main", 1),
    ):
        with pytest.raises((SettingsError, RevisionError)):
            shared.config(key, value)
    shared.config("policy.a/b.c.approvals", 2)
    assert shared.config("policy.a/b.c.approvals") == 2
    shared.config("policy.main.approvals", 2)
    shared.config("sign.allowed", unset=True)
    with pytest.raises(SettingsError, match="needs allowed signers"):
        shared.push()
    shared.config("policy.main.approvals", unset=True)
    shared.push()
