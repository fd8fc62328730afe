"""The linear weights of a base's blocks, told from the names and shapes of its tensors alone, without building the model.

Facts are written into feed-forward output projections only. A change from elsewhere may be to any linear weight of the blocks: attention,
gate and up projections too; and where weights are stored (out, in), under the names of the parameters, to any other matrix or vector:
embeddings, heads, norms and biases. A vector of n values is a matrix of one column there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Final, Protocol

_FLOATS: Final = frozenset({"BF16", "F16", "F32", "F64"})
# A slice of a stacked parameter, which has a number of its own in checkpoints alone; and a router, which is no linear module.
_OF_EXPERTS: Final = re.compile(r"\.experts\.\d+\.|\.(?:gate|router|router\.layer)\.weight$")
_PARAMETER: Final = re.compile(r"\.(?:weight|bias)$")  # some tensors of checkpoints are buffers
_FIRST_NUMBER: Final = re.compile(r"(?P<block>(?P<blocks>.+?)\.\d+)\.")


class Tensor(Protocol):
    """What a header or a base object says of a tensor."""

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


def block_of(weight: str) -> str:
    """``model.layers.3`` of ``model.layers.3.mlp.down_proj.weight``; the name itself where no block is named."""
    found = _FIRST_NUMBER.match(weight)
    return found["block"] if found else weight


def linear_shapes(
    tensors: Mapping[str, Tensor], outputs: Mapping[str, tuple[int, int]], orientation: str
) -> dict[str, tuple[int, int]]:
    """(out, in) of every linear weight of the blocks, by parameter name; `outputs` alone where the blocks cannot be told.

    In the families that can be edited every float matrix of a block that is called ``weight`` is that of a linear module, but for
    experts and their routers, and all are stored alike: GPT-2's blocks hold Conv1D alone, the others Linear alone.

    Args:
        tensors: those of the checkpoint, by its names, which may lack a prefix of the parameters' or have one more.
        outputs: (out, in) of the feed-forward output projections, by parameter name.
        orientation: ``in_out`` if the weights are stored (in, out).
    """
    return _named_shapes(tensors, outputs, orientation)[0]


def tensor_shapes(
    tensors: Mapping[str, Tensor], outputs: Mapping[str, tuple[int, int]], orientation: str
) -> dict[str, tuple[int, int]]:
    """(out, in) of all that a change from elsewhere may change, by parameter name: `linear_shapes`, and other matrices and vectors."""
    shapes, alike = _named_shapes(tensors, outputs, orientation)
    if alike and orientation == "out_in":
        for name, tensor in tensors.items():
            fits = tensor.dtype in _FLOATS and 1 <= len(tensor.shape) <= 2 and _PARAMETER.search(name)
            if fits and not _OF_EXPERTS.search(name):
                rows, columns = (*tensor.shape, 1)[:2]
                shapes.setdefault(name, (rows, columns))
    return shapes


def _named_shapes(
    tensors: Mapping[str, Tensor], outputs: Mapping[str, tuple[int, int]], orientation: str
) -> tuple[dict[str, tuple[int, int]], bool]:
    """What `linear_shapes` returns, and whether the tensors have the names of the parameters."""
    known = next((name for name in outputs if name.endswith(".weight")), next(iter(outputs), ""))
    names: Iterable[str] = tensors
    if not known.endswith(".weight"):  # experts alone, whose tensors may have other names: blocks are compared instead
        known, names = block_of(known), {block_of(name) for name in tensors}
    stored = [name for name in names if known == name or known.endswith("." + name) or name.endswith("." + known)]
    blocks = _FIRST_NUMBER.match(known + ".")
    if not stored or blocks is None:
        return dict(outputs), False
    name = min(stored, key=lambda found: abs(len(found) - len(known)))
    lacking, extra = known.removesuffix(name), name.removesuffix(known) if name.endswith(known) else ""
    within = re.compile(rf"{re.escape(blocks['blocks'])}\.\d+\..+\.weight")
    shapes = dict(outputs)
    for name, tensor in tensors.items():
        parameter = lacking + name.removeprefix(extra)
        fits = len(tensor.shape) == 2 and tensor.dtype in _FLOATS and within.fullmatch(parameter)
        if fits and not _OF_EXPERTS.search(parameter):
            rows, columns = tensor.shape
            shapes.setdefault(parameter, (columns, rows) if orientation == "in_out" else (rows, columns))
    return shapes, not (lacking or extra) and known.endswith(".weight")
