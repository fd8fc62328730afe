"""Verbs that move or list refs, and those that keep a repository well.

`branch`, `switch`, `tag`, `reset`, `reflog`, `undo`, `redo` write no object; then `config`, `fsck` and `gc`.
No torch, and NumPy in `fsck` alone."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta, timezone
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Final

from patchhub.canonical import nfc
from patchhub.errors import RepositoryError, RevisionError, SettingsError
from patchhub.objects import Note, Operation
from patchhub.progress import Progress, increments
from patchhub.results import Result, told
from patchhub.sets.settings import as_text, known_setting, read_setting, refuse_beyond, refuse_fixed, without_metric
from patchhub.signing.statements import sign_as
from patchhub.store.config import Config, beside
from patchhub.store.database import Changes, invert
from patchhub.store.fsck import (
    NOTHING_PACKED,
    Garbage,
    Packed,
    Report,
    check,
    delete_garbage,
    every_commit,
    pack_objects,
    reindex,
    with_proofs,
)
from patchhub.store.revisions import (
    BRANCHES,
    HEAD,
    NOTES,
    REMOTES,
    SYMBOLIC,
    TAG_MESSAGES,
    TAGS,
    check_ref,
    follow,
    resolve_ref,
)
from patchhub.store.store import Store
from patchhub.who import FORMAT, Who


@dataclass(frozen=True)
class Named(Result):
    """A branch or a tag: its short name, its commit, that commit's first line (or the tag's own), and whether HEAD is on it."""

    name: str
    commit: str
    message: str
    current: bool

    def words(self) -> str:
        return f"{self.name}{' (current)' if self.current else ''} {self.commit[:12]} {self.message}"


@dataclass(frozen=True)
class Moved(Result):
    """What a verb of this module did: the ref it changed, and where that led before and leads now (commit ids)."""

    ref: str
    before: str | None
    after: str | None


@dataclass(frozen=True)
class Switched(Moved):
    """What `switch` did: a move of HEAD, and the branch that it is on now."""

    branch: str | None


@dataclass(frozen=True)
class Stepped(Result):
    """What `undo` or `redo` did.

    Attributes:
        operation: the id of the new operation.
        changes: per ref where it was and where it is.
        branch, head: where that leaves the repository.
        command: the command whose effect was taken away or brought back.
        commands: the same of each step, the first one first.
    """

    operation: str
    changes: Mapping[str, tuple[str | None, str | None]]
    branch: str | None
    head: str | None
    command: str = field(metadata=told(omit=True))
    commands: tuple[str, ...] = ()


@dataclass(frozen=True)
class RefEntry(Result):
    """One move of a ref: ``ago`` operations before now it came to ``commit`` (None: it was deleted, or has no commit)."""

    ago: int
    commit: str | None
    command: str
    author: str
    time: str
    message: str

    def words(self) -> str:
        return f"@{{{self.ago}}} {(self.commit or 'no commit')[:12]} {self.time} {self.command}: {self.message}"


@dataclass(frozen=True)
class Done(Result):
    """One operation: ``ago`` operations before now ``author`` ran ``command``, which moved ``refs``."""

    ago: int
    id: str
    command: str
    author: str
    time: str
    refs: tuple[str, ...]
    undoes: str | None

    def words(self) -> str:
        return f"@{{{self.ago}}} {self.time} {self.command}: {', '.join(map(short, self.refs))}"


def operations(repository: Store, *, limit: int | None = None) -> Iterator[Done]:
    """Every operation, the last one first; ``HEAD@{ago}`` is where HEAD was before those that are listed above it."""
    for ago, (identity, done) in enumerate(islice(repository.operations(), limit)):
        yield Done(ago, identity, done.command, done.author, done.time, tuple(done.changes), done.undoes)


def branches(repository: Store) -> list[Named]:
    """Every branch that has a commit, by name."""
    return _listed(repository, BRANCHES)


def remote_branches(repository: Store) -> list[Named]:
    """Every branch of a remote, where it was when it was last fetched or pushed, by name."""
    return _listed(repository, REMOTES)


def tags(repository: Store) -> list[Named]:
    """Every tag, by name; one with a message of its own says that."""
    refs = repository.refs()
    notes = {named: refs.get(_message_ref(named)) for named in _listed(repository, TAGS)}
    return [
        named if note is None else replace(named, message=_tag_message(repository, note))
        for named, note in notes.items()
    ]


def _message_ref(tag: Named) -> str:
    return f"{NOTES}{tag.commit}/{TAG_MESSAGES}{tag.name}"


def _tag_message(repository: Store, note: str) -> str:
    """The first line of what a tag says."""
    return next(iter(str(repository.note(note).settings.get("message", "")).splitlines()), "")


def only_name(name: str | None, revision: str | None) -> str:
    """The name of what is to be deleted; `SettingsError` where there is none, or a revision beside it."""
    if name is None or revision is not None:
        raise SettingsError(
            "--delete takes one name", remedy="Give the name of what shall be removed, and nothing else."
        )
    return name


def switch_as(
    repository: Store, name: str, revision: str | None, who: Who, *, create: bool = False, detached: bool = False
) -> Switched:
    """`switch`, `switch_to_new` under ``create``, or `detach`; errors as theirs.

    Raises:
        SettingsError: both are asked for, or there is a revision without ``create``.
    """
    if (create and detached) or (revision is not None and not create):
        raise SettingsError(
            "switch takes a branch, or -c NAME [REV], or --detach REV", remedy="Give one of these forms."
        )
    if create:
        moved = switch_to_new(repository, name, revision or HEAD, who)
    else:
        moved = detach(repository, name, who) if detached else switch(repository, name, who)
    return Switched(moved.ref, moved.before, moved.after, repository.head[0])


def create_branch(repository: Store, name: str, revision: str, who: Who) -> Moved:
    """Make a branch at a revision; HEAD stays where it is.

    Raises:
        RevisionError: no such revision, or a name that cannot be used.
        RepositoryError: the branch exists.
    """
    return _create(repository, BRANCHES + name, revision, "branch", who)


def create_tag(repository: Store, name: str, revision: str, who: Who) -> Moved:
    """Make a tag at a revision, signed where ``who`` has a key, with its message as a note; it never moves.

    Raises:
        RevisionError: no such revision, or a name that cannot be used.
        RepositoryError: the tag exists.
    """
    check_ref(TAGS + name)
    commit = _commit(repository, revision)
    beside = dict(sign_as(repository, who, "tag", commit, tag=name)) if who.signer else {}
    if who.message.strip():
        settings = {"message": nfc(who.message).strip(), "tag": name}
        note = Note(commit=commit, made_by=who.author, scores={}, settings=settings, suite=TAG_MESSAGES + name)
        ref = f"{NOTES}{commit}/{note.suite}"
        beside[ref] = (repository.refs().get(ref), repository.objects.put(note.to_json()))
    return _create(repository, TAGS + name, revision, "tag", who, beside)


def delete_branch(repository: Store, name: str, who: Who) -> Moved:
    """Remove a branch, not its commits: the operation log still leads to them.

    Raises:
        RevisionError: no such branch.
        RepositoryError: HEAD is on it.
    """
    ref = _existing(repository, BRANCHES, name, "`patchhub branch` lists what there is.")
    if ref == current_ref(repository):
        raise RepositoryError(
            f"{name} is the current branch", remedy="Switch to another branch first: `patchhub switch NAME`.", ref=ref
        )
    return _delete(repository, ref, "branch", who)


def rename_branch(repository: Store, old: str | None, new: str, who: Who) -> Moved:
    """Give a branch another name; None: the current one.

    Raises:
        RevisionError: no such branch, or a name that cannot be used.
        RepositoryError: there is a branch of the new name, or HEAD is on no branch.
    """
    here = current_ref(repository)
    if old is None and here == HEAD:
        raise RepositoryError("HEAD is on no branch", remedy="Name the branch to rename: `patchhub branch -m OLD NEW`.")
    ref = here if old is None else _existing(repository, BRANCHES, old, "`patchhub branch` lists what there is.")
    _refuse_existing(repository, BRANCHES + new)
    refs = repository.refs()
    commit = refs.get(ref)
    changes: dict[str, tuple[str | None, str | None]] = {}
    if commit is not None:
        changes = {ref: (commit, None), BRANCHES + new: (None, commit)}
    if ref == here:
        changes[HEAD] = (refs[HEAD], SYMBOLIC + BRANCHES + new)
    _move(repository, changes, "branch", {"rename": short(ref), "to": new}, who)
    return Moved(BRANCHES + new, None, commit)


def delete_tag(repository: Store, name: str, who: Who) -> Moved:
    """Remove a tag; `RevisionError` if there is none of that name."""
    return _delete(repository, _existing(repository, TAGS, name, "`patchhub tag` lists what there is."), "tag", who)


def switch(repository: Store, name: str, who: Who) -> Moved:
    """Put HEAD on a branch. One that only a remote has is made here first, where the remote's is; ``-`` is where HEAD was before.

    Raises:
        RevisionError: no such branch, or several remotes have one; the remedy says how to look at a tag or commit of that name.
    """
    if name == "-":
        return _move_head(repository, _head_before(repository), who)
    there = _of_remotes(repository, name)
    if there:
        return switch_to_new(repository, name, _only(there, name), who)
    new = f"Make it with `patchhub switch -c {name}`, or look at a tag or commit with `patchhub switch --detach REV`."
    return _move_head(repository, SYMBOLIC + _existing(repository, BRANCHES, name, new), who)


def _head_before(repository: Store) -> str:
    """What HEAD was before its last move: a branch that is there still, or a commit.

    Raises:
        RevisionError: it has not moved, or only from branches that are no more.
    """
    refs = repository.refs()
    moves = [operation.changes[HEAD][0] for _, operation in repository.operations() if HEAD in operation.changes]
    gone = {old for old in moves if old is None or (old.startswith(SYMBOLIC) and old[len(SYMBOLIC) :] not in refs)}
    before = next((old for old in moves if old not in gone and old != refs[HEAD]), None)
    if before is None:
        raise RevisionError("HEAD was on no other branch before", remedy="`patchhub branch` lists the branches.")
    return before


def _of_remotes(repository: Store, name: str) -> list[str]:
    """The refs of remotes' branches of that name, where there is no branch of that name here."""
    refs = repository.refs()
    if BRANCHES + name in refs or refs[HEAD] == SYMBOLIC + BRANCHES + name:
        return []
    return [ref for ref in refs if ref.startswith(REMOTES) and ref[len(REMOTES) :].partition("/")[2] == name]


