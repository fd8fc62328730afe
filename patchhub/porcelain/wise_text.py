"""Text that WISE trains with: contexts to put requests in, and documents that the side memory must leave alone; the base writes both."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from patchhub.canonical import canonical_json
from patchhub.editing.sampling import context_templates, sample_documents
from patchhub.fsio import keep
from patchhub.porcelain.loading import patch_state
from patchhub.porcelain.opened import Opened
from patchhub.porcelain.progress import Progress
from patchhub.runtime.patched_model import switch
from patchhub.store.repository import Repository

_TOKENS: Final = 4_096  # at least
_TOKENS_PER_INPUT: Final = 6  # of the widest feed-forward network: fewer, and locality suffers (docs/wise.md)
_LENGTH: Final = 64
_SEED_STEP: Final = 2  # the metric's text and the held text have other seeds


@dataclass(frozen=True)
class WiseText:
    """Templates with one ``{}``, the bare prompt first; and the token ids of each document."""

    contexts: tuple[str, ...]
    locality: tuple[tuple[int, ...], ...]


def open_wise_text(repository: Repository, opened: Opened, seed: int, progress: Progress) -> WiseText:
    """The text for a seed, sampled from the unpatched base and kept in the cache: a function of base and seed."""
    path = repository.cache / "wise" / f"{repository.config.base_id}-{seed}.json"
    known = _read(path)
    if known is not None:
        return known
    tokens = max(_TOKENS, _TOKENS_PER_INPUT * max(inner for _, inner in opened.architecture.shapes))
    progress.stage("text from the base", tokens)
    with _unpatched(repository, opened):
        documents = sample_documents(
            opened.stack,
            opened.tokenizer,
            tokens,
            length=_LENGTH,
            seed=seed + _SEED_STEP,
            progress=progress.advance,
        )
        text = WiseText(context_templates(opened.stack, opened.tokenizer), tuple(map(tuple, documents)))
    keep(path, (canonical_json({"contexts": list(text.contexts), "locality": documents}),))
    return text


def _read(path: Path) -> WiseText | None:
    try:
        value = json.loads(path.read_bytes())
        return WiseText(tuple(value["contexts"]), tuple(map(tuple, value["locality"])))
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextmanager
def _unpatched(repository: Repository, opened: Opened) -> Iterator[None]:
    """The model as the base while the block runs."""
    switch(opened.model, opened.checkpoint, patch_state(repository, {}, None))
    try:
        yield
    finally:
        switch(opened.model, opened.checkpoint, patch_state(repository, opened.deltas, None))
