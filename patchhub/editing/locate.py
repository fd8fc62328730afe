"""Where the subject and the target of a request lie among a text's tokens, for any fast tokenizer.

A text is tokenised once, as a whole: context, prompt and target together, as the model will read it. Positions are
read off the tokenizer's own character offsets, never off token strings, so byte-level BPE, SentencePiece-like and
word-level tokenizers, characters that are several tokens and tokens that span a boundary need no case of their own.
Special tokens that the tokenizer puts in front (`<s>`) stay; those that it puts at the end (`</s>`) are dropped,
because a text that goes on must not end. Inside a chat template (`chat`) the text spells out its special tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from patchhub.errors import RequestError, SettingsError
from patchhub.objects import SLOT, Request
from patchhub.text.tokens import Chat, Span, tokenise
from patchhub.text.word_ends import joiner


@dataclass(frozen=True)
class Marked:
    """A text and the characters that matter in it.

    Attributes:
        subject: its span.
        prompt_end: where what stands before the target ends.
        target_begin: where the target begins, behind what joins the two.
        opening: where the words of an answer begin that stand before its target; None: there are none.
    """

    text: str
    subject: Span
    prompt_end: int
    target_begin: int
    opening: int | None = None


@dataclass(frozen=True)
class Encoded:
    """A tokenised text: its ids, the index of the subject's last token, and the target's tokens [start, stop).

    Without a target the span is empty, at the end. ``opening`` are the tokens of the answer before the target.
    """

    input_ids: tuple[int, ...]
    subject_last: int
    target: Span
    opening: int = 0


@dataclass(frozen=True)
class EncodedTarget:
    """A tokenised prompt with its target: ids and the target's tokens [start, stop)."""

    input_ids: tuple[int, ...]
    target: Span


def mark(
    context: str, request: Request, *, with_target: bool = True, chat: Chat | None = None, opening: str = ""
) -> Marked:
    """The text of `request` inside `context`, and where its subject and prompt end.

    `context` has one `{}`, which the filled prompt replaces ("The reason was. {}"); the target follows as the script is written
    (`word_ends.joiner`). The subject is the one that fills the prompt's slot, wherever else its name occurs. In a chat the whole
    is the user's message, and the target is the answer, as the template joins them, or stands in it behind its ``opening``.
    """
    before, after = _split(context)
    head, tail = _split(request.prompt)
    target = request.target_new if with_target else ""
    return mark_text(f"{before}{head}", request.subject, f"{tail}{after}", target, chat=chat, opening=opening)


def mark_text(
    head: str, subject: str, tail: str, target: str = "", *, chat: Chat | None = None, opening: str = ""
) -> Marked:
    """The text ``head + subject + tail``, in a chat the user's message, and the target after it, if there is one.

    Args:
        opening: in a chat, the words of the answer before the target.
    """
    if chat is not None:
        head, tail = f"{chat.before}{head}", f"{tail}{chat.after}"
    asked = f"{head}{subject}{tail}"
    prompt = f"{asked}{opening}" if chat is not None else asked
    joint = joiner(prompt, target) if chat is None or opening else ""
    text = f"{prompt}{joint}{target}" if target else prompt
    span, begin = (len(head), len(head) + len(subject)), len(asked) if prompt != asked else None
    return Marked(text, span, len(prompt), len(prompt) + len(joint), begin)


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
    return Encoded(ids, last, target, target[0] - _begun(offsets, item) if item.opening is not None else 0)


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
    """The tokens that reach beyond the prompt: a token across the boundary belongs to the target."""
    text, start = item.text, len(offsets)
    while start and offsets[start - 1][1] > item.prompt_end:
        start -= 1
    if item.target_begin < len(text) and (start == len(offsets) or offsets[-1][1] <= item.target_begin):
        raise RequestError(
            f"the tokenizer gives no token to the target '{text[item.target_begin :]}' after '{text[: item.prompt_end]}'",
            remedy="write the target in characters that the model knows",
            text=text,
        )
    return start, len(offsets)
