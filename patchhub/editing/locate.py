"""Where subject and target lie among a text's tokens, and where a target belongs in the answer that a base gives in a chat.

A text is tokenised once, as a whole: context, prompt and target together, as the model will read it. Positions are
read off the tokenizer's own character offsets, never off token strings, so byte-level BPE, SentencePiece-like and
word-level tokenizers, characters that are several tokens and tokens that span a boundary need no case of their own.
Special tokens that the tokenizer puts in front (`<s>`) stay; those that it puts at the end (`</s>`) are dropped,
because a text that goes on must not end. Inside a chat template (`chat`) the text spells out its special tokens.

In a chat a base answers in sentences of its own ("The capital of Kazakhstan is Almaty."), and an edit reads right where the target takes
the place of the object and everything before it stays. The *opening* is what the answer says before that place. A record may give the
answer; otherwise the places of the base's answer are compared, and, where the prompt is no question, the prompt said once more."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from patchhub.errors import RequestError, SettingsError
from patchhub.models.tracing import Stack, right_padded
from patchhub.objects import SLOT, Request
from patchhub.text.tokens import Chat, Span, context_length, joiner, tokenise


@dataclass(frozen=True)
class Marked:
    """A text and the characters that matter in it.

    Attributes:
        subject: its span.
        prompt_end: where what stands before the target ends.
        target_begin: where the target begins, behind what joins the two.
        opening: where the words of an answer begin that stand before its target; None: there are none.
        target_end: where the target ends; None: where the text does.
    """

    text: str
    subject: Span
    prompt_end: int
    target_begin: int
    opening: int | None = None
    target_end: int | None = None


@dataclass(frozen=True)
class Encoded:
    """A tokenised text: its ids, the index of the subject's last token, and the target's tokens [start, stop).

    Without a target the span is empty, at the end. ``opening`` are the tokens of the answer before the target, ``after`` those behind it,
    where the target must not be said again.
    """

    input_ids: tuple[int, ...]
    subject_last: int
    target: Span
    opening: int = 0
    after: int = 0


@dataclass(frozen=True)
class EncodedTarget:
    """A tokenised prompt with its target: ids and the target's tokens [start, stop)."""

    input_ids: tuple[int, ...]
    target: Span


def mark(
    context: str,
    request: Request,
    *,
    with_target: bool = True,
    chat: Chat | None = None,
    opening: str = "",
    after: str = "",
) -> Marked:
    """The text of `request` inside `context`, and where its subject and prompt end.

    `context` has one `{}`, which the filled prompt replaces ("The reason was. {}"); the target follows as the script is written
    (`text.tokens.joiner`). The subject is the one that fills the prompt's slot, wherever else its name occurs. In a chat the whole
    is the user's message, and the target is the answer, as the template joins them, or stands in it behind its ``opening``.
    ``after`` stands behind the target.
    """
    before, rest = _split(context)
    head, tail = _split(request.prompt)
    target = request.target_new if with_target else ""
    return mark_text(
        f"{before}{head}", request.subject, f"{tail}{rest}", target, chat=chat, opening=opening, after=after
    )


