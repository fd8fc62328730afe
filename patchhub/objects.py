"""The objects of store format 1 as frozen dataclasses (``docs/format.md``); `canonical` says how they become bytes.

The digest of an active set is a sum of one number per element, so a change of the set costs what it changes (decision 5).

The linear weights of a base's blocks are told from the names and shapes of its tensors alone. Facts are written into feed-forward output
projections only; a change from elsewhere may be to any linear weight: attention, gate and up projections too, and to other matrices and
vectors where it says so.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any, ClassVar, Final, NamedTuple, Protocol

from patchhub.canonical import (
    COUNT,
    FLAG,
    IDENTIFIER,
    INSTANT,
    MAPPING,
    NUMBER,
    TEXT,
    Codec,
    MalformedError,
    StoredObject,
    canonical_json,
    choice,
    list_of,
    map_of,
    nfc,
    object_id,
    optional,
    read,
    record_of,
    tuple_of,
)
from patchhub.errors import RequestError

WIDTH: Final = 2048
"""Bytes of an element's number and of a sum."""


def element_sum(elements: Iterable[tuple[str, str | None]]) -> int:
    """The sum of the numbers of distinct elements, not reduced; sums of disjoint sets add up."""
    return sum(_number(patch, request) for patch, request in elements)


def digest_of_sum(total: int) -> str:
    """The set digest that a sum stands for, 64 hexadecimal digits; `total` may be negative or too large by multiples."""
    return hashlib.sha256((total % (1 << 8 * WIDTH)).to_bytes(WIDTH, "little")).hexdigest()


def _number(patch: str, request: str | None) -> int:
    name = patch + (request or "")
    return int.from_bytes(hashlib.shake_256(name.encode("ascii")).digest(WIDTH), "little")


PATCH_KINDS: Final = ("closed_form", "additive", "shard")
METRIC_KINDS: Final = ("covariance", "null_space")
METRIC_MATRICES: Final = {"covariance": "factor", "null_space": "complement"}
"""What the matrix is called that preimages are read from, by the kind of metric."""

Element = tuple[str, str | None]
"""What is active: (patch id, request id), or (patch id, None) for a whole additive patch or shard."""

# --- the active set -------------------------------------------------------------------------------------------------


def groups_of(elements: Iterable[Element]) -> list[list[Any]]:
    """Elements as ``[[patch, [request, ...] | null], ...]``, sorted.

    Raises:
        ValueError: a patch is there both as a whole and by request.
    """
    groups: dict[str, set[str | None]] = {}
    for patch, request in elements:
        groups.setdefault(patch, set()).add(request)
    result: list[list[Any]] = []
    for patch, requests in sorted(groups.items()):
        if None in requests and len(requests) > 1:
            raise ValueError(f"patch {patch[:12]} is listed both as a whole and by request")
        result.append([patch, None if None in requests else sorted(r for r in requests if r is not None)])
    return result


def _decode_groups(value: Any, path: str) -> frozenset[Element]:
    group = tuple_of(IDENTIFIER, optional(list_of(IDENTIFIER)))
    elements: set[Element] = set()
    for patch, requests in list_of(group).decode(value, path):
        elements.update([(patch, None)] if requests is None else [(patch, request) for request in requests])
    return frozenset(elements)


_GROUPS = Codec(_decode_groups, groups_of)


def set_json(elements: Iterable[Element]) -> bytes:
    """The canonical bytes of a set object."""
    return canonical_json(groups_of(elements))


def set_from_json(data: bytes) -> frozenset[Element]:
    """The inverse of `set_json`."""
    result: frozenset[Element] = read("set", data, lambda value: _decode_groups(value, ""), set_json)
    return result


def set_digest(elements: Iterable[Element]) -> str:
    """The digest of a set, by which sets are compared; see `patchhub.objects`."""
    return digest_of_sum(element_sum(frozenset(elements)))


EMPTY_SET: Final = set_digest(())
"""The set digest of the unpatched model."""


SLOT: Final = "{}"
"""The place of the subject in the prompt of a request."""


# --- requests -------------------------------------------------------------------------------------------------------

METADATA_BYTES: Final = 4096
"""What the metadata of a request may take, as canonical JSON."""


def _decode_metadata(value: Any, path: str) -> dict[str, Any]:
    metadata: dict[str, Any] = MAPPING.decode(value, path)
    if len(canonical_json(metadata)) > METADATA_BYTES:
        raise MalformedError(path, f"is longer than {METADATA_BYTES} bytes")
    return metadata


