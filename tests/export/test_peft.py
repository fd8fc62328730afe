"""The exported adapter against the unmodified PEFT library and against the scale rules of other readers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import patchhub
from patchhub.delta import Dense, LowRank, add, to_dense
from patchhub.errors import RepositoryError, SettingsError
from patchhub.export.adapters import (
    CONFIG,
    RANKS,
    BaseName,
    adapter_files,
    check_adapter,
    deltas_as_llama_cpp_reads,
    deltas_as_vllm_reads,
    make_adapter,
)
from patchhub.porcelain.exchange import export_peft
from patchhub.progress import Silent
from tests.export.models import distance, load_base, logits, model_folder, model_store

BASE = BaseName("user/base", "a" * 40, fan_in_fan_out=False)


def low_rank(out: int, inner: int, rank: int, seed: int) -> LowRank:
    generator = np.random.default_rng(seed)
    return LowRank(
        generator.standard_normal((out, rank)).astype(np.float32),
        generator.standard_normal((rank, inner)).astype(np.float32),
    )


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT asks transformers the old way
@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
def test_peft_gives_the_logits_of_patchhub(family: str, tmp_path: Path) -> None:
    from peft import PeftModel

    folder = model_folder(tmp_path / "base", family)
    with model_store(tmp_path / "store", folder, range(3), range(3, 7)) as store:
        done = export_peft(store, "HEAD", tmp_path / "out", Silent())
    assert done.error < 1e-6
    assert str(done.commit)[:12] in done.out.name
    adapted = PeftModel.from_pretrained(load_base(folder), str(done.out)).eval()
    expected = logits(patchhub.load(tmp_path / "store"))
    assert distance(logits(adapted), expected) < 1e-5
    assert distance(logits(load_base(folder)), expected) > 1e-2


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=3), st.lists(st.integers(1, 12), max_size=3), st.integers(0, 99)
)
def test_every_reader_gets_the_same_delta(first: list[int], second: list[int], seed: int) -> None:
    """Whatever ranks the deltas of the two weights have, both scale rules read the state's delta."""
    shapes = {"a.weight": (40, 50), "b.weight": (30, 60)}
    state = {
        weight: [low_rank(*shapes[weight], rank, seed + place) for place, rank in enumerate(ranks)]
        for weight, ranks in zip(shapes, (first, second), strict=True)
    }
    adapter = make_adapter(state, shapes, tolerance=1e-6)
    assert adapter.rank in RANKS
    files = adapter_files(adapter, BASE)
    assert check_adapter(files, state, shapes) < 1e-6
    for read in (deltas_as_vllm_reads(files), deltas_as_llama_cpp_reads(files)):
        for weight, deltas in read.items():
            expected = to_dense(add(state[weight], shapes[weight]))
            assert np.linalg.norm(to_dense(deltas) - expected) < 1e-6 * np.linalg.norm(expected)


def test_the_second_checker_finds_a_scale_that_is_not_portable() -> None:
    """Unequal ranks are what llama.cpp's rule reads otherwise than vLLM's: the checker must see that."""
    shapes = {"a.weight": (40, 50)}
    state = {"a.weight": [low_rank(40, 50, 3, 0)]}
    files = adapter_files(make_adapter(state, shapes, tolerance=1e-6), BASE)
    config = json.loads(files[CONFIG])
    wrong = {**files, CONFIG: json.dumps({**config, "lora_alpha": 2 * config["r"]}).encode()}
    assert check_adapter(wrong, state, shapes) > 0.5


def test_the_configuration_is_the_portable_form() -> None:
    state = {"m.1.w.weight": [low_rank(40, 50, 9, 0)], "m.2.w.weight": [low_rank(40, 50, 2, 1)]}
    files = adapter_files(make_adapter(state, dict.fromkeys(state, (40, 50)), tolerance=1e-6), BASE)
    config = json.loads(files[CONFIG])
    assert config["r"] == config["lora_alpha"] == 16
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["use_rslora"] is False
    assert config["target_modules"] == ["m.1.w", "m.2.w"]
    assert files == adapter_files(make_adapter(state, dict.fromkeys(state, (40, 50)), tolerance=1e-6), BASE)


def test_cancelling_deltas_need_no_rank() -> None:
    one = low_rank(40, 50, 20, 0)
    state = {"w.weight": [one, LowRank(-one.B, one.A), low_rank(40, 50, 5, 1)]}
    assert make_adapter(state, {"w.weight": (40, 50)}, tolerance=1e-6).rank == 8


def test_recompression_states_its_error() -> None:
    generator = np.random.default_rng(0)
    u, _ = np.linalg.qr(generator.standard_normal((60, 60)))
    v, _ = np.linalg.qr(generator.standard_normal((60, 60)))
    matrix = (u * 10.0 ** -np.arange(60.0)) @ v
    state = {"w.weight": [Dense(matrix.astype(np.float32))]}
    shapes = {"w.weight": (60, 60)}
    adapter = make_adapter(state, shapes, tolerance=1e-3, rank=4)
    assert adapter.error == pytest.approx(1e-4, rel=0.05)
    with pytest.raises(RepositoryError, match="rank 2 would change") as refused:
        make_adapter(state, shapes, tolerance=1e-3, rank=2)
    assert refused.value.facts["error"] == pytest.approx(1e-2, rel=0.05)


def test_what_cannot_be_an_adapter_is_refused(tmp_path: Path) -> None:
    full = Dense(np.random.default_rng(0).standard_normal((600, 600)).astype(np.float32))
    with pytest.raises(RepositoryError, match="rank 512"):
        make_adapter({"w.weight": [full]}, {"w.weight": (600, 600)}, tolerance=1e-6)
    with pytest.raises(RepositoryError, match="changes no weight"):
        make_adapter({}, {}, tolerance=1e-6)
    folder = model_folder(tmp_path / "base", "llama")
    with model_store(tmp_path / "store", folder, range(3)) as store:
        with pytest.raises(RepositoryError, match="changes no weight"):
            export_peft(store, "base", tmp_path / "out", Silent())
        export_peft(store, "HEAD", tmp_path / "out", Silent())
        with pytest.raises(SettingsError, match="there already"):
            export_peft(store, "HEAD", tmp_path / "out", Silent())
