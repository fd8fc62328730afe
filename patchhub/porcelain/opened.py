"""The base in memory, in some state, ready to be edited."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from patchhub.delta import Delta
from patchhub.editing.chat import Chat, chat_of
from patchhub.models.architectures import Architecture
from patchhub.models.checkpoint import Checkpoint
from patchhub.models.placement import DEFAULT, Placement, runs_beside
from patchhub.models.tokenizer import load_tokenizer
from patchhub.models.tracing import Stack
from patchhub.porcelain.loading import patch_state
from patchhub.porcelain.placements import load_for_editing
from patchhub.runtime.patched_model import attach, switch
from patchhub.store.repository import Repository


@dataclass(frozen=True, eq=False)
class Opened:
    """A model to edit.

    Attributes:
        checkpoint: the base's files.
        architecture: where its parts are.
        model: the base with ``deltas`` attached; no side memory is.
        tokenizer: the base's.
        stack: the model as a stack of blocks.
        deltas: the state it is in.
        chat: the chat form in which its facts are written and asked; None: as plain text.
    """

    checkpoint: Checkpoint
    architecture: Architecture
    model: Any
    tokenizer: PreTrainedTokenizerBase
    stack: Stack
    deltas: Mapping[str, Sequence[Delta]]
    chat: Chat | None = None

    def moved(self, repository: Repository, deltas: Mapping[str, Sequence[Delta]]) -> Opened:
        """The same model, put into another state; this value no longer says what state it is in."""
        switch(self.model, self.checkpoint, patch_state(repository, deltas, None))
        return replace(self, deltas=deltas)


def open_model(
    repository: Repository,
    checkpoint: Checkpoint,
    architecture: Architecture,
    weights: Sequence[str],
    deltas: Mapping[str, Sequence[Delta]],
    placement: Placement = DEFAULT,
    *,
    chat: bool = False,
) -> Opened:
    """The base with ``deltas`` attached; ``weights``, those that will be edited, are checked against the repository's base.

    Where the base is in memory in float32 the deltas are in its weights, else beside them, so that no rounding is recorded.

    Args:
        chat: write and ask facts inside the base's chat template.

    Raises:
        SettingsError: the base has no chat template that can be used, under ``chat``.
        BaseError: the base is missing, changed or not finite, or does not fit.
    """
    tokenizer = load_tokenizer(checkpoint)
    form = chat_of(tokenizer) if chat else None
    model = load_for_editing(repository, checkpoint, weights, placement)
    attach(model, checkpoint, patch_state(repository, deltas, None), side_path=runs_beside(model))
    return Opened(checkpoint, architecture, model, tokenizer, Stack(model, architecture), deltas, form)
