"""Drift by document: sums that make up the whole, compared with one text at a time; intervals over documents."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from patchhub.evaluation.metrics import document_drifts, drift, perplexity, read_text
from patchhub.evaluation.suites import drift_scores

TEXTS = ["The capital of France is Paris, and the capital of Spain", "Zoë Kravitz speaks English", "x is 東京"]


@pytest.fixture
def moved(model_and_tokenizer):
    """The model, a copy with one weight changed, and the documents."""
    model, tokenizer = model_and_tokenizer
    other = copy.deepcopy(model)
    with torch.no_grad():
        head = other.get_output_embeddings().weight
        head += 0.05 * torch.randn(head.shape, generator=torch.Generator().manual_seed(3), dtype=head.dtype)
    return model, other, tokenizer, [tuple(tokenizer(text).input_ids) for text in TEXTS]


def plain(model, other, ids):
    """Growth of the loss and KL(model || other), summed over one text's positions, from all logits."""
    tokens = torch.tensor([ids])
    with torch.no_grad():
        before, after = (one(tokens).logits[0, :-1].double().log_softmax(-1) for one in (model, other))
    at = tokens[0, 1:, None]
    return float((before.gather(-1, at) - after.gather(-1, at)).sum()), float((before.exp() * (before - after)).sum())


def test_scores_are_those_of_single_texts(moved):
    model, other, tokenizer, documents = moved
    found = document_drifts(other, read_text(model, documents, batch_tokens=40))
    expected = sorted(plain(model, other, ids) for ids in documents)
    assert sorted(part.growth for part in found) == pytest.approx([growth for growth, _ in expected], abs=1e-9)
    assert sum(part.divergence for part in found) == pytest.approx(sum(kl for _, kl in expected), abs=1e-9)
    positions = sum(len(ids) - 1 for ids in documents)
    scores = drift_scores(found).estimates
    assert set(scores) == {"perplexity_ratio", "kl"}
    assert scores["kl"].value == pytest.approx(sum(kl for _, kl in expected) / positions, abs=1e-9)
    ratio = perplexity(other, tokenizer, TEXTS) / perplexity(model, tokenizer, TEXTS)
    assert scores["perplexity_ratio"].value == pytest.approx(ratio, rel=1e-9)
    assert all(score.low <= score.value <= score.high and score.records == 3 for score in scores.values())
    whole = drift(other, read_text(model, documents))
    assert (whole.kl, whole.perplexity_ratio) == pytest.approx((scores["kl"].value, ratio))


def test_no_change_is_no_drift(moved):
    model, _, _, documents = moved
    scores = drift_scores(document_drifts(model, read_text(model, documents))).estimates
    assert (scores["kl"].value, scores["perplexity_ratio"].value) == (0, 1)
    assert math.isclose(scores["kl"].high, 0)
