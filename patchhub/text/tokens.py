"""Texts as tokens: the tokenizer of a base, how long a text may be, the base's chat form, and where a word ends.

The tokenizer is loaded from the base's folder alone. The chat form is what the base's chat template puts around a user's message, up to
where the answer begins.

How a target is joined to what stands before it, and what may follow it so that it reads as finished, are read off the characters that meet.
Most scripts put a space between words; Chinese, Japanese, Thai and a few others do not, and there a following character of another script,
or one of the characters that only link words, says that a word has ended."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from jaxtyping import Bool
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from patchhub.errors import BaseError, RequestError, SettingsError, UnsupportedModelError
from patchhub.models.checkpoint import Checkpoint
from patchhub.objects import SLOT

_FAST: Final = "tokenizer.json"
_VOCABULARIES: Final = ("*.model", "*.tiktoken", "vocab.json", "vocab.txt", "tekken.json")
_CONFIG: Final = "tokenizer_config.json"
_REMEDY: Final = (
    "Copy the tokenizer's files (tokenizer.json, say, and a tokenizer_config.json that names a class of transformers) "
    "into the model's folder."
)


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """The tokenizer in a checkpoint's folder.

    Raises:
        BaseError: there is none, or its files cannot be read as one.
    """
    lacking = lacks_tokenizer(checkpoint.folder, thorough=False)
    if lacking is not None:
        raise _refuse(checkpoint, lacking)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            checkpoint.folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # the formats are many, and so are the ways in which their readers fail
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        lacking = lacks_tokenizer(checkpoint.folder) or f"a tokenizer that cannot be read ({reason})"
        raise _refuse(checkpoint, lacking) from error
    return tokenizer


def lacks_tokenizer(folder: Path, *, thorough: bool = True) -> str | None:
    """What is wrong with a folder's tokenizer as far as its files tell, in words that follow "has"; None: nothing.

    Args:
        thorough: read all of tokenizer.json, which may be large, as JSON.
    """
    if _is_code(folder / _CONFIG):
        return "a tokenizer that is Python code of its own, which patchhub never runs"
    fast = folder / _FAST
    if fast.is_file():
        return None if not thorough or _is_json(fast) else f"a {_FAST} that is not valid JSON"
    found = any(next(folder.glob(pattern), None) for pattern in _VOCABULARIES)
    return None if found else "no tokenizer"


def _is_code(config: Path) -> bool:
    """Whether a tokenizer's configuration names code of the folder, or of the Hub, for a class that transformers does not have."""
    try:
        fields = json.loads(config.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False  # it is missing, or reading the tokenizer tells what is wrong with it
    if not isinstance(fields, dict) or not fields.get("auto_map"):
        return False
    return getattr(transformers, str(fields.get("tokenizer_class")), None) is None


def _is_json(file: Path) -> bool:
    try:
        return isinstance(json.loads(file.read_bytes()), dict)
    except (OSError, ValueError, RecursionError):
        return False


def _refuse(checkpoint: Checkpoint, what: str) -> BaseError:
    folder = str(checkpoint.folder)
    return BaseError(f"the model folder {folder} has {what}", remedy=_REMEDY, folder=folder)


_QUOTED: Final = 60  # characters of a long text that a message shows


def context_length(model: PreTrainedModel) -> int:
    """The number of positions that the model reads; a large number where its configuration sets no limit."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else 2**31


def refuse_unknown(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: Iterable[int], text: str) -> None:
    """Refuse token ids that the model has no embedding for: the tokenizer has learned words that the model has not.

    Raises:
        RequestError: there is one; it names the token.
    """
    embeddings: Any = model.get_input_embeddings()
    rows = int(embeddings.weight.shape[0])
    unknown = next((token for token in ids if token >= rows), None)
    if unknown is not None:
        raise RequestError(
            f"'{beginning(text)}' holds the token {tokenizer.convert_ids_to_tokens(unknown)!r}, which the model has no embedding for",
            remedy="Write it in other words, or give the model's own tokenizer.",
            token=unknown,
        )


def beginning(text: str) -> str:
    """A text as a message quotes it: whole where it is short, else its first words."""
    if len(text) <= _QUOTED:
        return text
    return text[:_QUOTED].rsplit(" ", 1)[0] + " ..."


def check_lengths(texts: Iterable[tuple[str, int]], limit: int) -> None:
    """Refuse texts, given with their numbers of tokens, that are longer than the model reads.

    Raises:
        RequestError: there is one.
    """
    for text, count in texts:
        if count > limit:
            raise too_long(text, count, limit)


def too_long(text: str, count: int, limit: int) -> RequestError:
    """The error that a text has more tokens than the model reads."""
    return RequestError(
        f"'{beginning(text)}' has {count:,} tokens, and the model reads up to {limit:,}",
        remedy="Shorten the prompt, the subject or the target.",
        text=beginning(text),
        tokens=count,
        limit=limit,
    )


Span = tuple[int, int]


def tokenise(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, special_tokens: bool = True
) -> list[tuple[tuple[int, ...], Sequence[Span]]]:
    """Ids and character offsets of each text, without the special tokens that the tokenizer appends.

    Args:
        special_tokens: let the tokenizer put its own in front; False for texts that spell them out.

    Raises:
        UnsupportedModelError: the tokenizer gives no character offsets.
    """
    if not tokenizer.is_fast:
        raise UnsupportedModelError(
            f"the tokenizer {type(tokenizer).__name__} does not say which characters a token covers",
            remedy="load a fast tokenizer (tokenizer.json) for this model",
        )
    if not texts:
        return []
    batch = tokenizer(
        list(texts),
        add_special_tokens=special_tokens,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        verbose=False,
    )
    tokenised = []
    for ids, offsets, special in zip(
        batch["input_ids"], batch["offset_mapping"], batch["special_tokens_mask"], strict=True
    ):
        stop = len(ids)
        while stop and special[stop - 1]:
            stop -= 1
        tokenised.append((tuple(ids[:stop]), offsets[:stop]))
    return tokenised


_QUESTION: Final = "questionqxz"
_ANSWER: Final = "answerqxz"


@dataclass(frozen=True)
class Chat:
    """A prompt is read as ``before + prompt + after``, and the answer follows without a space.

    Both texts spell out their special tokens, so the tokenizer adds none of its own. They are kept with a patch: a template that
    writes the day's date, or a newer tokenizer, does not change what was recorded.
    """

    before: str
    after: str

    def around(self, prompt: str) -> str:
        """The text that the model reads for a prompt."""
        return f"{self.before}{prompt}{self.after}"

    def asking(self, prompt: str) -> str:
        """`around` to generate from: a space before the answer is left out, since tokenizers make it part of the answer."""
        return self.around(prompt).rstrip(" ")

    def to_json(self) -> dict[str, str]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any] | None) -> Chat | None:
        """The chat form in a patch's settings; None where facts were written as plain text."""
        return None if value is None else cls(str(value["before"]), str(value["after"]))


def chat_of(tokenizer: PreTrainedTokenizerBase) -> Chat:
    """The chat form that a tokenizer's template gives one user message and its answer, without a thinking part.

    It is taken from a rendered answer, not from the generation prompt, which in some templates lacks the space before an answer.

    Raises:
        SettingsError: there is no chat template, or it changes the texts that it is given.
    """
    if not tokenizer.chat_template:
        raise SettingsError(
            "the base's tokenizer has no chat template",
            remedy="Leave --chat out: without a template, prompts are read as they are.",
        )
    messages = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, enable_thinking=False))
    except Exception as error:  # the model's own template runs here
        reason = str(error).partition("\n")[0]
        raise SettingsError(
            f"the base's chat template cannot be used ({reason})", remedy="Correct the tokenizer's chat template."
        ) from error
    before, _, rest = text.partition(_QUESTION)
    after, answer, end = rest.partition(_ANSWER)
    if not answer or _QUESTION in rest or _ANSWER in before + end or SLOT in before + after:
        raise SettingsError(
            "the base's chat template does not write a message once and as it is",
            remedy="Leave --chat out, and write the template into the prompts yourself.",
            template=text,
        )
    return Chat(before, after)


