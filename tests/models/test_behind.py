"""What stands behind the feed-forward projection: phi is the model's own, and what is written is the nearest that phi allows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from patchhub.errors import UnsupportedModelError
from patchhub.models.architectures import Behind, additive_probe, describe, read_behind
from patchhub.models.structure import StructureError
from tests.models.tiny_configs import random_model, tiny_config
from tests.tiny_models import tiny_model, tiny_stack

WIDTH = 6
NORMED = ("gemma2", "gemma3_text", "olmo2", "olmo3", "glm4", "exaone4")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def normed(seed: int = 1, *, scale: float = 0.7) -> Behind:
    return Behind(scale, 0.1 + 2.0 * drawn(WIDTH, seed=seed).abs(), 1e-12)


def alike() -> tuple[Tensor, Tensor]:
    """Outputs and targets with at most a right angle between them."""
    y, v = drawn(2, 40, WIDTH)
    return y, torch.where(((v * y).sum(-1) < 0)[:, None], -v, v)


@pytest.mark.parametrize("family", NORMED)
def test_phi_is_what_the_model_computes(family: str) -> None:
    stack = tiny_stack(family)
    norm = stack.blocks[1].get_submodule(str(stack.architecture.norms[1]))
    y = drawn(20, stack.architecture.d_model)
    y[3] *= 1e-4  # eps shows
    found: Any = norm(y.float())
    assert float((stack.behind(1)(y) - found.double()).abs().max()) < 1e-5


def test_a_scale_is_what_the_configuration_says() -> None:
    stack = tiny_stack("granite", residual_multiplier=0.22)
    behind = stack.behind(0)
    assert (behind.scale, behind.gain) == (0.22, None)
    y, share = drawn(2, 3, WIDTH)
    assert torch.allclose(behind(y + behind.residual(y, share, 1.0)) - behind(y), share)


def test_nothing_behind_changes_no_bit() -> None:
    y, share = drawn(2, 3, WIDTH)
    assert torch.equal(Behind()(y), y)
    assert torch.equal(Behind().residual(y, share, 1.0), share)
    assert torch.equal(Behind().toward(share, y, 1.0), share - y)


def test_the_smallest_change_is_the_nearest_point_of_the_cone() -> None:
    """Of all c v with c > 0, tried one by one, none is nearer to y, and phi gives at it what it gives at v."""
    behind, (y, v) = normed(), alike()
    change = behind.toward(v, y, 0.0)
    tried = torch.linspace(1e-3, 4.0, 4000, dtype=torch.float64)
    lengths = (tried[:, None, None] * v - y).norm(dim=-1)
    assert (change.norm(dim=-1) <= lengths.min(0).values + 1e-9).all()
    inside = behind(y + change), behind(v)
    assert float((inside[0] - inside[1]).abs().max()) < 1e-6


@pytest.mark.parametrize("length", [0.5, 1.0])
def test_what_is_written_is_as_long_as_asked_and_points_where_the_target_points(length: float) -> None:
    behind, (y, v) = normed(), drawn(2, 40, WIDTH)
    written = y + behind.toward(v, y, length)
    assert (written.norm(dim=-1) >= length * y.norm(dim=-1) - 1e-12).all()
    assert torch.allclose(nn.functional.cosine_similarity(written, v), torch.ones(40, dtype=torch.float64))


def test_a_longer_change_is_exactly_so_long_or_the_smallest_one() -> None:
    behind, (y, v) = normed(), alike()
    for least in (0.1, 5.0):
        change = behind.beyond(v, y, least, 0.0)
        assert (change.norm(dim=-1) >= least - 1e-9).all()
        straight = nn.functional.cosine_similarity(y + change, v)
        assert float((straight - 1).abs().max()) < 1e-9
        aside = (y - (y * v).sum(-1, keepdim=True) / v.square().sum(-1, keepdim=True) * v).norm(dim=-1)
        assert torch.allclose(change.norm(dim=-1), aside.clamp(min=least))


def test_the_share_is_set_in_what_phi_can_give() -> None:
    """No point of the ellipsoid, tried by chance and by descent, is nearer to what is wanted in the stream."""
    behind = normed()
    wanted = 3.0 * drawn(5, WIDTH, seed=2)
    best = behind.nearest(wanted)
    assert torch.allclose(best.square().mean(-1), torch.ones(5, dtype=torch.float64))
    distance = (behind(best) - wanted).norm(dim=-1)
    for row in range(5):
        tried = drawn(20_000, WIDTH, seed=row)
        assert float(distance[row]) <= float((behind(tried) - wanted[row]).norm(dim=-1).min())
    near = best.clone().requires_grad_()
    optimiser = torch.optim.Adam([near], lr=0.01)
    for _ in range(500):
        optimiser.zero_grad()
        (behind(near) - wanted).square().sum().backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    assert (distance <= (behind(near.detach()) - wanted).norm(dim=-1) + 1e-6).all()


def test_what_phi_gives_already_is_its_own_nearest_point() -> None:
    behind, y = normed(), drawn(7, WIDTH)
    assert torch.allclose(behind.nearest(behind(y)), y / y.square().mean(-1, keepdim=True).sqrt(), atol=1e-4)
    assert float(behind.residual(y, torch.zeros_like(y), 0.0).abs().max()) < 1e-4


def test_a_channel_without_gain_gets_nothing() -> None:
    gain = 0.5 + drawn(WIDTH, seed=3).abs()
    gain[2] = 0.0
    best = Behind(1.0, gain).nearest(3.0 * drawn(4, WIDTH, seed=4))
    assert torch.isfinite(best).all()
    assert float(best[:, 2].abs().max()) < 1e-6


def test_the_slope_is_the_derivative_at_a_fixed_length() -> None:
    behind, y = normed(), drawn(WIDTH)
    step = drawn(WIDTH, seed=5)
    step = 1e-6 * (step - (step @ y) / (y @ y) * y)  # along the sphere
    moved = behind(y + step) - behind(y)
    assert torch.allclose(moved, behind.slope(y) * step, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("family", ["gemma3_text", "granite"])
def test_the_probe_finds_another_map_than_the_described_one(family: str) -> None:
    model = tiny_model(family)
    architecture = describe(model.config)
    additive_probe(model, architecture, 1)
    model.model.layers[1].mlp.register_forward_hook(lambda module, args, output: output.relu())
    with pytest.raises(UnsupportedModelError, match="layer 1"):
        additive_probe(model, architecture, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_probe_accepts_norms_in_half_precision(dtype: torch.dtype) -> None:
    for family in ("gemma3_text", "olmo2"):
        model = random_model(tiny_config(family), dtype)
        additive_probe(model, describe(model.config), 1)


def test_a_norm_that_centres_is_refused() -> None:
    torch.manual_seed(0)
    with pytest.raises(StructureError, match="root-mean-square"):
        read_behind(nn.LayerNorm(32), 1.0, 32)
    assert read_behind(nn.RMSNorm(32), 1.0, 32).gain is not None
