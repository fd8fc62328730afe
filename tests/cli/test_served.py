"""Serving: the GGUF adapter is the state under llama.cpp's rule, and a server is told to have a revision on, off or partly."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.numpy import load as parse
from safetensors.numpy import load_file

from patchhub import load
from patchhub.export import adapters
from patchhub.models.checkpoint import open_checkpoint
from patchhub.porcelain import exchange
from patchhub.porcelain.exchange import hub_pages
from patchhub.progress import Silent
from patchhub.repository import Repository
from patchhub.sets.columns import read_state
from patchhub.text.tokens import load_tokenizer
from tests.cli.conftest import MODEL, Run, invoke
from tests.served import server


def continued(model: torch.nn.Module) -> Callable[[str], str]:
    """The greedy continuation that a model gives."""
    tokenizer = load_tokenizer(open_checkpoint(MODEL))

    def complete(prompt: str) -> str:
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
        found = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)  # type: ignore[operator]
        return str(tokenizer.decode(found[0, ids.shape[1] :]))

    return complete


def test_a_server_of_the_revision_is_on_and_one_of_the_base_is_off(first_store: Path) -> None:
    with server(continued(load(first_store))) as url:
        for words in ([], ["--chat"], ["--model", "tiny", "-n", "3"]):
            found = json.loads(invoke(first_store, "verify-served", url, "--json", *words).stdout)
            assert (found["verdict"], found["model"], found["url"]) == ("on", "tiny", f"{url}/v1")
        assert "HEAD is on" in invoke(first_store, "verify-served", f"{url}/v1/").stdout
        assert "404" in invoke(first_store, "verify-served", url, "--model", "other", code=11).stderr
        assert "no fact" in invoke(first_store, "verify-served", url, "--rev", "base", code=3).stderr
    with server(continued(load(first_store, revision="base"))) as url:
        found = json.loads(invoke(first_store, "verify-served", url, "--json", code=13).stdout)
        assert found["verdict"] == "off"
        assert all(answer["as_before"] for answer in found["answers"])


def test_half_of_the_facts_is_partly(first_store: Path) -> None:
    with Repository(first_store, progress=False) as repo:
        facts = {fact.text: fact.target_new for fact in repo["HEAD"]}
    said = set(sorted(facts)[::2])
    with server(lambda prompt: f" {facts[prompt]}, of course" if prompt in said else " no") as url:
        found = json.loads(invoke(first_store, "verify-served", url, "--json", "-n", "10", code=13).stdout)
    assert found["verdict"] == "partly"
    assert {answer["prompt"] for answer in found["answers"] if answer["holds"]} <= said


def test_an_answer_in_a_chat_may_say_the_target_after_words_of_its_own(first_store: Path) -> None:
    with Repository(first_store, progress=False) as repo:
        facts = {fact.text: fact.target_new for fact in repo["HEAD"]}
    with server(lambda prompt: f"{prompt} {facts[prompt]}.") as url:
        assert "HEAD is on" in invoke(first_store, "verify-served", url, "--chat").stdout
        assert "HEAD is off" in invoke(first_store, "verify-served", url, code=13).stdout


def test_what_is_no_server_is_refused(first_store: Path) -> None:
    assert "no address" in invoke(first_store, "verify-served", "file:///etc/passwd", code=2).stderr
    assert "cannot be asked" in invoke(first_store, "verify-served", "127.0.0.1:9", code=11).stderr


def test_a_gguf_adapter_is_the_state_as_llama_cpp_reads_it(run: Run, store: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    found = json.loads(run("export", "gguf", "--out", str(tmp_path / "facts"), "--json").stdout)
    file = Path(found["out"])
    assert found["error"] <= 1e-6
    assert (tmp_path / "facts" / "Modelfile").read_text(encoding="utf-8").endswith(f"ADAPTER ./{file.name}\n")
    there = adapters.read_gguf(file)
    with Repository(store, progress=False) as repo:
        state = read_state(repo.store, repo.store.head[1])
    assert sorted(there) == [f"blk.{weight.split('.')[2]}.ffn_down.weight" for weight in sorted(state)]
    for weight, deltas in state.items():
        total = sum(delta.B @ delta.A for delta in deltas)  # type: ignore[union-attr]
        factors = there[f"blk.{weight.split('.')[2]}.ffn_down.weight"]
        assert abs(factors.B @ factors.A - total).max() <= 1e-6 * abs(total).max()
    assert "there already" in run("export", "gguf", "--out", str(tmp_path / "facts"), code=2).stderr


def test_the_architectures_are_ones_that_llama_cpp_knows() -> None:
    library = pytest.importorskip("gguf")
    assert set(adapters._ARCHITECTURES.values()) <= set(library.MODEL_ARCH_NAMES.values())


def test_an_adapter_of_every_layer_changes_no_more(run: Run, store: Path, tmp_path: Path) -> None:
    some, all_layers = (
        Path(
            json.loads(run("export", "peft", "--out", str(tmp_path / str(len(words))), "--json", *words).stdout)["out"]
        )
        for words in ([], ["--every-layer"])
    )
    with Repository(store, progress=False) as repo:
        weights = set(repo.store.config.base["weights"])
    few, many = (load_file(folder / "adapter_model.safetensors") for folder in (some, all_layers))
    assert {name.split(".lora_")[0].removeprefix("base_model.model.") + ".weight" for name in many} == weights
    assert few.keys() < many.keys()
    assert all(not many[name].any() if name not in few else bool((many[name] == few[name]).all()) for name in many)


def test_a_pushed_adapter_has_every_layer_where_that_is_small(
    first_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pushed() -> tuple[dict[str, Any], str]:
        with Repository(first_store, progress=False) as repo:
            pages = hub_pages(repo.store, "ada/facts", str(repo.store.head[1]), Silent(), withheld=False)
        return parse(pages["adapter_model.safetensors"] or b""), (pages["README.md"] or b"").decode()

    with Repository(first_store, progress=False) as repo:
        weights = {weight.removesuffix(".weight") for weight in repo.store.config.base["weights"]}
        changed = {weight.removesuffix(".weight") for weight in read_state(repo.store, repo.store.head[1])}
    assert changed < weights
    tensors, card = pushed()
    assert {name.split(".lora_")[0].removeprefix("base_model.model.") for name in tensors} == weights
    assert "TGI" not in card
    monkeypatch.setattr(exchange, "_ZEROS", 0)
    few, card = pushed()
    assert {name.split(".lora_")[0].removeprefix("base_model.model.") for name in few} == changed
    assert all((few[name] == tensors[name]).all() if name in few else not tensors[name].any() for name in tensors)
    assert "export peft --every-layer" in card
