"""What a model writes after requests' prompts, bare and in contexts."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from patchhub.evaluation.live import LiveReading, check_contexts, continue_greedily, live_prompts
from patchhub.evaluation.metrics import BATCH_TOKENS
from patchhub.objects import Request
from patchhub.text.tokens import Chat


def read_live(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Request],
    *,
    contexts: Sequence[str] = (),
    chat: Chat | None = None,
    max_new_tokens: int = 32,
    batch_tokens: int = BATCH_TOKENS,
) -> list[LiveReading]:
    """Continue every request's prompt, bare and inside each context (a template with one `{}` for the prompt).

    In a chat each of these texts is a user's message, and what is written is the answer to it.
    """
    check_contexts(contexts)
    prompts = [prompt for request in requests for prompt in live_prompts(request, contexts)]
    written = continue_greedily(
        model, tokenizer, prompts, chat=chat, max_new_tokens=max_new_tokens, batch_tokens=batch_tokens
    )
    size = 1 + len(contexts)
    return [
        LiveReading(request.id, request.target_new, tuple(written[start : start + size]))
        for request, start in zip(requests, range(0, len(written), size), strict=True)
    ]
