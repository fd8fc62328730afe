"""Requests as the closed-form editors see them: tokenised in every context, with the prompt of the KL term."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from patchhub.editing.locate import Marked, encode_marked, encode_prompts
from patchhub.editing.values import Fact
from patchhub.objects import Request

_ESSENCE = " is a"  # the KL prompt is "{subject} is a" in the published code of both editors


def encode_facts(
    tokenizer: PreTrainedTokenizerBase, requests: Sequence[Request], contexts: Sequence[str]
) -> list[Fact]:
    """Every request in every context (templates with one ``{}``; the first is the bare prompt), in two tokenizer calls."""
    rows = encode_prompts(tokenizer, [(context, request) for request in requests for context in contexts])
    essences = encode_marked(tokenizer, [_essence(request.subject) for request in requests])
    count = len(contexts)
    return [Fact(tuple(rows[i * count : (i + 1) * count]), essence) for i, essence in enumerate(essences)]


def _essence(subject: str) -> Marked:
    text = subject + _ESSENCE
    return Marked(text, (0, len(subject)), len(text))
