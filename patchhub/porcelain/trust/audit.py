"""Evidence for those who must answer. JSON only.

`audit` tells who changed which fact, when and why, on whose approval, with which evidence, and what was taken back. `export bom` and
`export attestations` write what speaks for a revision in the forms that other programs read."""

from __future__ import annotations

import base64
import csv as tables
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar, Final

from patchhub.errors import RevisionError, SettingsError
from patchhub.export import cyclonedx
from patchhub.fsio import os_errors, write_atomically
from patchhub.objects import Commit, Element, Request
from patchhub.porcelain.scores import Noted, guard, noted_commits, notes_of, numbers, read_note
from patchhub.porcelain.trust.signing import (
    Damage,
    Vouched,
    allowed_signers,
    approvers,
    differences_below,
    signatures_by_commit,
    vouched,
)
from patchhub.progress import Progress
from patchhub.results import Result
from patchhub.sets.elements import Place, places_of
from patchhub.signing.statements import fingerprint, key_id
from patchhub.store import states
from patchhub.store.store import Store, refuse_store
from patchhub.who import Signer

ADDED: Final = "added"
REMOVED: Final = "removed"
RETARGETED: Final = "retargeted"
KEPT: Final = "kept"


@dataclass(frozen=True)
class Evidence(Result):
    """What speaks for a commit.

    Attributes:
        guard: what the guard measured, and whether it was overruled; None where it was not asked.
        proof: the largest relative residual of the joint solution over the weights, as the commit says.
        scores: what was measured about it.
        signatures: who signed and approved it, checked.
        approved_by: whose approvals count: neither its author's nor its signer's.
    """

    guard: Mapping[str, Any] | None
    proof: float | None
    scores: tuple[Noted, ...]
    signatures: tuple[Vouched, ...]
    approved_by: tuple[str, ...]

    @property
    def signed_by(self) -> tuple[str, ...]:
        """Who signed it; of a signature that is not good, what is wrong with it."""
        found = [signature for signature in self.signatures if signature.kind in ("commit", None)]
        return tuple(str(s.principal) if s.status == "good" else f"{s.status} key {s.key}" for s in found)

    def words(self) -> str:
        said = []
        said.append(f"signed by {', '.join(self.signed_by)}" if self.signed_by else "not signed")
        said += [f"approved by {', '.join(self.approved_by)}"] if self.approved_by else []
        said.append(self.guard_words)
        said += [] if self.proof is None else [f"proof {self.proof:.1e}"]
        return "; ".join([*said, *self.score_words])

    @property
    def guard_words(self) -> str:
        """What the guard said, in a few words."""
        if self.guard is None:
            return "guard not asked"
        failed = "; ".join(self.guard["failed"])
        return f"guard overruled: {failed}" if failed else "guard passed"

    @property
    def score_words(self) -> list[str]:
        """The leading scores of each suite."""
        return [
            f"{noted.kind} {', '.join(f'{name} {score.value:.3f}' for name, score in noted.leading.items())}"
            for noted in self.scores
        ]


@dataclass(frozen=True)
class FactChange(Result):
    """One change of one fact by one commit.

    Attributes:
        why: the commit's message.
        change: ``added``, ``removed``, ``retargeted``, or ``kept`` for a prompt whose answer was to stay.
        fact: the prompt with its subject; of an imported change what it is, and empty where texts are withheld.
        before, after: what the model was to say; None where nothing was, or where that is withheld.
        request: the fact's id (of a change of target the new one); None for an imported change.
        undoes: the commit whose change this takes back.
        undone_by: the commit that took this back.
    """

    time: str
    commit: str
    author: str
    why: str
    change: str
    fact: str
    prompt: str
    subject: str
    before: str | None
    after: str | None
    request: str | None
    patch: str
    method: str
    undoes: str | None
    undone_by: str | None
    evidence: Evidence

    def words(self) -> str:
        return f"{self.time} {self.commit[:12]} {self.author}: {self.told}"

    @property
    def told(self) -> str:
        """The change in words, without who and when."""
        fact = self.fact or f"a fact whose text is withheld ({str(self.request)[:12]})"
        ends = " -> ".join(end for end in (self.before, self.after) if end is not None)
        return f"{self.change}: {fact} {ends}".rstrip()


