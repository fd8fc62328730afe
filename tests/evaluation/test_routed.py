"""Models with side memories: the scorer reads each prompt first and scores every target under the decision made there."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers.cache_utils import DynamicCache

from patchhub.delta import Dense
from patchhub.editing.locate import encode_targets
from patchhub.evaluation.live import continue_greedily
from patchhub.evaluation.metrics import score_targets
from patchhub.runtime.routing import SideMemory, decisions, route, unroute
from tests.evaluation.conftest import llama, train

WEIGHT = "model.layers.1.mlp.down_proj.weight"
PROMPTS = [
    "The capital of France is",
    "Zoë Kravitz speaks",
    "x",
    "The capital of Spain",
    "Paris is",
    "東京 speaks English in",
]
TARGETS = ["Paris", "Madrid", "the capital of 東京", "x", "English and Zoë Kravitz"]
ITEMS = [(prompt, target) for prompt in PROMPTS for target in TARGETS]


@torch.no_grad()
def oracle(model, tokenizer, item):
    """One prompt by itself, then one target over its cache; and who answered the prompt."""
    [text] = encode_targets(tokenizer, [item])
    start = text.target[0]
    cache = DynamicCache(config=model.config)
    first = model(torch.tensor([text.input_ids[:start]]), past_key_values=cache, use_cache=True).logits[0, -1:]
    [name] = decisions(model)
    rest = model(torch.tensor([text.input_ids[start:]]), past_key_values=cache, use_cache=True).logits[0, :-1]
    logprobs = torch.cat([first, rest]).log_softmax(-1)
    tokens = torch.tensor(text.input_ids[start:])
    return float(logprobs.gather(-1, tokens[:, None]).sum()), tuple(logprobs.argmax(-1).tolist()), name


@pytest.fixture
def routed_model():
    """A tiny Llama with a side memory that about half of the prompts are beyond the threshold of."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model, tokenizer = llama().double().eval(), train("<s>")
    shape = tuple(model.get_parameter(WEIGHT).shape)
    change = Dense(np.random.default_rng(5).normal(0, 0.3, shape).astype(np.float32))
    for threshold in np.geomspace(0.01, 1000, 60):
        route(model, [SideMemory("side", WEIGHT, change, {"threshold": float(threshold), "distance": "mean"})])
        answered = {oracle(model, tokenizer, (prompt, "x"))[2] for prompt in PROMPTS}
        if answered == {None, "side"}:
            break
        unroute(model)
    assert answered == {None, "side"}
    return model, tokenizer


@pytest.mark.parametrize("batch_tokens", [1, 60, 2048])
def test_targets_are_scored_under_their_prompts_decision(routed_model, batch_tokens):
    model, tokenizer = routed_model
    scores = score_targets(model, tokenizer, ITEMS, batch_tokens=batch_tokens)
    for item, score in zip(ITEMS, scores, strict=True):
        logprob, argmax, _ = oracle(model, tokenizer, item)
        assert score.logprob == pytest.approx(logprob, abs=1e-9)
        assert score.argmax == argmax
    unroute(model)
    plain = score_targets(model, tokenizer, ITEMS)
    assert any(abs(one.logprob - other.logprob) > 0.1 for one, other in zip(scores, plain, strict=True))


def test_the_decision_stays_while_the_model_writes(routed_model):
    model, tokenizer = routed_model
    written = continue_greedily(model, tokenizer, PROMPTS, max_new_tokens=6)
    for prompt, text in zip(PROMPTS, written, strict=True):
        ids = torch.tensor([tokenizer(prompt).input_ids])
        made = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6, pad_token_id=0
        )
        assert text == tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_expected_of_a_text_has_no_part_in_its_decision(routed_model, target):
    model, tokenizer = routed_model
    expected = {prompt: tokenizer(f"{prompt} {target}").input_ids for prompt in PROMPTS}
    alone = continue_greedily(model, tokenizer, PROMPTS, max_new_tokens=6)
    assert continue_greedily(model, tokenizer, PROMPTS, max_new_tokens=6, expected=expected) == alone
