"""Between the store and the algebra: columns, deltas and shards of a set or a commit as arrays, read and checked. NumPy only.

What tensors from elsewhere must satisfy before they enter the store is checked here too."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from patchhub import objects
from patchhub.canonical import COUNT, IDENTIFIER, NUMBER, TEXT, MalformedError, list_of, map_of, optional, record_of
from patchhub.constraints import Columns, beyond, join, no_columns, solve
from patchhub.delta import STORED_DTYPES, Delta, Tensors, compact, norm, read_deltas
from patchhub.errors import CorruptStoreError, EditError
from patchhub.fsio import Span
from patchhub.objects import Element, Patch, set_digest
from patchhub.remotes.receive import MAX_HEADER, CheckTensors, Owner
from patchhub.sets.shards import shard_record
from patchhub.store.states import solved_commit
from patchhub.store.store import Store

Shapes = Mapping[str, tuple[int, int]]


def read_shard_change(patch: Patch, tensors: bytes | Path, shapes: Shapes) -> tuple[str, Delta]:
    """The weight of a shard and its change, bit for bit as the training left it.

    Args:
        patch: the shard.
        tensors: the bytes of its tensors, or a verified file.
        shapes: (out, in) of each weight of the base that can be edited.

    Raises:
        CorruptStoreError: its weight is not one of ``shapes``, or its tensors are not one delta of that weight.
    """
    if len(patch.weights) != 1 or any(shapes.get(weight) != shape for weight, shape in patch.weights.items()):
        raise _refused(
            patch, f"changes {', '.join(patch.weights) or 'nothing'}, not one weight of the base in its shape"
        )
    (weight,) = patch.weights
    found = read_deltas(tensors, patch.weights)
    if weight not in found:
        raise _refused(patch, f"holds no change of {weight}")
    return weight, found[weight]


def _refused(patch: Patch, reason: str) -> CorruptStoreError:
    return CorruptStoreError(f"shard {patch.id[:12]} {reason}", remedy="Do not use it.", patch=patch.id)


_PARTS = ("k", "u", "r", "lambda")
_EXPERTS = "experts"


def weight_shapes(repository: Store) -> dict[str, tuple[int, int]]:
    """(out, in) of every weight of the base that facts are written into, here or in a repository that writes into its other experts."""
    return {name: (facts["shape"][0], facts["shape"][1]) for name, facts in _known(repository).items()}


def weight_norms(repository: Store) -> dict[str, float]:
    """The Frobenius norm of each of `weight_shapes` in the base."""
    return {name: float(facts["norm"]) for name, facts in _known(repository).items()}


def stacked_orientations(repository: Store) -> dict[str, Literal["out_in", "in_out"]]:
    """How each expert of the base's stacked weights is stored; other weights are missing."""
    return {name: facts["orientation"] for name, facts in _known(repository).items() if "experts" in facts}


def stacked_weights(repository: Store) -> dict[str, int]:
    """How many experts each stacked weight of the base is made of; other weights are missing."""
    return {name: int(facts["experts"]) for name, facts in _known(repository).items() if "experts" in facts}


def flat_weights(repository: Store) -> frozenset[str]:
    """The stacked weights whose experts lie one below the other in a matrix, of which PEFT has no adapter."""
    return frozenset(name for name, facts in _known(repository).items() if facts.get("flat"))


def turned_weights(repository: Store) -> frozenset[str]:
    """The stacked weights that PEFT takes for stored (out, in) though they are stored (in, out)."""
    known = _known(repository).items()
    return frozenset(name for name, facts in known if facts.get("apart") and facts["orientation"] == "in_out")


def _known(repository: Store) -> Mapping[str, Mapping[str, Any]]:
    """What the config says of the weights that facts are written into, and of those of other experts beside them."""
    base = repository.config.base
    known: Mapping[str, Mapping[str, Any]] = {**base["weights"], **base.get("beside", {})}
    return known


def linear_shapes(repository: Store) -> Shapes:
    """(out, in) of `weight_shapes` and of every other linear weight of the base's blocks."""
    return _Shapes(repository, objects.linear_shapes)


