"""Batched scores are those of one text at a time with all logits in float64; batching never changes a number."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patchhub.editing.locate import encode_targets
from patchhub.errors import EditError, RequestError, SettingsError
from patchhub.evaluation.metrics import cut, perplexity, score_targets
from patchhub.text.tokens import context_length

words = st.sampled_from(
    ["The", "capital", "of", "France", "is", "Paris", "Madrid", "Zoë", "Kravitz", "東京", "x", "1987", "speaks"]
)
phrases = st.lists(words, min_size=1, max_size=6).map(" ".join)
items_lists = st.lists(st.tuples(phrases, st.lists(words, min_size=1, max_size=3).map(" ".join)), max_size=12)


@torch.no_grad()
def oracle(model, tokenizer, item):
    """Log-probability and argmax of one target from one unpadded forward pass."""
    [text] = encode_targets(tokenizer, [item])
    logprobs = model(torch.tensor([text.input_ids])).logits[0].double().log_softmax(-1)
    places = range(*text.target)
    total = sum(float(logprobs[at - 1, text.input_ids[at]]) for at in places)
    return total, tuple(int(logprobs[at - 1].argmax()) for at in places), tuple(text.input_ids[at] for at in places)


@settings(max_examples=60, deadline=None)
@given(items=items_lists, batch_tokens=st.integers(1, 400))
def test_scores_are_the_oracles_under_any_batching(model_and_tokenizer, items, batch_tokens):
    model, tokenizer = model_and_tokenizer
    scores = score_targets(model, tokenizer, items, batch_tokens=batch_tokens)
    assert len(scores) == len(items)
    for item, score in zip(items, scores, strict=True):
        total, argmax, tokens = oracle(model, tokenizer, item)
        assert score.logprob == pytest.approx(total, abs=1e-9)
        assert (score.argmax, score.tokens, score.n_tokens) == (argmax, tokens, len(tokens))
        assert score.argmax_right == (argmax == tokens)


def test_scores_in_float32_are_the_oracles(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    items = [("The capital of France is", target) for target in ("Paris", "Madrid", "x", "東京 Paris", "Zoë")]
    items += [("Zoë Kravitz speaks", "English"), ("x", "The capital of Spain is Madrid")]
    expected = [oracle(model, tokenizer, item)[0] for item in items]
    single = type(model)(model.config).eval()
    single.load_state_dict(model.state_dict())
    scores = score_targets(single, tokenizer, items)
    assert [score.logprob for score in scores] == pytest.approx(expected, abs=1e-4)


def test_what_a_model_has_learned_is_right_and_nothing_else(learned_model_and_tokenizer):
    prompt = "The capital of France is"
    true, other = score_targets(*learned_model_and_tokenizer, [(prompt, "Paris"), (prompt, "Madrid")])
    assert true.argmax_right
    assert not other.argmax_right
    assert true.logprob > math.log(0.5) > other.logprob


def test_nothing_about_the_model_is_changed(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    model.train()
    try:
        score_targets(model, tokenizer, [("The capital is", "Paris")])
        perplexity(model, tokenizer, ["The capital is Paris"])
        assert model.training
        assert all(parameter.grad is None for parameter in model.parameters())
    finally:
        model.eval()


def test_too_long_texts_are_refused_before_the_model_fails(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    assert context_length(model) == 96
    with pytest.raises(RequestError, match="the model reads up to 96") as caught:
        score_targets(model, tokenizer, [("fine", "x"), ("capital " * 100, "Paris")])
    assert caught.value.remedy


def test_a_broken_model_is_an_error_not_a_score(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    broken = type(model)(model.config).eval()
    with torch.no_grad():
        broken.get_output_embeddings().weight.fill_(math.nan)
    with pytest.raises(EditError, match="not numbers"):
        score_targets(broken, tokenizer, [("The capital is", "Paris")])
    with pytest.raises(EditError, match="not numbers"):
        perplexity(broken, tokenizer, ["The capital is Paris"])


@settings(max_examples=30, deadline=None)
@given(
    texts=st.lists(phrases, min_size=1, max_size=8),
    max_tokens=st.none() | st.integers(3, 30),
    batch_tokens=st.integers(1, 200),
)
def test_perplexity_is_the_token_weighted_mean_of_single_texts(model_and_tokenizer, texts, max_tokens, batch_tokens):
    model, tokenizer = model_and_tokenizer
    total, count = 0.0, 0
    for text in [*texts, "Zoë Kravitz"]:
        ids = tokenizer(text).input_ids[:max_tokens]
        with torch.no_grad():
            logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        total -= sum(float(logprobs[at - 1, ids[at]]) for at in range(1, len(ids)))
        count += len(ids) - 1
    measured = perplexity(model, tokenizer, [*texts, "Zoë Kravitz"], max_tokens=max_tokens, batch_tokens=batch_tokens)
    assert measured == pytest.approx(math.exp(total / count), rel=1e-9)


@pytest.mark.parametrize("texts", [[], [""]])
def test_perplexity_of_nothing_is_refused(model_and_tokenizer, texts):
    with pytest.raises(RequestError, match="two tokens"):
        perplexity(*model_and_tokenizer, texts)


@given(st.lists(st.integers(1, 100)).map(sorted), st.integers(1, 2000))
def test_a_cut_keeps_every_row_once_within_its_size(lengths, batch_tokens):
    slices = list(cut(lengths, batch_tokens))
    assert [length for piece in slices for length in lengths[piece]] == lengths
    for piece in slices:
        rows = lengths[piece]
        assert rows
        assert len(rows) == 1 or len(rows) * max(rows) <= batch_tokens


def test_a_batch_size_that_is_none_is_refused():
    with pytest.raises(SettingsError, match="batch_tokens is 0"):
        list(cut([1], 0))
