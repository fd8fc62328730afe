"""`commit` and `ask` on bases in half precision, quantised, and inside a chat template: through the command line, for real."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import patchhub
from patchhub.constraints import solve
from patchhub.delta import add, to_dense
from patchhub.evaluation.metrics import score_targets
from patchhub.sets.columns import read_columns, read_state
from patchhub.store.store import Store
from tests.cli.conftest import FACTS, MODEL, Run, invoke

AUTHOR = "Ada <ada@example.org>"
TEMPLATE = "{% for m in messages %}{{ ('<|endoftext|>The question is here. ' if m.role == 'user' else ' ') + m.content }}{% endfor %}"
FEW = FACTS[:3]


def written(folder: Path, *options: str, model: Path = MODEL, facts: list[dict[str, Any]] = FEW) -> dict[str, Any]:
    """A new store with one commit of some facts; what `commit --json` says."""
    invoke(folder, "init", str(model), "--author", AUTHOR)
    invoke(folder, "config", "metric.tokens", "2000")
    file = folder / "facts.json"
    file.write_text(json.dumps(facts), encoding="utf-8")
    result = invoke(folder, "commit", str(file), "-m", "few", "--author", AUTHOR, "--json", "--force", *options)
    done: dict[str, Any] = json.loads(result.stdout)
    return done


def held(model: Any, facts: list[dict[str, Any]] = FEW) -> int:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    asked = [(fact["prompt"].format(fact["subject"]), fact["target_new"]) for fact in facts]
    return sum(score.argmax_right for score in score_targets(model, tokenizer, asked))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_facts_written_in_half_precision_hold_in_float32_too(dtype: str, tmp_path: Path) -> None:
    assert written(tmp_path, "--dtype", dtype)["held"] == len(FEW)
    assert held(patchhub.load(tmp_path, dtype=torch.float32)) == len(FEW)


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_facts_written_on_a_quantised_base_hold_on_it(bits: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    assert written(tmp_path, "--quantization", bits)["held"] == len(FEW)
    config = BitsAndBytesConfig(load_in_8bit=bits == "8bit", load_in_4bit=bits == "4bit")
    model = patchhub.load(tmp_path, quantization_config=config)
    assert model.is_quantized
    assert held(model) == len(FEW)
    patchhub.detach(model)
    assert held(model) == 0
    patchhub.attach(model, tmp_path)
    assert held(model) == len(FEW)


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped model, with a chat template."""
    folder = tmp_path_factory.mktemp("chatty") / "model"
    shutil.copytree(MODEL, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return folder


def test_facts_in_a_chat_are_recorded_and_asked_in_it(chatty: Path, tmp_path: Path) -> None:
    done = written(
        tmp_path, "--chat", "--set", "opening=0", model=chatty
    )  # this base cannot chat: no words of its own to keep
    assert done["held"] == len(FEW)
    with Store.open(tmp_path) as repository:
        settings = repository.patch(done["patches"][0]).settings
    assert settings["chat"] == {"before": "<|endoftext|>The question is here. ", "after": " "}
    fact = FEW[0]
    prompt = fact["prompt"].format(fact["subject"])
    answers = json.loads(invoke(tmp_path, "ask", prompt, "--chat", "--rev", "HEAD", "--json").stdout)
    assert answers[0]["continuation"].strip().startswith(fact["target_new"])


def test_a_chat_without_a_template_and_unknown_places_are_refused(run: Run) -> None:
    fact = ("--prompt", "The capital of {} is", "--subject", "Peru", "--target", "Oslo", "-m", "x")
    assert "no chat template" in run("commit", *fact, "--chat", code=2).stderr
    assert "no chat template" in run("ask", "The capital of Peru is", "--chat", code=2).stderr
    assert "cannot be 'gpu0'" in run("commit", *fact, "--device", "gpu0", code=2).stderr
    assert "cannot be 'gpu0'" in run("ask", "The capital of Peru is", "--device", "gpu0", code=2).stderr
    assert "one of" in run("config", "dtype", "int8", code=2).stderr
    assert "true or false" in run("config", "chat", "perhaps", code=2).stderr


def test_wise_is_refused_where_it_cannot_run(run: Run) -> None:
    fact = ("--prompt", "The capital of {} is", "--subject", "Peru", "--target", "Oslo", "-m", "x", "--method", "wise")
    assert "float32" in run("commit", *fact, "--dtype", "bfloat16", code=2).stderr
    assert "chat template" in run("commit", *fact, "--chat", code=2).stderr


def test_refresh_records_in_the_chat_that_the_facts_were_written_in(chatty: Path, tmp_path: Path) -> None:
    """Also after the template has changed: what stood around the prompts is kept with the patch."""
    model = tmp_path / "model"
    shutil.copytree(chatty, model)
    written(tmp_path, "--chat", model=model, facts=FACTS[:1])
    later = tmp_path / "later.json"
    later.write_text(json.dumps(FACTS[1:2]), encoding="utf-8")
    invoke(tmp_path, "commit", str(later), "-m", "one more", "--author", AUTHOR, "--chat", "--force")
    invoke(tmp_path, "revert", "HEAD~1", "--author", AUTHOR)
    (model / "chat_template.jinja").write_text("{% for m in messages %}# {{ m.content }}{% endfor %}", encoding="utf-8")
    invoke(tmp_path, "refresh", "--author", AUTHOR)
    with Store.open(tmp_path) as repository:
        [(patch, _)] = repository.active(repository.head[1])
        settings = repository.patch(patch).settings
    assert settings["refreshes"]
    assert settings["chat"] == {"before": "<|endoftext|>The question is here. ", "after": " "}


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_facts_on_a_lora_of_every_linear_weight_stay_without_it(tmp_path: Path) -> None:
    """What is loaded is what PEFT loads; facts are recorded on it; without it they are the joint solution of their columns, and stale."""
    from peft import LoraConfig, PeftModel, get_peft_model

    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32), LoraConfig(**options))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.03 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(tmp_path / "lora")
    store = tmp_path / "store"
    store.mkdir()
    invoke(store, "init", str(MODEL), "--author", AUTHOR)
    invoke(store, "config", "metric.tokens", "2000")
    invoke(store, "import", str(tmp_path / "lora"), "-m", "a LoRA", "--author", AUTHOR, "--force")
    ids = torch.tensor([[5, 17, 200, 31, 9]])
    base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    expected = PeftModel.from_pretrained(base, str(tmp_path / "lora"))(input_ids=ids).logits.detach()
    found = patchhub.load(store, dtype=torch.float32)(input_ids=ids).logits.detach()
    assert float((found - expected).norm() / expected.norm()) < 1e-5

    (tmp_path / "facts.json").write_text(json.dumps(FACTS[:2]), encoding="utf-8")
    invoke(store, "commit", str(tmp_path / "facts.json"), "-m", "two", "--author", AUTHOR, "--force")
    assert held(patchhub.load(store), FACTS[:2]) == 2
    reverted = json.loads(invoke(store, "revert", "HEAD~1", "--author", AUTHOR, "--force", "--json").stdout)
    assert reverted["stale"] == 2
    with Store.open(store) as repository:
        elements = repository.active(repository.head[1])
        columns, state = read_columns(repository, elements), read_state(repository, repository.head[1])
        assert state.keys() == columns.keys()
        for weight, rows in columns.items():
            alone = to_dense(solve(rows))
            left = to_dense(add(state[weight], alone.shape)) - alone
            assert np.linalg.norm(left) <= 1e-6 * np.linalg.norm(alone)
