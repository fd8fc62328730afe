"""Every family of the table is described as it is, and additive in fact; all other kinds are refused, with reason."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama import modeling_llama

from patchhub.errors import BaseError, SettingsError, UnsupportedModelError
from patchhub.models.architectures import FAMILIES, additive_probe, describe, read_config
from tests.families.lesson import SIZES
from tests.models.tiny_configs import REFUSED, SUPPORTED, make_config, random_model, tiny_config


def loaded(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    return random_model(tiny_config(family, **changes), dtype)


def test_every_family_of_the_table_is_tested() -> None:
    assert set(SUPPORTED) == set(FAMILIES)


def rows_of_the_page() -> dict[str, list[str]]:
    """The cells of the table of families in docs/models.md, family by family; "as" another one's repeats its projections."""
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    lines = page.partition("| families |")[2].partition("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    found = [(family, row) for family_cell, *row in cells for family in family_cell.split(", ")]
    assert len({family for family, _ in found}) == len(found)
    rows = dict(found)
    for row in rows.values():
        if named := re.match(r"as (\w+)", row[1]):
            row[1] = rows[named[1]][1]
    return rows


def test_the_page_says_of_each_family_what_its_row_says_and_what_was_taught() -> None:
    rows = rows_of_the_page()
    assert rows.keys() == FAMILIES.keys()
    for name, (blocks, feed_forward, behind, attention, stored, checked) in rows.items():
        family = FAMILIES[name]
        assert blocks == f"`{family.blocks}`", name
        paths = set(re.findall(r"`([\w.]+)`", feed_forward + attention))
        assert {family.ffn_out, family.attn_out} <= paths, name
        assert {*family.also, family.ffn_out, family.attn_out} >= paths - {"mamba.out_proj"}, (
            name
        )  # Falcon-H1's stands beside
        norms = set(re.findall(r"`([\w.]+)`", behind))
        assert norms == {norm for norm in family.norms if norm is not None}, name
        assert ("nothing in" in behind) == (norms != set() and None in family.norms), name
        assert stored.startswith("E times") == (".experts" in feed_forward), name
        assert ("(in, out), Conv1D" in stored) == (family.orientation == "in_out"), name
        assert ("trained model" in checked or checked == "real weights") == (name in {*SIZES, "llama"}), name


@pytest.mark.parametrize("family", SUPPORTED)
def test_described_names_shapes_and_orientation_are_the_models_and_the_probe_agrees(family: str) -> None:
    model = loaded(family)
    architecture = describe(model.config)
    assert (architecture.model_type, architecture.n_layers, architecture.d_model) == (family, 3, 32)
    for layer in range(3):
        name = architecture.ffn_weight(layer)
        stored = tuple(model.get_parameter(name).shape)
        projection = architecture.feed_forward[layer]
        out, inner = projection.shape
        one = (out, inner // max(1, projection.experts))
        one = one if projection.orientation == "out_in" else one[::-1]
        if projection.flat:
            assert stored == (inner, out)
        else:
            assert stored == ((projection.experts, *one) if projection.experts else one)
        assert out == 32
        assert inner > 32
        assert architecture.layer_of(name) == layer
        attention = model.get_submodule(architecture.attn_module(layer))
        assert 32 in attention.weight.shape
        additive_probe(model, architecture, layer)
    assert (architecture.orientation == "in_out") == (family == "gpt2")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_probe_accepts_half_precision(dtype: torch.dtype) -> None:
    model = loaded("llama", dtype)
    additive_probe(model, describe(model.config), 1)


class ScaledLlamaMLP(modeling_llama.LlamaMLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = super().forward(x)  # type: ignore[no-untyped-call]
        return 0.9 * result


def test_the_probe_finds_what_the_description_did_not_see() -> None:
    model = loaded("llama")
    architecture = describe(model.config)
    model.model.layers[1].mlp.__class__ = ScaledLlamaMLP
    additive_probe(model, architecture, 0)
    with pytest.raises(UnsupportedModelError, match="layer 1"):
        additive_probe(model, architecture, 1)


def test_the_probe_leaves_the_model_as_it_was() -> None:
    model = loaded("gptj").train()
    additive_probe(model, describe(model.config), 0)
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(("family", "settings", "reason"), REFUSED, ids=[f"{r[0]}-{r[2][:12]}" for r in REFUSED])
def test_other_kinds_are_refused_with_their_reason(family: str, settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason) as caught:
        describe(make_config(family, settings))
    assert caught.value.remedy
    assert caught.value.facts["model_type"] == family
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("family", ["helium", "jais2", "xglm"])
def test_an_unknown_family_is_found_by_its_structure(family: str) -> None:
    assert family not in FAMILIES
    settings = {"d_model": 32, "ffn_dim": 80, "attention_heads": 4, "num_layers": 3, "vocab_size": 96}
    config = make_config(family, settings if family == "xglm" else SUPPORTED["llama"])
    architecture = describe(config)
    model = random_model(config)
    assert isinstance(model.get_submodule(architecture.ffn_module(2)), nn.Linear)
    assert architecture.shapes == ((32, 80),) * 3
    for layer in range(3):
        additive_probe(model, architecture, layer)


def test_a_known_family_of_another_structure_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    original: Any = modeling_llama.LlamaMLP.__init__

    def renamed(self: Any, config: LlamaConfig) -> None:
        original(self, config)
        self.last = self.down_proj
        del self.down_proj

    monkeypatch.setattr(modeling_llama.LlamaMLP, "__init__", renamed)
    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", lambda self, x: self.last(self.up_proj(x)))
    with pytest.raises(UnsupportedModelError, match="another structure"):
        describe(tiny_config("llama"))


def test_describing_changes_neither_the_configuration_nor_takes_memory() -> None:
    config = tiny_config(
        "llama", hidden_size=16384, intermediate_size=53248, num_hidden_layers=8, num_attention_heads=128
    )
    before = config.to_dict()
    assert describe(config).shapes == ((16384, 53248),) * 8  # 42 GiB if it were real
    assert config.to_dict() == before


def test_a_layer_or_weight_that_is_not_there_is_refused() -> None:
    architecture = describe(tiny_config("gpt2"))
    for layer in (-1, 3):
        with pytest.raises(SettingsError, match=f"layer {layer} does not exist"):
            architecture.ffn_weight(layer)
    for name in ("transformer.h.3.mlp.c_proj.weight", "transformer.h.1.mlp.c_fc.weight", "h.1.mlp.c_proj.weight"):
        with pytest.raises(BaseError, match="not a feed-forward output projection"):
            architecture.layer_of(name)


def test_a_configuration_that_transformers_cannot_read_is_refused(tmp_path: Any) -> None:
    for text in ('{"model_type": "no_such_model"}', "{", "[]", '{"model_type": "gpt2", "n_layer": "many"}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UnsupportedModelError, match="cannot be read"):
            read_config(tmp_path)
