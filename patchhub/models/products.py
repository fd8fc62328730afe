"""Float32 matrix products on the CPU through the faster of the two libraries that PyTorch has for them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

_SHAPES = ((64, 64, 64), (96, 384, 512), (33, 640, 129))  # rows, inner, columns of the products that are tried
_KEPT_KERNELS = "128"
_TOLERANCE = 2e-6  # relative; float32 products of these sizes are off by 2e-7 to 5e-7, bfloat16 ones by 2e-3


@contextmanager
def fast_products(device: torch.device) -> Iterator[None]:
    """While open, float32 products on the CPU go through oneDNN where that keeps float32's accuracy.

    PyTorch leaves them to MKL unless it is told that bfloat16 would do; on processors that have wide vectors and no matrix unit
    oneDNN then computes in float32 all the same, and on some of them twice as fast. Where it would really round to bfloat16 the
    switch stays as it was. Attention then is two plain products as well: the fused kernel's own small products are slow that way.
    Both are switches of the process, put back at the end.
    """
    if device.type != "cpu" or not _exact_through_onednn():
        yield
        return
    with _onednn(), sdpa_kernel(SDPBackend.MATH):
        yield


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
    # oneDNN keeps a kernel for each shape of a product, by default 1,024 of them and half a megabyte each. Shapes change at every step
    # here, so most are used by one step only. It reads this when it is first used.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", _KEPT_KERNELS)
    generator = torch.Generator().manual_seed(0)
    with _onednn():
        return all(_error(*shape, generator) < _TOLERANCE for shape in _SHAPES)


def _error(rows: int, inner: int, columns: int, generator: torch.Generator) -> float:
    a, b = torch.randn(rows, inner, generator=generator), torch.randn(inner, columns, generator=generator)
    exact = a.double() @ b.double()
    return float(((a @ b).double() - exact).norm() / exact.norm())