def _encode_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    if len(canonical_json(metadata)) > METADATA_BYTES:
        raise RequestError(
            f"the metadata of a request is longer than {METADATA_BYTES} bytes", remedy="Keep an address of it instead."
        )
    return dict(metadata)


_METADATA = Codec(_decode_metadata, _encode_metadata, empty={})


@dataclass(frozen=True)
class Neighbor:
    """A prompt near the request's whose answer `target` must not change."""

    prompt: Annotated[str, TEXT]
    target: Annotated[str, TEXT]


@dataclass(frozen=True)
class Request:
    """One fact to write. `prompt` holds ``{}`` where the subject stands; use `make` for text of unknown form.

    `metadata` is what whoever wrote the fact says of it besides, such as its source: kept and shown, and read by nothing.
    """

    prompt: Annotated[str, TEXT]
    subject: Annotated[str, TEXT]
    target_new: Annotated[str, TEXT]
    target_true: Annotated[str | None, optional(TEXT)]
    paraphrases: Annotated[tuple[str, ...], list_of(TEXT)]
    neighborhood: Annotated[tuple[Neighbor, ...], list_of(record_of(Neighbor))]
    metadata: Annotated[Mapping[str, Any], _METADATA] = field(default_factory=dict, hash=False)

    @classmethod
    def make(
        cls,
        prompt: str,
        subject: str,
        target_new: str,
        *,
        target_true: str | None = None,
        paraphrases: Sequence[str] = (),
        neighborhood: Iterable[tuple[str, str]] = (),
    ) -> Request:
        """A request from text as a user writes it: normalised to NFC, outer white space removed.

        `prompt` has the subject in it, once, or ``{}`` in its place. `neighborhood` are pairs (prompt, target).

        Raises:
            RequestError: empty subject, prompt or target, or no single place for the subject.
        """
        prompt, subject, target_new = (_clean(text) for text in (prompt, subject, target_new))
        for name, text in (("prompt", prompt), ("subject", subject), ("target_new", target_new)):
            if not text:
                raise RequestError(f"the request for {subject or prompt!r} has an empty {name}", remedy="Fill it in.")
        return cls(
            prompt=_template(prompt, subject),
            subject=subject,
            target_new=target_new,
            target_true=None if target_true is None else _clean(target_true),
            paraphrases=tuple(_clean(text) for text in paraphrases),
            neighborhood=tuple(Neighbor(_clean(text), _clean(target)) for text, target in neighborhood),
        )

    @cached_property
    def id(self) -> str:
        """SHA-256 of canonical ``{prompt, subject, target_new}``: what makes two requests the same fact."""
        parts = {"prompt": self.prompt, "subject": self.subject, "target_new": self.target_new}
        return object_id(canonical_json({name: nfc(text) for name, text in parts.items()}))

    @property
    def text(self) -> str:
        """The prompt with the subject filled in."""
        return self.prompt.replace("{}", self.subject)


