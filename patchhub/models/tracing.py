"""A causal language model taken apart: embed, run some blocks, apply the head, each alone.

Float32 products on the CPU go through the faster of the two libraries that PyTorch has for them, where that is as exact. A change of a
weight can run beside it, as y + (x A^T) B^T in float32, whatever type or quantisation the weight has."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.activations import NewGELUActivation
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

from patchhub.delta import Delta, LowRank, add, to_dense
from patchhub.errors import UnsupportedModelError
from patchhub.models.architectures import Architecture, Behind, behind_of, gate_keys, hook_output
from patchhub.models.experts import Routed, gated_keys, grouped_forwards, shape_of
from patchhub.models.streaming import streamed

_SHAPES = ((64, 64, 64), (96, 384, 512), (33, 640, 129))  # rows, inner, columns of the products that are tried
_KEPT_KERNELS = "32"
_PRODUCT_TOLERANCE = 2e-6  # relative; float32 products of these sizes are off by 2e-7 to 5e-7, bfloat16 ones by 2e-3


@contextmanager
def fast_products(device: torch.device) -> Iterator[None]:
    """While open, float32 products on the CPU go through oneDNN where that keeps float32's accuracy.

    PyTorch leaves them to MKL unless it is told that bfloat16 would do; on processors that have wide vectors and no matrix unit
    oneDNN then computes in float32 all the same, and on some of them twice as fast. Where it would really round to bfloat16 the
    switch stays as it was. Attention then is two plain products as well (`plain_attention`): the fused kernel's own are slow that way.
    Both are switches of the process, put back at the end. On a GPU float32 products stay float32 whatever the process allows (TF32 has
    ten bits): second moments are sums of a hundred thousand of them.
    """
    if device.type != "cpu":
        with _without_tf32():
            yield
        return
    if not _exact_through_onednn():
        yield
        return
    with _onednn(), plain_attention():
        yield


@contextmanager
def plain_attention() -> Iterator[None]:
    """While open, attention is two products in the type that the model runs in, wherever it asks for `scaled_dot_product_attention`.

    PyTorch's own kernels are made for many queries over many keys: over the few that are read here they take three to ten times as long,
    forwards and backwards. The function is replaced for the whole process, and put back at the end.
    """
    theirs = nn.functional.scaled_dot_product_attention

    def ours(*args: Any, **kwargs: Any) -> Tensor:
        if len(args) > 4 or kwargs.get("dropout_p"):
            return theirs(*args, **kwargs)
        kwargs.pop("dropout_p", None)
        return attend(*args, **kwargs)

    nn.functional.scaled_dot_product_attention = ours
    try:
        yield
    finally:
        nn.functional.scaled_dot_product_attention = theirs


def attend(
    query: Float[Tensor, "batch heads time d"],
    key: Float[Tensor, "batch groups all d"],
    value: Float[Tensor, "batch groups all e"],
    attn_mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Float[Tensor, "batch heads time e"]:
    """What `torch.nn.functional.scaled_dot_product_attention` gives without dropout; heads are consecutive within their group."""
    batch, heads, time, width = query.shape
    groups, every = key.shape[1], key.shape[2]
    scaled = query * (width**-0.5 if scale is None else scale)
    scores = scaled.reshape(batch, groups, heads // groups * time, width) @ key.mT
    if is_causal and time > 1:
        attn_mask = torch.ones(time, every, dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None:
        scores, least = scores.view(batch, heads, time, every), torch.finfo(scores.dtype).min
        boolean = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, least) if boolean else (scores + attn_mask).clamp(min=least)
        scores = scores.view(batch, groups, -1, every)  # padding that may look nowhere gets numbers, which nobody reads
    return (scores.softmax(-1) @ value).view(batch, heads, time, -1)


@contextmanager
def _without_tf32() -> Iterator[None]:
    switch: Any = torch.backends.cuda.matmul
    name, exact = ("fp32_precision", "ieee") if hasattr(switch, "fp32_precision") else ("allow_tf32", False)
    before = getattr(switch, name)
    setattr(switch, name, exact)
    try:
        yield
    finally:
        setattr(switch, name, before)


@contextmanager
def _onednn() -> Iterator[None]:
    switch: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # torch does not type it
    before = switch.fp32_precision
    switch.fp32_precision = "bf16"
    try:
        yield
    finally:
        switch.fp32_precision = before


@cache
def _exact_through_onednn() -> bool:
    """Whether products come out in float32's accuracy with the switch on; False on versions of PyTorch without it."""
    if not hasattr(torch.backends.mkldnn, "matmul"):
        return False
    # oneDNN keeps a kernel for each shape of a product, by default 1,024 of them and half a megabyte each, and so does PyTorch's layer
    # above it. Shapes change at every step here, so most are used by one step only. Both read these when they are first used.
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, _KEPT_KERNELS)
    generator = torch.Generator().manual_seed(0)
    with _onednn():
        return all(_error(*shape, generator) < _PRODUCT_TOLERANCE for shape in _SHAPES)


