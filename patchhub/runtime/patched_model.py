"""An ordinary transformers model with the weights of a commit: loaded, or attached to a model in memory and detached.

Deltas can run beside the weights of a live model: on quantised bases, and where a cast would round the change away."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from patchhub.cache import Cache
from patchhub.delta import Delta
from patchhub.errors import BaseError, SettingsError, UnsupportedModelError
from patchhub.models.architectures import read_model
from patchhub.models.checkpoint import Checkpoint
from patchhub.models.experts import module_of
from patchhub.models.fingerprint import check_tensors, not_the_base
from patchhub.models.placement import is_quantised
from patchhub.models.streaming import streamed
from patchhub.models.structure import Orientation
from patchhub.models.tracing import add_beside
from patchhub.objects import Base
from patchhub.runtime.compose import ReadyWeights, compose
from patchhub.runtime.routing import Mode, SideMemory, route, unroute


def run_beside(model: nn.Module, weights: Mapping[str, Sequence[Delta]]) -> tuple[RemovableHandle, ...]:
    """Let every named weight's module add its deltas from now on; the handles take them off again.

    Raises:
        BaseError: the model has no such module; nothing was attached then.
        UnsupportedModelError: a weight is an embedding's or a norm's, or a bias.
    """
    modules = {name: _module(model, name) for name in weights}
    others = sorted(name for name, module in modules.items() if not _is_linear(module, name))
    if others:
        raise UnsupportedModelError(
            f"this state changes {others[0]}{' and others like it' if others[1:] else ''}, which is no weight of a linear module, so "
            "the change cannot run beside it",
            remedy="Load the base in float32, without side_path and without quantisation.",
            weights=others,
        )
    return tuple(add_beside(modules[name], deltas) for name, deltas in weights.items() if deltas)


def take_off(handles: Iterable[RemovableHandle]) -> None:
    """Undo `run_beside`."""
    for handle in handles:
        handle.remove()


def _is_linear(module: nn.Module, name: str) -> bool:
    """Whether the parameter of that name is what a module multiplies its input with; experts are, in their own way."""
    weight = getattr(module, "weight", None)
    is_vector = isinstance(weight, Tensor) and weight.ndim == 1
    return not (name.endswith(".bias") or isinstance(module, nn.Embedding) or is_vector)


def _module(model: nn.Module, weight: str) -> nn.Module:
    try:
        return module_of(model, weight)
    except AttributeError as error:
        raise not_the_base("the model in memory", missing=[weight]) from error


Progress = Callable[[int, int], None]
"""Called with the number of weights done and of weights in all."""

ATTRIBUTE: Final = "patchhub"
"""The one attribute that patchhub sets on a model: its `Attachment`."""

Proof = Literal["checked", "claimed", "trusted"]
"""Whether weights are those of their facts: that was computed here, or their author says so, or they are not and were accepted."""

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, eq=False)
class Routing:
    """The side memories of a state and how queries reach them; without memories nothing is routed.

    Attributes:
        memories: in ascending order of patch id.
        mode: keep them apart and let each query choose ("retrieve"), or join them into one ("merge").
        merge_method, merge_density: how they are joined, see `routing.route`.
    """

    memories: Sequence[SideMemory] = ()
    mode: Mode = "retrieve"
    merge_method: Literal["ties", "linear"] = "ties"
    merge_density: float = 0.53

    @property
    def weights(self) -> frozenset[str]:
        """The parameters that have a side memory."""
        return frozenset(memory.weight for memory in self.memories)


UNROUTED: Final = Routing()


@dataclass(frozen=True)
class PatchState:
    """What is to be loaded.

    Attributes:
        base: the base that the deltas belong to.
        orientation: how the base stores the patched weights, apart from those of `stored`.
        weights: parameter name -> the deltas whose sum is its change, in ascending order of blob id.
        commit: the commit's id, as a label; None for a state that is no commit.
        routing: the side memories beside those weights.
        proof: whether the deltas are known to be those of the commit's facts; None for the base, which has none.
        stored: how each expert of stacked weights is stored, by parameter name.
    """

    base: Base
    orientation: Orientation
    weights: Mapping[str, Sequence[Delta]]
    commit: str | None = None
    routing: Routing = UNROUTED
    proof: Proof | None = None
    stored: Mapping[str, Orientation] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Attachment:
    """What a model remembers of the patch it has.

    Attributes:
        checkpoint: the base's files.
        state: what is attached.
        originals: parameter name -> the tensor that was there before; a patched parameter that is missing here was
            never unpatched in memory, and its original is in the checkpoint.
        beside: takes off the deltas that run beside the weights; None where weights are composed.
    """

    checkpoint: Checkpoint
    state: PatchState
    originals: Mapping[str, Tensor] = field(default_factory=dict)
    beside: tuple[RemovableHandle, ...] | None = None

    @property
    def commit(self) -> str | None:
        """The commit whose weights the model has."""
        return self.state.commit

    @property
    def proof(self) -> Proof | None:
        """Whether they are known to be those of the commit's facts."""
        return self.state.proof