def _clean(text: str) -> str:
    if not isinstance(text, str):
        raise RequestError(f"{text!r} is not text", remedy="Write it as a JSON string.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise RequestError(f"{text!r} is not valid Unicode text", remedy="Save the file as UTF-8.") from None
    return nfc(text).strip()


def _template(prompt: str, subject: str) -> str:
    """`prompt` with ``{}`` for the subject."""
    places = prompt.count("{}")
    if places == 1:
        return prompt
    if places == 0 and prompt.count(subject) == 1:
        return prompt.replace(subject, "{}")
    found = f"holds {{}} {places} times" if places else f"holds the subject {prompt.count(subject)} times"
    raise RequestError(
        f"the prompt {prompt!r} {found}, not once",
        remedy=f"Write {{}} exactly once, where the subject {subject!r} stands.",
        prompt=prompt,
        subject=subject,
    )


_REQUESTS = list_of(record_of(Request))


def requests_json(requests: Iterable[Request]) -> bytes:
    """The canonical bytes of a requests blob, in the order of the patch's columns."""
    return canonical_json(_REQUESTS.encode(requests))


def requests_from_json(data: bytes) -> list[Request]:
    """The inverse of `requests_json`."""
    return list(read("requests blob", data, lambda value: _REQUESTS.decode(value, ""), requests_json))


# --- objects with a type --------------------------------------------------------------------------------------------


class TensorRecord(NamedTuple):
    """One tensor of the base: safetensors dtype, shape, SHA-256 of its raw bytes."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str


_TENSOR = tuple_of(TEXT, list_of(COUNT), IDENTIFIER, make=TensorRecord)


@dataclass(frozen=True)
class Base(StoredObject):
    """The identity of the unpatched model."""

    TYPE: ClassVar[str] = "base"
    architecture: Annotated[Mapping[str, Any], MAPPING]
    tensors: Annotated[Mapping[str, TensorRecord], map_of(_TENSOR)]


@dataclass(frozen=True)
class Metric(StoredObject):
    """How preimages follow from second moments of keys, and what those were measured on; the moments themselves are cache.

    `text` and `truncation` are None for moments that were computed elsewhere.
    """

    TYPE: ClassVar[str] = "metric"
    base: Annotated[str, IDENTIFIER]
    kind: Annotated[str, choice(*METRIC_KINDS)]
    settings: Annotated[Mapping[str, float], map_of(NUMBER)]
    source: Annotated[Mapping[str, Any], MAPPING]
    text: Annotated[str | None, optional(IDENTIFIER)]
    tokens: Annotated[int, COUNT]
    truncation: Annotated[int | None, optional(COUNT)]


@dataclass(frozen=True)
class Text(StoredObject):
    """The token ids that a metric was measured on, one list per sequence."""

    TYPE: ClassVar[str] = "text"
    token_ids: Annotated[tuple[tuple[int, ...], ...], list_of(list_of(COUNT))]


@dataclass(frozen=True)
class Patch(StoredObject):
    """What one edit batch produced. `weights` maps each edited weight to (out, in); rows follow `requests`."""

    TYPE: ClassVar[str] = "patch"
    base: Annotated[str, IDENTIFIER]
    kind: Annotated[str, choice(*PATCH_KINDS)]
    made_on: Annotated[str | None, optional(IDENTIFIER)]
    method: Annotated[str, TEXT]
    metric: Annotated[str | None, optional(IDENTIFIER)]
    requests: Annotated[tuple[str, ...], list_of(IDENTIFIER)]
    requests_blob: Annotated[str, IDENTIFIER]
    settings: Annotated[Mapping[str, Any], MAPPING]
    tensors: Annotated[str, IDENTIFIER]
    weights: Annotated[Mapping[str, tuple[int, int]], map_of(tuple_of(COUNT, COUNT))]

    @property
    def elements(self) -> frozenset[Element]:
        """What the whole patch activates: one element per request if its columns can be taken one by one."""
        whole = self.kind != "closed_form"
        identity = self.id
        return frozenset([(identity, None)] if whole else [(identity, request) for request in self.requests])


@dataclass(frozen=True)
class Keyframe:
    """The whole state of a commit: ids of its set object and of its whole delta (None: no change of weights)."""

    set_id: Annotated[str, IDENTIFIER, "set"]
    tensors: Annotated[str | None, optional(IDENTIFIER)]


@dataclass(frozen=True)
class Commit(StoredObject):
    """A snapshot: the active set, as a change of the first parent's, and the delta of the state against it.

    `solved` says that no delta is kept: the state is solved from the columns of the set by whoever reads it.
    """

    TYPE: ClassVar[str] = "commit"
    added: Annotated[frozenset[Element], _GROUPS]
    author: Annotated[str, TEXT]
    base: Annotated[str, IDENTIFIER]
    check: Annotated[Mapping[str, Any], MAPPING]
    keyframe: Annotated[Keyframe | None, optional(record_of(Keyframe))]
    message: Annotated[str, TEXT]
    metric: Annotated[str | None, optional(IDENTIFIER)]
    parents: Annotated[tuple[str, ...], list_of(IDENTIFIER)]
    removed: Annotated[frozenset[Element], _GROUPS]
    same_as: Annotated[str | None, optional(IDENTIFIER)]
    set_digest: Annotated[str, IDENTIFIER, "set"]
    tensors: Annotated[str | None, optional(IDENTIFIER)]
    time: Annotated[str, INSTANT]
    solved: Annotated[bool, FLAG] = False


@dataclass(frozen=True)
class Note(StoredObject):
    """An evaluation made after the commit."""

    TYPE: ClassVar[str] = "note"
    commit: Annotated[str, IDENTIFIER]
    made_by: Annotated[str, TEXT]
    scores: Annotated[Mapping[str, Any], MAPPING]
    settings: Annotated[Mapping[str, Any], MAPPING]
    suite: Annotated[str, TEXT]


@dataclass(frozen=True)
class Operation(StoredObject):
    """One change of refs: ``changes`` maps each ref to (old target, new target), None where there is none.

    Not kept under ``objects/`` but as a row of the ``operations`` table; `previous` makes the rows a hash chain.
    """

    TYPE: ClassVar[str] = "operation"
    arguments: Annotated[Mapping[str, Any], MAPPING]
    author: Annotated[str, TEXT]
    changes: Annotated[Mapping[str, tuple[str | None, str | None]], map_of(tuple_of(optional(TEXT), optional(TEXT)))]
    command: Annotated[str, TEXT]
    previous: Annotated[str | None, optional(IDENTIFIER)]
    time: Annotated[str, INSTANT]
    undoes: Annotated[str | None, optional(IDENTIFIER)]


_FLOATS: Final = frozenset({"BF16", "F16", "F32", "F64"})
# A slice of a stacked parameter, which has a number of its own in checkpoints alone; and a router, which is no linear module.
_OF_EXPERTS: Final = re.compile(r"\.experts\.\d+\.|\.(?:gate|router|router\.layer)\.weight$")
_PARAMETER: Final = re.compile(r"\.(?:weight|bias)$")  # some tensors of checkpoints are buffers
_FIRST_NUMBER: Final = re.compile(r"(?P<block>(?P<blocks>.+?)\.\d+)\.")


class Tensor(Protocol):
    """What a header or a base object says of a tensor."""

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


def block_of(weight: str) -> str:
    """``model.layers.3`` of ``model.layers.3.mlp.down_proj.weight``; the name itself where no block is named."""
    found = _FIRST_NUMBER.match(weight)
    return found["block"] if found else weight


def linear_shapes(
    tensors: Mapping[str, Tensor], outputs: Mapping[str, tuple[int, int]], orientation: str
) -> dict[str, tuple[int, int]]:
    """(out, in) of every linear weight of the blocks, by parameter name; `outputs` alone where the blocks cannot be told.

    In the families that can be edited every float matrix of a block that is called ``weight`` is that of a linear module, but for
    experts and their routers, and all are stored alike: GPT-2's blocks hold Conv1D alone, the others Linear alone.

    Args:
        tensors: those of the checkpoint, by its names, which may lack a prefix of the parameters' or have one more.
        outputs: (out, in) of the feed-forward output projections, by parameter name.
        orientation: ``in_out`` if the weights are stored (in, out).
    """
    return _named_shapes(tensors, outputs, orientation)[0]


def tensor_shapes(
    tensors: Mapping[str, Tensor], outputs: Mapping[str, tuple[int, int]], orientation: str
) -> dict[str, tuple[int, int]]:
    """(out, in) of all that a change from elsewhere may change, by parameter name: `linear_shapes`, and other matrices and vectors."""
    shapes, alike = _named_shapes(tensors, outputs, orientation)
    if alike and orientation == "out_in":
        for name, tensor in tensors.items():
            fits = tensor.dtype in _FLOATS and 1 <= len(tensor.shape) <= 2 and _PARAMETER.search(name)
            if fits and not _OF_EXPERTS.search(name):
                rows, columns = (*tensor.shape, 1)[:2]
                shapes.setdefault(name, (rows, columns))
    return shapes


def _named_shapes(
    tensors: Mapping[str, Tensor], outputs: Mapping[str, tuple[int, int]], orientation: str
) -> tuple[dict[str, tuple[int, int]], bool]:
    """What `linear_shapes` returns, and whether the tensors have the names of the parameters."""
    known = next((name for name in outputs if name.endswith(".weight")), next(iter(outputs), ""))
    names: Iterable[str] = tensors
    if not known.endswith(".weight"):  # experts alone, whose tensors may have other names: blocks are compared instead
        known, names = block_of(known), {block_of(name) for name in tensors}
    stored = [name for name in names if known == name or known.endswith("." + name) or name.endswith("." + known)]
    blocks = _FIRST_NUMBER.match(known + ".")
    if not stored or blocks is None:
        return dict(outputs), False
    name = min(stored, key=lambda found: abs(len(found) - len(known)))
    lacking, extra = known.removesuffix(name), name.removesuffix(known) if name.endswith(known) else ""
    within = re.compile(rf"{re.escape(blocks['blocks'])}\.\d+\..+\.weight")
    shapes = dict(outputs)
    for name, tensor in tensors.items():
        parameter = lacking + name.removeprefix(extra)
        fits = len(tensor.shape) == 2 and tensor.dtype in _FLOATS and within.fullmatch(parameter)
        if fits and not _OF_EXPERTS.search(parameter):
            rows, columns = tensor.shape
            shapes.setdefault(parameter, (columns, rows) if orientation == "in_out" else (rows, columns))
    return shapes, not (lacking or extra) and known.endswith(".weight")
