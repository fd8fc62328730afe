"""Requests as the closed-form editors see them: tokenised in every context, with the prompt of the KL term."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from patchhub.editing.chat import Chat
from patchhub.editing.locate import encode_marked, encode_prompts, mark_text
from patchhub.editing.values import Fact
from patchhub.objects import Request

_ESSENCE = " is a"  # the KL prompt is "{subject} is a" in the published code of both editors


def encode_facts(
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Request],
    contexts: Sequence[str],
    *,
    chat: Chat | None = None,
) -> list[Fact]:
    """Every request in every context (templates with one ``{}``; the first is the bare prompt), in two tokenizer calls.

    Args:
        chat: put each of these texts, and the prompt of the KL term, into a chat as the user's message.
    """
    pairs = [(context, request) for request in requests for context in contexts]
    rows = encode_prompts(tokenizer, pairs, chat=chat)
    essences = [mark_text("", request.subject, _ESSENCE, chat=chat) for request in requests]
    count = len(contexts)
    encoded = encode_marked(tokenizer, essences, chat=chat)
    return [Fact(tuple(rows[i * count : (i + 1) * count]), essence) for i, essence in enumerate(encoded)]
