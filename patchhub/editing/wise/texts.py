"""The texts of one training: edited prompts after many beginnings, text that must be left alone, and the keys of both.

Keys are what enters the edited matrix; they are read a batch at a time, with the blocks up to the edited one only."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from patchhub.editing.editor import encode_facts
from patchhub.editing.locate import Marked, encode_marked, mark_text
from patchhub.editing.values import Fact
from patchhub.editing.wise.settings import Distance
from patchhub.models.tracing import Stack, right_padded
from patchhub.objects import SLOT, Request
from patchhub.text.sampling import continue_tokens
from patchhub.text.tokens import tokenise

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


_TOKENS_PER_BATCH = 4096

KeyBatch = tuple[list[int], Float[Tensor, "rows time in"], Bool[Tensor, "rows time"]]
"""Which texts, their keys, and which positions are tokens."""


@torch.no_grad()
def read_keys(stack: Stack, layer: int, texts: Sequence[Sequence[int]]) -> Iterator[KeyBatch]:
    """The keys of every text in float32, in batches of texts of similar length."""
    for chosen in _batches(texts):
        ids, mask, positions = right_padded([texts[index] for index in chosen], stack.device)
        with stack.watch_keys([layer]) as seen:
            start = stack.begin(ids, mask, positions)
            start.run(start.hidden, 0, layer + 1)
        keys = seen[layer].float()
        yield chosen, keys, mask.bool().to(keys.device)


@dataclass(frozen=True, eq=False)
class Tokens:
    """All tokens of some texts: their keys, the lengths of what a change is measured against, and whose they are.

    The lengths are those of the hidden states after the block, or behind a norm of the projection's outputs.
    """

    keys: Float[Tensor, "tokens in"]
    lengths: Float[Tensor, " tokens"]
    text: Int[Tensor, " tokens"]
    count: int

    def distances(self, change: Float[Tensor, "out in"], distance: Distance) -> Float[Tensor, " texts"]:
        """The routing distance of each text."""
        lengths = (self.keys @ change.T).norm(dim=-1)
        how = "amax" if distance == "max" else "mean"
        found = torch.zeros(self.count, device=change.device)
        return found.scatter_reduce(0, self.text, lengths, how, include_self=False)


@torch.no_grad()
def read_tokens(stack: Stack, layer: int, texts: Sequence[Sequence[int]]) -> Tokens:
    """Every token of some texts; all of their keys are in memory at once."""
    device, inner = stack.device_of(layer), stack.architecture.shapes[layer][1]
    owners: list[list[int]] = []
    keys, lengths = [torch.zeros(0, inner, device=device)], [torch.zeros(0, device=device)]
    for chosen in _batches(texts):
        ids, mask, positions = right_padded([texts[index] for index in chosen], stack.device)
        with stack.watch_keys([layer]) as seen, stack.watch_values([layer]) as projected:
            start = stack.begin(ids, mask, positions)
            hidden = start.run(start.hidden, 0, layer + 1).to(device)
        if stack.architecture.norm is not None:
            hidden = projected[layer]
        real = mask.bool().to(device)
        keys.append(seen[layer][real].float())
        lengths.append(hidden[real].float().norm(dim=-1))
        owners.append([index for index in chosen for _ in texts[index]])
    owner = torch.tensor([index for part in owners for index in part], dtype=torch.long).to(device)
    return Tokens(torch.cat(keys), torch.cat(lengths), owner, len(texts))


def subject_keys(
    stack: Stack, layer: int, rows: Sequence[ScopeRow]
) -> tuple[Float[Tensor, "rows in"], Float[Tensor, "in in"]]:
    """The key of each row at its subject's last token, and the mean of k k^T over the rows' other tokens."""
    inner = stack.architecture.shapes[layer][1]
    device = stack.device_of(layer)
    found, total, count = torch.zeros(len(rows), inner, device=device), torch.zeros(inner, inner, device=device), 0
    for chosen, keys, real in read_keys(stack, layer, [row.tokens for row in rows]):
        last = torch.tensor([rows[index].subject_last for index in chosen], device=device)
        each = torch.arange(len(chosen), device=device)
        found[chosen] = keys[each, last]
        real[each, last] = False
        others = keys[real]
        total.addmm_(others.T, others)
        count += len(others)
    return found, total / max(count, 1)


def text_distances(
    stack: Stack, layer: int, change: Float[Tensor, "out in"], texts: Sequence[Sequence[int]], distance: Distance
) -> Float[Tensor, " texts"]:
    """The routing distance of each text: over its tokens, the largest or the mean ||dW k||."""
    found = torch.zeros(len(texts), device=change.device)
    for chosen, keys, real in read_keys(stack, layer, texts):
        lengths = (keys @ change.T).norm(dim=-1).masked_fill(~real, 0.0)
        found[chosen] = lengths.amax(1) if distance == "max" else lengths.sum(1) / real.sum(1)
    return found


def _batches(texts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Indices of texts of similar length, a bounded number of positions each."""
    groups: list[list[int]] = []
    for index in sorted((i for i, text in enumerate(texts) if len(text)), key=lambda i: len(texts[i])):
        if not groups or (len(groups[-1]) + 1) * len(texts[index]) > _TOKENS_PER_BATCH:
            groups.append([])
        groups[-1].append(index)
    return groups
