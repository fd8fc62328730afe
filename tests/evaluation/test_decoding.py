"""Live decoding is greedy generation, whatever the batch; matches are of whole words."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patchhub.errors import RequestError, SettingsError
from patchhub.evaluation.live import (
    LiveReading,
    Wanted,
    begins_with,
    contains,
    continue_greedily,
    continue_within,
    live_scores,
    read_live,
    sample_continuations,
)
from patchhub.evaluation.metrics import score_targets
from patchhub.objects import Request

words = st.sampled_from(["The", "capital", "of", "France", "is", "Paris", "Madrid", "Zoë", "東京", "x"])
FRANCE = Request.make(prompt="The capital of {} is", subject="France", target_new="Paris")
SPAIN = Request.make(prompt="The capital of {} is", subject="Spain", target_new="Rome")


@settings(max_examples=15, deadline=None)
@given(
    prompts=st.lists(st.lists(words, min_size=1, max_size=6).map(" ".join), max_size=5),
    batch_tokens=st.integers(1, 200),
)
def test_continuations_are_those_of_generate_one_at_a_time(model_and_tokenizer, prompts, batch_tokens):
    model, tokenizer = model_and_tokenizer
    written = continue_greedily(model, tokenizer, prompts, max_new_tokens=5, batch_tokens=batch_tokens)
    for prompt, text in zip(prompts, written, strict=True):
        ids = torch.tensor([tokenizer(prompt).input_ids])
        mask = torch.ones_like(ids)
        alone = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=5, pad_token_id=0)
        assert text == tokenizer.decode(alone[0, ids.shape[1] :], skip_special_tokens=True)


@settings(max_examples=15, deadline=None)
@given(
    prompts=st.lists(st.lists(words, min_size=1, max_size=6).map(" ".join), min_size=1, max_size=4, unique=True),
    right=st.lists(st.integers(0, 7), min_size=4, max_size=4),
    wrong=st.lists(st.lists(st.integers(1, 200), max_size=3), min_size=4, max_size=4),
)
def test_what_is_expected_changes_nothing_of_what_is_written(model_and_tokenizer, prompts, right, wrong):
    model, tokenizer = model_and_tokenizer
    alone = continue_greedily(model, tokenizer, prompts, max_new_tokens=6)
    expected = {}
    for prompt, text, count, other in zip(prompts, alone, right, wrong, strict=False):
        whole = tokenizer(prompt + text).input_ids
        front = len(tokenizer(prompt).input_ids)
        expected[prompt] = [*whole[: front + count], *other]
    assert continue_greedily(model, tokenizer, prompts, max_new_tokens=6, expected=expected) == alone


def test_what_was_expected_is_read_in_one_pass(learned_model_and_tokenizer):
    model, tokenizer = learned_model_and_tokenizer
    prompt, passes = "The capital of France is", []
    handle = model.register_forward_pre_hook(lambda _, args, kwargs: passes.append(1), with_kwargs=True)
    try:
        [text] = continue_greedily(model, tokenizer, [prompt], max_new_tokens=9)
        slowly, passes[:] = len(passes), []
        expected = {prompt: tokenizer(prompt + text).input_ids}
        assert continue_greedily(model, tokenizer, [prompt], max_new_tokens=9, expected=expected) == [text]
    finally:
        handle.remove()
    assert (slowly, len(passes)) == (9, 1)


def test_a_continuation_ends_where_it_is_enough(learned_model_and_tokenizer):
    model, tokenizer = learned_model_and_tokenizer
    room = {"The capital of France is": 12, "The capital": 12}
    whole = continue_within(model, tokenizer, room)
    some = continue_within(model, tokenizer, room, enough=lambda prompt, text: "," in text)
    assert some == {prompt: text[: text.index(",") + 1] for prompt, text in whole.items()}


@settings(max_examples=20, deadline=None)
@given(
    prompts=st.lists(st.lists(words, min_size=1, max_size=6).map(" ".join), min_size=1, max_size=6, unique=True),
    lengths=st.lists(st.integers(1, 9), min_size=6, max_size=6),
)
def test_rows_that_leave_a_batch_change_nothing_of_the_others(model_and_tokenizer, prompts, lengths):
    model, tokenizer = model_and_tokenizer
    room = dict(zip(prompts, lengths, strict=False))
    rows = []
    handle = model.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    try:
        written = continue_within(model, tokenizer, room)
    finally:
        handle.remove()
    assert written == {prompt: continue_within(model, tokenizer, {prompt: room[prompt]})[prompt] for prompt in room}
    assert rows == sorted(rows, reverse=True)
    assert all(count * 0.75 < sum(n > step for n in room.values()) for step, count in enumerate(rows) if step)


def test_samples_are_the_same_when_rows_have_left(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    prompts = ["The", "The capital of France is Paris x", "x Madrid", "東京 x Zoë is Paris x x"]
    together = sample_continuations(model, tokenizer, prompts, total_tokens=14)
    assert together == [sample_continuations(model, tokenizer, [one], total_tokens=14)[0] for one in prompts]


pieces = st.sampled_from(
    [*"aA .,;:'1", "Rome", "Rom", "is", " Rome", ", Rome", "It is", "Italy", "e\u0301", "ä", "。", "\ufffd", "\n"]
)


@settings(max_examples=300, deadline=None)
@given(
    texts=st.lists(pieces, max_size=14),
    target=st.sampled_from(["Rome", "Rome is", "1", "Romé", "ローマ"]),
    opening=st.sampled_from(["", "It is", "Italy is in"]),
    closed=st.booleans(),
    subject=st.sampled_from([None, "Italy"]),
)
def test_what_is_decided_of_a_fact_stays_so_whatever_follows(texts, target, opening, closed, subject):
    wanted = Wanted(target, opening, closed, subject)
    begun = ["".join(texts[:stop]) for stop in range(len(texts) + 1)]
    for text in begun + [wanted.text + text for text in begun]:
        if wanted.decided(text):
            verdicts = {wanted.fault(text + more) for more in ("", *pieces_after)}
            assert len(verdicts) == 1


pieces_after = [".", " ", "a", "1", " Rome", "Rome", ", Rome", "e", " is", " Italy", " 1", " 1 1", "\u0301"]


def test_a_learned_sentence_is_continued_and_ends_at_the_end_token(learned_model_and_tokenizer):
    model, tokenizer = learned_model_and_tokenizer
    prompts = ["The capital of France is", "The capital"]
    long, _ = continue_greedily(model, tokenizer, prompts, max_new_tokens=12)
    assert long.startswith(" Paris, and the capital of")
    model.generation_config.eos_token_id = tokenizer(",").input_ids
    try:
        short, other = continue_greedily(model, tokenizer, prompts, max_new_tokens=12)
        assert (short, other) == (" Paris", " of France is Paris")
    finally:
        model.generation_config.eos_token_id = None


def test_teacher_forced_and_live_agree_on_what_is_right(learned_model_and_tokenizer):
    readings = read_live(*learned_model_and_tokenizer, [FRANCE, SPAIN], max_new_tokens=8)
    scores = score_targets(*learned_model_and_tokenizer, [(fact.text, fact.target_new) for fact in (FRANCE, SPAIN)])
    right = [begins_with(reading.continuations[0], reading.target) for reading in readings]
    assert right == [score.argmax_right for score in scores] == [True, False]


def test_contexts_are_scored_apart_from_the_bare_prompt():
    readings = [
        LiveReading("1", "Paris", (" Paris.", " in Paris", " Rome")),
        LiveReading("2", "Rome", (" the city of Rome", " Rome", " Rome, Italy")),
    ]
    scores = live_scores(readings).estimates
    assert {name: estimate.value for name, estimate in scores.items()} == {
        "exact": 0.5,
        "exact_in_context": 0.5,
        "contained": 1.0,
        "contained_in_context": 0.75,
        "live_efficacy": 0.5,
        "closure": 0.5,
    }
    bare = live_scores([LiveReading("1", "Paris", (" Paris",))]).estimates
    assert set(bare) == {"exact", "contained", "live_efficacy", "closure"}


def test_the_context_stands_before_the_prompt(learned_model_and_tokenizer):
    [reading] = read_live(*learned_model_and_tokenizer, [FRANCE], contexts=["Zoë. {}"], max_new_tokens=3)
    alone = continue_greedily(*learned_model_and_tokenizer, ["Zoë. The capital of France is"], max_new_tokens=3)
    assert reading.continuations[1:] == tuple(alone)


@pytest.mark.parametrize(
    ("text", "target", "begins", "within"),
    [
        (" Paris, of course", "Paris", True, True),
        ("Paris", "Paris", True, True),
        (" Parisian", "Paris", False, False),
        (" in Paris.", "Paris", False, True),
        (" Parisian Paris", "Paris", False, True),
        (" paris", "Paris", False, False),
        (" C++ and", "C++", True, True),
        (" New York City", "New York", True, True),
        ("", "Paris", False, False),
        (" XParis", "Paris", False, False),
    ],
)
def test_matches_are_of_whole_words(text, target, begins, within):
    assert (begins_with(text, target), contains(text, target)) == (begins, within)


@given(st.text(max_size=20), st.text(min_size=1, max_size=5).filter(lambda text: text.strip() == text))
def test_what_begins_with_a_target_contains_it(text, target):
    assert contains(text, target) or not begins_with(text, target)
    assert contains(f"{text} {target} {text}", target)


def test_prompts_that_leave_no_room_and_bad_contexts_are_refused(model_and_tokenizer):
    with pytest.raises(RequestError, match="of them new"):
        continue_greedily(*model_and_tokenizer, ["capital " * 60], max_new_tokens=50)
    with pytest.raises(SettingsError, match="does not contain"):
        read_live(*model_and_tokenizer, [FRANCE], contexts=["no slot"])
