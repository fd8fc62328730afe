"""Live decoding: what the model writes by itself after many prompts at once, and whether that is the answer.

Text is continued greedily, or sampled with a random stream of each prompt's own."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicCache

from patchhub.errors import RequestError, SettingsError
from patchhub.evaluation.metrics import BATCH_TOKENS, cut, reading
from patchhub.evaluation.suites import (
    Combined,
    Scores,
    Sibling,
    after_target,
    closed,
    leaks,
    mean_or_none,
    said,
    scored,
    stopped,
)
from patchhub.models.structure import is_recurrent
from patchhub.models.tracing import left_padded
from patchhub.objects import SLOT, Request
from patchhub.text.tokens import Chat, closes, context_length, tokenise

Choose = Callable[[Float[Tensor, "rows vocabulary"], int], Int[Tensor, " rows"]]
"""The next token of every row, given the logits and how many tokens were written before."""


def continue_greedily(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    chat: Chat | None = None,
    max_new_tokens: int = 32,
    batch_tokens: int = BATCH_TOKENS,
) -> list[str]:
    """The most probable continuation of each prompt, token by token, up to the end of text or `max_new_tokens`.

    The model's own sampling settings are not used. Equal prompts are continued once.

    Args:
        chat: the prompts are the user's messages of this chat form; what is written is the answer.

    Raises:
        RequestError: a prompt has no token, or leaves no room for the continuation.
    """
    room, limit = room_after(model, tokenizer, prompts, max_new_tokens, chat=chat), context_length(model)
    for prompt in prompts:
        if room[prompt] < max_new_tokens:
            raise RequestError(
                f"'{prompt}' is empty or leaves no room: the model reads {limit} tokens, {max_new_tokens} of them new",
                remedy="Shorten the prompt or ask for fewer new tokens.",
                prompt=prompt,
            )
    written = continue_within(model, tokenizer, room, chat=chat, batch_tokens=batch_tokens)
    return [written[prompt] for prompt in prompts]


def continue_within(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    room: Mapping[str, int],
    *,
    chat: Chat | None = None,
    batch_tokens: int = BATCH_TOKENS,
) -> dict[str, str]:
    """The most probable continuation of each prompt up to the end of text or its own number of tokens, in the order of ``room``."""
    return _written(model, tokenizer, room, batch_tokens, lambda batch: lambda logits, step: logits.argmax(-1), chat)


def sample_continuations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    total_tokens: int = 100,
    top_k: int = 5,
    seed: int = 0,
    batch_tokens: int = BATCH_TOKENS,
) -> list[str]:
    """A sampled continuation of each prompt up to the end of text or `total_tokens`, the prompt's included.

    Each token is drawn from the `top_k` most probable ones. The draws depend on `seed` and the prompt's text alone, so
    neither the batch nor the other prompts change a text. A prompt without room is continued by nothing.
    """
    if top_k < 1:
        raise SettingsError(f"top_k is {top_k}", remedy="Give a number of tokens above 0.")
    room = room_after(model, tokenizer, prompts, total_tokens, whole=True)

    def choose(batch: Sequence[str]) -> Choose:
        draws = torch.stack([_draws(prompt, seed, total_tokens) for prompt in batch])
        return lambda logits, step: _drawn(logits, draws[:, step], top_k)

    written = _written(model, tokenizer, room, batch_tokens, choose)
    return [written[prompt] for prompt in prompts]


def room_after(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    tokens: int,
    *,
    chat: Chat | None = None,
    whole: bool = False,
) -> dict[str, int]:
    """How many tokens may be written after each prompt: at most `tokens`, or so many that the text has `tokens` in the `whole`."""
    unique = list(dict.fromkeys(prompts))
    limit = context_length(model)
    room = {}
    for prompt, ids in zip(unique, _tokens(tokenizer, unique, chat), strict=True):
        left = min(limit, tokens) - len(ids) if whole else min(limit - len(ids), tokens)
        room[prompt] = max(left, 0) if ids else 0
    return room


def _written(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    room: Mapping[str, int],
    batch_tokens: int,
    choose: Callable[[Sequence[str]], Choose],
    chat: Chat | None = None,
) -> dict[str, str]:
    """What is written after each prompt; `choose` makes the rule of one batch."""
    tokens = dict(zip(room, _tokens(tokenizer, list(room), chat), strict=True))
    order = sorted((prompt for prompt in room if room[prompt]), key=lambda prompt: len(tokens[prompt]))
    written = dict.fromkeys(room, "")
    with reading(model):
        for part in cut([len(tokens[prompt]) + room[prompt] for prompt in order], batch_tokens):
            batch = order[part]
            rows = _continue(
                model, [tokens[prompt] for prompt in batch], [room[prompt] for prompt in batch], choose(batch)
            )
            texts = (str(tokenizer.decode(row, skip_special_tokens=True)) for row in rows)
            written.update(zip(batch, texts, strict=True))
    return written


def _tokens(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], chat: Chat | None) -> list[tuple[int, ...]]:
    """The tokens after which is written: the prompt's, in a chat those up to where the answer begins."""
    texts = prompts if chat is None else [chat.asking(prompt) for prompt in prompts]
    return [ids for ids, _ in tokenise(tokenizer, texts, special_tokens=chat is None)]


