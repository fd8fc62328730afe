"""Live decoding: what the model writes by itself, greedily, and whether that is the answer.

Teacher-forced scores feed the model the target's own tokens; here it reads only what it wrote. The two are reported
beside each other and never mixed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicCache

from patchhub.editing.locate import tokenise
from patchhub.editing.record_shapes import SLOT
from patchhub.errors import RequestError, SettingsError
from patchhub.evaluation.estimates import estimate, mean_or_none
from patchhub.evaluation.metrics import BATCH_TOKENS, context_length, cut, reading
from patchhub.evaluation.suites import Scores
from patchhub.models.tracing import left_padded
from patchhub.objects import Request

BARE = SLOT


@dataclass(frozen=True)
class LiveReading:
    """What a model wrote after one request's prompt in each context, and the target that it was to write."""

    request_id: str
    target: str
    continuations: tuple[str, ...]


def continue_greedily(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 32,
    batch_tokens: int = BATCH_TOKENS,
) -> list[str]:
    """The most probable continuation of each prompt, token by token, up to the end of text or `max_new_tokens`.

    The model's own sampling settings are not used. Equal prompts are continued once.

    Raises:
        RequestError: a prompt has no token, or leaves no room for the continuation.
    """
    unique = list(dict.fromkeys(prompts))
    tokens, limit = [ids for ids, _ in tokenise(tokenizer, unique)], context_length(model)
    for prompt, ids in zip(unique, tokens, strict=True):
        if not 0 < len(ids) <= limit - max_new_tokens:
            raise RequestError(
                f"'{prompt}' has {len(ids)} tokens; the model reads {limit}, {max_new_tokens} of them new",
                remedy="shorten the prompt or ask for fewer new tokens",
                prompt=prompt,
            )
    order = sorted(range(len(unique)), key=lambda index: len(tokens[index]))
    written: dict[str, str] = {}
    with reading(model):
        for batch in cut([len(tokens[index]) + max_new_tokens for index in order], batch_tokens):
            rows = order[batch]
            texts = _continue(model, tokenizer, [tokens[index] for index in rows], max_new_tokens)
            written.update(zip((unique[index] for index in rows), texts, strict=True))
    return [written[prompt] for prompt in prompts]


def read_live(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Request],
    *,
    contexts: Sequence[str] = (),
    max_new_tokens: int = 32,
    batch_tokens: int = BATCH_TOKENS,
) -> list[LiveReading]:
    """Continue every request's prompt, bare and inside each context (a template with one `{}` for the prompt)."""
    for context in contexts:
        if context.count(SLOT) != 1:
            raise SettingsError(f"the context '{context}' does not contain {SLOT} once", remedy=f"mark one {SLOT}")
    templates = [BARE, *contexts]
    prompts = [template.replace(SLOT, request.text) for request in requests for template in templates]
    written = continue_greedily(model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_tokens=batch_tokens)
    return [
        LiveReading(request.id, request.target_new, tuple(written[start : start + len(templates)]))
        for request, start in zip(requests, range(0, len(written), len(templates)), strict=True)
    ]


def live_scores(readings: Sequence[LiveReading], *, resamples: int = 1000, seed: int = 0) -> Scores:
    """exact and contained after the bare prompt; exact_in_context and contained_in_context, means over the contexts."""
    columns: dict[str, list[float | None]] = {}
    for name, matches in (("exact", begins_with), ("contained", contains)):
        columns[name] = [float(matches(fact.continuations[0], fact.target)) for fact in readings]
        columns[f"{name}_in_context"] = [
            mean_or_none([float(matches(text, fact.target)) for text in fact.continuations[1:]]) for fact in readings
        ]
    estimates = estimate(columns, {}, resamples=resamples, seed=seed)
    return Scores("live", {"resamples": resamples, "seed": seed}, estimates)


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


def _continue(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[int]], max_new_tokens: int
) -> list[str]:
    """One batch: each row's tokens up to its end of text, decoded."""
    ends = _end_tokens(model)
    cache = DynamicCache()
    ids, mask, positions = left_padded(rows, model.device)
    written: list[list[int]] = [[] for _ in rows]
    going = set(range(len(rows)))
    for _ in range(max_new_tokens):
        logits = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        ids = logits.argmax(-1, keepdim=True)
        tokens = ids[:, 0].tolist()
        going -= {row for row in going if tokens[row] in ends}
        for row in going:
            written[row].append(tokens[row])
        if not going:
            break
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        positions = mask.sum(1, keepdim=True) - 1
    return [str(tokenizer.decode(tokens, skip_special_tokens=True)) for tokens in written]


def _end_tokens(model: PreTrainedModel) -> set[int]:
    ends = model.generation_config.eos_token_id if model.generation_config else None
    return set() if ends is None else {ends} if isinstance(ends, int) else set(ends)
