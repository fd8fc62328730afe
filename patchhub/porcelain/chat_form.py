"""Whether a verb reads prompts as they are, or as messages of the base's chat form: what the caller says, else the repository's config."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from patchhub.editing.chat import Chat, chat_of
from patchhub.store.repository import Repository


def chat_form(repository: Repository, tokenizer: PreTrainedTokenizerBase, asked: bool | None) -> Chat | None:
    """The base's chat form where prompts are read in it; None where they are read as they are.

    Args:
        asked: what the caller says; None: as the repository's config says.

    Raises:
        SettingsError: prompts are to be read in a chat, and the base has no chat template that can be used.
    """
    in_chat = bool(repository.config.settings.get("chat", False)) if asked is None else asked
    return chat_of(tokenizer) if in_chat else None
