"""Where a word ends: how a target is joined to what stands before it, and what may follow it so that it reads as finished.

Both are read off the characters that meet. Most scripts put a space between words; Chinese, Japanese, Thai and a few others do not,
and there a following character of another script, or one of the characters that only link words, says that a word has ended."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import torch
from jaxtyping import Bool
from torch import Tensor
from transformers import PreTrainedTokenizerBase

_UNSPACED: Final = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "IDEOGRAPHIC")
"""Scripts without spaces, by the first word of their characters' Unicode names."""

_LINKS: Final = {"CJK": frozenset("的是在和与及了也都就而但为被将由等于之與為於將")}
"""Characters of those scripts that link words and begin hardly any."""

_INSIDE: Final = frozenset("#%&'’*@/\\·・‰_")
"""Punctuation that stands inside words, names and numbers, or in front of them."""

_OPENING: Final = ("Ps", "Pi")
_CLOSING: Final = ("Po", "Pe", "Pf")
_UNKNOWN: Final = "\ufffd"  # how a token that is a part of a character is decoded
_ANCHOR: Final = "a"  # a letter of every vocabulary, in front of a token so that its own space is decoded with it


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

    def after(self, target: str) -> Bool[Tensor, " vocabulary"]:
        """Which tokens may follow ``target``; the same tensor for all targets that end alike."""
        script = _script(target[-1:])
        kind = script if script in _UNSPACED else ""
        if kind not in self._masks:
            self._masks[kind] = torch.tensor([closes(target, text) for text in self.texts])
        return self._masks[kind]


def _decode(tokenizer: PreTrainedTokenizerBase, rows: list[list[int]]) -> list[str]:
    return [str(text) for text in tokenizer.batch_decode(rows, clean_up_tokenization_spaces=False)]


def _script(character: str) -> str:
    """The first word of a character's Unicode name; "" where it has none."""
    return unicodedata.name(character, "").partition(" ")[0] if character else ""


def _is_wide_punctuation(character: str) -> bool:
    return unicodedata.category(character)[0] == "P" and unicodedata.east_asian_width(character) in "FW"
