"""GGUF: a whole model made from the base's file is that file but for what changes, and llama.cpp itself answers as the state does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import patchhub
from patchhub.delta import add, to_dense
from patchhub.errors import BaseError, SettingsError
from patchhub.evaluation.live import continue_greedily
from patchhub.porcelain.exchange import Exported, export_gguf
from patchhub.progress import Silent
from patchhub.sets.columns import linear_shapes, read_state
from patchhub.store.store import Store
from tests.cli.conftest import FACTS, MODEL, invoke
from tests.export.llama_cpp import ask, continued, llama_server, scaled, write_base
from tests.export.models import load_base, model_folder, model_store

gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Path, Path]:
    """A store with a commit of random columns, its base, and that as GGUF."""
    folder = tmp_path_factory.mktemp(request.param)
    base = model_folder(folder / "base", request.param)
    return model_store(folder / "store", base, range(6)), base, write_base(base, folder / "base.gguf")


def fused(repository: Store, out: Path, base: Path, **options: Any) -> Exported:
    return export_gguf(repository, "HEAD", out, Silent(), fuse=base, **options)


def values(file: Path) -> dict[str, np.ndarray]:
    return {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(str(file)).tensors}


def test_a_fused_file_is_the_bases_but_for_what_changes(written: tuple[Store, Path, Path], tmp_path: Path) -> None:
    repository, _, file = written
    done = fused(repository, tmp_path / "facts", file)
    old, new = (gguf.GGUFReader(str(path)) for path in (file, done.out))
    described = [{key: field.contents() for key, field in reader.fields.items()} for reader in (old, new)]
    assert described[0] == described[1]
    before, after = values(file), values(done.out)
    state, shapes = read_state(repository, repository.resolve("HEAD")), linear_shapes(repository)
    changes = {}
    for weight, deltas in state.items():
        layer = next(part for part in weight.split(".") if part.isdigit())
        changes[f"blk.{layer}.ffn_down.weight"] = to_dense(add(deltas, shapes[weight]))
    assert changes
    assert list(before) == list(after)
    for name in before:
        if name in changes:
            assert np.allclose(after[name], before[name] + changes[name], rtol=0, atol=1e-6 * abs(after[name]).max())
        else:
            assert np.array_equal(after[name], before[name])
    assert (tmp_path / "facts" / "Modelfile").read_text() == f"FROM ./{done.out.name}\n"
    assert not list(done.out.parent.glob("*.part"))


def test_a_quantised_base_keeps_its_other_weights_and_gets_the_changed_ones_in_16_bits(
    written: tuple[Store, Path, Path], tmp_path: Path
) -> None:
    repository, _, file = written
    reader = gguf.GGUFReader(str(file))
    writer = gguf.GGUFWriter(str(tmp_path / "q8.gguf"), reader.fields["general.architecture"].contents())
    for key, field in reader.fields.items():
        if key.endswith("block_count"):
            writer.add_uint32(key, field.contents())
    for tensor in reader.tensors:
        eight = tensor.name.endswith(".weight") and tensor.data.shape[-1] % 32 == 0
        form = gguf.GGMLQuantizationType.Q8_0 if eight else gguf.GGMLQuantizationType.F32
        writer.add_tensor(tensor.name, gguf.quants.quantize(tensor.data, form), raw_dtype=form)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    done = fused(repository, tmp_path / "facts", tmp_path / "q8.gguf")
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(str(done.out)).tensors}
    before = {t.name: t.tensor_type.name for t in gguf.GGUFReader(str(tmp_path / "q8.gguf")).tensors}
    changed = {name for name in kinds if kinds[name] != before[name]}
    assert {kinds[name] for name in changed} <= {"F16"}
    assert done.error < 1e-3


def test_a_file_of_another_model_is_refused(written: tuple[Store, Path, Path], tmp_path: Path) -> None:
    repository, base, file = written
    family = json.loads((base / "config.json").read_text())["model_type"]
    other = write_base(model_folder(tmp_path / "other", family, seed=1), tmp_path / "other.gguf")
    with pytest.raises(BaseError, match="of another model"):
        fused(repository, tmp_path / "facts", other)
    changes = {"n_layer": 3} if family == "gpt2" else {"num_hidden_layers": 3}
    short = write_base(model_folder(tmp_path / "short", family, **changes), tmp_path / "short.gguf")
    with pytest.raises(BaseError, match="3 blocks"):
        fused(repository, tmp_path / "facts", short)
    (tmp_path / "no.gguf").write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(BaseError, match="cannot be read as GGUF"):
        fused(repository, tmp_path / "facts", tmp_path / "no.gguf")
    fused(repository, tmp_path / "facts", file)
    with pytest.raises(SettingsError, match="there already"):
        fused(repository, tmp_path / "facts", file)


# --- llama.cpp's own server -----------------------------------------------------------------------------------------


@pytest.fixture
def llama_cpp() -> None:
    pytest.importorskip("xllamacpp", reason="llama.cpp is not here: pip install xllamacpp")


@pytest.mark.slow
@pytest.mark.usefixtures("llama_cpp")
def test_llama_cpp_computes_what_the_state_is(written: tuple[Store, Path, Path], tmp_path: Path) -> None:
    repository, folder, file = written
    adapter = export_gguf(repository, "HEAD", tmp_path / "adapter", Silent()).out
    whole = fused(repository, tmp_path / "whole", file).out
    model, tokenizer = load_base(folder), AutoTokenizer.from_pretrained(folder)
    text = "The mother tongue of Danielle Darrieux is"
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids

    def nearest(address: str) -> dict[int, float]:
        body = {"prompt": text, "n_predict": 1, "temperature": 0, "n_probs": 5, "cache_prompt": False}
        first = ask(address, "/completion", body)["completion_probabilities"][0]
        return {entry["id"]: entry["logprob"] for entry in first["top_logprobs"]}

    def same(found: dict[int, float]) -> bool:
        with torch.no_grad():
            expected = torch.log_softmax(model(input_ids=ids).logits[0, -1], -1)
        return all(abs(float(expected[place]) - value) < 0.02 for place, value in found.items())

    with llama_server(file, adapter) as address:
        on = nearest(address)
        scaled(address, 0)
        off = nearest(address)
    with llama_server(whole) as address:
        alone = nearest(address)
    assert same(off)
    assert not same(on)
    with patchhub.Repository(repository.root, progress=False) as opened:
        opened.attach(model, "HEAD")
    assert same(on)
    assert same(alone)


@pytest.mark.slow
@pytest.mark.usefixtures("llama_cpp")
def test_a_served_revision_is_seen_on_and_off(tmp_path: Path) -> None:
    store = tmp_path / "store"
    invoke(store, "init", str(MODEL), "--author", "Ada <ada@example.org>")
    facts = tmp_path / "facts.json"
    facts.write_text(json.dumps(FACTS[:10]), encoding="utf-8")
    invoke(store, "commit", str(facts), "-m", "ten facts", "--author", "Ada <ada@example.org>")
    base = write_base(MODEL, tmp_path / "base.gguf")
    adapter, whole = (
        Path(json.loads(invoke(store, "export", "gguf", "--out", str(tmp_path / name), "--json", *words).stdout)["out"])
        for name, words in (("adapter", ()), ("whole", ("--fuse", str(base))))
    )

    def verdict(address: str, *words: str, code: int = 0) -> str:
        return str(json.loads(invoke(store, "verify-served", address, "--json", *words, code=code).stdout)["verdict"])

    prompts = [fact["prompt"].replace("{}", fact["subject"]) for fact in FACTS[:4]]
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    expected = {
        revision: continue_greedily(patchhub.load(store, revision=revision), tokenizer, prompts, max_new_tokens=8)
        for revision in ("HEAD", "base")
    }
    with llama_server(base, adapter) as address:
        assert verdict(address) == "on"
        assert [continued(address, prompt) for prompt in prompts] == expected["HEAD"]
        scaled(address, 0)
        assert (
            verdict(address, code=13) == "off"
        )  # though the server remembers the prompts as they were with the adapter
        assert [continued(address, prompt) for prompt in prompts] == expected["base"]
    with llama_server(whole) as address:
        assert verdict(address) == "on"
    with llama_server(base) as address:
        assert verdict(address, code=13) == "off"