@dataclass(frozen=True)
class Audit(Result):
    """What was ever changed below a revision, one row for each change of a fact, the oldest first.

    Attributes:
        base: the id of the base that all of it is about.
        commits: how many commits are below.
        since: rows before this instant are left out.
        unsigned: commits below that no allowed key signed.
        damage: what below is not what the commits' ids cover; see `verify`.
        proven: every commit down to the base is what its id says, and the base is this repository's.
    """

    TOLD: ClassVar = {"proven": "proven"}

    commit: str | None
    base: str
    commits: int
    since: str | None
    rows: tuple[FactChange, ...]
    unsigned: tuple[str, ...]
    damage: tuple[Damage, ...] = field(default=())

    @property
    def proven(self) -> bool:
        return not self.damage

    def words(self) -> str:
        return f"{len(self.rows)} changes in {self.commits} commits, {'' if self.proven else 'NOT '}proven back to the base"


def audit(
    repository: Store,
    revision: str,
    progress: Progress,
    *,
    since: str | None = None,
    allowed: Path | None = None,
    csv: Path | None = None,
) -> Audit:
    """All changes of facts below a revision, with what speaks for each.

    Of a merge only those changes are its own that neither side had made. A fact that is only recorded again is not changed.

    Args:
        since: leave out rows before this instant.
        allowed: a file of allowed signers; None: the config's.
        csv: a file to write the rows to as well, see `as_csv`.

    Raises:
        RevisionError: no such revision.
        CorruptStoreError: a commit or patch below cannot be read.
    """
    tip, keys = repository.resolve(revision), allowed_signers(repository.config, allowed)
    progress.stage("reading what is below", 0)
    damage = differences_below(repository, tip, progress)[1] if tip else []
    walked = [identity for identity, _ in repository.log(*([tip] if tip else []))]
    evidence = _Evidences(repository, walked, keys)
    rows = _Rows({identity: repository.parents(identity) for identity in reversed(walked)})
    texts = _Texts(repository)
    signed = set()
    for identity in reversed(walked):
        found = evidence.of(identity)
        signed |= {identity} if any(s.kind == "commit" and s.status == "good" for s in found.signatures) else set()
        for row in _rows(repository, identity, texts, found):
            rows.add(row)
        progress.advance(1)
    progress.close()
    kept = tuple(row for row in rows.rows if since is None or row.time >= since)
    unsigned = tuple(commit for commit in walked if commit not in signed)
    done = Audit(tip, repository.config.base_id, len(walked), since, kept, unsigned, tuple(damage))
    if csv is not None:
        write_atomically(csv, (as_csv(done).encode("utf-8"),))
    return done


class _Evidences:
    """What speaks for each of some commits: its own check, and the notes about it."""

    def __init__(self, repository: Store, commits: Sequence[str], keys: Path | None) -> None:
        self._repository = repository
        refs = repository.refs()
        self._notes = noted_commits(refs)
        entries = signatures_by_commit(refs)
        self._signatures: dict[str, list[Vouched]] = {}
        for found in vouched(repository, [entry for commit in commits for entry in entries.get(commit, ())], keys):
            self._signatures.setdefault(found.commit, []).append(found)

    def of(self, identity: str) -> Evidence:
        repository, commit = self._repository, self._repository.commit(identity)
        signatures = self._signatures.get(identity, [])
        return Evidence(
            guard=guard(commit.check),
            proof=max(map(float, numbers(commit.check, "proof")), default=None),
            scores=tuple(read_note(note, repository.note(note)) for note in self._notes.get(identity, ())),
            signatures=tuple(signatures),
            approved_by=tuple(approvers(commit.author, signatures)),
        )