def _only(refs: Sequence[str], name: str) -> str:
    if len(refs) > 1:
        listed = ", ".join(ref[len(REMOTES) :] for ref in refs)
        raise RevisionError(
            f"{name} is a branch of several remotes: {listed}",
            remedy=f"Say which: `patchhub switch -c {name} {refs[0][len(REMOTES) :]}`.",
            name=name,
        )
    return refs[0]


def switch_to_new(repository: Store, name: str, revision: str, who: Who) -> Moved:
    """Make a branch at a revision and put HEAD on it. At `base` the branch begins with the next commit.

    Raises:
        RevisionError: no such revision, or a name that cannot be used.
        RepositoryError: the branch exists.
    """
    ref = BRANCHES + name
    _refuse_existing(repository, ref)
    commit = repository.resolve(revision)
    made: Changes = {} if commit is None else {ref: (None, commit)}
    return _move_head(repository, SYMBOLIC + ref, who, made)


def detach(repository: Store, revision: str, who: Who) -> Moved:
    """Put HEAD on a commit, on no branch; `RevisionError` if there is no such commit."""
    return _move_head(repository, _commit(repository, revision), who)


def reset(repository: Store, revision: str, who: Who) -> Moved:
    """Move the current branch (or a detached HEAD) to a revision; at `base`, a branch has no commits any more.

    Raises:
        RevisionError: no such revision.
    """
    ref, target = current_ref(repository), repository.resolve(revision)
    if target is None and ref == HEAD:
        target = _commit(repository, revision)
    _, before = repository.head
    if target != before:
        _move(repository, {ref: (before, target)}, "reset", {"revision": revision}, who)
    return Moved(ref, before, target)