def load_patched(
    checkpoint: Checkpoint,
    state: PatchState,
    *,
    cache: Cache | None = None,
    ready: ReadyWeights | None = None,
    side_path: bool = False,
    progress: Progress = lambda done, total: None,
    **from_pretrained: Any,
) -> PreTrainedModel:
    """A transformers model with the weights of ``state``.

    Memory beyond the model: one patched weight as stored and a few blocks of it in float32.

    Args:
        checkpoint: the base's files.
        state: what to load.
        cache: of digests, as in `fingerprint`; None: hash the touched tensors anew.
        ready: where composed weights of this state are kept; None: compose them.
        side_path: run the deltas beside the weights in float32; a quantised model always does.
        progress: called after each composed weight.
        **from_pretrained: passed on to ``AutoModelForCausalLM.from_pretrained`` (dtype, device_map, quantization_config, ...).

    Raises:
        BaseError: the checkpoint is not the state's base.
        SettingsError: ``device_map`` leaves a patched weight out of memory.
    """
    model = read_model(checkpoint.folder, **from_pretrained)
    if side_path or is_quantised(model):
        nothing = Attachment(checkpoint, PatchState(state.base, state.orientation, {}), beside=())
        _change_beside(model, nothing, state, cache)
        return model
    devices = {parameter.device.type for parameter in model.parameters()}
    device = min(devices)
    ready = ready if len(devices) == 1 else None  # which weight is where would matter
    kept = ready.open(model.dtype, device) if ready else None
    names = state.weights.keys() if kept is None else kept.keys()
    check_tensors(state.base, checkpoint, names | state.routing.weights, cache=cache)
    parameters = {name: _parameter(model, name) for name in names}
    if kept is None or any(parameters[name].dtype != tensor.dtype for name, tensor in kept.items()):
        kept = {}
        for name, composed in _composed(model, checkpoint, state, {}, progress):
            parameters[name].data = kept[name] = composed
        if ready and all(tensor.dtype == model.dtype for tensor in kept.values()):
            ready.keep(model.dtype, device, kept)
    else:
        for name, tensor in kept.items():
            parameters[name].data = tensor.to(parameters[name].device)
    add_routing(model, state.routing)
    setattr(model, ATTRIBUTE, Attachment(checkpoint, state))
    return model


def attach(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    state: PatchState,
    *,
    cache: Cache | None = None,
    side_path: bool = False,
    progress: Progress = lambda done, total: None,
) -> None:
    """Give a model in memory the weights of ``state``. Its own tensors are kept aside and put back by `detach`.

    Of a quantised model the vectors (norms and biases) are compared with the base's; its matrices cannot be.

    Args:
        model: the base, unpatched, quantised or in any float type, and on any device.
        checkpoint: the base's files.
        state: what to attach.
        cache: as in `load_patched`.
        side_path: as in `load_patched`; `switch` keeps to it. Of a model whose blocks are streamed it is always so.
        progress: called after each composed weight.

    Raises:
        BaseError: checkpoint or model are not the state's base; the model is then as it was.
        UnsupportedModelError: a patched weight is spread over devices.
        SettingsError: the model has a patch already, or a patched weight is not in memory.
    """
    if getattr(model, ATTRIBUTE, None) is not None:
        raise SettingsError(
            f"the model already has commit {attached(model)} attached", remedy="Use switch, or detach it first."
        )
    beside = () if side_path or is_quantised(model) or streamed(model) else None
    nothing = PatchState(state.base, state.orientation, {})
    _change(model, Attachment(checkpoint, nothing, beside=beside), state, cache, progress)