def _continue(
    model: PreTrainedModel, rows: Sequence[Sequence[int]], room: Sequence[int], choose: Choose
) -> list[list[int]]:
    """One batch: each row's new tokens, up to its end of text or its room. The prompts are read once, then one token at a time."""
    ends = _end_tokens(model)
    # Without a configuration sliding layers keep every position, and the mask does the sliding; recurrent ones need theirs.
    cache: Any = DynamicCache(config=model.config) if is_recurrent(model.config) else DynamicCache()
    last = context_length(model) - 1
    ids, mask, positions = left_padded(rows, model.device)
    written: list[list[int]] = [[] for _ in rows]
    going = set(range(len(rows)))
    for step in range(max(room)):
        logits = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        ids = choose(logits, step)[:, None].to(mask.device)
        tokens = ids[:, 0].tolist()
        going = {row for row in going if tokens[row] not in ends and step < room[row]}
        for row in going:
            written[row].append(tokens[row])
        if not going:
            break
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        positions = (mask.sum(1, keepdim=True) - 1).clamp(max=last)  # a row without room goes on, unheard
    return written


def _drawn(logits: Float[Tensor, "rows vocabulary"], draws: Float[Tensor, " rows"], top_k: int) -> Int[Tensor, " rows"]:
    """The token at which the cumulated probabilities of the top k reach each row's draw from [0, 1); in float64 on the CPU."""
    top = logits.double().cpu().topk(min(top_k, logits.shape[-1]))
    cumulated = top.values.softmax(-1).cumsum(-1)
    place = (cumulated < draws[:, None]).sum(-1).clamp(max=cumulated.shape[-1] - 1)
    return top.indices.gather(-1, place[:, None])[:, 0]


