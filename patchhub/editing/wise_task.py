"""What one training of a side memory is given: rows in scope with their keys, what must be left alone, margins, and where it starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from patchhub.editing.lengths import context_length
from patchhub.editing.wise_fit import FitProblem, fit_problem, subspace
from patchhub.editing.wise_keys import Tokens, read_tokens, subject_keys
from patchhub.editing.wise_rows import Scope, ScopeRow, in_scope, neighbours
from patchhub.editing.wise_settings import WiseSettings
from patchhub.editing.wise_shard import Shard, dense_change
from patchhub.models.tracing import Stack
from patchhub.objects import Request

_TOKENS = 32_768  # of unrelated text


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows in scope: their requests, the key at each row's subject, and each row's request and share of it."""

    scope: Scope
    keys: Float[Tensor, "rows in"]
    owner: Int[Tensor, " rows"]
    shares: Float[Tensor, " rows"]


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
    moments = [part.keys.T @ part.keys / len(part.keys) for part in parts if len(part.keys)]
    left_alone = torch.stack([*moments, beside]).mean(0)
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
        torch.cat([one.keys, other.keys]),
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
) -> tuple[Rows, Float[Tensor, "in in"]]:
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
