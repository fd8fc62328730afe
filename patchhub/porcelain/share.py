"""Verbs that share: `remote`, `push`, `fetch`, `pull`, `clone`. NumPy, and torch in `clone` alone."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final

from patchhub.errors import PatchhubError, RemoteError, RepositoryError, SettingsError
from patchhub.fsio import is_shared
from patchhub.objects import block_of
from patchhub.porcelain.trust.signing import admission, allowed_signers, refuse_left_out, refuse_unapproved
from patchhub.progress import Progress
from patchhub.remotes import receive, sync
from patchhub.remotes.receive import Fetched, Intake, Limits
from patchhub.remotes.remote import Remote, Source
from patchhub.remotes.sync import FORWARD, Manner, Pushed, hub_id, normalised, open_remote
from patchhub.results import Result, told
from patchhub.store.config import Config, Recording
from patchhub.store.database import FETCH, INIT
from patchhub.store.revisions import BRANCHES, HEAD, REMOTES, SYMBOLIC
from patchhub.store.states import Proofs
from patchhub.store.store import DIRECTORY, Store
from patchhub.who import Who

if TYPE_CHECKING:
    from patchhub.porcelain.merge import Merged, Stopped

ORIGIN: Final = "origin"

_KEY = "remote."
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


def remotes(repository: Store) -> dict[str, str]:
    """Address of every remote by name."""
    settings = repository.config.settings
    return {key[len(_KEY) :]: str(value) for key, value in sorted(settings.items()) if key.startswith(_KEY)}


def remote_add(repository: Store, name: str, address: str) -> str:
    """Give an address a name; returns the address as it is kept.

    Raises:
        SettingsError: a name or an address that cannot be used, or a name that is taken.
    """
    _refuse_name(repository, name)
    kept = normalised(address)
    _change_settings(repository, lambda settings: {**settings, _KEY + name: kept})
    return kept


def _refuse_name(repository: Store, name: str) -> None:
    if _NAME.fullmatch(name) is None:
        raise SettingsError(f"{name!r} cannot name a remote", remedy="Use letters, digits, `-` and `_`.")
    if name in remotes(repository):
        raise SettingsError(
            f"there is a remote {name} already",
            remedy=f"`patchhub remote set-url {name} ADDRESS` gives it another address.",
        )


def remote_set_url(repository: Store, name: str, address: str) -> str:
    """Give a remote another address; where its branches were stays as it was seen. Returns the address as it is kept.

    Raises:
        SettingsError: there is none of that name, or the address cannot be used.
    """
    address_of(repository, name)
    kept = normalised(address)
    _change_settings(repository, lambda settings: {**settings, _KEY + name: kept})
    return kept


def remote_remove(repository: Store, name: str, *, who: Who) -> None:
    """Forget a remote and where its branches were; `SettingsError` if there is none of that name."""
    address_of(repository, name)
    prefix = f"{REMOTES}{name}/"
    gone: dict[str, tuple[str | None, str | None]] = {
        ref: (target, None) for ref, target in repository.refs().items() if ref.startswith(prefix)
    }
    if gone:
        repository.move_refs(gone, command="remote", arguments={"remove": name}, author=who.author, time=who.time)
    _change_settings(repository, lambda settings: {k: v for k, v in settings.items() if k != _KEY + name})


def remote_rename(repository: Store, old: str, new: str, *, who: Who) -> str:
    """Give a remote another name, and its branches here with it; returns its address.

    Raises:
        SettingsError: there is none of the old name, or the new one is taken or cannot be used.
    """
    address = address_of(repository, old)
    _refuse_name(repository, new)
    prefix = f"{REMOTES}{old}/"
    changes: dict[str, tuple[str | None, str | None]] = {}
    for ref, target in repository.refs().items():
        if ref.startswith(prefix):
            changes |= {ref: (target, None), f"{REMOTES}{new}/{ref[len(prefix) :]}": (None, target)}
    if changes:
        arguments = {"rename": old, "to": new}
        repository.move_refs(changes, command="remote", arguments=arguments, author=who.author, time=who.time)
    _change_settings(
        repository,
        lambda settings: {_KEY + new if key == _KEY + old else key: value for key, value in settings.items()},
    )
    return address


def address_of(repository: Store, name: str) -> str:
    """The address of a remote; `SettingsError` if there is none of that name."""
    known = remotes(repository)
    if name not in known:
        listed = f"The remotes are {', '.join(known)}." if known else "Add one: `patchhub remote add NAME ADDRESS`."
        raise SettingsError(f"there is no remote {name!r}", remedy=listed)
    return known[name]


def default_remote(repository: Store) -> str:
    """The only remote, or ``origin``."""
    known = remotes(repository)
    return next(iter(known)) if len(known) == 1 else ORIGIN


def _change_settings(repository: Store, change: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> None:
    repository.change_config(lambda config: replace(config, settings=change(config.settings)))


MAX_BYTES: Final = 64 << 30
"""What one fetch may download unless told otherwise."""


@dataclass(frozen=True)
class Access:
    """How the Hub is reached: None for what huggingface_hub finds by itself."""

    endpoint: str | None = None
    token: str | None = None


DEFAULT_ACCESS: Final = Access()


@dataclass(frozen=True)
class Pulled(Result):
    """What `pull` did: what came, and what the current branch then did; None where the remote has no such branch."""

    fetched: Fetched
    merged: Merged | Stopped | None


@dataclass(frozen=True)
class Cloned(Result):
    """What `clone` made."""

    TOLD: ClassVar = {"proofs": "proofs"}

    store: Path
    branch: str | None
    commit: str | None
    fetched: Fetched = field(metadata=told(omit=True))

    @property
    def proofs(self) -> Proofs:
        """What was proven of the commits that came."""
        return self.fetched.proofs


# --- push, fetch, pull ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chosen:
    """Which refs a push is about.

    Attributes:
        names: of branches and tags; none of them, the current branch.
        everything: all branches and tags; they move one after the other, not at once.
        tags: all tags.
        delete: remove them there instead; ``names`` must name them.
    """

    names: Sequence[str] = ()
    everything: bool = False
    tags: bool = False
    delete: bool = False


CURRENT: Final = Chosen()


def push(
    repository: Store,
    name: str,
    chosen: Chosen,
    progress: Progress,
    *,
    who: Who,
    manner: Manner = FORWARD,
    access: Access = DEFAULT_ACCESS,
) -> list[Pushed]:
    """Bring branches and tags to a remote; returns those that moved or, in a dry run, would.

    Raises:
        RemoteError: not fast-forward, not permitted, unreachable; refs that were not pushed are as they were.
        SignatureError: the policy of a branch asks for more approvals; nothing was pushed.
    """
    address = address_of(repository, name)
    remote = open_remote(address, endpoint=access.endpoint, token=access.token)
    if chosen.delete:
        return sync.delete(repository, remote, name, chosen.names, who=who, dry_run=manner.dry_run)
    refs = sync.refs_to_push(repository, chosen.names, everything=chosen.everything, tags=chosen.tags)
    progress.stage("pushing", 0)
    shown = sync.Shown(_source(repository), _pages(repository, address, progress))
    vouch = partial(refuse_unapproved, repository)
    pushed = sync.push(repository, remote, name, refs, shown, who=who, manner=manner, vouch=vouch, progress=progress)
    progress.close()
    return pushed


def fetch(
    repository: Store,
    name: str,
    progress: Progress,
    *,
    who: Who,
    trust: bool = False,
    repair: bool = False,
    prune: bool = False,
    max_bytes: int = MAX_BYTES,
    require_signed: Path | None = None,
    access: Access = DEFAULT_ACCESS,
) -> Fetched:
    """Bring all that a remote has here, each byte verified and weights proven; branches as ``refs/remotes/<name>/*``.

    Args:
        trust: accept weights that are not those of their facts.
        repair: check everything reachable, and fetch again what is damaged or missing here.
        prune: forget where branches were that the remote does not have any more.
        max_bytes: refuse to download more.
        require_signed: a file of allowed signers; branches and tags that none of them signed are left out.

    Raises:
        RemoteError: unreachable, about another base, it holds something the format does not allow, or weights that are not those of
            their facts.
        SignatureError: a signature is broken.
    """
    remote = open_remote(address_of(repository, name), endpoint=access.endpoint, token=access.token)
    options: dict[str, Any] = {"trust": trust, "repair": repair, "prune": prune, "require_signed": require_signed}
    return _fetch(repository, remote, name, progress, who=who, max_bytes=max_bytes, **options)


def pull(
    repository: Store,
    name: str,
    progress: Progress,
    who: Who,
    *,
    trust: bool = False,
    max_bytes: int = MAX_BYTES,
    require_signed: Path | None = None,
    access: Access = DEFAULT_ACCESS,
) -> Pulled:
    """`fetch`, then bring the remote's branch of the same name into the current branch: fast-forward or merge.

    Raises:
        RepositoryError: HEAD is on no branch.
        RemoteError: as in `fetch`.
        SignatureError: as in `fetch`, or under ``require_signed`` nobody of those signed the branch.
    """
    branch, _ = repository.head
    if branch is None:
        raise RepositoryError("HEAD is on no branch", remedy="Switch to a branch, or use `patchhub fetch`.")
    options: dict[str, Any] = {"trust": trust, "max_bytes": max_bytes, "require_signed": require_signed}
    fetched = fetch(repository, name, progress, who=who, access=access, **options)
    ref = f"{REMOTES}{name}/{branch}"
    refuse_left_out(ref, fetched.left_out)
    if ref not in repository.refs():
        return Pulled(fetched, None)
    from patchhub.porcelain.merge import merge  # it needs NumPy, which a remote's name does not

    return Pulled(fetched, merge(repository, ref, who))


def _fetch(
    repository: Store,
    remote: Remote,
    name: str,
    progress: Progress,
    *,
    who: Who,
    trust: bool = False,
    repair: bool = False,
    prune: bool = False,
    max_bytes: int = MAX_BYTES,
    require_signed: Path | None = None,
) -> Fetched:
    from patchhub.sets.columns import tensor_check, tensor_shapes, weight_shapes  # they need NumPy
    from patchhub.sets.proofs import prove

    progress.stage("fetching", 0)
    if remote.view().source is None:
        raise _nothing_at(remote.address)
    weights, linear = weight_shapes(repository), tensor_shapes(repository)
    intake = Intake(Limits(max_bytes, weights, linear), tensor_check(weights, linear), repair)
    admit = admission(repository, remote.address, require_signed, progress)
    entry = receive.Entry(lambda commits, tips: prove(repository, commits, tips=tips), trust, admit)
    fetched = receive.fetch(repository, remote, name, intake, who=who, entry=entry, prune=prune, progress=progress)
    for warning in fetched.warnings:
        progress.warn(warning)
    progress.close()
    _adopt_recording(
        repository, sorted({target for ref, target in repository.refs().items() if ref.startswith(REMOTES)})
    )
    return fetched


def _nothing_at(address: str) -> RemoteError:
    """The error for a remote that is empty, or that cannot be seen: the Hub does not tell which."""
    private = " If it is private, log in first: `hf auth login`." if hub_id(address) else ""
    return RemoteError(
        f"{address} holds no patchhub store",
        remedy=f"Check the address, or push to it first.{private}",
        address=address,
    )


def _adopt_recording(repository: Store, commits: Sequence[str]) -> None:
    """Pin the metric and the contexts of what was fetched, now or by a fetch that died before it did, if this store has none: its next
    facts must fit."""
    for commit in commits if repository.config.recording is None else ():
        for patch in map(repository.patch, sorted({patch for patch, _ in repository.active(commit)})):
            contexts = patch.settings.get("contexts")
            if patch.metric is not None and isinstance(contexts, list) and all(isinstance(c, str) for c in contexts):
                _pin_if_none(repository, Recording(patch.metric, tuple(contexts)))
                return


def _pin_if_none(repository: Store, recording: Recording) -> None:
    repository.change_config(lambda config: replace(config, recording=config.recording or recording))


def _source(repository: Store) -> Source:
    base = repository.config.base
    on_hub = base.get("revision") is not None
    return Source(repository.config.base_id, base["path"] if on_hub else None, base["revision"] if on_hub else None)


def _pages(repository: Store, address: str, progress: Progress) -> sync.Pages:
    """What the Hub shows to those who have no patchhub; a folder shows nothing."""
    name = hub_id(address)
    if name is None:
        return lambda commit, withheld: {}
    from patchhub.porcelain.exchange import hub_pages

    return lambda commit, withheld: hub_pages(repository, name, commit, progress, withheld=withheld)


# --- clone ----------------------------------------------------------------------------------------------------------


def clone(
    address: str,
    folder: Path,
    progress: Progress,
    *,
    who: Who,
    base: str | None = None,
    shared: bool = False,
    trust: bool = False,
    max_bytes: int = MAX_BYTES,
    require_signed: Path | None = None,
    access: Access = DEFAULT_ACCESS,
) -> Cloned:
    """A new store in ``folder`` with all that a remote has, on its ``main`` branch (or the first that it has).

    Args:
        base: the base model, a folder or a Hub id; None: where the remote says it is on the Hub.
        shared: let the group of the folder write in the store.
        trust: accept weights that are not those of their facts.
        require_signed: as in `fetch`.

    Raises:
        RepositoryError: there is a store already, other than what a killed clone of the same address left, which goes on.
        SignatureError: as in `pull`, of the branch that would be the current one.
        BaseError: the base cannot be read, or is not the remote's.
        RemoteError: nothing there, unreachable, or something the format does not allow.
    """
    allowed_signers(Config({}, {}), require_signed)
    kept = normalised(address)
    remote = open_remote(kept, endpoint=access.endpoint, token=access.token)
    source, place = _source_of(remote, address, base)
    from patchhub.porcelain.model import init  # it needs torch, which an address that leads nowhere does not

    created = not folder.exists()
    made = not _was_begun(folder, kept, source.base)
    if not made and shared and not is_shared(folder / DIRECTORY):
        shutil.rmtree(folder / DIRECTORY)  # begun as one's own
        made = True
    if made:
        init(folder, place, progress, who=who, revision=source.revision if base is None else None, shared=shared)
    try:
        with Store.open(folder) as repository:
            if repository.config.base_id != source.base:
                raise RemoteError(
                    f"{place} is not the base of {address} ({repository.config.base_id[:12]}, not {source.base[:12]})",
                    remedy="Give the right base model with --base.",
                    base=source.base,
                )
            if ORIGIN not in remotes(repository):
                remote_add(repository, ORIGIN, kept)
            options: dict[str, Any] = {"trust": trust, "max_bytes": max_bytes, "require_signed": require_signed}
            fetched = _fetch(repository, remote, ORIGIN, progress, who=who, **options)
            _refuse_unsigned(remote, fetched)
            branch, commit = _check_out(repository, who=who)
            _follow_experts(repository)
    except (PatchhubError, KeyboardInterrupt):
        if made:
            shutil.rmtree(folder if created else folder / DIRECTORY, ignore_errors=True)
        raise
    return Cloned(folder / DIRECTORY, branch, commit, fetched)


def _source_of(remote: Remote, address: str, base: str | None) -> tuple[Source, str]:
    """What a remote says of its base, and where the base is.

    Raises:
        RemoteError: nothing is there.
        SettingsError: neither the remote nor ``base`` says where the base is.
    """
    source = remote.view().source
    if source is None:
        raise _nothing_at(normalised(address))
    place = base if base is not None else source.model
    if place is None:
        raise SettingsError(f"{address} does not say where its base is", remedy="Give the base model with --base.")
    return source, place


def _refuse_unsigned(remote: Remote, fetched: Fetched) -> None:
    """Refuse a clone whose first branch was not let in."""
    there = [ref for ref in remote.view().tips if ref.startswith(BRANCHES)] if fetched.left_out else []
    if there:
        first = BRANCHES + "main" if BRANCHES + "main" in there else min(there)
        refuse_left_out(receive.local_name(first, ORIGIN), fetched.left_out)


def _follow_experts(repository: Store) -> None:
    """Write into those experts that the facts of the cloned history are in, where a base has two kinds."""
    base = repository.config.base
    beside: Mapping[str, Any] = base.get("beside", {})
    patches = {patch for patch, _ in repository.active(repository.head[1])}
    if not any(beside.keys() & repository.patch(patch).weights.keys() for patch in patches):
        return
    other = {block_of(name): name for name in beside}
    weights = {other.get(block_of(name), name): facts for name, facts in base["weights"].items()}
    swapped = {
        **base,
        "experts": "shared" if base["experts"] == "routed" else "routed",
        "weights": {name: beside.get(name, facts) for name, facts in weights.items()},
        "beside": {name: facts for name, facts in base["weights"].items() if name not in weights},
    }
    repository.change_config(lambda config: replace(config, base=swapped))


def _was_begun(folder: Path, address: str, base: str) -> bool:
    """Whether a clone of that address began in a folder and was killed: then it is taken up, with the objects that came already."""
    if not (folder / DIRECTORY).is_dir():
        return False
    with Store.open(folder) as repository:
        commands = {operation.command for _, operation in repository.operations()}
        named = remotes(repository)
        return repository.config.base_id == base and commands <= {INIT, FETCH} and named in ({}, {ORIGIN: address})


def _check_out(repository: Store, *, who: Who) -> tuple[str | None, str | None]:
    """Make the remote's ``main``, or else its first branch, the current branch."""
    prefix = f"{REMOTES}{ORIGIN}/"
    refs = repository.refs()
    found = {ref[len(prefix) :]: target for ref, target in refs.items() if ref.startswith(prefix)}
    if not found:
        return None, None
    name = "main" if "main" in found else min(found)
    changes: dict[str, tuple[str | None, str | None]] = {BRANCHES + name: (None, found[name])}
    if refs[HEAD] != SYMBOLIC + BRANCHES + name:
        changes[HEAD] = (refs[HEAD], SYMBOLIC + BRANCHES + name)
    repository.move_refs(changes, command="clone", arguments={}, author=who.author, time=who.time)
    return name, found[name]
