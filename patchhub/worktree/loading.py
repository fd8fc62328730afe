"""The base and its patched states as models: from a store, from the Hub, or from a checkpoint that `apply` wrote.

Side memories come along: the shards of a commit become memories that a model can be routed to."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final

from transformers import PreTrainedModel

from patchhub.cache import Cache
from patchhub.canonical import IDENTIFIER, StoredObject, choice, list_of, object_id, optional
from patchhub.delta import Delta, read_deltas
from patchhub.errors import CorruptStoreError, EditError, RemoteError, RepositoryError, SettingsError
from patchhub.fsio import Span
from patchhub.models.architectures import describe, read_config, read_model
from patchhub.models.checkpoint import Checkpoint, open_checkpoint
from patchhub.models.fingerprint import check_tensors
from patchhub.objects import Base, Element, Patch, set_digest, set_from_json, tensor_shapes
from patchhub.progress import Progress
from patchhub.remotes.hub_files import HubSnapshot
from patchhub.remotes.receive import MAX_SET, columns_limit, delta_limit
from patchhub.remotes.remote import NAME as REMOTE
from patchhub.remotes.sync import HUB
from patchhub.runtime import patched_model
from patchhub.runtime.compose import ReadyWeights
from patchhub.runtime.patched_model import PatchState, Proof, Routing, add_routing
from patchhub.runtime.routing import Mode
from patchhub.sets.columns import Shapes, read_rows, solved, tensor_check
from patchhub.sets.columns import tensor_shapes as stored_shapes
from patchhub.sets.proofs import check_state
from patchhub.store import states as stored_states
from patchhub.store.store import DIRECTORY, Store
from patchhub.worktree.opening import MODES, checked_mode, open_base, read_routing, state_at

FOLDER: Final = "patchhub_side_memory"
MANIFEST: Final = "routing.json"


@dataclass(frozen=True)
class _Manifest(StoredObject):
    """``routing.json``: the commit, how its queries are routed by default, and its shards."""

    TYPE: ClassVar[str] = "routing"
    commit: Annotated[str | None, optional(IDENTIFIER)]
    mode: Annotated[str, choice(*MODES)]
    shards: Annotated[tuple[str, ...], list_of(IDENTIFIER)]


def side_memory_files(
    repository: Store, commit: str | None, shards: Mapping[str, Patch], mode: Mode
) -> dict[str, bytes]:
    """What lies beside the checkpoint of a commit with shards, by path relative to it; nothing without any."""
    if not shards:
        return {}
    files = {MANIFEST: _Manifest(commit, mode, tuple(shards)).to_json()}
    for identity, patch in shards.items():
        files |= {identity: patch.to_json(), patch.tensors: repository.objects.get(patch.tensors)}
    return {f"{FOLDER}/{name}": data for name, data in files.items()}


def is_applied(folder: Path) -> bool:
    """Whether a folder is a checkpoint with side memories beside it."""
    return (folder / FOLDER / MANIFEST).is_file()


def load_applied(folder: Path, mode: Mode | None, **from_pretrained: Any) -> PreTrainedModel:
    """A checkpoint that `apply` wrote, with its side memories.

    Args:
        mode: None stands for what `apply` was told.

    Raises:
        CorruptStoreError: a file of the side memories is missing or damaged.
        BaseError: the checkpoint cannot be read.
    """
    place = folder / FOLDER
    try:
        manifest = _Manifest.from_json((place / MANIFEST).read_bytes())
    except OSError as error:
        raise _damaged(place / MANIFEST, str(error)) from error
    patches = {identity: Patch.from_json(_verified(place, identity)) for identity in manifest.shards}
    architecture = describe(read_config(folder))
    shapes = {weight: projection.shape for weight, projection in architecture.weights.items()}
    chosen = checked_mode(mode or manifest.mode)
    routing = read_routing(patches, lambda identity: _verified(place, identity), shapes, chosen)
    model = read_model(folder, **from_pretrained)
    add_routing(model, routing)
    return model


def _verified(folder: Path, identity: str) -> bytes:
    try:
        data = (folder / identity).read_bytes()
    except OSError as error:
        raise _damaged(folder / identity, str(error)) from error
    if object_id(data) != identity:
        raise _damaged(folder / identity, "its bytes do not hash to its name")
    return data


def _damaged(path: Path, reason: str) -> CorruptStoreError:
    return CorruptStoreError(
        f"the side memory {path} cannot be used: {reason}",
        remedy="Write the checkpoint again with `patchhub apply`.",
        path=str(path),
    )


MAIN: Final = "main"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*/[A-Za-z0-9][\w.\-]*", re.ASCII)


def hub_name(path: str | Path) -> str | None:
    """``user/repo`` if that is what is named: with ``hf://``, or in a form that no existing folder has."""
    text = str(path)
    name = text.removeprefix(HUB)
    if isinstance(path, Path) or _HUB_ID.fullmatch(name) is None:
        return None
    return name if text.startswith(HUB) or not Path(text).exists() else None