def tensor_shapes(repository: Store) -> Shapes:
    """(out, in) of every weight of the base that a state may change: `weight_shapes`, and what additive patches may change besides."""
    return _Shapes(repository, objects.tensor_shapes)


class _Shapes(Mapping[str, tuple[int, int]]):
    """The weights that facts are written into are in the config; the others are told from the base's object, on first use."""

    def __init__(self, repository: Store, tell: Callable[..., Shapes]) -> None:
        self._repository, self._tell = repository, tell
        self._edited = weight_shapes(repository)

    @cached_property
    def _all(self) -> Shapes:
        known = self._repository.config.base
        return self._tell(self._repository.base.tensors, self._edited, known["orientation"])

    def __getitem__(self, weight: str) -> tuple[int, int]:
        return self._edited[weight] if weight in self._edited else self._all[weight]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)


def read_state(repository: Store, commit: str | None) -> dict[str, list[Delta]]:
    """The deltas of each changed weight at a commit, in ascending order of blob id."""
    return read_blobs(repository, repository.state(commit))


def read_blobs(
    repository: Store, parts: Iterable[str], elements: frozenset[Element] | None = None
) -> dict[str, list[Delta]]:
    """The deltas of each weight that the parts of a state change, in ascending order of their names.

    Args:
        elements: the set of the commit that a part is solved for; None: as the store has it.
    """
    shapes = tensor_shapes(repository)
    state: dict[str, list[Delta]] = {}
    for part in sorted(parts):
        commit = solved_commit(part)
        if commit is None:
            found: Mapping[str, Delta] = read_deltas(repository.objects.get(part), shapes)
        else:
            found = solved_state(repository, repository.active(commit) if elements is None else elements)
        for weight, delta in found.items():
            state.setdefault(weight, []).append(delta)
    return state


def solved_state(repository: Store, elements: frozenset[Element]) -> Mapping[str, Delta]:
    """D(S) of each weight in float32, solved from the columns of a set: the state of a commit that keeps no delta.

    One function of the set on one machine, whatever was read before.
    """
    asking = frozenset(element for element in elements if element[1] is not None)
    return repository.derived("solved", set_digest(asking), lambda: solved(columns_beside(repository, asking, {})))


@np.errstate(over="ignore", invalid="ignore")  # what overflows is refused
def solved(columns: Mapping[str, Columns]) -> dict[str, Delta]:
    """D(S) of each weight that it changes, in float32 and in its smaller form.

    Raises:
        EditError: the columns ask for what cannot be solved, or for more than float32 holds.
    """
    found = {weight: compact(solve(part)) for weight, part in columns.items()}
    for weight, delta in found.items():
        if not np.isfinite(norm(delta)):
            raise EditError(
                f"the columns of these facts ask for a change of {weight} that is too large for float32",
                remedy="One of them is out of all proportion; `patchhub log` says who brought it: take back or leave out that commit.",
                weight=weight,
            )
    return {weight: delta for weight, delta in found.items() if norm(delta)}


def write_columns(
    columns: Mapping[str, Columns], targets: np.ndarray, experts: Mapping[str, int] = MappingProxyType({})
) -> bytes:
    """The tensors of a closed-form patch: columns per weight and z (n, d). Keys, preimages and residuals that float16 holds are kept in it.

    Args:
        experts: E of the weights that are stacked, of whose keys and preimages only the blocks that are not zero are kept.
    """
    tensors = {"z": np.ascontiguousarray(targets, np.float32)}
    for weight, found in columns.items():
        arrays = [found.keys, found.preimages, found.residuals, found.ridge]
        if weight in experts:
            blocks = (
                found.keys.reshape(len(found), experts[weight], -1),
                found.preimages.reshape(len(found), experts[weight], -1),
            )
            row, expert = np.nonzero((blocks[0] != 0).any(-1) | (blocks[1] != 0).any(-1))
            tensors[f"{weight}.{_EXPERTS}"] = np.stack([row, expert], axis=1).astype(np.int32)
            arrays[:2] = [block[row, expert] for block in blocks]
        arrays[:3] = map(_shortest, arrays[:3])
        tensors |= {f"{weight}.{part}": np.ascontiguousarray(a) for part, a in zip(_PARTS, arrays, strict=True)}
    return save(tensors)