class _Texts:
    """The facts of patches, each patch read once: at each place its fact, and where among its patch's it was given."""

    def __init__(self, repository: Store) -> None:
        self._repository = repository
        self._patches: dict[str, tuple[dict[str, int], dict[str, Request]]] = {}

    def get(self, place: Place) -> Request | None:
        """The fact at a place; None of an imported change, and where texts are withheld."""
        return self._read(place[0])[1].get(str(place[1]))

    def ordered(self, places: frozenset[Place]) -> list[Place]:
        """By patch, and then as the facts were given."""
        return sorted(places, key=lambda place: (place[0], self._read(place[0])[0].get(str(place[1]), 0)))

    def _read(self, identity: str) -> tuple[dict[str, int], dict[str, Request]]:
        if identity not in self._patches:
            patch = self._repository.patch(identity)
            texts = {request.id: request for request in self._repository.requests(patch)}
            self._patches[identity] = ({fact: number for number, fact in enumerate(patch.requests)}, texts)
        return self._patches[identity]


def _rows(repository: Store, identity: str, texts: _Texts, evidence: Evidence) -> Iterator[FactChange]:
    """The changes of one commit, by fact."""
    commit = repository.commit(identity)
    removed, added = _own_changes(repository, identity, commit)
    leaving, entering = places_of(repository, removed), places_of(repository, added)
    again = {request for _, request in leaving if request} & {request for _, request in entering if request}
    still = _still_active(repository, identity, commit) if leaving else set()
    gone = [place for place in texts.ordered(leaving) if place[1] not in again and place[1] not in still]
    come = [place for place in texts.ordered(entering) if place[1] not in again]
    before = {(text.prompt, text.subject): place for place in gone if (text := texts.get(place))}
    retargeted = set()
    for place in come:
        text = texts.get(place)
        earlier = before.pop((text.prompt, text.subject), None) if text else None
        old = texts.get(earlier) if earlier else None
        retargeted.add(earlier)
        yield _row(repository, identity, commit, evidence, place, text, RETARGETED if old else ADDED, old)
    for place in gone:
        if place not in retargeted:
            yield _row(repository, identity, commit, evidence, place, texts.get(place), REMOVED, None)


def _own_changes(repository: Store, identity: str, commit: Commit) -> tuple[frozenset[Element], frozenset[Element]]:
    """What a commit itself takes out and puts in: of a merge what no side had, and what it decided against."""
    if len(commit.parents) < 2:
        return commit.removed, commit.added
    merged = repository.active(identity)
    sides = [repository.active(parent) for parent in commit.parents]
    bases = states.merge_bases(commit.parents[0], commit.parents[1], repository.parents)
    common = frozenset[Element]().union(*(repository.active(base) for base in bases))
    union, everywhere = frozenset[Element]().union(*sides), sides[0].intersection(*sides[1:])
    return frozenset(e for e in union - merged if e in everywhere or e not in common), merged - union


def _still_active(repository: Store, identity: str, commit: Commit) -> set[str | None]:
    """Request ids that a merge holds, by whichever of its patches."""
    if len(commit.parents) < 2:
        return set()
    return {request for _, request in places_of(repository, repository.active(identity)) if request is not None}


def _row(
    repository: Store,
    identity: str,
    commit: Commit,
    evidence: Evidence,
    place: Place,
    text: Request | None,
    change: str,
    old: Request | None,
) -> FactChange:
    patch = repository.patch(place[0])
    imported = place[1] is None and patch.kind == "additive"
    if change == ADDED and place[1] in patch.settings.get("keeps", ()):
        change = KEPT
    target = text.target_new if text else None
    return FactChange(
        time=commit.time,
        commit=identity,
        author=commit.author,
        why=commit.message,
        change=change,
        fact=f"an imported change of {len(patch.weights)} weights" if imported else text.text if text else "",
        prompt=text.prompt if text else "",
        subject=text.subject if text else "",
        before=target if change == REMOVED else old.target_new if old else None,
        after=None if change == REMOVED else target,
        request=place[1],
        patch=place[0],
        method=patch.method,
        undoes=None,
        undone_by=None,
        evidence=evidence,
    )


