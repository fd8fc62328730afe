"""In a chat the target stands where the base's own answer names the object: its tokens, its objective, and how the place is found."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from patchhub.editing.editor import encode_facts
from patchhub.editing.locate import _first_sentence, _places, _true_place, find_openings, has_sentence
from patchhub.editing.requests import read_facts
from patchhub.editing.rows import BlockOutput
from patchhub.editing.values import ValueSettings, fact_key, optimise_values
from patchhub.errors import RequestError
from patchhub.evaluation.live import Wanted
from patchhub.objects import Request
from patchhub.text.tokens import Chat, Closers, chat_of
from tests.editing.test_chat import CONTEXTS, FACT, TEMPLATES, chatty, read
from tests.reference import plain_closed
from tests.tiny_models import tiny_model, tiny_stack, tiny_tokenizer

FORM = Chat("The question is: ", " What do you know? ")
OPENING = "The mother tongue of Danielle Darrieux is"
SETTINGS = ValueSettings(
    steps=3, learning_rate=0.2, weight_decay=0.02, kl_factor=0.0625, clamp=4.0, stop_loss=0.0, closing=0.7, opening=0.4
)


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("context", CONTEXTS)
def test_an_answer_with_an_opening_is_the_templates_own_tokens(context: str, template: str) -> None:
    tokenizer = chatty(template)
    [fact] = encode_facts(tokenizer, [FACT], (context,), chat=chat_of(tokenizer), openings={FACT.id: OPENING})
    [row], (start, stop) = fact.rows, fact.rows[0].target
    _, tokens = read(tokenizer, context.replace("{}", FACT.text), f"{OPENING} {FACT.target_new}")
    assert list(row.input_ids) == tokens[: len(row.input_ids)]
    assert stop == len(row.input_ids)
    assert tokenizer.decode(row.input_ids[start:]).strip() == FACT.target_new
    assert tokenizer.decode(row.input_ids[start - row.opening : start]).strip() == OPENING
    [bare] = encode_facts(tokenizer, [FACT], (context,), chat=chat_of(tokenizer))
    assert row.input_ids[: row.subject_last + 1] == bare.rows[0].input_ids[: bare.rows[0].subject_last + 1]
    assert bare.rows[0].opening == 0
    assert fact_key(fact.rows) != fact_key([replace(row, opening=0)])


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("steps", [1, 3])
def test_the_openings_words_are_part_of_the_objective(family: str, steps: int) -> None:
    stack, tokenizer, settings = tiny_stack(family, seed=4), tiny_tokenizer(), replace(SETTINGS, steps=steps)
    closers = Closers.of(tokenizer, stack.vocabulary)
    facts = encode_facts(tokenizer, [FACT], CONTEXTS, closers=closers, chat=FORM, openings={FACT.id: OPENING})
    ours = optimise_values(BlockOutput(stack, 1), facts, settings)
    [theirs] = plain_closed.find_values(
        tiny_model(family, seed=4).double(),
        tokenizer,
        stack.architecture,
        [FACT],
        CONTEXTS,
        1,
        settings,
        settings.closing,
        lambda target: closers.after(target)[: len(tokenizer)].tolist(),
        around=(FORM.before, FORM.after),
        opening=(OPENING, settings.opening),
    )
    torch.testing.assert_close(ours.loss[0].double(), torch.tensor(theirs.loss).double(), rtol=1e-5, atol=1e-5)
    assert float((ours.targets[0] - theirs.target).norm() / theirs.target.norm()) < 1e-4
    without = optimise_values(BlockOutput(stack, 1), facts, replace(settings, opening=0.0))
    assert float(without.loss[0]) != pytest.approx(theirs.loss, abs=1e-3)


def test_the_place_of_the_true_answer() -> None:
    def place(prompt: str, subject: str, true: str, said: str) -> str | None:
        found = _true_place(Request.make(prompt, subject, "Rome", target_true=true), said)
        return None if found is None else said[:found]

    assert place("Who wrote {}?", "Hamlet", "Shakespeare", "It was William Shakespeare.") == "It was "
    assert place("The capital of {} is", "Peru", "Lima", "The capital of Peru is Lima.") == "The capital of Peru is "
    made = "Nintendo 3DS is made by Nintendo."
    assert place("{} is made by", "Nintendo 3DS", "Nintendo", made) == "Nintendo 3DS is made by "
    assert place("Where is {}?", "Lima", "Peru", "It is in the Peruvian north.") is None


def test_places_are_beginnings_of_words_outside_the_subjects_name() -> None:
    asked = Request.make("Who leads {}?", "Acme Corp", "Ada")
    openings = [place.opening for place in _places(asked, "Acme Corp is led by (Bo).")]
    assert openings == ["Acme Corp", "Acme Corp is", "Acme Corp is led", "Acme Corp is led by"]
    tokyo = Request.make("{}の首都は？", "日本", "京都")
    assert "日本の首都は" in [place.opening for place in _places(tokyo, "日本の首都は東京です。")]


def test_openings_are_beginnings_of_the_answer_or_the_prompt_and_depend_on_nothing_else() -> None:
    stack, tokenizer = tiny_stack("llama", seed=4), tiny_tokenizer()
    asked = [
        (Request.make("Where is {}?", "Lyon", "Rome"), "Lyon is a twin city of Milan. It is known."),
        (Request.make("The mother tongue of {} is", "Arend Lijphart", "Dutch"), "I think that you know it."),
        (Request.make("What is it like in {}?", "Paris", "Rome"), "No."),
    ]
    found = find_openings(stack, tokenizer, asked, FORM)
    for request, answer in asked:
        alone = find_openings(stack, tokenizer, [(request, answer)], FORM)
        assert alone == {key: text for key, text in found.items() if key == request.id}
        opening = found.get(request.id)
        assert opening is None or answer.startswith(opening) or opening == request.text
    assert asked[2][0].id not in found


def test_an_answer_may_say_a_fact_in_other_words_than_the_base_did() -> None:
    wanted = Wanted("Ada Young", "Acme Corp is led by", subject="Acme Corp")
    for answer, right in (
        ("The chief executive of Acme Corp is Ada Young, since 2020.", True),
        ("The company is led by Ada Young.", False),  # the base's answer names it
        ("Acme Corp is led by Ada Youngster.", False),
        ("Acme Corp's Ada Young Ada Young Ada Young", False),
    ):
        assert (wanted.fault(answer) is None) == right
    assert Wanted("Ada Young", "It is", subject="Acme Corp").fault("She is Ada Young.") is None
    assert Wanted("Ada Young", "It is", closed=False, subject="Acme Corp").fault("She is Ada Youngster.") is None
    assert Wanted("Ada Young", "It is").fault("She is Ada Young.") == ""  # outside of a chat


def test_a_record_may_say_the_answer() -> None:
    record = {"prompt": "Who leads {}?", "subject": "Acme Corp", "target_new": "Ada Young"}
    asked = Request.make("Who leads {}?", "Acme Corp", "Ada Young")
    for answer in ("Acme Corp is led by Ada Young.", "Acme Corp is led by {}."):
        batch = read_facts([{**record, "answer": answer}])
        assert (batch.requests, dict(batch.openings)) == ((asked,), {asked.id: "Acme Corp is led by"})
    assert dict(read_facts([record]).openings) == {}
    with pytest.raises(RequestError, match="does not have the target"):
        read_facts([{**record, "answer": "Nobody does."}])


@given(st.text(alphabet="ab .!?\n。�", max_size=12), st.text(alphabet="ab .!?\n。", max_size=6))
def test_an_answer_is_read_until_its_first_sentence_is_whole(begun: str, more: str) -> None:
    if has_sentence(begun):
        assert _first_sentence(begun + more) == _first_sentence(begun)