def open_published(
    repo: str,
    revision: str,
    *,
    base: str | Path | None = None,
    verify: bool = False,
    prove: bool = False,
    wise: Mode | None = None,
) -> tuple[Checkpoint, PatchState]:
    """The base and the state of a revision of ``hf://repo``, for `load` and `attach`.

    Args:
        prove: download the facts' columns too, and prove that the deltas are theirs. A state without deltas is solved from them
            anyhow.

    Raises:
        RemoteError: unreachable and not in the cache, it holds something the format does not allow, or is not proven.
        RevisionError: no such revision.
        BaseError: the base cannot be read; with ``verify``, it is another model, which loading finds out by itself of what it patches.
    """
    snapshot = HubSnapshot(repo, MAIN if revision == "HEAD" else revision)
    manifest = snapshot.manifest
    place = base if base is not None else manifest.base_model
    if place is None:
        raise SettingsError(f"hf://{repo} does not say where its base is", remedy="Give the base model: base=...")
    checkpoint = open_checkpoint(place, manifest.base_revision if base is None else None)
    architecture = describe(read_config(checkpoint.folder))
    shapes = {weight: projection.shape for weight, projection in architecture.weights.items()}
    try:
        about = Base.from_json(snapshot.read(manifest.base))
        parts = stored_states.state(snapshot.commit, snapshot.read_commit, {})
        linear = tensor_shapes(checkpoint.tensors, shapes, architecture.orientation)
        limit = delta_limit(linear)
        weights: dict[str, list[Delta]] = {}
        published = _Published(snapshot, shapes, linear)
        for part in sorted(parts):
            commit = stored_states.solved_commit(part)
            blob = snapshot.place(part, limit=limit).read() if commit is None else b""
            found = read_deltas(blob, linear) if commit is None else published.solved(commit)
            for weight, delta in found.items():
                weights.setdefault(weight, []).append(delta)
        routing = _routing(snapshot, shapes, limit, checked_mode(wise or MODES[0]))
        if prove:
            published.prove(weights)
    except (CorruptStoreError, EditError, KeyError, TypeError) as error:
        raise RemoteError(f"hf://{repo} is refused: {error}", remedy="Do not use it.", remote=repo) from error
    if verify:
        check_tensors(about, checkpoint, None)
    proof: Proof = "checked" if prove else "claimed"
    stored = {weight: p.orientation for weight, p in architecture.weights.items() if p.experts}
    return checkpoint, PatchState(about, architecture.orientation, weights, snapshot.commit, routing, proof, stored)


@dataclass(frozen=True)
class _Published:
    """What the facts of a snapshot ask of its weights, downloaded and checked when it is asked for.

    Attributes:
        weights, linear: (out, in) of the weights that facts are written into, and of all that a state may change.
    """

    snapshot: HubSnapshot
    weights: Shapes
    linear: Shapes

    def prove(self, state: Mapping[str, list[Delta]]) -> None:
        """Prove that the deltas of the snapshot's commit are what its set asks for.

        Raises:
            CorruptStoreError: they are not, or something is not of the format.
        """
        elements = self._elements(self.snapshot.commit)
        check_state(elements, state, self.linear, patch_of=self._patch, file_of=self._file)

    def solved(self, commit: str) -> dict[str, Delta]:
        """The state of a commit that keeps no delta.

        Raises:
            CorruptStoreError: something is not of the format, or changes are active that no facts ask for.
        """
        elements = self._elements(commit)
        patches = {identity: self._patch(identity) for identity in {identity for identity, _ in elements}}
        if any(patch.kind == "additive" for patch in patches.values()):
            raise CorruptStoreError(
                f"commit {commit[:12]} says that its imported changes are solved", remedy="Do not use it."
            )
        files = {patch.tensors: self._file(patch) for patch in patches.values() if patch.kind == "closed_form"}
        asked = {weight for patch in patches.values() if patch.kind == "closed_form" for weight in patch.weights}
        rows = partial(read_rows, patches.__getitem__, files.__getitem__, elements)
        return solved({weight: rows(weight, self.weights[weight]) for weight in sorted(asked)})

    def _elements(self, commit: str) -> frozenset[Element]:
        read = self.snapshot.read_commit
        elements = stored_states.active_set(
            commit, read, lambda i: set_from_json(self.snapshot.read(i, limit=MAX_SET)), {}
        )
        if set_digest(elements) != read(commit).set_digest:
            raise CorruptStoreError("the set of the commit is not what its digest says", remedy="Do not use it.")
        return elements

    def _patch(self, identity: str) -> Patch:
        patch = Patch.from_json(self.snapshot.read(identity))
        allowed = self.linear if patch.kind == "additive" else self.weights
        if any(allowed.get(weight) != shape for weight, shape in patch.weights.items()):
            raise CorruptStoreError(f"patch {identity[:12]} is about weights of another base", remedy="Do not use it.")
        return patch

    def _file(self, patch: Patch) -> Span:
        limit = columns_limit(patch) if patch.kind == "closed_form" else delta_limit(patch.weights)
        place = self.snapshot.place(patch.tensors, limit=limit)
        tensor_check(self.weights, self.linear)(patch, place)
        return place


