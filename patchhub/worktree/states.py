"""States as they are attached to a model: the deltas of a commit, read on first use, and the side memories of its shards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

from patchhub.delta import Delta
from patchhub.editing.wise.task import Shard
from patchhub.errors import BaseError, CorruptStoreError, SettingsError
from patchhub.objects import Base, Patch
from patchhub.runtime.patched_model import UNROUTED, PatchState, Routing
from patchhub.runtime.routing import Mode, SideMemory
from patchhub.sets.columns import Shapes, read_shard_change, read_state, stacked_orientations, weight_shapes
from patchhub.sets.shards import ShardRecord, shard_record, shards_at
from patchhub.store.store import Store

MODES: Final[tuple[Mode, ...]] = ("retrieve", "merge")


def base_object(repository: Store) -> Base:
    return Base.from_json(repository.objects.get(repository.config.base_id))


class StoredDeltas(Mapping[str, Sequence[Delta]]):
    """The deltas of a commit per weight, read from the store when they are first asked for."""

    def __init__(self, repository: Store, commit: str | None) -> None:
        self._repository, self._commit = repository, commit
        self._read: dict[str, list[Delta]] | None = None

    @property
    def _deltas(self) -> dict[str, list[Delta]]:
        if self._read is None:
            self._read = read_state(self._repository, self._commit)
        return self._read

    def __getitem__(self, weight: str) -> Sequence[Delta]:
        return self._deltas[weight]

    def __iter__(self) -> Iterator[str]:
        return iter(self._deltas)

    def __len__(self) -> int:
        return len(self._deltas)


def state_at(repository: Store, revision: str, wise: Mode | None = None) -> PatchState:
    """What is to be attached for a revision: its deltas, which are read on first use, and its side memories."""
    commit = repository.resolve(revision)
    return patch_state(
        repository, StoredDeltas(repository, commit), commit, routing=routing_at(repository, commit, wise)
    )


def main_state_at(repository: Store, revision: str) -> PatchState:
    """The main weights of a revision, without its side memories."""
    commit = repository.resolve(revision)
    return patch_state(repository, StoredDeltas(repository, commit), commit)


def patch_state(
    repository: Store,
    deltas: Mapping[str, Sequence[Delta]],
    commit: str | None,
    *,
    routing: Routing = UNROUTED,
) -> PatchState:
    return PatchState(
        base=base_object(repository),
        orientation=repository.config.base["orientation"],
        stored=stacked_orientations(repository),
        weights=deltas,
        commit=commit,
        routing=routing,
        proof=None if commit is None else repository.standing(commit).proof,
    )


def routing_at(repository: Store, commit: str | None, mode: Mode | None = None) -> Routing:
    """How a commit routes queries: `UNROUTED` where no shard is active.

    Args:
        mode: None stands for the repository's ``wise.mode``, and that for "retrieve".

    Raises:
        SettingsError: there is no such mode.
    """
    chosen = chosen_mode(repository, mode)
    return read_routing(shards_at(repository, commit), repository.objects.get, weight_shapes(repository), chosen)


def read_routing(
    patches: Mapping[str, Patch], tensors_of: Callable[[str], bytes | Path], shapes: Shapes, mode: Mode
) -> Routing:
    """Side memories of the shards among some patches, in ascending order of id.

    Args:
        patches: by id; those of another kind are left out.
        tensors_of: the bytes, or a verified file, of a tensors object.
        shapes: (out, in) of each weight of the base that can be edited.

    Raises:
        CorruptStoreError: a shard is not what its manifest says.
    """
    shards = {identity: patch for identity, patch in sorted(patches.items()) if patch.kind == "shard"}
    if not shards:
        return UNROUTED
    records = {identity: shard_record(patch) for identity, patch in shards.items()}
    memories = [
        SideMemory(identity, *read_shard_change(patch, tensors_of(patch.tensors), shapes), records[identity].routing)
        for identity, patch in shards.items()
    ]
    return Routing(memories, mode, *_merging(records.values()))


def stored_shard(repository: Store, identity: str) -> Shard:
    """A shard of this store, bit for bit as its training left it."""
    patch = repository.patch(identity)
    change = read_shard_change(patch, repository.objects.get(patch.tensors), weight_shapes(repository))
    return Shard(*change, shard_record(patch).routing)


def chosen_mode(repository: Store, mode: Mode | None) -> Mode:
    """``mode``, or where that is None what the repository's config says."""
    return checked_mode(mode or repository.config.settings.get("wise.mode", MODES[0]))


def checked_mode(mode: Any) -> Mode:
    """``mode`` if it is one; `SettingsError` otherwise."""
    if mode not in MODES:
        raise SettingsError(f"there is no way {mode!r} to route to shards", remedy=f"Choose {' or '.join(MODES)}.")
    found: Mode = mode
    return found


def _merging(records: Iterable[ShardRecord]) -> tuple[Literal["ties", "linear"], float]:
    """How shards are joined: as the first of them says.

    Raises:
        CorruptStoreError: it says what there is not.
    """
    training = next(iter(records)).training
    method = training.get("merge_method", UNROUTED.merge_method)
    density = training.get("merge_density", UNROUTED.merge_density)
    if method not in ("ties", "linear") or type(density) not in (int, float) or not 0 < density <= 1:
        raise CorruptStoreError(
            f"a shard says that shards are joined by {method!r} at density {density!r}, which cannot be",
            remedy="Do not use it.",
        )
    return method, float(density)


def not_finite(model: str, tensor: str) -> BaseError:
    """The error that a base has NaN or infinity among its weights."""
    return BaseError(
        f"{model} has values in {tensor} that are not finite (NaN or infinity)",
        remedy="Download or convert the model again.",
        tensor=tensor,
    )
