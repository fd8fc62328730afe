"""The base in memory at a revision, ready to be edited or asked: found, checked, placed, patched, in its chat form."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from patchhub.delta import Delta
from patchhub.models.architectures import Architecture
from patchhub.models.checkpoint import Checkpoint
from patchhub.models.fingerprint import check_tensors
from patchhub.models.placement import DEFAULT, Placement, load_base, runs_beside
from patchhub.models.tracing import Stack
from patchhub.runtime.patched_model import attach, switch
from patchhub.store.store import Store
from patchhub.text.tokens import Chat, chat_of, load_tokenizer
from patchhub.worktree.loading import base_object, not_finite, open_base, patch_state


def open_checked(repository: Store, path: str | Path | None = None) -> Checkpoint:
    """The repository's base model, every tensor checked.

    Raises:
        BaseError: the base is not where it was, or is another model now.
    """
    checkpoint = open_base(repository, path)
    check_base(repository, checkpoint)
    return checkpoint


def check_base(repository: Store, checkpoint: Checkpoint) -> None:
    """Check every tensor of a checkpoint; those of files that have not changed since the last check by their files' size and time alone.

    Raises:
        BaseError: it is not the repository's base.
    """
    check_tensors(base_object(repository), checkpoint, None, cache=repository.cache)


def keep_digests(repository: Store, folder: Path) -> None:
    """Put digests that ``fingerprint`` kept in another folder, made before there was a store, into the store's cache."""
    with suppress(OSError, shutil.Error):
        shutil.copytree(folder, repository.cache.folder, dirs_exist_ok=True)


def placement_of(
    repository: Store, *, device: str | None = None, dtype: str | None = None, quantization: str | None = None
) -> Placement:
    """The placement that the arguments ask for; where they are None, the repository's settings, then the default rule.

    Raises:
        SettingsError: a value cannot be used.
    """
    given = {"device": device, "dtype": dtype, "quantization": quantization}
    configured = {name: repository.config.settings.get(name) for name in given}
    chosen = {name: value if value is not None else configured[name] for name, value in given.items()}
    return Placement(**{name: value for name, value in chosen.items() if value is not None})


def load_for_editing(repository: Store, checkpoint: Checkpoint, weights: Sequence[str], placement: Placement) -> Any:
    """The base in memory, checked against the repository's base, the edited weights by their bytes in any case.

    Raises:
        BaseError: the base is changed, not finite, or does not fit.
    """
    check_base(repository, checkpoint)
    check_tensors(base_object(repository), checkpoint, weights)
    model = load_base(checkpoint, placement)
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise not_finite(checkpoint.name, name)
    return model


def chat_form(repository: Store, tokenizer: PreTrainedTokenizerBase, asked: bool | None) -> Chat | None:
    """The base's chat form where prompts are read in it; None where they are read as they are.

    Args:
        asked: what the caller says; None: as the repository's config says.

    Raises:
        SettingsError: prompts are to be read in a chat, and the base has no chat template that can be used.
    """
    in_chat = bool(repository.config.settings.get("chat", False)) if asked is None else asked
    return chat_of(tokenizer) if in_chat else None


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

    def moved(self, repository: Store, deltas: Mapping[str, Sequence[Delta]]) -> Opened:
        """The same model, put into another state; this value no longer says what state it is in."""
        switch(self.model, self.checkpoint, patch_state(repository, deltas, None))
        return replace(self, deltas=deltas)


def open_model(
    repository: Store,
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
