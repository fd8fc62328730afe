"""Live decoding: what the model writes by itself after many prompts at once, and whether that is the answer.

Text is continued greedily, or sampled with a random stream of each prompt's own."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicCache

from patchhub.errors import RequestError, SettingsError
from patchhub.evaluation.metrics import BATCH_TOKENS, cut, reading, vocabulary_of
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

NOTHING: Final[Mapping[str, Sequence[int]]] = {}
"""No answer is expected."""

_AHEAD: Final = 1 << 26  # logits that are computed at once of texts that are expected


def continue_greedily(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    chat: Chat | None = None,
    max_new_tokens: int = 32,
    batch_tokens: int = BATCH_TOKENS,
    expected: Mapping[str, Sequence[int]] = NOTHING,
) -> list[str]:
    """The most probable continuation of each prompt, token by token, up to the end of text or `max_new_tokens`.

    The model's own sampling settings are not used. Equal prompts are continued once.

    Args:
        chat: the prompts are the user's messages of this chat form; what is written is the answer.
        expected: as in `continue_within`.

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
    written = continue_within(model, tokenizer, room, chat=chat, batch_tokens=batch_tokens, expected=expected)
    return [written[prompt] for prompt in prompts]


def continue_within(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    room: Mapping[str, int],
    *,
    chat: Chat | None = None,
    batch_tokens: int = BATCH_TOKENS,
    expected: Mapping[str, Sequence[int]] = NOTHING,
    enough: Callable[[str], bool] | None = None,
) -> dict[str, str]:
    """The most probable continuation of each prompt up to the end of text or its own number of tokens, in the order of ``room``.

    Args:
        expected: by prompt, the tokens of the prompt with the continuation that it probably has. As far as that is so, it is read in one
            pass instead of written token by token; what is written is the same.
        enough: whether what was written of a continuation is all that is wanted of it: then it ends there.
    """

    def choose(batch: Sequence[str]) -> Choose:
        return lambda logits, step: logits.argmax(-1)

    return _written(model, tokenizer, room, batch_tokens, choose, chat, expected=expected, enough=enough)


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
    *,
    expected: Mapping[str, Sequence[int]] = NOTHING,
    enough: Callable[[str], bool] | None = None,
) -> dict[str, str]:
    """What is written after each prompt; `choose` makes the rule of one batch, which is the greedy one where anything is expected."""
    tokens = dict(zip(room, _tokens(tokenizer, list(room), chat), strict=True))
    order = sorted((prompt for prompt in room if room[prompt]), key=lambda prompt: len(tokens[prompt]))
    written = dict.fromkeys(room, "")

    def decoded(row: Sequence[int]) -> str:
        return str(tokenizer.decode(list(row), skip_special_tokens=True))

    def ended(row: Sequence[int]) -> bool:
        return enough is not None and enough(decoded(row))

    with reading(model):
        for part in cut([len(tokens[prompt]) + room[prompt] for prompt in order], batch_tokens):
            batch = order[part]
            ahead = [_beyond(tokens[prompt], expected.get(prompt, ()), room[prompt]) for prompt in batch]
            if len(batch) * (1 + max(map(len, ahead))) * vocabulary_of(model) > _AHEAD:
                ahead = [()] * len(batch)
            rows: list[list[int]] = [[] for _ in batch]
            prompts, places = [tokens[prompt] for prompt in batch], [room[prompt] for prompt in batch]
            _continue(model, prompts, places, choose(batch), ahead, ended, rows)
            written.update(zip(batch, map(decoded, rows), strict=True))
    return written


def _beyond(prompt: Sequence[int], whole: Sequence[int], room: int) -> Sequence[int]:
    """What a text has after its prompt, if it begins with it; one token less than there is room for, which the same pass gives."""
    front = len(prompt)
    return tuple(whole[front : front + room - 1]) if tuple(whole[:front]) == tuple(prompt) else ()


def _tokens(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], chat: Chat | None) -> list[tuple[int, ...]]:
    """The tokens after which is written: the prompt's, in a chat those up to where the answer begins."""
    texts = prompts if chat is None else [chat.asking(prompt) for prompt in prompts]
    return [ids for ids, _ in tokenise(tokenizer, texts, special_tokens=chat is None)]


def _continue(
    model: PreTrainedModel,
    rows: Sequence[Sequence[int]],
    room: Sequence[int],
    choose: Choose,
    ahead: Sequence[Sequence[int]],
    ended: Callable[[Sequence[int]], bool],
    written: Sequence[list[int]],
) -> None:
    """Add each row's new tokens to what was written of it, up to its end of text or its room, in one batch.

    The rows are read once, then one token at a time.

    Args:
        ahead: what each row probably goes on with, which is read with it; a row that goes on otherwise is read anew from there.
        ended: whether what was written of a row is enough.
    """
    ends, front = _end_tokens(model), max(map(len, ahead))
    # Without a configuration sliding layers keep every position, and the mask does the sliding; recurrent ones need theirs.
    cache: Any = DynamicCache(config=model.config) if is_recurrent(model.config) else DynamicCache()
    last = context_length(model) - 1
    texts = ([*row, *new, *more] for row, new, more in zip(rows, written, ahead, strict=True))
    ids, mask, positions = left_padded(list(texts), model.device)
    going, astray, step = set(range(len(rows))), list[int](), 0
    while going:
        logits = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1 if step else 1 + front,
        ).logits
        ids = choose(logits[:, -1], step)[:, None].to(mask.device)
        found = ids.tolist()
        if front and not step:
            likely = logits.argmax(-1).tolist()
            found = [_as_said(one[front - len(more) :], more) for one, more in zip(likely, ahead, strict=True)]
        for row in sorted(going):
            stop = next((place for place, token in enumerate(found[row]) if token in ends), None)
            written[row].extend(found[row][:stop])
            if stop is not None or len(written[row]) >= room[row] or ended(written[row]):
                going.discard(row)
            elif not step and len(found[row]) <= len(ahead[row]):  # what it has not said stands in the cache
                going.discard(row)
                astray.append(row)
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        positions = (mask.sum(1, keepdim=True) - 1).clamp(max=last)  # a row without room goes on, unheard
        step += 1
    if astray:
        some = ([rows[row] for row in astray], [room[row] for row in astray])
        _continue(model, *some, choose, [()] * len(astray), ended, [written[row] for row in astray])


def _as_said(said: Sequence[int], ahead: Sequence[int]) -> list[int]:
    """Of the most probable tokens after each of those ahead, what is written: up to the first that is another, or all of them."""
    same = next((place for place, (a, b) in enumerate(zip(said, ahead, strict=False)) if a != b), len(ahead))
    return list(said[: same + 1])


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
