"""The faster products are float32 products, and the switches of the process are put back."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.nn import functional

from patchhub.models.tracing import attend, fast_products

CPU = torch.device("cpu")
SHAPES = [(1, 8, 8), (5, 64, 256), (300, 384, 96), (17, 1024, 33)]


def switches() -> tuple[object, ...]:
    switch = getattr(torch.backends.mkldnn, "matmul", None)
    return getattr(switch, "fp32_precision", None), functional.scaled_dot_product_attention


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_products_keep_the_accuracy_of_float32(shape, transposed):
    rows, inner, columns = shape
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(rows, inner, generator=generator)
    b = (
        torch.randn(columns, inner, generator=generator).T
        if transposed
        else torch.randn(inner, columns, generator=generator)
    )
    exact = a.double() @ b.double()
    with fast_products(CPU):
        found = [a @ b, torch.addmm(torch.zeros(columns), a, b), (a[None] @ b[None])[0]]
    for product in found:
        assert float((product.double() - exact).norm() / exact.norm()) < 2e-6


def test_attention_and_gradients_keep_the_accuracy_of_float32():
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(3, 2, time, 16, generator=generator, dtype=torch.float64) for time in (5, 9, 9))
    mask = torch.rand(3, 1, 5, 9, generator=generator) > 0.2
    exact = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    q32 = q.float().requires_grad_()
    with fast_products(CPU):
        found = functional.scaled_dot_product_attention(q32, k.float(), v.float(), attn_mask=mask)
        (gradient,) = torch.autograd.grad(found.square().sum(), q32)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6)
    q64 = q.clone().requires_grad_()
    again = functional.scaled_dot_product_attention(q64, k, v, attn_mask=mask)
    (expected,) = torch.autograd.grad(again.square().sum(), q64)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (4, 1)])
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("mask", [None, "causal", "bool", "float", "each head"])
def test_plain_attention_is_pytorchs(heads, queries, mask):
    random = partial(torch.randn, generator=torch.Generator().manual_seed(3))
    query, key, value = random(3, heads[0], queries, 8), random(3, heads[1], 5, 8), random(3, heads[1], 5, 4)
    seen = random(3, 1, queries, 5) > -1
    seen[..., 0] = True
    masks = {"bool": seen, "float": random(3, 1, queries, 5), "each head": random(1, heads[0], queries, 5)}
    options = {"attn_mask": masks.get(mask), "is_causal": mask == "causal", "scale": 0.3, "enable_gqa": True}
    if mask == "causal":  # PyTorch's is of the first queries
        key, value = key[:, :, :queries], value[:, :, :queries]
    expected = functional.scaled_dot_product_attention(query, key, value, **options)
    torch.testing.assert_close(attend(query, key, value, **options), expected)


def test_a_query_that_may_look_nowhere_gives_numbers():
    q, nowhere = torch.randn(1, 2, 3, 4), torch.tensor([True, False, True])[:, None].expand(3, 3)
    for mask in (nowhere, torch.zeros(3, 3).masked_fill(~nowhere, -torch.inf)):
        assert bool(torch.isfinite(attend(q, q, q, mask)).all())


def test_the_switches_are_put_back_also_after_an_error():
    before = switches()
    with fast_products(CPU), fast_products(CPU):
        pass
    assert switches() == before
    with pytest.raises(KeyError), fast_products(CPU):
        raise KeyError
    assert switches() == before


def test_on_another_device_float32_stays_float32_and_nothing_else_changes():
    before, cuda = switches(), torch.backends.cuda.matmul
    allowed = cuda.allow_tf32
    with fast_products(torch.device("cuda")):
        assert switches() == before
        assert not cuda.allow_tf32
    assert (switches(), cuda.allow_tf32) == (before, allowed)