def _shortest(array: np.ndarray) -> np.ndarray:
    """The same numbers in float16 where it holds each of them, else as they are."""
    with np.errstate(over="ignore"):
        half = array.astype(np.float16)
    return half if np.array_equal(half, array) else array


def _unpacked(tensors: dict[str, np.ndarray], weight: str, n: int, inner: int) -> None:
    """Put the keys and preimages of a stacked weight, of which only some blocks are stored, at their places, if they can be such."""
    at = tensors.pop(f"{weight}.{_EXPERTS}", None)
    if at is None:
        return
    parts = [tensors.get(f"{weight}.{part}") for part in _PARTS[:2]]
    if at.ndim != 2 or at.shape[1] != 2 or at.dtype != np.int32:
        return
    for name, part in zip(_PARTS, parts, strict=False):
        if part is None or part.ndim != 2 or len(part) != len(at) or not part.shape[1] or inner % part.shape[1]:
            return
        count = inner // part.shape[1]
        places = at[:, 0].astype(np.int64) * count + at[:, 1]
        if len(at) and (at.min() < 0 or at[:, 0].max() >= n or at[:, 1].max() >= count or (np.diff(places) <= 0).any()):
            return
        whole = np.zeros((n, count, part.shape[1]), part.dtype)
        whole[at[:, 0], at[:, 1]] = part
        tensors[f"{weight}.{name}"] = whole.reshape(n, inner)


def read_additive(repository: Store, elements: Iterable[Element]) -> dict[str, list[Delta]]:
    """The deltas of the additive patches of a set per weight, in ascending order of patch id.

    Raises:
        CorruptStoreError: a patch's tensors are not what its manifest says.
    """
    found: dict[str, list[Delta]] = {}
    for identity in sorted(additive_patches(repository, elements)):
        patch = repository.patch(identity)
        for weight, delta in read_deltas(repository.objects.get(patch.tensors), patch.weights).items():
            found.setdefault(weight, []).append(delta)
    return found


def additive_patches(repository: Store, elements: Iterable[Element]) -> frozenset[str]:
    """The additive patches of a set. Its shards are no part of the weights that columns are solved for."""
    whole = (identity for identity, request in elements if request is None)
    return frozenset(identity for identity in whole if repository.patch(identity).kind == "additive")


def read_columns(repository: Store, elements: Iterable[Element]) -> dict[str, Columns]:
    """The columns of a set per weight, each row labelled with its element; in the set's order (patch id, then request id).

    What the set's additive patches bring at a key is taken off its residual: the columns ask for the rest.

    Raises:
        CorruptStoreError: a patch's tensors are not what its manifest says.
    """
    elements = frozenset(elements)
    return columns_beside(repository, elements, read_additive(repository, elements))


def read_rows(
    patch_of: Callable[[str], Patch],
    file_of: Callable[[str], Span],
    elements: Iterable[Element],
    weight: str,
    shape: tuple[int, int],
) -> Columns:
    """The columns of one weight as they were recorded, whatever additive patches are active; labelled, in the set's order.

    Only that weight's bytes are read, and nothing is hashed.

    Args:
        patch_of, file_of: a patch, and the file of a tensors object, by id.

    Raises:
        CorruptStoreError: a patch's tensors are not what its manifest says.
    """
    parts = [no_columns(shape)]
    for identity, requests in _by_patch(elements).items():
        patch = patch_of(identity)
        if weight not in patch.weights:
            continue
        rows = _rows_of(identity, patch, requests)
        try:
            tensors = Tensors(file_of(patch.tensors))
            wanted = {*tensors} & {f"{weight}.{part}" for part in (*_PARTS, _EXPERTS)}
            arrays = {name: tensors[name] for name in wanted}
        except CorruptStoreError as error:
            raise _damaged(identity, f"its tensors cannot be read ({error.message})") from error
        taken = _sound_columns(identity, patch, weight, arrays).take(rows)
        parts.append(replace(taken, labels=tuple((identity, one) for one in requests)))
    return join(parts)