def _routing(snapshot: HubSnapshot, shapes: Shapes, limit: int, mode: Mode) -> Routing:
    """The side memories of the snapshot's commit; of its patches only those that are active as a whole are read."""
    whole = stored_states.whole_patches(
        snapshot.commit, snapshot.read_commit, lambda i: set_from_json(snapshot.read(i, limit=MAX_SET))
    )
    patches = {identity: Patch.from_json(snapshot.read(identity)) for identity in sorted(whole)}
    return read_routing(patches, lambda identity: snapshot.place(identity, limit=limit).read(), shapes, mode)


def open_state(path_or_repo: str | Path, revision: str = "HEAD", *, base: str | Path | None = None) -> PatchState:
    """The state of a revision, proven: from the Hub with all that its facts were recorded as, or from a store.

    Args:
        base: where the base is, if not where the Hub's repository says.

    Raises:
        RevisionError, BaseError, CorruptStoreError, RemoteError: as in `load`.
    """
    published = hub_name(path_or_repo)
    if published is not None:
        return open_published(published, revision, base=base, prove=True)[1]
    with open_path(path_or_repo) as repository:
        state = state_at(repository, revision)
        return state if state.commit is None else _proven(repository, state, state.commit)


SURVIVAL_LIMIT = 0.9  # warn when rounding to the base's type loses more than a tenth of a change
_NAMED_LOSSES = 3


def warn_of_losses(survival: Mapping[str, float], progress: Progress, where: str, remedy: str) -> None:
    """Say of the weights whose change the cast takes much of what it takes, the worst first; of many, how many more there are."""
    lost = sorted((share, weight) for weight, share in survival.items() if share < SURVIVAL_LIMIT)
    shown = lost if len(lost) <= _NAMED_LOSSES + 1 else lost[:_NAMED_LOSSES]
    for share, weight in shown:
        progress.warn(f"{1 - share:.0%} of the change of {weight} is lost {where}; {remedy}")
    if len(shown) < len(lost):
        progress.warn(f"and more than a tenth of the changes of {len(lost) - len(shown)} other weights")


