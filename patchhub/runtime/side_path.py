"""Deltas that run beside the weights of a live model: for quantised bases, and where a cast would round the change away.

The weights stay as they are, so taking the deltas off gives back the model bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import nn
from torch.utils.hooks import RemovableHandle

from patchhub.delta import Delta
from patchhub.models.fingerprint import not_the_base
from patchhub.models.side_path import SidePath


def run_beside(model: nn.Module, weights: Mapping[str, Sequence[Delta]]) -> tuple[RemovableHandle, ...]:
    """Let every named weight's module add its deltas from now on; the handles take them off again.

    Raises:
        BaseError: the model has no such module; nothing was attached then.
    """
    modules = {name: _module(model, name) for name in weights}
    return tuple(modules[name].register_forward_hook(SidePath(deltas)) for name, deltas in weights.items() if deltas)


def take_off(handles: Iterable[RemovableHandle]) -> None:
    """Undo `run_beside`."""
    for handle in handles:
        handle.remove()


def _module(model: nn.Module, weight: str) -> nn.Module:
    try:
        return model.get_submodule(weight.removesuffix(".weight"))
    except AttributeError as error:
        raise not_the_base("the model in memory", missing=[weight]) from error