def _rows_of(identity: str, patch: Patch, requests: Sequence[str]) -> list[int]:
    """Where some requests stand among a patch's."""
    place = {request: row for row, request in enumerate(patch.requests)}
    lacking = [request for request in requests if request not in place]
    if lacking:
        raise _damaged(identity, f"it has no column of the request {lacking[0][:12]} that a set takes from it")
    return [place[request] for request in requests]


def _by_patch(elements: Iterable[Element]) -> dict[str, list[str]]:
    """The requests of each closed-form patch, in the set's order."""
    wanted: dict[str, list[str]] = {}
    for identity, request in sorted(elements, key=lambda element: (element[0], element[1] or "")):
        if request is not None:
            wanted.setdefault(identity, []).append(request)
    return wanted


def columns_beside(
    repository: Store, elements: Iterable[Element], additive: Mapping[str, Sequence[Delta]]
) -> dict[str, Columns]:
    """The columns among ``elements``, with residuals against W0 plus those additive deltas."""
    parts: dict[str, list[Columns]] = {}
    for found in read_patches(repository, elements):
        for weight, columns in found.items():
            parts.setdefault(weight, []).append(columns)
    joined = {weight: join(found) for weight, found in sorted(parts.items())}
    return {weight: beyond(columns, additive.get(weight, ())) for weight, columns in joined.items()}


def read_patches(repository: Store, elements: Iterable[Element]) -> Iterator[dict[str, Columns]]:
    """The columns among ``elements`` as they were recorded, patch by patch in the set's order, of which one is held at a time.

    Raises:
        CorruptStoreError: a patch's tensors are not what its manifest says.
    """
    for identity, requests in _by_patch(elements).items():
        patch = repository.patch(identity)
        rows, labels = _rows_of(identity, patch, requests), tuple((identity, one) for one in requests)
        found = _patch_columns(repository, identity, patch)
        yield {weight: replace(columns.take(rows), labels=labels) for weight, columns in found.items()}


def _patch_columns(repository: Store, identity: str, patch: Patch) -> dict[str, Columns]:
    try:
        tensors = load(repository.objects.get(patch.tensors))
    except SafetensorError as error:
        raise _damaged(identity, f"its tensors cannot be read ({error})") from error
    return {weight: _sound_columns(identity, patch, weight, tensors) for weight in patch.weights}


def _sound_columns(identity: str, patch: Patch, weight: str, tensors: dict[str, np.ndarray]) -> Columns:
    """Columns of the shapes that a patch states, from its tensors."""
    n, (out, inner) = len(patch.requests), patch.weights[weight]
    _unpacked(tensors, weight, n, inner)
    arrays = [tensors.get(f"{weight}.{part}") for part in _PARTS]
    expected = [(n, inner), (n, inner), (n, out), (n,)]
    valid = [a for a, shape in zip(arrays, expected, strict=True) if a is not None and _is_column(a, shape)]
    if len(valid) != len(_PARTS):
        raise _damaged(identity, f"the columns of {weight} are missing, misshapen or not finite")
    keys, preimages, residuals, ridge = (array.astype(np.float32, copy=False) for array in valid)
    return Columns(keys, preimages, residuals, ridge)


def _is_column(array: np.ndarray, shape: tuple[int, ...]) -> bool:
    return array.shape == shape and array.dtype in (np.float32, np.float16) and bool(np.isfinite(array).all())


def _damaged(patch: str, reason: str) -> CorruptStoreError:
    return CorruptStoreError(
        f"patch {patch[:12]} is damaged: {reason}", remedy="Run `patchhub fsck` to see what else is.", patch=patch
    )


_REMEDY = "Do not use it."


@dataclass(frozen=True)
class _ChatForm:
    """The text that stood around each prompt."""

    before: Annotated[str, TEXT]
    after: Annotated[str, TEXT]


_SETTINGS = {
    "also": optional(record_of(_ChatForm)),
    "chat": optional(record_of(_ChatForm)),
    "contexts": list_of(TEXT),
    "keeps": list_of(IDENTIFIER),
    "layers": list_of(COUNT),
    "openings": map_of(TEXT),
    "refreshes": list_of(IDENTIFIER),
    "ridge": NUMBER,
}
"""What is read of the settings of a patch of kind closed_form."""


