"""`sign`, `approve`, `verify`: who vouches for a commit, whether that holds, and what a remote or a branch may ask of it. JSON only."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from patchhub.errors import CorruptStoreError, RevisionError, SettingsError, SignatureError
from patchhub.results import Result
from patchhub.signing.statements import (
    METHODS,
    Signature,
    Statement,
    Verdict,
    fingerprint,
    kept,
    read_signature,
    sign_statement,
    signature_at,
    signature_refs,
)
from patchhub.store import database, states
from patchhub.store.config import Config
from patchhub.store.revisions import BRANCHES, NOTES, REMOTES, SIGNATURES, TAGS
from patchhub.store.states import Reference, closure, references
from patchhub.store.store import Store
from patchhub.who import Signer, Who

if TYPE_CHECKING:
    from patchhub.progress import Progress

UNKNOWN_KEY: Final = "good signature by a key that is not in your allowed signers"

NAME_ALLOWED: Final = "Name a file of allowed signers: `patchhub config sign.allowed FILE`, or --allowed FILE."

_AT_ONCE: Final = 4  # programs that check signatures side by side
_EMAIL = re.compile(r"<([^<>]+)>")

# --- keys -----------------------------------------------------------------------------------------------------------


def signer_of(
    config: Config, key: Path | None, method: str | None, environment: Mapping[str, str], *, interactive: bool
) -> Signer:
    """The key that is asked for, else the config's; it can sign, as far as that can be told beforehand.

    Args:
        key: a file; one in OpenSSH's own form signs with OpenSSH unless ``method`` says otherwise, whatever the config says.
        environment: the variables that programs run with.
        interactive: somebody is there to be asked for a passphrase.

    Raises:
        SettingsError: none is named, or it cannot sign.
    """
    from patchhub.signing import openssf, ssh  # programs that sign are not needed where history is only read

    named, configured = key if key is not None else config.settings.get("sign.key"), config.settings.get("sign.method")
    if (method or configured) == "sigstore" and key is None:
        keyless = openssf.Keyless()
        keyless.check()
        return keyless
    if named is None:
        raise SettingsError(
            "there is no key to sign with", remedy="Name one: `patchhub config sign.key FILE`, or --key FILE."
        )
    path = Path(named).expanduser()
    chosen = method or (METHODS[0] if key is not None and ssh.is_own(path) else configured or METHODS[0])
    signer: Signer = ssh.SshKey(path, environment, interactive)
    if chosen == "model-signing":
        signer = openssf.EllipticKey(path)
    if chosen == "certificate":
        signer = openssf.Certified(path)
    signer.check()
    return signer


def signs_always(config: Config) -> bool:
    """Whether commits and tags are signed without being asked for it."""
    return bool(config.settings.get("sign") == "always")


def allowed_signers(config: Config, given: Path | None = None) -> Path | None:
    """The file of allowed signers that is given, else the config's; None where there is neither.

    Raises:
        SettingsError: it is not there.
    """
    named = given if given is not None else config.settings.get("sign.allowed")
    path = None if named is None else Path(named).expanduser()
    if path is not None and not path.is_file():
        raise SettingsError(f"there is no file of allowed signers {path}", remedy=NAME_ALLOWED, path=str(path))
    return path


# --- signatures as they are told ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Vouched(Result):
    """One signature, and what checking it found.

    Attributes:
        note: the note that keeps it; ``ref`` leads there.
        kind: ``commit``, ``tag`` or ``approval``. Like what follows, None or empty where the note cannot be read.
        key: the fingerprint of the key.
        status: ``good``, ``unknown`` (right, by a key that is not among the allowed ones), ``broken`` or ``unchecked``.
        principal: who the allowed signers say the key belongs to.
        reason: why it is not good.
    """

    note: str
    ref: str
    commit: str
    kind: str | None
    tag: str | None
    method: str
    key: str
    by: str
    time: str
    message: str
    status: str
    principal: str | None
    reason: str

    def words(self) -> str:
        what = {"tag": f"tag {self.tag}: ", "approval": "approval: "}.get(self.kind or "", "")
        if self.status == "good":
            return f"{what}good signature by {self.principal} ({self.key})"
        if self.status == "unknown":
            return f"{what}{UNKNOWN_KEY} ({self.key}, which says {self.by})"
        verb = "BROKEN signature" if self.status == "broken" else "signature that was not checked"
        return f"{what}{verb} {self.note[:12]} at {self.ref}: {self.reason}"


def vouched(
    repository: Store,
    found: Iterable[tuple[str, str, str]],
    allowed: Path | None,
    *,
    first: Collection[str] = (),
    limit: int | None = None,
) -> list[Vouched]:
    """Check signatures, several at a time.

    Args:
        found: (ref, commit, note) of each, as `signature_refs` has them.
        allowed: the file of allowed signers; None: no key is allowed.
        first: commits whose signatures come first, and of those the ones by keys that ``allowed`` names.
        limit: how many are checked at most, each by a program of its own; others are told as unchecked, after their form was checked.
    """
    read = [(ref, commit, note, signature_at(repository, ref, note)) for ref, commit, note in found]
    if limit is not None and len(read) > limit:
        names = allowed.read_text(encoding="utf-8", errors="replace") if allowed is not None else ""
        read.sort(
            key=lambda entry: (entry[1] not in first, isinstance(entry[3], str) or entry[3].public_key not in names)
        )
    late = Verdict("unchecked", None, f"{limit} others were checked; `patchhub verify --all` checks every one")

    def judged(place: int) -> Verdict:
        signature = read[place][3]
        beyond = limit is not None and place >= limit and not isinstance(signature, str)
        return late if beyond else _verdict(signature, allowed)

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        verdicts = list(pool.map(judged, range(len(read))))
    return [_told(*entry, verdict) for entry, verdict in zip(read, verdicts, strict=True)]


def _verdict(signature: Signature | str, allowed: Path | None) -> Verdict:
    if isinstance(signature, str):
        return Verdict("broken", None, signature)
    from patchhub.signing import openssf, ssh

    verify = {
        "ssh": ssh.verify,
        "model-signing": openssf.verify,
        "certificate": openssf.verify_certificate,
        "sigstore": openssf.verify_keyless,
    }.get(signature.method)
    if verify is None:
        return Verdict("unchecked", None, f"it is of a method that this version does not know, {signature.method!r}")
    said = signature.statement
    return verify(said.payload, said.kind, signature.public_key, signature.text, said.time, allowed)


def _told(ref: str, commit: str, note: str, signature: Signature | str, verdict: Verdict) -> Vouched:
    outcome = (verdict.status, verdict.principal, verdict.reason)
    if isinstance(signature, str):
        return Vouched(note, ref, commit, None, None, "", "", "", "", "", *outcome)
    said, key = signature.statement, signature.fingerprint
    return Vouched(
        note, ref, commit, said.kind, said.tag, signature.method, key, said.by, said.time, said.message, *outcome
    )


def signatures_by_commit(refs: Mapping[str, str]) -> dict[str, list[tuple[str, str, str]]]:
    """For each commit that has signatures, where they are: what `vouched` takes."""
    found: dict[str, list[tuple[str, str, str]]] = {}
    for entry in signature_refs(refs):
        found.setdefault(entry[1], []).append(entry)
    return found


def approvers(author: str, signatures: Sequence[Vouched]) -> list[str]:
    """Who approved a commit: principals of good approvals, without its author and whoever signed it.

    Args:
        author: as the commit has it, "Ada <ada@example.org>".
        signatures: those about the commit.
    """
    own = {email.lower() for email in _EMAIL.findall(author)}
    own |= {str(found.principal).lower() for found in signatures if found.kind == "commit" and found.status == "good"}
    keys = {found.key for found in signatures if found.kind == "commit"}
    good = [found for found in signatures if found.kind == "approval" and found.status == "good"]
    return sorted(
        {str(found.principal) for found in good if found.key not in keys and str(found.principal).lower() not in own}
    )


# --- verify ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Damage(Result):
    """Something below a commit that is not what the commit's id covers, or a ref that is not where it was put.

    Attributes:
        kind: of the object, or ``ref``.
        name: the object's id, or the ref.
        place: what refers to it, and where it lies.
    """

    kind: str
    name: str
    place: str
    problem: str

    def words(self) -> str:
        return f"{self.kind} {self.name[:12] if self.kind != 'ref' else self.name} ({self.place}): {self.problem}"


@dataclass(frozen=True)
class Verified(Result):
    """What `verify` found.

    Attributes:
        signatures: those of the commit, of tags at it, and its approvals; under ``all`` of every commit below too.
        unsigned: under ``all``, the commits below that no allowed key signed.
        damage: what is not as it was signed.
        objects: how many objects were read and hashed.
        trusted: an allowed key signed it (or the tag that was named), everything below is as it was, and no signature is broken.
    """

    commit: str
    signatures: tuple[Vouched, ...]
    unsigned: tuple[str, ...]
    damage: tuple[Damage, ...]
    objects: int
    trusted: bool

    def words(self) -> str:
        found = "; ".join(entry.words() for entry in (*self.damage, *self.signatures)) or "not signed"
        return f"{self.commit[:12]} is {'' if self.trusted else 'NOT '}trusted: {found}"


def verify(
    repository: Store, revision: str, progress: Progress, *, allowed: Path | None = None, everything: bool = False
) -> Verified:
    """Check who signed a revision, and that every object and ref below it is what was signed.

    Args:
        allowed: a file of allowed signers; None: the config's.
        everything: check the signatures of all commits below too.

    Raises:
        RevisionError: no such revision, or the unpatched model.
        SettingsError: the file of allowed signers is not there.
    """
    keys = allowed_signers(repository.config, allowed)
    identity, refs = _commit(repository, revision), repository.refs()
    by_commit = signatures_by_commit(refs)
    progress.stage("reading what is below", 0)
    reached, damage = differences_below(repository, identity, progress)
    commits = [reference.id for reference in reached if reference.kind == "commit"]
    told = vouched(
        repository,
        [entry for commit in (commits if everything else [identity]) for entry in by_commit.get(commit, ())],
        keys,
    )
    tags = vouched(repository, [entry for entry in signature_refs(refs) if f"/{SIGNATURES}tag/" in entry[0]], keys)
    damage += [found for found in (_moved(tag, refs) for tag in tags) if found is not None]
    progress.close()
    named = TAGS + revision.removeprefix(TAGS)
    good = [found for found in told if found.status == "good" and found.commit == identity]
    vouching = [
        found for found in good if found.kind == "commit" or (found.kind == "tag" and TAGS + str(found.tag) == named)
    ]
    signed = {found.commit for found in told if found.status == "good" and found.kind == "commit"}
    return Verified(
        commit=identity,
        signatures=tuple(told),
        unsigned=tuple(commit for commit in commits if everything and commit not in signed),
        damage=tuple(damage),
        objects=len(reached),
        trusted=bool(vouching) and not damage and all(found.status != "broken" for found in told),
    )


def differences_below(repository: Store, commit: str, progress: Progress) -> tuple[list[Reference], list[Damage]]:
    """All that a commit and the notes about what is below it lead to; and what of it is not what its hash says, with refs that moved."""
    refs = repository.refs()
    notes: dict[str, list[str]] = {}
    for ref, target in refs.items():
        if ref.startswith(NOTES):
            notes.setdefault(ref[len(NOTES) :].partition("/")[0], []).append(target)
    owners: dict[Reference, Reference] = {}
    damage: list[Damage] = []

    def follow(reference: Reference) -> list[Reference]:
        found: list[Reference] = []
        try:
            if reference.kind != "requests" or reference.id in repository.objects:  # texts may be withheld
                repository.objects.verify(reference.id)
                data = b"" if reference.kind == "tensors" else repository.objects.get(reference.id)
                found = references(reference.kind, data)
            if reference == Reference("base", reference.id) and reference.id != repository.config.base_id:
                raise CorruptStoreError("it is not the base of this repository")
        except CorruptStoreError as error:
            owner = owners.get(reference)
            place = f"of {owner.kind} {owner.id[:12]}" if owner else "named by a ref"
            file = f"objects/{reference.id[:2]}/{reference.id[2:]}"
            damage.append(Damage(reference.kind, reference.id, f"{place}, {file}", error.message))
        if reference.kind == "commit":
            found += [Reference("note", note) for note in notes.get(reference.id, ())]
        for child in found:
            owners.setdefault(child, reference)
        progress.advance(1)
        return found

    reached = list(closure([Reference("commit", commit)], follow))
    return reached, damage + _misplaced(repository, refs)


def _misplaced(repository: Store, refs: Mapping[str, str]) -> list[Damage]:
    """Refs that are not where the operations left them."""
    try:
        log = [operation.changes for _, operation in repository.operations()]
    except CorruptStoreError as error:
        return [Damage("ref", "operations", "patchhub.db", error.message)]
    expected = database.fold(reversed(log))
    return [
        Damage(
            "ref", ref, "patchhub.db", f"it is at {refs.get(ref)}, and the operations left it at {expected.get(ref)}"
        )
        for ref in sorted(refs.keys() | expected.keys())
        if refs.get(ref) != expected.get(ref)
    ]


def _moved(tag: Vouched, refs: Mapping[str, str]) -> Damage | None:
    """A tag that is elsewhere than where its signature says."""
    ref = f"{TAGS}{tag.tag}"
    if tag.status not in ("good", "unknown") or refs.get(ref, tag.commit) == tag.commit:
        return None
    problem = f"it is at {refs[ref][:12]}, and {tag.principal or tag.key} signed it at {tag.commit[:12]}"
    return Damage("ref", ref, "patchhub.db", problem)


def _commit(repository: Store, revision: str) -> str:
    identity = repository.resolve(revision)
    if identity is None:
        raise RevisionError(f"{revision} is the unpatched model, which nobody signs", remedy="Name a commit.")
    return identity


# --- sign and approve -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Signed(Result):
    """A signature that was made: about which commit, of which kind, by which key."""

    commit: str
    kind: str
    note: str
    key: str


def sign(repository: Store, revision: str, who: Who) -> list[Signed]:
    """Sign a commit that is there, or each one of ``FROM..TO``, with the key of ``who``; the latest first.

    Raises:
        RevisionError: no such revision, or the unpatched model.
        SettingsError: the key cannot sign.
    """
    return _sign(repository, _commits(repository, revision), who, "commit")


def approve(repository: Store, revision: str, who: Who) -> list[Signed]:
    """Say with one's key that a commit, or each one of ``FROM..TO``, may go on; ``who.message`` says why.

    Raises:
        RevisionError: no such revision, or the unpatched model.
        SignatureError: the same key signed a commit: its author does not approve it.
        SettingsError: the key cannot sign.
    """
    return _sign(repository, _commits(repository, revision), who, "approval")


def _commits(repository: Store, revision: str) -> list[str]:
    below, dots, tip = revision.rpartition("..")
    identity = _commit(repository, tip or "HEAD")
    if not dots:
        return [identity]
    start = repository.resolve(below) if below else None
    hidden = states.ancestors([start], repository.parents) if start else frozenset()
    found = [commit for commit in states.walk([identity], repository.parents, repository.rank) if commit not in hidden]
    if not found:
        raise RevisionError(f"{revision} holds no commit", remedy="Write the older one first: FROM..TO.")
    return found


def _sign(repository: Store, commits: Sequence[str], who: Who, kind: str) -> list[Signed]:
    if who.signer is None:
        raise SettingsError("there is no key to sign with", remedy="Name one with --key FILE.")
    message = who.message if kind == "approval" else ""
    made = []
    for commit in commits:
        statement = Statement(by=who.author, commit=commit, kind=kind, message=message, tag=None, time=who.time)
        made.append(sign_statement(statement, who.signer))
    keys = [read_signature("", note).key for note in made]
    for commit, key in zip(commits, keys, strict=True):
        if kind == "approval" and f"{NOTES}{commit}/{SIGNATURES}commit/{key}" in repository.refs():
            raise SignatureError(
                f"the key {fingerprint(key)} signed {commit[:12]} itself, so it cannot approve it",
                remedy="Let somebody else approve it, with a key of their own.",
                commit=commit,
            )
    changes = kept(repository, *made)
    command = "approve" if kind == "approval" else "sign"
    arguments = {"commits": list(commits)}
    repository.move_refs(changes, command=command, arguments=arguments, author=who.author, time=who.time)
    notes = [str(new) for _, new in changes.values()]
    rows = zip(commits, notes, keys, strict=True)
    return [Signed(commit, kind, note, fingerprint(key)) for commit, note, key in rows]


# --- what a remote may bring, and what a branch asks for --------------------------------------------------------------


MOST_AT_ONCE: Final = 256
"""Signatures that one fetch checks, those of branches and tags first: each takes a process, and a remote can send any number."""


def admission(
    repository: Store, address: str, required: Path | None, progress: Progress
) -> Callable[[Mapping[str, str]], Mapping[str, str]]:
    """What decides which refs of a remote may come: none is let in with a broken signature.

    Args:
        required: a file of allowed signers: a branch comes only if one of them signed its tip, a tag only if one signed the tag.

    Returns:
        a function of the refs and targets that are to come; it returns those that may not, with the reason in words, and raises
        `SignatureError` where a signature is broken.
    """
    keys = allowed_signers(Config({}, {}), required)

    def admit(wanted: Mapping[str, str]) -> Mapping[str, str]:
        here = repository.refs()
        known = {} if keys is None else {ref: note for ref, note in here.items() if ref.startswith(NOTES)}
        targets = set(wanted.values())
        chosen = (e for e in signature_refs({**known, **wanted}) if e[0] in wanted or e[1] in targets)
        found = vouched(repository, chosen, keys, first=targets, limit=MOST_AT_ONCE)
        for broken in (signature for signature in found if signature.status == "broken"):
            raise SignatureError(
                f"{address} brings a {broken.words()}",
                remedy="Nothing was changed here. Ask who signed it to sign again, and push.",
                note=broken.note,
                ref=broken.ref,
                commit=broken.commit,
            )
        unchecked = [signature for signature in found if signature.status == "unchecked"]
        if unchecked:
            progress.warn(f"{len(unchecked)} signatures were not checked: {unchecked[0].reason}")
        if keys is None:
            return {}
        signed = {(s.commit, s.tag) for s in found if s.status == "good" and s.kind != "approval"}
        refs = {ref: target for ref, target in wanted.items() if not ref.startswith(NOTES)}
        return {
            ref: f"nobody whose key is in {keys} signed {'the tag' if ref.startswith(TAGS) else target[:12]}"
            for ref, target in refs.items()
            if (target, ref[len(TAGS) :] if ref.startswith(TAGS) else None) not in signed
        }

    return admit


def refuse_left_out(ref: str, left_out: Mapping[str, str]) -> None:
    """Refuse to go on to a branch of a remote that was not let in."""
    if ref in left_out:
        raise SignatureError(
            f"{ref.removeprefix(REMOTES)} is refused: {left_out[ref]}",
            remedy="Ask for a signature of it (`patchhub sign REV`, then push), or leave --require-signed out.",
            ref=ref,
        )


def refuse_unapproved(repository: Store, ref: str, commit: str, theirs: str | None) -> None:
    """Hold a push to the policy of its branch: enough people beside its author must have approved each commit that is new there.

    Args:
        ref: the branch or tag that is pushed, ``commit`` where it is here and ``theirs`` where it is there.

    Raises:
        SignatureError: a commit lacks approvals, or is not signed, so that nobody can tell who may not approve it.
        SettingsError: there is a policy and no file of allowed signers.
    """
    from patchhub.sets.settings import approvals_wanted

    wanted = approvals_wanted(repository.config, ref[len(BRANCHES) :]) if ref.startswith(BRANCHES) else 0
    if not wanted:
        return
    allowed = allowed_signers(repository.config)
    if allowed is None:
        raise SettingsError(f"the policy of {ref[len(BRANCHES) :]} needs allowed signers", remedy=NAME_ALLOWED)
    there = states.ancestors([theirs], repository.parents) if theirs and theirs in repository.commits(theirs) else set()
    new = [c for c in states.walk([commit], repository.parents, repository.rank) if c not in there]
    by_commit = signatures_by_commit(repository.refs())
    lacking = dict(_lacking(repository, reversed(new), by_commit, wanted, allowed))
    if lacking:
        listed = "; ".join(f"{identity[:12]} {words}" for identity, words in lacking.items())
        raise SignatureError(
            f"{ref[len(BRANCHES) :]} wants {wanted} approval{'s' if wanted > 1 else ''} of each commit: {listed}",
            remedy="Let others approve them (`patchhub approve REV`) and fetch that, then push again.",
            lacking=lacking,
            wanted=wanted,
        )


def _lacking(
    repository: Store,
    commits: Iterable[str],
    by_commit: Mapping[str, Sequence[tuple[str, str, str]]],
    wanted: int,
    allowed: Path,
) -> Iterator[tuple[str, str]]:
    """Each commit that a policy refuses, and why."""
    for identity in commits:
        found = vouched(repository, by_commit.get(identity, ()), allowed)
        if not any(signature.kind == "commit" and signature.status == "good" for signature in found):
            yield identity, "is signed by no allowed key, so who may not approve it is not known"
            continue
        missing = wanted - len(approvers(repository.commit(identity).author, found))
        if missing > 0:
            yield identity, f"lacks {missing}"
