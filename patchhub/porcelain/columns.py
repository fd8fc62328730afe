"""Between the store and the algebra: columns and deltas of a set or a commit as arrays. NumPy only, no model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from patchhub.constraints import Columns, difference, join, no_columns
from patchhub.delta import Delta, LowRank, read_deltas
from patchhub.errors import CorruptStoreError, RepositoryError
from patchhub.objects import Element, Patch
from patchhub.store.repository import Repository

_PARTS = ("k", "u", "r", "lambda")

Shapes = Mapping[str, tuple[int, int]]


def weight_shapes(repository: Repository) -> dict[str, tuple[int, int]]:
    """(out, in) of every weight of the base that can be edited."""
    weights: Mapping[str, Mapping[str, Sequence[int]]] = repository.config.base["weights"]
    return {name: (facts["shape"][0], facts["shape"][1]) for name, facts in weights.items()}


def read_state(repository: Repository, commit: str | None) -> dict[str, list[Delta]]:
    """The deltas of each changed weight at a commit, in ascending order of blob id."""
    shapes = weight_shapes(repository)
    state: dict[str, list[Delta]] = {}
    for blob in sorted(repository.state(commit)):
        for weight, delta in read_deltas(repository.objects.get(blob), shapes).items():
            state.setdefault(weight, []).append(delta)
    return state


def write_columns(columns: Mapping[str, Columns], targets: np.ndarray) -> bytes:
    """The tensors of a closed-form patch: columns per weight and z (n, d)."""
    tensors = {"z": np.ascontiguousarray(targets, np.float32)}
    for weight, found in columns.items():
        arrays = (found.keys, found.preimages, found.residuals, found.ridge)
        tensors |= {f"{weight}.{part}": np.ascontiguousarray(a) for part, a in zip(_PARTS, arrays, strict=True)}
    return save(tensors)


def read_columns(repository: Repository, elements: Iterable[Element]) -> dict[str, Columns]:
    """The columns of a set per weight, in the set's order (patch id, then request id).

    Raises:
        RepositoryError: the set holds patches that are not columns.
        CorruptStoreError: a patch's tensors are not what its manifest says.
    """
    wanted: dict[str, list[str]] = {}
    for identity, request in sorted(elements, key=lambda element: (element[0], element[1] or "")):
        if request is None:
            raise RepositoryError(
                f"patch {identity[:12]} is not made of columns and cannot be solved together with others",
                remedy="Use a version of patchhub that knows this kind of patch.",
            )
        wanted.setdefault(identity, []).append(request)
    parts: dict[str, list[Columns]] = {}
    for identity, requests in wanted.items():
        patch = repository.patch(identity)
        place = {request: row for row, request in enumerate(patch.requests)}
        for weight, columns in _patch_columns(repository, identity, patch).items():
            parts.setdefault(weight, []).append(columns.take([place[request] for request in requests]))
    return {weight: join(found) for weight, found in sorted(parts.items())}


def solve_change(repository: Repository, before: frozenset[Element], after: frozenset[Element]) -> dict[str, LowRank]:
    """D(after) - D(before) of each weight that either set changes, from recorded columns alone (float64)."""
    shapes = weight_shapes(repository)
    common = read_columns(repository, before & after)
    added, removed = read_columns(repository, after - before), read_columns(repository, before - after)
    return {
        weight: difference(*(part.get(weight, no_columns(shapes[weight])) for part in (common, added, removed)))
        for weight in sorted(added.keys() | removed.keys())
    }


def _patch_columns(repository: Repository, identity: str, patch: Patch) -> dict[str, Columns]:
    try:
        tensors = load(repository.objects.get(patch.tensors))
    except SafetensorError as error:
        raise _damaged(identity, f"its tensors cannot be read ({error})") from error
    found = {}
    for weight, (out, inner) in patch.weights.items():
        n = len(patch.requests)
        expected = [(n, inner), (n, inner), (n, out), (n,)]
        arrays = [tensors.get(f"{weight}.{part}") for part in _PARTS]
        valid = [a for a, shape in zip(arrays, expected, strict=True) if a is not None and _is_column(a, shape)]
        if len(valid) != len(_PARTS):
            raise _damaged(identity, f"the columns of {weight} are missing, misshapen or not finite")
        found[weight] = Columns(*valid)
    return found


def _is_column(array: np.ndarray, shape: tuple[int, ...]) -> bool:
    return array.shape == shape and array.dtype in (np.float32, np.float16) and bool(np.isfinite(array).all())


def _damaged(patch: str, reason: str) -> CorruptStoreError:
    return CorruptStoreError(
        f"patch {patch[:12]} is damaged: {reason}", remedy="Run `patchhub fsck` to see what else is.", patch=patch
    )
