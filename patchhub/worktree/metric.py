"""What all recordings of a repository share: one metric and one list of contexts, made once and pinned in its config.

The text of the metric comes from the user's files or from the base itself. A tenth of its documents is held aside to measure drift on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from transformers import PreTrainedTokenizerBase

from patchhub.cache import Kind, Slot
from patchhub.editing.metric import (
    MEMORY,
    SPILLED,
    Covariance,
    Documents,
    MetricCache,
    MomentSums,
    NullSpace,
    Preimages,
    layer_groups,
    moment_sums,
    second_moments,
    streamed_moments,
)
from patchhub.errors import RepositoryError, RequestError, SettingsError
from patchhub.evaluation.metrics import leading
from patchhub.models.tracing import Stack
from patchhub.objects import Metric, Text
from patchhub.progress import Progress, note
from patchhub.runtime.patched_model import unpatched
from patchhub.sets.columns import stacked_weights
from patchhub.sets.settings import metric_settings
from patchhub.store.config import Recording
from patchhub.store.store import Store
from patchhub.text.sampling import KeptText, context_templates, sample_documents, write_documents
from patchhub.worktree.workers import Opened, Workers

HELD: Final = Kind("held", ".json")

_EVERY: Final = 10
_KEPT_POSITIONS: Final = 16_384
_SAMPLED_TOKENS: Final = 2_048
_HELD_LENGTH: Final = 64
_SEED_STEP: Final = 1  # fallback text must not be the text that the metric was sampled with


def set_aside(documents: Documents) -> tuple[list[list[int]], list[list[int]]]:
    """(measured, held): the second moments' documents, and every tenth one."""
    measured = [list(document) for number, document in enumerate(documents, 1) if number % _EVERY]
    return measured, [list(document) for document in documents[_EVERY - 1 :: _EVERY]]


