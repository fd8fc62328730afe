"""Where the attention and the feed-forward network of each block write into the residual stream, found without weights.

The model is run once on the meta device, which computes shapes but no numbers, with autograd recording. A projection
writes into the stream if the block's output is reached from the projection's output through additions (and changes of
view or type), with at most a number and a norm on its way to the first of them: that is what stands *behind* it. The
feed-forward projection is told from the attention's by what it is computed from: attention mixes positions (softmax,
batched products), a feed-forward network does not.

In a mixture of experts which tokens an expert gets depends on numbers. For the run a stand-in takes the place of each experts'
module, whose output then is one projection; beside it a shared expert, which every token passes, may write into the stream
through its own, as it is or times a gate of its own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal, TypeAlias

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from patchhub.models.experts import shape_of, stand_in

Orientation: TypeAlias = Literal["out_in", "in_out"]
"""How a weight is stored: ``out_in`` for Linear, ``in_out`` for GPT-2's Conv1D."""

_ADDITION = {"AddBackward0"}
_IDENTITY = {
    "ViewBackward0",
    "UnsafeViewBackward0",
    "ReshapeAliasBackward0",
    "AliasBackward0",
    "CloneBackward0",
    "ToCopyBackward0",
}
_SCALING, _SIGMOID, _SUM = "MulBackward0", "SigmoidBackward0", "SumBackward1"
_MIXING = ("softmax", "bmm", "convolution")  # of positions; attention has one or more, a feed-forward network none


_SOFTMAX_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}
_BY_PLACE = {"mpt"}  # attention goes by where a token stands in the cache
_WINDOWS = ("sliding_window", "attention_chunk_size", "window_size", "max_position_embeddings")

ROUTER: Final = "_patchhub_router"
"""The attribute of a model that decides something for each text when it first reads it (`runtime.routing`)."""


class StructureError(Exception):
    """The structure is not one that can be edited; the message is the reason, the start of a sentence."""


@dataclass(frozen=True)
class Projection:
    """A linear map into the residual stream.

    Attributes:
        path: of its module, relative to the block.
        shape: (out, in); of experts that of the stacked weight, (out, E in).
        orientation: how the weight is stored, of experts each expert's.
        experts: E; 0 of a plain linear map.
        active: how many experts a token is routed to.
        scale: what its output, or that of the norm behind it, is multiplied with before it enters the stream.
        gate: path of a linear map of the same input, relative to the block, whose sigmoid multiplies the output; None: there is none.
        apart: as of `ExpertsShape`.
        weight: path of its weight in the module.
    """

    path: str
    shape: tuple[int, int]
    orientation: Orientation
    experts: int = 0
    active: int = 0
    scale: float = 1.0
    gate: str | None = None
    apart: bool = False
    weight: str = "weight"

    @property
    def parameter(self) -> str:
        """The path of its weight, relative to the block."""
        return f"{self.path}.{self.weight}"

    @property
    def flat(self) -> bool:
        """Whether it is of experts that lie one below the other in a matrix of a part of their module."""
        return bool(self.experts) and "." in self.weight

    @property
    def passed(self) -> int:
        """How many numbers of a key are not zero."""
        return self.shape[1] // self.experts * self.active if self.experts else self.shape[1]


@dataclass(frozen=True)
class BlockStructure:
    """The projections through which one block writes into the stream.

    Attributes:
        feed_forward: one, or the routed and the shared experts.
        norm: path of the norm behind the feed-forward projection, relative to the block; None: there is none.
    """

    attention: Projection
    feed_forward: tuple[Projection, ...]
    norm: str | None


@dataclass
class _Record:
    """What one block did during the traced run, as autograd nodes, which keep their identity while they are listed."""

    start: list[Any] = field(default_factory=list)
    end: list[Any] = field(default_factory=list)
    projections: list[tuple[str, Any]] = field(default_factory=list)
    norms: list[tuple[str, Any, Any]] = field(default_factory=list)  # path, node of the output, node of the input
    gates: list[tuple[str, Any]] = field(default_factory=list)  # linear maps to one number
    slots: dict[str, list[int]] = field(default_factory=dict)  # path of an experts' module -> experts of a token