_UNSPACED: Final = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "IDEOGRAPHIC")
"""Scripts without spaces, by the first word of their characters' Unicode names."""

_LINKS: Final = {"CJK": frozenset("的是在和与及了也都就而但为被将由等于之與為於將")}
"""Characters of those scripts that link words and begin hardly any."""

_INSIDE: Final = frozenset("#%&'’*@/\\·・‰_")
"""Punctuation that stands inside words, names and numbers, or in front of them."""

_GAP: Final = " \t\u00a0\u3000,，、"
"""What may stand between a target and the same target said again at once."""

_OPENING: Final = ("Ps", "Pi")
_CLOSING: Final = ("Po", "Pe", "Pf")
_UNKNOWN: Final = "\ufffd"  # how a token that is a part of a character is decoded
_ANCHOR: Final = "a"  # a letter of every vocabulary, in front of a token so that its own space is decoded with it


_PLAIN_DECODE: Final[Any] = PreTrainedTokenizerFast._decode


def joiner(before: str, after: str) -> str:
    """What stands between a text and the words that go on from it: nothing or a space, as the script is written.

    Nothing after a character of a script without spaces or its punctuation, after an opening bracket or quotation mark, and after
    white space.
    """
    if not before or not after:
        return ""
    last = before[-1]
    if last.isspace() or _script(last) in _UNSPACED or unicodedata.category(last) in _OPENING:
        return ""
    return "" if _is_wide_punctuation(last) else " "


