"""How long a text may be: the positions that a model reads, and the refusal of texts that have more tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from patchhub.errors import RequestError, UnsupportedModelError

_QUOTED: Final = 60  # characters of a long text that a message shows


def context_length(model: PreTrainedModel) -> int:
    """The number of positions that the model reads; a large number where its configuration sets no limit."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else 2**31


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
