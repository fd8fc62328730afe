"""Facts behind a norm: the value is one that the norm can give, and layers make up together what one of them misses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from patchhub.cache import Cache
from patchhub.delta import to_dense
from patchhub.editing.editor import EQUAL_SHARES, MEMIT, REPLAYED, ROOT_SHARES, Way, encode_facts
from patchhub.editing.metric import MetricCache
from patchhub.editing.prompts import most_moved
from patchhub.editing.record import Recording, Spread, State, record, side_paths
from patchhub.editing.rows import FeedForward, key_rows
from patchhub.editing.values import ValueSettings, optimise_values
from patchhub.models.tracing import Stack
from patchhub.objects import Request
from tests.editing.encoded import keep_rows, present_states
from tests.tiny_models import tiny_stack, tiny_tokenizer

NORMED = ("gemma3_text", "olmo2")
LAYERS, RIDGE, SMALL = (0, 1, 2), 0.5, 1e-7
EMPTY = State({}, {})
SETTINGS = ValueSettings(steps=12, learning_rate=0.5, weight_decay=0.5, kl_factor=0.1, clamp=4.0, stop_loss=0.0)
REQUESTS = tuple(
    Request.make(prompt=prompt, subject=subject, target_new=target)
    for prompt, subject, target in (
        ("The mother tongue of {} is", "Danielle Darrieux", "Dutch"),
        ("{} is a twin city of", "Lyon", "Manila"),
        ("The mother tongue of {} is", "Arend Lijphart", "French"),
    )
)
CONTEXTS = ("{}", "I think that {}")


@pytest.fixture
def metric(tmp_path: Path) -> MetricCache:
    cache = MetricCache(Cache(tmp_path), "0" * 64)
    for layer in LAYERS:
        cache.store(tiny_stack("olmo2").architecture.ffn_weight(layer), torch.eye(80, dtype=torch.float64))
    return cache


def facts(contexts: tuple[str, ...] = CONTEXTS) -> list[Any]:
    return encode_facts(tiny_tokenizer(), REQUESTS, contexts)


def change_of(stack: Stack, recording: Recording) -> dict[int, list[Any]]:
    return {stack.architecture.layer_of(name): [delta] for name, delta in recording.change.items()}


@torch.no_grad()
def outputs(stack: Stack, row: Any, change: Any = None) -> tuple[dict[int, Tensor], Tensor]:
    """What each layer's projection gives at a text's subject, and the stream after the last edited block, read plainly."""
    tokens = torch.tensor([row.input_ids[: row.subject_last + 1]])
    seen: list[Tensor] = []
    handle = stack.blocks[LAYERS[-1]].register_forward_hook(
        lambda module, args, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
    with side_paths(stack, change or {}), stack.watch_values(LAYERS) as projected:
        stack.model(input_ids=tokens, use_cache=False)
    handle.remove()
    return {layer: projected[layer][0, -1].double() for layer in LAYERS}, seen[0][0, -1].double()


@torch.no_grad()
def with_output(stack: Stack, row: Any, layer: int, wanted: Tensor) -> tuple[dict[int, Tensor], Tensor]:
    """The same when the projection of ``layer`` gives ``wanted`` at the subject."""

    def put(module: Any, args: Any, output: Tensor) -> Tensor:
        changed = output.clone()
        changed[0, -1] = wanted
        return changed

    handle = stack.ffn_out[layer].register_forward_hook(put)
    try:
        return outputs(stack, row)
    finally:
        handle.remove()


def wanted(stack: Stack, layer: int) -> Tensor:
    """Outputs of a layer that are some way from the present ones."""
    present = torch.stack([outputs(stack, fact.rows[0])[0][layer] for fact in facts()])
    noise = torch.randn(present.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return (present + 0.7 * present.norm(dim=-1, keepdim=True) * noise / noise.norm(dim=-1, keepdim=True)).float()


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a, b, dim=-1))


@pytest.mark.parametrize("family", NORMED)
def test_a_value_is_where_the_clamp_allows_relative_to_what_the_site_gives(family: str) -> None:
    stack = tiny_stack(family)
    for clamp in (0.5, 4.0):
        values = optimise_values(FeedForward(stack, 1), facts(), replace(SETTINGS, clamp=clamp))
        moved = (values.targets - values.hidden).norm(dim=-1) / values.hidden.norm(dim=-1)
        assert (moved <= clamp * (1 + 1e-5)).all()
        plain = torch.stack([outputs(stack, fact.rows[0])[0][1] for fact in facts()])
        assert torch.allclose(values.hidden.double(), plain, rtol=1e-4, atol=1e-5)


def test_steps_do_not_see_how_long_the_output_is() -> None:
    """Behind a norm the same model with a projection ten times as large has values ten times as long."""
    stack = tiny_stack("olmo2")
    small = optimise_values(FeedForward(stack, 1), facts(), SETTINGS)
    larger = tiny_stack("olmo2")
    weight: Any = larger.ffn_out[1].weight
    weight.data.mul_(10.0)
    large = optimise_values(FeedForward(larger, 1), facts(), SETTINGS)
    assert float((large.targets / 10.0 - small.targets).norm()) < 0.02 * float(small.targets.norm())
    assert torch.allclose(large.loss, small.loss, rtol=1e-2)


@pytest.mark.parametrize("family", [*NORMED, "olmo_hybrid"])
def test_replayed_residuals_are_those_of_a_plain_sweep(family: str, metric: MetricCache) -> None:
    stack = tiny_stack(family)
    targets = wanted(stack, LAYERS[0])
    ours = record(stack, LAYERS, key_rows([f.rows for f in facts()]), targets, RIDGE, metric, EMPTY, REPLAYED)
    goals = [with_output(stack, fact.rows[0], LAYERS[0], targets[i])[0] for i, fact in enumerate(facts())]
    written: dict[int, Any] = {}
    for layer in LAYERS:
        columns = ours.columns[stack.architecture.ffn_weight(layer)]
        for number, fact in enumerate(facts()):
            present = outputs(stack, fact.rows[0], written)[0][layer]
            v = goals[number][layer]
            factor = max(float(v @ present / (v @ v)), REPLAYED.length * float(present.norm() / v.norm()))
            factor = (
                factor if stack.architecture.norms[layer] else 1.0
            )  # OLMo Hybrid's linear attention blocks have no norm there
            residual = (factor * v - present).numpy()
            assert np.linalg.norm(columns.residuals[number] - residual) < 1e-3 * np.linalg.norm(residual)
        written[layer] = [ours.change[stack.architecture.ffn_weight(layer)]]


@pytest.mark.parametrize("spread", [EQUAL_SHARES, ROOT_SHARES, REPLAYED], ids=["block", "projection", "replay"])
@pytest.mark.parametrize("family", NORMED)
def test_a_small_ridge_reaches_the_targets(family: str, spread: Spread, metric: MetricCache) -> None:
    """With the changes in place projections give what they should, and the stream after the last block is near where targets put it.

    It is not there, since columns move other tokens of a prompt too, which attention reads.
    """
    stack, way = tiny_stack(family), Way(FeedForward, spread)
    bare = facts(("{}",))
    layer = way.layer(LAYERS)
    targets = wanted(stack, layer)
    ours = record(stack, LAYERS, key_rows([f.rows for f in bare]), targets, SMALL, metric, EMPTY, spread)
    for number, fact in enumerate(bare):
        goal = with_output(stack, fact.rows[0], layer, targets[number])
        before, after = outputs(stack, fact.rows[0]), outputs(stack, fact.rows[0], change_of(stack, ours))
        if spread.measured == "replay":
            assert all(cosine(after[0][each], goal[0][each]) > 0.999 for each in LAYERS)
            assert float((after[1] - goal[1]).norm()) < 0.5 * float((before[1] - goal[1]).norm())
        elif spread.measured == "projection":
            assert cosine(after[0][layer], goal[0][layer]) > 0.999
        else:  # the last layer alone cannot always give what is missing
            assert float((after[1] - goal[1]).norm()) < 0.5 * float((before[1] - goal[1]).norm())


@pytest.mark.parametrize("family", [*NORMED, "granite", "olmo_hybrid"])
def test_what_is_written_is_said(family: str, metric: MetricCache) -> None:
    """A single fact is more probable after the write."""
    stack = tiny_stack(family, **({"residual_multiplier": 0.3} if family == "granite" else {}))
    way = MEMIT.way(stack.architecture)
    for fact in facts(("{}",)):
        free = replace(SETTINGS, weight_decay=0.0, steps=25)
        values = optimise_values(way.site(stack, LAYERS), [fact], free)
        made = record(stack, LAYERS, key_rows([fact.rows]), values.targets, SMALL, metric, EMPTY, way.spread)
        before = loss(stack, fact)
        with side_paths(stack, change_of(stack, made)):
            assert loss(stack, fact) < before


@torch.no_grad()
def loss(stack: Stack, fact: Any) -> float:
    """Of the target after the bare prompt, in nats per token."""
    row = fact.rows[0]
    log_probs = stack.model(input_ids=torch.tensor([row.input_ids]), use_cache=False).logits[0].log_softmax(-1)
    chosen = [float(log_probs[place - 1, row.input_ids[place]]) for place in range(*row.target)]
    return -sum(chosen) / len(chosen)


@pytest.mark.parametrize("family", NORMED)
def test_a_keep_asks_for_no_change(family: str, metric: MetricCache) -> None:
    stack = tiny_stack(family)
    texts = [tuple(tiny_tokenizer()(text)["input_ids"]) for text in ("Manila", "I know that the north")]
    targets = torch.cat([wanted(stack, LAYERS[0]), present_states(stack, texts, LAYERS[0])])
    rows = [*key_rows([fact.rows for fact in facts()]), *keep_rows(texts, len(REQUESTS))]
    ours = record(stack, LAYERS, rows, targets, RIDGE, metric, EMPTY, REPLAYED)
    first = ours.columns[stack.architecture.ffn_weight(LAYERS[0])].residuals
    assert float(np.abs(first[: len(REQUESTS)]).max()) > 0.01
    np.testing.assert_allclose(first[len(REQUESTS) :], 0, atol=1e-4)


def test_the_places_that_move_most_are_measured_in_the_stream(metric: MetricCache) -> None:
    stack = tiny_stack("gemma3_text")
    rows = key_rows([fact.rows for fact in facts()])
    made = record(stack, LAYERS, rows, wanted(stack, LAYERS[0]), RIDGE, metric, EMPTY, REPLAYED)
    changes = {layer: deltas[0] for layer, deltas in change_of(stack, made).items()}
    text = tuple(tiny_tokenizer()("I know that Lyon is a twin city")["input_ids"])
    scores = {}
    for stop in range(1, len(text) + 1):
        with torch.no_grad(), stack.watch_keys(LAYERS) as keys, stack.watch_values(LAYERS) as projected:
            stack.model(input_ids=torch.tensor([text[:stop]]), use_cache=False)
        total = torch.zeros(stack.architecture.d_model, dtype=torch.float64)
        for layer in LAYERS:
            y = projected[layer][0, -1].double()
            added = torch.from_numpy(to_dense(changes[layer])).double() @ keys[layer][0, -1].double()
            total += stack.behind(layer)(y + added) - stack.behind(layer)(y)
        scores[text[:stop]] = float(total.norm())
    assert most_moved(stack, changes, [text], 3) == sorted(scores, key=lambda part: -scores[part])[:3]
