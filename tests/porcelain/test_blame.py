"""`blame`: the parts add up to the change that is there, and leaving a fact out shows who moves the answer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from patchhub.constraints import responsibilities, solve
from patchhub.delta import compact, to_dense
from patchhub.objects import Element
from patchhub.porcelain.blame import Blame, blame
from patchhub.porcelain.columns import read_columns
from patchhub.porcelain.loading import open_base, patch_state
from patchhub.porcelain.progress import Silent
from patchhub.runtime.patched_model import attach, switch
from patchhub.store.repository import Repository
from tests.porcelain.taught import PLACES, TONGUES, fact, make_store


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Repository]:
    with make_store(tmp_path_factory.mktemp("taught")) as made:
        yield made


def prompts() -> list[str]:
    return [fact(*pair).text for pair in (*PLACES, *TONGUES)]


def ranks(values: list[float]) -> np.ndarray:
    return np.argsort(np.argsort(values)).astype(float)


class LeftOut:
    """The logits at a prompt's end for any subset of the active facts, solved anew."""

    def __init__(self, repository: Repository) -> None:
        self.repository = repository
        self.checkpoint = open_base(repository)
        self.elements = repository.active(repository.head[1])
        self.tokenizer: Any = AutoTokenizer.from_pretrained(self.checkpoint.folder)
        self.model: Any = AutoModelForCausalLM.from_pretrained(self.checkpoint.folder).eval()
        attach(self.model, self.checkpoint, patch_state(repository, {}, None))

    @torch.no_grad()
    def logits(self, prompt: str, without: frozenset[Element] = frozenset()) -> torch.Tensor:
        columns = read_columns(self.repository, self.elements - without)
        deltas = {weight: [compact(solve(found))] for weight, found in columns.items()}
        switch(self.model, self.checkpoint, patch_state(self.repository, deltas, None))
        ids = self.tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        logits: torch.Tensor = self.model(**ids).logits[0, -1]
        return logits

    def effects(self, found: Blame) -> list[float]:
        """For each share of a blame, how far leaving its request out moves the logit of the answer."""
        whole = self.logits(found.prompt)
        answer = int(whole.argmax())
        left = [self.logits(found.prompt, frozenset([(s.patch, s.request_id)])) for s in found.requests]
        return [abs(float(whole[answer] - logits[answer])) for logits in left]


def test_responsibilities_add_up_to_the_solution(repository: Repository) -> None:
    for columns in read_columns(repository, repository.active(repository.head[1])).values():
        total = responsibilities(columns).T @ columns.preimages.astype(np.float64)
        np.testing.assert_allclose(total, to_dense(solve(columns)), rtol=1e-9, atol=1e-12)


def test_leaving_a_fact_out_shows_whom_to_blame(repository: Repository) -> None:
    """At each fact's prompt the blamed fact is the one whose absence moves the answer most; the other ranks agree."""
    left_out = LeftOut(repository)
    correlations = []
    for prompt in prompts():
        found = blame(repository, prompt, Silent())
        effects = left_out.effects(found)
        assert found.requests[0].request is not None
        assert found.requests[0].request.text == prompt
        assert effects[0] == max(effects)
        shares = [share.share for share in found.requests]
        correlations.append(float(np.corrcoef(ranks(shares), ranks(effects))[0, 1]))
    print(correlations)
    assert np.mean(correlations) > 0.6
