"""Signatures travel over every kind of remote with the branch that they are about, and a broken one stops there."""

# ruff: noqa: F811  # a fixture of another folder

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from patchhub.errors import SignatureError
from patchhub.porcelain.trust.signing import admission, vouched
from patchhub.progress import Silent
from patchhub.remotes import receive
from patchhub.remotes.receive import Intake, Limits
from patchhub.remotes.remote import Remote
from patchhub.sets.columns import linear_shapes, tensor_check, weight_shapes
from patchhub.signing.ssh import SshKey
from patchhub.signing.statements import kept, sign_as, signature_refs
from patchhub.store.store import Store
from tests.remotes.stores import AUTHOR, STAMP, TIME, make_history, make_store
from tests.remotes.test_conformance import push
from tests.signing.conftest import keys  # noqa: F401  # a fixture

Connect = Callable[[], Remote]


def fetch(repository: Store, remote: Remote, required: Path | None = None) -> receive.Fetched:
    weights, linear = weight_shapes(repository), linear_shapes(repository)
    intake = Intake(Limits(1 << 30, weights, linear), tensor_check(weights, linear))
    entry = receive.Entry(admit=admission(repository, remote.address, required, Silent()))
    return receive.fetch(repository, remote, "origin", intake, who=STAMP, entry=entry)


@pytest.fixture
def ours(keys: Path, tmp_path: Path) -> Store:
    """Two branches and a tag, of which ``main`` and the tag are signed by Ada."""
    store = make_history(tmp_path / "ours")
    ada = replace(STAMP, signer=SshKey(keys / "ada", dict(os.environ)))
    refs = store.refs()
    signed = {
        **sign_as(store, ada, "commit", refs["refs/heads/main"]),
        **sign_as(store, ada, "tag", refs["refs/tags/v1"], tag="v1"),
    }
    store.move_refs(signed, command="sign", arguments={}, author=AUTHOR, time=TIME)
    return store


def test_what_is_signed_arrives_and_the_rest_is_left_out(
    connect: Connect, ours: Store, keys: Path, tmp_path: Path
) -> None:
    push(ours, connect())
    theirs = make_store(tmp_path / "theirs")
    fetched = fetch(theirs, connect(), keys / "allowed")
    assert fetched.left_out.keys() == {"refs/remotes/origin/side"}
    assert {"refs/remotes/origin/main", "refs/tags/v1"} <= theirs.refs().keys()
    found = vouched(theirs, signature_refs(theirs.refs()), keys / "allowed")
    assert {(entry.kind, entry.principal) for entry in found} == {
        ("commit", "ada@example.org"),
        ("tag", "ada@example.org"),
    }
    assert fetch(theirs, connect()).left_out == {}
    assert "refs/remotes/origin/side" in theirs.refs()


def test_a_broken_one_stops_the_fetch(connect: Connect, ours: Store, tmp_path: Path) -> None:
    ref, _, identity = next(iter(signature_refs(ours.refs())))
    note = ours.note(identity)
    statement = {**note.settings["statement"], "time": "2026-11-21T09:30:01Z"}
    forged = replace(note, settings={**note.settings, "statement": statement})
    ours.move_refs(kept(ours, forged), command="sign", arguments={}, author=AUTHOR, time=TIME)
    push(ours, connect())
    theirs = make_store(tmp_path / "theirs")
    with pytest.raises(SignatureError, match=f"BROKEN signature {forged.id[:12]} at {ref}"):
        fetch(theirs, connect())
    assert theirs.refs() == {"HEAD": "ref: refs/heads/main"}
