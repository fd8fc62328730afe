"""The metric: the mean of k k^T over the text, whatever the batches, and C^-1 k from a factor on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from patchhub.cache import Cache
from patchhub.editing import metric as under_test
from patchhub.editing.metric import Covariance, MetricCache, layer_groups, second_moments
from patchhub.errors import EditError
from tests.reference import plain
from tests.tiny_models import FAMILIES, VOCABULARY, tiny_stack

LAYERS = (0, 2)
LENGTHS = (9, 2, 17, 1, 5, 17)


def documents(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def oracle(family: str, layer: int, texts: list[list[int]]) -> Tensor:
    """One document at a time through the whole model, in float64."""
    stack = tiny_stack(family, dtype=torch.float64)
    keys: list[Tensor] = []
    module = plain.projection(stack.model, stack.architecture, layer)
    module.register_forward_pre_hook(lambda _m, args: keys.append(args[0][0]))
    for text in texts:
        with torch.no_grad():
            plain.logits(stack.model, torch.tensor([text]), torch.ones(1, len(text), dtype=torch.long))
    together = torch.cat(keys)
    return together.T @ together / len(together)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("family", FAMILIES)
def test_second_moments_are_the_mean_over_all_tokens(family):
    stack = tiny_stack(family)
    counted: list[int] = []
    found = second_moments(stack, LAYERS, documents(), progress=counted.append)
    assert found.keys() == set(LAYERS)
    assert sum(counted) == sum(LENGTHS)
    for layer, moment in found.items():
        inner = stack.architecture.shapes[layer][1]
        assert moment.shape == (inner, inner)
        assert relative(moment, oracle(family, layer, documents())) < 1e-5


@pytest.mark.parametrize("tokens", [1, 20, 10**6])
def test_batches_padding_order_and_empty_documents_do_not_matter(monkeypatch, tokens):
    whole = second_moments(tiny_stack("llama"), [1], documents())[1]
    monkeypatch.setattr(under_test, "_TOKENS_PER_BATCH", tokens)
    mixed = [[], *documents()[::-1], []]
    assert relative(second_moments(tiny_stack("llama"), [1], mixed)[1], whole) < 1e-5


def test_the_pass_ends_at_the_last_layer():
    stack = tiny_stack("gpt2")
    ran: list[int] = []
    for number, projection in enumerate(stack.ffn_out):
        projection.register_forward_hook(lambda _m, _a, _o, number=number: ran.append(number))
    second_moments(stack, [0, 1], documents((4,)))
    assert set(ran) == {0, 1}


def test_no_text_is_an_error():
    with pytest.raises(EditError) as caught:
        second_moments(tiny_stack("gpt2"), [0], [[], []])
    assert caught.value.remedy


@given(st.lists(st.integers(0, 99), max_size=40), st.integers(1, 64), st.integers(0, 10**6))
def test_groups_keep_the_order_and_fit_the_memory(layers, width, memory):
    groups = layer_groups(layers, width, memory)
    assert [layer for group in groups for layer in group] == layers
    for group in groups:
        assert len(group) == 1 or (8 * len(group) + 16) * width**2 <= memory
    wider = layer_groups(layers, width, memory + 8 * width**2)
    assert len(wider) <= len(groups)


def test_all_layers_of_an_8b_model_take_seven_passes_in_12_gigabytes():
    assert [len(group) for group in layer_groups(range(32), 14336, 12 << 30)] == [5, 5, 5, 5, 5, 5, 2]


# --- the factor on disk


def draw_metric(size: int, decades: float, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    return (basis * torch.logspace(0, -decades, size, dtype=torch.float64)) @ basis.T


@pytest.mark.parametrize(("decades", "tolerance"), [(0.0, 1e-6), (2.0, 1e-5), (4.0, 1e-3)])
def test_preimages_solve_the_metric(tmp_path: Path, decades, tolerance):
    """Up to the factor's rounding to float32, which a condition number of 10^decades enlarges."""
    C = draw_metric(40, decades)
    cache = MetricCache(Cache(tmp_path / "new" / "folder"), "0" * 64)
    assert not cache.has("h.1.w")
    cache.store("h.1.w", C.float())
    assert cache.has("h.1.w")
    keys = (torch.randn(7, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64) @ C).float()
    found = cache.preimages("h.1.w", keys)
    assert found.dtype == torch.float64
    assert relative(found, torch.linalg.solve(C.float().double(), keys.double().T).T) < tolerance
    assert relative(found @ C, keys) < tolerance


def test_the_factor_is_a_float32_file_that_comes_back_as_it_is(tmp_path: Path):
    C = draw_metric(30, 2.0)
    cache = MetricCache(Cache(tmp_path), "0" * 64)
    cache.store("model.layers.3.mlp.down_proj.weight", C)
    (file,) = (path for path in tmp_path.rglob("*") if path.is_file())
    factor = np.load(file)
    assert factor.dtype == np.float32
    assert np.array_equal(factor, np.tril(factor))
    assert relative(torch.from_numpy(factor @ factor.T), C) < 1e-6
    before, stamp = file.read_bytes(), file.stat().st_mtime_ns
    keys = torch.ones(2, 30)
    first = MetricCache(Cache(tmp_path), "0" * 64).preimages("model.layers.3.mlp.down_proj.weight", keys)
    assert torch.equal(cache.preimages("model.layers.3.mlp.down_proj.weight", keys), first)
    assert (file.read_bytes(), file.stat().st_mtime_ns) == (before, stamp)


def test_the_factor_is_memory_mapped(tmp_path: Path, monkeypatch):
    cache = MetricCache(Cache(tmp_path), "0" * 64)
    cache.store("w", draw_metric(8, 1.0))
    modes, load = [], np.load

    def watched(*args, **kwargs):
        modes.append(kwargs.get("mmap_mode"))
        return load(*args, **kwargs)

    monkeypatch.setattr(np, "load", watched)
    cache.preimages("w", torch.ones(1, 8))
    assert modes
    assert modes[0] is not None


def test_several_weights_lie_beside_one_another(tmp_path: Path):
    cache = MetricCache(Cache(tmp_path), "0" * 64)
    metrics = {f"h.{number}.w": draw_metric(6, 1.0, number) for number in range(3)}
    for name, C in metrics.items():
        cache.store(name, C)
    for name, C in metrics.items():
        assert relative(cache.preimages(name, torch.eye(6)), torch.linalg.inv(C)) < 1e-4


@pytest.mark.parametrize(
    "matrix",
    [torch.zeros(5, 5), -torch.eye(5), torch.ones(5, 5) - 0.5 * torch.eye(5), torch.full((5, 5), float("nan"))],
    ids=["zero", "negative", "indefinite", "not a number"],
)
def test_a_metric_that_is_not_positive_definite_is_refused(tmp_path: Path, matrix):
    cache = MetricCache(Cache(tmp_path), "0" * 64)
    with pytest.raises(EditError) as caught:
        cache.store("w", matrix)
    assert caught.value.facts == {"weight": "w"}
    assert caught.value.remedy
    assert not cache.has("w")


def test_text_shorter_than_the_width_needs_the_regularisation(tmp_path: Path):
    stack = tiny_stack("gpt2")
    moment = second_moments(stack, [0], documents((9,)))[0]
    cache = MetricCache(Cache(tmp_path), "0" * 64)
    with pytest.raises(EditError):
        cache.store("w", moment)
    cache = MetricCache(Cache(tmp_path), "0" * 64, Covariance(0.01))
    cache.store("w", moment)
    assert cache.has("w")
