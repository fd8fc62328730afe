"""Signatures checked and told: whose they are, and who approved what. The programs that check are asked here and nowhere else."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from patchhub.errors import SettingsError
from patchhub.results import Result
from patchhub.signing.statements import Signature, Verdict, signature_at, signature_refs
from patchhub.store.config import Config
from patchhub.store.store import Store

UNKNOWN_KEY: Final = "good signature by a key that is not in your allowed signers"

NAME_ALLOWED: Final = "Name a file of allowed signers: `patchhub config sign.allowed FILE`, or --allowed FILE."

_AT_ONCE: Final = 4  # programs that check signatures side by side
_EMAIL = re.compile(r"<([^<>]+)>")


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
