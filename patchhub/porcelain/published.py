"""Loading a model from a repository of the Hub without a store: only the commits and deltas of one state are read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from patchhub.delta import Delta, read_deltas
from patchhub.errors import CorruptStoreError, RemoteError, SettingsError
from patchhub.models.architectures import describe, read_config
from patchhub.models.checkpoint import Checkpoint, open_checkpoint
from patchhub.models.fingerprint import check_tensors
from patchhub.objects import Base, Patch, set_from_json
from patchhub.porcelain.routing_state import MODES, checked_mode, read_routing
from patchhub.porcelain.shard_tensors import Shapes
from patchhub.remotes.addresses import HUB
from patchhub.remotes.hub_snapshot import HubSnapshot
from patchhub.remotes.receive import delta_limit
from patchhub.runtime.patched_model import PatchState, Routing
from patchhub.runtime.routing import Mode
from patchhub.store import states

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
    wise: Mode | None = None,
) -> tuple[Checkpoint, PatchState]:
    """The base and the state of a revision of ``hf://repo``, for `load` and `attach`.

    Raises:
        RemoteError: unreachable and not in the cache, or it holds something the format does not allow.
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
    shapes = {architecture.ffn_weight(layer): architecture.shapes[layer] for layer in range(architecture.n_layers)}
    try:
        about = Base.from_json(snapshot.read(manifest.base))
        blobs = states.state(snapshot.commit, snapshot.read_commit, {})
        limit = delta_limit(shapes)
        weights: dict[str, list[Delta]] = {}
        for blob in sorted(blobs):
            for weight, delta in read_deltas(snapshot.file(blob, limit=limit), shapes).items():
                weights.setdefault(weight, []).append(delta)
        routing = _routing(snapshot, shapes, limit, checked_mode(wise or MODES[0]))
    except (CorruptStoreError, KeyError, TypeError) as error:
        raise RemoteError(f"hf://{repo} is refused: {error}", remedy="Do not use it.", remote=repo) from error
    if verify:
        check_tensors(about, checkpoint, None)
    return checkpoint, PatchState(about, architecture.orientation, weights, snapshot.commit, routing)


def _routing(snapshot: HubSnapshot, shapes: Shapes, limit: int, mode: Mode) -> Routing:
    """The side memories of the snapshot's commit; of its patches only those that are active as a whole are read."""
    whole = states.whole_patches(snapshot.commit, snapshot.read_commit, lambda i: set_from_json(snapshot.read(i)))
    patches = {identity: Patch.from_json(snapshot.read(identity)) for identity in sorted(whole)}
    return read_routing(patches, lambda identity: snapshot.file(identity, limit=limit), shapes, mode)
