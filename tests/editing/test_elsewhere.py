"""Work that is done in parts elsewhere, in any order, gives the bits of the same work done at once; parts travel as pickles."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from patchhub.cache import Cache
from patchhub.editing import metric, steps, values
from patchhub.editing.editor import encode_facts
from patchhub.editing.metric import moment_sums, second_moments
from patchhub.editing.rows import BlockOutput
from patchhub.editing.values import KeptValues, ValueSettings, optimise_values
from patchhub.objects import Request
from patchhub.text import sampling
from patchhub.text.sampling import KeptText, sample_documents, write_documents
from tests.tiny_models import VOCABULARY, tiny_stack, tiny_tokenizer

CONTEXTS = ("{}", "Therefore. {}")
SETTINGS = ValueSettings(steps=3, learning_rate=0.2, weight_decay=0.02, kl_factor=0.0625, clamp=4.0, stop_loss=0.0)
REQUESTS = [
    Request.make(prompt, subject, target)
    for prompt, target in (("The mother tongue of {} is", "English"), ("{} is a twin city of", "Manila"))
    for subject in ("Danielle Darrieux", "Lyon", "the Eiffel Tower", "Seattle")
]
TOGETHER = [[0], [1, 5], [2, 6], [3], [4], [7]]


def in_order(function: Callable[[Any], Any]) -> Callable[[Sequence[Any]], Iterator[tuple[int, Any]]]:
    """The same from the first part to the last."""
    return lambda parts: iter([*backwards(function)(parts)][::-1])


def backwards(function: Callable[[Any], Any]) -> Callable[[Sequence[Any]], Iterator[tuple[int, Any]]]:
    """Another place for work: the last part first, all of it through pickles."""

    def run(parts: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        for place in reversed(range(len(parts))):
            yield place, pickle.loads(pickle.dumps(function(pickle.loads(pickle.dumps(parts[place])))))

    return run


def nothing(parts: Sequence[Any]) -> Iterator[tuple[int, Any]]:
    """Where everything is kept nothing is asked for."""
    assert not parts
    return iter(())


def test_values_do_not_depend_on_where_they_are_optimised(monkeypatch, tmp_path):
    monkeypatch.setattr(steps, "POSITIONS", 40)  # several parts
    facts = encode_facts(tiny_tokenizer(), REQUESTS, CONTEXTS)
    site, there = (BlockOutput(tiny_stack("llama"), 1) for _ in range(2))
    here, kept = optimise_values(site, facts, SETTINGS, together=TOGETHER), KeptValues(Cache(tmp_path), {}, 32)
    parts: list[values.Part] = []

    def optimise(part: values.Part) -> values.Values:
        parts.append(part)
        return part.optimise(there)

    finished: list[int] = []
    options: dict[str, Any] = {"together": TOGETHER, "kept": kept, "progress": finished.append}
    found = optimise_values(site, facts, SETTINGS, elsewhere=backwards(optimise), **options)
    assert len(parts) >= 4
    assert sum(finished) == len(REQUESTS)
    for name in ("targets", "hidden", "loss", "steps"):
        assert torch.equal(getattr(found, name), getattr(here, name)), name
    parts.clear()
    again = optimise_values(site, facts, SETTINGS, together=TOGETHER, kept=kept, elsewhere=nothing)
    assert torch.equal(again.targets, here.targets)


def test_text_does_not_depend_on_where_it_is_written(monkeypatch, tmp_path):
    monkeypatch.setattr(sampling, "_BATCH", 4)
    stack, tokenizer, kept = tiny_stack("llama"), tiny_tokenizer(), KeptText(Cache(tmp_path), "0" * 64)
    here = sample_documents(stack, tokenizer, 8 * 10, length=8, seed=3)

    def write(numbers: range) -> list[list[int]]:
        return write_documents(tiny_stack("llama"), tokenizer, numbers, length=8, seed=3)

    counted: list[int] = []
    options: dict[str, Any] = {"length": 8, "seed": 3, "kept": kept}
    there = sample_documents(stack, tokenizer, 80, elsewhere=backwards(write), progress=counted.append, **options)
    assert there == here
    assert sum(counted) == 80
    assert sample_documents(stack, tokenizer, 80, elsewhere=nothing, **options) == here


def test_of_text_with_gaps_only_the_gaps_are_written(monkeypatch, tmp_path):
    """The first batch is lost, as where a worker was slower than an interruption."""
    monkeypatch.setattr(sampling, "_BATCH", 4)
    stack, tokenizer, kept = tiny_stack("llama"), tiny_tokenizer(), KeptText(Cache(tmp_path), "0" * 64)
    asked: list[range] = []

    def write(numbers: range) -> list[list[int]]:
        asked.append(numbers)
        if numbers.start == 0 and len(asked) > 1:
            raise KeyboardInterrupt
        return write_documents(stack, tokenizer, numbers, length=8, seed=0)

    with pytest.raises(KeyboardInterrupt):
        sample_documents(stack, tokenizer, 80, length=8, kept=kept, elsewhere=backwards(write))
    asked.clear()
    found = sample_documents(stack, tokenizer, 80, length=8, kept=kept, elsewhere=backwards(write))
    assert asked == [range(4)]
    assert found == sample_documents(stack, tokenizer, 80, length=8)


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_second_moments_do_not_depend_on_where_they_are_summed(family, monkeypatch):
    monkeypatch.setattr(metric, "_TOKENS_PER_BATCH", 20)
    monkeypatch.setattr(metric, "_PART", 2)
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(2, VOCABULARY, (n,), generator=generator).tolist() for n in (9, 2, 17, 1, 5, 17, 12, 11)]
    stack, seen = tiny_stack(family), []

    def total(part: metric.Documents) -> metric.MomentSums:
        seen.append(part)
        return moment_sums(tiny_stack(family), [0, 2], part).to_cpu()

    counted: list[int] = []
    found = second_moments(stack, [0, 2], texts, elsewhere=in_order(total), progress=counted.append)
    assert len(seen) >= 3
    assert sum(counted) == sum(map(len, texts))
    for layer, moment in second_moments(stack, [0, 2], texts).items():
        assert torch.equal(found[layer], moment)
