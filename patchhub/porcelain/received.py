"""What tensors from elsewhere must satisfy before they enter the store. NumPy only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from patchhub.canonical import COUNT, IDENTIFIER, NUMBER, TEXT, MalformedError, list_of, optional, record_of
from patchhub.delta import STORED_DTYPES, read_deltas
from patchhub.errors import CorruptStoreError
from patchhub.objects import Patch
from patchhub.porcelain.shard_tensors import read_shard_change
from patchhub.porcelain.shards import shard_record
from patchhub.remotes.receive import CheckTensors, Owner

_REMEDY = "Do not use it."


@dataclass(frozen=True)
class _ChatForm:
    """The text that stood around each prompt."""

    before: Annotated[str, TEXT]
    after: Annotated[str, TEXT]


_SETTINGS = {
    "chat": optional(record_of(_ChatForm)),
    "contexts": list_of(TEXT),
    "layers": list_of(COUNT),
    "refreshes": list_of(IDENTIFIER),
    "ridge": NUMBER,
}
"""What is read of the settings of a patch of kind closed_form."""


def tensor_check(weights: Mapping[str, tuple[int, int]]) -> CheckTensors:
    """The check of everything that patches and commits of a base with those weights, (out, in) each, may refer to."""

    def check(owner: Owner, file: Path) -> None:
        if isinstance(owner, Patch) and owner.kind == "closed_form":
            _check_settings(owner)
            _check_columns(owner, file)
        elif isinstance(owner, Patch) and owner.kind == "shard":
            shard_record(owner)
            _check_shard(owner, file, weights)
        else:
            _check_deltas(file, owner.weights if isinstance(owner, Patch) else weights)

    return check


def _check_settings(patch: Patch) -> None:
    """The settings that other commands read must be of their types; which of them are there is for those to see."""
    for name, codec in _SETTINGS.items():
        if name in patch.settings:
            try:
                codec.decode(patch.settings[name], f"settings.{name}")
            except MalformedError as error:
                raise CorruptStoreError(str(error), remedy=_REMEDY, field=error.path) from None


def _check_deltas(file: Path, weights: Mapping[str, tuple[int, int]]) -> None:
    with _numpy_types():
        read_deltas(file, weights)


def _check_shard(patch: Patch, file: Path, weights: Mapping[str, tuple[int, int]]) -> None:
    with _numpy_types():
        read_shard_change(patch, file, weights)


@contextmanager
def _numpy_types() -> Iterator[None]:
    """Refuse tensors of a type that numpy does not have."""
    try:
        yield
    except (KeyError, TypeError, AttributeError) as error:
        raise CorruptStoreError(f"a delta has values of a forbidden type ({error})", remedy=_REMEDY) from error


def _check_columns(patch: Patch, file: Path) -> None:
    """The columns of every weight and z, and nothing else, finite and of the shapes that the patch states."""
    n = len(patch.requests)
    shapes: dict[str, tuple[int, ...]] = {}
    for weight, (out, inner) in patch.weights.items():
        shapes |= {f"{weight}.k": (n, inner), f"{weight}.u": (n, inner), f"{weight}.r": (n, out)}
        shapes[f"{weight}.lambda"] = (n,)
    try:
        tensors = load_file(file)
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptStoreError(f"its columns are no readable safetensors file ({error})", remedy=_REMEDY) from error
    targets = tensors.pop("z", None)
    found = {name: array.shape for name, array in tensors.items()}
    if found != shapes or targets is None or targets.ndim != 2 or len(targets) != n:
        raise CorruptStoreError("its columns do not have the shapes that the patch states", remedy=_REMEDY)
    for name, array in {**tensors, "z": targets}.items():
        if array.dtype not in STORED_DTYPES or not bool(np.isfinite(array).all()):
            raise CorruptStoreError(f"its tensor {name} has a forbidden type or value", remedy=_REMEDY, tensor=name)
        if name.endswith(".lambda") and not bool((array > 0).all()):
            raise CorruptStoreError(f"its tensor {name} has a weight that is not above 0", remedy=_REMEDY, tensor=name)
