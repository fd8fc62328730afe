"""`ask` and `commit` read text in one way: without what a tokenizer appends, within the context, in words the model knows."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from tests.cli.conftest import MODEL, invoke


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return Path(shutil.copytree(MODEL, tmp_path / "base"))


def said(folder: Path, prompt: str) -> list[Any]:
    answer: list[Any] = json.loads(invoke(folder, "ask", prompt, "--json").stdout)
    return answer


def test_what_a_tokenizer_appends_is_not_asked(base: Path, tmp_path: Path) -> None:
    invoke(tmp_path / "plain", "init", str(MODEL))
    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {tokenizer.eos_token}", special_tokens=[(tokenizer.eos_token, tokenizer.eos_token_id)]
    )
    tokenizer.save_pretrained(base)
    prompt = "The capital of France is"
    assert AutoTokenizer.from_pretrained(base)(prompt).input_ids[-1] == tokenizer.eos_token_id
    invoke(tmp_path / "appending", "init", str(base))

    assert said(tmp_path / "appending", prompt) == said(tmp_path / "plain", prompt)


def test_several_prompts_are_asked_as_each_alone(tmp_path: Path) -> None:
    invoke(tmp_path / "store", "init", str(MODEL))
    store, (one, other) = tmp_path / "store", ("The capital of France is", "The author of Dracula is")
    (tmp_path / "prompts.txt").write_text(f"{other}\n\n", encoding="utf-8")
    together = said(store, one) + said(store, other)
    asked = invoke(store, "ask", one, "--file", str(tmp_path / "prompts.txt"), "--json")
    assert json.loads(asked.stdout) == together
    assert [answer["prompt"] for answer in together] == [one, one, other, other]
    assert json.loads(invoke(store, "ask", one, other, "--json").stdout) == together
    assert "put quotes around" in invoke(store, "ask", *one.split(), code=2).stderr
    assert "no prompt" in invoke(store, "ask", "--file", os.devnull, code=2).stderr


def test_a_prompt_longer_than_the_context_is_refused_and_a_full_one_answered_in_what_is_left(
    base: Path, tmp_path: Path
) -> None:
    invoke(tmp_path / "store", "init", str(base))
    limit = json.loads((base / "config.json").read_text(encoding="utf-8"))["max_position_embeddings"]

    refused = invoke(tmp_path / "store", "ask", "and then " * limit, code=3)
    assert f"reads up to {limit}" in refused.stderr
    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    prompt = tokenizer.decode(tokenizer("and then " * limit).input_ids[: limit - 2]).rstrip()
    assert invoke(tmp_path / "store", "ask", prompt).stdout


def test_a_word_that_the_model_has_no_embedding_for_is_refused(base: Path, tmp_path: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["Zyntrix"])
    tokenizer.save_pretrained(base)
    store = tmp_path / "store"
    invoke(store, "init", str(base))
    fact = {"prompt": "The capital of {} is", "subject": "France", "target_new": "Zyntrix"}

    for refused in (
        invoke(store, "ask", "The capital of Zyntrix is", code=3),
        invoke(store, "commit", "-", "-m", "no", stdin=json.dumps(fact), code=3),
        invoke(
            store,
            "commit",
            "-",
            "-m",
            "no",
            stdin=json.dumps(fact | {"subject": "Zyntrix", "target_new": "Rome"}),
            code=3,
        ),
    ):
        assert "'Zyntrix', which the model has no embedding for" in refused.stderr
    assert invoke(store, "ask", "The capital of France is").stdout