def reflog(repository: Store, name: str = HEAD, *, limit: int | None = None) -> Iterator[RefEntry]:
    """Each operation that moved a ref, the last one first; ``name@{ago}`` resolves to its commit.

    Branches and tags that were deleted are found as well. Following HEAD means following the branch it was on.

    Raises:
        RevisionError: nothing ever had that name.
    """
    entries = islice(_ref_entries(repository, _ref_ever(repository, name)), limit)
    first = next(entries, None)
    if first is None:
        _existing(repository, BRANCHES, name, _REFLOG)
    else:
        yield first
        yield from entries


def current_ref(repository: Store) -> str:
    """The full name of the branch that HEAD is on; ``HEAD`` itself where it is detached."""
    target = repository.refs()[HEAD]
    return target[len(SYMBOLIC) :] if target.startswith(SYMBOLIC) else HEAD


def short(ref: str) -> str:
    """A ref's name as people write it."""
    return ref.removeprefix(BRANCHES).removeprefix(TAGS)


def _listed(repository: Store, namespace: str) -> list[Named]:
    current = current_ref(repository)
    return [
        Named(ref[len(namespace) :], commit, _first_line(repository, commit), ref == current)
        for ref, commit in sorted(repository.refs().items())
        if ref.startswith(namespace)
    ]


