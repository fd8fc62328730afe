"""Live decoding: what the model writes by itself, greedily, and whether that is the answer.

Teacher-forced scores feed the model the target's own tokens; here it reads only what it wrote. The two are reported
beside each other and never mixed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from patchhub.editing.chat import Chat
from patchhub.errors import SettingsError
from patchhub.evaluation.estimates import mean_or_none
from patchhub.evaluation.generation import continue_greedily
from patchhub.evaluation.metrics import BATCH_TOKENS
from patchhub.evaluation.suites import Scores, scored
from patchhub.objects import SLOT, Request

BARE = SLOT


@dataclass(frozen=True)
class LiveReading:
    """What a model wrote after one request's prompt, bare and then in each context, and the target that it was to write.

    None stands for a context in which the prompt leaves no room to write.
    """

    request_id: str
    target: str
    continuations: tuple[str | None, ...]


def check_contexts(contexts: Sequence[str]) -> None:
    """Refuse a context without exactly one `{}` for the prompt."""
    for context in contexts:
        if context.count(SLOT) != 1:
            raise SettingsError(f"the context '{context}' does not contain {SLOT} once", remedy=f"Mark one {SLOT}.")


def live_prompts(request: Request, contexts: Sequence[str]) -> list[str]:
    """The texts that `LiveReading.continuations` continue: the bare prompt, then the prompt in each context."""
    return [template.replace(SLOT, request.text) for template in (BARE, *contexts)]


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


def live_scores(readings: Sequence[LiveReading], *, resamples: int = 1000, seed: int = 0) -> Scores:
    """exact and contained after the bare prompt; exact_in_context and contained_in_context, means over the contexts."""
    columns: dict[str, list[float | None]] = {}
    for name, matches in (("exact", begins_with), ("contained", contains)):
        found = [
            [None if text is None else float(matches(text, fact.target)) for text in fact.continuations]
            for fact in readings
        ]
        columns[name] = [row[0] for row in found]
        columns[f"{name}_in_context"] = [
            mean_or_none([value for value in row[1:] if value is not None]) for row in found
        ]
    return scored("live", {}, columns, {}, resamples=resamples, seed=seed)


def begins_with(text: str, target: str) -> bool:
    """`text`, white space before it aside, begins with `target` and the word ends there."""
    rest = text.lstrip()
    return rest.startswith(target) and not _goes_on(target, rest[len(target) :])


def contains(text: str, target: str) -> bool:
    """`target` occurs somewhere in `text` as whole words."""
    start = text.find(target)
    while start >= 0:
        if not _goes_on(target, text[start + len(target) :]) and not _goes_on(text[:start], target):
            return True
        start = text.find(target, start + 1)
    return False


def _goes_on(left: str, right: str) -> bool:
    """The last word of `left` goes on in `right`."""
    return left[-1:].isalnum() and right[:1].isalnum()