def mark_text(
    head: str,
    subject: str,
    tail: str,
    target: str = "",
    *,
    chat: Chat | None = None,
    opening: str = "",
    after: str = "",
) -> Marked:
    """The text ``head + subject + tail``, in a chat the user's message, and the target after it, if there is one.

    Args:
        opening: in a chat, the words of the answer before the target.
        after: what stands behind the target.
    """
    if chat is not None:
        head, tail = f"{chat.before}{head}", f"{tail}{chat.after}"
    asked = f"{head}{subject}{tail}"
    prompt = f"{asked}{opening}" if chat is not None else asked
    joint = joiner(prompt, target) if chat is None or opening else ""
    text = f"{prompt}{joint}{target}{after}" if target else prompt
    span, begin = (len(head), len(head) + len(subject)), len(asked) if prompt != asked else None
    end = len(text) - len(after) if target and after else None
    return Marked(text, span, len(prompt), len(prompt) + len(joint), begin, end)


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase,
    pairs: Iterable[tuple[str, Request]],
    *,
    with_target: bool = True,
    chat: Chat | None = None,
) -> list[Encoded]:
    """Encode (context, request) pairs in one tokenizer call.

    Raises:
        UnsupportedModelError: the tokenizer gives no character offsets.
        RequestError: a subject or target has no token of its own.
    """
    marked = [mark(context, request, with_target=with_target, chat=chat) for context, request in pairs]
    return encode_marked(tokenizer, marked, chat=chat)


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    context: str,
    request: Request,
    *,
    with_target: bool = True,
    chat: Chat | None = None,
) -> Encoded:
    """`encode_prompts` for one pair."""
    return encode_prompts(tokenizer, [(context, request)], with_target=with_target, chat=chat)[0]


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str, subject: Span, *, chat: Chat | None = None) -> Encoded:
    """Encode any text with a subject at the given characters and no target, such as "{} is a" filled in.

    In a chat the text is the user's message, and the tokens end where the answer begins.
    """
    if chat is not None:
        begin = len(chat.before)
        text, subject = chat.asking(text), (begin + subject[0], begin + subject[1])
    return encode_marked(tokenizer, [Marked(text, subject, len(text), len(text))], chat=chat)[0]


def encode_marked(
    tokenizer: PreTrainedTokenizerBase, marked: Sequence[Marked], *, chat: Chat | None = None
) -> list[Encoded]:
    """Encode marked texts in one tokenizer call; errors as in `encode_prompts`."""
    tokenised = tokenise(tokenizer, [item.text for item in marked], special_tokens=chat is None)
    return [_encoded(ids, offsets, item) for item, (ids, offsets) in zip(marked, tokenised, strict=True)]


def encode_targets(
    tokenizer: PreTrainedTokenizerBase,
    pairs: Iterable[tuple[str, str]],
    *,
    chat: Chat | None = None,
    openings: Sequence[str] | None = None,
) -> list[EncodedTarget]:
    """Encode (prompt, target) pairs, joined as `mark_text` does, in one tokenizer call; errors as in `encode_prompts`.

    Args:
        openings: in a chat, what each answer says before its target.
    """
    pairs = list(pairs)
    said = openings if openings is not None else [""] * len(pairs)
    marked = [
        mark_text(prompt, "", "", target, chat=chat, opening=opening)
        for (prompt, target), opening in zip(pairs, said, strict=True)
    ]
    tokenised = tokenise(tokenizer, [item.text for item in marked], special_tokens=chat is None)
    return [EncodedTarget(ids, _target(offsets, item)) for item, (ids, offsets) in zip(marked, tokenised, strict=True)]


def _split(template: str) -> tuple[str, str]:
    parts = template.split(SLOT)
    if len(parts) != 2:
        raise SettingsError(
            f"the template '{template}' contains {SLOT} {len(parts) - 1} times",
            remedy=f"mark one place with {SLOT}",
            template=template,
        )
    return parts[0], parts[1]


def _encoded(ids: tuple[int, ...], offsets: Sequence[Span], item: Marked) -> Encoded:
    last, target = _subject_last(offsets, item), _target(offsets, item)
    if last >= target[0]:
        start, stop = item.subject
        raise RequestError(
            f"one token holds the end of the subject '{item.text[start:stop]}' and the beginning of the target "
            f"'{item.text[item.target_begin :]}'",
            remedy="Put a word between the subject and the target.",
            text=item.text,
        )
    opening = target[0] - _begun(offsets, item) if item.opening is not None else 0
    return Encoded(ids, last, target, opening, len(ids) - target[1])


def _begun(offsets: Sequence[Span], item: Marked) -> int:
    """The first token that reaches into the answer's opening."""
    return next(index for index, (_, end) in enumerate(offsets) if end > (item.opening or 0))


