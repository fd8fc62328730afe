"""What one training of a side memory is given, and the least-squares fit that it ends in.

A shard is what training leaves and routing reads: the change of one matrix under a mask, with its threshold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from patchhub.delta import Delta, from_factors, norm, to_dense
from patchhub.editing.wise.settings import WiseSettings
from patchhub.editing.wise.texts import Scope, ScopeRow, Tokens, in_scope, neighbours, read_tokens, subject_keys
from patchhub.errors import SettingsError
from patchhub.models.tracing import Stack
from patchhub.objects import Request
from patchhub.text.tokens import context_length


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


_ITERATIONS = 200
_TOLERANCE = 1e-4  # of the right-hand side; the next round corrects what is left
_DENSE = 0.7  # share of entries above which the factor of the whole system is the better preconditioner
_RIDGE_SHARE = 0.01  # of the median of the diagonal of C, as for the metric


@dataclass(frozen=True, eq=False)
class FitProblem:
    """The part of the problem that does not depend on what is wanted.

    Attributes:
        normal: ridge C + sum_j share_j k_j k_j^T.
        mask: 1 where an entry may change, 0 elsewhere.
        factor: the Cholesky factor of ``normal``, where the mask is dense enough for it to help.
    """

    normal: Float[Tensor, "in in"]
    mask: Float[Tensor, "out in"]
    factor: Float[Tensor, "in in"] | None

    def nearly(self, right: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """An estimate of the solution for a right-hand side: the preconditioner."""
        if self.factor is None:
            return right / self.normal.diagonal()
        return torch.cholesky_solve(right.T, self.factor).T * self.mask


def fit_problem(
    left_alone: Float[Tensor, "in in"],
    keys: Float[Tensor, "rows in"],
    shares: Float[Tensor, " rows"],
    mask: Float[Tensor, "out in"],
    ridge: float,
) -> FitProblem:
    """The problem for rows in scope; ``left_alone`` is the second moment of the keys of all other text."""
    diagonal = left_alone.diagonal()
    normal = ridge * left_alone + (keys * shares[:, None]).T @ keys
    normal.diagonal().add_(ridge * _RIDGE_SHARE * float(diagonal.median()) + torch.finfo(torch.float32).tiny)
    factor, failed = torch.linalg.cholesky_ex(normal) if float(mask.mean()) > _DENSE else (None, 1)
    return FitProblem(normal, mask, None if int(failed) else factor)


def wanted(
    keys: Float[Tensor, "rows in"], shares: Float[Tensor, " rows"], outputs: Float[Tensor, "rows out"]
) -> Float[Tensor, "out in"]:
    """The right-hand side of the normal equations: sum_j share_j t_j k_j^T."""
    return (outputs * shares[:, None]).T @ keys


def solve_masked(
    problem: FitProblem, right: Float[Tensor, "out in"], start: Float[Tensor, "out in"]
) -> Float[Tensor, "out in"]:
    """The X with X N = R under the mask, by preconditioned conjugate gradients from ``start``."""
    normal, mask = problem.normal, problem.mask
    goal = _TOLERANCE * float((right * mask).norm())
    solution = start * mask
    rest = (right - solution @ normal) * mask
    scaled = problem.nearly(rest)
    direction, product = scaled, (rest * scaled).sum(1, keepdim=True)
    for _ in range(_ITERATIONS):
        if float(rest.norm()) <= goal:
            break
        image = (direction @ normal) * mask
        step = product / (direction * image).sum(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        solution = solution + step * direction
        rest = rest - step * image
        scaled = problem.nearly(rest)
        before, product = product, (rest * scaled).sum(1, keepdim=True)
        direction = scaled + (product / before.clamp(min=torch.finfo(torch.float32).tiny)) * direction
    return solution


def subspace(shape: tuple[int, int], ratio: float, seed: int, number: int) -> Float[Tensor, "out in"]:
    """The mask of shard ``number``: each entry is 1 with probability ``ratio``, drawn from (seed, number) alone."""
    generator = torch.Generator().manual_seed((seed << 20) + number)
    return (torch.rand(shape, generator=generator) < ratio).float()


_TOKENS = 32_768  # of unrelated text


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows in scope: their requests, the key at each row's subject, and each row's request and share of it."""

    scope: Scope
    keys: Float[Tensor, "rows in"]
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
