"""`verify`: whatever changes below a signed commit is found, and said where; what was not signed is not said to be."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from patchhub.cli.main import main
from patchhub.errors import RevisionError, SettingsError, SignatureError
from patchhub.porcelain.trust.signing import Verified
from patchhub.repository import Repository
from patchhub.signing.statements import kept
from tests.pins.history import AUTHOR, TIME


@pytest.fixture
def signed(repo: Repository, keys: Path) -> Repository:
    """Every commit signed, the first one approved, both tagged, one tag signed; and a score."""
    repo.sign("base..HEAD")
    repo.approve("HEAD~1", key=keys / "bob", message="right")
    repo.tag("v1", "HEAD~1", sign=True)
    repo.tag("plain")
    return repo


def verified(repository: Repository) -> Verified:
    """As a new process sees it: nothing remembered."""
    with Repository(repository.store.root, progress=False) as fresh:
        return fresh.verify()


def test_a_signed_commit_is_trusted_by_whoever_allows_its_key(signed: Repository, keys: Path) -> None:
    found = signed.verify(all=True)
    assert found.trusted
    assert (found.damage, found.unsigned) == ((), ())
    told = {(s.commit, s.kind, s.tag, s.principal, s.message) for s in found.signatures if s.status == "good"}
    first, last = signed["HEAD~1"].id, signed["HEAD"].id
    assert told == {
        (last, "commit", None, "ada@example.org", ""),
        (first, "commit", None, "ada@example.org", ""),
        (first, "approval", None, "bob@example.org", "right"),
        (first, "tag", "v1", "ada@example.org", ""),
    }
    (keys / "nobody").write_text("", encoding="utf-8")
    stranger = signed.verify(allowed=keys / "nobody")
    assert not stranger.trusted
    assert "not in your allowed signers" in stranger.words()
    with pytest.raises(SettingsError, match="allowed signers"):
        signed.verify(allowed=keys / "missing")
    with pytest.raises(RevisionError, match="unpatched model"):
        signed.verify("base")


def test_what_nobody_signed_is_not_trusted(repo: Repository, keys: Path) -> None:
    assert not repo.verify().trusted
    repo.approve(key=keys / "bob")
    repo.tag("v1", sign=True)
    assert not repo.verify().trusted
    assert repo.verify("v1").trusted
    repo.sign(key=keys / "eve")
    assert [entry.status for entry in repo.verify().signatures if entry.kind == "commit"] == ["unknown"]
    assert not repo.verify().trusted
    repo.sign()
    found = repo.verify(all=True)
    assert found.trusted
    assert found.unsigned == (repo["HEAD~1"].id,)


def test_a_change_of_any_object_below_is_found_with_its_place(signed: Repository) -> None:
    root = signed.store.root
    files = sorted(path for path in (root / "objects").glob("*/*") if path.is_file())
    reached = signed.verify(all=True).objects
    assert len(files) == reached
    for path in files:
        data, mode = path.read_bytes(), path.stat().st_mode
        path.chmod(0o600)
        for other in (bytes([data[0] ^ 1]) + data[1:], None):
            if other is None:
                path.unlink()
            else:
                path.write_bytes(other)
            found = verified(signed)
            name = path.parent.name + path.name
            withheld = other is None and data.startswith(b'[{"neighborhood"')
            assert found.trusted == withheld, name
            assert withheld or name in [damage.name for damage in found.damage]
            assert withheld or f"objects/{path.parent.name}/{path.name}" in " ".join(d.place for d in found.damage)
        path.write_bytes(data)
        path.chmod(mode)
    assert verified(signed).trusted


def test_a_ref_that_was_moved_by_hand_is_found(signed: Repository) -> None:
    database = signed.store.database
    refs = {ref: target for ref, target in signed.store.refs().items() if ref != "HEAD"}
    assert len(refs) == 7
    first, last = signed["HEAD~1"].id, signed["HEAD"].id
    for ref, target in refs.items():
        if ref == "refs/heads/main":  # what HEAD names is then another commit, signed as well
            continue
        for other in (first if target != first else last, None):
            with closing(sqlite3.connect(database)) as connection, connection:
                if other is None:
                    connection.execute("DELETE FROM refs WHERE name = ?", (ref,))
                else:
                    connection.execute("UPDATE refs SET target = ? WHERE name = ?", (other, ref))
            found = verified(signed)
            assert not found.trusted, ref
            assert any(damage.name == ref for damage in found.damage), ref
            with closing(sqlite3.connect(database)) as connection, connection:
                connection.execute("INSERT OR REPLACE INTO refs (name, target) VALUES (?, ?)", (ref, target))
    assert verified(signed).trusted


def test_a_tag_that_leads_elsewhere_than_was_signed_is_found(signed: Repository) -> None:
    """Moved by patchhub itself: the operations agree, the signature does not."""
    signed.tag("v1", delete=True)
    assert signed.verify().trusted
    signed.tag("v1", "HEAD")
    found = signed.verify()
    assert not found.trusted
    assert [damage.name for damage in found.damage] == ["refs/tags/v1"]
    assert "ada@example.org signed it at" in found.damage[0].problem


def test_a_signature_that_is_not_of_its_statement_is_broken(signed: Repository) -> None:
    store, head = signed.store, str(signed["HEAD"].id)
    ref = next(ref for ref in store.refs() if ref.startswith(f"refs/notes/{head}/signature/commit/"))
    note = store.note(store.refs()[ref])
    said = dict(note.settings["statement"])
    forged = replace(note, made_by="Eve", settings={**note.settings, "statement": {**said, "by": "Eve"}})
    store.move_refs(kept(store, forged), command="eval", arguments={}, author=AUTHOR, time=TIME)
    found = signed.verify()
    assert [entry.status for entry in found.signatures] == ["broken"]
    assert not found.trusted
    assert "BROKEN signature" in found.words()
    assert ref in found.words()


def test_the_authors_key_approves_nothing(signed: Repository) -> None:
    with pytest.raises(SignatureError, match=r"signed .* itself"):
        signed.approve("HEAD")


def test_the_commands_say_it_and_end_with_a_code_of_their_own(signed: Repository) -> None:
    def run(*arguments: str, code: int = 0) -> str:
        result = CliRunner().invoke(main, ["--repo", str(signed.store.root), *arguments])
        assert result.exit_code == code, result.stderr
        return result.stdout

    assert "is trusted" in run("verify", "v1")
    signed.config("sign", "always")
    assert "signed with SHA256:" in run("revert", "--subject", "Ann")
    run("undo")
    signed.config("sign", unset=True)
    assert "good signature by ada@example.org" in run("log", "--signatures")
    assert "signed by ada@example.org; approved by bob@example.org" in run("log", "--oneline", "--signatures")
    shown = json.loads(run("log", "--signatures", "--json"))
    assert [len(entry["signatures"]) for entry in shown] == [1, 3]
    assert "signatures" not in json.loads(run("log", "--json"))[0]
    signed.revert(subject=["Ann"])
    assert "NOT trusted" in run("verify", code=12)
    assert not json.loads(run("verify", "--json", code=12))["trusted"]
    assert "unsigned" in run("log", "--oneline", "--signatures", "-n", "1")


def test_scores_are_as_they_were(signed: Repository) -> None:
    """A signature is a note and no score."""
    assert [entry.scores for entry in signed.log()] == [(), ()]
    assert signed.fsck().sound
    assert signed.fsck(reindex=True).sound
    assert signed.verify().trusted
