"""Where and in which type a base is put into memory: one device or several, its own type, float32, or quantised, or for a while bfloat16.

How much memory there is comes from the machine, or from what its control group (a container's limit) leaves."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import BitsAndBytesConfig
from transformers.utils import logging

from patchhub.errors import BaseError, SettingsError
from patchhub.models.architectures import read_model
from patchhub.models.checkpoint import Checkpoint
from patchhub.models.streaming import load_streamed, streamed
from patchhub.models.tracing import fast

GROUPS: Final = Path("/sys/fs/cgroup")
MACHINE: Final = Path("/proc/meminfo")

_FILES: Final = (
    ("memory.max", "memory.current", "memory.stat"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),  # version 1
)
_CACHED: Final = ("inactive_file", "active_file")
_UNKNOWN: Final = 4 << 30
_SHARE_CPU: Final = 0.5  # of the memory that weights in float32 may take where the type is chosen here
_SHARE_GPU: Final = 0.1
_LARGE: Final = 1 << 28  # bytes
_FAR: Final = (
    0.1  # mean total variation between two models' predictions beyond which one does not stand in for the other
)


def total_memory(groups: Path = GROUPS) -> int:
    """Bytes of the machine's memory, or the control group's limit where that is lower."""
    return min([_pages("SC_PHYS_PAGES"), *(limit for limit, _ in _limits(groups))])


def free_memory(groups: Path = GROUPS, machine: Path = MACHINE) -> int:
    """Bytes that could be taken now, of the machine and within the control group's limit; cached files count as free."""
    return min([_machine_free(machine), *(max(0, limit - used) for limit, used in _limits(groups))])


def _limits(groups: Path) -> Iterator[tuple[int, int]]:
    """The limit of the control group and what it holds, without cached files, in either version; nothing without a limit."""
    for limit, used, statistics in _FILES:
        with suppress(OSError, ValueError):  # no such version, or "max"
            most = int((groups / limit).read_text())
            yield most, int((groups / used).read_text()) - _cached(groups / statistics)


def _cached(statistics: Path) -> int:
    """Bytes of cached files, those of inner groups included."""
    try:
        found = dict(line.split() for line in statistics.read_text().splitlines())
    except (OSError, ValueError):
        return 0
    return sum(int(found.get(f"total_{name}", found.get(name, 0))) for name in _CACHED)


def _machine_free(machine: Path) -> int:
    with suppress(OSError, StopIteration), machine.open() as file:
        return 1024 * int(next(line for line in file if line.startswith("MemAvailable:")).split()[1])
    return _pages("SC_AVPHYS_PAGES")


def _pages(which: str) -> int:
    return os.sysconf(which) * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else _UNKNOWN


DTYPES: Final = ("auto", "float32", "bfloat16", "float16", "float64")
QUANTIZATIONS: Final = ("none", "8bit", "4bit")
STREAM: Final = "stream"


@dataclass(frozen=True)
class Placement:
    """How a base is loaded.

    Args:
        device: "auto" (one GPU if there is one, else the CPU), "spread" (the blocks over all GPUs), "stream" (the blocks are read from
            the base's files as they are run, by one GPU if there is one, else the CPU), or a torch device such as "cpu" or "cuda:1".
        dtype: "float32", "bfloat16", "float16", or "auto": see `chosen_dtype`.
        quantization: "8bit" or "4bit" (bitsandbytes, NF4): the linear layers' weights take a quarter or an eighth of float32.

    Raises:
        SettingsError: a value is none of these, or a quantised base is to be streamed.
    """

    device: str = "auto"
    dtype: str = "auto"
    quantization: str = "none"

    def __post_init__(self) -> None:
        for name, known in (("dtype", DTYPES), ("quantization", QUANTIZATIONS)):
            value = getattr(self, name)
            if value not in known:
                raise SettingsError(f"{name} cannot be {value!r}", remedy=f"Choose one of {', '.join(known)}.")
        if self.device == STREAM and self.quantization != "none":
            raise SettingsError(
                "a base whose blocks are streamed cannot be quantised",
                remedy="Leave one of --device and --quantization out.",
            )
        if self.device not in ("auto", "spread", STREAM):
            _existing_device(self.device)

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """The devices that the base is put on.

        Raises:
            SettingsError: "spread" without a GPU.
        """
        gpus = tuple(torch.device("cuda", index) for index in range(torch.cuda.device_count()))
        if self.device == "spread":
            if not gpus:
                raise SettingsError("there is no GPU to spread the base over", remedy="Leave the device out.")
            return gpus
        if self.device in ("auto", STREAM):
            return gpus[:1] or (torch.device("cpu"),)
        return (torch.device(self.device),)