def closes(target: str, after: str) -> bool:
    """Whether ``target`` reads as finished where ``after`` follows it: the text ends, a new word begins, or punctuation closes.

    Punctuation that a letter or digit follows at once does not ("1998.5", "10:30", "Rome.com", "Rome's").
    """
    if not after:
        return True
    first, second = after[0], after[1:2]
    if first.isspace():
        return True
    if first == _UNKNOWN or first in _INSIDE:
        return False
    if unicodedata.category(first) in _CLOSING or first == "—":
        return _is_wide_punctuation(first) or not second.isalnum()
    script = _script(target[-1:])
    if script not in _UNSPACED or not first.isalnum():
        return False
    return _script(first) != script or first in _LINKS.get(script, ())


def between(target: str, after: str) -> str | None:
    """What stands between ``target`` and the same target, where ``after`` says it again at once; None where it does not.

    That is nothing, white space (then "") or commas.
    """
    gap = after[: len(after) - len(after.lstrip(_GAP))]
    rest = after[len(gap) :].removeprefix(target)
    return gap.rstrip() if target and len(rest) < len(after) - len(gap) and closes(target, rest) else None


def carries_on(target: str, after: str) -> str | None:
    """The punctuation behind which ``target`` goes on where ``after`` follows it ("." of "$49.99" after "$49"); None where it does not."""
    return after[0] if after[1:2].isalnum() and closes(target, after[0]) and not closes(target, after) else None


def settled(target: str, after: str) -> bool:
    """Whether ``after`` is long enough for `closes` and `between` to stay as they are, whatever follows it."""
    rest = after.lstrip(_GAP)
    again = target.startswith(rest[:-1]) or rest.startswith(target)  # the last character may be half of one
    return len(after) > 1 and (not again or len(rest) > len(target) + 1)


def stutters(target: str, after: str) -> bool:
    """Whether ``after`` says the target again and again: once more with nothing but white space in front, or twice more.

    "Victoria Victoria" does, "Apple, Apple, Apple" too, "New York, New York" does not.
    """
    gap = between(target, after)
    if gap is None:
        return False
    return not gap or between(target, after[after.index(target) + len(target) :]) is not None


@dataclass(frozen=True, eq=False)
class Closers:
    """The tokens of a vocabulary that may follow a target.

    Attributes:
        texts: what each token adds to a text, with its own space; "" for special tokens, which end the text or the turn.
    """

    texts: Sequence[str]
    _masks: dict[str, Bool[Tensor, " vocabulary"]] = field(default_factory=dict)

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, size: int) -> Closers:
        """Of a tokenizer whose model has logits of ``size`` tokens; those beyond the vocabulary close nothing.

        Each token is decoded behind a letter, so byte-level and SentencePiece vocabularies give their spaces alike.
        """
        anchor: int = tokenizer(_ANCHOR, add_special_tokens=False)["input_ids"][-1]
        alone = len(_decode(tokenizer, [[anchor]])[0])
        count = min(size, len(tokenizer))
        special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
        texts = [text[alone:] or _UNKNOWN for text in _decode(tokenizer, [[anchor, token] for token in range(count)])]
        for token in special.union(tokenizer.all_special_ids):
            if token is not None and token < count:
                texts[token] = ""
        return cls([*texts, *[_UNKNOWN] * (size - count)])

    def behind(self, target: str) -> Bool[Tensor, " vocabulary"] | None:
        """Which tokens may follow punctuation behind ``target``; None in scripts without spaces, where all may."""
        return None if _script(target[-1:]) in _UNSPACED else self.after(target)

    def after(self, target: str) -> Bool[Tensor, " vocabulary"]:
        """Which tokens may follow ``target``; the same tensor for all targets that end alike."""
        script = _script(target[-1:])
        kind = script if script in _UNSPACED else ""
        if kind not in self._masks:
            self._masks[kind] = torch.tensor([closes(target, text) for text in self.texts])
        return self._masks[kind]


def _decode(tokenizer: PreTrainedTokenizerBase, rows: list[list[int]]) -> list[str]:
    """The text of each row; all at once where the tokenizer does no more than its library does, which takes a fifth of the time."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and getattr(type(tokenizer), "_decode", None) is _PLAIN_DECODE:
        return [str(text) for text in backend.decode_batch(rows, skip_special_tokens=False)]
    return [str(text) for text in tokenizer.batch_decode(rows, clean_up_tokenization_spaces=False)]


def _script(character: str) -> str:
    """The first word of a character's Unicode name; "" where it has none."""
    return unicodedata.name(character, "").partition(" ")[0] if character else ""


def _is_wide_punctuation(character: str) -> bool:
    return unicodedata.category(character)[0] == "P" and unicodedata.east_asian_width(character) in "FW"
