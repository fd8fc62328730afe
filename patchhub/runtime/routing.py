"""Routing: each sequence is answered by the main memory or by a side memory of a model that stays the class it was.

Decisions live in the cache of a pass while text is decoded. Several side memories of one weight can be joined into one, by TIES (Yadav et
al. 2023) or as a plain sum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from patchhub.delta import Delta, Dense, LowRank, to_dense
from patchhub.errors import SettingsError
from patchhub.models.experts import Routed, gated_keys, module_of, shape_of
from patchhub.models.structure import ROUTER
from patchhub.models.tracing import in_rows

Merging: TypeAlias = Literal["ties", "linear"]


def merge_changes(
    changes: Sequence[Delta], method: Merging = "ties", density: float = 0.53
) -> Float[np.ndarray, "out in"]:
    """One change, float32, that stands for all; a single one stays as it is.

    Args:
        changes: of one weight, all of one shape.
        method: "linear" adds them up; "ties" first keeps the largest entries of each, elects a sign per entry and takes the mean of what
            agrees with it.
        density: the share of a change's nonzero entries that "ties" keeps.
    """
    matrices = [to_dense(change).astype(np.float32) for change in changes]
    if len(matrices) == 1:
        return matrices[0]
    if method == "linear":
        total: Float[np.ndarray, "out in"] = np.stack(matrices).sum(0)
        return total
    return _ties(np.stack([_trimmed(matrix, density) for matrix in matrices]))


def _trimmed(matrix: Float[np.ndarray, "out in"], density: float) -> Float[np.ndarray, "out in"]:
    """The matrix with all but the largest ``density`` of its nonzero entries, by magnitude, set to zero."""
    sizes = np.abs(matrix[matrix != 0])
    kept = round(density * sizes.size)
    if kept == 0:
        return np.zeros_like(matrix)
    least = np.partition(sizes, sizes.size - kept)[sizes.size - kept]
    return np.where(np.abs(matrix) >= least, matrix, np.float32(0))


def _ties(stacked: Float[np.ndarray, "n out in"]) -> Float[np.ndarray, "out in"]:
    """Per entry, the mean of the values that have the sign of the sum of all."""
    agree = (np.sign(stacked) == np.sign(stacked.sum(0))[None]) & (stacked != 0)
    mean: Float[np.ndarray, "out in"] = np.where(agree, stacked, np.float32(0)).sum(0)
    mean /= np.maximum(agree.sum(0), 1).astype(np.float32)
    return mean


class DecisionLayer(DynamicLayer):  # type: ignore[no-untyped-call]  # transformers registers subclasses untyped
    """A cache layer that holds decisions where others hold keys: (batch, weights) indices of side memories, -1 for the main one."""

    is_compileable = True

    def __init__(self, decision: Int[Tensor, "batch weights"]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # as above
        self.lazy_initialization(decision, decision)
        self.put(decision)

    def put(self, decision: Int[Tensor, "batch weights"] | None) -> None:
        self.keys = self.values = decision

    def get_seq_length(self) -> int:
        return 0 if self.keys is None else 1

    def reset(self) -> None:
        self.put(None)

    def crop(self, tokens_to_remove: int) -> None:
        """Shortening a text leaves its decision as it is."""


def real_tokens(mask: Any, time: int) -> Bool[Tensor, "batch time"] | None:
    """Which of the last ``time`` positions are tokens: from a mask of positions, or from the diagonal of a mask of pairs.

    Raises:
        SettingsError: a kind of mask that does not tell.
    """
    if isinstance(mask, Mapping):
        mask = next(iter(mask.values()), None)
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        raise SettingsError(
            f"an attention mask of type {type(mask).__name__} does not tell padding from text",
            remedy="Use eager or sdpa attention for a model with side memories.",
        )
    if mask.dim() == 2:
        return mask[:, -time:] != 0
    pairs = mask[:, 0].diagonal(dim1=-2, dim2=-1)[:, :time]
    return pairs if pairs.dtype == torch.bool else pairs >= 0


def kept_decision(cache: Any, depth: int, batch: int) -> Int[Tensor, "batch weights"] | None:
    """What a cache has decided for its rows, if anything."""
    if not isinstance(cache, Cache) or len(cache.layers) <= depth:
        return None
    layer: Any = cache.layers[depth]
    decision: Tensor | None = layer.keys
    return decision if decision is not None and decision.shape[0] == batch else None


def keep_decision(cache: Any, depth: int, decision: Int[Tensor, "batch weights"]) -> None:
    """Put decisions into a cache that has none yet."""
    if not isinstance(cache, Cache) or len(cache.layers) < depth:
        return
    if len(cache.layers) == depth:
        cache.layers.append(DecisionLayer(decision))
    elif isinstance(layer := cache.layers[depth], DecisionLayer):
        layer.put(decision)


Mode: TypeAlias = Literal["merge", "retrieve"]

MERGED: Final = "merged"
"""What the one side memory of "merge" is called."""

_MAIN = -1


@dataclass(frozen=True, eq=False)
class SideMemory:
    """One shard as routing sees it.

    Attributes:
        name: what `decisions` calls it (the patch id).
        weight: parameter name; each weight with side memories decides for itself.
        change: (out, in).
        routing: the shard's `routing`: "threshold", "distance": "max" (the default) or "mean", and where the weight is a shared expert's
            behind a gate "gate", the linear map whose sigmoid multiplies the keys that distances are of.
    """

    name: str
    weight: str
    change: Delta
    routing: Mapping[str, Any]


def route(
    model: PreTrainedModel,
    memories: Sequence[SideMemory],
    mode: Mode = "retrieve",
    *,
    merge_method: Merging = "ties",
    merge_density: float = 0.53,
) -> None:
    """Attach side memories to a model in memory. Compile a model after this, not before.

    Args:
        mode: "retrieve" keeps them apart, "merge" joins those of one weight, under the smallest of their thresholds.
        merge_method, merge_density: see `merge_changes`.

    Raises:
        SettingsError: the model has side memories already, or lacks a weight; an unknown mode.
    """
    if getattr(model, ROUTER, None) is not None:
        raise SettingsError("the model has side memories already", remedy="Call unroute first.")
    if mode not in ("merge", "retrieve"):
        raise SettingsError(f"there is no way {mode!r} to route to side memories", remedy="Use merge or retrieve.")
    grouped: dict[str, list[SideMemory]] = {}
    for memory in memories:
        grouped.setdefault(memory.weight, []).append(memory)
    if not grouped:
        return
    if mode == "merge":
        grouped = {weight: [_merged(group, merge_method, merge_density)] for weight, group in grouped.items()}
    setattr(model, ROUTER, _Router(model, tuple(memories), grouped))


def unroute(model: PreTrainedModel) -> None:
    """Take the side memories away; the model is bit for bit what it was. Does nothing without any."""
    router: _Router | None = getattr(model, ROUTER, None)
    if router is not None:
        router.remove()
        delattr(model, ROUTER)


def routed(model: PreTrainedModel) -> tuple[SideMemory, ...]:
    """The side memories that were attached; none: ()."""
    router: _Router | None = getattr(model, ROUTER, None)
    return router.memories if router is not None else ()


def decisions(model: PreTrainedModel) -> list[str | None]:
    """For each sequence of the last pass, the name of the side memory that answered, None for the main memory."""
    router: _Router | None = getattr(model, ROUTER, None)
    return router.names() if router is not None else []


def _merged(group: Sequence[SideMemory], method: Merging, density: float) -> SideMemory:
    """One side memory for several of one weight."""
    if len(group) == 1:
        return group[0]
    change = Dense(merge_changes([memory.change for memory in group], method, density))
    threshold = min(float(memory.routing["threshold"]) for memory in group)
    return SideMemory(MERGED, group[0].weight, change, {**group[0].routing, "threshold": threshold})


@dataclass(eq=False)
class _Pass:
    """One pass of the decoder: (batch, time), which positions are tokens (None: all), what the cache has decided, what is decided now."""

    rows: torch.Size
    real: Bool[Tensor, "batch time"] | None
    kept: Int[Tensor, "batch weights"] | None
    found: list[Int[Tensor, " batch"]]


class _Router:
    """The hooks of one model: around its decoder, and behind each routed projection."""

    def __init__(
        self, model: PreTrainedModel, memories: tuple[SideMemory, ...], grouped: Mapping[str, Sequence[SideMemory]]
    ) -> None:
        modules = {weight: _module_of(model, weight) for weight in grouped}
        decoder, self._depth = _decoder_of(model, next(iter(grouped)))
        self.memories = memories
        self.current: _Pass | None = None
        self._last: Tensor | None = None
        ordered = sorted(grouped.items(), key=lambda item: _block_of(item[0]))
        self._names = [[memory.name for memory in group] for _, group in ordered]
        self._handles: list[RemovableHandle] = [
            decoder.register_forward_pre_hook(self._begin, with_kwargs=True),
            decoder.register_forward_hook(self._finish, with_kwargs=True),
        ]
        for place, (weight, group) in enumerate(ordered):
            module, named = modules[weight], group[0].routing.get("gate")
            scale = None if named is None else _KeyScale(_submodule(model, str(named), weight))
            if scale is not None:
                part = _submodule(model, weight.rpartition(".")[0].rpartition(".")[0], weight)
                self._handles.append(part.register_forward_pre_hook(scale, with_kwargs=True))
            gate = _Gate(self, place, group, module, scale)
            self._handles.append(module.register_forward_hook(gate, with_kwargs=True))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def names(self) -> list[str | None]:
        if self._last is None:
            return []
        found: list[str | None] = []
        for row in self._last.tolist():
            chosen = [self._names[place][index] for place, index in enumerate(row) if index != _MAIN]
            found.append(chosen[0] if chosen else None)
        return found

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens = args[0] if args else kwargs.get("input_ids")
        if tokens is None:
            tokens = kwargs["inputs_embeds"]
        rows = tokens.shape[:2]
        kept = kept_decision(kwargs.get("past_key_values"), self._depth, rows[0])
        real = None if kept is not None else real_tokens(kwargs.get("attention_mask"), rows[1])
        self.current = _Pass(rows, real, kept, [])

    def _finish(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        current, self.current = self.current, None
        if current is None or not current.found:
            return
        self._last = torch.stack([found.to(current.found[0].device) for found in current.found], dim=1)
        cache = kwargs.get("past_key_values")
        keep_decision(getattr(output, "past_key_values", None) if cache is None else cache, self._depth, self._last)


class _KeyScale:
    """A pre-hook of a shared expert that notes its gate, sigmoid(a x) of its input; 1 where keys are gated already (`gate_keys`)."""

    def __init__(self, gate: nn.Module) -> None:
        self._gate = gate
        self.value = torch.ones(1)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.value = torch.sigmoid(self._gate(args[0] if args else kwargs["hidden_states"]))


class _Gate:
    """The hook behind one projection, or behind the experts of a layer: adds the side memory's output to the sequences that it answers."""

    def __init__(
        self,
        router: _Router,
        place: int,
        memories: Sequence[SideMemory],
        module: nn.Module,
        scale: _KeyScale | None = None,
    ) -> None:
        self._router, self._place, self._scale = router, place, scale
        self._experts = shape_of(module)
        self._changes = [memory.change for memory in memories]
        self._thresholds = [max(float(memory.routing["threshold"]), 1e-30) for memory in memories]
        self._distances = [memory.routing.get("distance", "max") for memory in memories]
        weight: Any = next(module.parameters()) if self._experts else module.weight
        self._matrices = self._built(weight.device, weight.dtype if weight.is_floating_point() else torch.float32)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        current = self._router.current
        if current is None:
            return output
        kept = None if current.kept is None else current.kept[:, self._place].to(output.device)
        if kept is not None and not self._used(kept):
            current.found.append(kept)
            return output
        known = self._experts
        keys = in_rows(args[0], current.rows) if known is None else gated_keys(module, args, kwargs, current.rows)
        self._move(output)
        decision, added = self._decide(keys, current.real) if kept is None else (kept, self._known(keys, kept, output))
        current.found.append(decision)
        if known is None:
            return (in_rows(output, current.rows) + added).view_as(output)
        together = known.together(output)
        return known.spread(
            together + added.to(together.dtype).expand(*current.rows, known.out).reshape(together.shape)
        )

    def _decide(
        self, keys: Float[Tensor, "batch time in"] | Routed, real: Bool[Tensor, "batch time"] | None
    ) -> tuple[Int[Tensor, " batch"], Float[Tensor, "batch time out"]]:
        """For each sequence the side memory that answers it, and what that adds."""
        rows = keys.shape[:1]
        decision = torch.full(rows, _MAIN, dtype=torch.long, device=keys.device)
        best = torch.ones(rows, device=keys.device)
        added: Tensor | None = None
        for index, threshold in enumerate(self._thresholds):
            side = self._side(index, keys)
            ratio = _distance(self._scaled(side), real, self._distances[index]) / threshold
            wins = ratio > best
            best = torch.where(wins, ratio, best)
            decision = torch.where(wins, index, decision)
            others = torch.zeros_like(side) if added is None else added
            added = torch.where(wins[:, None, None], side, others)
        assert added is not None
        return decision, added

    def _scaled(self, side: Float[Tensor, "batch time out"]) -> Float[Tensor, "batch time out"]:
        """What a side memory adds to the stream: behind the output of a gated expert its gate comes still."""
        return side if self._scale is None else side * self._scale.value.view(*side.shape[:-1], 1).to(side)

    def _known(
        self, keys: Float[Tensor, "batch time in"] | Routed, decision: Int[Tensor, " batch"], output: Tensor
    ) -> Tensor:
        """What the side memories add that were chosen before."""
        added: Tensor = torch.zeros((), dtype=output.dtype, device=output.device)
        for index in self._used(decision):
            side = self._side(index, keys)
            added = torch.where((decision == index)[:, None, None], side, added)
        return added

    def _used(self, decision: Int[Tensor, " batch"]) -> Sequence[int]:
        """The side memories that some sequence needs; all of them where a graph is being compiled, which no value can steer."""
        if torch.compiler.is_compiling():
            return range(len(self._thresholds))
        return sorted(set(decision.tolist()) - {_MAIN})

    def _side(self, index: int, keys: Tensor | Routed) -> Tensor:
        first, *rest = self._matrices[index]
        side = keys.times(first.float()) if isinstance(keys, Routed) else nn.functional.linear(keys, first)
        for factor in rest:
            side = nn.functional.linear(side, factor.to(side.dtype))
        return side

    def _move(self, output: Tensor) -> None:
        """Bring the changes to the type and device that the model runs in now."""
        held = self._matrices[0][0]
        if held.dtype != output.dtype or held.device != output.device:
            self._matrices = self._built(output.device, output.dtype)

    def _built(self, device: torch.device, dtype: torch.dtype) -> list[list[Float[Tensor, "rows columns"]]]:
        """For each change, rounded once, the matrices to apply one after the other."""
        return [[factor.to(device, dtype) for factor in _factors(change)] for change in self._changes]


