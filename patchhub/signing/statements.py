"""What is signed, and how it is kept: statements about commits as notes (docs/format.md, "signature"). No key is touched here."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Final, Literal, NamedTuple

from patchhub.canonical import (
    IDENTIFIER,
    INSTANT,
    TEXT,
    MalformedError,
    canonical_json,
    choice,
    object_id,
    optional,
    record_of,
)
from patchhub.canonical import nfc as normalised
from patchhub.errors import CorruptStoreError
from patchhub.objects import Commit, Note
from patchhub.store.database import Changes
from patchhub.store.revisions import NOTES, SIGNATURES
from patchhub.store.store import Store
from patchhub.who import Signer, Who

KINDS: Final = ("commit", "tag", "approval")
METHODS: Final = ("ssh", "model-signing", "certificate", "sigstore")

Status = Literal["good", "unknown", "broken", "unchecked"]


class Verdict(NamedTuple):
    """What checking a signature found.

    Attributes:
        status: ``good`` by a key that the reader allows, ``unknown`` where it is right but its key is not among those, ``broken``, or
            ``unchecked`` where the program that checks is not there.
        principal: who the reader says the key belongs to, of a good one.
        reason: in words, of any other.
    """

    status: Status
    principal: str | None = None
    reason: str = ""


@dataclass(frozen=True)
class Statement:
    """What a signer says: of a commit that it is theirs, of a tag that it leads there, or that a commit may go on."""

    by: Annotated[str, TEXT]
    commit: Annotated[str, IDENTIFIER]
    kind: Annotated[str, choice(*KINDS)]
    message: Annotated[str, TEXT]
    tag: Annotated[str | None, optional(TEXT)]
    time: Annotated[str, INSTANT]

    @property
    def payload(self) -> bytes:
        """The bytes that are signed."""
        return canonical_json(_STATEMENT.encode(self))


_STATEMENT: Final = record_of(Statement)


@dataclass(frozen=True)
class _Kept:
    """The settings of a note that keeps a signature."""

    method: Annotated[str, TEXT]
    public_key: Annotated[str, TEXT]
    signature: Annotated[str, TEXT]
    statement: Annotated[Statement, _STATEMENT]


_KEPT: Final = record_of(_Kept)


@dataclass(frozen=True)
class Signature:
    """A signature as its note keeps it.

    Attributes:
        note: the note's id.
        public_key: key type and base64, as OpenSSH writes them.
        text: what the method's program wrote.
    """

    note: str
    method: str
    public_key: str
    text: str
    statement: Statement

    @property
    def key(self) -> str:
        """The key id: SHA-256 of the public key, 64 hexadecimal digits."""
        return key_id(self.public_key)

    @property
    def fingerprint(self) -> str:
        """The key id as `ssh-keygen -l` shows it."""
        return fingerprint(self.key)


def key_id(public_key: str) -> str:
    """SHA-256 of a public key, 64 hexadecimal digits; ValueError where the text is none."""
    parts = public_key.split(" ")
    if len(parts) != 2:
        raise ValueError("its public key is not a type and base64")
    try:
        return object_id(base64.b64decode(parts[1], validate=True))
    except binascii.Error:
        raise ValueError("its public key is not base64") from None


def fingerprint(key: str) -> str:
    """``SHA256:`` and base64 of a key id."""
    return "SHA256:" + base64.b64encode(bytes.fromhex(key)).decode().rstrip("=")


def suite_of(statement: Statement, key: str) -> str:
    """The suite of the note that keeps a signature of a statement by a key."""
    name = f"/{statement.tag}" if statement.tag is not None else ""
    return f"{SIGNATURES}{statement.kind}/{key}{name}"


def kept(repository: Store, *notes: Note) -> Changes:
    """Write notes and return the changes of refs that make them known; a note of the same suite gives way."""
    refs = repository.refs()
    names = {f"{NOTES}{note.commit}/{note.suite}": note for note in notes}
    return {ref: (refs.get(ref), repository.objects.put(note.to_json())) for ref, note in names.items()}


def sign_statement(statement: Statement, signer: Signer) -> Note:
    """The note that keeps the signature of a statement; nothing is written.

    Raises:
        SettingsError: the key cannot sign.
    """
    public_key, text = signer.sign(statement.payload, statement.kind)
    settings = _KEPT.encode(_Kept(signer.method, public_key, text, statement))
    suite = suite_of(statement, key_id(public_key))
    return Note(commit=statement.commit, made_by=statement.by, scores={}, settings=settings, suite=suite)


def sign_commit(repository: Store, commit: Commit, signer: Signer | None) -> Changes:
    """Sign a commit that is about to be recorded, as its author and at its time; what `kept` returns, nothing without a signer."""
    if signer is None:
        return {}
    by = normalised(commit.author)
    statement = Statement(by=by, commit=commit.id, kind="commit", message="", tag=None, time=commit.time)
    return kept(repository, sign_statement(statement, signer))


def sign_as(
    repository: Store, who: Who, kind: str, commit: str, *, tag: str | None = None, message: str = ""
) -> Changes:
    """Sign a commit or tag that is there, or approve a commit, with the key of ``who``; what `kept` returns, nothing without a key."""
    if who.signer is None:
        return {}
    by, words = normalised(who.author), normalised(message)
    statement = Statement(by=by, commit=commit, kind=kind, message=words, tag=tag, time=who.time)
    return kept(repository, sign_statement(statement, who.signer))


def read_signature(identity: str, note: Note) -> Signature:
    """The signature that a note keeps, not checked yet.

    Raises:
        ValueError: in words, why it keeps none.
    """
    try:
        kept: _Kept = _KEPT.decode(note.settings, "settings")
    except MalformedError as error:
        raise ValueError(f"it keeps no signature: {error}") from None
    statement = kept.statement
    signature = Signature(identity, kept.method, kept.public_key, kept.signature, statement)
    if (statement.kind == "tag") != (statement.tag is not None):
        raise ValueError("its statement names a tag where it may not, or none where it must")
    if statement.commit != note.commit or note.suite != suite_of(statement, signature.key):
        raise ValueError("its statement is about something else than its note")
    if note.scores or note.made_by != statement.by:
        raise ValueError("its note says more than its statement")
    return signature


def signature_refs(refs: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    """(ref, commit, note) of each signature that refs name, by name of the ref."""
    for ref in sorted(refs):
        commit, _, suite = ref.removeprefix(NOTES).partition("/")
        if ref.startswith(NOTES) and suite.startswith(SIGNATURES):
            yield ref, commit, refs[ref]


def signature_at(repository: Store, ref: str, note: str) -> Signature | str:
    """The signature that a ref of a note leads to; in words what is wrong where it is none, or of another ref."""
    try:
        found = repository.note(note)
        signature = read_signature(note, found)
    except (CorruptStoreError, ValueError) as error:
        return error.message if isinstance(error, CorruptStoreError) else str(error)
    if ref != f"{NOTES}{found.commit}/{found.suite}":
        return "its note is of another commit or kind than its ref says"
    return signature