def _error(rows: int, inner: int, columns: int, generator: torch.Generator) -> float:
    a, b = torch.randn(rows, inner, generator=generator), torch.randn(inner, columns, generator=generator)
    exact = a.double() @ b.double()
    return float(((a @ b).double() - exact).norm() / exact.norm())


class SidePath:
    """A forward hook of a linear module: what the sum of some deltas adds to its output. Of experts see `add_beside`.

    Input and output may be of any float type; the products and the sum are float32, and one cast gives the output's type. The
    factors follow the output to its device at the first call there.

    Args:
        deltas: at least one; all (out, in), the module's, however it stores its weight.
    """

    def __init__(self, deltas: Sequence[Delta]) -> None:
        out, inner = deltas[0].shape
        total = add(deltas, (out, inner))
        if isinstance(total, LowRank) and total.B.shape[1] * (out + inner) < out * inner:
            matrices: tuple[np.ndarray, ...] = (total.A, total.B)
        else:
            matrices = (to_dense(total),)
        self._factors = [torch.from_numpy(np.ascontiguousarray(matrix, np.float32)) for matrix in matrices]

    def __call__(
        self, module: torch.nn.Module, args: tuple[Any, ...], output: Float[Tensor, "*batch out"]
    ) -> Float[Tensor, "*batch out"]:
        keys = args[0]
        self._factors = [factor.to(output.device) for factor in self._factors]
        first, *rest = self._factors
        if isinstance(keys, Routed):
            change = keys.times(first)
        else:
            change = torch.nn.functional.linear(keys.to(output.device, torch.float32), first)
        for factor in rest:
            change = torch.nn.functional.linear(change, factor)
        changed: Tensor = output.float() + change.view(output.shape)
        return changed.to(output.dtype)