def tensor_check(weights: Mapping[str, tuple[int, int]], linear: Mapping[str, tuple[int, int]]) -> CheckTensors:
    """The check of everything that patches and commits of a base may refer to.

    Args:
        weights: (out, in) of the weights that facts are written into.
        linear: (out, in) of those that a state may change.
    """

    def check(owner: Owner, file: Span) -> None:
        _refuse_metadata(file)
        if isinstance(owner, Patch) and owner.kind == "closed_form":
            _check_settings(owner)
            _check_columns(owner, file)
        elif isinstance(owner, Patch) and owner.kind == "shard":
            shard_record(owner)
            _check_shard(owner, file, weights)
        else:
            _check_deltas(file, owner.weights if isinstance(owner, Patch) else linear)

    return check


def _refuse_metadata(file: Span) -> None:
    """Refuse a ``__metadata__``, however it is spelled, and a name that stands twice, which safetensors lets pass."""
    length = int.from_bytes(file.read(0, 8), "little")
    header = file.read(8, min(length, MAX_HEADER))
    try:
        names = [name for name, _ in json.loads(header, object_pairs_hook=list)]
    except (ValueError, TypeError, RecursionError) as error:
        raise CorruptStoreError(f"its tensors are no readable safetensors file ({error})", remedy=_REMEDY) from error
    if "__metadata__" in names:
        raise CorruptStoreError("its tensors carry a __metadata__, which the format does not have", remedy=_REMEDY)
    if len(set(names)) < len(names):
        raise CorruptStoreError("its tensors have two of one name", remedy=_REMEDY)


def _check_settings(patch: Patch) -> None:
    """The settings that other commands read must be of their types; which of them are there is for those to see."""
    for name, codec in _SETTINGS.items():
        if name in patch.settings:
            try:
                codec.decode(patch.settings[name], f"settings.{name}")
            except MalformedError as error:
                raise CorruptStoreError(str(error), remedy=_REMEDY, field=error.path) from None


def _check_deltas(file: Span, weights: Mapping[str, tuple[int, int]]) -> None:
    with _numpy_types():
        read_deltas(file.read(), weights)


def _check_shard(patch: Patch, file: Span, weights: Mapping[str, tuple[int, int]]) -> None:
    with _numpy_types():
        read_shard_change(patch, file.read(), weights)


@contextmanager
def _numpy_types() -> Iterator[None]:
    """Refuse tensors of a type that numpy does not have."""
    try:
        yield
    except (KeyError, TypeError, AttributeError) as error:
        raise CorruptStoreError(f"a delta has values of a forbidden type ({error})", remedy=_REMEDY) from error


def _check_columns(patch: Patch, file: Span) -> None:
    """The columns of every weight and z, and nothing else, finite and of the shapes that the patch states."""
    n = len(patch.requests)
    shapes: dict[str, tuple[int, ...]] = {}
    for weight, (out, inner) in patch.weights.items():
        shapes |= {f"{weight}.k": (n, inner), f"{weight}.u": (n, inner), f"{weight}.r": (n, out)}
        shapes[f"{weight}.lambda"] = (n,)
    try:
        tensors = load(file.read())
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptStoreError(f"its columns are no readable safetensors file ({error})", remedy=_REMEDY) from error
    for weight, (_, inner) in patch.weights.items():
        _unpacked(tensors, weight, n, inner)
    targets = tensors.pop("z", None)
    found = {name: array.shape for name, array in tensors.items()}
    if found != shapes or targets is None or targets.ndim != 2 or len(targets) != n:
        raise CorruptStoreError("its columns do not have the shapes that the patch states", remedy=_REMEDY)
    for name, array in {**tensors, "z": targets}.items():
        if array.dtype not in STORED_DTYPES or not bool(np.isfinite(array).all()):
            raise CorruptStoreError(f"its tensor {name} has a forbidden type or value", remedy=_REMEDY, tensor=name)
        if name.endswith(".lambda") and not bool((array > 0).all()):
            raise CorruptStoreError(f"its tensor {name} has a weight that is not above 0", remedy=_REMEDY, tensor=name)
