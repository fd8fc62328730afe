"""Experts: a mixture of experts as one linear map on a stacked, gated key.

A token's output is sum_e w_e W_e k_e over the experts e that it is routed to, k_e the input of the expert's output projection
and w_e its gate. That is W K with W = [W_1 ... W_E] of shape (out, E in) and K = (w_1 k_1, ..., w_E k_E), zero where the token is
not routed (decision 8).

transformers keeps the experts of a layer in one module, called with hidden states (tokens, d), the experts of each token
(tokens, slots) and their gates; or with the states of all tokens for each expert, (E tokens, d), which its gate has multiplied already
and which are zero where a token is not routed (Llama 4). There gates enter the expert, so w_e is 1 and the key is of a gated input; what
is given is (E tokens, out), and the sum over the experts is left to the caller. DBRX keeps the experts one below the other in matrices,
(E in, d), of a part of that module, and calls it with states in rows, (batch, time, d). Keys are computed here once more from what a
module is called with; `check_experts` compares what follows from them with what it gives."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

OUTPUT: Final = "down_proj"
"""The parameter of an experts' module that is the output projections of all of them, (E, out, in) or (E, in, out)."""

_INPUTS: Final = ("gate_up_proj", "up_proj")
_PART, _GATE, _UP, _DOWN = "mlp", "w1", "v1", "w2"  # of DBRX: the part that holds the matrices, and those
_ARGUMENTS: Final = 4  # self, hidden states, experts of each token, their gates
_STATES_ALONE: Final = 2  # self, the states of all tokens for each expert
_TOKENS, _SLOTS = 6, 2  # of the check
_UNITS: Final = 64  # in the last place, that sums in another order may differ by


@dataclass(frozen=True)
class ExpertsShape:
    """Of one experts' module: how many there are, (out, in) of each output projection, and whether they are stored (in, out).

    ``apart`` says that it is called with the states of all tokens for each expert, and gives what each of them gives; ``flat`` that the
    experts lie one below the other in matrices of a part of the module.
    """

    experts: int
    out: int
    inner: int
    transposed: bool
    apart: bool = False
    flat: bool = False

    @property
    def parameter(self) -> str:
        """The path of the output projections in the module."""
        return f"{_PART}.{_DOWN}" if self.flat else OUTPUT

    def together(self, output: Float[Tensor, "rows out"]) -> Float[Tensor, "tokens out"]:
        """The sum over the experts of what a module gave."""
        return output.view(self.experts, -1, self.out).sum(0) if self.apart else output

    def spread(self, summed: Float[Tensor, "tokens out"]) -> Float[Tensor, "rows out"]:
        """What a module may give in its place for the sum to be this one: all of it as the first expert's."""
        return nn.functional.pad(summed, (0, 0, 0, (self.experts - 1) * len(summed))) if self.apart else summed


def shape_of(module: nn.Module) -> ExpertsShape | None:
    """The shape of an experts' module whose keys can be computed here; None of any other module."""
    weights = dict(module.named_parameters(recurse=False))
    if not weights:
        return _flat_shape_of(module)
    output, entry = weights.get(OUTPUT), next((weights[name] for name in _INPUTS if name in weights), None)
    if output is None or entry is None or output.ndim != 3 or entry.ndim != 3:
        return None
    arguments, (experts, one, other) = len(inspect.signature(type(module).forward).parameters), output.shape
    if arguments == _STATES_ALONE and len(weights) == _STATES_ALONE and _INPUTS[0] in weights:
        stored_in_out = entry.shape[1:] == (other, 2 * one)
        shape = (
            ExpertsShape(experts, other, one, True, True)
            if stored_in_out
            else ExpertsShape(experts, one, other, False, True)
        )
        return shape if stored_in_out or entry.shape[1:] == (2 * other, one) else None
    if arguments != _ARGUMENTS:
        return None
    transposed = bool(getattr(module, "is_transposed", False))
    return ExpertsShape(experts, other, one, True) if transposed else ExpertsShape(experts, one, other, False)