def _draws(prompt: str, seed: int, steps: int) -> Float[Tensor, " steps"]:
    digest = hashlib.sha256(f"{seed}\0{prompt}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.rand(steps, generator=generator, dtype=torch.float64)


def _end_tokens(model: PreTrainedModel) -> set[int]:
    ends = model.generation_config.eos_token_id if model.generation_config else None
    return set() if ends is None else {ends} if isinstance(ends, int) else set(ends)


BARE = SLOT
_CLAUSE = re.compile(r"[\n.,;:!?。、，；：！？]")


@dataclass(frozen=True)
class LiveReading:
    """What a model wrote after the prompts of one request, and the target that it was to write.

    None stands for a prompt that leaves no room to write.

    Attributes:
        continuations: after the request's prompt, bare and then in each context.
        paraphrases: after each of its other phrasings.
        negated: after the prompt with its verb denied; None also where that cannot be done.
        siblings: after each of its siblings' prompts.
    """

    request_id: str
    target: str
    continuations: tuple[str | None, ...]
    paraphrases: tuple[str | None, ...] = ()
    negated: str | None = None
    siblings: tuple[tuple[Sibling, str | None], ...] = ()


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


def live_scores(
    readings: Sequence[LiveReading],
    before: Sequence[LiveReading] = (),
    *,
    chat: bool = False,
    resamples: int = 1000,
    seed: int = 0,
) -> Scores:
    """What is said: live_efficacy, closure and negation after the bare prompt, live_paraphrase, and leak; in a chat also stopped.

    Beside them exact and contained, and their means over the contexts.

    Args:
        before: the base's readings of the same requests, without which there is no leak.
        chat: the texts are answers in a chat, where a target may stand anywhere.
    """
    columns = {**_spoken(readings, chat), **(_leaking(readings, before, chat) if before else {})}
    for name, matches in (("exact", begins_with), ("contained", contains)):
        found = [
            [None if text is None else float(matches(text, fact.target)) for text in fact.continuations]
            for fact in readings
        ]
        columns[name] = [row[0] for row in found]
        columns[f"{name}_in_context"] = [
            mean_or_none([value for value in row[1:] if value is not None]) for row in found
        ]
    combined = {"leak": Combined(("leaks", "siblings"), _ratio)}
    scores = scored("live", {}, columns, combined, resamples=resamples, seed=seed)
    estimates = {name: found for name, found in scores.estimates.items() if name not in combined["leak"].parts}
    return replace(scores, estimates=estimates)


def _spoken(readings: Sequence[LiveReading], chat: bool) -> dict[str, list[float | None]]:
    """The columns of what is said of the facts themselves."""

    def of(text: str | None, judged: Callable[[str, str], bool], target: str) -> float | None:
        return None if text is None else float(judged(text, target))

    def says(text: str, target: str) -> bool:
        return said(text, target, anywhere=chat)

    def ends(text: str, target: str) -> bool:
        return closed(text, target, anywhere=chat)

    def denies(text: str, target: str) -> bool:
        return not says(text, target)

    phrasings = [[of(text, says, fact.target) for text in fact.paraphrases] for fact in readings]
    columns = {
        "live_efficacy": [of(fact.continuations[0], says, fact.target) for fact in readings],
        "live_paraphrase": [mean_or_none([value for value in row if value is not None]) for row in phrasings],
        "closure": [of(fact.continuations[0], ends, fact.target) for fact in readings],
        "negation": [of(fact.negated, denies, fact.target) for fact in readings],
    }
    return columns | (
        {"stopped": [of(fact.continuations[0], stopped, fact.target) for fact in readings]} if chat else {}
    )


def _leaking(
    readings: Sequence[LiveReading], before: Sequence[LiveReading], chat: bool
) -> dict[str, list[float | None]]:
    """How many of each fact's siblings were read, and how many of them leak; None of a fact without siblings."""
    targets = frozenset(fact.target for fact in readings)
    counts: dict[str, list[float | None]] = {"leaks": [], "siblings": []}
    for fact, earlier in zip(readings, before, strict=True):
        pairs = zip(fact.siblings, earlier.siblings, strict=True)
        read = [
            leaks(sibling, now, then, targets, anywhere=chat) is not None
            for (sibling, now), (_, then) in pairs
            if now is not None and then is not None
        ]
        counts["leaks"].append(float(sum(read)) if read else None)
        counts["siblings"].append(float(len(read)) if read else None)
    return counts


def _ratio(means: NDArray[np.float64]) -> NDArray[np.float64]:
    """(..., 2) to (...)."""
    return np.asarray(means[..., 0] / means[..., 1])


def reads_right(text: str, target: str, *, closed: bool) -> bool:
    """Whether a continuation begins with a target and, under ``closed``, goes on as if the target had ended (`text.tokens.closes`)."""
    rest = after_target(text, target)
    return rest is not None and (not closed or closes(target, rest))


def first_clause(text: str) -> str:
    """What stands before the first punctuation or line break of a continuation: the answer, without what it goes on to say."""
    return _CLAUSE.split(text.strip(), maxsplit=1)[0].strip()


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