DEFAULT: Final = Placement()


def chosen_dtype(checkpoint: Checkpoint, placement: Placement) -> torch.dtype:
    """The type of the base's weights in memory, of what a quantised base computes in, and of its activations.

    "auto" is float32 where the weights take at most half of a CPU's memory in it, or a tenth of a GPU's; else, and for a quantised base,
    the type of the most of the checkpoint's numbers. A GPU multiplies bfloat16 ten times as fast as float32, which shows where the
    model is large enough to keep it busy; changes run beside such weights in float32 anyway.
    """
    if placement.dtype != "auto":
        named: torch.dtype = getattr(torch, placement.dtype)
        return named
    counts = _numbers(checkpoint)
    own: torch.dtype = getattr(torch, counts.most_common(1)[0][0]) if counts else torch.float32
    share = _SHARE_CPU if all(device.type == "cpu" for device in placement.devices) else _SHARE_GPU
    fits = 4 * counts.total() <= share * sum(map(memory_of, placement.devices))
    return torch.float32 if fits and placement.quantization == "none" else own


def _numbers(checkpoint: Checkpoint) -> Counter[str]:
    """How many numbers of each float type a checkpoint holds."""
    counts: Counter[str] = Counter()
    for name, entry in checkpoint.tensors.items():
        dtype = checkpoint.dtype(name)
        if dtype.is_floating_point:
            counts[name_of(dtype)] += entry.size // dtype.itemsize
    return counts


def settled(checkpoint: Checkpoint, placement: Placement) -> Placement:
    """The placement with "auto" as "stream" where the weights would take more than the memory that is free on the device now."""
    if placement.device != "auto" or placement.quantization != "none" or find_spec("accelerate") is None:
        return placement
    [device] = placement.devices
    free = free_memory() if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]
    needed = chosen_dtype(checkpoint, placement).itemsize * _numbers(checkpoint).total()
    return replace(placement, device=STREAM) if needed > free else placement


def load_base(checkpoint: Checkpoint, placement: Placement) -> Any:
    """The unpatched model of a checkpoint, placed; "auto" is not `settled` here.

    Raises:
        SettingsError: a library is missing that the placement needs.
        BaseError: it does not fit.
        UnsupportedModelError: its blocks are to be streamed, and cannot be.
    """
    dtype = chosen_dtype(checkpoint, placement)
    if placement.device == STREAM:
        _require("accelerate", "to stream a base")
        with _without_bars():
            return load_streamed(checkpoint, dtype, placement.devices[0])
    arguments: dict[str, Any] = {"dtype": dtype, "local_files_only": True}
    if placement.quantization != "none":
        arguments["quantization_config"] = _quantization(placement.quantization, dtype)
    if placement.device == "spread":
        _require("accelerate", "to spread a base over devices")
        arguments["device_map"] = "balanced"
    elif placement.devices[0].type != "cpu" and find_spec("accelerate") is not None:
        arguments["device_map"] = {"": placement.devices[0]}
    try:
        with _without_bars():  # whoever loads a base to work with it says so
            model: Any = read_model(checkpoint.folder, **arguments)
        if "device_map" not in arguments and placement.quantization == "none":
            model = model.to(placement.devices[0])
    except torch.OutOfMemoryError as error:
        raise BaseError(
            f"{checkpoint.name} does not fit into the memory of {', '.join(map(str, placement.devices))} in {name_of(dtype)}",
            remedy="Choose --dtype bfloat16, --quantization 8bit or 4bit, or --device spread, stream or cpu.",
            model=checkpoint.name,
        ) from error
    _refuse_offloaded(model, checkpoint)
    if placement.quantization == "4bit":
        _keep_gradients(model)
    return model


@contextmanager
def _without_bars() -> Iterator[None]:
    """While open, transformers shows no bars of its own; those of the Hub's client follow it, and are as they were afterwards."""
    library: Any = logging
    shown = library.is_progress_bar_enabled()
    with warnings.catch_warnings():  # where the environment forces the bars of the Hub's client
        warnings.simplefilter("ignore", UserWarning)
        if shown:
            library.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            library.enable_progress_bar()


def is_quantised(model: Any) -> bool:
    """Whether transformers loaded the model with quantised weights."""
    return getattr(model, "hf_quantizer", None) is not None


def runs_beside(model: Any) -> bool:
    """Whether deltas run beside this model's weights for an edit: everywhere but in float32, which alone holds small changes.

    And beside weights that are not in memory, whatever their type.
    """
    return is_quantised(model) or streamed(model) is not None or model.dtype != torch.float32


