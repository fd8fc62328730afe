"""The texts of one training: edited prompts after many beginnings, text that must be left alone, and the keys of both.

Keys are what enters the edited matrix; they are read a batch at a time, with the blocks up to the edited one only.

What one training of a side memory is given.

A shard is what training leaves and routing reads: the change of one matrix under a mask, with its threshold."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from patchhub.delta import Delta, from_factors, norm, to_dense
from patchhub.editing.editor import encode_facts
from patchhub.editing.locate import Marked, encode_marked, mark_text
from patchhub.editing.metric import drawn_to_mean
from patchhub.editing.rows import Fact
from patchhub.editing.settings import Distance, WiseSettings
from patchhub.editing.wise.fit import FitProblem, Keys, fit_problem, subspace
from patchhub.errors import SettingsError
from patchhub.models.tracing import Stack, right_padded
from patchhub.objects import SLOT, Request
from patchhub.text.sampling import continue_tokens
from patchhub.text.tokens import context_length, tokenise

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

KeyBatch = tuple[list[int], Keys, Bool[Tensor, "rows time"]]
"""Which texts, the keys of all their positions, text by text, and which of those are tokens."""


@torch.no_grad()
def read_keys(stack: Stack, layer: int, texts: Sequence[Sequence[int]]) -> Iterator[KeyBatch]:
    """The keys of every text in float32, in batches of texts of similar length."""
    for chosen in _batches(texts):
        ids, mask, positions = right_padded([texts[index] for index in chosen], stack.device)
        with stack.watch_keys([layer]) as seen:
            start = stack.begin(ids, mask, positions)
            start.run(start.hidden, 0, layer + 1)
        keys = Keys.seen(seen[layer], ids.shape)
        yield chosen, keys, mask.bool().to(keys.device)


@dataclass(frozen=True, eq=False)
class Tokens:
    """All tokens of some texts: their keys, the lengths of what a change is measured against, and whose they are.

    The lengths are those of the hidden states after the block, or behind a norm of the projection's outputs.
    """

    keys: Keys
    lengths: Float[Tensor, " tokens"]
    text: Int[Tensor, " tokens"]
    count: int

    def distances(self, change: Float[Tensor, "out in"], distance: Distance) -> Float[Tensor, " texts"]:
        """The routing distance of each text."""
        lengths = self.keys.times(change).norm(dim=-1)
        how = "amax" if distance == "max" else "mean"
        found = torch.zeros(self.count, device=change.device)
        return found.scatter_reduce(0, self.text, lengths, how, include_self=False)


@torch.no_grad()
def read_tokens(stack: Stack, layer: int, texts: Sequence[Sequence[int]]) -> Tokens:
    """Every token of some texts; all of their keys are in memory at once."""
    device = stack.device_of(layer)
    owners: list[list[int]] = []
    keys, lengths = [no_keys(stack, layer)], [torch.zeros(0, device=device)]
    for chosen in _batches(texts):
        ids, mask, positions = right_padded([texts[index] for index in chosen], stack.device)
        with stack.watch_keys([layer]) as seen, stack.watch_values([layer]) as projected:
            start = stack.begin(ids, mask, positions)
            hidden = start.run(start.hidden, 0, layer + 1).to(device)
        if stack.architecture.norms[layer] is not None:
            hidden = projected[layer]
        real = mask.bool().to(device)
        keys.append(Keys.seen(seen[layer], ids.shape)[real.flatten().nonzero()[:, 0]])
        lengths.append(hidden[real].float().norm(dim=-1))
        owners.append([index for index in chosen for _ in texts[index]])
    owner = torch.tensor([index for part in owners for index in part], dtype=torch.long).to(device)
    return Tokens(Keys.joined(keys), torch.cat(lengths), owner, len(texts))


def no_keys(stack: Stack, layer: int) -> Keys:
    """Keys of no text."""
    projection, device = stack.architecture.feed_forward[layer], stack.device_of(layer)
    count, slots = max(1, projection.experts), max(1, projection.active)
    empty = torch.zeros(0, slots, projection.shape[1] // count, device=device)
    return Keys(empty, torch.zeros(0, slots, dtype=torch.long, device=device), count)


@dataclass(frozen=True, eq=False)
class Moments:
    """The mean of k k^T over some tokens, block by block, and how many of them have numbers in each block."""

    mean: Float[Tensor, "blocks in in"]
    uses: Int[Tensor, " blocks"]

    @classmethod
    def of(cls, keys: Keys) -> Moments:
        return cls(keys.moments() / len(keys), keys.uses())


def subject_keys(stack: Stack, layer: int, rows: Sequence[ScopeRow]) -> tuple[Keys, Moments]:
    """The key of each row at its subject's last token, and the second moment of the rows' other tokens."""
    device, none = stack.device_of(layer), no_keys(stack, layer)
    found, order, total, uses, count = [none], list[int](), none.moments(), none.uses(), 0
    for chosen, keys, real in read_keys(stack, layer, [row.tokens for row in rows]):
        last = torch.tensor([rows[index].subject_last for index in chosen], device=device)
        each = torch.arange(len(chosen), device=device)
        found.append(keys[each * real.shape[1] + last])
        order += chosen
        real[each, last] = False
        others = keys[real.flatten()]
        total += others.moments()
        uses += others.uses()
        count += len(others)
    back = torch.tensor(order, dtype=torch.long, device=device).argsort()
    return Keys.joined(found)[back], Moments(total / max(count, 1), uses)


def text_distances(
    stack: Stack, layer: int, change: Float[Tensor, "out in"], texts: Sequence[Sequence[int]], distance: Distance
) -> Float[Tensor, " texts"]:
    """The routing distance of each text: over its tokens, the largest or the mean ||dW k||."""
    found = torch.zeros(len(texts), device=change.device)
    for chosen, keys, real in read_keys(stack, layer, texts):
        lengths = keys.times(change).norm(dim=-1).view(real.shape).masked_fill(~real, 0.0)
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


@dataclass(frozen=True, eq=False)
class Shard:
    """A side memory: the change of one weight, and what routing needs.

    Attributes:
        weight: parameter name of the feed-forward output projection.
        change: (out, in) float32, sparse as trained, or low rank after `recompress`.
        routing: JSON-able: {"distance": "max" or "mean", "threshold": float}.
    """

    weight: str
    change: Delta
    routing: Mapping[str, Any]

    @property
    def threshold(self) -> float:
        return float(self.routing["threshold"])


def recompress(shard: Shard, rank: int) -> tuple[Shard, float]:
    """The shard with its change as the best one of ``rank``, and the relative Frobenius error.

    Its threshold is no longer right: measure it next.

    Raises:
        SettingsError: the rank is not a whole number above 0.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise SettingsError(f"rank must be a whole number above 0, not {rank!r}", remedy="Set rank > 0.")
    whole = to_dense(shard.change)
    left, values, right = np.linalg.svd(whole, full_matrices=False)
    change = from_factors(left[:, :rank] * values[:rank], right[:rank])
    size = norm(shard.change)
    error = float(np.linalg.norm(whole - to_dense(change))) / size if size else 0.0
    return replace(shard, change=change), error


