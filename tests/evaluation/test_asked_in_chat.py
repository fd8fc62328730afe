"""Facts asked in a chat: every prompt is read as the template itself writes it, teacher forced and live."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from patchhub.errors import RequestError
from patchhub.evaluation.live import continue_greedily, read_live, room_after
from patchhub.evaluation.suites import read_facts
from patchhub.objects import Request
from patchhub.text.tokens import chat_of

TEMPLATE = (
    "<s>{% for m in messages %}<{{ m.role[0] }}>{{ ' ' + m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)
FACT = Request.make(
    "The capital of {} is",
    "France",
    "Madrid",
    target_true="Paris",
    paraphrases=["France is Paris, and"],
    neighborhood=[("The capital of Spain is", "Madrid"), ("Zoë speaks", "English")],
)
PROMPTS = ["The capital of France is", "Zoë", "The capital of Spain is Madrid and that of 東京"]


@pytest.fixture(scope="module")
def chatty(model_and_tokenizer: tuple[Any, Any]) -> tuple[Any, Any]:
    model, tokenizer = model_and_tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = TEMPLATE
    return model, tokenizer


def asked(tokenizer: Any, prompt: str) -> list[int]:
    """The tokens of a question up to where the answer begins, as the template writes them."""
    message = [{"role": "user", "content": prompt}]
    return list(tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)["input_ids"])


@torch.no_grad()
def logprob(model: Any, tokenizer: Any, prompt: str, target: str) -> float:
    """log P(target | the question), from one pass over the template's own text, cut where the answer ends.

    A space before the answer is part of the question where the tokenizer gives it a token of its own.
    """
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": target}]
    text = tokenizer.apply_chat_template(messages, tokenize=False).removesuffix("\n")
    ids, spaced = (tokenizer(part, add_special_tokens=False).input_ids for part in (text, text.removesuffix(target)))
    begin = len(spaced) if ids[: len(spaced)] == spaced else len(asked(tokenizer, prompt))
    logs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(float(logs[place - 1, ids[place]]) for place in range(begin, len(ids)))


def test_all_prompts_of_a_fact_are_scored_in_the_chat(chatty: tuple[Any, Any]) -> None:
    """Its own, the paraphrases and the neighbours, with both targets."""
    model, tokenizer = chatty
    [reading] = read_facts(model, tokenizer, [FACT], chat=chat_of(tokenizer))
    pairs = [(FACT.text, "Paris"), *((text, "Paris") for text in FACT.paraphrases)]
    pairs += [(near.prompt, near.target) for near in FACT.neighborhood]
    answers = [*reading.prompt, *reading.paraphrases, *reading.neighborhood]
    for (prompt, true), answer in zip(pairs, answers, strict=True):
        assert answer.true is not None
        assert answer.new.logprob == pytest.approx(logprob(model, tokenizer, prompt, "Madrid"), abs=1e-9)
        assert answer.true.logprob == pytest.approx(logprob(model, tokenizer, prompt, true), abs=1e-9)
    [bare] = read_facts(model, tokenizer, [FACT])
    assert bare.prompt[0].new.logprob != pytest.approx(reading.prompt[0].new.logprob, abs=1e-3)


@pytest.mark.parametrize("batch_tokens", [1, 2048])
def test_what_is_written_is_the_answer_of_generate(chatty: tuple[Any, Any], batch_tokens: int) -> None:
    model, tokenizer = chatty
    chat = chat_of(tokenizer)
    written = continue_greedily(model, tokenizer, PROMPTS, chat=chat, max_new_tokens=5, batch_tokens=batch_tokens)
    for prompt, text in zip(PROMPTS, written, strict=True):
        ids = torch.tensor([asked(tokenizer, prompt)])
        mask = torch.ones_like(ids)
        alone = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=5, pad_token_id=0)
        assert text == tokenizer.decode(alone[0, ids.shape[1] :], skip_special_tokens=True)


def test_contexts_stand_inside_the_message(chatty: tuple[Any, Any]) -> None:
    model, tokenizer = chatty
    options = {"chat": chat_of(tokenizer), "max_new_tokens": 4}
    [reading] = read_live(model, tokenizer, [FACT], contexts=["Zoë. {}"], **options)
    texts = ["The capital of France is", "Zoë. The capital of France is"]
    assert list(reading.continuations) == continue_greedily(model, tokenizer, texts, **options)


def test_the_template_takes_room(chatty: tuple[Any, Any]) -> None:
    model, tokenizer = chatty
    chat, limit = chat_of(tokenizer), model.config.max_position_embeddings
    room = room_after(model, tokenizer, PROMPTS, 1000, chat=chat)
    assert room == {prompt: limit - len(asked(tokenizer, prompt)) for prompt in PROMPTS}
    with pytest.raises(RequestError, match="no room"):
        continue_greedily(model, tokenizer, PROMPTS[:1], chat=chat, max_new_tokens=room[PROMPTS[0]] + 1)
