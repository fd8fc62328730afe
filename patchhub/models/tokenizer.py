"""The tokenizer of a base: loaded from its folder alone, and what its files lack told without loading it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from patchhub.errors import BaseError
from patchhub.models.checkpoint import Checkpoint

_FAST: Final = "tokenizer.json"
_VOCABULARIES: Final = ("*.model", "*.tiktoken", "vocab.json", "vocab.txt", "tekken.json")
_REMEDY: Final = "Copy the tokenizer's files (tokenizer.json and tokenizer_config.json, say) into the model's folder."


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """The tokenizer in a checkpoint's folder.

    Raises:
        BaseError: there is none, or its files cannot be read as one.
    """
    lacking = lacks_tokenizer(checkpoint.folder)
    if lacking is not None:
        raise _refuse(checkpoint, lacking)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(checkpoint.folder, local_files_only=True)
    except Exception as error:  # the formats are many, and so are the ways in which their readers fail
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise _refuse(checkpoint, f"a tokenizer that cannot be read ({reason})") from error
    return tokenizer


def lacks_tokenizer(folder: Path) -> str | None:
    """What is wrong with a folder's tokenizer as far as its files tell, in words that follow "has"; None: nothing."""
    fast = folder / _FAST
    if fast.is_file():
        return None if _is_json(fast) else f"a {_FAST} that is not valid JSON"
    found = any(next(folder.glob(pattern), None) for pattern in _VOCABULARIES)
    return None if found else "no tokenizer"


def _is_json(file: Path) -> bool:
    try:
        return isinstance(json.loads(file.read_bytes()), dict)
    except (OSError, ValueError, RecursionError):
        return False


def _refuse(checkpoint: Checkpoint, what: str) -> BaseError:
    folder = str(checkpoint.folder)
    return BaseError(f"the model folder {folder} has {what}", remedy=_REMEDY, folder=folder)