def name_of(dtype: torch.dtype) -> str:
    """``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def memory_of(device: torch.device) -> int:
    """Bytes of memory of a device: all of a GPU's; the machine's for the CPU, or what the control group may use of it."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return total_memory()


def _existing_device(name: str) -> None:
    try:
        torch.empty(0, device=torch.device(name))
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise SettingsError(
            f"there is no device {name!r} ({str(error).partition(chr(10))[0]})",
            remedy='Choose "auto", "spread", "cpu" or "cuda:0".',
            device=name,
        ) from None


def _quantization(bits: str, dtype: torch.dtype) -> Any:
    for library in ("bitsandbytes", "accelerate"):
        _require(library, "to quantise a base")
    config: Any = BitsAndBytesConfig
    if bits == "8bit":
        return config(load_in_8bit=True)
    return config(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def _keep_gradients(model: Any) -> None:
    """Keep 4-bit weights in the layout whose product has a gradient.

    On processors with AVX-512 and bfloat16, bitsandbytes changes the layout at the first evaluation on the CPU, and its product with
    weights in the new one gives wrong gradients, silently (0.50.2: a custom operator without an autograd kernel).
    """
    from bitsandbytes import nn

    layers: Any = nn
    for module in model.modules():
        if isinstance(module, layers.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def _require(library: str, purpose: str) -> None:
    if find_spec(library) is None:
        raise SettingsError(f"{library} is needed {purpose}", remedy=f"pip install {library}", library=library)


def _refuse_offloaded(model: Any, checkpoint: Checkpoint) -> None:
    offloaded = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if offloaded:
        raise BaseError(
            f"{checkpoint.name} does not fit on the devices: {len(offloaded)} tensors were left out of memory",
            remedy="Choose --device stream, --dtype bfloat16, or --quantization 8bit or 4bit.",
            model=checkpoint.name,
        )


def quick_type(model: Any) -> torch.dtype:
    """The type in which a model computes what need not be exact: bfloat16 where the processor has products of it and the model is wider."""
    dtype: torch.dtype = model.dtype
    processor: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # PyTorch before 2.8 does not tell
    capable = model.device.type == "cpu" and any(processor.get(name) for name in ("avx512_bf16", "amx_bf16"))
    wider = dtype in (torch.float32, torch.float16) and all(p.dtype == dtype for p in model.parameters())
    return torch.bfloat16 if capable and wider and streamed(model) is None else dtype


def optimised_in(model: Any, memory: int | None) -> torch.dtype:
    """The type in which values are optimised: `quick_type` for a large model, where there is room for its weights in both types.

    Large is one whose weights are read from memory at every step, since no processor's caches hold them.

    Args:
        memory: what the process may hold, if that is bounded: then the weights are there once.
    """
    own: torch.dtype = model.dtype
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    large = memory is None and _LARGE <= size < _SHARE_CPU * free_memory()
    return quick_type(model) if large else own


@contextmanager
def quick(model: Any, *, near: bool = False) -> Iterator[None]:
    """While open, the model runs in `quick_type`, if it says nearly the same there; its own weights are kept and put back.

    Args:
        near: it was seen before that it does.
    """
    dtype, own = quick_type(model), [(parameter, parameter.data) for parameter in model.parameters()]
    if dtype == model.dtype:
        yield
        return
    said = None if near else _said(model)
    try:
        for parameter, data in own:
            parameter.data = data.to(dtype)
        if said is not None and not _is_near(model, said):
            _put_back(own)
        yield
    finally:
        _put_back(own)


def _put_back(own: Sequence[tuple[torch.nn.Parameter, Tensor]]) -> None:
    for parameter, data in own:
        parameter.data = data


@torch.no_grad()
def _said(model: Any) -> Float[Tensor, "tokens vocabulary"]:
    """The model's predictions after some tokens of the vocabulary that are far apart."""
    size = model.get_output_embeddings().weight.shape[0]
    ids = torch.linspace(0, size - 1, 32).long().view(4, 8).to(model.device)
    with fast(model):
        found: Tensor = model(input_ids=ids, use_cache=False).logits
    return found.float().softmax(-1).flatten(0, 1)


def _is_near(model: Any, said: Float[Tensor, "tokens vocabulary"]) -> bool:
    try:
        return float((_said(model) - said).abs().sum(-1).mean()) / 2 < _FAR
    except RuntimeError:  # buffers of the type that it was in meet weights of the other
        return False
