"""From an address to its remote; and `push` without a terminal: from a store to a remote."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, Literal

from patchhub.canonical import one_line
from patchhub.errors import CorruptStoreError, RemoteError, RepositoryError, RevisionError, SettingsError
from patchhub.fsio import Span
from patchhub.objects import Commit
from patchhub.progress import Progress, Silent, stage_bytes
from patchhub.remotes import parcels
from patchhub.remotes.receive import Moved, check_base, local_name, short_name
from patchhub.remotes.remote import (
    FileRemote,
    FsspecFiles,
    LocalFiles,
    Publication,
    Remote,
    RemoteMovedError,
    Source,
    Tip,
    View,
)
from patchhub.results import Result, told
from patchhub.store import states
from patchhub.store.object_store import LARGEST_OBJECT
from patchhub.store.revisions import BRANCHES, NOTES, SYMBOLIC, TAGS
from patchhub.store.states import Reference, closure, references
from patchhub.store.store import Store
from patchhub.who import Who

HUB: Final = "hf://"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*/[A-Za-z0-9][\w.\-]*", re.ASCII)


def hub_id(address: str) -> str | None:
    """``user/repo`` of a Hub address; None for any other address.

    Raises:
        SettingsError: a Hub address that names no repository.
    """
    if not address.startswith(HUB):
        return None
    name = address[len(HUB) :].rstrip("/")
    if _HUB_ID.fullmatch(name) is None:
        raise SettingsError(f"{address} names no repository of the Hub", remedy="Write hf://user/repo.")
    return name


def normalised(address: str) -> str:
    """The address as it is kept: folders of this machine by their absolute path.

    Raises:
        SettingsError: it is empty, names no repository of the Hub, or has a scheme that nothing here opens.
    """
    if not address:
        raise SettingsError("the address of the remote is empty", remedy="Give a folder or hf://user/repo.")
    if hub_id(address) is not None:
        return address.rstrip("/")
    if "://" in address:
        _check_schemes(address.partition("://")[0])
        return address.rstrip("/")
    return str(Path(address).expanduser().resolve())


def _check_schemes(schemes: str) -> None:
    """Refuse schemes, such as ``s3`` or chained ``simplecache::s3``, that fsspec does not know."""
    import fsspec

    known = fsspec.available_protocols()
    for scheme in schemes.split("::"):
        if scheme not in known:
            raise SettingsError(
                f"no remote can be at {scheme}://",
                remedy=f"Give a folder, hf://user/repo, or an address that begins with one of {', '.join(sorted(known))}.",
                scheme=scheme,
            )


def open_remote(address: str, *, endpoint: str | None = None, token: str | None = None) -> Remote:
    """The remote at ``hf://user/repo``, at an fsspec address, or in a folder; nothing is read yet.

    Args:
        endpoint, token: of the Hub; None: as huggingface_hub finds them.
    """
    name = hub_id(address)
    if name is not None:
        from patchhub.remotes.hub import HubRemote

        return HubRemote(name, endpoint=endpoint, token=token)
    if "://" in address:
        return FileRemote(address, FsspecFiles(address))
    return FileRemote(address, LocalFiles(Path(address)))


Group = Literal["history", "texts", "states", "columns"]
"""What lies in packs of its own in a remote: texts can be withdrawn, and who wants a state needs neither texts nor columns."""

_PULL_FIRST: Final = "Run `patchhub pull`, then push again; --force-with-lease overwrites what the last fetch found."

Pages = Callable[[str, bool], Mapping[str, bytes | None]]
"""For a commit, and whether texts are withheld, the files that a remote shows to readers who have no patchhub."""


@dataclass(frozen=True)
class Pushed(Result):
    """One ref that was pushed, or would be.

    Attributes:
        moved: the ref, at the remote.
        objects, size: how many objects and bytes travel, without the pages.
        withdrawn: texts that were there before and that the ref does not show any more.
    """

    moved: Moved = field(metadata=told(inline=True))
    objects: int
    size: int = field(metadata=told(name="bytes"))
    withdrawn: int


@dataclass(frozen=True)
class _Plan:
    """A push of one ref, ready to go."""

    publication: Publication
    pushed: Pushed


@dataclass(frozen=True)
class Manner:
    """How a push goes.

    Attributes:
        private_facts: withhold the texts of requests; None: as the remote has it.
        lease: also move a branch sideways or back, where it is as this store last saw it.
        dry_run: send nothing.
    """

    private_facts: bool | None = None
    lease: bool = False
    dry_run: bool = False


FORWARD: Final = Manner()


@dataclass(frozen=True)
class Shown:
    """What a remote says beside its objects: about the base, and pages for readers without patchhub, made once per ref that moves."""

    source: Source
    pages: Pages


def push(
    repository: Store,
    remote: Remote,
    name: str,
    refs: Sequence[str],
    shown: Shown,
    *,
    who: Who,
    manner: Manner = FORWARD,
    vouch: Callable[[str, str, str | None], None] = lambda ref, commit, theirs: None,
    progress: Progress | None = None,
) -> list[Pushed]:
    """Bring branches and tags of this store to a remote, each fast-forward, one after the other.

    Args:
        refs: full names of branches and tags.
        vouch: called with each ref, where it is here and where it is there, before anything is sent; raises what speaks against it.
        progress: hears of a stage of bytes for each ref.

    Raises:
        RemoteMovedError: a ref of the remote is not behind ours; nothing of that ref was sent.
        RemoteError: not permitted or unreachable, or texts are to be withheld that a tag of the remote shows already.
    """
    view = remote.view()
    check_base(repository, remote, view)
    heard, asked = progress or Silent(), manner.private_facts
    withheld = bool(view.private) if asked is None else asked
    for ref in refs:
        tip = view.tips.get(ref)
        vouch(ref, repository.refs()[ref], tip.commit if tip else None)
    done = []
    for ref in refs:
        seen = repository.refs().get(local_name(ref, name)) if manner.lease and ref.startswith(BRANCHES) else None
        plan = _plan(repository, remote, view, ref, shown.source, withheld, asked=asked, seen=seen)
        if plan is None:
            continue
        if not manner.dry_run:
            publication = replace(plan.publication, pages=shown.pages(plan.publication.commit, withheld))
            stage_bytes(heard, f"pushing {one_line(short_name(ref))}", plan.pushed.size)
            remote.publish(publication, heard.advance)
            _remember(repository, name, ref, publication.commit, who=who)
            view = remote.view() if len(refs) > 1 else view  # what was just sent need not be sent again
        done.append(plan.pushed)
    return done


def delete(
    repository: Store, remote: Remote, name: str, names: Sequence[str], *, who: Who, dry_run: bool = False
) -> list[Pushed]:
    """Remove branches and tags of a remote that are where this store last saw them; what it sent for them stays there.

    Args:
        names: short or full names; a branch goes before a tag of the same name.

    Raises:
        RevisionError: nothing is named, or the remote has no such branch or tag.
        RemoteMovedError: one is not where it was seen.
        RemoteError: not permitted or unreachable.
    """
    if not names:
        raise RevisionError("nothing is named to delete", remedy="Name it: `patchhub push REMOTE --delete BRANCH`.")
    view = remote.view()
    chosen = [_there(remote, view, each) for each in names]
    for ref in chosen:
        seen = repository.refs().get(local_name(ref, name))
        if seen != view.tips[ref].commit:
            raise RemoteMovedError(
                f"{short_name(ref)} of {remote.address} is not where it was seen last",
                remedy="Run `patchhub fetch`, look at what is there, then delete it.",
                ref=ref,
                seen=seen,
                found=view.tips[ref].commit,
            )
    for ref in chosen if not dry_run else ():
        remote.remove(ref, view.tips[ref])
        if ref.startswith(BRANCHES):
            changes = {local_name(ref, name): (view.tips[ref].commit, None)}
            arguments = {"remote": name, "delete": ref}
            repository.move_refs(changes, command="push", arguments=arguments, author=who.author, time=who.time)
    return [Pushed(Moved(ref, view.tips[ref].commit, None), 0, 0, 0) for ref in chosen]


def _there(remote: Remote, view: View, name: str) -> str:
    for ref in (BRANCHES + name, TAGS + name, name):
        if ref in view.tips:
            return ref
    listed = ", ".join(map(short_name, view.tips))
    raise RevisionError(
        f"{remote.address} has no branch or tag {name!r}", remedy=f"It has {listed or 'none at all'}.", name=name
    )


def refs_to_push(repository: Store, names: Iterable[str], *, everything: bool, tags: bool) -> list[str]:
    """Full names of what the user wants to push: the current branch if nothing is said. Branches come before tags."""
    refs = repository.refs()
    chosen = [_full_name(name, refs) for name in names]
    if everything:
        chosen += [ref for ref in refs if ref.startswith((BRANCHES, TAGS))]
    if tags:
        chosen += [ref for ref in refs if ref.startswith(TAGS)]
    if not chosen:
        branch, head = repository.head
        if branch is None or head is None:
            raise RepositoryError("there is no branch to push here", remedy="Name a branch that has commits.")
        chosen = [BRANCHES + branch]
    return sorted(set(chosen))  # refs/heads before refs/tags


def _full_name(name: str, refs: Mapping[str, str]) -> str:
    for prefix in (BRANCHES, TAGS, ""):
        if (prefix + name).startswith((BRANCHES, TAGS)) and prefix + name in refs:
            return prefix + name
    remedy = "`patchhub branch` lists them."
    if ":" in name or name.startswith("+"):  # git's refspecs
        remedy = "A branch has one name here and there; `patchhub branch -m` renames, --force-with-lease overwrites."
        remedy = f"`patchhub push REMOTE --delete {name[1:]}` removes it there." if name[0] == ":" else remedy
    raise RevisionError(f"there is no branch or tag {name!r}", remedy=remedy, name=name)


def _plan(
    repository: Store,
    remote: Remote,
    view: View,
    ref: str,
    source: Source,
    withheld: bool,
    *,
    asked: bool | None,
    seen: str | None = None,
) -> _Plan | None:
    """What must travel so that the remote's ``ref`` can be where ours is; None if it is there already.

    Args:
        withheld: whether the texts of facts stay here.
        asked: whether the user said so, or said the contrary: then texts that were withheld from it are sent now.
        seen: where the ref may be overwritten, wherever ours is.
    """
    commit = repository.refs()[ref]
    tip = view.tips.get(ref)
    if tip is not None and tip.commit not in (commit, seen):
        _refuse_sideways(repository, remote, ref, tip.commit, commit)
    history = states.ancestors([commit], repository.parents)
    notes = _notes_of(repository, history, view)
    near = tip or _nearest(repository, view, ref, history, commit)
    there = remote.sizes(near) if near else {}
    withdrawn = _texts(repository).intersection(there) if withheld else set[str]()
    known = _already_there(repository, near, there) if withheld or asked is not False else set()
    roots = [Reference("commit", commit), *(Reference("note", note) for note in notes.values())]
    groups: dict[str, dict[str, Span]] = {}
    for kind, identity in _lacking(repository, roots, known, withheld=withheld):
        if identity not in there:
            groups.setdefault(kind, {})[identity] = repository.objects.place(identity)
    same = tip is not None and tip.commit == commit
    if same and ref.startswith(TAGS) and withdrawn and asked:
        raise _shown_at_tag(remote, ref)
    switched = withheld != (ref in view.private)
    if same and (ref.startswith(TAGS) or not (notes or groups or switched or withdrawn)):
        return None
    publication = Publication(
        ref=ref,
        commit=commit,
        expected=tip,
        near=near,
        groups=tuple(groups.values()),
        gathered=_gathered(repository, remote.alone(near), roots, withdrawn) if near else (),
        withdrawn=withdrawn,
        source=source,
        notes=notes,
        private_facts=withheld,
        pages={},
        message=_headline(repository.commit(commit)),
    )
    count, moved = sum(map(len, groups.values())), Moved(ref, tip.commit if tip else None, commit)
    return _Plan(publication, Pushed(moved, count, publication.size, len(withdrawn)))


def _gathered(
    repository: Store, alone: Collection[str], roots: Iterable[Reference], withdrawn: Collection[str]
) -> Sequence[Mapping[str, Span]]:
    """What a remote has as files of their own, where those are many, and this store sound: it is to lie in packs there."""
    if len(alone) < parcels.GATHER_FROM:
        return ()
    objects, groups = repository.objects, dict[str, dict[str, Span]]()
    for kind, identity in _lacking(repository, roots, set(), withheld=False):
        if identity in alone and identity not in withdrawn and objects.size(identity) <= LARGEST_OBJECT:
            with suppress(CorruptStoreError):  # what is damaged here stays as it is there
                objects.verify(identity)
                groups.setdefault(kind, {})[identity] = objects.place(identity)
    return tuple(groups.values())


def _shown_at_tag(remote: Remote, ref: str) -> RemoteError:
    return RemoteError(
        f"{ref[len(TAGS) :]} of {remote.address} shows the texts of its facts, and tags do not change",
        remedy="On the Hub delete the tag, elsewhere push a branch with --private-facts; then push the tag again.",
        ref=ref,
    )


def _refuse_sideways(repository: Store, remote: Remote, ref: str, theirs: str, ours: str) -> None:
    if ref.startswith(TAGS):
        raise RemoteError(
            f"{remote.address} has another {ref[len(TAGS) :]}, and tags do not move",
            remedy="Use another name for the tag.",
            ref=ref,
            theirs=theirs,
            ours=ours,
        )
    known = theirs in repository.commits(theirs)
    if not known or not states.is_ancestor(theirs, ours, repository.parents):
        reason = "has commits that are not in yours" if known else "has commits that you do not have"
        raise RemoteMovedError(
            f"{ref[len(BRANCHES) :]} of {remote.address} {reason}",
            remedy=_PULL_FIRST,
            ref=ref,
            theirs=theirs,
            ours=ours,
        )


def _notes_of(repository: Store, history: Collection[str], view: View) -> dict[str, str]:
    """Notes about those commits that the remote lacks or has otherwise, by ``commit/suite``."""
    notes = {ref[len(NOTES) :]: target for ref, target in repository.refs().items() if ref.startswith(NOTES)}
    return {
        key: note for key, note in notes.items() if key.partition("/")[0] in history and view.notes.get(key) != note
    }


def _nearest(repository: Store, view: View, ref: str, history: Collection[str], commit: str) -> Tip | None:
    """A tip to start a new ref from: the same commit, else the latest ancestor, else any that shares something.

    A branch that is there but holds nothing of patchhub is filled as it is.
    """
    if ref in view.empty:
        return None
    tips = sorted(view.tips.values(), key=lambda tip: tip.token)
    same = [tip for tip in tips if tip.commit == commit]
    below = [tip for tip in tips if tip.commit in history]
    latest = max(below, key=lambda tip: repository.rank(tip.commit), default=None)
    return next(iter(same), None) or latest or next(iter(tips), None)


def _already_there(repository: Store, tip: Tip | None, there: Mapping[str, int]) -> set[str]:
    """Commits whose whole closure a remote must have, because it has them and they are below its tip."""
    if tip is None or tip.commit not in repository.commits(tip.commit):
        return set()
    return {commit for commit in states.ancestors([tip.commit], repository.parents) if commit in there}


def _lacking(
    repository: Store, roots: Iterable[Reference], known: set[str], *, withheld: bool
) -> Iterator[tuple[Group, str]]:
    """The group and id of all that is reachable from ``roots`` without passing a known commit; texts only if not withheld."""
    columns = set[str]()

    def follow(reference: Reference) -> list[Reference]:
        if reference.id in known or reference.kind in ("tensors", "requests"):
            return []
        found = references(reference.kind, repository.objects.get(reference.id))
        if reference.kind == "patch":
            columns.update(below.id for below in found if below.kind == "tensors")
        return found

    for reference in closure(roots, follow):
        texts = reference.kind == "requests"
        if reference.id in known or (texts and (withheld or reference.id not in repository.objects)):
            continue
        if reference.kind == "tensors":
            yield "columns" if reference.id in columns else "states", reference.id
        else:
            yield "texts" if texts else "history", reference.id


def _texts(repository: Store) -> set[str]:
    """Ids of the texts of all facts that this store's refs lead to, whether they are here or not."""

    def follow(reference: Reference) -> list[Reference]:
        if reference.kind not in ("commit", "patch"):
            return []
        return references(reference.kind, repository.objects.get(reference.id))

    targets = {target for ref, target in repository.refs().items() if not ref.startswith(NOTES)}
    roots = [Reference("commit", target) for target in targets if not target.startswith(SYMBOLIC)]
    return {reference.id for reference in closure(roots, follow) if reference.kind == "requests"}


def _remember(repository: Store, name: str, ref: str, commit: str, *, who: Who) -> None:
    """Where the remote's branch is now, as the last `fetch` would have found it."""
    if not ref.startswith(BRANCHES):
        return
    local = local_name(ref, name)
    old = repository.refs().get(local)
    if old != commit:
        repository.move_refs(
            {local: (old, commit)},
            command="push",
            arguments={"remote": name, "ref": ref},
            author=who.author,
            time=who.time,
        )


def _headline(commit: Commit) -> str:
    line = (commit.message.strip().splitlines() or ["patchhub commit"])[0][:200]
    return one_line(line)