def _create(repository: Store, ref: str, revision: str, command: str, who: Who, beside: Changes | None = None) -> Moved:
    _refuse_existing(repository, ref)
    commit = _commit(repository, revision)
    _move(repository, {ref: (None, commit), **(beside or {})}, command, {"name": short(ref), "revision": revision}, who)
    return Moved(ref, None, commit)


def _delete(repository: Store, ref: str, command: str, who: Who) -> Moved:
    refs = repository.refs()
    commit = refs[ref]
    gone = [ref, f"{NOTES}{commit}/{TAG_MESSAGES}{short(ref)}" if command == "tag" else ref]
    _move(repository, {name: (refs[name], None) for name in gone if name in refs}, command, {"delete": short(ref)}, who)
    return Moved(ref, commit, None)


def _move_head(repository: Store, target: str, who: Who, made: Changes | None = None) -> Moved:
    refs = repository.refs()
    if made or refs[HEAD] != target:
        changes = {HEAD: (refs[HEAD], target), **(made or {})}
        _move(repository, changes, "switch", {"to": short(target.removeprefix(SYMBOLIC))}, who)
    return Moved(HEAD, follow(HEAD, refs), follow(HEAD, repository.refs()))


def _move(repository: Store, changes: Changes, command: str, arguments: Mapping[str, Any], who: Who) -> Operation:
    return repository.move_refs(changes, command=command, arguments=arguments, author=who.author, time=who.time)


def _commit(repository: Store, revision: str) -> str:
    commit = repository.resolve(revision)
    if commit is None:
        raise RevisionError(
            f"{revision} is the unpatched model, not a commit",
            remedy="Name a commit, or start a branch there with `patchhub switch -c NAME base`.",
        )
    return commit


def _refuse_existing(repository: Store, ref: str) -> None:
    check_ref(ref)
    refs = repository.refs()
    if ref in refs or refs[HEAD] == SYMBOLIC + ref:
        kind, remedy = ("tag", "Tags do not move; use another name.") if ref.startswith(TAGS) else ("branch", _MOVE)
        raise RepositoryError(f"the {kind} {short(ref)} exists", remedy=remedy, ref=ref, commit=refs.get(ref))


_MOVE = "Use another name, or switch to it and move it with `patchhub reset REV`."


_REFLOG = "`patchhub reflog` lists what HEAD was; `patchhub branch` and `patchhub tag` list what there is."


def _existing(repository: Store, namespace: str, name: str, remedy: str) -> str:
    """The full name of a branch or tag that exists; a branch that HEAD is on and that has no commit yet counts.

    Raises:
        RevisionError: there is none; `remedy` is what to do where none has a similar name.
    """
    refs = repository.refs()
    ref = name if name.startswith(namespace) else namespace + name
    if ref in refs or refs[HEAD] == SYMBOLIC + ref:
        return ref
    kind = "branch" if namespace == BRANCHES else "tag"
    known = [found[len(namespace) :] for found in refs if found.startswith(namespace)]
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"Did you mean {close[0]}?" if close else remedy
    raise RevisionError(f"there is no {kind} {name!r}", remedy=hint, name=name)


