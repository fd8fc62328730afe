"""Facts inside a chat template: the tokens are the template's own, the subject is found in them, the target is the answer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from patchhub.editing.editor import encode_facts
from patchhub.editing.locate import encode_prompt, encode_targets
from patchhub.errors import SettingsError
from patchhub.objects import Request
from patchhub.text.tokens import Chat, chat_of
from tests.tiny_models import tiny_tokenizer

TEMPLATES = {
    "roles": "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}",
    "brackets": "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
    "thinking": "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' and not enable_thinking %}"
    "<think></think>{% endif %}{{ m.content }}\n{% endfor %}",
    "system": "<|system|>You know { a lot }.</s>{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}\n{% endfor %}",
}
FACT = Request.make("The mother tongue of {} is", "Danielle Darrieux", "Dutch")
CONTEXTS = ("{}", "Because I think that you know it. {}")


def chatty(template: str, *, bos: bool = True) -> Any:
    tokenizer = copy.deepcopy(tiny_tokenizer(bos=bos))
    tokenizer.chat_template = template
    return tokenizer


def read(tokenizer: Any, message: str, answer: str) -> tuple[str, list[int]]:
    """What the tokenizer itself makes of a question and its answer: the text and its tokens."""
    messages = [{"role": "user", "content": message}, {"role": "assistant", "content": answer}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, enable_thinking=False)
    tokens = tokenizer.apply_chat_template(messages, enable_thinking=False, return_dict=True)["input_ids"]
    return text, list(tokens)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("context", CONTEXTS)
def test_a_fact_in_a_chat_is_the_templates_own_tokens(context: str, template: str, bos: bool) -> None:
    tokenizer = chatty(template, bos=bos)
    encoded = encode_prompt(tokenizer, context, FACT, chat=chat_of(tokenizer))
    text, tokens = read(tokenizer, context.replace("{}", FACT.text), FACT.target_new)
    assert list(encoded.input_ids) == tokens[: len(encoded.input_ids)]
    start, stop = encoded.target
    assert stop == len(encoded.input_ids)
    assert tokenizer.decode(encoded.input_ids[start:]).strip() == FACT.target_new
    assert text.startswith(tokenizer.decode(encoded.input_ids, clean_up_tokenization_spaces=False))
    up_to_subject = tokenizer.decode(encoded.input_ids[: encoded.subject_last + 1])
    assert up_to_subject.endswith(FACT.subject)
    assert up_to_subject.count(FACT.subject) == 1


@given(
    subject=st.text(st.characters(exclude_categories=["C", "Z"], exclude_characters="{}<>"), min_size=1, max_size=12),
    name=st.sampled_from(sorted(TEMPLATES)),
)
def test_the_last_token_of_any_subject_is_found(subject: str, name: str) -> None:
    """The token at the place covers the subject's last character; the one after it does not."""
    tokenizer = chatty(TEMPLATES[name])
    request = Request.make("The mother tongue of {} is", subject, "Dutch")
    chat = chat_of(tokenizer)
    encoded = encode_prompt(tokenizer, "{}", request, chat=chat)
    text = chat.around(request.text) + request.target_new
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    end = len(chat.before) + len("The mother tongue of ") + len(request.subject)
    assert offsets[encoded.subject_last][0] < end <= offsets[encoded.subject_last][1]
    assert offsets[encoded.subject_last + 1][1] > end


def test_prompts_of_evaluation_and_of_the_kl_term_are_in_the_chat_too() -> None:
    tokenizer = chatty(TEMPLATES["roles"])
    chat = chat_of(tokenizer)
    [fact] = encode_facts(tokenizer, [FACT], CONTEXTS, chat=chat)
    [scored] = encode_targets(tokenizer, [(FACT.text, FACT.target_new)], chat=chat)
    assert (scored.input_ids, scored.target) == (fact.rows[0].input_ids, fact.rows[0].target)
    essence = tokenizer.decode(fact.essence.input_ids)
    assert essence == chat.around("Danielle Darrieux is a")
    assert tokenizer.decode(fact.essence.input_ids[: fact.essence.subject_last + 1]).endswith("Darrieux")


def test_without_a_chat_nothing_changes() -> None:
    """A tokenizer that has a template is used as plain text where no chat is asked for."""
    plain, with_template = tiny_tokenizer(bos=True), chatty(TEMPLATES["roles"])
    assert encode_prompt(plain, "{}", FACT) == encode_prompt(with_template, "{}", FACT)


def test_what_is_kept_does_not_depend_on_the_day() -> None:
    tokenizer = chatty("{{ strftime_now('%d %b %Y') }}" + TEMPLATES["roles"])
    chat = chat_of(tokenizer)
    assert Chat.from_json(chat.to_json()) == chat
    assert Chat.from_json(None) is None
    assert "<|user|>" in chat.before


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (None, "has no chat template"),
        ("{{ raise_exception('only three roles') }}", "only three roles"),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "once and as it is"),
        ("{{ messages[0].content }}", "once and as it is"),
        ("{% for m in messages %}{{ m.content }}: {{ m.content }}{% endfor %}", "once and as it is"),
        ("{} {% for m in messages %}{{ m.content }}{% endfor %}", "once and as it is"),
        ("{% for m in messages %}{{ m.content ", "cannot be used"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused(template: str | None, reason: str) -> None:
    tokenizer = tiny_tokenizer() if template is None else chatty(template)
    with pytest.raises(SettingsError, match=reason) as caught:
        chat_of(tokenizer)
    assert caught.value.remedy
    assert "\n" not in caught.value.message
