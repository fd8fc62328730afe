"""A base that does not fit: its blocks are read from its files when they are run, and let go afterwards.

transformers loads what is not in the blocks, and says where each parameter of a block lies: in the checkpoint, or, where loading makes
one tensor of several (most mixtures of experts), in files that it writes to a temporary folder. accelerate's own hooks, which map every
linear map's weight on its own, are taken off: here a block is read at once, into memory of its own, so that a file that is cut short is
an error and no fault of the process, and can be kept while many batches run through it.

Gradients go through such blocks. What autograd would keep of a block's weights for the way back is only noted, and read again when the way
back reaches the block: so one block is in memory then too, and the numbers are the same bit for bit."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from itertools import chain
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from typing import Any, Final
from weakref import finalize

import torch
from torch import Tensor, nn

from patchhub.errors import BaseError, UnsupportedModelError
from patchhub.models.architectures import describe, read_config, read_model, without_weights
from patchhub.models.checkpoint import Checkpoint, TensorEntry, not_finite, read_header, read_tensor

_ATTRIBUTE: Final = "patchhub_streamed"
_PART: Final = 1 << 22  # numbers
_DISK: Final = "disk"  # accelerate's word for a part that stays in its files


@dataclass(frozen=True)
class _Noted:
    """A part of a weight that autograd wants to find again: of which block, and where it lies in the tensor."""

    index: int
    name: str
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class Streamed:
    """The blocks of one model that are not in memory.

    Args:
        blocks: on the meta device, apart from buffers.
        sources: where each parameter of each block lies, by its name in the block.
        device: where they run.
        base: what the base is called in errors.
    """

    def __init__(
        self,
        blocks: list[nn.Module],
        sources: list[dict[str, TensorEntry]],
        device: torch.device,
        base: str,
    ) -> None:
        self._blocks, self._sources, self._device, self._base = blocks, sources, device, base
        self._empty = [
            {name: block.get_parameter(name) for name in own} for block, own in zip(blocks, sources, strict=True)
        ]
        self._held: dict[int, dict[str, Tensor]] = {}
        self._behind: tuple[int, dict[str, Tensor]] | None = None  # the block that the way back is at
        self._sound: set[int] = set()
        for index, block in enumerate(blocks):
            block.forward = self._reading(index, block.forward)

    @contextmanager
    def resident(self, index: int) -> Iterator[None]:
        """While open, a block is in memory: read once, whatever runs through it.

        Raises:
            BaseError: a file of the base became shorter or cannot be read, or holds values that are not finite.
        """
        if index in self._held:
            yield
            return
        self._held[index] = self._read(index)
        try:
            _give(self._blocks[index], self._held[index])
            yield
        finally:
            for name, empty in self._empty[index].items():
                _put(self._blocks[index], name, empty)
            del self._held[index]

    def _reading(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A block's forward, with its weights read before and let go afterwards."""

        @functools.wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            with self.resident(index), self._noting(index):
                return forward(*args, **kwargs)

        return run

    def _noting(self, index: int) -> Any:
        """While open, autograd keeps notes in place of this block's weights."""
        if not torch.is_grad_enabled():
            return nullcontext()
        named = {weight.untyped_storage().data_ptr(): name for name, weight in self._held[index].items()}

        def pack(kept: Tensor) -> Tensor | _Noted:
            name = named.get(kept.untyped_storage().data_ptr())
            if name is None:
                return kept
            return _Noted(index, name, kept.size(), kept.stride(), int(kept.storage_offset()))

        def unpack(kept: Tensor | _Noted) -> Tensor:
            if isinstance(kept, Tensor):
                return kept
            return self._again(kept.index)[kept.name].as_strided(kept.size, kept.stride, kept.offset)

        return torch.autograd.graph.saved_tensors_hooks(pack, unpack)

    def _again(self, index: int) -> dict[str, Tensor]:
        """A block's weights on the way back; one block's are kept."""
        if index in self._held:
            return self._held[index]
        if self._behind is None or self._behind[0] != index:
            self._behind = None  # before the next one is read
            self._behind = index, self._read(index)
        return self._behind[1]

    def _read(self, index: int) -> dict[str, Tensor]:
        if self._behind is not None:
            kept, weights = self._behind
            self._behind = None
            if kept == index:
                return weights
        found: dict[str, Tensor] = {}
        for name, entry in self._sources[index].items():
            weight = read_tensor(entry).to(self._device, self._empty[index][name].dtype)
            if index not in self._sound and not all_finite(weight):
                raise not_finite(self._base, name)
            found[name] = weight
        self._sound.add(index)
        return found


def _give(block: nn.Module, weights: dict[str, Tensor]) -> None:
    for name, weight in weights.items():
        _put(block, name, nn.Parameter(weight, requires_grad=False))


