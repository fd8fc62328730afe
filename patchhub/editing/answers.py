"""Where a target belongs in the answer that a base gives in a chat: behind which of its words.

In a chat a base answers in sentences of its own ("The capital of Kazakhstan is Almaty."), and an edit reads right where the target takes
the place of the object and everything before it stays. The *opening* is what the answer says before that place. A record may give the
answer; otherwise the places of the base's answer are compared, and, where the prompt is no question, the prompt said once more."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from transformers import PreTrainedTokenizerBase

from patchhub.models.tracing import Stack, right_padded
from patchhub.objects import Request
from patchhub.text.tokens import Chat, Span, context_length, tokenise
from patchhub.text.word_ends import joiner

ANSWER_TOKENS: Final = 32
"""Of the base's answer, in which the place is looked for."""

_TOKENS: Final = 512  # positions of a batch, whose logits are all computed
_SENTENCE: Final = re.compile(r"[^\n]*?(?:[.!?](?=\s|$)|[。！？]|\n|$)")
_WORD: Final = re.compile(r"\w+")
_QUESTION: Final = ("?", "？", "؟")
_BRACKETS: Final = "([{（「『«"

# Nats that a place gains; measured on SmolLM2-135M (docs/methods.md).
_OF_THE_PROMPT: Final = 4.0  # its opening has all words of the prompt
_KNOWN: Final = 4.0  # the true answer stands there, or the prompt itself is said before it
_OPENING: Final = 0.4  # for each nat by which the base favours its opening
_LEAST_SHARED: Final = 0.3  # of the prompt's words
_LEAST: Final = -11.0


@dataclass(frozen=True)
class _Place:
    """One place that a target may have: behind which words, how many of the prompt's words are among them, and what it gains."""

    opening: str
    shared: float
    gain: float


@torch.no_grad()
def find_openings(
    stack: Stack, tokenizer: PreTrainedTokenizerBase, asked: Sequence[tuple[Request, str]], chat: Chat
) -> dict[str, str]:
    """The openings of those requests that have one, by request id.

    A place is the better, the more probable the target's first token is there (nats), the more of the prompt's words its opening has, and
    the more probable the opening itself is; the place of the true answer gains, and so does the prompt where it is no question. What is
    too improbable, or shares hardly a word with the prompt, is no place.

    Args:
        asked: each request with what the model answers to its prompt in the chat.
    """
    texts: list[tuple[Request, str, list[_Place]]] = []
    for request, answer in asked:
        said = _first_sentence(answer)
        texts.append((request, said, list(_places(request, said))))
        if not request.text.endswith(_QUESTION):
            texts.append((request, request.text, [_Place(request.text, 1.0, _KNOWN)]))
    best: dict[str, tuple[float, str]] = {}
    for request, place, score in _scored(stack, tokenizer, texts, chat):
        if place.shared >= _LEAST_SHARED and score >= best.get(request.id, (_LEAST, ""))[0]:
            best[request.id] = (score, place.opening)
    return {request: opening for request, (_, opening) in best.items()}


def _first_sentence(answer: str) -> str:
    found = _SENTENCE.match(answer.strip())
    return found.group().rstrip() if found else ""


def _places(request: Request, said: str) -> Iterator[_Place]:
    """The beginnings of words in an answer, but its first; none inside the subject's name or right after a bracket."""
    known, words = _true_place(request, said), _words(request.text)
    named = said.find(request.subject)
    inside = range(named + 1, named + len(request.subject)) if named >= 0 else range(0)
    for place in range(1, len(said)):
        if said[place].isspace() or joiner(said[:place], said[place:]) or place in inside:
            continue
        opening = said[:place].rstrip(" ")
        if opening[-1:] in _BRACKETS:
            continue
        shared = len(words & _words(opening)) / len(words) if words else 1.0
        yield _Place(opening, shared, _KNOWN if place == known else 0.0)


def _true_place(request: Request, said: str) -> int | None:
    """Where the true answer stands in an answer, with the names in front of it ("William Shakespeare"); not inside the subject's name."""
    true, named = request.target_true, said.find(request.subject)
    if not true:
        return None
    for found in re.finditer(rf"(?<!\w){re.escape(true)}(?!\w)", said):
        place = found.start()
        if named <= place < named + len(request.subject):
            continue
        while (before := re.search(r"(?<=\s)([A-Z][\w.'-]*) $", said[:place])) and before.start() >= named + len(
            request.subject
        ):
            place = before.start()
        return place
    return None


def _words(text: str) -> frozenset[str]:
    return frozenset(_WORD.findall(text.casefold()))


def _scored(
    stack: Stack,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[tuple[Request, str, Sequence[_Place]]],
    chat: Chat,
) -> Iterator[tuple[Request, _Place, float]]:
    """Each place with its score. Every text is read once, and its places are read off that, as far as they are tokens' borders."""
    fronts = [chat.around(request.text) for request, _, _ in texts]
    read = tokenise(
        tokenizer, [front + said for front, (_, said, _) in zip(fronts, texts, strict=True)], special_tokens=False
    )
    places = [(number, place) for number, (_, _, found) in enumerate(texts) for place in found]
    whole = [
        f"{fronts[n]}{place.opening}{joiner(place.opening, texts[n][0].target_new)}{texts[n][0].target_new}"
        for n, place in places
    ]
    of_text: dict[int, list[tuple[_Place, tuple[int, ...], Sequence[Span]]]] = {}
    for (number, place), (ids, offsets) in zip(places, tokenise(tokenizer, whole, special_tokens=False), strict=True):
        of_text.setdefault(number, []).append((place, ids, offsets))
    for batch in _batches([len(ids) for ids, _ in read], context_length(stack.model)):
        padded, mask, positions = right_padded([read[number][0] for number in batch], stack.device)
        logits = stack.model(input_ids=padded, attention_mask=mask, position_ids=positions, use_cache=False).logits
        for row, number in enumerate(batch):
            log_probs, (own, offsets) = logits[row].float().log_softmax(-1), read[number]
            begun = _reaching(offsets, len(fronts[number]))
            for place, wanted, spans in of_text.get(number, []):
                start = _reaching(spans, len(fronts[number]) + len(place.opening))
                if not 0 < start < len(wanted) or own[:start] != wanted[:start]:
                    continue
                said = sum(float(log_probs[at - 1, own[at]]) for at in range(begun, start))
                score = float(log_probs[start - 1, wanted[start]]) + _OF_THE_PROMPT * place.shared
                yield texts[number][0], place, score + _OPENING * said + place.gain


def _reaching(offsets: Sequence[Span], character: int) -> int:
    """The first token that reaches beyond a character; the number of tokens where none does."""
    return next((index for index, (_, end) in enumerate(offsets) if end > character), len(offsets))


def _batches(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Texts of similar length together, without those that are longer than the model reads."""
    groups: list[list[int]] = []
    fitting = [number for number, length in enumerate(lengths) if length <= limit]
    for number in sorted(fitting, key=lambda number: lengths[number]):
        if not groups or (len(groups[-1]) + 1) * lengths[number] > _TOKENS:
            groups.append([])
        groups[-1].append(number)
    return groups