def _subject_last(offsets: Sequence[Span], item: Marked) -> int:
    """The last token that covers a character of the subject."""
    start, stop = item.subject
    for index in range(len(offsets) - 1, -1, -1):
        if offsets[index][0] < stop and offsets[index][1] > start:
            return index
    raise RequestError(
        f"the tokenizer gives no token to the subject '{item.text[start:stop]}' in '{item.text}'",
        remedy="write the subject in characters that the model knows",
        text=item.text,
    )


def _target(offsets: Sequence[Span], item: Marked) -> Span:
    """The tokens that reach beyond the prompt, up to the target's end: a token across a boundary belongs to the target."""
    text, stop = item.text, len(offsets)
    if item.target_end is not None:
        stop = next((index for index, (begin, _) in enumerate(offsets) if begin >= item.target_end), stop)
    start = stop
    while start and offsets[start - 1][1] > item.prompt_end:
        start -= 1
    if item.target_begin < len(text) and (start == stop or offsets[stop - 1][1] <= item.target_begin):
        raise RequestError(
            f"the tokenizer gives no token to the target '{text[item.target_begin :]}' after '{text[: item.prompt_end]}'",
            remedy="write the target in characters that the model knows",
            text=text,
        )
    return start, stop


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


def has_sentence(answer: str) -> bool:
    """Whether an answer that goes on has a whole first sentence: so much of it is read for a place."""
    said = answer.strip()
    first = _first_sentence(said)
    return bool(first) and len(first) < len(said)


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
    begun = [_reaching(offsets, len(front)) for front, (_, offsets) in zip(fronts, read, strict=True)]
    for number, log_probs in _read_from(stack, [ids for ids, _ in read], begun):
        own, begin = read[number][0], begun[number]
        for place, wanted, spans in of_text.get(number, []):
            start = _reaching(spans, len(fronts[number]) + len(place.opening))
            if not begin <= start < len(wanted) or own[:start] != wanted[:start]:
                continue
            said = sum(float(log_probs[at - begin, own[at]]) for at in range(begin, start))
            score = float(log_probs[start - begin, wanted[start]]) + _OF_THE_PROMPT * place.shared
            yield texts[number][0], place, score + _OPENING * said + place.gain


def _read_from(
    stack: Stack, texts: Sequence[tuple[int, ...]], begun: Sequence[int]
) -> Iterator[tuple[int, Float[Tensor, "places vocabulary"]]]:
    """The place of each text that the model can read, with the log-probabilities of its tokens from ``begun`` on and of what follows.

    What all texts have in front is run once.
    """
    limit = context_length(stack.model)
    front = 0 if stack.architecture.recurrent else _in_common(texts, begun)
    with stack.fast():
        prefix = None
        if front:
            ids, mask, positions = right_padded([texts[0][:front]], stack.device)
            prefix = stack.read_prefix(ids, mask, positions)
        for batch in _batches([len(ids) - front for ids in texts], limit - front):
            padded, mask, positions = right_padded([texts[number][front:] for number in batch], stack.device)
            first = None if prefix is None else prefix.select(torch.zeros(len(batch), dtype=torch.long))
            mask = torch.cat([mask.new_ones(len(batch), front), mask], dim=1)
            start = stack.begin(padded, mask, positions + front, first)
            hidden = start.run(start.hidden, 0, len(stack.blocks))
            for row, number in enumerate(batch):
                if not begun[number]:
                    continue  # nothing stands before its first token
                wanted = hidden[row, begun[number] - 1 - front : len(texts[number]) - front]
                yield number, stack.logits(wanted).float().log_softmax(-1)


def _in_common(texts: Sequence[tuple[int, ...]], begun: Sequence[int]) -> int:
    """How many tokens all texts have in front, before the last one that each is read after."""
    most = min(begun, default=1) - 1
    return next((place for place in range(most) if len({text[place] for text in texts}) > 1), max(most, 0))


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
