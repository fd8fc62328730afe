"""Where routing decisions live while text is decoded, and which positions they count: the cache and the attention mask of a pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from patchhub.errors import SettingsError


class DecisionLayer(DynamicLayer):  # type: ignore[no-untyped-call]  # transformers registers subclasses untyped
    """A cache layer that holds decisions where others hold keys: (batch, weights) indices of side memories, -1 for the main one."""

    is_compileable = True

    def __init__(self, decision: Int[Tensor, "batch weights"]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.lazy_initialization(decision, decision)
        self.put(decision)

    def put(self, decision: Int[Tensor, "batch weights"] | None) -> None:
        self.keys = self.values = decision

    def get_seq_length(self) -> int:
        return 0 if self.keys is None else 1

    def reset(self) -> None:
        self.put(None)

    def crop(self, tokens_to_remove: int) -> None:
        """Shortening a text leaves its decision as it is."""


def real_tokens(mask: Any, time: int) -> Bool[Tensor, "batch time"] | None:
    """Which of the last ``time`` positions are tokens: from a mask of positions, or from the diagonal of a mask of pairs.

    Raises:
        SettingsError: a kind of mask that does not tell.
    """
    if isinstance(mask, Mapping):
        mask = next(iter(mask.values()), None)
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        raise SettingsError(
            f"an attention mask of type {type(mask).__name__} does not tell padding from text",
            remedy="Use eager or sdpa attention for a model with side memories.",
        )
    if mask.dim() == 2:
        return mask[:, -time:] != 0
    pairs = mask[:, 0].diagonal(dim1=-2, dim2=-1)[:, :time]
    return pairs if pairs.dtype == torch.bool else pairs >= 0


def kept_decision(cache: Any, depth: int, batch: int) -> Int[Tensor, "batch weights"] | None:
    """What a cache has decided for its rows, if anything."""
    if not isinstance(cache, Cache) or len(cache.layers) <= depth:
        return None
    layer: Any = cache.layers[depth]
    decision: Tensor | None = layer.keys
    return decision if decision is not None and decision.shape[0] == batch else None


def keep_decision(cache: Any, depth: int, decision: Int[Tensor, "batch weights"]) -> None:
    """Put decisions into a cache that has none yet."""
    if not isinstance(cache, Cache) or len(cache.layers) < depth:
        return
    if len(cache.layers) == depth:
        cache.layers.append(DecisionLayer(decision))
    elif isinstance(layer := cache.layers[depth], DecisionLayer):
        layer.put(decision)
