"""Text that is kept aside: a tenth of the metric's documents that no second moment was computed from, to measure drift on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from transformers import PreTrainedTokenizerBase

from patchhub.editing.sampling import sample_documents
from patchhub.errors import PatchhubError
from patchhub.evaluation.drift import leading
from patchhub.fsio import keep
from patchhub.models.tracing import Stack
from patchhub.objects import Metric, Text
from patchhub.store.repository import Repository

_EVERY: Final = 10
_KEPT_POSITIONS: Final = 16_384
_SAMPLED_TOKENS: Final = 2_048
_SAMPLED_LENGTH: Final = 64
_SEED_STEP: Final = 1  # fallback text must not be the text that the metric was sampled with

Documents = Sequence[Sequence[int]]


def set_aside(documents: Documents) -> tuple[list[list[int]], list[list[int]]]:
    """(measured, held): the second moments' documents, and every tenth one."""
    measured = [list(document) for number, document in enumerate(documents, 1) if number % _EVERY]
    return measured, [list(document) for document in documents[_EVERY - 1 :: _EVERY]]


def measured_part(documents: Documents, metric: Metric) -> list[list[int]]:
    """Of all documents of a metric's text, those that its second moments are of."""
    return set_aside(documents)[0] if metric.source.get("held") else [list(document) for document in documents]


def keep_held(repository: Repository, metric: Metric, held: Documents) -> None:
    """Keep the held documents of the user's own text, which is no object, in the cache."""
    if held and metric.source.get("kind") != "sampled":
        _write(repository, metric.id, leading(held, _KEPT_POSITIONS))


def kept_documents(repository: Repository, metric: Metric | None) -> list[tuple[int, ...]] | None:
    """The held documents of a metric that are at hand without a model; None where `held_documents` has to sample them."""
    if metric is None:
        return _read(repository, repository.config.base_id)
    sampled = metric.source.get("kind") == "sampled" and metric.source.get("held")
    if sampled and metric.text is not None and metric.text in repository.objects:
        return [tuple(d) for d in set_aside(Text.from_json(repository.objects.get(metric.text)).token_ids)[1]]
    return _read(repository, metric.id)


def held_documents(
    repository: Repository, metric: Metric | None, stack: Stack, tokenizer: PreTrainedTokenizerBase
) -> list[tuple[int, ...]]:
    """The held documents of a metric, as token ids.

    Where there are none (a metric of an earlier version or another origin, a clone, an emptied cache) they are sampled from the base
    and kept in the cache.

    Args:
        metric: None for a store without one.
        stack: the base, unpatched.
    """
    kept = kept_documents(repository, metric)
    if kept is None:
        seed = int(metric.source.get("seed", 0) if metric else 0) + _SEED_STEP
        kept = [
            tuple(document)
            for document in sample_documents(stack, tokenizer, _SAMPLED_TOKENS, length=_SAMPLED_LENGTH, seed=seed)
        ]
        _write(repository, metric.id if metric else repository.config.base_id, kept)
    return kept


def _read(repository: Repository, name: str) -> list[tuple[int, ...]] | None:
    """What the cache holds; None where it is missing or damaged."""
    try:
        return list(Text.from_json((repository.cache / "held" / f"{name}.json").read_bytes()).token_ids)
    except (OSError, PatchhubError):
        return None


def _write(repository: Repository, name: str, documents: Documents) -> None:
    folder = repository.cache / "held"
    text = Text(tuple(tuple(document) for document in documents))
    keep(folder / f"{name}.json", [text.to_json()])