def _ref_ever(repository: Store, name: str) -> str:
    """The full name of a ref that exists, or else of the branch or tag that may have had that name."""
    present = resolve_ref(name, repository.refs())
    if present is not None or name.startswith("refs/"):
        return present or name
    moved = {ref for _, operation in repository.operations() for ref in operation.changes}
    return next((prefix + name for prefix in (BRANCHES, TAGS) if prefix + name in moved), BRANCHES + name)


def _ref_entries(repository: Store, ref: str) -> Iterator[RefEntry]:
    view = repository.refs()
    for ago, (_, operation) in enumerate(repository.operations()):
        earlier = _applied(view, invert(operation.changes))
        commit = follow(ref, view)
        if commit != follow(ref, earlier) or view.get(ref) != earlier.get(ref):
            message = "" if commit is None else _first_line(repository, commit)
            yield RefEntry(ago, commit, operation.command, operation.author, operation.time, message)
        view = earlier


def _applied(refs: Mapping[str, str], changes: Changes) -> dict[str, str]:
    targets = {**refs, **{ref: new for ref, (_, new) in changes.items()}}
    return {ref: target for ref, target in targets.items() if target is not None}


def _first_line(repository: Store, commit: str) -> str:
    return next(iter(repository.commit(commit).message.splitlines()), "")


def undo(repository: Store, *, who: Who, steps: int = 1, everything: bool = True) -> Stepped:
    """Put every ref back to where it was before the last operation; repeated, it walks further back.

    Args:
        steps: how many operations to take back, at once.
        everything: whatever they were; else those that moved a branch or a tag, and moves of HEAD, remote branches and notes stay.
    """
    return _stepped(
        repository, *repository.undo_several(steps, author=who.author, time=who.time, everything=everything)
    )


def redo(repository: Store, *, who: Who) -> Stepped:
    """Reverse the last `undo`."""
    return _stepped(repository, repository.redo(author=who.author, time=who.time))


def _stepped(repository: Store, *operations: Operation) -> Stepped:
    known, commands = dict(repository.operations()), []
    changes: dict[str, tuple[str | None, str | None]] = {}
    for operation in operations:
        first = operation
        while first.undoes is not None:
            first = known[first.undoes]
        commands.append(first.command)
        for ref, (old, new) in operation.changes.items():
            changes[ref] = (changes.get(ref, (old, new))[0], new)
    return Stepped(operations[-1].id, changes, *repository.head, commands[-1], tuple(commands))


def config(repository: Store, key: str | None = None, value: Any = None, *, unset: bool = False) -> Any:
    """All settings that differ from their defaults; or one, or one that is set or unset, as it is then.

    Raises:
        SettingsError, RepositoryError: as `config_set` and `config_unset`.
    """
    if key is None:
        return config_values(repository)
    if unset:
        return config_unset(repository, key)
    return config_get(repository, key) if value is None else config_set(repository, key, as_text(value))


def config_values(repository: Store) -> dict[str, Any]:
    """Every setting that differs from its default."""
    values = {"base.path": repository.config.base_place(repository.root), **repository.config.settings}
    return dict(sorted(values.items()))


def config_get(repository: Store, key: str) -> Any:
    """One setting, None where the default holds.

    Raises:
        SettingsError: there is no such key.
    """
    known_setting(key)
    return config_values(repository).get(key)