class _Rows:
    """Rows as they come, each with the commit whose change it takes back, which is told so in its own row.

    What takes back is a removal of what was added, a fact that comes back, or one that gets its earlier target again.
    """

    def __init__(self, parents: Mapping[str, Sequence[str]]) -> None:
        self._parents = parents  # of each commit, the oldest first
        self._age = {commit: number for number, commit in enumerate(parents)}
        self._alike: dict[tuple[str, ...], list[int]] = {}
        self.rows: list[FactChange] = []

    def add(self, row: FactChange) -> None:
        alike = self._alike.setdefault((row.prompt, row.subject) if row.prompt else (row.request or row.patch,), [])
        for place in reversed(alike):
            earlier = self.rows[place]
            if earlier.undone_by is None and _takes_back(row, earlier) and self._is_below(earlier, row):
                self.rows[place] = replace(earlier, undone_by=row.commit)
                row = replace(row, undoes=earlier.commit)
                break
        alike.append(len(self.rows))
        self.rows.append(row)

    def _is_below(self, earlier: FactChange, row: FactChange) -> bool:
        """Whether the one's commit is an ancestor of the other's; nothing older is looked at."""
        oldest, seen, waiting = self._age[earlier.commit], {row.commit}, [row.commit]
        while waiting:
            fresh = {parent for parent in self._parents[waiting.pop()] if self._age[parent] >= oldest} - seen
            if earlier.commit in fresh:
                return True
            seen |= fresh
            waiting.extend(fresh)
        return False


def _takes_back(row: FactChange, earlier: FactChange) -> bool:
    if row.request is None or earlier.request is None:
        return row.patch == earlier.patch and (earlier.change, row.change) == (ADDED, REMOVED)
    if row.change == REMOVED:
        return row.request == earlier.request and earlier.change in (ADDED, KEPT, RETARGETED)
    same = (row.prompt, row.subject) == (earlier.prompt, earlier.subject) and bool(row.prompt)
    if row.change == RETARGETED and earlier.change == RETARGETED:
        return same and (row.before, row.after) == (earlier.after, earlier.before)
    return row.change == ADDED and earlier.change == REMOVED and row.request == earlier.request


# --- for people and for spreadsheets --------------------------------------------------------------------------------

COLUMNS: Final = (
    *(
        "time",
        "commit",
        "author",
        "why",
        "change",
        "prompt",
        "subject",
        "before",
        "after",
        "request",
        "patch",
        "method",
    ),
    *("undoes", "undone_by", "guard", "proof", "scores", "signed_by", "approved_by"),
)


def as_csv(found: Audit) -> str:
    """The rows as CSV with the columns `COLUMNS`; no cell is one that a spreadsheet would run as a formula."""
    buffer = io.StringIO()
    writer = tables.writer(buffer, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in found.rows:
        speaks = row.evidence
        writer.writerow(
            [
                *(inert(getattr(row, name)) for name in COLUMNS[:14]),
                inert(speaks.guard_words),
                "" if speaks.proof is None else f"{speaks.proof:.6g}",
                inert("; ".join(speaks.score_words)),
                inert(", ".join(speaks.signed_by)),
                inert(", ".join(speaks.approved_by)),
            ]
        )
    return buffer.getvalue()


def inert(value: str | None) -> str:
    """A cell that a spreadsheet takes as text: what would begin a formula there, or is hidden in front of one, is led by an apostrophe."""
    text = value or ""
    lead = text.lstrip()[:1]
    return f"'{text}" if text[:1] in ("\t", "\r", "\n") or (lead and lead in "=+-@\uff1d\uff0b\uff0d\uff20") else text


def by_commit(rows: Sequence[FactChange]) -> Iterator[list[FactChange]]:
    """Rows in groups of one commit, in their order."""
    group: list[FactChange] = []
    for row in rows:
        if group and row.commit != group[0].commit:
            yield group
            group = []
        group.append(row)
    if group:
        yield group


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
    base, stored = repository.config.base, repository.base
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
