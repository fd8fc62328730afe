"""Keeps: columns that ask for no change hold what they name, and cost the facts beside them little."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from patchhub.cache import Cache
from patchhub.constraints import proof
from patchhub.delta import from_factors, to_dense
from patchhub.editing.editor import EQUAL_SHARES
from patchhub.editing.locate import encode_prompts
from patchhub.editing.metric import MetricCache
from patchhub.editing.prompts import most_moved, namesakes, siblings
from patchhub.editing.record import Recording, State, record
from patchhub.editing.rows import key_rows, mean_keys
from patchhub.objects import Request
from tests.editing.encoded import keep_rows, present_states
from tests.tiny_models import tiny_stack, tiny_tokenizer

LAYERS = (0, 1)
RIDGE = 2.0
FACTS = tuple(
    Request.make(prompt=prompt, subject=subject, target_new="Rome")
    for prompt, subject in (("The mother tongue of {} is", "Danielle Darrieux"), ("{} is a twin city of", "Lyon"))
)
KEPT = ("The mother tongue of Zoë Kravitz Hall", "Manila", "I know that the north of the United States")
TEXTS = [tuple(tiny_tokenizer()(text)["input_ids"]) for text in KEPT]


@pytest.fixture
def metric(tmp_path: Path) -> MetricCache:
    cache, architecture = MetricCache(Cache(tmp_path), "0" * 64), tiny_stack("llama").architecture
    for layer in LAYERS:
        inner = architecture.shapes[layer][1]
        draws = torch.randn(4 * inner, inner, generator=torch.Generator().manual_seed(layer), dtype=torch.float64)
        cache.store(architecture.ffn_weight(layer), draws.T @ draws / len(draws))
    return cache


def recorded(metric: MetricCache, texts: list[tuple[int, ...]], ridge: float = RIDGE) -> Recording:
    stack = tiny_stack("llama")
    rows = key_rows([encode_prompts(tiny_tokenizer(), [("{}", fact)]) for fact in FACTS])
    wanted = 5 * torch.randn(len(FACTS), 32, generator=torch.Generator().manual_seed(1))
    targets = torch.cat([wanted, present_states(stack, texts, LAYERS[-1])])
    lambdas = np.array([RIDGE] * len(FACTS) + [ridge] * len(texts), np.float32)
    every = [*rows, *keep_rows(texts, len(FACTS))]
    return record(stack, LAYERS, every, targets, lambdas, metric, State({}, {}), EQUAL_SHARES)


def moved(recording: Recording, weight: str, key: np.ndarray) -> float:
    """|| dW k ||"""
    return float(np.linalg.norm(to_dense(recording.change[weight]) @ key))


def test_a_keep_asks_for_no_change_at_the_first_layer(metric):
    recording = recorded(metric, TEXTS)
    first = recording.columns[tiny_stack("llama").architecture.ffn_weight(LAYERS[0])]
    assert float(np.abs(first.residuals[: len(FACTS)]).max()) > 0.1
    np.testing.assert_allclose(first.residuals[len(FACTS) :], 0, atol=1e-5)


def test_what_is_kept_moves_less_the_smaller_its_lambda(metric):
    weight = tiny_stack("llama").architecture.ffn_weight(LAYERS[0])
    keys = recorded(metric, TEXTS).columns[weight].keys[len(FACTS) :]
    sizes = [
        [moved(recording, weight, key) for key in keys]
        for recording in (recorded(metric, []), recorded(metric, TEXTS), recorded(metric, TEXTS, ridge=1e-3))
    ]
    for without, kept, held in zip(*sizes, strict=True):
        assert held < kept < without
        assert held < 0.01 * without


def test_keeps_are_columns_like_others(metric):
    for weight, columns in recorded(metric, TEXTS).columns.items():
        change = recorded(metric, TEXTS).change[weight]
        assert proof([from_factors(change.B, change.A)], columns) < 5e-6  # stored in float32


def test_the_places_that_move_most_are_those_with_the_longest_product(metric):
    stack = tiny_stack("llama")
    recording = recorded(metric, [])
    changes = {stack.architecture.layer_of(name): delta for name, delta in recording.change.items()}
    scores = {}
    for text in TEXTS:
        for stop in range(1, len(text) + 1):
            ids = torch.tensor([text[:stop]])
            with torch.no_grad(), stack.watch_keys(LAYERS) as keys:
                stack.model(input_ids=ids)
            total = sum(to_dense(changes[layer]) @ keys[layer][0, -1].double().numpy() for layer in LAYERS)
            scores[text[:stop]] = float(np.linalg.norm(total))
    best = sorted(scores, key=lambda text: -scores[text])[:4]
    assert most_moved(stack, changes, TEXTS, 4) == best


NAMES = ("Manila", "Arend Lijphart", "Seattle", "Danielle", "Lyon")


def test_namesakes_end_in_the_subjects_last_word_and_are_none_of_the_facts():
    hall, lyon = Request.make("{} is tall", "Zoë Kravitz Hall", "x"), Request.make("{} is in", "Lyon", "x")
    found = namesakes((hall, hall, lyon))
    assert found == list(dict.fromkeys(found)) == namesakes((hall,)) != []
    assert all(prompt == hall.prompt and name.endswith(" Hall") for prompt, name in found)
    assert namesakes((hall, Request.make(hall.prompt, found[0][1], "y"))) == found[1:]
    assert namesakes((lyon,)) == []


def test_siblings_are_the_nearest_names_in_the_facts_own_prompts(metric):
    stack, tokenizer = tiny_stack("llama"), tiny_tokenizer()
    weight = stack.architecture.ffn_weight(0)

    def found(requests: tuple[Request, ...], most: int) -> list[tuple[str, str]]:
        return siblings(stack, tokenizer, requests, 0, lambda k: metric.preimages(weight, k), most, names=NAMES)

    every = found(FACTS, len(NAMES))
    assert {prompt for prompt, _ in every} == {fact.prompt for fact in FACTS}
    assert not {fact.subject for fact in FACTS} & {name for prompt, name in every if prompt == FACTS[1].prompt}
    assert (FACTS[0].prompt, "Danielle") not in every  # a part of the subject's name
    assert found(FACTS, 2) == [*found(FACTS[:1], 2), *found(FACTS[1:], 2)]
    assert found((), 2) == []
    mine, *others = [
        mean_keys(stack, 0, key_rows([[row]]))
        for row in encode_prompts(
            tokenizer,
            [("{}", Request.make(FACTS[0].prompt, name, ".")) for name in (FACTS[0].subject, *NAMES)],
            with_target=False,
        )
    ]
    products = [float((metric.preimages(weight, mine) * k).sum()) for k in others]
    lengths = [float((metric.preimages(weight, k) * k).sum()) ** 0.5 for k in others]
    near = {name: product / length for name, product, length in zip(NAMES, products, lengths, strict=True)}
    near.pop("Danielle")
    assert [name for _, name in found(FACTS[:1], 1)] == [max(near, key=lambda name: near[name])]