def with_held(tokens: int) -> int:
    """How many tokens of text leave so many when the held part is set aside."""
    return -(-tokens * _EVERY // (_EVERY - 1))


def measured_part(documents: Documents, metric: Metric) -> list[list[int]]:
    """Of all documents of a metric's text, those that its second moments are of."""
    return set_aside(documents)[0] if metric.source.get("held") else [list(document) for document in documents]


def keep_held(repository: Store, metric: Metric, held: Documents) -> None:
    """Keep the held documents of the user's own text, which is no object, in the cache."""
    if held and metric.source.get("kind") != "sampled":
        _write(repository, metric.id, leading(held, _KEPT_POSITIONS))


def kept_held_documents(repository: Store, metric: Metric | None) -> list[tuple[int, ...]] | None:
    """The held documents of a metric that are at hand without a model; None where `held_documents` has to sample them."""
    if metric is None:
        return _read(repository, repository.config.base_id)
    sampled = metric.source.get("kind") == "sampled" and metric.source.get("held")
    if sampled and metric.text is not None and metric.text in repository.objects:
        return [tuple(d) for d in set_aside(Text.from_json(repository.objects.get(metric.text)).token_ids)[1]]
    return _read(repository, metric.id)


def held_documents(
    repository: Store, metric: Metric | None, stack: Stack, tokenizer: PreTrainedTokenizerBase
) -> list[tuple[int, ...]]:
    """The held documents of a metric, as token ids.

    Where there are none (a metric of an earlier version or another origin, a clone, an emptied cache) they are sampled from the base
    and kept in the cache.

    Args:
        metric: None for a store without one.
        stack: the base, unpatched.
    """
    kept = kept_held_documents(repository, metric)
    if kept is None:
        seed = int(metric.source.get("seed", 0) if metric else 0) + _SEED_STEP
        kept = [
            tuple(document)
            for document in sample_documents(
                stack, tokenizer, _SAMPLED_TOKENS, length=_HELD_LENGTH, seed=seed, kept=kept_text(repository)
            )
        ]
        _write(repository, metric.id if metric else repository.config.base_id, kept)
    return kept


def _read(repository: Store, name: str) -> list[tuple[int, ...]] | None:
    """What the cache holds of a metric or, of a store without one, the base."""
    kept = next(repository.cache.slot(HELD, of=name).contents(), None)
    return None if kept is None else list(Text.from_json(kept).token_ids)


def _write(repository: Store, name: str, documents: Documents) -> None:
    repository.cache.slot(HELD, of=name).keep([text_of(documents).to_json()])


_SAMPLED_TOKENS_PER_INPUT = 10  # tokens of sampled text per input of the widest FFN; see docs/methods.md
_SAMPLED_LENGTH = 64
_LONGEST = 1024


def text_of(documents: Sequence[Sequence[int]]) -> Text:
    """The object that identifies documents."""
    return Text(tuple(tuple(document) for document in documents))


def sampled_documents(
    repository: Store,
    stack: Stack,
    tokenizer: PreTrainedTokenizerBase,
    progress: Progress,
    workers: Workers | None = None,
) -> tuple[Documents, dict[str, Any]]:
    """Documents that the base writes, as the repository's settings say, and the metric's `source`."""
    settings = repository.config.settings
    seed = int(settings.get("metric.seed", 0))
    width = max(p.shape[1] // max(1, p.experts) for p in stack.architecture.feed_forward)
    total = int(settings.get("metric.tokens", _SAMPLED_TOKENS_PER_INPUT * width))
    note(
        progress,
        f"This first commit reads the base: {total:,} tokens that it writes by itself, and how it uses them. The text is kept for all "
        "repositories of this base. --text FILE takes yours instead.",
    )
    progress.stage("text from the base", total)
    documents = sample_documents(
        stack,
        tokenizer,
        total,
        length=_SAMPLED_LENGTH,
        seed=seed,
        kept=kept_text(repository),
        elsewhere=workers.each(_written, seed) if workers else None,
        progress=progress.advance,
    )
    return documents, {"kind": "sampled", "seed": seed}


def _written(seed: int, numbers: range, opened: Opened) -> list[list[int]]:
    """A worker's part of `sampled_documents`."""
    with unpatched(opened.stack.model):
        return write_documents(opened.stack, opened.tokenizer, numbers, length=_SAMPLED_LENGTH, seed=seed)


def _summed(layers: Sequence[int], documents: Documents, opened: Opened) -> MomentSums:
    """A worker's part of the second moments."""
    with unpatched(opened.stack.model):
        return moment_sums(opened.stack, layers, documents).to_cpu()


def kept_text(repository: Store) -> KeptText:
    """Where text that the base writes is kept, for every repository of it."""
    return KeptText(repository.shared, repository.config.base_id)


def kept_documents(repository: Store, metric: Metric, weights: Sequence[str]) -> Documents:
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
    documents: list[list[int]] = []
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


@dataclass(frozen=True)
class Recorder:
    """The metric's id and what is kept of it, and the contexts."""

    metric: str
    cache: MetricCache
    contexts: tuple[str, ...]


def open_recorder(
    repository: Store,
    stack: Stack,
    tokenizer: PreTrainedTokenizerBase,
    layers: Sequence[int],
    text: Sequence[Path],
    progress: Progress,
    *,
    memory: int = MEMORY,
    workers: Workers | None = None,
) -> Recorder:
    """The repository's metric with all that ``layers`` need, computed and pinned now if there is none yet.

    Args:
        stack: the base in any state; text is sampled and second moments are computed with the patch taken away.
        text: files to compute the metric from; none: the base writes it.
        memory: bytes that sums and factors may take.
        workers: who writes the text and sums the moments; None: the model at hand.

    Raises:
        RepositoryError: another text is given than the one that the metric was made from, or its factors are not in the
            cache and cannot be made again without that text.
        RequestError: a text file cannot be read.
    """
    pinned = repository.config.recording
    if pinned is None:
        return start_recorder(repository, stack, tokenizer, layers, text, progress, memory=memory, workers=workers)
    metric = Metric.from_json(repository.objects.get(pinned.metric))
    documents = read_documents(stack, tokenizer, text) if text else None
    if documents is not None and text_of(documents).id != metric.text:
        raise RepositoryError(
            f"this repository's metric {metric.id[:12]} was made from other text than --text gives",
            remedy="Leave --text out: one repository has one metric, which `patchhub metric compute --text` replaces until a commit.",
        )
    cache = metric_cache(repository, metric)
    _complete(repository, metric, cache, stack, layers, documents, progress, memory, workers)
    return Recorder(metric.id, cache, pinned.contexts)


def start_recorder(
    repository: Store,
    stack: Stack,
    tokenizer: PreTrainedTokenizerBase,
    layers: Sequence[int],
    text: Sequence[Path],
    progress: Progress,
    *,
    memory: int = MEMORY,
    workers: Workers | None = None,
) -> Recorder:
    """A new metric as the repository's settings say, and contexts, pinned in place of what was pinned before.

    Args and errors are those of `open_recorder`.
    """
    if text:
        documents, source = read_documents(stack, tokenizer, text), _from_files(text)
    elif stack.streamed is not None:
        raise SettingsError(
            "the base's blocks are streamed, and text that it writes by itself would read all of them for every token",
            remedy="Give running text of some ten thousand words: --text FILE. Or import a metric of this base: `patchhub metric import`.",
        )
    else:
        with unpatched(stack.model):
            documents, source = sampled_documents(repository, stack, tokenizer, progress, workers)
    metric = _new_metric(repository, documents, source)
    cache = metric_cache(repository, metric)
    _complete(repository, metric, cache, stack, layers, documents, progress, memory, workers)
    with unpatched(stack.model):
        contexts = context_templates(stack, tokenizer)
    pin(repository, metric, contexts)
    return Recorder(metric.id, cache, contexts)


def pin(repository: Store, metric: Metric, contexts: tuple[str, ...]) -> None:
    """Make this the metric and the contexts of the repository."""
    identity = repository.objects.put(metric.to_json())
    repository.change_config(lambda config: replace(config, recording=Recording(identity, contexts)))


def metric_cache(repository: Store, metric: Metric) -> MetricCache:
    """What the repository's cache holds of a metric."""
    return MetricCache(repository.cache, metric.id, preimages_by(metric), stacked_weights(repository))


def preimages_by(metric: Metric) -> Preimages:
    """The kind of a metric as a computation."""
    numbers = {name: float(value) for name, value in metric.settings.items()}
    return NullSpace(**numbers) if metric.kind == "null_space" else Covariance(**numbers)


def _new_metric(repository: Store, documents: Documents, source: Mapping[str, Any]) -> Metric:
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
    repository: Store,
    metric: Metric,
    cache: MetricCache,
    stack: Stack,
    layers: Sequence[int],
    documents: Documents | None,
    progress: Progress,
    memory: int,
    workers: Workers | None,
) -> None:
    """Compute what the cache lacks for ``layers``: one pass over the text per group of layers that fits into memory."""
    weights = {layer: stack.architecture.ffn_weight(layer) for layer in layers}
    missing = [layer for layer, weight in weights.items() if not cache.has(weight)]
    if not missing:
        return
    texts = documents or kept_documents(repository, metric, [weights[layer] for layer in missing])
    measured = measured_part(texts, metric)
    if stack.streamed is not None:
        _complete_streamed(repository, cache, stack, {layer: weights[layer] for layer in missing}, measured, progress)
        return
    projections = [stack.architecture.feed_forward[layer] for layer in missing]
    experts = max(1, *(p.experts for p in projections))
    width = max(p.shape[1] // max(1, p.experts) for p in projections)
    groups = layer_groups(missing, width, memory, experts=experts)
    progress.stage("second moments", len(groups) * sum(map(len, measured)))
    for group in groups:
        elsewhere = workers.each(_summed, group, in_order=True) if workers else None
        with unpatched(stack.model):
            moments = second_moments(stack, group, measured, elsewhere=elsewhere, progress=progress.advance)
        for layer in group:
            cache.store(weights[layer], moments.pop(layer))


def _complete_streamed(
    repository: Store,
    cache: MetricCache,
    stack: Stack,
    weights: Mapping[int, str],
    documents: Documents,
    progress: Progress,
) -> None:
    """Compute what the cache lacks, in one pass over the blocks, whatever memory there is: one layer's sums are held at a time."""
    text = {"base": repository.config.base_id, "text": text_of(documents).id}

    def spilled(index: int) -> Slot:
        return repository.cache.slot(
            SPILLED, **text, dtype=str(stack.model.dtype), device=stack.device.type, block=index
        )

    layers = sorted(weights)
    progress.stage("second moments, block by block", (layers[-1] + 1) * sum(map(len, documents)))
    with unpatched(stack.model):
        for layer, moment in streamed_moments(stack, layers, documents, spilled, progress=progress.advance):
            cache.store(weights[layer], moment)
