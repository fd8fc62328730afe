"""The text that second moments are computed from: the user's files, or what the base itself writes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from patchhub.editing.sampling import sample_documents
from patchhub.errors import RepositoryError, RequestError
from patchhub.models.tracing import Stack
from patchhub.objects import Metric, Text
from patchhub.porcelain.progress import Progress
from patchhub.store.repository import Repository

_SAMPLED_TOKENS_PER_INPUT = 20  # tokens of sampled text per input of the widest FFN; see docs/methods.md
_SAMPLED_LENGTH = 64
_LONGEST = 1024

Documents = list[list[int]]


def text_of(documents: Sequence[Sequence[int]]) -> Text:
    """The object that identifies documents."""
    return Text(tuple(tuple(document) for document in documents))


def sampled_documents(
    repository: Repository, stack: Stack, tokenizer: PreTrainedTokenizerBase, progress: Progress
) -> tuple[Documents, dict[str, Any]]:
    """Documents that the base writes, as the repository's settings say, and the metric's `source`."""
    settings = repository.config.settings
    seed = int(settings.get("metric.seed", 0))
    width = max(inner for _, inner in stack.architecture.shapes)
    total = int(settings.get("metric.tokens", _SAMPLED_TOKENS_PER_INPUT * width))
    progress.stage("text from the base", total)
    documents = sample_documents(stack, tokenizer, total, length=_SAMPLED_LENGTH, seed=seed, progress=progress.advance)
    return documents, {"kind": "sampled", "seed": seed}


def kept_documents(repository: Repository, metric: Metric, weights: Sequence[str]) -> Documents:
    """The documents of a metric whose text the store keeps.

    Args:
        weights: what the documents are wanted for, to be named where there are none.

    Raises:
        RepositoryError: the text is not kept, or the metric's moments were computed elsewhere.
    """
    if metric.text is not None and metric.source.get("kind") == "sampled":
        return [list(document) for document in Text.from_json(repository.objects.get(metric.text)).token_ids]
    if metric.source.get("kind") == "imported":
        raise RepositoryError(
            f"metric {metric.id[:12]} was imported, and the cache has nothing of it for {', '.join(weights)}",
            remedy="Import the same files again with `patchhub metric import`, or edit layers that they have.",
            weights=list(weights),
        )
    raise RepositoryError(
        f"the second moments of metric {metric.id[:12]} are not in the cache, and its text is not kept",
        remedy=f"Give the same text again: --text {' '.join(metric.source.get('names', ['FILE']))}",
        weights=list(weights),
    )


def read_documents(stack: Stack, tokenizer: PreTrainedTokenizerBase, files: Sequence[Path]) -> Documents:
    """Token ids of every document of the files, each cut to what the model can read at once (at most 1,024).

    Raises:
        RequestError: a file cannot be read, or there is no text in any.
    """
    limit = min(int(getattr(stack.model.config.get_text_config(), "max_position_embeddings", _LONGEST)), _LONGEST)
    documents: Documents = []
    for path in files:
        encoded = tokenizer(_texts_of(path), verbose=False)["input_ids"]
        documents += [list(ids[start : start + limit]) for ids in encoded for start in range(0, len(ids), limit)]
    if not any(documents):
        raise RequestError("the text given by --text has no words", remedy="Give running text.")
    return [document for document in documents if document]


def _texts_of(path: Path) -> list[str]:
    """A JSON list of texts, JSON lines of texts or {"text": ...}, or plain text with one document per line."""
    try:
        content = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            records = json.loads(content)
        elif path.suffix in (".jsonl", ".ndjson"):
            records = [json.loads(line) for line in content.split("\n") if line.strip()]
        else:
            records = content.splitlines()
    except (OSError, ValueError) as error:
        raise RequestError(
            f"the text {path} cannot be read ({error})", remedy="Give a UTF-8 text or JSON file."
        ) from error
    if not isinstance(records, list):
        raise _no_texts(path)
    texts: list[Any] = [record.get("text") if isinstance(record, dict) else record for record in records]
    if not all(isinstance(text, str) for text in texts):
        raise _no_texts(path)
    return [text for text in texts if text.strip()]


def _no_texts(path: Path) -> RequestError:
    return RequestError(
        f"the text {path} is not a list of texts",
        remedy='Give plain text, a JSON list of strings, or JSON lines with a "text" field.',
    )
