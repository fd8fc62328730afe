"""Sampling from the base: decided by the seed alone, truncated as asked, and the caller's random state left as it was."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patchhub.cache import Cache
from patchhub.models.placement import quick
from patchhub.models.tracing import Stack
from patchhub.text.sampling import (
    KeptText,
    _by_cumulation,
    _by_race,
    _truncated,
    context_templates,
    continue_rows,
    continue_tokens,
    sample_documents,
)
from tests.tiny_models import BOS, FAMILIES, VOCABULARY, tiny_model, tiny_stack, tiny_tokenizer


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- truncation


@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 15), st.floats(0.5, 4))
def test_top_k_keeps_the_k_largest(seed, size, k, spread):
    logits = spread * torch.randn(3, size, generator=generator(seed))
    found = _truncated(logits, k)
    for row, kept in zip(logits, found, strict=True):
        chosen = set(row.argsort(descending=True)[:k].tolist())
        assert set(kept.nonzero()[:, 0].tolist()) == chosen
        torch.testing.assert_close(kept[sorted(chosen)], row[sorted(chosen)].softmax(-1))


# --- one draw


@settings(deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([2, 255, 256, 257, 700]), st.floats(0.1, 30))
def test_a_draw_is_where_the_cumulated_probabilities_pass_the_number(seed, size, spread):
    logits = spread * torch.randn(8, size, generator=generator(seed))
    uniform = torch.rand(8, 1, generator=generator(seed + 1), dtype=torch.float64)
    found = _by_cumulation(uniform)(logits, 0)
    passed = logits.double().softmax(-1).cumsum(-1)
    rows = torch.arange(8)
    assert bool((passed[rows, found] >= uniform[:, 0] - 1e-6).all())
    before = passed[rows, found] - logits.double().softmax(-1)[rows, found]
    assert bool((before <= uniform[:, 0] + 1e-6).all())


@pytest.mark.parametrize("number", [0.0, 1 - 2.0**-53])
def test_no_draw_is_of_a_token_without_probability(number):
    logits = torch.full((1, 300), -torch.inf)
    logits[0, [7, 40]] = torch.tensor([0.3, 0.1])
    assert int(_by_cumulation(torch.tensor([[number]], dtype=torch.float64))(logits, 0)) in (7, 40)


def test_a_race_is_won_by_the_token_that_multinomial_draws():
    logits = 3 * torch.randn(1, VOCABULARY, generator=generator(1))
    ours, theirs = generator(2), generator(2)
    for _ in range(50):
        times = torch.empty(VOCABULARY).exponential_(generator=ours)
        expected = torch.multinomial(_truncated(logits, 5), 1, generator=theirs)
        assert int(_by_race(times[None, None], 5)(logits, 0)) == int(expected)


# --- sampling


@pytest.mark.parametrize("family", FAMILIES)
def test_the_seed_decides_and_the_global_state_is_left_alone(family):
    stack, start = tiny_stack(family), torch.tensor([[5, 6], [7, 8]])
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = continue_tokens(stack, start, 12, generator(3))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(continue_tokens(stack, start, 12, generator(3)), first)
    assert not torch.equal(continue_tokens(stack, start, 12, generator(4)), first)
    assert first.shape == (2, 12)
    assert torch.equal(first[:, :2], start)


@pytest.mark.parametrize("family", FAMILIES)
def test_top_1_is_the_argmax_of_a_full_forward(family):
    """So the cache that sampling keeps gives the model's own logits."""
    stack = tiny_stack(family)
    found = continue_rows(stack, torch.tensor([[5, 6], [9, 11]]), 9, lambda logits, step: logits.argmax(-1))
    with torch.no_grad():
        logits = stack.model(input_ids=found, attention_mask=torch.ones_like(found), use_cache=False).logits
    assert torch.equal(logits[:, 1:-1].argmax(-1), found[:, 2:])


def test_draws_follow_the_models_distribution():
    """20,000 draws of one token against its probabilities: total variation below what chance makes likely."""
    stack = tiny_stack("gpt2")
    start = torch.tensor([[5, 6]]).expand(20_000, 2)
    uniform = torch.rand(20_000, 1, generator=generator(), dtype=torch.float64)
    drawn = continue_rows(stack, start, 3, _by_cumulation(uniform))[:, 2]
    with torch.no_grad():
        expected = stack.model(input_ids=start[:1]).logits[0, -1].softmax(-1)
    share = torch.bincount(drawn, minlength=VOCABULARY) / len(drawn)
    assert float((share - expected).abs().sum()) / 2 < 0.06


def test_a_start_that_is_long_enough_is_returned():
    start = torch.tensor([[5, 6, 7]])
    assert torch.equal(continue_tokens(tiny_stack("gpt2"), start, 2, generator()), start)


# --- contexts


