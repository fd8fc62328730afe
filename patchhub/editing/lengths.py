"""How long a text may be: the positions that a model reads, and the refusal of texts that have more tokens."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from transformers import PreTrainedModel

from patchhub.errors import RequestError

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
