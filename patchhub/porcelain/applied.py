"""Checkpoint folders of routed states: the main weights as an ordinary checkpoint, the shards as stored in a folder beside them.

The folder ``patchhub_side_memory`` holds ``routing.json`` and, each under the SHA-256 of its bytes, the shards' patches and tensors
(docs/format.md). Other loaders read the main weights alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final

from transformers import AutoModelForCausalLM, PreTrainedModel

from patchhub.canonical import IDENTIFIER, StoredObject, choice, list_of, object_id, optional
from patchhub.errors import CorruptStoreError
from patchhub.models.architectures import describe, read_config
from patchhub.objects import Patch
from patchhub.porcelain.routing_state import MODES, checked_mode, read_routing
from patchhub.runtime.patched_model import add_routing
from patchhub.runtime.routing import Mode
from patchhub.store.repository import Repository

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
    repository: Repository, commit: str | None, shards: Mapping[str, Patch], mode: Mode
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
    shapes = {architecture.ffn_weight(layer): architecture.shapes[layer] for layer in range(architecture.n_layers)}
    chosen = checked_mode(mode or manifest.mode)
    routing = read_routing(patches, lambda identity: _verified(place, identity), shapes, chosen)
    factory: Any = AutoModelForCausalLM
    model: PreTrainedModel = factory.from_pretrained(folder, **{"local_files_only": True, **from_pretrained})
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