def switch(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    state: PatchState,
    *,
    cache: Cache | None = None,
    progress: Progress = lambda done, total: None,
) -> None:
    """Replace the patch of a model by another of the same base. Arguments and errors as for `attach`."""
    attachment = _attachment(model)
    old, new = attachment.state.base.id, state.base.id
    if old != new:
        raise BaseError(
            f"the model's patch belongs to the base {old[:12]}, the new one to {new[:12]}",
            remedy="Load the base of the new patch instead.",
            attached=old,
            wanted=new,
        )
    _change(model, replace(attachment, checkpoint=checkpoint), state, cache, progress)


def detach(model: PreTrainedModel) -> None:
    """Make a patched model the base again, bit for bit.

    Raises:
        SettingsError: it has no patch.
        BaseError: it was loaded patched, and the checkpoint has changed since.
    """
    attachment = _attachment(model)
    base = replace(attachment.state, weights={}, routing=UNROUTED)
    _change(model, attachment, base, None, lambda done, total: None)
    delattr(model, ATTRIBUTE)


@contextmanager
def unpatched(model: PreTrainedModel) -> Iterator[None]:
    """While open, a model is its base bit for bit; afterwards it has the patch again that it had, if any."""
    attachment: Attachment | None = getattr(model, ATTRIBUTE, None)
    if attachment is None:
        yield
        return
    switch(model, attachment.checkpoint, replace(attachment.state, weights={}, routing=UNROUTED))
    try:
        yield
    finally:
        switch(model, attachment.checkpoint, attachment.state)


def is_attached(model: PreTrainedModel) -> bool:
    """Whether a model is in the state of some revision, be it that of the base."""
    return getattr(model, ATTRIBUTE, None) is not None


def attached(model: PreTrainedModel) -> str | None:
    """The commit whose weights a model has; None if it has no patch."""
    attachment: Attachment | None = getattr(model, ATTRIBUTE, None)
    return attachment.state.commit if attachment else None


def add_routing(model: PreTrainedModel, routing: Routing) -> None:
    """Route a model's queries to side memories, if there are any."""
    if routing.memories:
        method, density = routing.merge_method, routing.merge_density
        route(model, routing.memories, routing.mode, merge_method=method, merge_density=density)


def _attachment(model: PreTrainedModel) -> Attachment:
    attachment: Attachment | None = getattr(model, ATTRIBUTE, None)
    if attachment is None:
        raise SettingsError("the model has no patch", remedy="Attach one first.")
    return attachment


def _change(
    model: PreTrainedModel, before: Attachment, state: PatchState, cache: Cache | None, progress: Progress
) -> None:
    """Go from one attachment to another: everything that can fail first, then the assignments."""
    if before.beside is not None:
        _change_beside(model, before, state, cache)
        return
    checkpoint, patched = before.checkpoint, before.state.weights.keys()
    touched = state.weights.keys() | state.routing.weights
    check_tensors(state.base, checkpoint, touched | (patched - before.originals.keys()), cache=cache)
    fresh = {name: _parameter(model, name).data for name in touched - patched}
    differing = sorted(name for name, tensor in fresh.items() if not _is_base(checkpoint, name, tensor))
    if differing:
        raise not_the_base("the model in memory", differing=differing)
    originals = {**before.originals, **fresh}
    tensors = dict(_composed(model, checkpoint, state, originals, progress))
    for name in patched - state.weights.keys():
        parameter = _parameter(model, name)
        stored = before.originals[name] if name in before.originals else checkpoint.read_parameter(name)
        tensors[name] = stored.to(parameter.device, parameter.dtype)
    _put(model, tensors, before.state.routing, state.routing)
    kept = {name: tensor for name, tensor in originals.items() if name in state.weights}
    setattr(model, ATTRIBUTE, Attachment(checkpoint, state, kept))