def _flat_shape_of(module: Any) -> ExpertsShape | None:
    """The shape where the experts lie one below the other in three matrices of a part of the module."""
    part: Any = module._modules.get(_PART)
    weights = {} if part is None else dict(part.named_parameters())
    experts = getattr(module, "num_experts", 0)
    if weights.keys() != {_GATE, _UP, _DOWN} or len(inspect.signature(type(module).forward).parameters) != _ARGUMENTS:
        return None
    rows, out = weights[_DOWN].shape
    alike = {weight.shape for weight in weights.values()} == {(rows, out)}
    return (
        ExpertsShape(experts, out, rows // experts, True, flat=True)
        if alike and experts and not rows % experts
        else None
    )


def outputs_of(module: Any, known: ExpertsShape) -> Float[Tensor, "experts out inner"]:
    """The output projections of a module's experts; those numbers, not a copy."""
    if known.flat:
        return _unstacked(module._modules[_PART]._parameters[_DOWN], known).mT
    weight: Tensor = module._parameters[OUTPUT]
    return weight.mT if known.transposed else weight


def _inputs_of(module: Any, known: ExpertsShape) -> list[tuple[Float[Tensor, "experts some d"], Tensor | None]]:
    """The linear maps of a module's experts that the states enter, side by side, and their biases."""
    if known.flat:
        part = module._modules[_PART]._parameters
        return [(_unstacked(part[name], known), None) for name in (_GATE, _UP)]
    name = next(name for name in _INPUTS if name in module._parameters)
    weights, bias = module._parameters[name], module._parameters.get(f"{name}_bias")
    return [(weights.mT if known.transposed else weights, bias)]


def _unstacked(weight: Float[Tensor, "stacked d"], known: ExpertsShape) -> Float[Tensor, "experts inner d"]:
    return weight.view(known.experts, known.inner, known.out)


def module_of(model: nn.Module, weight: str) -> nn.Module:
    """The linear module, or the experts of a layer, that a weight is of.

    Raises:
        AttributeError: there is none of that name.
    """
    path = weight.rpartition(".")[0]
    module, around = model.get_submodule(path), model.get_submodule(path.rpartition(".")[0])
    return module if shape_of(around) is None else around


def on_output(module: nn.Module, function: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
    """Give what a linear map, or the experts of a layer together, put into the stream to a function; what that returns takes its place."""
    known = shape_of(module)
    if known is None or not known.apart:
        return module.register_forward_hook(lambda module, args, output: function(output))

    def summed(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        found = function(known.together(output))
        return None if found is None else known.spread(found)

    return module.register_forward_hook(summed)


@dataclass(frozen=True, eq=False)
class _Call:
    """What an experts' module is called with.

    Attributes:
        hidden: the rows of states.
        row: of each (token, slot) pair the row that enters its expert.
        experts: of each token; a number that is not below E is of none.
        gates: that outputs are multiplied with; None: the states carry them.
    """

    hidden: Float[Tensor, "rows d"]
    row: Int[Tensor, " pairs"]
    experts: Int[Tensor, "tokens slots"]
    gates: Float[Tensor, "tokens slots"] | None

    @classmethod
    def of(cls, known: ExpertsShape, args: tuple[Any, ...], kwargs: Mapping[str, Any] = MappingProxyType({})) -> _Call:
        given = (*args, *kwargs.values())
        hidden: Tensor = given[0].flatten(0, -2)
        if not known.apart:
            tokens, slots = given[1].shape
            return cls(hidden, torch.arange(tokens, device=hidden.device).repeat_interleave(slots), given[1], given[2])
        routed = hidden.detach().view(known.experts, -1, hidden.shape[-1]).any(-1)  # (E, tokens)
        slots = max(1, int(routed.sum(0).max()))
        experts = routed.T.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :slots]
        tokens = torch.arange(len(experts), device=hidden.device)[:, None]
        return cls(hidden, (experts * len(experts) + tokens).flatten(), experts, None)

    def gated(self, states: Float[Tensor, "tokens slots inner"]) -> Float[Tensor, "tokens slots inner"]:
        return states if self.gates is None else states * self.gates[..., None].to(states.dtype)


@dataclass(frozen=True, eq=False)
class Routed:
    """Gated keys of tokens, and the experts that they are of.

    Indexed by (row, column) as a tensor (batch, time, E in) would be, it gives those rows of it, in float32.

    Attributes:
        count: E.
        experts: of each slot; no expert occurs twice in a row.
        keys: gate times key.
        shape: (batch, time) of the tokens.
    """

    count: int
    experts: Int[Tensor, "tokens slots"]
    keys: Float[Tensor, "tokens slots in"]
    shape: tuple[int, ...]

    @property
    def device(self) -> torch.device:
        """Where the keys are."""
        return self.keys.device

    def __getitem__(self, item: Any) -> Float[Tensor, "*some stacked"]:
        places = torch.arange(len(self.keys), device=self.device).view(self.shape)[item]
        rows = places.flatten()
        width = self.keys.shape[-1]
        where = self.experts[rows][..., None].expand(-1, -1, width)
        stacked = torch.zeros(len(rows), self.count, width, device=self.device)
        return stacked.scatter(1, where, self.keys[rows].float()).view(*places.shape, -1)

    def times(self, matrix: Float[Tensor, "rows stacked"]) -> Float[Tensor, "*batch rows"]:
        """``matrix`` K of each token, in float32, by the slices of the experts that are used."""
        slices = matrix.view(len(matrix), self.count, -1).transpose(0, 1)
        groups = Groups.of(self.experts, self.count)
        given = groups.back(groups.product(groups.sorted(self.keys.float().flatten(0, 1)), slices))
        return given.view(*self.experts.shape, -1).sum(1).view(*self.shape, -1)

    def add_moments(
        self, sums: Float[Tensor, "experts in in"], counts: Int[Tensor, " experts"], real: Bool[Tensor, "batch time"]
    ) -> None:
        """Add k k^T of the real tokens' gated keys to the sum of each expert, and how many there were to its count."""
        kept = real.flatten().to(self.device)
        experts, keys = self.experts[kept].flatten(), self.keys[kept].float().flatten(0, 1)
        used = torch.bincount(experts, minlength=self.count)
        for expert, own in enumerate(torch.split(keys[experts.argsort(stable=True)], used.tolist())):
            if len(own):
                sums[expert].addmm_(own.T, own)
        counts += used


_ROWS, _TILE = 16, 64
"""On a CPU the rows of an expert are padded to a multiple of the one and multiplied so many at a time as the other says: libraries make
a kernel for each shape of a product, which costs more than the product where each is seen once."""
_FEWEST_TOGETHER, _MOST_TOGETHER, _A_CALL = 8, 128, 8
"""Rows of each expert that may be multiplied in one product of all experts; and what a call of its own costs, in rows. Measured on one
core with weights (512, 256): 16 products of 32 rows take 1.15 ms one by one and 0.73 ms in one call."""


@dataclass(frozen=True, eq=False)
class Groups:
    """The (token, slot) pairs of a call by their experts: first the same number of rows of each expert, which are multiplied in one call,
    then what some have besides, expert by expert, and last those of no expert.

    Attributes:
        pair: of each row the pair that it is; of padding any.
        row: of each pair its row.
        expert: of each pair.
        together: how many rows each expert has in front.
        spans: expert, first row and the one after the last of each further product.
    """

    pair: Int[Tensor, " rows"]
    row: Int[Tensor, " pairs"]
    expert: Int[Tensor, " pairs"]
    together: int
    spans: tuple[tuple[int, int, int], ...]

    @classmethod
    def of(cls, experts: Int[Tensor, "tokens slots"], count: int) -> Groups:
        """Of the experts of each token; a slot that is of none has a number that is not below ``count``."""
        flat, device = experts.flatten().clamp(max=count), experts.device
        rows, tile = (_ROWS, _TILE) if device.type == "cpu" else (1, None)
        order = flat.argsort(stable=True)
        used = torch.bincount(flat, minlength=count + 1)
        together = _together(used[:count]) if device.type == "cpu" else 0
        ahead = torch.full_like(used, together)
        ahead[count] = 0
        besides = -(-(used - ahead).clamp(min=0) // rows) * rows
        sizes, first = besides.tolist(), count * together
        start = besides.cumsum(0) - besides + first
        owner = flat[order]
        place = torch.arange(len(flat), device=device) - (used.cumsum(0) - used)[owner]  # among the pairs of the expert
        front = place < ahead[owner]
        place = torch.where(front, owner * together + place, start[owner] + place - ahead[owner])
        pair = torch.zeros(first + sum(sizes), dtype=torch.long, device=device).index_copy(0, place, order)
        spans = list[tuple[int, int, int]]()
        for expert, size in enumerate(sizes[:count]):
            step = tile or size
            spans += [(expert, at, min(at + step, first + size)) for at in range(first, first + size, step or 1)]
            first += size
        return cls(pair, torch.empty_like(order).index_copy(0, order, place), flat, together, tuple(spans))

    def sorted(self, states: Float[Tensor, "pairs inner"]) -> Float[Tensor, "rows inner"]:
        """States of the pairs by rows."""
        return states.index_select(0, self.pair)

    def back(self, states: Float[Tensor, "rows inner"]) -> Float[Tensor, "pairs inner"]:
        """The inverse of `sorted`."""
        return states.index_select(0, self.row)

    def product(
        self, states: Float[Tensor, "rows inner"], weights: Float[Tensor, "experts out inner"]
    ) -> Float[Tensor, "rows out"]:
        """The states of each row times the weight of its expert; 0 where it is of none."""
        found: Tensor = _Product.apply(states, weights, self)  # type: ignore[no-untyped-call]
        return found

    def linear(
        self,
        states: Float[Tensor, "rows inner"],
        weights: Float[Tensor, "experts out inner"],
        bias: Float[Tensor, "experts out"] | None,
    ) -> Float[Tensor, "rows out"]:
        """The same, and the bias of its expert."""
        found = self.product(states, weights)
        return found if bias is None else found + bias[self.expert[self.pair].clamp(max=len(bias) - 1)]


def _together(used: Int[Tensor, " experts"]) -> int:
    """How many rows of each expert are best multiplied in one call, given how many each has.

    That call takes as many rows of those that have fewer; what others have besides takes calls of their own.
    """
    counts = used.numpy()
    most = min(_MOST_TOGETHER, -(-int(counts.max(initial=0)) // _ROWS) * _ROWS)
    tried = np.array([0, _FEWEST_TOGETHER, *range(_ROWS, most + 1, _ROWS)])[:, None]
    besides = -(-np.maximum(counts - tried, 0) // _ROWS) * _ROWS
    costs = tried[:, 0] * len(counts) + _A_CALL * (tried[:, 0] > 0) + (besides - (-besides // _TILE) * _A_CALL).sum(1)
    return int(tried[costs.argmin(), 0])


class _Product(torch.autograd.Function):
    """`Groups.product`, whose gradient is that of the states alone."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weights: Tensor, groups: Groups) -> Tensor:
        ctx.weights, ctx.groups = weights, groups
        return _multiplied(states, weights.mT, groups)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _multiplied(gradients[0], ctx.weights, ctx.groups), None, None


def _multiplied(
    states: Float[Tensor, "rows inner"], weights: Float[Tensor, "experts inner out"], groups: Groups
) -> Float[Tensor, "rows out"]:
    found, last = states.new_empty(len(states), weights.shape[-1]), len(weights) * groups.together
    if last:
        shape = len(weights), groups.together, -1
        torch.bmm(states[:last].view(shape), weights, out=found[:last].view(shape))
    for expert, start, stop in groups.spans:
        torch.mm(states[start:stop], weights[expert], out=found[start:stop])
        last = stop
    found[last:] = 0
    return found


def _entered(module: Any, known: ExpertsShape, groups: Groups, call: _Call) -> Float[Tensor, "rows inner"]:
    """The inputs of the experts' output projections, by rows."""
    states = call.hidden.index_select(0, call.row[groups.pair])
    found = [groups.linear(states, weights, bias) for weights, bias in _inputs_of(module, known)]
    entered = found[0] if len(found) == 1 else torch.cat(found, dim=-1)
    activation = _activation(module)
    assert activation is not None  # `check_experts`
    return activation(entered)


def _activation(module: Any) -> Callable[[Tensor], Tensor] | None:
    """What stands between the two linear maps of an expert; None: it is not known."""
    if _PART in module._modules:
        return partial(_gated_half, module._modules[_PART].activation_fn)
    activation: Callable[[Tensor], Tensor] | None = getattr(module, "act_fn", None)
    if "gate_up_proj" not in module._parameters:
        return activation
    gating: Callable[[Tensor], Tensor] | None = getattr(module, "_apply_gate", None)
    return gating or (activation and partial(_gated_half, activation))


def _gated_half(activation: Callable[[Tensor], Tensor], entered: Float[Tensor, "rows twice"]) -> Tensor:
    gate, up = entered.chunk(2, dim=-1)
    return up * activation(gate)


def gated_keys(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], shape: tuple[int, ...] | None) -> Routed:
    """The keys of one call of an experts' module, times their gates.

    Args:
        shape: (batch, time) of the tokens where they are all of a batch; else they are taken for one row.
    """
    known = shape_of(module)
    assert known is not None
    call = _Call.of(known, args, kwargs)
    experts, tokens = call.experts, len(call.experts)
    groups = Groups.of(experts, known.experts)
    keys = groups.back(_entered(module, known, groups, call)).view(*experts.shape, -1)
    keys = call.gated(keys.masked_fill((experts >= known.experts)[..., None], 0.0))
    whole = shape if shape is not None and torch.Size(shape).numel() == tokens else (1, tokens)
    return Routed(known.experts, experts.clamp(max=known.experts - 1), keys, tuple(whole))


@torch.no_grad()
def check_experts(module: Any) -> bool:
    """Whether an experts' module gives what its gated keys and output projections say, on random numbers."""
    known = shape_of(module)
    if known is None or not callable(_activation(module)):
        return False
    weight = outputs_of(module, known)
    generator = torch.Generator().manual_seed(0)
    slots = min(_SLOTS, known.experts)
    hidden = torch.randn(_TOKENS, known.out, generator=generator)
    experts = torch.rand(_TOKENS, known.experts, generator=generator).topk(slots).indices
    gates = torch.rand(_TOKENS, slots, generator=generator) + 0.25
    args: tuple[Tensor, ...] = hidden.to(weight), experts.to(weight.device), gates.to(weight)
    if known.apart:
        scores = torch.zeros(_TOKENS, known.experts).scatter(1, experts, gates)
        args = ((hidden * scores.T[..., None]).flatten(0, 1).to(weight),)
    given = module.forward(*args).double()  # no hooks: earlier commits' changes may run beside the module
    given = known.together(given).view(_TOKENS, -1)
    routed = gated_keys(module, args, {}, None)
    expected = routed.times(weight.float().transpose(0, 1).flatten(1))[0].double()
    bias = module._parameters.get(f"{OUTPUT}_bias")
    if bias is not None:
        expected = expected + (bias[args[1]].double() * args[2][..., None].double()).sum(1)
    return bool((given - expected).norm() <= _UNITS * torch.finfo(weight.dtype).eps * expected.norm())


def stand_in(module: nn.Module, slots: list[int], configured: int) -> Callable[..., Tensor]:
    """A forward without numbers for a module on the meta device, where which tokens an expert gets is not known.

    Its output is computed from the hidden states alone by one product. It notes how many experts a token has: as it is called, or where
    states alone do not say, as many as are ``configured``.
    """
    known = shape_of(module)
    assert known is not None

    def forward(hidden: Tensor, experts: Tensor | None = None, gates: Tensor | None = None) -> Tensor:
        slots.append(configured if experts is None else experts.shape[1])
        return hidden @ torch.zeros(hidden.shape[-1], known.out, device=hidden.device)

    return forward


def grouped_forwards(model: nn.Module) -> Iterator[tuple[nn.Module, Callable[..., Tensor]]]:
    """The experts' modules of a model on a CPU with forwards that give the same numbers, up to rounding, in less time.

    PyTorch's grouped products make a kernel for each number of rows that an expert gets. Taken are only modules whose forward is
    transformers' own, which dispatches by the same few attributes that are read here, in float32 and without gradients of weights.
    Weights on the meta device are in memory when their block runs (`streaming`).
    """
    if any(weight.device.type not in ("cpu", "meta") for weight in model.parameters()):
        return
    for module in model.modules():
        known = shape_of(module)
        if known is not None and _is_dispatched(module):
            yield module, partial(_grouped_forward, module, known)


def _is_dispatched(module: Any) -> bool:
    weights = list(module.parameters())
    plain = all(w.device.type in ("cpu", "meta") and w.dtype == torch.float32 and not w.requires_grad for w in weights)
    known = shape_of(module)
    if known is not None and (
        known.apart or known.flat
    ):  # what is on the meta device was checked when it was in memory
        return plain and (any(weight.is_meta for weight in weights) or check_experts(module))
    dispatches = hasattr(type(module).forward, "__wrapped__") and not getattr(module, "has_post_expert_norm", True)
    return plain and dispatches and not module._is_expert_parallel


def _grouped_forward(module: Any, known: ExpertsShape, *args: Tensor) -> Tensor:
    call = _Call.of(known, args)
    groups = Groups.of(call.experts, known.experts)
    bias = module._parameters.get(f"{OUTPUT}_bias")
    keys = _entered(module, known, groups, call)
    given = groups.back(groups.linear(keys, outputs_of(module, known), bias))
    summed = known.spread(call.gated(given.view(*call.experts.shape, -1)).sum(1).to(call.hidden.dtype))
    return summed if known.apart else summed.view(*args[0].shape[:-1], known.out)


class _GatedKey:
    """A pre-hook of an output projection that multiplies its key with the gate of the feed-forward part that it is in."""

    def __init__(self) -> None:
        self.gate = torch.ones(1)

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0] * self.gate.to(args[0]), *args[1:])


def gate_the_key(block: nn.Module, projection: str, gate: str) -> bool:
    """Let the gate of a shared expert multiply the key of its output projection from now on, and no more its output: W (g k) = g W k.

    So the projection is a linear map into the stream on a gated key, like a routed expert's. What the model computes is the same but for
    rounding.

    Args:
        projection, gate: paths relative to the block.

    Returns:
        Whether that was done now, and not before.
    """
    module, linear_map = block.get_submodule(projection), block.get_submodule(gate)
    part: Any = block.get_submodule(projection.rpartition(".")[0])
    if any(isinstance(hook, _GatedKey) for hook in module._forward_pre_hooks.values()):
        return False
    key, whole = _GatedKey(), part.forward

    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        key.gate = torch.sigmoid(linear_map.forward(hidden))
        return whole(hidden, *args, **kwargs)

    part.forward = forward
    module.register_forward_pre_hook(key)
    linear_map.register_forward_hook(lambda _, args, output: torch.full_like(output, torch.inf))  # its sigmoid is 1
    return True


@contextmanager
def watch_routes(model: nn.Module) -> Iterator[list[Int[Tensor, "tokens slots"]]]:
    """While open, the experts of the tokens of each call of an experts' module, call by call."""
    seen: list[Tensor] = []

    def noting(known: ExpertsShape) -> Callable[..., None]:
        return lambda module, args, kwargs: seen.append(_Call.of(known, args, kwargs).experts.detach().cpu())

    shapes = [(module, shape_of(module)) for module in model.modules()]
    handles = [
        module.register_forward_pre_hook(noting(known), with_kwargs=True)
        for module, known in shapes
        if known is not None
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def staying(
    before: Sequence[Int[Tensor, "tokens slots"]], after: Sequence[Int[Tensor, "tokens slots"]]
) -> tuple[int, int]:
    """Of the experts of all tokens at all layers, how many are the tokens' still, and how many there were."""
    pairs = zip(before, after, strict=True)
    kept = sum(int((then[:, :, None] == now[:, None, :]).any(-1).sum()) for then, now in pairs)
    return kept, sum(then.numel() for then in before)