def load(
    path_or_repo: str | Path,
    revision: str = "HEAD",
    *,
    base: str | Path | None = None,
    verify: bool = False,
    prove: bool = False,
    wise: Mode | None = None,
    side_path: bool = False,
    **kwargs: Any,
) -> PreTrainedModel:
    """The model at a revision, as an ordinary transformers model; side memories of WISE shards are routed to.

    ``model.patchhub.proof`` says whether its weights are known to be those of its facts: "checked" here, "claimed" by their author, or
    "trusted" although they are not. What imported changes and shards do is nobody's but their author's claim.

    Args:
        path_or_repo: the folder that holds a store, the store itself, ``user/repo`` on the Hub, or a checkpoint that `apply` wrote of a
            state with shards.
        revision: a branch, tag, commit, ``HEAD~2``, ... ; ``base`` is the unpatched model.
        base: where the base model is, if not where the repository says.
        verify: hash every tensor of the base, not only those that the patch touches.
        prove: prove now that the weights are those of the facts. From the Hub that downloads the facts' columns, which loading does
            without where deltas are kept.
        wise: keep shards apart and let each query choose ("retrieve"), or join them into one side memory ("merge"). Default: the
            repository's ``wise.mode``, which is "retrieve" unless it was set.
        side_path: leave the weights as they are and run the changes beside them in float32, so that none is lost to rounding.
            A quantised model always does.
        kwargs: passed to ``AutoModelForCausalLM.from_pretrained``: dtype, device_map, quantization_config, ...

    Raises:
        RevisionError: no such revision.
        BaseError: the model found is not the repository's base.
        CorruptStoreError, RemoteError: ``prove`` is given and the weights are not those of the facts.
        SettingsError: a checkpoint that `apply` wrote is named, and what only a store can give.
    """
    published = hub_name(path_or_repo)
    if published is not None:
        checkpoint, state = open_published(published, revision, base=base, verify=verify, prove=prove, wise=wise)
        return patched_model.load_patched(checkpoint, state, side_path=side_path, **kwargs)
    if is_applied(Path(path_or_repo)):
        _refuse_choices(path_or_repo, revision, base=base, verify=verify, prove=prove, side_path=side_path)
        return load_applied(Path(path_or_repo), wise, **kwargs)
    with open_path(path_or_repo) as repository:
        state = state_at(repository, revision, wise)
        if prove and state.commit is not None:
            state = _proven(repository, state, state.commit)
        checkpoint = open_base(repository, base, verify=verify)
        ready = ReadyWeights(repository.cache, repository.config.base_id, repository.state(state.commit))
        return patched_model.load_patched(
            checkpoint, state, cache=repository.cache, ready=ready, side_path=side_path, **kwargs
        )


def _proven(repository: Store, state: PatchState, commit: str) -> PatchState:
    """A state of a store, proven anew; `CorruptStoreError` where its weights are not those of its facts."""
    objects = repository.objects

    def file_of(patch: Patch) -> Span:
        objects.verify(patch.tensors)
        return objects.place(patch.tensors)

    elements = repository.active(commit)
    check_state(elements, state.weights, stored_shapes(repository), patch_of=repository.patch, file_of=file_of)
    return replace(state, proof="checked")


def _refuse_choices(folder: str | Path, revision: str, **choices: Any) -> None:
    """Refuse what cannot be chosen for a checkpoint that `apply` wrote: it has one state, on its own weights."""
    given = [*(["revision"] if revision != "HEAD" else []), *(name for name, value in choices.items() if value)]
    if given:
        raise SettingsError(
            f"{folder} was written by apply, and {', '.join(given)} cannot be chosen for it",
            remedy="Leave that out, or load from the repository.",
            given=given,
        )


def attach(
    model: PreTrainedModel,
    path_or_repo: str | Path,
    revision: str = "HEAD",
    *,
    base: str | Path | None = None,
    prove: bool = False,
    wise: Mode | None = None,
    side_path: bool = False,
) -> PreTrainedModel:
    """Put a model that is in memory, the base or any patched state of it, into the state of a revision.

    The base's own tensors are kept, so any later `attach` or `detach` is exact. ``prove``, ``wise`` and ``side_path`` are as in `load`; a
    model that has a patch keeps to the way in which that is attached.

    Raises:
        RevisionError, BaseError, CorruptStoreError, RemoteError: as in `load`; the model is then as it was.
    """
    published = hub_name(path_or_repo)
    if published is not None:
        checkpoint, state = open_published(published, revision, base=base, prove=prove, wise=wise)
        _attach(model, checkpoint, state, side_path=side_path)
        return model
    with open_path(path_or_repo) as repository:
        checkpoint, state = open_base(repository, base), state_at(repository, revision, wise)
        if prove and state.commit is not None:
            state = _proven(repository, state, state.commit)
        _attach(model, checkpoint, state, side_path=side_path, cache=repository.cache)
    return model


def _attach(
    model: Any, checkpoint: Checkpoint, state: PatchState, *, side_path: bool, cache: Cache | None = None
) -> None:
    if patched_model.is_attached(model):
        patched_model.switch(model, checkpoint, state, cache=cache)
    else:
        patched_model.attach(model, checkpoint, state, cache=cache, side_path=side_path)


def open_path(path: str | Path) -> Store:
    """The store in a folder, or the store itself."""
    folder = Path(path)
    if not folder.is_dir():
        raise RepositoryError(
            f"{path} is not a folder with a patchhub store", remedy="Give the folder in which `patchhub init` was run."
        )
    if (folder / REMOTE).is_file() and not (folder / DIRECTORY).is_dir():
        raise RepositoryError(
            f"{path} is a remote, not a store", remedy=f"Clone it: `patchhub clone {path} FOLDER`.", path=str(path)
        )
    return Store.open(folder.parent if folder.name == DIRECTORY else folder)