def _put(model: PreTrainedModel, tensors: Mapping[str, Tensor], old: Routing, new: Routing) -> None:
    """Give parameters their new values and route as ``new`` says; if that fails, all is as it was."""
    previous = {name: _parameter(model, name).data for name in tensors}
    for name, tensor in tensors.items():
        _parameter(model, name).data = tensor
    try:
        _reroute(model, old, new)
    except BaseException:
        for name, tensor in previous.items():
            _parameter(model, name).data = tensor
        raise


def _reroute(model: PreTrainedModel, old: Routing, new: Routing) -> None:
    """Take one routing off and put another on; if that fails, the old one is back."""
    unroute(model)
    try:
        add_routing(model, new)
    except BaseException:
        add_routing(model, old)
        raise


def _change_beside(model: PreTrainedModel, before: Attachment, state: PatchState, cache: Cache | None) -> None:
    """`_change` for deltas that run beside the weights, which stay the base's throughout."""
    names = list(state.weights.keys() - before.state.weights.keys())
    if streamed(model):
        names = []  # what is read from the checkpoint is the checkpoint's
    elif names and is_quantised(model):
        names = [name for name, vector in model.named_parameters() if vector.ndim == 1 and _is_plain(vector)]
    check_tensors(state.base, before.checkpoint, {*state.weights, *state.routing.weights, *names}, cache=cache)
    differing = sorted(name for name in names if not _is_base(before.checkpoint, name, _parameter(model, name).data))
    if differing:
        raise not_the_base("the model in memory", differing=differing)
    handles = run_beside(model, state.weights)
    try:
        _reroute(model, before.state.routing, state.routing)
    except BaseException:
        take_off(handles)
        raise
    take_off(before.beside or ())
    setattr(model, ATTRIBUTE, replace(before, state=state, beside=handles))


def _composed(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    state: PatchState,
    originals: Mapping[str, Tensor],
    progress: Progress,
) -> Iterator[tuple[str, Tensor]]:
    """The new tensor of each patched parameter, in its type and on its device, one at a time.

    W0 is the original in memory where that has the stored type, and so the stored bits; otherwise it is read.
    """
    for done, (name, deltas) in enumerate(state.weights.items(), start=1):
        parameter = _parameter(model, name)
        w0 = originals.get(name)
        if w0 is None or w0.dtype != checkpoint.dtype(checkpoint.parts(name)[0]):
            w0 = checkpoint.read_parameter(name)
        w0 = w0.to(parameter.device)
        orientation = state.stored.get(name, state.orientation)
        yield name, compose(w0, deltas, orientation=orientation, dtype=parameter.dtype)
        progress(done, len(state.weights))


def _is_base(checkpoint: Checkpoint, name: str, tensor: Tensor) -> bool:
    """Whether a tensor in memory is the checkpoint's, cast to its type, bit for bit."""
    expected = checkpoint.read_parameter(name).to(tensor.device, tensor.dtype)
    return expected.shape == tensor.shape and torch.equal(_bits(expected), _bits(tensor))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def _parameter(model: nn.Module, name: str) -> nn.Parameter:
    """A parameter that can be given other values.

    Raises:
        BaseError, UnsupportedModelError, SettingsError: it is missing, not a plain float tensor, or not in memory.
    """
    try:
        parameter = model.get_parameter(name)
    except AttributeError as error:
        raise not_the_base("the model in memory", missing=[name]) from error
    if parameter.is_meta:
        raise SettingsError(
            f"{name} is offloaded and not in memory",
            remedy="Choose a device_map that keeps the patched weights on a device.",
            weight=name,
        )
    if not _is_plain(parameter):
        raise UnsupportedModelError(
            f"{name} is quantised or spread over devices ({type(parameter.data).__name__}, {parameter.dtype})",
            remedy="Attach with side_path=True, or load the model in a float type and without tp_plan.",
            weight=name,
        )
    return parameter


def _is_plain(parameter: Tensor) -> bool:
    return type(parameter.data) is Tensor and parameter.dtype in _FLOATS
