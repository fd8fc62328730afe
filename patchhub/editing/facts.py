"""Requests as the closed-form editors see them: tokenised in every context, with the prompt of the KL term."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from patchhub.editing.chat import Chat
from patchhub.editing.lengths import check_lengths
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
    limit: int | None = None,
) -> list[Fact]:
    """Every request in every context (templates with one ``{}``; the first is the bare prompt), in two tokenizer calls.

    Args:
        chat: put each of these texts, and the prompt of the KL term, into a chat as the user's message.
        limit: refuse texts of more tokens, before any of them is given to the model; None: any length will do.

    Raises:
        RequestError: a text is longer than ``limit``, or a subject or target has no token of its own.
    """
    pairs = [(context, request) for request in requests for context in contexts]
    rows = encode_prompts(tokenizer, pairs, chat=chat)
    essences = [mark_text("", request.subject, _ESSENCE, chat=chat) for request in requests]
    count = len(contexts)
    encoded = encode_marked(tokenizer, essences, chat=chat)
    if limit is not None:
        texts = [request.text + " " + request.target_new for _, request in pairs]
        check_lengths(zip(texts, (len(row.input_ids) for row in rows), strict=True), limit)
        subjects = [request.subject + _ESSENCE for request in requests]
        check_lengths(zip(subjects, (len(text.input_ids) for text in encoded), strict=True), limit)
    return [Fact(tuple(rows[i * count : (i + 1) * count]), essence) for i, essence in enumerate(encoded)]