def is_recurrent(config: Any) -> bool:
    """Whether some block keeps another state of what it has read than keys and values: linear attention, state spaces, convolutions.

    Such a state cannot be cut after any of its positions, so texts are read from their beginning.
    """
    text = config.get_text_config()
    return bool(set(getattr(text, "layer_types", None) or ()) - _SOFTMAX_ATTENTION)


def takes_gaps(model: nn.Module, length: int) -> bool:
    """Whether a text of so many tokens may be read in parts, with positions between them in the cache that are masked.

    So it is where attention goes by the positions that are told, no window is narrower than the text, and what was read is nothing but keys
    and values.

    Args:
        length: with the masked positions.
    """
    config: Any = model.config
    text = config.get_text_config()
    windows = [getattr(text, name, None) or length for name in _WINDOWS]
    whole = is_recurrent(config) or getattr(model, ROUTER, None) is not None
    return not (whole or text.model_type in _BY_PLACE or getattr(text, "alibi", False)) and length <= min(windows)


def find_structure(model: nn.Module, n_layers: int, d_model: int) -> tuple[str, tuple[BlockStructure, ...]]:
    """The path of the list of blocks, and the structure of each block, of a model on the meta device.

    Raises:
        StructureError: saying why the model cannot be edited.
    """
    path, blocks = _block_list(model, n_layers)
    if "input_ids" not in inspect.signature(model.get_submodule(path.rpartition(".")[0]).forward).parameters:
        raise StructureError("keeps its blocks in a part that is not given tokens, as encoders do")
    records = _trace(model, blocks, d_model)
    return path, tuple(_block_structure(block, record) for block, record in zip(blocks, records, strict=True))


def orientation_of(module: nn.Module) -> Orientation | None:
    """How the weight of a linear module is stored, or None if it is no such module."""
    if isinstance(module, nn.Linear):
        return "out_in"
    return "in_out" if isinstance(module, Conv1D) else None


