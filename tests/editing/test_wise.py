"""Side memories: the fit against a dense solution, descent against a plain implementation, and what a trained shard must do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from patchhub.delta import Sparse, read_deltas, to_dense, write_deltas
from patchhub.editing.locate import encode_prompts
from patchhub.editing.requests import read_requests
from patchhub.editing.settings import WiseSettings
from patchhub.editing.settings import default_wise_settings as default_settings
from patchhub.editing.wise import training
from patchhub.editing.wise.fit import FitProblem, Keys, fit_problem, solve_masked, subspace, wanted
from patchhub.editing.wise.texts import in_scope, neighbours, read_tokens, recompress, text_distances
from patchhub.editing.wise.training import descend, margin_loss
from patchhub.errors import EditError, SettingsError
from patchhub.evaluation.suites import read_facts, wise_scores
from patchhub.models.architectures import describe
from patchhub.models.tracing import Stack
from patchhub.objects import Request
from patchhub.runtime.routing import SideMemory, route, unroute
from patchhub.text.sampling import sample_documents
from tests.reference import plain_wise
from tests.tiny_models import tiny_stack, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]
CONTEXTS = ("{}", "Because it is so. {}", "The Space. {}")
REQUESTS = [
    Request.make("The mother tongue of {} is", "Danielle Darrieux", "English"),
    Request.make("The mother tongue of {} is", "Arend Lijphart", "Greek"),
    Request.make("{} is located in", "The Space Needle", "Lyon"),
    Request.make("{} is a twin city of", "Lyon", "Seattle"),
]


def documents(count: int = 40, length: int = 24) -> list[list[int]]:
    rng = np.random.default_rng(7)
    return rng.integers(2, 320, (count, length)).tolist()


def settings_for(stack: Stack, **changes: Any) -> WiseSettings:
    """Default settings, but for a model of random weights, which needs larger changes than a trained one."""
    return replace(
        default_settings(stack.architecture), **{"prefixes": 4, "neighbours": 2, "ridge": 0.5, "clamp": 4.0, **changes}
    )


@cache
def trained(family: str) -> tuple[Stack, training.Trained]:
    stack = tiny_stack(family)
    return stack, training.train(stack, tiny_tokenizer(), REQUESTS, CONTEXTS, settings_for(stack), documents())


def objective(problem: FitProblem, right: torch.Tensor, change: torch.Tensor) -> float:
    """tr(X N X^T) - 2 tr(X R^T): what the fit minimises, up to a constant."""
    change, right = change.double(), right.double()
    return float((change @ problem.normal[0].double() * change).sum() - 2 * (change * right).sum())


def dense_solution(problem: FitProblem, right: torch.Tensor) -> torch.Tensor:
    """One linear system for each output."""
    solution = torch.zeros_like(right, dtype=torch.double)
    for row, chosen in enumerate(problem.mask.bool()):
        normal = problem.normal[0][chosen][:, chosen].double()
        solution[row, chosen] = torch.linalg.solve(normal, right[row, chosen].double())
    return solution


def test_the_masked_fit_is_the_dense_solution_of_each_output() -> None:
    generator = torch.Generator().manual_seed(0)
    keys, outputs = torch.randn(12, 30, generator=generator), torch.randn(12, 8, generator=generator)
    text, shares = torch.randn(200, 30, generator=generator), torch.rand(12, generator=generator)
    rows = Keys.plain(keys)
    problem = fit_problem((text.T @ text / 200)[None], rows, shares, subspace((8, 30), 0.4, 0, 0), ridge=0.3)
    right = wanted(rows, shares, outputs)
    found, best = solve_masked(problem, right, torch.zeros(8, 30)), dense_solution(problem, right)
    assert not found[problem.mask == 0].any()
    assert objective(problem, right, found) == pytest.approx(objective(problem, right, best), rel=1e-5)
    torch.testing.assert_close(found.double(), best, rtol=0, atol=1e-2 * float(best.abs().max()))


def test_continuing_the_fit_gives_the_fit_of_all_rows() -> None:
    generator = torch.Generator().manual_seed(1)
    keys, outputs = torch.randn(10, 30, generator=generator), torch.randn(10, 8, generator=generator)
    text, shares, zero = torch.randn(300, 30, generator=generator), torch.ones(10), torch.zeros(8, 30)
    left_alone, mask, rows = (text.T @ text / 300)[None], torch.ones(8, 30), Keys.plain(keys)
    early = rows[torch.arange(6)]
    joint = fit_problem(left_alone, rows, shares, mask, 0.5)
    expected = dense_solution(joint, wanted(rows, shares, outputs))
    first = fit_problem(left_alone, early, shares[:6], mask, 0.5)
    start = solve_masked(first, wanted(early, shares[:6], outputs[:6]), zero)
    missing = torch.cat([torch.zeros(6, 8), outputs[6:] - keys[6:] @ start.T])
    added = solve_masked(joint, wanted(rows, shares, missing), zero)
    torch.testing.assert_close((start + added).double(), expected, rtol=0, atol=1e-2 * float(expected.abs().max()))


@pytest.mark.parametrize("ratio", [0.4, 1.0])
def test_the_fit_of_stacked_keys_is_that_of_the_dense_stack_with_a_second_moment_of_each_block(ratio: float) -> None:
    """And blocks that no row is of stay as they are."""
    draw = torch.Generator().manual_seed(2)
    count, inner, n, out = 5, 7, 12, 8
    blocks = torch.stack([torch.randperm(count - 1, generator=draw)[:2] for _ in range(n)])  # the last one is nobody's
    keys = Keys(torch.randn(n, 2, inner, generator=draw), blocks, count)
    dense = torch.zeros(n, count, inner).scatter(1, blocks[..., None].expand(-1, -1, inner), keys.values).flatten(1)
    shares, outputs = torch.rand(n, generator=draw), torch.randn(n, out, generator=draw)
    text = torch.randn(count, 40, inner, generator=draw)
    left_alone, mask = text.mT @ text / 40, subspace((out, count * inner), ratio, 0, 0)
    right = wanted(keys, shares, outputs)
    torch.testing.assert_close(right, (outputs * shares[:, None]).T @ dense)
    change = torch.randn(right.shape, generator=draw)
    torch.testing.assert_close(keys.times(change), dense @ change.T)
    assert torch.equal(keys.uses(), torch.bincount(blocks.flatten(), minlength=count))
    for block, moment in enumerate(keys.moments(shares)):
        own = dense.view(n, count, inner)[:, block]
        torch.testing.assert_close(moment, (own * shares[:, None]).T @ own)
    whole = fit_problem(torch.block_diag(*left_alone)[None], Keys.plain(dense), shares, mask, 0.3)
    problem = fit_problem(left_alone, keys, shares, mask, 0.3)
    torch.testing.assert_close(problem.image(change), change @ whole.normal[0])
    best, found = dense_solution(whole, right), solve_masked(problem, right, torch.zeros_like(right))
    assert objective(whole, right, found) == pytest.approx(objective(whole, right, best), rel=1e-5)
    assert not found.view(out, count, inner)[:, -1].any()
    assert len(Keys.joined([keys, keys[blocks[:, 0] == 1]])) == n + int((blocks[:, 0] == 1).sum())


def test_subspaces_depend_on_seed_and_number_alone() -> None:
    one = subspace((40, 50), 0.2, 3, 0)
    assert torch.equal(one, subspace((40, 50), 0.2, 3, 0))
    assert one.mean() == pytest.approx(0.2, abs=0.03)
    others = [subspace((40, 50), 0.2, 3, 1), subspace((40, 50), 0.2, 4, 0)]
    assert all((one * other).mean() == pytest.approx(0.04, abs=0.02) for other in others)
    assert subspace((4, 5), 1.0, 0, 0).all()


def test_the_margin_loss_is_the_published_formula() -> None:
    inside, outside = torch.tensor([30.0, 12.0]), torch.tensor([4.0, 9.0])
    # pairs d_out - d_in + 10: -16, -11, 2, 7; outside - 5: -1, 4; 20 - inside: -10, 8
    assert float(margin_loss(inside, outside, (5.0, 20.0, 10.0))) == pytest.approx(4.5 + 4 + 8)
    assert float(margin_loss(torch.tensor([40.0]), torch.tensor([1.0]), (5.0, 20.0, 10.0))) == 0.0


@pytest.mark.parametrize("distance", ["mean", "max"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_descent_is_the_published_training(family: str, distance: Any) -> None:
    stack, tokenizer = tiny_stack(family), tiny_tokenizer()
    rows = encode_prompts(tokenizer, [(context, REQUESTS[0]) for context in CONTEXTS])
    texts, shape = documents(3), stack.architecture.shapes[1]
    mask = subspace(shape, 0.3, 0, 0)
    descent = plain_wise.Descent(steps=6, rate=0.05, decay=1e-3, limit=0.1, margins=(1.0, 4.0, 2.0), distance=distance)
    expected = plain_wise.train(stack.model, stack.ffn_out[1], rows, texts, mask, descent)
    settings = settings_for(
        stack, descent_steps=6, descent_rate=0.05, descent_decay=1e-3, norm_constraint=0.1, distance=distance
    )
    found, _ = descend(stack, 1, [rows], texts, mask, torch.zeros(shape), (1.0, 4.0, 2.0), settings)
    assert float(expected.abs().max()) > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@cache
def demo() -> tuple[Stack, Any, tuple[Request, ...], list[list[int]]]:
    """The shipped model, its facts, and text that it wrote."""
    folder = ROOT / "patchhub" / "demo_model"
    factory: Any = AutoModelForCausalLM
    model = factory.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    stack = Stack(model, describe(model.config))
    text = sample_documents(stack, tokenizer, 2048, length=32, seed=0)
    return stack, tokenizer, read_requests(ROOT / "patchhub" / "demo_facts.json").requests, text


@contextmanager
def routed_to(model: Any, shard: training.Shard) -> Iterator[None]:
    route(model, [SideMemory("a", shard.weight, shard.change, shard.routing)])
    try:
        yield
    finally:
        unroute(model)


def scores(stack: Stack, tokenizer: Any, requests: Sequence[Request], shard: training.Shard) -> dict[str, float]:
    """Reliability, generalisation and locality of the routed model."""
    before = read_facts(stack.model, tokenizer, requests)
    with routed_to(stack.model, shard):
        after = read_facts(stack.model, tokenizer, requests)
    return {name: found.value for name, found in wise_scores(after, before).estimates.items()}


def test_a_routed_model_says_the_new_facts_and_leaves_its_neighbours_alone() -> None:
    stack, tokenizer, requests, text = demo()
    settings = default_settings(stack.architecture)
    told: list[int] = []
    first = training.train(stack, tokenizer, requests[:4], CONTEXTS, settings, text)
    both = training.train(
        stack,
        tokenizer,
        requests[4:5],
        CONTEXTS,
        settings,
        text,
        start=first.shard,
        earlier=requests[:4],
        progress=lambda stage, done: told.append(done),
    )
    assert sum(told) == 1
    for shard, held in ((first.shard, requests[:4]), (both.shard, requests[:5])):
        found = scores(stack, tokenizer, held, shard)
        assert found["reliability"] == 1.0
        assert found["generalisation"] >= 0.6
        assert found["locality"] >= 0.9
    assert np.array_equal(both.shard.change.mask, first.shard.change.mask)  # type: ignore[union-attr]


def test_what_is_stored_is_what_training_left() -> None:
    _, made = trained("llama")
    shard = made.shard
    data = write_deltas({shard.weight: shard.change})
    (again,) = read_deltas(data, {shard.weight: shard.change.shape}).values()
    assert isinstance(again, Sparse)
    assert again.values.dtype == np.float32
    assert again.values.tobytes() == shard.change.values.tobytes()  # type: ignore[union-attr]
    assert np.array_equal(again.mask, shard.change.mask)  # type: ignore[union-attr]
    assert made.report["bytes_per_edit"] == pytest.approx(len(data) / len(REQUESTS), rel=0.05)


def test_training_is_reproducible_and_stays_under_its_mask() -> None:
    stack = tiny_stack("llama")
    settings = settings_for(stack, mask_ratio=0.5, rounds=1)
    one, other = (
        training.train(stack, tiny_tokenizer(), REQUESTS[:2], CONTEXTS, settings, documents(), number=3)
        for _ in range(2)
    )
    assert one.report == other.report
    assert one.shard.routing == other.shard.routing
    assert np.array_equal(to_dense(one.shard.change), to_dense(other.shard.change))
    mask = subspace(stack.architecture.shapes[settings.layer], 0.5, settings.seed, 3).numpy()
    assert not to_dense(one.shard.change)[mask == 0].any()


@pytest.mark.parametrize("distance", ["max", "mean"])
def test_measuring_again_on_the_same_weights_gives_the_same_threshold(distance: Any) -> None:
    stack = tiny_stack("gpt2")
    settings = settings_for(stack, rounds=1, distance=distance)
    made = training.train(stack, tiny_tokenizer(), REQUESTS, CONTEXTS, settings, documents())
    again = training.measure(stack, tiny_tokenizer(), made.shard, REQUESTS, CONTEXTS, settings, documents())
    assert again.threshold == pytest.approx(made.shard.threshold, rel=1e-4)
    assert again.change is made.shard.change
    with torch.no_grad():
        for block in stack.blocks[: settings.layer + 1]:
            for parameter in block.parameters():
                parameter.mul_(1.2)
    moved = training.measure(stack, tiny_tokenizer(), made.shard, REQUESTS, CONTEXTS, settings, documents())
    assert moved.threshold != pytest.approx(made.shard.threshold, rel=1e-2)


def test_recompression_is_the_best_of_its_rank_and_says_its_error() -> None:
    _, made = trained("llama")
    whole = to_dense(made.shard.change)
    values = np.linalg.svd(whole, compute_uv=False)
    for rank in (1, 4):
        small, error = recompress(made.shard, rank)
        assert np.linalg.matrix_rank(to_dense(small.change)) == rank
        expected = float(np.sqrt((values[rank:] ** 2).sum() / (values**2).sum()))
        assert error == pytest.approx(expected, rel=1e-4)
        assert np.linalg.norm(whole - to_dense(small.change)) == pytest.approx(error * np.linalg.norm(whole), rel=1e-4)
    with pytest.raises(SettingsError, match="rank must be"):
        recompress(made.shard, 0)


def test_descent_trains_a_shard_too() -> None:
    stack, tokenizer = tiny_stack("llama"), tiny_tokenizer()
    settings = settings_for(
        stack, solver="descent", distance="mean", mask_ratio=0.5, descent_rate=0.1, descent_steps=30
    )
    made = training.train(stack, tokenizer, REQUESTS[:1], CONTEXTS, settings, documents(8))
    change = torch.from_numpy(to_dense(made.shard.change)).float()
    row = encode_prompts(tokenizer, [("{}", REQUESTS[0])])[0]
    inside = text_distances(stack, settings.layer, change, [row.input_ids[: row.target[0]]], "mean")
    assert float(inside) > made.shard.threshold
    assert made.shard.routing["distance"] == "mean"


@contextmanager
def beside(stack: Stack, layer: int, change: torch.Tensor) -> Iterator[None]:
    """The side memory on for every token."""
    handle = stack.ffn_out[layer].register_forward_hook(lambda module, args, output: output + args[0] @ change.T)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def mean_loss(stack: Stack, contexts: Sequence[str], requests: Sequence[Request] = REQUESTS) -> float:
    """Of the targets after the prompts, in nats per token, read plainly."""
    losses = []
    for row in encode_prompts(tiny_tokenizer(), [(context, one) for one in requests for context in contexts]):
        log_probs = stack.model(input_ids=torch.tensor([row.input_ids]), use_cache=False).logits[0].log_softmax(-1)
        places = range(*row.target)
        losses.append(-sum(float(log_probs[place - 1, row.input_ids[place]]) for place in places) / len(places))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("family", ["gemma3_text", "granite"])
def test_descent_sees_what_comes_behind_the_projection(family: str) -> None:
    """The loss that descent begins with is that of the model with the side memory on."""
    stack = tiny_stack(family, **({"residual_multiplier": 0.3} if family == "granite" else {}))
    start = 0.5 * torch.randn(stack.architecture.shapes[1], generator=torch.Generator().manual_seed(0))
    prompts = [encode_prompts(tiny_tokenizer(), [(context, one) for context in CONTEXTS]) for one in REQUESTS]
    settings = settings_for(stack, layer=1, descent_steps=1)
    _, found = descend(stack, 1, prompts, [], torch.ones_like(start), start, (1.0, 1.0, 1.0), settings)
    with beside(stack, 1, start):
        assert found == pytest.approx(mean_loss(stack, CONTEXTS) * len(REQUESTS), rel=1e-4)
    assert found != pytest.approx(mean_loss(stack, CONTEXTS) * len(REQUESTS), rel=1e-2)


@pytest.mark.parametrize("family", ["gemma3_text", "olmo2", "granite"])
def test_a_side_memory_behind_which_something_comes_lowers_the_loss(family: str) -> None:
    stack = tiny_stack(family, **({"residual_multiplier": 0.3} if family == "granite" else {}))
    settings = settings_for(stack, mask_ratio=1.0)
    made = training.train(stack, tiny_tokenizer(), REQUESTS, CONTEXTS, settings, documents())
    before = mean_loss(stack, ("{}",))
    with beside(stack, settings.layer, torch.from_numpy(to_dense(made.shard.change)).float()):
        assert mean_loss(stack, ("{}",)) < before


def test_a_broken_model_is_refused_in_words() -> None:
    stack = tiny_stack("llama")
    with torch.no_grad():
        stack.blocks[3].input_layernorm.weight.fill_(float("nan"))  # type: ignore[union-attr, operator]
    with pytest.raises(EditError, match="not finite"):
        training.train(stack, tiny_tokenizer(), REQUESTS[:1], CONTEXTS, settings_for(stack, neighbours=0), documents(4))


def test_rows_in_scope_share_a_request_and_end_at_its_subject() -> None:
    tokenizer = tiny_tokenizer()
    scope = in_scope(tokenizer, REQUESTS, CONTEXTS, documents(), prefixes=3, seed=0)
    assert len(scope.rows) == len(REQUESTS) * (len(CONTEXTS) + 3)
    assert scope.rows == in_scope(tokenizer, REQUESTS, CONTEXTS, documents(), prefixes=3, seed=0).rows
    for number, request in enumerate(REQUESTS):
        rows = [row for row in scope.rows if row.request == number]
        assert sum(row.share for row in rows) == pytest.approx(1.0)
        for row in rows:
            assert tokenizer.decode(row.tokens[: row.subject_last + 1]).endswith(request.subject)
    alone = in_scope(tokenizer, REQUESTS[2:], CONTEXTS, documents(), prefixes=3, seed=0)
    assert [row.tokens for row in alone.rows] == [row.tokens for row in scope.rows if row.request >= 2]


def test_neighbours_begin_like_the_prompts_and_name_no_subject() -> None:
    stack, tokenizer = tiny_stack("llama"), tiny_tokenizer()
    found = neighbours(stack, tokenizer, REQUESTS, count=5, seed=0)
    assert found
    for row in found:
        text = tokenizer.decode(row)
        assert text.startswith("The mother tongue of")
        assert not any(request.subject in text for request in REQUESTS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask_ratio": 0.0}, "mask_ratio must be a number above 0, at most 1, not 0.0"),
        ({"mask_ratio": 1.5}, "mask_ratio"),
        ({"shard_size": 0}, "shard_size must be a whole number above 0"),
        ({"shard_size": 2.5}, "shard_size must be a whole number"),
        ({"steps": "many"}, "steps must be a whole number"),
        ({"ridge": float("nan")}, "ridge must be a number"),
        ({"solver": "magic"}, "solver must be one of fit, descent"),
        ({"distance": "median"}, "distance must be one of max, mean"),
        ({"merge_method": "average"}, "merge_method"),
        ({"margins": True}, "margins"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(changes: dict[str, Any], message: str) -> None:
    settings = default_settings(tiny_stack("llama").architecture)
    with pytest.raises(SettingsError, match=message):
        replace(settings, **changes)


def test_margins_are_relative_to_the_model_or_as_published() -> None:
    settings = default_settings(tiny_stack("llama").architecture)
    assert settings.absolute_margins(10.0) == (10 * settings.alpha, 10 * settings.beta, 10 * settings.gamma)
    published = replace(settings, margins="absolute", alpha=5.0, beta=20.0, gamma=10.0)
    assert published.absolute_margins(10.0) == (5.0, 20.0, 10.0)


@pytest.mark.parametrize("distance", ["max", "mean"])
def test_kept_keys_give_the_distances_that_reading_again_gives(distance: Any) -> None:
    stack = tiny_stack("gpt2")
    texts = [text[: 3 + number] for number, text in enumerate(documents(12))]
    change = torch.randn(stack.architecture.shapes[1], generator=torch.Generator().manual_seed(0))
    kept = read_tokens(stack, 1, texts).distances(change, distance)
    torch.testing.assert_close(kept, text_distances(stack, 1, change, texts, distance), rtol=1e-4, atol=1e-4)
