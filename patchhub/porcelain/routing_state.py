"""From the shards of a commit to side memories that a model can be routed to. NumPy and torch, no model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final, Literal

from patchhub.editing.wise import Shard
from patchhub.errors import CorruptStoreError, SettingsError
from patchhub.objects import Patch
from patchhub.porcelain.columns import weight_shapes
from patchhub.porcelain.shard_tensors import Shapes, read_shard_change
from patchhub.porcelain.shards import ShardRecord, shard_record, shards_at
from patchhub.runtime.patched_model import UNROUTED, Routing
from patchhub.runtime.routing import Mode, SideMemory
from patchhub.store.repository import Repository

MODES: Final[tuple[Mode, ...]] = ("retrieve", "merge")


def routing_at(repository: Repository, commit: str | None, mode: Mode | None = None) -> Routing:
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


def stored_shard(repository: Repository, identity: str) -> Shard:
    """A shard of this store, bit for bit as its training left it."""
    patch = repository.patch(identity)
    change = read_shard_change(patch, repository.objects.get(patch.tensors), weight_shapes(repository))
    return Shard(*change, shard_record(patch).routing)


def chosen_mode(repository: Repository, mode: Mode | None) -> Mode:
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