def hidden_of(output: Any) -> Tensor:
    """The hidden states in what a block returns: the tensor itself, or the first of a tuple (GPT-J, GPT-Neo)."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def _block_list(model: nn.Module, n_layers: int) -> tuple[str, list[nn.Module]]:
    found = [
        (path, list(module))
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == n_layers
    ]
    if len(found) > 1:  # a vision tower may be as deep
        inside = set(model.get_decoder().modules())  # type: ignore[operator]
        found = [(path, blocks) for path, blocks in found if blocks[0] in inside]
    if len(found) != 1:
        raise StructureError(f"has {len(found)} lists of {n_layers} modules instead of one list of decoder blocks")
    return found[0]


def _trace(model: nn.Module, blocks: list[nn.Module], d_model: int) -> list[_Record]:
    """One run over four positions on the meta device, and what was recorded in each block."""
    ids = torch.zeros(1, 4, dtype=torch.long, device="meta")
    masks: list[Tensor | None] = [torch.ones_like(ids), torch.zeros(1, 1, 4, 4, device="meta"), None]
    if is_recurrent(model.config):
        # Such layers ask whether a mask of two dimensions hides anything, which has no answer here; some take one of four, some none.
        masks = masks[1:]
    failed: Exception | None = None
    for mask in masks:
        try:
            return _run(model, blocks, d_model, ids, mask)
        except Exception as error:  # any model's own code runs here
            failed = failed or error
    raise StructureError(f"cannot be traced without weights ({type(failed).__name__}: {failed})") from failed


def _run(model: nn.Module, blocks: list[nn.Module], d_model: int, ids: Tensor, mask: Tensor | None) -> list[_Record]:
    records = [_Record() for _ in blocks]
    handles = [h for block, record in zip(blocks, records, strict=True) for h in _watch(block, record, d_model)]
    active = int(getattr(model.config.get_text_config(), "num_experts_per_tok", None) or 1)  # type: ignore[operator,union-attr]
    replaced = [
        m for block, record in zip(blocks, records, strict=True) for m in _replace_experts(block, record, active)
    ]
    try:
        with torch.enable_grad():
            model.eval()(input_ids=ids, attention_mask=mask, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
        for module in replaced:
            del module.__dict__["forward"]
    return records


def _replace_experts(block: nn.Module, record: _Record, active: int) -> Iterable[nn.Module]:
    for path, module in block.named_modules():
        if shape_of(module) is not None:
            module.forward = stand_in(module, record.slots.setdefault(path, []), active)
            yield module


def _watch(block: nn.Module, record: _Record, d_model: int) -> Iterable[Any]:
    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        record.start.append(hidden.grad_fn)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        record.end.append(hidden_of(output).grad_fn)

    def project(path: str) -> Callable[..., None]:
        return lambda module, args, output: record.projections.append((path, output.grad_fn))

    def gate(path: str) -> Callable[..., None]:
        return lambda module, args, output: record.gates.append((path, output.grad_fn))

    def norm(path: str) -> Callable[..., None]:
        def note(module: nn.Module, args: Any, output: Any) -> None:
            if args and isinstance(output, Tensor):  # a part that holds norms may be called one
                record.norms.append((path, output.grad_fn, args[0].grad_fn))

        return note

    yield block.register_forward_pre_hook(enter, with_kwargs=True)
    yield block.register_forward_hook(leave)
    for path, module in block.named_modules():
        known = shape_of(module)
        out = known.out if known else _shape(module)[0] if orientation_of(module) else None
        if out == d_model:
            yield module.register_forward_hook(project(path))
        elif out == 1:
            yield module.register_forward_hook(gate(path))
        elif path and "norm" in type(module).__name__.lower():
            yield module.register_forward_hook(norm(path))


def _block_structure(block: nn.Module, record: _Record) -> BlockStructure:
    if len(record.end) != 1 or not record.projections:
        raise StructureError("has blocks that are not called once per pass, or that hold no projection into the stream")
    if any(output is record.end[0] for _, output, _ in record.norms):
        raise StructureError(_why_changed(record))
    nodes = {node: path for path, node in record.projections}
    stop = {*record.start, *nodes}
    ways, multiplied = _ways(record)
    mixing = {path: _mixing_of(node, stop) for node, path in nodes.items()}
    feed_forward = [path for path in ways if not mixing[path]]
    # Beside softmax attention a block may hold a recurrent layer; one of the two stands for what mixes positions.
    mixed = [path for path in ways if mixing[path] and ways[path].gate is None]
    attention = [path for path in mixed if "softmax" in mixing[path]] or mixed
    if not feed_forward:
        raise StructureError(
            "has no feed-forward projection whose output enters the residual stream as it is, scaled or through one norm "
            "(a gate or a state-space layer stands in its place)"
        )
    if len(attention) != 1 or (len(feed_forward) != 1 and not _are_experts(record, feed_forward)):
        raise StructureError(
            "has blocks other than one attention and one feed-forward network "
            f"(into the stream lead: {', '.join(path for path, _ in record.projections)})"
        )
    if multiplied:
        raise StructureError(_why_changed(record))
    if len({ways[path].norm for path in feed_forward}) != 1:
        raise StructureError("has a norm behind some of its experts only")
    return BlockStructure(
        _projection(block, attention[0], record),
        tuple(
            replace(_projection(block, path, record), scale=ways[path].scale, gate=ways[path].gate)
            for path in feed_forward
        ),
        norm=ways[feed_forward[0]].norm,
    )


def _are_experts(record: _Record, paths: Sequence[str]) -> bool:
    """Whether these are one routed and one shared expert's projections, in any order."""
    return len(paths) == 2 and sum(path in record.slots for path in paths) == 1


@dataclass(frozen=True)
class _Way:
    """What was passed on the way down from a block's output: a norm, the number before it, a gate, and whether there was nothing."""

    norm: str | None = None
    scale: float = 1.0
    gate: str | None = None

    @property
    def plain(self) -> bool:
        return self == _Way()


