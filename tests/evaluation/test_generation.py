"""Sampled text: drawn from the top k, the same in any batch and after any other prompt, and of the length that was asked for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patchhub.errors import SettingsError
from patchhub.evaluation.live import continue_greedily, room_after, sample_continuations

words = st.sampled_from(["The", "capital", "of", "France", "is", "Paris", "Madrid", "Zoë", "東京", "x"])
prompts_lists = st.lists(st.lists(words, min_size=1, max_size=6).map(" ".join), max_size=5)


@settings(max_examples=10, deadline=None)
@given(prompts=prompts_lists, batch_tokens=st.integers(1, 300), seed=st.integers(0, 3))
def test_a_text_depends_on_its_prompt_and_seed_alone(model_and_tokenizer, prompts, batch_tokens, seed):
    model, tokenizer = model_and_tokenizer
    options = {"total_tokens": 20, "seed": seed}
    together = sample_continuations(model, tokenizer, prompts, batch_tokens=batch_tokens, **options)
    assert together == [sample_continuations(model, tokenizer, [prompt], **options)[0] for prompt in prompts]


@settings(max_examples=10, deadline=None)
@given(prompt=st.lists(words, min_size=1, max_size=6).map(" ".join), top_k=st.integers(1, 5))
def test_the_next_token_is_among_the_most_probable(model_and_tokenizer, prompt, top_k):
    model, tokenizer = model_and_tokenizer
    ids = tokenizer(prompt).input_ids
    with torch.no_grad():
        top = model(torch.tensor([ids])).logits[0, -1].topk(top_k).indices
    allowed = {tokenizer.decode([token], skip_special_tokens=True) for token in top.tolist()}
    for seed in range(4):
        options = {"total_tokens": len(ids) + 1, "top_k": top_k, "seed": seed}
        assert sample_continuations(model, tokenizer, [prompt], **options)[0] in allowed


def test_the_most_probable_token_alone_is_greedy_decoding(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    prompts = ["The capital of France is", "x"]
    room = room_after(model, tokenizer, prompts, 15, whole=True)
    for prompt, sampled in zip(
        prompts, sample_continuations(model, tokenizer, prompts, total_tokens=15, top_k=1), strict=True
    ):
        assert [sampled] == continue_greedily(model, tokenizer, [prompt], max_new_tokens=room[prompt])


def test_tokens_are_drawn_in_proportion(learned_model_and_tokenizer):
    """The share of a first token over many seeds is its share of the top two."""
    model, tokenizer = learned_model_and_tokenizer
    prompt = "The capital of France is Paris, and the capital of Spain is Madrid. The"
    with torch.no_grad():
        logits = model(torch.tensor([tokenizer(prompt).input_ids])).logits[0, -1].double()
    values, indices = logits.topk(2)
    expected = float(values.softmax(-1)[0])
    total = len(tokenizer(prompt).input_ids) + 1
    first = tokenizer.decode(indices[0])
    drawn = [
        sample_continuations(model, tokenizer, [prompt], total_tokens=total, top_k=2, seed=seed)[0] == first
        for seed in range(200)
    ]
    deviation = (expected * (1 - expected) / len(drawn)) ** 0.5
    assert sum(drawn) / len(drawn) == pytest.approx(expected, abs=4 * deviation + 1e-9)


def test_room_ends_where_the_model_does(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    long = "capital " * 95
    size = len(tokenizer("x").input_ids)
    assert room_after(model, tokenizer, ["x", long, ""], 10)["x"] == 10
    assert room_after(model, tokenizer, ["x"], 1000)["x"] == 96 - size
    assert room_after(model, tokenizer, ["x"], 10, whole=True)["x"] == 10 - size
    assert sample_continuations(model, tokenizer, [long], total_tokens=100) == [""]


def test_no_token_to_draw_from_is_refused(model_and_tokenizer):
    with pytest.raises(SettingsError, match="top_k is 0"):
        sample_continuations(*model_and_tokenizer, ["x"], top_k=0)