@pytest.mark.parametrize("seed", range(6))
def test_contexts_have_one_slot_each_and_the_bare_prompt_first(seed):
    templates = context_templates(tiny_stack("gpt2"), tiny_tokenizer(), seed=seed)
    assert templates[0] == "{}"
    assert len(templates) == 6
    for template, opening in zip(templates[1:], ("The", "Therefore", "Because", "I", "You"), strict=True):
        assert template.count("{}") == 1
        assert template.count("{") == template.count("}") == 1
        assert template.endswith(". {}")
        assert template.startswith(opening)
        assert "\n" not in template


def test_contexts_depend_on_the_seed_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = context_templates(tiny_stack("llama"), tiny_tokenizer(), seed=7)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert context_templates(tiny_stack("llama"), tiny_tokenizer(), seed=7) == first
    assert context_templates(tiny_stack("llama"), tiny_tokenizer(), seed=8) != first


def test_braces_that_the_model_writes_do_not_become_slots():
    """A head that knows two tokens only, the braces."""
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    braces = tokenizer("{}")["input_ids"]
    assert tokenizer.decode(braces) == "{}"
    stack = Stack(model, tiny_stack("llama").architecture)
    hidden = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))
    keep = torch.full((VOCABULARY,), -1e4).index_fill(0, torch.tensor(braces), 0.0)
    model.lm_head.weight = hidden
    model.lm_head.bias = torch.nn.Parameter(keep)
    templates = context_templates(stack, tokenizer)
    assert [template.count("{}") for template in templates] == [1] * 6
    assert templates[1] == "The. {}"


def test_a_token_in_front_of_every_text_is_not_part_of_a_context():
    templates = context_templates(tiny_stack("llama"), tiny_tokenizer(bos=True))
    assert all("<s>" not in template for template in templates)


# --- documents


@pytest.mark.parametrize(("total", "length"), [(40, 8), (41, 8), (3, 8), (130 * 3, 3)])
def test_documents_hold_about_the_tokens_asked_for(total, length):
    counted: list[int] = []
    found = sample_documents(tiny_stack("gpt2"), tiny_tokenizer(), total, length=length, progress=counted.append)
    assert {len(document) for document in found} == {length}
    assert len(found) == -(-total // length)
    assert sum(counted) == len(found) * length


def test_documents_begin_anywhere_but_at_a_special_token():
    tokenizer = tiny_tokenizer()
    found = sample_documents(tiny_stack("gpt2"), tokenizer, 3 * 600, length=3)
    starts = [document[0] for document in found]
    assert not set(starts) & set(tokenizer.all_special_ids)
    assert len(set(starts)) > 200


def test_documents_begin_with_what_the_tokenizer_puts_in_front():
    found = sample_documents(tiny_stack("llama"), tiny_tokenizer(bos=True), 64, length=8)
    front = tiny_tokenizer(bos=True)("")["input_ids"]
    assert front == [BOS]
    assert {document[0] for document in found} == {BOS}
    assert BOS not in {document[1] for document in found}


def test_documents_depend_on_the_seed_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = sample_documents(tiny_stack("qwen3"), tiny_tokenizer(), 64, length=8, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert sample_documents(tiny_stack("qwen3"), tiny_tokenizer(), 64, length=8, seed=1) == first
    assert sample_documents(tiny_stack("qwen3"), tiny_tokenizer(), 64, length=8, seed=2) != first


def test_a_longer_text_begins_with_a_shorter_one():
    longer = sample_documents(tiny_stack("llama"), tiny_tokenizer(), 8 * 150, length=8)
    assert sample_documents(tiny_stack("llama"), tiny_tokenizer(), 8 * 5, length=8) == longer[:5]


class Stopped(Exception):
    pass


def test_what_was_interrupted_goes_on_and_what_is_kept_is_not_sampled_again(tmp_path: Path):
    """130 documents are two batches; the second is stopped."""
    stack, kept = tiny_stack("llama"), KeptText(Cache(tmp_path), "0" * 64)
    sample = partial(sample_documents, stack, tiny_tokenizer(), 8 * 130, length=8)
    seen: list[int] = []

    def stop(tokens: int) -> None:
        seen.append(tokens)
        if sum(seen) > 8 * 128:
            raise Stopped

    with pytest.raises(Stopped):
        sample(kept=kept, progress=stop)
    seen.clear()
    found = sample(kept=kept, progress=seen.append)
    assert seen[0] == 8 * 128, "the first batch was there"
    assert found == sample()
    seen.clear()
    assert sample(kept=kept, progress=seen.append) == found
    assert seen == [8 * 130]


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_put_back_bit_for_bit(family):
    stack = tiny_stack(family)
    before = {name: (tensor.dtype, tensor.clone()) for name, tensor in stack.model.state_dict().items()}
    with pytest.raises(Stopped), quick(stack.model):
        raise Stopped
    after = stack.model.state_dict()
    assert all(after[name].dtype == dtype and torch.equal(after[name], was) for name, (dtype, was) in before.items())
