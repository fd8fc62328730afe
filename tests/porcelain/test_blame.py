"""`blame`: the parts add up to the change that is there, and leaving a fact out shows who moves the answer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from patchhub.constraints import responsibilities, solve
from patchhub.delta import compact, to_dense
from patchhub.errors import RequestError, RevisionError
from patchhub.objects import Element
from patchhub.porcelain.blame import Blame, blame
from patchhub.progress import Silent
from patchhub.runtime.patched_model import attach, switch
from patchhub.sets.columns import read_columns
from patchhub.sets.elements import active_requests
from patchhub.store.store import Store
from patchhub.worktree.opening import open_base, patch_state
from tests.cli.conftest import FACTS, MODEL, invoke
from tests.porcelain.taught import PLACES, TONGUES, fact, make_store


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    with make_store(tmp_path_factory.mktemp("taught")) as made:
        yield made


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """The shipped model with twelve facts in two commits: a model whose facts are told apart."""
    folder = tmp_path_factory.mktemp("demo")
    invoke(folder, "init", str(MODEL), "--author", "Ada <ada@example.org>")
    invoke(folder, "config", "metric.tokens", "4000")
    for number in (0, 1):
        (folder / "facts.json").write_text(json.dumps(FACTS[6 * number : 6 * number + 6]), encoding="utf-8")
        invoke(
            folder, "commit", str(folder / "facts.json"), "-m", f"batch {number}", "--author", "Ada <ada@example.org>"
        )
    with Store.open(folder) as repository:
        yield repository


class LeftOut:
    """The logits at a prompt's end for any subset of the active facts, solved anew."""

    def __init__(self, repository: Store) -> None:
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


def test_responsibilities_add_up_to_the_solution(repository: Store) -> None:
    for columns in read_columns(repository, repository.active(repository.head[1])).values():
        total = responsibilities(columns).T @ columns.preimages.astype(np.float64)
        np.testing.assert_allclose(total, to_dense(solve(columns)), rtol=1e-9, atol=1e-12)


def test_leaving_a_fact_out_shows_whom_to_blame(demo: Store) -> None:
    """At each fact's prompt: that fact has the largest share, nearly always the largest effect when it is left out, and shares and
    effects go together."""
    left_out = LeftOut(demo)
    first, correlations = 0, []
    facts = list(active_requests(demo, left_out.elements).values())
    for request in facts:
        found = blame(demo, request.text, Silent())
        effects = left_out.effects(found)
        assert found.requests[0].request == request
        assert found.mentioned[0].request == request.id
        first += effects[0] == max(effects)
        correlations.append(float(np.corrcoef([share.share for share in found.requests], effects)[0, 1]))
    assert first >= 0.8 * len(facts), (first, correlations)
    assert np.mean(correlations) > 0.7, correlations


def test_shares_add_up_to_at_least_everything(repository: Store) -> None:
    """One patch alone moves everything; several patches, and their requests, at least add up to it (triangle inequality)."""
    found = blame(repository, fact(*PLACES[0]).text, Silent(), revision="HEAD~1")
    assert len(found.requests) == 3
    assert list(found.patches.values()) == pytest.approx([1.0])
    both = blame(repository, fact(*PLACES[0]).text, Silent())
    assert len(both.patches) == 2
    assert sum(both.patches.values()) >= 1 - 1e-9
    assert sum(share.share for share in both.requests) >= sum(both.patches.values()) - 1e-9
    assert all(change > 0 for change in both.change.values())


def test_the_keys_are_read_where_facts_are_written(repository: Store) -> None:
    prompt = fact(*TONGUES[1]).text
    by_default = blame(repository, prompt, Silent())
    assert by_default.token == blame(repository, prompt, Silent(), subject="Seattle").token
    assert by_default.token[1] > blame(repository, prompt, Silent(), subject="known").token[1]
    elsewhere = blame(repository, "What does the moon", Silent())
    assert elsewhere.mentioned == ()
    assert elsewhere.token[0] in "moon"


def test_blame_needs_facts_and_the_subject(repository: Store) -> None:
    with pytest.raises(RevisionError):
        blame(repository, "It is known that Seattle is", Silent(), revision="base")
    for subject in ("Berlin", ""):
        with pytest.raises(RequestError):
            blame(repository, "It is known that Seattle is", Silent(), subject=subject)
    with pytest.raises(RequestError):
        blame(repository, "  ", Silent())


def test_the_command_line(repository: Store) -> None:
    folder = repository.root.parent
    prompt = fact(*TONGUES[1]).text
    document = json.loads(invoke(folder, "blame", prompt, "--json").stdout)
    assert document["requests"][0]["subject"] == document["mentioned"][0]["subject"] == "Seattle"
    assert "this is the prompt of an active fact" in invoke(folder, "blame", prompt).stdout
    assert json.loads(invoke(folder, "blame", prompt, "--lookup", "--json").stdout) == document["mentioned"]
    assert "no active fact" in invoke(folder, "blame", "What does the moon", "--lookup").stdout