def _ways(record: _Record) -> tuple[dict[str, _Way], bool]:
    """What stands behind each projection that writes into the stream, and whether the stream itself is multiplied."""
    nodes = {node: path for path, node in record.projections}
    norms = {output: (path, entered) for path, output, entered in record.norms}
    gates = {node: path for path, node in record.gates}
    found: dict[str, _Way] = {}
    waiting: list[tuple[Any, _Way]] = [(record.end[0], _Way())]
    seen: set[Any] = set()
    multiplied = False
    while waiting:
        node, way = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in nodes:
            found[nodes[node]] = way
        elif node in record.start:
            multiplied |= not way.plain
        elif node in norms and way.norm is None:
            path, entered = norms[node]
            waiting.append((entered, _Way(path, way.scale)))
        elif (gated := _gated(node, gates)) is not None and way.norm is None and way.gate is None:
            path, parent = gated
            waiting.append((parent, _Way(None, way.scale, path)))
        elif (factor := _factor(node)) is not None and way.norm is None:
            waiting += [(parent, replace(way, scale=way.scale * factor)) for parent, _ in node.next_functions]
        elif _keeps_sums(node) or _sums_experts(node, nodes, record):
            waiting += [(parent, way) for parent, _ in node.next_functions]
    return found, multiplied


def _factor(node: Any) -> float | None:
    """The number that a node multiplies with; None: it does something else."""
    if type(node).__name__ != _SCALING:
        return None
    for factor in (node._saved_self, node._saved_other):
        if factor is not None and factor.ndim == 0 and not factor.is_meta:
            return float(factor)
    return None


def _gated(node: Any, gates: Mapping[Any, str]) -> tuple[str, Any] | None:
    """Of a product with the sigmoid of one number per position: the linear map that gives it, and the node of the other factor."""
    if type(node).__name__ != _SCALING or node._saved_self is None or node._saved_other is None:
        return None
    parents = [parent for parent, _ in node.next_functions]
    for place, factor in enumerate((node._saved_self, node._saved_other)):
        if factor.ndim and factor.shape[-1] == 1 and type(parents[place]).__name__ == _SIGMOID:
            found = parents[place].next_functions[0][0]
            while found is not None and found not in gates and type(found).__name__ in _IDENTITY:
                found = found.next_functions[0][0]
            return (gates[found], parents[1 - place]) if found in gates else None
    return None


def _reachable(root: Any, stop: set[Any]) -> list[Any]:
    """The autograd nodes from which ``root`` is computed, in no order; the search does not go past ``stop``."""
    seen: dict[Any, None] = {}
    waiting = [root]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen[node] = None
        if node is not root and node in stop:
            continue
        waiting += [parent for parent, _ in node.next_functions]
    return list(seen)


def _keeps_sums(node: Any) -> bool:
    name = type(node).__name__
    return name in _IDENTITY or (name in _ADDITION and node._saved_alpha == 1)


def _sums_experts(node: Any, nodes: Mapping[Any, str], record: _Record) -> bool:
    """Whether a node is the sum of what a layer's experts give, where their module leaves that to its caller."""
    if type(node).__name__ != _SUM:
        return False
    parent = node.next_functions[0][0]
    while parent is not None and parent not in nodes and type(parent).__name__ in _IDENTITY:
        parent = parent.next_functions[0][0]
    return nodes.get(parent) in record.slots


def _mixing_of(node: Any, stop: set[Any]) -> set[str]:
    """The kinds of mixing of positions that a projection's output is computed from."""
    names = [type(n).__name__.lower() for n in _reachable(node, stop)]
    return {word for word in _MIXING for name in names if word in name}


def _why_changed(record: _Record) -> str:
    norms = [path for path, output, _ in record.norms if output is record.end[0]]
    if norms:
        return f"applies a norm ({norms[-1]}) to the residual stream itself, after the feed-forward network was added"
    return "multiplies the residual stream itself in each block"


def _projection(block: nn.Module, path: str, record: _Record) -> Projection:
    module = block.get_submodule(path)
    known = shape_of(module)
    if known is not None:
        orientation: Orientation | None = "in_out" if known.transposed else "out_in"
        shape, active = (known.out, known.experts * known.inner), record.slots[path][0]
        assert orientation is not None
        return Projection(path, shape, orientation, known.experts, active, apart=known.apart, weight=known.parameter)
    orientation = orientation_of(module)
    assert orientation is not None
    return Projection(path, _shape(module), orientation)


def _shape(module: nn.Module) -> tuple[int, int]:
    weight: Any = module.weight
    rows, columns = weight.shape
    return (rows, columns) if orientation_of(module) == "out_in" else (columns, rows)
