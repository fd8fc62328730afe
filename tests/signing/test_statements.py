"""What is signed, byte by byte, and what is not taken for a signature."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import replace
from typing import Any

import pytest

from patchhub.canonical import canonical_json
from patchhub.objects import Note
from patchhub.signing.statements import Statement, read_signature, sign_statement
from patchhub.store.states import KINDS

COMMIT = "ab" * 32
KEY = "ssh-ed25519 " + base64.b64encode(b"a public key").decode()
STATEMENT = Statement(by="Ada", commit=COMMIT, kind="tag", message="", tag="v1", time="2026-11-21T09:30:00Z")
PAYLOAD = (
    b'{"by":"Ada","commit":"'
    + COMMIT.encode()
    + b'","kind":"tag","message":"","tag":"v1","time":"2026-11-21T09:30:00Z"}'
)
GOLDEN = (
    b'{"commit":"'
    + COMMIT.encode()
    + b'","format":1,"made_by":"Ada","scores":{},"settings":{"method":"ssh","public_key":"'
    b'ssh-ed25519 YSBwdWJsaWMga2V5","signature":"written","statement":' + PAYLOAD + b'},"suite":"signature/tag/'
    b'0b7348fa038970c48ec07cd73b6257f39ec810f60f16ee73b62e3c6e2610abc6/v1","type":"note"}'
)


class Written:
    """A signer whose signature is a word, so that bytes are known."""

    method = "ssh"

    def check(self) -> None: ...

    def sign(self, statement: bytes, kind: str) -> tuple[str, str]:
        assert (statement, kind) == (PAYLOAD, "tag")
        return KEY, "written"


def note() -> Note:
    return sign_statement(STATEMENT, Written())


def test_the_bytes_are_those_of_the_format() -> None:
    digest = hashlib.sha256(b"a public key").hexdigest()
    assert note().to_json() == GOLDEN
    assert KINDS["note"].read(GOLDEN) == note()
    found = read_signature(note().id, note())
    assert (found.statement, found.key, found.method, found.text) == (STATEMENT, digest, "ssh", "written")


def changed(part: str, value: Any) -> Note:
    settings = json.loads(canonical_json(note().settings))
    settings["statement"][part] = value
    return replace(note(), settings=settings)


@pytest.mark.parametrize(
    "other",
    [
        replace(note(), commit="cd" * 32),
        replace(note(), suite=f"signature/commit/{'00' * 32}"),
        replace(note(), made_by="Eve"),
        replace(note(), scores={"S": 1.0}),
        replace(note(), settings={}),
        replace(note(), settings={**note().settings, "public_key": "ssh-ed25519 b3RoZXI="}),
        replace(note(), settings={**note().settings, "public_key": "no key"}),
        replace(note(), settings={**note().settings, "more": 1}),
        changed("commit", "cd" * 32),
        changed("commit", "cd"),
        changed("kind", "commit"),
        changed("kind", "other"),
        changed("tag", None),
        changed("tag", "v2"),
        changed("by", "Eve"),
        changed("time", "yesterday"),
    ],
)
def test_a_note_that_says_something_else_than_its_statement_is_no_signature(other: Note) -> None:
    with pytest.raises(ValueError, match=r"its|no signature"):
        read_signature(other.id, other)