def dense_change(change: Delta, device: torch.device) -> Float[Tensor, "out in"]:
    """The change as one float32 matrix."""
    return torch.from_numpy(to_dense(change).astype(np.float32)).to(device)


_TOKENS = 32_768  # of unrelated text


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows in scope: their requests, the key at each row's subject, and each row's request and share of it."""

    scope: Scope
    keys: Keys
    owner: Int[Tensor, " rows"]
    shares: Float[Tensor, " rows"]

    @property
    def firsts(self) -> Int[Tensor, " requests"]:
        """The place of each request's first row, its bare prompt."""
        return torch.searchsorted(self.owner, torch.arange(len(self.scope.facts), device=self.owner.device))


@dataclass(frozen=True, eq=False)
class Task:
    """One training.

    Attributes:
        rows: of the requests that the continued shard holds, then of those that are to be written.
        held: how many requests the continued shard holds.
        apart: unrelated text.
        problem: of the fit, over all rows.
        start: the change that is continued, or zero.
        margins: alpha, beta and gamma as distances.
    """

    rows: Rows
    held: int
    apart: Tokens
    problem: FitProblem
    start: Float[Tensor, "out in"]
    margins: tuple[float, float, float]


def make_task(
    stack: Stack,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Request],
    contexts: Sequence[str],
    settings: WiseSettings,
    locality: Sequence[Sequence[int]],
    start: Shard | None,
    earlier: Sequence[Request],
    number: int,
) -> Task:
    """The training of some requests on the stack's present weights; arguments as for ``wise.train``."""
    layer = settings.layer
    old, _ = read_rows(stack, tokenizer, earlier, contexts, settings, locality, cut=True)
    new, beside = read_rows(stack, tokenizer, requests, contexts, settings, locality)
    rows = _joined(old, new)
    near = neighbours(stack, tokenizer, (*earlier, *requests), count=settings.neighbours, seed=settings.seed)
    parts = [read_tokens(stack, layer, texts) for texts in (_thinned(locality), near)]
    moments = [*(Moments.of(part.keys) for part in parts if len(part.keys)), beside]
    left_alone = torch.stack([each.mean for each in moments]).mean(0)
    if len(left_alone) > 1:
        left_alone = drawn_to_mean(left_alone, torch.stack([each.uses for each in moments]).sum(0))
    shape, device = stack.architecture.shapes[layer], new.keys.device
    mask = subspace(shape, settings.mask_ratio, settings.seed, number).to(device)
    lengths = torch.cat([part.lengths for part in parts])
    unit = float(lengths.median()) if len(lengths) else 1.0
    return Task(
        rows=rows,
        held=len(earlier),
        apart=parts[0],
        problem=fit_problem(left_alone, rows.keys, rows.shares, mask, settings.ridge),
        start=torch.zeros(shape, device=device) if start is None else dense_change(start.change, device),
        margins=settings.absolute_margins(unit),
    )


