"""Rows of text opened for value optimisation: what cannot change is run once and kept as keys and values.

Nothing before the subject's last token can change. Of that, what all facts have in front in a context (the context's own
words, mostly) is the trunk: run once for all facts. The rest is run once per row. A row goes on from the subject's last token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from patchhub.editing.locate import Encoded
from patchhub.editing.sites import Rows, Site
from patchhub.models.tracing import Prefix, Stack, left_padded, right_padded


@dataclass(frozen=True)
class Row:
    """A text to open: how many positions are needed from the subject's last token on, its trunk, and its fact in the batch."""

    encoded: Encoded
    kept: int
    trunk: int
    fact: int


@dataclass(frozen=True, eq=False)
class Trunk:
    """The common beginnings of groups of texts. Row ``g`` of ``prefix`` belongs to group ``g``; rows are padded on the left."""

    lengths: tuple[int, ...]
    mask: Int[Tensor, "groups time"]
    prefix: Prefix | None


def read_trunk(stack: Stack, groups: Sequence[Sequence[Encoded]]) -> Trunk:
    """Run what the texts of each group have in common before their subjects' last tokens."""
    return run_trunk(stack, [common_beginning([text.input_ids[: text.subject_last] for text in g]) for g in groups])


def run_trunk(stack: Stack, common: Sequence[tuple[int, ...]]) -> Trunk:
    """Run the beginnings, one for each group, on the model's present weights."""
    lengths = tuple(map(len, common))
    if not any(lengths):
        return Trunk(lengths, torch.zeros(len(common), 0, dtype=torch.long, device=stack.device), None)
    ids, mask, positions = left_padded(common, stack.device)
    return Trunk(lengths, mask, stack.read_prefix(ids, mask, positions))


def common_beginning(texts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The longest beginning of all texts: that of the smallest and the largest in alphabetical order."""
    first, last = min(texts), max(texts)
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return first[:length]


@torch.no_grad()
def open_rows(site: Site, rows: Sequence[Row], trunk: Trunk) -> Rows:
    """Run what cannot change of the rows, and the blocks below the site for the rest."""
    stack = site.stack
    prefix, prefix_mask = _read_prefix(stack, rows, trunk)
    before = torch.tensor([row.encoded.subject_last for row in rows], device=stack.device)
    after = [row.encoded.input_ids[row.encoded.subject_last :][: row.kept] for row in rows]
    ids, mask, positions = right_padded(after, stack.device)
    positions, mask = positions + before[:, None], torch.cat([prefix_mask, mask], dim=1)
    start = stack.begin(ids, mask, positions, prefix)
    hidden = start.run(start.hidden, 0, site.first)
    fact = torch.tensor([row.fact for row in rows], device=stack.device)
    return Rows(start, ids, mask, positions, prefix, hidden, fact)


def _read_prefix(stack: Stack, rows: Sequence[Row], trunk: Trunk) -> tuple[Prefix | None, Int[Tensor, "rows time"]]:
    """Keys and values of everything before each row's subject's last token, padded on the left, and their mask."""
    of_row = torch.tensor([row.trunk for row in rows], device=stack.device)
    shared = trunk.prefix.select(of_row) if trunk.prefix is not None else None
    lengths = torch.tensor([trunk.lengths[row.trunk] for row in rows], device=stack.device)
    own = [row.encoded.input_ids[trunk.lengths[row.trunk] : row.encoded.subject_last] for row in rows]
    if not any(own):
        return shared, trunk.mask[of_row]
    ids, mask, positions = right_padded(own, stack.device)
    whole = torch.cat([trunk.mask[of_row], mask], dim=1)
    prefix = stack.read_prefix(ids, whole, positions + lengths[:, None], shared)
    place, mask = _to_the_right(whole)
    return prefix.rearrange(place), mask


def _to_the_right(
    mask: Int[Tensor, "rows time"],
) -> tuple[Int[Tensor, "rows kept"], Int[Tensor, "rows kept"]]:
    """Where each position comes from when all padding goes to the left and as much of it as can be is cut, and the new mask."""
    place = mask.sort(dim=1, stable=True).indices
    kept = int(mask.sum(1).max())
    place = place[:, place.shape[1] - kept :]
    return place, mask.gather(1, place)
