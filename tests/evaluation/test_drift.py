"""Drift against its definition: one text at a time, all logits, float64."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from patchhub.errors import RequestError
from patchhub.evaluation.metrics import drift, leading, read_text, room
from tests.evaluation.conftest import VOCABULARY

LENGTHS = (9, 3, 2, 17, 9, 1)


@pytest.fixture
def pair(model_and_tokenizer):
    """A model, another one near it, and documents of several lengths, one of a single token."""
    model, _ = model_and_tokenizer
    other = copy.deepcopy(model)
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw, dtype=parameter.dtype), alpha=0.02)
    documents = [torch.randint(VOCABULARY, (length,), generator=draw).tolist() for length in LENGTHS]
    return model, other, documents


def test_kl_and_perplexity_ratio_are_those_of_the_definition(pair) -> None:
    model, other, documents = pair
    divergences, growths = [], []
    for document in documents:
        ids = torch.tensor([document])
        with torch.no_grad():
            p, q = (one(ids).logits[0, :-1].log_softmax(-1) for one in (model, other))
        divergences += (p.exp() * (p - q)).sum(-1).tolist()
        at = torch.arange(len(document) - 1), ids[0, 1:]
        growths += (p[at] - q[at]).tolist()
    found = drift(other, read_text(model, documents, batch_tokens=40))
    assert found.positions == len(divergences) == sum(length - 1 for length in LENGTHS)
    assert found.kl == pytest.approx(sum(divergences) / len(divergences), abs=1e-9)
    assert found.perplexity_ratio == pytest.approx(math.exp(sum(growths) / len(growths)), abs=1e-9)


def test_nothing_changed_is_no_drift(pair) -> None:
    model, _, documents = pair
    found = drift(model, read_text(model, documents))
    assert found.kl == pytest.approx(0.0, abs=1e-12)
    assert found.perplexity_ratio == pytest.approx(1.0, abs=1e-12)


def test_logits_that_are_no_numbers_are_infinitely_far(pair) -> None:
    model, other, documents = pair
    with torch.no_grad():
        other.get_output_embeddings().weight[0] = math.nan
    found = drift(other, read_text(model, documents))
    assert (found.kl, found.perplexity_ratio) == (math.inf, math.inf)


def test_text_without_a_second_token_is_refused(pair) -> None:
    with pytest.raises(RequestError):
        read_text(pair[0], [[3], []])


@pytest.mark.parametrize("positions", range(12))
def test_leading_documents_have_exactly_so_many_positions(positions: int) -> None:
    documents = [[1, 2, 3, 4], [5], [6, 7], [8, 9, 10, 11, 12, 13, 14, 15, 16]]
    chosen = leading(documents, positions)
    assert sum(len(document) - 1 for document in chosen) == positions
    assert all(len(document) > 1 for document in chosen)
    long = [document for document in documents if len(document) > 1]
    assert all(list(part) == whole[: len(part)] for part, whole in zip(chosen, long, strict=False))


def test_room_shrinks_with_the_vocabulary() -> None:
    assert room(50_000) > room(150_000) > 100
    assert room(1 << 40) == 1
