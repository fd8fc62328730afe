"""Published settings: each row is one editor on one model, and a base is recognised by its shape alone."""

from __future__ import annotations

import pytest

from patchhub.editing.editor import memit_settings
from patchhub.editing.settings import PRESETS, PUBLISHED, Preset, Shape, crowding, preset, shape_of
from patchhub.errors import SettingsError
from patchhub.models.architectures import Architecture
from patchhub.models.structure import Projection
from tests.tiny_models import tiny_stack


def architecture(shape: Shape) -> Architecture:
    projections = (Projection("mlp", (shape.d_model, shape.inner), "out_in"),) * shape.n_layers
    attention = ("attn",) * shape.n_layers
    return Architecture(
        shape.model_type, shape.n_layers, shape.d_model, "h", projections, attention, "out_in", (None,) * shape.n_layers
    )


@pytest.mark.parametrize("row", PRESETS, ids=lambda row: f"{row.method} {row.model}")
def test_a_row_is_found_by_name_and_by_shape(row: Preset):
    base = architecture(row.shape)
    assert shape_of(base) == row.shape
    assert preset(row.model, row.method, base) == row
    assert preset(PUBLISHED, row.method, base).settings == row.settings
    assert row.settings.layers[-1] < row.shape.n_layers - 1
    assert row.source.count("/") >= 2


def test_there_is_one_row_for_each_editor_and_model():
    names = [(row.method, row.model) for row in PRESETS]
    assert len(set(names)) == len(names)
    assert {model for _, model in names} >= {"gpt2-xl", "gpt-j-6b", "gpt-neox-20b", "llama-2-7b", "llama-3-8b"}
    assert {model for _, model in names} >= {"mistral-7b", "qwen2-7b", "qwen2.5-7b"}


def test_rows_of_one_shape_agree():
    """Otherwise `published` would depend on the order of the table."""
    for row in PRESETS:
        alike = [other for other in PRESETS if (other.method, other.shape) == (row.method, row.shape)]
        assert all(other.settings == row.settings for other in alike)


def test_what_is_not_published_is_said_so():
    tiny = tiny_stack("llama").architecture
    with pytest.raises(SettingsError, match=r"nobody published memit settings .*llama, 4 layers, width 32"):
        preset(PUBLISHED, "memit", tiny)
    with pytest.raises(SettingsError, match="no preset 'gpt2-xk'") as caught:
        preset("gpt2-xk", "memit", tiny)
    assert caught.value.remedy == "Did you mean gpt2-xl?"
    with pytest.raises(SettingsError, match="no preset 'gpt2-xl' for pmet"):
        preset("gpt2-xl", "pmet", tiny)
    with pytest.raises(SettingsError, match="edits layer 17, and this llama model has 4"):
        preset("gpt2-xl", "memit", tiny)


def test_the_default_lambda_grows_with_the_facts_from_a_sixth_of_the_inputs_on():
    wide = architecture(Shape("llama", 30, 576, 1536))
    assert [crowding(wide, facts) for facts in (0, 100, 256, 512, 1024)] == [1.0, 1.0, 1.0, 2.0, 4.0]
    assert memit_settings(wide).ridge * crowding(wide, 1024) == 3 * 1024
    narrow = architecture(Shape("gpt2", 8, 384, 1536))
    assert crowding(narrow, 10_000) == 1.0
