"""What all recordings of a repository share: one metric and one list of contexts, made once and pinned in its config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from patchhub.editing.metric import MEMORY, MetricCache, layer_groups, second_moments
from patchhub.editing.preimages import Covariance, NullSpace, Preimages
from patchhub.editing.sampling import context_templates
from patchhub.errors import RepositoryError
from patchhub.models.tracing import Stack
from patchhub.objects import Metric
from patchhub.porcelain.held_text import keep_held, measured_part, set_aside
from patchhub.porcelain.metric_text import (
    Documents,
    kept_documents,
    read_documents,
    sampled_documents,
    text_of,
)
from patchhub.porcelain.progress import Progress
from patchhub.porcelain.settings import metric_settings
from patchhub.runtime.patched_model import unpatched
from patchhub.store.config import Recording
from patchhub.store.repository import Repository


@dataclass(frozen=True)
class Recorder:
    """The metric's id and what is kept of it, and the contexts."""

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
    *,
    memory: int = MEMORY,
) -> Recorder:
    """The repository's metric with all that ``layers`` need, computed and pinned now if there is none yet.

    Args:
        stack: the base in any state; text is sampled and second moments are computed with the patch taken away.
        text: files to compute the metric from; none: the base writes it.
        memory: bytes that sums and factors may take.

    Raises:
        RepositoryError: another text is given than the one that the metric was made from, or its factors are not in the
            cache and cannot be made again without that text.
        RequestError: a text file cannot be read.
    """
    pinned = repository.config.recording
    if pinned is None:
        return start_recorder(repository, stack, tokenizer, layers, text, progress, memory=memory)
    metric = Metric.from_json(repository.objects.get(pinned.metric))
    documents = read_documents(stack, tokenizer, text) if text else None
    if documents is not None and text_of(documents).id != metric.text:
        raise RepositoryError(
            f"this repository's metric {metric.id[:12]} was made from other text than --text gives",
            remedy="Leave --text out: one repository has one metric, which `patchhub metric compute --text` replaces until a commit.",
        )
    cache = metric_cache(repository, metric)
    _complete(repository, metric, cache, stack, layers, documents, progress, memory)
    return Recorder(metric.id, cache, pinned.contexts)


def start_recorder(
    repository: Repository,
    stack: Stack,
    tokenizer: PreTrainedTokenizerBase,
    layers: Sequence[int],
    text: Sequence[Path],
    progress: Progress,
    *,
    memory: int = MEMORY,
) -> Recorder:
    """A new metric as the repository's settings say, and contexts, pinned in place of what was pinned before.

    Args and errors are those of `open_recorder`.
    """
    if text:
        documents, source = read_documents(stack, tokenizer, text), _from_files(text)
    else:
        with unpatched(stack.model):
            documents, source = sampled_documents(repository, stack, tokenizer, progress)
    metric = _new_metric(repository, documents, source)
    cache = metric_cache(repository, metric)
    _complete(repository, metric, cache, stack, layers, documents, progress, memory)
    with unpatched(stack.model):
        contexts = context_templates(stack, tokenizer)
    pin(repository, metric, contexts)
    return Recorder(metric.id, cache, contexts)


def pin(repository: Repository, metric: Metric, contexts: tuple[str, ...]) -> None:
    """Make this the metric and the contexts of the repository."""
    identity = repository.objects.put(metric.to_json())
    repository.change_config(lambda config: replace(config, recording=Recording(identity, contexts)))


def metric_cache(repository: Repository, metric: Metric) -> MetricCache:
    """What the repository's cache holds of a metric."""
    return MetricCache(repository.cache / "metric" / metric.id, preimages_by(metric))


def preimages_by(metric: Metric) -> Preimages:
    """The kind of a metric as a computation."""
    numbers = {name: float(value) for name, value in metric.settings.items()}
    return NullSpace(**numbers) if metric.kind == "null_space" else Covariance(**numbers)


def _new_metric(repository: Repository, documents: Documents, source: Mapping[str, Any]) -> Metric:
    """The metric object of a text; keeps the text where it may, and the held part."""
    measured, held = set_aside(documents)
    text = text_of(documents)
    if source["kind"] == "sampled":
        repository.objects.put(text.to_json())
    kind, numbers = metric_settings(repository)
    metric = Metric(
        base=repository.config.base_id,
        kind=kind,
        settings=numbers,
        source={**source, "held": len(held)},
        text=text.id,
        tokens=sum(map(len, measured)),
        truncation=max(map(len, documents)),
    )
    keep_held(repository, metric, held)
    return metric


def _from_files(files: Sequence[Path]) -> dict[str, Any]:
    return {"kind": "file", "names": [path.name for path in files]}


def _complete(
    repository: Repository,
    metric: Metric,
    cache: MetricCache,
    stack: Stack,
    layers: Sequence[int],
    documents: Documents | None,
    progress: Progress,
    memory: int,
) -> None:
    """Compute what the cache lacks for ``layers``: one pass over the text per group of layers that fits into memory."""
    weights = {layer: stack.architecture.ffn_weight(layer) for layer in layers}
    missing = [layer for layer, weight in weights.items() if not cache.has(weight)]
    if not missing:
        return
    texts = documents or kept_documents(repository, metric, [weights[layer] for layer in missing])
    measured = measured_part(texts, metric)
    width = max(stack.architecture.shapes[layer][1] for layer in missing)
    groups = layer_groups(missing, width, memory)
    progress.stage("second moments", len(groups) * sum(map(len, measured)))
    for group in groups:
        with unpatched(stack.model):
            moments = second_moments(stack, group, measured, progress=progress.advance)
        for layer in group:
            cache.store(weights[layer], moments.pop(layer))
