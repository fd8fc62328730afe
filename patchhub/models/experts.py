"""Experts: a mixture of experts as one linear map on a stacked, gated key.

A token's output is sum_e w_e W_e k_e over the experts e that it is routed to, k_e the input of the expert's output projection
and w_e its gate. That is W K with W = [W_1 ... W_E] of shape (out, E in) and K = (w_1 k_1, ..., w_E k_E), zero where the token is
not routed (decision 8).

transformers keeps the experts of a layer in one module, called with hidden states (tokens, d), the experts of each token
(tokens, slots) and their gates. Keys are computed here once more from these; `check_experts` compares what follows from them with
what the module gives."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

OUTPUT: Final = "down_proj"
"""The parameter of an experts' module that is the output projections of all of them, (E, out, in) or (E, in, out)."""

_INPUTS: Final = ("gate_up_proj", "up_proj")
_ARGUMENTS: Final = 4  # self, hidden states, experts of each token, their gates
_TOKENS, _SLOTS = 6, 2  # of the check
_UNITS: Final = 64  # in the last place, that sums in another order may differ by


@dataclass(frozen=True)
class ExpertsShape:
    """Of one experts' module: how many there are, (out, in) of each output projection, and whether they are stored (in, out)."""

    experts: int
    out: int
    inner: int
    transposed: bool


def shape_of(module: nn.Module) -> ExpertsShape | None:
    """The shape of an experts' module whose keys can be computed here; None of any other module."""
    weights = dict(module.named_parameters(recurse=False))
    output, entry = weights.get(OUTPUT), next((weights[name] for name in _INPUTS if name in weights), None)
    if output is None or entry is None or output.ndim != 3 or entry.ndim != 3:
        return None
    if len(inspect.signature(type(module).forward).parameters) != _ARGUMENTS:
        return None
    transposed = bool(getattr(module, "is_transposed", False))
    experts, one, other = output.shape
    return ExpertsShape(experts, other, one, True) if transposed else ExpertsShape(experts, one, other, False)


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