def _factors(change: Delta) -> list[Float[Tensor, "rows columns"]]:
    """Matrices to apply one after the other."""
    if isinstance(change, LowRank):
        return [torch.from_numpy(np.array(part, dtype=np.float32)) for part in (change.A, change.B)]
    return [torch.from_numpy(to_dense(change).astype(np.float32))]


def _distance(
    side: Float[Tensor, "batch time out"], real: Bool[Tensor, "batch time"] | None, kind: str
) -> Float[Tensor, " batch"]:
    """The distance of each sequence from the main memory, over its tokens."""
    lengths: Tensor = torch.linalg.vector_norm(side, dim=-1, dtype=torch.promote_types(side.dtype, torch.float32))
    if real is not None:
        lengths = lengths.masked_fill(~real.to(lengths.device), 0.0)
    if kind == "max":
        return lengths.amax(dim=1)
    count = lengths.shape[1] if real is None else real.to(lengths.device).sum(1).clamp(min=1)
    return lengths.sum(dim=1) / count


def _decoder_of(model: nn.Module, weight: str) -> tuple[nn.Module, int]:
    """The module that holds the list of blocks which a weight is in, and the number of blocks."""
    parts = weight.split(".")
    for stop in range(1, len(parts)):
        module = _submodule(model, ".".join(parts[:stop]), weight)
        if isinstance(module, nn.ModuleList):
            return model.get_submodule(".".join(parts[: stop - 1])), len(module)
    raise _missing(weight)


def _block_of(weight: str) -> int:
    """The number of the block in a parameter's name."""
    return next(int(part) for part in weight.split(".") if part.isdigit())


def _module_of(model: nn.Module, weight: str) -> nn.Module:
    try:
        return module_of(model, weight)
    except AttributeError as error:
        raise _missing(weight) from error


def _submodule(model: nn.Module, path: str, weight: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise _missing(weight) from error


def _missing(weight: str) -> SettingsError:
    return SettingsError(f"the model has no weight {weight}", remedy="Use the base of the shards.", weight=weight)
