"""The model in the wheel: its size and form, that it knows its facts, and that the demo's edits are about things it knows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from patchhub.editing.requests import read_requests
from patchhub.objects import Request

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "patchhub" / "demo_model"
DEMO = ROOT / "patchhub" / "demo_facts.json"
FACTS = ROOT / "tests" / "data" / "demo_model_facts.json"


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def facts() -> Sequence[Request]:
    return read_requests(FACTS).requests


@pytest.fixture(scope="module")
def demo() -> Sequence[Request]:
    return read_requests(DEMO).requests


@torch.no_grad()
def losses(
    model: LlamaForCausalLM, tokenizer: Any, questions: Sequence[tuple[str, str]]
) -> tuple[list[float], list[bool]]:
    """For each (prompt, target): the negative log-probability of " target", and whether each of its tokens is the argmax."""
    order = sorted(range(len(questions)), key=lambda i: len(questions[i][0]))
    loss, right = [0.0] * len(questions), [False] * len(questions)
    for start in range(0, len(order), 256):
        part = order[start : start + 256]
        prompts = tokenizer([questions[i][0] for i in part])["input_ids"]
        targets = tokenizer([" " + questions[i][1] for i in part])["input_ids"]
        width = max(len(p) + len(t) for p, t in zip(prompts, targets, strict=True))
        ids = torch.tensor([p + t + [0] * (width - len(p) - len(t)) for p, t in zip(prompts, targets, strict=True)])
        scores = model(ids, use_cache=False).logits.log_softmax(-1)
        for row, (i, p, t) in enumerate(zip(part, prompts, targets, strict=True)):
            asked = scores[row, len(p) - 1 : len(p) - 1 + len(t)]
            loss[i] = -asked.gather(1, torch.tensor(t)[:, None]).sum().item()
            right[i] = asked.argmax(-1).tolist() == t
    return loss, right


def truth(request: Request) -> str:
    assert request.target_true is not None
    return request.target_true


def share(right: Sequence[bool]) -> float:
    return sum(right) / len(right)


def test_the_folder_is_small_enough_for_the_wheel() -> None:
    files = {path.name: path.stat().st_size for path in MODEL.iterdir()}
    assert sum(files.values()) <= 4_000_000
    assert files.keys() == {
        "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip


def test_it_is_a_float16_llama_with_tied_embeddings(model: LlamaForCausalLM) -> None:
    assert type(model) is LlamaForCausalLM
    config = json.loads((MODEL / "config.json").read_text())
    assert config["dtype"] == "float16"
    assert config["tie_word_embeddings"]
    with safe_open(MODEL / "model.safetensors", "pt") as tensors:
        assert {tensors.get_tensor(name).dtype for name in tensors.keys()} == {torch.float16}  # noqa: SIM118


def test_it_knows_its_facts(model: LlamaForCausalLM, tokenizer: Any, facts: Sequence[Request]) -> None:
    assert len(facts) >= 300
    _, right = losses(model, tokenizer, [(fact.text, truth(fact)) for fact in facts])
    assert share(right) >= 0.97
    paraphrases = [(text, truth(fact)) for fact in facts[::3] for text in fact.paraphrases]
    _, right = losses(model, tokenizer, paraphrases)
    assert share(right) >= 0.97


def test_it_knows_its_facts_in_the_middle_of_a_text(
    model: LlamaForCausalLM, tokenizer: Any, facts: Sequence[Request]
) -> None:
    before = "The capital of Peru is Lima. My sister waited by the sea."
    _, right = losses(model, tokenizer, [(f"{before} {fact.text}", truth(fact)) for fact in facts[::3]])
    assert share(right) >= 0.97


def test_every_fact_has_a_neighbour_that_the_model_knows(
    model: LlamaForCausalLM, tokenizer: Any, facts: Sequence[Request]
) -> None:
    assert all(fact.neighborhood for fact in facts)
    shared = [fact for fact in facts if fact.neighborhood[0].target == fact.target_true]
    assert len(shared) >= 300
    _, right = losses(model, tokenizer, [(n.prompt, n.target) for fact in facts[::5] for n in fact.neighborhood])
    assert share(right) >= 0.97


def test_a_subject_is_whole_tokens_in_every_phrasing(tokenizer: Any, facts: Sequence[Request]) -> None:
    for fact in facts:
        for text in (fact.text, *fact.paraphrases, f"Good. {fact.text}"):
            begin = text.index(fact.subject)
            end = begin + len(fact.subject)
            spans = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
            inside = [(a, b) for a, b in spans if a < end and b > begin]
            assert (min(a for a, _ in inside), max(b for _, b in inside)) == (begin, end), text


def test_nothing_is_added_to_a_prompt(tokenizer: Any) -> None:
    assert tokenizer.bos_token == tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer.decode(tokenizer("The capital of France is")["input_ids"]) == "The capital of France is"


@given(text=st.text(max_size=60))
def test_any_text_survives_the_tokenizer(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"], clean_up_tokenization_spaces=False) == text


def test_the_demo_changes_facts_that_the_model_knows(
    model: LlamaForCausalLM, tokenizer: Any, demo: Sequence[Request], facts: Sequence[Request]
) -> None:
    known = {(fact.prompt, fact.subject): fact.target_true for fact in facts}
    assert 15 <= len(demo) <= 25
    assert len({(edit.prompt, edit.subject) for edit in demo}) == len(demo)
    assert {edit.target_new for edit in demo} <= set(known.values())
    assert all(known[edit.prompt, edit.subject] == edit.target_true for edit in demo)
    assert all(edit.subject in text for edit in demo for text in (edit.text, *edit.paraphrases))

    true, right = losses(model, tokenizer, [(edit.text, truth(edit)) for edit in demo])
    false, wrong = losses(model, tokenizer, [(edit.text, edit.target_new) for edit in demo])
    assert all(right)
    assert not any(wrong)
    assert all(t < f for t, f in zip(true, false, strict=True))