def config_set(repository: Store, key: str, text: str) -> Any:
    """Set one key from text; returns the value.

    Raises:
        SettingsError: no such key, or the value cannot be used.
        RepositoryError: facts are recorded with the metric already, so its settings are fixed.
    """
    known_setting(key)
    refuse_fixed(repository, key)
    value = read_setting(key, text)
    refuse_beyond(repository, key, value)
    if key in ("sign.key", "sign.allowed"):
        value = _file(value)
    if key == "base.path":
        if not Path(value).is_dir():
            raise SettingsError(f"there is no folder {value}", remedy="Give the base model's folder.")
        if not (Path(value) / "config.json").is_file():
            raise SettingsError(
                f"there is no model in {value}: it has no config.json", remedy="Give the base model's folder."
            )
        near = beside(Path(value), repository.root)
        place = {"path": str(Path(value).resolve()), "revision": None, "near": near}
        repository.change_config(lambda config: replace(config, base={**config.base, **place}))
    else:
        repository.change_config(
            lambda config: without_metric(key, replace(config, settings={**config.settings, key: value}))
        )
    return value


def _file(text: str) -> str:
    """The absolute path of a file that is there."""
    path = Path(text).expanduser().resolve()
    if not path.is_file():
        raise SettingsError(f"there is no file {path}", remedy="Give the file of the key, or of the allowed signers.")
    return str(path)


def config_unset(repository: Store, key: str) -> None:
    """Go back to the default.

    Raises:
        SettingsError: there is no such key, or it has no default.
        RepositoryError: as in `config_set`.
    """
    known_setting(key)
    if key == "base.path":
        raise SettingsError(
            "base.path has no default: a store is about one base",
            remedy="Say where it is: `patchhub config base.path FOLDER`.",
        )
    refuse_fixed(repository, key)

    def without(config: Config) -> Config:
        kept = {name: value for name, value in config.settings.items() if name != key}
        return without_metric(key, replace(config, settings=kept))

    repository.change_config(without)


def fsck(repository: Store, progress: Progress, *, rebuild: bool = False) -> Report:
    """Check a whole store, and prove the weights of its commits where nothing is damaged.

    Args:
        rebuild: make its derived tables again first.
    """
    if rebuild:
        reindex(repository)
    progress.stage("checking objects", sum(1 for _ in repository.objects.ids()))
    report = check(repository, progress=increments(progress))
    commits = every_commit(repository) if report.sound else []
    if commits:
        from patchhub.sets.proofs import prove  # it needs NumPy

        progress.stage("proving weights", 0)
        tips = repository.refs().values()
        report = with_proofs(repository, report, prove(repository, commits, tips=tips, advance=progress.advance))
    progress.close()
    return report


GRACE: Final = timedelta(days=14)


@dataclass(frozen=True)
class Collected(Result):
    """What was deleted, or would be (`dry_run`), and what was packed."""

    TOLD: ClassVar = {"bytes": "size"}

    items: tuple[Garbage, ...]
    dry_run: bool
    packed: Packed = NOTHING_PACKED

    def words(self) -> str:
        would = "would " if self.dry_run else ""
        deleted = f"{'delete' if would else 'deleted'} {len(self.items)} files, {self.size / 1e6:.2f} MB"
        packed = (
            f"; {would}{'pack' if would else 'packed'} {self.packed.objects} objects into {self.packed.packs} packs"
        )
        return f"{would}{deleted}{packed if self.packed.objects else ''}"

    @property
    def size(self) -> int:
        """Bytes in all."""
        return sum(item.size for item in self.items)

    @property
    def counts(self) -> Mapping[str, int]:
        """How many of each kind."""
        return Counter(item.kind for item in self.items)


def collect(
    repository: Store, *, now: str, grace: timedelta = GRACE, dry_run: bool = False, pack: bool = False
) -> Collected:
    """Delete objects that neither refs, notes nor any operation of the log lead to, leftovers of interrupted writes, and cached
    factors of metrics that nothing names; all of them only if older than `grace`.

    What the operation log reaches is never deleted, however old: `undo` always works.

    Args:
        pack: put objects that are files of their own into packs then.

    Raises:
        CorruptStoreError: the store is damaged; nothing was deleted.
    """
    before = (datetime.strptime(now, FORMAT).replace(tzinfo=timezone.utc) - grace).timestamp()
    found = tuple(delete_garbage(repository, before, dry_run=dry_run))
    packed = pack_objects(repository, dry_run=dry_run) if pack else NOTHING_PACKED
    return Collected(found, dry_run, packed)
