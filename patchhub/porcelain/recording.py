"""What all recordings of a repository share: one metric and one list of contexts, made once and pinned in its config."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from patchhub.editing.metric import MetricCache, regularised, second_moments
from patchhub.editing.sampling import context_templates, sample_documents
from patchhub.errors import RepositoryError, RequestError
from patchhub.models.tracing import Stack
from patchhub.objects import Metric, Text
from patchhub.porcelain.progress import Progress
from patchhub.store.config import Recording
from patchhub.store.repository import Repository

_SAMPLED_TOKENS_PER_INPUT = 20  # tokens of sampled text per input of the widest FFN; see docs/methods.md
_SAMPLED_LENGTH = 64


@dataclass(frozen=True)
class Recorder:
    """The metric's id and factors, and the contexts."""

    metric: str
    cache: MetricCache
    contexts: tuple[str, ...]


def open_recorder(
    repository: Repository,
    stack: Stack,
    tokenizer: PreTrainedTokenizerBase,
    layers: Sequence[int],
    text: Sequence[Path],
    progress: Progress,
) -> Recorder:
    """The repository's metric with factors for ``layers``, computed and pinned now if there is none yet.

    Raises:
        RepositoryError: another text is given than the one that the metric was made from, or its factors are not in the
            cache and cannot be made again without that text.
        RequestError: a text file cannot be read.
    """
    pinned = repository.config.recording
    documents = _read_documents(stack, tokenizer, text) if text else None
    if pinned is None:
        metric, documents = _new_metric(repository, stack, tokenizer, documents, text, progress)
        identity = repository.objects.put(metric.to_json())
        contexts = context_templates(stack, tokenizer)
    else:
        identity, contexts = pinned.metric, pinned.contexts
        metric = Metric.from_json(repository.objects.get(identity))
        if documents is not None and _text(documents).id != metric.text:
            raise RepositoryError(
                f"this repository's metric {identity[:12]} was made from other text than --text gives",
                remedy="Leave --text out; one repository has one metric.",
            )
    cache = MetricCache(repository.cache / "metric" / identity)
    weights = {layer: stack.architecture.ffn_weight(layer) for layer in layers}
    missing = [layer for layer, weight in weights.items() if not cache.has(weight)]
    if missing:
        documents = documents if documents is not None else _kept_documents(repository, metric)
        progress.stage("second moments", sum(map(len, documents)))
        moments = second_moments(stack, missing, documents, progress=progress.advance)
        for layer in missing:
            cache.store(weights[layer], regularised(moments.pop(layer), metric.epsilon))
    if pinned is None:
        repository.write_config(replace(repository.config, recording=Recording(identity, contexts)))
    return Recorder(identity, cache, contexts)


def _new_metric(
    repository: Repository,
    stack: Stack,
    tokenizer: PreTrainedTokenizerBase,
    documents: list[list[int]] | None,
    text: Sequence[Path],
    progress: Progress,
) -> tuple[Metric, list[list[int]]]:
    settings: Mapping[str, Any] = repository.config.settings
    epsilon = float(settings.get("metric.epsilon", 0.01))
    source: dict[str, Any]
    if documents is not None:
        source = {"kind": "file", "names": [path.name for path in text]}
    else:
        seed = int(settings.get("metric.seed", 0))
        width = max(inner for _, inner in stack.architecture.shapes)
        total = int(settings.get("metric.tokens", _SAMPLED_TOKENS_PER_INPUT * width))
        progress.stage("text from the base", total)
        documents = sample_documents(
            stack, tokenizer, total, length=_SAMPLED_LENGTH, seed=seed, progress=progress.advance
        )
        source = {"kind": "sampled", "seed": seed}
    kept = _text(documents)
    if source["kind"] == "sampled":
        repository.objects.put(kept.to_json())
    metric = Metric(
        base=repository.config.base_id,
        epsilon=epsilon,
        source=source,
        text=kept.id,
        tokens=sum(map(len, documents)),
        truncation=max(map(len, documents)),
    )
    return metric, documents


def _text(documents: Sequence[Sequence[int]]) -> Text:
    return Text(tuple(tuple(document) for document in documents))


def _kept_documents(repository: Repository, metric: Metric) -> list[list[int]]:
    if metric.source.get("kind") != "sampled":
        raise RepositoryError(
            f"the second moments of metric {metric.id[:12]} are not in the cache, and its text is not kept",
            remedy=f"Give the same text again: --text {' '.join(metric.source.get('names', ['FILE']))}",
        )
    return [list(document) for document in Text.from_json(repository.objects.get(metric.text)).token_ids]


def _read_documents(stack: Stack, tokenizer: PreTrainedTokenizerBase, files: Sequence[Path]) -> list[list[int]]:
    """Token ids of every document of the files, each cut to what the model can read at once (at most 1,024)."""
    limit = min(int(getattr(stack.model.config.get_text_config(), "max_position_embeddings", 1024)), 1024)
    documents: list[list[int]] = []
    for path in files:
        texts = _documents_of(path)
        encoded = tokenizer(texts, verbose=False)["input_ids"]
        documents += [list(ids[start : start + limit]) for ids in encoded for start in range(0, len(ids), limit)]
    if not any(documents):
        raise RequestError("the text given by --text has no words", remedy="Give running text.")
    return [document for document in documents if document]


def _documents_of(path: Path) -> list[str]:
    """A JSON list of texts, JSON lines of texts or {"text": ...}, or plain text with one document per line."""
    try:
        content = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            records = json.loads(content)
        elif path.suffix in (".jsonl", ".ndjson"):
            records = [json.loads(line) for line in content.splitlines() if line.strip()]
        else:
            records = content.splitlines()
    except (OSError, ValueError) as error:
        raise RequestError(
            f"the text {path} cannot be read ({error})", remedy="Give a UTF-8 text or JSON file."
        ) from error
    texts: list[Any] = [record.get("text") if isinstance(record, dict) else record for record in records or ()]
    if not isinstance(records, list) or not all(isinstance(text, str) for text in texts):
        raise RequestError(
            f"the text {path} is not a list of texts",
            remedy='Give plain text, a JSON list of strings, or JSON lines with a "text" field.',
        )
    return [text for text in texts if text.strip()]
