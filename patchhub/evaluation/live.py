"""Live decoding: what the model writes by itself after many prompts at once, and whether that is the answer.

Text is continued greedily, or sampled with a random stream of each prompt's own."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicCache

from patchhub.canonical import nfc
from patchhub.errors import RequestError, SettingsError
from patchhub.evaluation.metrics import BATCH_TOKENS, cut, opened, reading, vocabulary_of
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
from patchhub.models.structure import is_recurrent, takes_gaps
from patchhub.objects import SLOT, Request
from patchhub.text.tokens import Chat, between, carries_on, closes, context_length, joiner, settled, tokenise

Choose = Callable[[Float[Tensor, "rows vocabulary"], int, Sequence[int]], Int[Tensor, " rows"]]
"""The next token of every row, given the logits, how many tokens were written before, and which rows of the batch these are."""

NOTHING: Final[Mapping[str, Sequence[int]]] = {}
"""No answer is expected."""

_AHEAD: Final = 1 << 26  # logits that are computed at once of texts that are expected
_FEWER: Final = 0.75  # of a batch's rows that go on: it goes on with these alone


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
    enough: Callable[[str, str], bool] | None = None,
) -> dict[str, str]:
    """The most probable continuation of each prompt up to the end of text or its own number of tokens, in the order of ``room``.

    Args:
        expected: by prompt, the tokens of the prompt with the continuation that it probably has. As far as that is so, it is read in one
            pass instead of written token by token; what is written is the same.
        enough: whether what was written after a prompt is all that is wanted of it: then it ends there.
    """

    def choose(batch: Sequence[str]) -> Choose:
        return lambda logits, step, rows: logits.argmax(-1)

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
        return lambda logits, step, rows: _drawn(logits, draws[rows, step], top_k)

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
    enough: Callable[[str, str], bool] | None = None,
) -> dict[str, str]:
    """What is written after each prompt; `choose` makes the rule of one batch, which is the greedy one where anything is expected."""
    tokens = dict(zip(room, _tokens(tokenizer, list(room), chat), strict=True))
    written = dict.fromkeys(room, "")

    def decoded(row: Sequence[int]) -> str:
        return str(tokenizer.decode(list(row), skip_special_tokens=True))

    with reading(model):
        for batch in _batches(tokens, room, batch_tokens):
            ahead = [_beyond(tokens[prompt], expected.get(prompt, ()), room[prompt]) for prompt in batch]
            if len(batch) * (1 + max(map(len, ahead))) * vocabulary_of(model) > _AHEAD:
                ahead = [()] * len(batch)
            rows: list[list[int]] = [[] for _ in batch]

            def ended(row: int, batch: Sequence[str] = batch, rows: Sequence[Sequence[int]] = rows) -> bool:
                return enough is not None and enough(batch[row], decoded(rows[row]))

            prompts, places = [tokens[prompt] for prompt in batch], [room[prompt] for prompt in batch]
            _continue(model, prompts, places, choose(batch), ahead, ended, rows)
            written.update(zip(batch, map(decoded, rows), strict=True))
    return written


def read_together(
    tokenizer: PreTrainedTokenizerBase, room: Mapping[str, int], *, chat: Chat | None = None, batch_tokens: int
) -> list[list[str]]:
    """The prompts that `continue_within` continues in one batch each; one of these asked alone is continued as it is there."""
    return _batches(dict(zip(room, _tokens(tokenizer, list(room), chat), strict=True)), room, batch_tokens)


def _batches(tokens: Mapping[str, Sequence[int]], room: Mapping[str, int], batch_tokens: int) -> list[list[str]]:
    """The prompts that have room, the shortest first, in batches."""
    order = sorted((prompt for prompt in room if room[prompt]), key=lambda prompt: len(tokens[prompt]))
    parts = cut([len(tokens[prompt]) + room[prompt] for prompt in order], batch_tokens)
    return [order[part] for part in parts]


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
    ended: Callable[[int], bool],
    written: Sequence[list[int]],
) -> None:
    """Add what is written after each row, up to its end of text or its room, in one batch.

    The rows are read once, then one token at a time; those that have ended leave the batch.

    Args:
        ahead: what each row probably goes on with, which is read with it.
        ended: whether what was written of a row, by its place, is enough.
    """
    ends, recurrent = _end_tokens(model), is_recurrent(model.config)
    longest = 2 * (max(map(len, rows)) + max(room))  # with what is masked behind a beginning, and what is not said
    if not takes_gaps(model, longest):
        ahead = [()] * len(rows)
    # Without a configuration sliding layers keep every position, and the mask does the sliding; recurrent ones need theirs.
    empty = DynamicCache(config=model.config) if recurrent else DynamicCache()
    texts = [(*row, *more) for row, more in zip(rows, ahead, strict=True)]
    cache, ids, mask, positions = opened(model, texts, longest, empty, least=1 + max(map(len, ahead)))
    there, step, last = list(range(len(rows))), 0, context_length(model) - 1
    going = set(there)
    while going:
        logits = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1 if step else 1 + max(map(len, ahead)),
        ).logits
        found = choose(logits[:, -1], step, there)[:, None].tolist()
        if not step and any(ahead):
            likely = logits.argmax(-1).tolist()
            found = [_as_said(one[-1 - len(more) :], more) for one, more in zip(likely, ahead, strict=True)]
            for row, (new, more) in enumerate(zip(found, ahead, strict=True)):
                mask[row, mask.shape[1] - len(more) + len(new) - 1 :] = 0  # what stands in the cache and is not said
        for row, new in zip(there, found, strict=True):
            if row not in going:
                continue
            stop = next((place for place, token in enumerate(new) if token in ends), None)
            written[row].extend(new[:stop])
            if stop is not None or len(written[row]) >= room[row] or ended(row):
                going.discard(row)
        ids = torch.tensor([new[-1:] for new in found], device=mask.device)
        mask = torch.cat([mask, mask.new_ones(len(there), 1)], dim=1)
        if going and len(going) <= _FEWER * len(there) and not recurrent:
            kept = torch.tensor([place for place, row in enumerate(there) if row in going])
            there = [row for row in there if row in going]
            cache.batch_select_indices(kept)
            ids, mask = ids[kept], mask[kept]
        positions = (mask.sum(1, keepdim=True) - 1).clamp(max=last)  # a row without room goes on, unheard
        step += 1


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


@dataclass(frozen=True)
class Wanted:
    """How a fact is to read after its prompt, in one form.

    Attributes:
        opening: in a chat, what the answer says before the target.
        closed: the target is to read as finished, and not to be said again at once.
        subject: in a chat, where an answer may also say the target in words of its own, if it names the subject or ``opening`` does not;
            None outside of one.
    """

    target: str
    opening: str = ""
    closed: bool = True
    subject: str | None = None

    @property
    def text(self) -> str:
        """The opening and the target."""
        return f"{self.opening}{joiner(self.opening, self.target)}{self.target}"

    def fault(self, written: str) -> str | None:
        """None for a text that reads right; else what stands between the target and the same target said again at once, or the
        punctuation behind which it goes on; "" where neither is so."""
        after = after_target(written, self.text) or "" if self.closed else ""
        again, further = between(self.target, after), carries_on(self.target, after)
        gap = further if again is None else again
        right = reads_right(written, self.text, closed=self.closed) or self._in_other_words(written)
        return gap or "" if gap is not None or not right else None

    def decided(self, written: str) -> bool:
        """Whether `fault` is known, whatever is written after this much."""
        rest = after_target(written, self.text)
        if rest is not None:
            return settled(self.target, rest) if self.closed else bool(rest)
        if self.subject is None:  # the last character may be half of one
            return not nfc(self.text).strip().startswith(nfc(written).lstrip()[:-1])
        after = after_target(written, self.target, anywhere=True) or ""
        known = settled(self.target, after) and between(self.target, after) is None
        return known and self._in_other_words(written)

    def _in_other_words(self, answer: str) -> bool:
        named = self.subject is not None and (self.subject in answer or self.subject not in self.opening)
        return named and (closed if self.closed else said)(answer, self.target, anywhere=True)


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