def _put(block: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Make this the parameter of that name: a tensor on another device cannot become the data of the one that is there."""
    path, _, own = name.rpartition(".")
    block.get_submodule(path)._parameters[own] = parameter


def all_finite(weight: Tensor) -> bool:
    """Whether no number is NaN or infinite: one of them would be in the sum, which is read off memory once.

    A sum may overflow all the same; then numbers are looked at in parts, as PyTorch makes copies to find out.
    """
    finite = bool(weight.sum(dtype=torch.float32).isfinite())
    return finite or all(bool(part.isfinite().all()) for part in torch.split(weight.flatten(), _PART))


def streamed(model: Any) -> Streamed | None:
    """The blocks of a model that `load_streamed` made; None of any other."""
    found: Streamed | None = getattr(model, _ATTRIBUTE, None)
    return found


def load_streamed(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> Any:
    """The model of a checkpoint with everything but its blocks in memory.

    Args:
        dtype: of the weights in memory, and of activations.
        device: where it runs.

    Raises:
        UnsupportedModelError: some part of the model cannot be found in the files by itself.
        BaseError: the checkpoint cannot be read.
    """
    config = read_config(checkpoint.folder)
    blocks = describe(config).blocks
    folder = mkdtemp(prefix="patchhub-streamed-")
    with _quietly():
        model: Any = read_model(
            checkpoint.folder,
            dtype=dtype,
            device_map=_places(without_weights(config), blocks, str(device)),
            offload_folder=folder,
        )
    finalize(model, rmtree, folder, ignore_errors=True)  # what transformers made while it loaded goes with the model
    index = _index(model.get_submodule(blocks))
    import_module("accelerate.hooks").remove_hook_from_module(model, recurse=True)
    for module in model.modules():
        module.__dict__.pop("forward", None)  # accelerate leaves the class's own there
    model.requires_grad_(False)
    parts = list(model.get_submodule(blocks))
    sources = [_sources(checkpoint, index, f"{blocks}.{number}", block) for number, block in enumerate(parts)]
    setattr(model, _ATTRIBUTE, Streamed(parts, sources, device, checkpoint.name))
    inside = {id(parameter) for block in parts for parameter in block.parameters()}
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if tensor.is_meta and id(tensor) not in inside:
            raise _not_apart(model, name)
    return model


def _places(model: nn.Module, blocks: str, device: str) -> dict[str, str]:
    """A device map: the blocks on disk, and all that is beside the way to them on the device."""
    found: dict[str, str] = {}
    path = ""
    for step in blocks.split("."):
        module, prefix = model.get_submodule(path), f"{path}." if path else ""
        own = chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False))
        found |= {prefix + name: device for name, _ in chain(module.named_children(), own) if name != step}
        path = prefix + step
    return found | {f"{path}.{name}": _DISK for name, _ in model.get_submodule(path).named_children()}


def _index(blocks: nn.Module) -> dict[str, dict[str, str]]:
    """Where accelerate would read each parameter from: its file, and its name there."""
    for module in blocks.modules():
        weights: Any = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
        if weights is not None:
            index: dict[str, dict[str, str]] = weights.dataset.index
            return index
    return {}


def _sources(
    checkpoint: Checkpoint, index: dict[str, dict[str, str]], path: str, block: nn.Module
) -> dict[str, TensorEntry]:
    found: dict[str, TensorEntry] = {}
    headers: dict[str, dict[str, TensorEntry]] = {}
    for name, parameter in block.named_parameters():
        if not parameter.is_meta:
            continue
        place = index.get(f"{path}.{name}")
        if place is None:
            raise _not_apart(block, f"{path}.{name}")
        file, stored = place["safetensors_file"], place["weight_name"]
        if stored in checkpoint.tensors and Path(file).name == checkpoint.tensors[stored].file.name:
            entry = checkpoint.tensors[stored]
        else:
            entry = headers.setdefault(file, read_header(Path(file)))[stored]
        if entry.shape != tuple(parameter.shape):
            raise BaseError(
                f"{checkpoint.name} holds {stored} of shape {entry.shape}, and the model wants {tuple(parameter.shape)}",
                remedy="Download or convert the model again.",
                tensor=stored,
            )
        found[name] = entry
    for name, buffer in block.named_buffers():
        if buffer.is_meta:
            raise _not_apart(block, f"{path}.{name}")
    return found


def _not_apart(model: Any, name: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{name} cannot be read by itself from the files of the base, so its blocks cannot be streamed",
        remedy="Choose another --device: cpu, cuda:0 or spread.",
        parameter=name,
    )


@contextmanager
def _quietly() -> Iterator[None]:
    """While open, accelerate does not say that parameters are on the meta device."""
    logger = logging.getLogger("accelerate.big_modeling")
    before = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = before
