"""The texts that a side memory is trained on: edited prompts after many beginnings, and text that it must leave alone."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from patchhub.editing.facts import encode_facts
from patchhub.editing.lengths import tokenise
from patchhub.editing.locate import Marked, encode_marked, mark_text
from patchhub.editing.sampling import continue_tokens
from patchhub.editing.values import Fact
from patchhub.models.tracing import Stack
from patchhub.objects import SLOT, Request

SHARE_OF_BARE = 0.5
"""What the bare prompt weighs among a request's rows; all others share the rest."""

_LONGEST_PREFIX = 20  # tokens
_NEIGHBOUR_LENGTH = 12  # tokens that the base adds to what stands before the subject
_BATCH = 128


@dataclass(frozen=True)
class ScopeRow:
    """A text that a request is read in: its tokens, where the subject ends, where the prompt ends, and its share of the request.

    The shares of a request's rows add up to 1.
    """

    tokens: tuple[int, ...]
    subject_last: int
    prompt_stop: int
    request: int
    share: float


@dataclass(frozen=True)
class Scope:
    """Requests in scope: the facts that the edit loss is computed from, and all their rows."""

    facts: tuple[Fact, ...]
    rows: tuple[ScopeRow, ...]


def in_scope(
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Request],
    contexts: Sequence[str],
    documents: Sequence[Sequence[int]],
    *,
    prefixes: int,
    seed: int,
    limit: int | None = None,
) -> Scope:
    """Every request in every context, and its subject after random pieces of the documents.

    The bare prompt, ``contexts[0]``, weighs half and all other rows of a request share the other half. Half of the random pieces stand
    before the prompt, the others directly before the subject. They depend on seed and request alone. Requests of more
    tokens than ``limit`` are refused.
    """
    if not requests:
        return Scope((), ())
    facts = encode_facts(tokenizer, requests, contexts, limit=limit)
    marked = [_prefixed(tokenizer, request, documents, prefixes, seed) for request in requests]
    encoded = iter(encode_marked(tokenizer, [item for items in marked for item in items]))
    rows = []
    for number, fact in enumerate(facts):
        others = len(fact.rows) - 1 + len(marked[number])
        shares = [SHARE_OF_BARE if others else 1.0] + [(1 - SHARE_OF_BARE) / max(others, 1)] * others
        texts = [*fact.rows, *(next(encoded) for _ in marked[number])]
        rows += [
            ScopeRow(text.input_ids, text.subject_last, text.target[0], number, share)
            for text, share in zip(texts, shares, strict=True)
        ]
    return Scope(tuple(facts), tuple(rows))


def _prefixed(
    tokenizer: PreTrainedTokenizerBase, request: Request, documents: Sequence[Sequence[int]], count: int, seed: int
) -> list[Marked]:
    """The subject, or the prompt up to it, after ``count`` random pieces of text."""
    if not documents:
        return []
    draw = random.Random(f"{seed} {request.id}")
    head = request.prompt.split(SLOT)[0]
    found = []
    for number in range(count):
        document = draw.choice(documents)
        length = draw.randint(1, _LONGEST_PREFIX)
        start = draw.randrange(max(1, len(document) - length))
        piece = " ".join(_text(tokenizer, document[start : start + length]).split())
        front = f"{piece}. {head}" if number % 2 == 0 and head else f"{piece} "
        found.append(mark_text(front, request.subject, ""))
    return found


def neighbours(
    stack: Stack, tokenizer: PreTrainedTokenizerBase, requests: Sequence[Request], *, count: int, seed: int
) -> list[list[int]]:
    """What the model writes after the words before each subject, without the texts that name one of the subjects.

    They are texts of the same form about other subjects, the hardest to tell from the edited ones. Requests whose prompt begins with its
    subject have none.
    """
    generator = torch.Generator().manual_seed(seed)
    heads = sorted({request.prompt.split(SLOT)[0].strip() for request in requests} - {""})
    groups: dict[int, list[tuple[int, ...]]] = {}
    for ids, _ in tokenise(tokenizer, heads):
        groups.setdefault(len(ids), []).extend([ids] * count)
    found: list[list[int]] = []
    for length, starts in sorted(groups.items()):
        for begin in range(0, len(starts), _BATCH):
            start = torch.tensor(starts[begin : begin + _BATCH])
            found += continue_tokens(stack, start, length + _NEIGHBOUR_LENGTH, generator).tolist()
    return [row for row in found if not _names(_text(tokenizer, row), (request.subject for request in requests))]


def _text(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    return str(tokenizer.decode(list(tokens), skip_special_tokens=True))


def _names(text: str, subjects: Iterable[str]) -> bool:
    return any(subject in text for subject in subjects)