@dataclass(frozen=True, eq=False)
class Groups:
    """The (token, slot) pairs of a call in the order of their experts, an expert's rows one after the other.

    Attributes:
        pair: of each row the pair that it is; of padding any.
        row: of each pair its row.
        expert: of each row.
        spans: expert, first row and the one after the last of each product.
    """

    pair: Int[Tensor, " rows"]
    row: Int[Tensor, " pairs"]
    expert: Int[Tensor, " rows"]
    spans: tuple[tuple[int, int, int], ...]

    @classmethod
    def of(cls, experts: Int[Tensor, "tokens slots"], count: int) -> Groups:
        """Of the experts of each token; a slot that is of none has a number that is not below ``count``."""
        flat, device = experts.flatten().clamp(max=count), experts.device
        rows, tile = (_ROWS, _TILE) if device.type == "cpu" else (1, None)
        order = flat.argsort(stable=True)
        used = torch.bincount(flat, minlength=count + 1)
        padded = -(-used // rows) * rows
        ahead = (padded.cumsum(0) - padded) - (used.cumsum(0) - used)  # rows of padding before those of each expert
        place = torch.arange(len(flat), device=device) + ahead[flat[order]]
        sizes = padded.tolist()
        pair = torch.zeros(sum(sizes), dtype=torch.long, device=device).index_copy(0, place, order)
        spans, start = list[tuple[int, int, int]](), 0
        for expert, size in enumerate(sizes[:count]):
            step = tile or size
            spans += [(expert, at, min(at + step, start + size)) for at in range(start, start + size, step or 1)]
            start += size
        of_row = torch.arange(count + 1, device=device).repeat_interleave(padded)
        return cls(pair, torch.empty_like(order).index_copy(0, order, place), of_row, tuple(spans))

    def sorted(self, states: Float[Tensor, "pairs inner"]) -> Float[Tensor, "rows inner"]:
        """States of the pairs by rows."""
        return states[self.pair]

    def back(self, states: Float[Tensor, "rows inner"]) -> Float[Tensor, "pairs inner"]:
        """The inverse of `sorted`."""
        return states[self.row]

    def product(
        self, states: Float[Tensor, "rows inner"], weights: Float[Tensor, "experts out inner"]
    ) -> Float[Tensor, "rows out"]:
        """The states of each row times the weight of its expert; 0 where it is of none."""
        found: Tensor = _Product.apply(states, weights, self.spans)  # type: ignore[no-untyped-call]
        return found

    def linear(
        self,
        states: Float[Tensor, "rows inner"],
        weights: Float[Tensor, "experts out inner"],
        bias: Float[Tensor, "experts out"] | None,
    ) -> Float[Tensor, "rows out"]:
        """The same, and the bias of its expert."""
        found = self.product(states, weights)
        return found if bias is None else found + bias[self.expert.clamp(max=len(bias) - 1)]


class _Product(torch.autograd.Function):
    """`Groups.product`, whose gradient is that of the states alone."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weights: Tensor, spans: tuple[tuple[int, int, int], ...]) -> Tensor:
        ctx.weights, ctx.spans = weights, spans
        return _multiplied(states, weights.mT, spans)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _multiplied(gradients[0], ctx.weights, ctx.spans), None, None


def _multiplied(
    states: Float[Tensor, "rows inner"],
    weights: Float[Tensor, "experts inner out"],
    spans: tuple[tuple[int, int, int], ...],
) -> Float[Tensor, "rows out"]:
    found = states.new_empty(len(states), weights.shape[-1])
    for expert, start, stop in spans:
        torch.mm(states[start:stop], weights[expert], out=found[start:stop])
    found[spans[-1][2] if spans else 0 :] = 0
    return found


def _entered(
    module: Any, known: ExpertsShape, groups: Groups, hidden: Float[Tensor, "tokens d"], slots: int
) -> Float[Tensor, "rows inner"]:
    """The inputs of the experts' output projections, by rows."""
    gated = "gate_up_proj" in module._parameters
    name = "gate_up_proj" if gated else "up_proj"
    weights, bias = module._parameters[name], module._parameters.get(f"{name}_bias")
    entered = groups.linear(hidden[groups.pair // slots], weights.mT if known.transposed else weights, bias)
    found: Tensor = module._apply_gate(entered) if gated else module.act_fn(entered)
    return found


def gated_keys(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], shape: tuple[int, ...] | None) -> Routed:
    """The keys of one call of an experts' module, times their gates.

    Args:
        shape: (batch, time) of the tokens where they are all of a batch; else they are taken for one row.
    """
    hidden, experts, gates = (*args, *kwargs.values())[:3]
    known, slots = shape_of(module), experts.shape[1]
    assert known is not None
    groups = Groups.of(experts, known.experts)
    keys = groups.back(_entered(module, known, groups, hidden, slots)).view(*experts.shape, -1)
    keys = keys.masked_fill((experts >= known.experts)[..., None], 0.0)
    keys = keys * gates[..., None].to(keys.dtype)
    whole = shape if shape is not None and torch.Size(shape).numel() == len(hidden) else (1, len(hidden))
    return Routed(known.experts, experts.clamp(max=known.experts - 1), keys, tuple(whole))


@torch.no_grad()
def check_experts(module: Any) -> bool:
    """Whether an experts' module gives what its gated keys and output projections say, on random numbers."""
    known = shape_of(module)
    if known is None or not callable(getattr(module, "_apply_gate", getattr(module, "act_fn", None))):
        return False
    weight = module._parameters[OUTPUT]
    generator = torch.Generator().manual_seed(0)
    slots = min(_SLOTS, known.experts)
    hidden = torch.randn(_TOKENS, known.out, generator=generator)
    experts = torch.rand(_TOKENS, known.experts, generator=generator).topk(slots).indices
    gates = torch.rand(_TOKENS, slots, generator=generator) + 0.25
    args = hidden.to(weight), experts.to(weight.device), gates.to(weight)
    given = module.forward(*args).double()  # without hooks: changes of earlier commits may run beside the module
    routed = gated_keys(module, args, {}, None)
    stacked = weight.mT if known.transposed else weight  # (E, out, in)
    expected = routed.times(stacked.float().transpose(0, 1).flatten(1))[0].double()
    bias = module._parameters.get(f"{OUTPUT}_bias")
    if bias is not None:
        expected = expected + (bias[args[1]].double() * args[2][..., None].double()).sum(1)
    return bool((given - expected).norm() <= _UNITS * torch.finfo(weight.dtype).eps * expected.norm())


def stand_in(module: nn.Module, slots: list[int]) -> Callable[..., Tensor]:
    """A forward without numbers for a module on the meta device, where which tokens an expert gets is not known.

    Its output is computed from the hidden states alone by one product. It notes how many experts a token has.
    """
    known = shape_of(module)
    assert known is not None

    def forward(hidden: Tensor, experts: Tensor, gates: Tensor) -> Tensor:
        slots.append(experts.shape[1])
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
    weights = module._parameters.values()
    plain = all(w.device.type in ("cpu", "meta") and w.dtype == torch.float32 and not w.requires_grad for w in weights)
    dispatches = hasattr(type(module).forward, "__wrapped__") and not getattr(module, "has_post_expert_norm", True)
    return plain and dispatches and not module._is_expert_parallel


def _grouped_forward(
    module: Any, known: ExpertsShape, hidden: Tensor, experts: Int[Tensor, "tokens slots"], gates: Tensor
) -> Tensor:
    groups, slots = Groups.of(experts, known.experts), experts.shape[1]
    weights, bias = module._parameters[OUTPUT], module._parameters.get(f"{OUTPUT}_bias")
    keys = _entered(module, known, groups, hidden, slots)
    given = groups.back(groups.linear(keys, weights.mT if known.transposed else weights, bias))
    gated = given.view(*experts.shape, -1) * gates[..., None]
    return gated.sum(1).to(hidden.dtype)


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

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((*args, *kwargs.values())[1].detach().cpu())

    handles = [
        module.register_forward_pre_hook(note, with_kwargs=True)
        for module in model.modules()
        if shape_of(module) is not None
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