def add_beside(module: nn.Module, deltas: Sequence[Delta]) -> RemovableHandle:
    """Let a linear module, or the experts of a layer, also give what the sum of some deltas gives, from now on."""
    path, known = SidePath(deltas), shape_of(module)
    if known is None:
        return module.register_forward_hook(path)

    def add_to_experts(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        keys = gated_keys(module, args, kwargs, None)
        return known.spread(path(module, (keys,), known.together(output)))

    return module.register_forward_hook(add_to_experts, with_kwargs=True)


class _Ended(BaseModelOutputWithPast):
    """What a decoder gives back, with None for whatever else a model's head looks for in it (images, cross attention)."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


_ROWS = 32
_TOLERANCE = 1e-3  # relative difference of logits that the pieces may show against the whole (half precision)


class _FrozenLayer(DynamicLayer):  # type: ignore[no-untyped-call]  # transformers registers subclasses untyped
    """Keys and values of a fixed prefix: new ones are appended for the call and not kept.

    Args:
        rows: which row of ``keys`` and ``values`` stands before each row of the batch; None: they are its rows.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, keys: Tensor, values: Tensor, rows: Int[Tensor, " batch"] | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.lazy_initialization(keys, values)
        self.keys, self.values, self._rows = keys, values, None if rows is None else rows.to(keys.device)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        before = (self.keys, self.values) if self._rows is None else (self.keys[self._rows], self.values[self._rows])
        return torch.cat([before[0], key_states], dim=-2), torch.cat([before[1], value_states], dim=-2)


class Prefix(Cache):
    """The attention keys and values of every block over a prefix of P positions, never extended."""

    def __init__(self, pairs: Sequence[tuple[Tensor, Tensor]], rows: Int[Tensor, " batch"] | None = None) -> None:
        super().__init__(layers=[_FrozenLayer(keys, values, rows) for keys, values in pairs])
        self._pairs = tuple(pairs)

    @classmethod
    def of(cls, cache: Any) -> Prefix:
        """What a transformers cache holds after a forward pass."""
        return cls([(layer.keys, layer.values) for layer in cache.layers])

    def select(self, rows: Int[Tensor, " rows"]) -> Prefix:
        """The same prefix for some rows of the batch."""
        return Prefix([(keys[rows.to(keys.device)], values[rows.to(values.device)]) for keys, values in self._pairs])

    def to(self, dtype: torch.dtype) -> Prefix:
        """The same in another type."""
        return Prefix([(keys.to(dtype), values.to(dtype)) for keys, values in self._pairs])

    def lend(self, rows: Int[Tensor, " rows"]) -> Prefix:
        """The same as `select`, for use in a pass only: rows are copied as a block asks for them, one block at a time."""
        return Prefix(self._pairs, rows)

    def rearrange(self, place: Int[Tensor, "batch time"]) -> Prefix:
        """Position ``t`` of each row taken from position ``place[row, t]`` of the same row."""
        row = torch.arange(len(place), device=place.device)[:, None]
        return Prefix([(_taken(keys, row, place), _taken(values, row, place)) for keys, values in self._pairs])

    def copy_into(self, cache: DynamicCache) -> None:
        """Make ``cache``, which is empty, begin with these positions."""
        for index, (keys, values) in enumerate(self._pairs):
            cache.update(keys, values, index)


@dataclass(frozen=True, eq=False)
class Pass:
    """One batch on its way through the model: the embedded tokens and what each block is called with."""

    stack: Stack
    hidden: Float[Tensor, "batch time d"]
    calls: tuple[tuple[tuple[Any, ...], dict[str, Any]], ...]

    def run(self, hidden: Float[Tensor, "batch time d"], start: int, stop: int) -> Float[Tensor, "batch time d"]:
        """The hidden states after block ``stop - 1``, given those before block ``start``."""
        for index in range(start, stop):
            args, kwargs = self.calls[index]
            hidden = _first(self.stack.blocks[index](hidden.to(self.stack.device_of(index)), *args, **kwargs))
        return hidden.to(self.stack.device)

    def finish(
        self, hidden: Float[Tensor, "batch time d"], start: int, row: Int[Tensor, " m"], column: Int[Tensor, " m"]
    ) -> Float[Tensor, "m d"]:
        """The hidden states after the last block at some positions; its feed-forward part runs there only."""
        last = len(self.stack.blocks) - 1
        hidden = self.run(hidden, start, last)
        if start <= last:
            with self.stack.feed_forward_at(last, row, column):
                hidden = self.run(hidden, last, last + 1)
        return hidden[row, column]


class Stack:
    """The pieces of one loaded model.

    Args:
        model: a transformers causal LM; it is put into evaluation mode, its parameters stop asking for gradients, and the gates of shared
            experts multiply keys (`gate_keys`).
        architecture: where its blocks are.

    Raises:
        UnsupportedModelError: the pieces do not give the logits that the whole model gives.
    """

    def __init__(self, model: Any, architecture: Architecture) -> None:
        self.model = model.eval().requires_grad_(False)
        gate_keys(self.model, architecture)
        self.architecture = architecture
        self.blocks: list[nn.Module] = list(model.get_submodule(architecture.blocks))
        self.decoder: Any = model.get_submodule(architecture.blocks.rpartition(".")[0])
        self.streamed = streamed(model)
        self.ffn_out: list[nn.Module] = [
            model.get_submodule(architecture.ffn_module(layer)) for layer in range(len(self.blocks))
        ]
        self._behind: dict[int, Behind] = {}
        self._plain_head, self._any_token = True, torch.zeros(1, 1, dtype=torch.long, device=self.device)
        self._tuple_parts: set[int] = set()  # blocks whose feed-forward part returns more than hidden states
        self._norm, self._tuple_output = self._probe()

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        device: torch.device = self.model.get_input_embeddings().weight.device
        return device

    @property
    def vocabulary(self) -> int:
        """How many tokens the head gives logits of."""
        return int(self.model.get_output_embeddings().weight.shape[0])

    def device_of(self, index: int) -> torch.device:
        """Where block ``index`` lives; of a streamed one, where it runs."""
        if self.streamed is not None:
            return self.device
        return next(self.blocks[index].parameters()).device

    @contextmanager
    def resident(self, *indices: int) -> Iterator[None]:
        """While open, these blocks are in memory, also those of a model whose blocks are streamed."""
        with ExitStack() as opened:
            if self.streamed is not None:
                for index in indices:
                    opened.enter_context(self.streamed.resident(index))
            yield

    def stretches(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """The blocks from ``start`` to before ``stop`` in parts through which many batches go one after the other.

        That is all of them at once; of a model whose blocks are streamed one at a time, which is in memory until the next is asked for.
        """
        if not self.streamed:
            if start < stop:
                yield start, stop
            return
        for index in range(start, stop):
            with self.resident(index):
                yield index, index + 1

    def behind(self, layer: int) -> Behind:
        """What stands between the FFN output projection of a layer and the residual stream.

        Raises:
            UnsupportedModelError: a norm of another kind than y / rms(y) times a gain.
        """
        if layer not in self._behind:
            with self.resident(layer):
                self._behind[layer] = behind_of(self.model, self.architecture, layer)
        return self._behind[layer]

    @torch.no_grad()
    def begin(
        self,
        ids: Int[Tensor, "batch time"],
        mask: Int[Tensor, "batch all"],
        positions: Int[Tensor, "batch time"],
        prefix: Prefix | None = None,
    ) -> Pass:
        """Embed a batch and record the arguments of every block.

        Args:
            ids: token ids; padding may hold any id.
            mask: 1 for real tokens, 0 for padding, over the prefix (if any) and then ``ids``.
            positions: position ids of ``ids``.
            prefix: keys and values of the positions before ``ids``.
        """
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        first: list[Tensor] = []

        def record(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs.pop("hidden_states")
            first.append(hidden)
            calls.append((args[1:], kwargs))
            return (hidden, None) if self._tuple_output else hidden

        with _replaced_forwards(self.blocks, record):
            self.decoder(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=prefix,
                use_cache=prefix is not None,
            )
        return Pass(self, first[0].to(self.device), tuple(calls))

    def fast(self) -> AbstractContextManager[None]:
        """`fast` for this model."""
        return fast(self.model)

    @torch.no_grad()
    def read_prefix(
        self,
        ids: Int[Tensor, "batch time"],
        mask: Int[Tensor, "batch all"],
        positions: Int[Tensor, "batch time"],
        before: Prefix | None = None,
        stop: int | None = None,
    ) -> Prefix:
        """The keys and values of every block over a batch of texts, after those of ``before``; arguments as for `begin`.

        Args:
            stop: of the blocks before this one only, for passes that go no further; None: of all.
        """
        cache = DynamicCache()  # without a config: sliding layers keep every position, and the mask does the sliding
        if before is not None:
            before.copy_into(cache)
        nowhere, stop = torch.zeros(0, dtype=torch.long), len(self.blocks) if stop is None else stop

        def passed(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            return (hidden, None) if self._tuple_output else hidden

        with _replaced_forwards(self.blocks[stop:], passed), self.feed_forward_at(stop - 1, nowhere, nowhere):
            self.decoder(
                input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
            )
        return Prefix.of(cache)

    @contextmanager
    def feed_forward_at(self, index: int, row: Int[Tensor, " m"], column: Int[Tensor, " m"]) -> Iterator[list[int]]:
        """While open, the feed-forward part of block ``index`` runs at some positions only and gives zeros elsewhere.

        Where it is no module of its own that maps hidden states to hidden states (OPT, BLOOM), it runs everywhere.
        Yields a list that grows by the number of positions with each run that was shortened: there the module sees one row that begins
        with these positions.
        """
        path, shortened = self.architecture.feed_forward[index].path.rpartition(".")[0], list[int]()
        if not path:
            yield shortened
            return
        module = self.blocks[index].get_submodule(path)
        whole, tuples = module.forward, index in self._tuple_parts

        def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            if args or kwargs or hidden.dim() != 3:
                return whole(hidden, *args, **kwargs)
            shortened.append(len(row))
            zeros, at = torch.zeros_like(hidden), (row.to(hidden.device), column.to(hidden.device))
            given = (
                _rounded(lambda some: _first(whole(some[None])).view(some.shape), hidden[at])
                if len(row)
                else hidden[at]
            )
            found = zeros.index_put(at, given)
            return (found, None) if tuples else found

        with _replaced_forwards([module], forward):
            yield shortened

    def logits(self, hidden: Float[Tensor, "... d"]) -> Float[Tensor, "... vocabulary"]:
        """Logits from hidden states after the last block."""
        weight = self.model.get_output_embeddings().weight
        normed: Tensor = self._norm(hidden).to(weight.device)
        logits: Tensor = _rounded(self._head, normed) if normed.dim() == 2 else self._head(normed)
        return logits.to(self.device)

    def _head(self, normed: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch vocabulary"]:
        """The head, and what the model does with its logits besides: a scale (Cohere, Granite), a soft cap (Gemma 2)."""
        if self._plain_head:
            plain: Tensor = self.model.get_output_embeddings()(normed)
            return plain
        rows = normed[None] if normed.dim() == 2 else normed

        def ended(*args: Any, **kwargs: Any) -> _Ended:
            return _Ended(last_hidden_state=rows)

        with _replaced_forwards([self.model.base_model], ended):
            logits: Tensor = self.model(input_ids=self._any_token, use_cache=False).logits
        return logits.view(*normed.shape[:-1], -1)

    @contextmanager
    def watch_keys(self, layers: Sequence[int]) -> Iterator[dict[int, Any]]:
        """While open, the latest input of the FFN output projection of each layer: (batch, time, in), of experts as `Routed`."""
        seen: dict[int, Any] = {}

        def keep(layer: int, rows: dict[int, torch.Size]) -> RemovableHandle:
            def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                if self.architecture.feed_forward[layer].experts:
                    seen[layer] = gated_keys(module, args, kwargs, rows[layer])
                else:
                    seen[layer] = in_rows(args[0], rows[layer])

            return self.ffn_out[layer].register_forward_pre_hook(note, with_kwargs=True)

        with self._watch(layers, keep):
            yield seen

    @contextmanager
    def watch_values(self, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
        """While open, the latest of what enters `behind` at each layer: (batch, time, d), see `hook_output`."""
        seen: dict[int, Tensor] = {}

        def keep(layer: int, rows: dict[int, torch.Size]) -> RemovableHandle:
            def note(output: Tensor) -> None:
                seen[layer] = in_rows(output, rows[layer])

            return self.hook_output(layer, note)

        with self._watch(layers, keep):
            yield seen

    def hook_output(self, layer: int, function: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
        """Give the output of a layer's feed-forward part to a function; what that returns takes its place.

        That is the projection's output; where a norm comes behind, what enters the norm, for that may be the sum of several projections.
        """
        return hook_output(self.model, self.architecture, layer, function)

    @contextmanager
    def _watch(
        self, layers: Sequence[int], keep: Callable[[int, dict[int, torch.Size]], RemovableHandle]
    ) -> Iterator[None]:
        """Hooks of some layers, given (batch, time) of each block's latest input."""
        rows: dict[int, torch.Size] = {}

        def enter(layer: int) -> RemovableHandle:
            def note(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                rows[layer] = (args[0] if args else kwargs["hidden_states"]).shape[:2]

            return self.blocks[layer].register_forward_pre_hook(note, with_kwargs=True)

        with _removed(handle for layer in layers for handle in (enter(layer), keep(layer, rows))):
            yield

    def _note_tuples(self, layer: int) -> RemovableHandle:
        path = self.architecture.feed_forward[layer].path.rpartition(".")[0]

        def note(module: nn.Module, args: Any, output: Any) -> None:
            if path and isinstance(output, tuple):
                self._tuple_parts.add(layer)

        return self.blocks[layer].get_submodule(path).register_forward_hook(note)

    @torch.no_grad()
    def _probe(self) -> tuple[nn.Module, bool]:
        """Find what runs after the blocks and how blocks return, and check that the pieces make the whole."""
        after: list[nn.Module] = []
        tuples: list[bool] = []
        last = self.blocks[-1]
        siblings = [m for m in self.decoder.children() if not isinstance(m, nn.ModuleList)]
        handles = [last.register_forward_hook(lambda m, a, out: tuples.append(isinstance(out, tuple)))]
        handles += [m.register_forward_hook(lambda m, a, out: after.append(m) if tuples else None) for m in siblings]
        handles += [self._note_tuples(layer) for layer in range(len(self.blocks))]
        ids = torch.arange(1, 5, device=self.device)[None] % self.model.config.get_text_config().vocab_size
        try:
            whole = self.model(input_ids=ids, use_cache=False).logits
        finally:
            for handle in handles:
                handle.remove()
        self._norm, self._tuple_output = (after[0] if after else nn.Identity()), tuples[0]
        start = self.begin(ids, torch.ones_like(ids), torch.arange(ids.shape[1], device=self.device)[None])
        # Read in another order, so that a head which mixes positions is found out.
        hidden, whole = start.run(start.hidden, 0, len(self.blocks))[0].flip(0), whole[0].flip(0)
        self._plain_head = _close(self.logits(hidden), whole)
        if len(after) > 1 or not (self._plain_head or _close(self.logits(hidden), whole)):
            raise UnsupportedModelError(
                f"the blocks and head of this {self.architecture.model_type} model do not compose to its logits",
                remedy="Only models of the form embed -> blocks -> norm -> head can be edited.",
                model_type=self.architecture.model_type,
            )
        return self._norm, self._tuple_output


@contextmanager
def fast(model: Any) -> Iterator[None]:
    """While open, the model computes the same numbers, up to float32's rounding, in less time on a CPU.

    Its products are those of `fast_products`, and a mixture's are made expert by expert (`grouped_forwards`). Its activations are fused,
    and its head sees contiguous states: of a slice (the last positions) PyTorch makes a product for each row then, and copies the
    head's weight for each of them.
    """
    gelus = [module for module in model.modules() if isinstance(module, NewGELUActivation)]
    contiguous = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: (args[0].contiguous(),))
    with ExitStack() as opened:
        opened.enter_context(fast_products(model.get_input_embeddings().weight.device))
        opened.enter_context(_replaced_forwards(gelus, lambda x: nn.functional.gelu(x, approximate="tanh")))
        opened.enter_context(_removed([contiguous]))
        for experts, forward in grouped_forwards(model):
            opened.enter_context(_replaced_forwards([experts], forward))
        yield


def left_padded(
    rows: Sequence[Sequence[int]], device: torch.device
) -> tuple[Int[Tensor, "batch time"], Int[Tensor, "batch time"], Int[Tensor, "batch time"]]:
    """Token ids, mask and position ids of rows padded on the left to one length."""
    return _padded(rows, device, left=True)


def right_padded(
    rows: Sequence[Sequence[int]], device: torch.device
) -> tuple[Int[Tensor, "batch time"], Int[Tensor, "batch time"], Int[Tensor, "batch time"]]:
    """Token ids, mask and position ids of rows padded on the right to one length."""
    return _padded(rows, device, left=False)


def _padded(rows: Sequence[Sequence[int]], device: torch.device, *, left: bool) -> tuple[Tensor, Tensor, Tensor]:
    width = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for index, row in enumerate(rows):
        span = slice(width - len(row), width) if left else slice(0, len(row))
        ids[index, span] = torch.tensor(row, dtype=torch.long)
        mask[index, span] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return ids.to(device), mask.to(device), positions.to(device)


@contextmanager
def _removed(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Hooks that go when the block ends."""
    added = list(handles)
    try:
        yield
    finally:
        for handle in added:
            handle.remove()


@contextmanager
def _replaced_forwards(modules: Sequence[nn.Module], forward: Any) -> Iterator[None]:
    """Every module's forward replaced for a while; an instance attribute that was there before is put back."""
    before = [module.__dict__.get("forward") for module in modules]
    for module in modules:
        module.forward = forward
    try:
        yield
    finally:
        for module, own in zip(modules, before, strict=True):
            if own is None:
                del module.__dict__["forward"]
            else:
                module.forward = own


def in_rows(states: Tensor, rows: torch.Size) -> Float[Tensor, "batch time d"]:
    """States that a feed-forward part has flattened (OPT does) in rows again; others as they are."""
    return states.view(*rows, -1) if states.dim() == 2 else states


def _rounded(function: Callable[[Tensor], Tensor], states: Float[Tensor, "m d"]) -> Tensor:
    """``function`` of the states, called with a number of them that `_ROWS` divides.

    Libraries make a kernel for each shape of a product and keep it for good, so numbers that are hardly ever the same need rounding.
    """
    return function(nn.functional.pad(states, (0, 0, 0, -len(states) % _ROWS)))[: len(states)]


def _taken(
    states: Float[Tensor, "batch heads all d"], row: Int[Tensor, "batch 1"], place: Int[Tensor, "batch time"]
) -> Float[Tensor, "batch heads time d"]:
    return states[row.to(states.device), :, place.to(states.device)].transpose(1, 2)


def _first(output: Tensor | tuple[Any, ...]) -> Tensor:
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def _close(a: Tensor, b: Tensor) -> bool:
    a, b = a.float().cpu(), b.float().cpu()
    finite: Bool[Tensor, ""] = torch.isfinite(b).all()
    return bool(finite) and float((a - b).norm()) <= _TOLERANCE * float(b.norm()) + 1e-6