def _thinned(texts: Sequence[Sequence[int]]) -> Sequence[Sequence[int]]:
    """Every n-th text, so that their keys fit into memory together."""
    return texts[:: max(1, -(-sum(map(len, texts)) // _TOKENS))]


def _joined(one: Rows, other: Rows) -> Rows:
    """The rows of both; the requests of ``other`` are numbered after those of ``one``."""
    count = len(one.scope.facts)
    moved = [replace(row, request=row.request + count) for row in other.scope.rows]
    return Rows(
        Scope((*one.scope.facts, *other.scope.facts), (*one.scope.rows, *moved)),
        Keys.joined([one.keys, other.keys]),
        torch.cat([one.owner, other.owner + count]),
        torch.cat([one.shares, other.shares]),
    )


def read_rows(
    stack: Stack,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Request],
    contexts: Sequence[str],
    settings: WiseSettings,
    locality: Sequence[Sequence[int]],
    *,
    cut: bool = False,
) -> tuple[Rows, Moments]:
    """The rows of some requests, and the second moment of the keys of their other tokens.

    Args:
        cut: read the rows up to their subjects only, which is all that their keys depend on.
    """
    prefixes, limit = settings.prefixes, context_length(stack.model)
    scope = in_scope(tokenizer, requests, contexts, locality, prefixes=prefixes, seed=settings.seed, limit=limit)
    read = [_to_subject(row) for row in scope.rows] if cut else scope.rows
    keys, beside = subject_keys(stack, settings.layer, read)
    owner = torch.tensor([row.request for row in scope.rows], dtype=torch.long, device=keys.device)
    shares = torch.tensor([row.share for row in scope.rows], device=keys.device)
    return Rows(scope, keys, owner, shares), beside


def _to_subject(row: ScopeRow) -> ScopeRow:
    stop = row.subject_last + 1
    return replace(row, tokens=row.tokens[:stop], prompt_stop=min(row.prompt_stop, stop))
