"""An ordinary transformers model with the weights of a commit: loaded, or attached to a model in memory and detached.

Patched weights are always composed from the base's own tensor, never from patched ones, so the result does not depend
on what was attached before, and is rounded once whatever type the model runs in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from patchhub.delta import Delta
from patchhub.errors import BaseError, SettingsError, UnsupportedModelError
from patchhub.models.checkpoint import Checkpoint
from patchhub.models.fingerprint import check_tensors, not_the_base
from patchhub.models.structure import Orientation
from patchhub.objects import Base
from patchhub.runtime.compose import compose
from patchhub.runtime.ready import ReadyWeights

Progress = Callable[[int, int], None]
"""Called with the number of weights done and of weights in all."""

ATTRIBUTE: Final = "_patchhub_attachment"
"""The one attribute that patchhub sets on a model: its `Attachment`."""

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class PatchState:
    """What is to be loaded.

    Attributes:
        base: the base that the deltas belong to.
        orientation: how the base stores the patched weights.
        weights: parameter name -> the deltas whose sum is its change, in ascending order of blob id.
        commit: the commit's id, as a label; None for a state that is no commit.
    """

    base: Base
    orientation: Orientation
    weights: Mapping[str, Sequence[Delta]]
    commit: str | None = None


@dataclass(frozen=True, eq=False)
class Attachment:
    """What a model remembers of the patch it has.

    Attributes:
        checkpoint: the base's files.
        state: what is attached.
        originals: parameter name -> the tensor that was there before; a patched parameter that is missing here was
            never unpatched in memory, and its original is in the checkpoint.
    """

    checkpoint: Checkpoint
    state: PatchState
    originals: Mapping[str, Tensor] = field(default_factory=dict)


def load_patched(
    checkpoint: Checkpoint,
    state: PatchState,
    *,
    cache: Path | None = None,
    ready: ReadyWeights | None = None,
    progress: Progress = lambda done, total: None,
    **from_pretrained: Any,
) -> PreTrainedModel:
    """A transformers model with the weights of ``state``.

    Memory beyond the model: one patched weight as stored and a few blocks of it in float32.

    Args:
        checkpoint: the base's files.
        state: what to load.
        cache: a folder of digests, as in `fingerprint`; None: hash the touched tensors anew.
        ready: where composed weights of this state are kept; None: compose them.
        progress: called after each patched weight.
        **from_pretrained: passed on to ``AutoModelForCausalLM.from_pretrained`` (dtype, device_map, ...).

    Raises:
        BaseError: the checkpoint is not the state's base.
        UnsupportedModelError: a patched weight was quantised.
        SettingsError: ``device_map`` leaves a patched weight out of memory.
    """
    factory: Any = AutoModelForCausalLM
    model: PreTrainedModel = factory.from_pretrained(checkpoint.folder, **from_pretrained)
    kept = ready.open(model.dtype) if ready else None
    names = state.weights.keys() if kept is None else kept.keys()
    check_tensors(state.base, checkpoint, names, cache=cache)
    parameters = {name: _parameter(model, name) for name in names}
    if kept is None or any(parameters[name].dtype != tensor.dtype for name, tensor in kept.items()):
        kept = {}
        for name, composed in _composed(model, checkpoint, state, {}, progress):
            parameters[name].data = kept[name] = composed
        if ready and all(tensor.dtype == model.dtype for tensor in kept.values()):
            ready.keep(model.dtype, kept)
    else:
        for name, tensor in kept.items():
            parameters[name].data = tensor.to(parameters[name].device)
    setattr(model, ATTRIBUTE, Attachment(checkpoint, state))
    return model


def attach(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    state: PatchState,
    *,
    cache: Path | None = None,
    progress: Progress = lambda done, total: None,
) -> None:
    """Give a model in memory the weights of ``state``. Its own tensors are kept aside and put back by `detach`.

    Args:
        model: the base, unpatched, in any float type and on any device.
        checkpoint: the base's files.
        state: what to attach.
        cache: as in `load_patched`.
        progress: called after each composed weight.

    Raises:
        BaseError: checkpoint or model are not the state's base; the model is then as it was.
        UnsupportedModelError: a patched weight is quantised or spread over devices.
        SettingsError: the model has a patch already, or a patched weight is not in memory.
    """
    if getattr(model, ATTRIBUTE, None) is not None:
        raise SettingsError(
            f"the model already has commit {attached(model)} attached", remedy="Use switch, or detach it first."
        )
    _change(model, Attachment(checkpoint, PatchState(state.base, state.orientation, {})), state, cache, progress)


def switch(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    state: PatchState,
    *,
    cache: Path | None = None,
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
    _change(model, attachment, replace(attachment.state, weights={}), None, lambda done, total: None)
    delattr(model, ATTRIBUTE)


def attached(model: PreTrainedModel) -> str | None:
    """The commit whose weights a model has; None if it has no patch."""
    attachment: Attachment | None = getattr(model, ATTRIBUTE, None)
    return attachment.state.commit if attachment else None


def _attachment(model: PreTrainedModel) -> Attachment:
    attachment: Attachment | None = getattr(model, ATTRIBUTE, None)
    if attachment is None:
        raise SettingsError("the model has no patch", remedy="Attach one first.")
    return attachment


def _change(
    model: PreTrainedModel, before: Attachment, state: PatchState, cache: Path | None, progress: Progress
) -> None:
    """Go from one attachment to another: everything that can fail first, then the assignments."""
    checkpoint, patched = before.checkpoint, before.state.weights.keys()
    check_tensors(state.base, checkpoint, state.weights.keys() | (patched - before.originals.keys()), cache=cache)
    fresh = {name: _parameter(model, name).data for name in state.weights.keys() - patched}
    differing = sorted(name for name, tensor in fresh.items() if not _is_base(checkpoint, name, tensor))
    if differing:
        raise not_the_base("the model in memory", differing=differing)
    originals = {**before.originals, **fresh}
    tensors = dict(_composed(model, checkpoint, state, originals, progress))
    for name in patched - state.weights.keys():
        parameter = _parameter(model, name)
        stored = before.originals[name] if name in before.originals else _stored(checkpoint, name)
        tensors[name] = stored.to(parameter.device, parameter.dtype)
    for name, tensor in tensors.items():
        _parameter(model, name).data = tensor
    kept = {name: tensor for name, tensor in originals.items() if name in state.weights}
    setattr(model, ATTRIBUTE, Attachment(checkpoint, state, kept))


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
        if w0 is None or w0.dtype != checkpoint.dtype(checkpoint.resolve_name(name)):
            w0 = _stored(checkpoint, name)
        w0 = w0.to(parameter.device)
        yield name, compose(w0, deltas, orientation=state.orientation, dtype=parameter.dtype)
        progress(done, len(state.weights))


def _stored(checkpoint: Checkpoint, name: str) -> Tensor:
    return checkpoint.read(checkpoint.resolve_name(name))


def _is_base(checkpoint: Checkpoint, name: str, tensor: Tensor) -> bool:
    """Whether a tensor in memory is the checkpoint's, cast to its type, bit for bit."""
    expected = _stored(checkpoint, name).to(tensor.device, tensor.dtype)
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
    if type(parameter.data) is not Tensor or parameter.dtype not in _FLOATS:
        raise UnsupportedModelError(
            f"{name} is quantised or spread over devices ({type(parameter.data).__name__}, {parameter.dtype})",
            remedy="Load the model in float16, bfloat16 or float32, without quantization_config and tp_plan.",
            weight=name,
        )
    return parameter
