"""`export bom` and `export attestations`: what speaks for a revision, in the forms that other programs read. JSON only."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from patchhub.errors import RevisionError, SettingsError
from patchhub.export import cyclonedx
from patchhub.fsio import os_errors, write_atomically
from patchhub.objects import Base
from patchhub.porcelain.scores import Noted, notes_of
from patchhub.porcelain.trust.audit import Audit, FactChange, audit, by_commit
from patchhub.progress import Progress
from patchhub.results import Result
from patchhub.signing.statements import fingerprint, key_id
from patchhub.store.store import Store, refuse_store
from patchhub.who import Signer

EVALUATION: Final = "urn:patchhub:evaluation:1"
"""The type of the predicate of an evaluation: what a note says (docs/signing.md)."""

_ARMOUR = re.compile(r"-----[A-Z ]+-----")


@dataclass(frozen=True)
class WrittenEvidence(Result):
    """What an export of evidence wrote: the file, the commit it is about, and how many patches or statements it holds."""

    out: Path
    commit: str
    count: int
    signed: bool = False


def export_bom(
    repository: Store,
    revision: str,
    out: Path,
    progress: Progress,
    *,
    allowed: Path | None = None,
    overwrite: bool = False,
) -> WrittenEvidence:
    """Write a CycloneDX ML-BOM of a revision: base, pedigree, a patch for each commit with its facts, scores.

    Args:
        allowed: a file of allowed signers, as in `verify`.

    Raises:
        RevisionError: no such revision, or the unpatched model.
        SettingsError: the file is there already, or in a store.
    """
    commit = _commit(repository, revision)
    found = audit(repository, revision, progress, allowed=allowed)
    made = repository.commit(commit)
    ancestor = _ancestor(repository)
    patches = [_patch(group) for group in _groups(repository, found)]
    document = cyclonedx.model_bom(
        name=f"{ancestor.name} (patched)",
        version=_version(),
        commit=commit,
        time=made.time,
        ancestor=ancestor,
        patches=patches,
        scores=_performance(notes_of(repository, commit)),
        properties={
            "set": made.set_digest,
            "active-facts": str(repository.active_count(commit)),
            "read-back-to-the-base": "yes" if found.proven else "no: " + "; ".join(d.words() for d in found.damage),
        },
    )
    text = json.dumps(document, ensure_ascii=False, indent=2)
    _write(repository, out, f"{text}\n".encode(), overwrite=overwrite)
    return WrittenEvidence(out, commit, len(patches))


def export_attestations(
    repository: Store, revision: str, out: Path, *, signer: Signer | None, overwrite: bool = False
) -> WrittenEvidence:
    """Write the scores that are noted about a revision as in-toto Statements, JSON Lines; with a key each in a signed DSSE envelope.

    Raises:
        RevisionError: no such revision, or nothing is noted about it.
        SettingsError: the file is there already, or in a store; or the key cannot sign.
    """
    commit = _commit(repository, revision)
    notes = notes_of(repository, commit)
    if not notes:
        raise RevisionError(
            f"nothing is noted about {commit[:12]}", remedy="Measure it first: `patchhub eval --suite FILE`."
        )
    documents = [_attestation(repository, noted, signer) for noted in notes]
    _write(repository, out, cyclonedx.lines(documents), overwrite=overwrite)
    return WrittenEvidence(out, commit, len(documents), signer is not None)


def _attestation(repository: Store, noted: Noted, signer: Signer | None) -> Mapping[str, Any]:
    note = repository.note(noted.note)
    predicate = {
        "note": noted.note,
        "suite": note.suite,
        "made_by": note.made_by,
        "settings": note.settings,
        "scores": note.scores,
    }
    statement = cyclonedx.in_toto_statement(noted.commit, EVALUATION, predicate)
    if signer is None:
        found: Mapping[str, Any] = json.loads(statement)
        return found
    public_key, text = signer.sign(cyclonedx.signed_bytes(statement), "attestation")
    signature = base64.b64decode(_ARMOUR.sub("", text)) if signer.method == "ssh" else text.encode("utf-8")
    return cyclonedx.envelope(statement, fingerprint(key_id(public_key)), signature)


def _commit(repository: Store, revision: str) -> str:
    commit = repository.resolve(revision)
    if commit is None:
        raise RevisionError(
            f"{revision} is the unpatched model, of which patchhub knows nothing", remedy="Name a commit."
        )
    return commit


def _version() -> str:
    """Of this program; empty where it runs without having been installed."""
    try:
        return metadata.version("patchhub")
    except metadata.PackageNotFoundError:
        return ""


def _ancestor(repository: Store) -> cyclonedx.Ancestor:
    base, stored = repository.config.base, Base.from_json(repository.objects.get(repository.config.base_id))
    on_hub = base.get("revision") is not None
    return cyclonedx.Ancestor(
        name=str(base["path"]) if on_hub else Path(str(base["path"])).name,
        revision=base.get("revision"),
        on_hub=on_hub,
        id=repository.config.base_id,
        model_type=str(base.get("model_type", "")),
        tensors={name: tuple(record) for name, record in stored.tensors.items()},  # type: ignore[misc]  # a named tuple of the three
    )


@dataclass(frozen=True)
class _Group:
    """A commit with the changes of facts that are its own, none where it only records anew or joins."""

    commit: str
    author: str
    time: str
    message: str
    rows: tuple[FactChange, ...]


def _groups(repository: Store, found: Audit) -> Iterator[_Group]:
    rows = {group[0].commit: tuple(group) for group in by_commit(found.rows)}
    walked = [identity for identity, _ in repository.log(str(found.commit))]
    for identity in reversed(walked):
        commit = repository.commit(identity)
        yield _Group(identity, commit.author, commit.time, commit.message, rows.get(identity, ()))


def _patch(group: _Group) -> cyclonedx.PatchOf:
    names = ("change", "prompt", "subject", "before", "after", "request", "patch", "method", "undoes", "undone_by")
    facts = [{name: getattr(row, name) for name in names} for row in group.rows]
    speaks = group.rows[0].evidence if group.rows else None
    evidence = {"evidence": speaks.words()} if speaks else {}
    return cyclonedx.PatchOf(group.commit, group.author, group.time, group.message, facts, evidence)


def _performance(notes: tuple[Noted, ...]) -> Iterator[cyclonedx.Performance]:
    for noted in notes:
        measured = f"{noted.facts} facts of {noted.file}" if noted.file else noted.suite
        for name, score in noted.scores.items():
            interval = None if score.low is None or score.high is None else (score.low, score.high)
            yield cyclonedx.Performance(f"{noted.kind}: {name}", score.value, interval, measured)


def _write(repository: Store, out: Path, data: bytes, *, overwrite: bool) -> None:
    refuse_store(repository, out)
    if out.exists() and not overwrite:
        raise SettingsError(f"{out} is there already", remedy="Choose another place, or --overwrite.")
    with os_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, (data,))
