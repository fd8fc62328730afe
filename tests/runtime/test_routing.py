"""Every sequence is answered by the memory that a plain computation chooses for it alone, however it is batched, padded or decoded."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from patchhub.delta import Sparse, from_factors, from_sparse, to_dense
from patchhub.editing.wise.fit import Keys
from patchhub.errors import SettingsError
from patchhub.evaluation.metrics import score_targets
from patchhub.models.architectures import describe
from patchhub.models.tracing import Stack, left_padded, right_padded
from patchhub.runtime.compose import compose
from patchhub.runtime.routing import SideMemory, decisions, route, routed, unroute
from tests.models.tiny_configs import random_model, tiny_config
from tests.tiny_models import tiny_model, tiny_stack, tiny_tokenizer

FAMILIES = ["gpt2", "llama", "gpt_neox", "opt"]
LAYER = 1


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    """Token rows of lengths 2 to 15."""
    rng = np.random.default_rng(seed)
    return [rng.integers(2, 320, rng.integers(2, 16)).tolist() for _ in range(count)]


def random_change(shape: tuple[int, int], seed: int, density: float = 0.3) -> Sparse:
    rng = np.random.default_rng(seed)
    kept = rng.random(shape) < density
    return from_sparse((rng.standard_normal(shape) * kept * 0.3).astype(np.float32))


def distances(model: Any, weight: str, change: Any, rows: Sequence[list[int]], kind: str = "max") -> list[float]:
    """The distance of each row, read alone on an unrouted model."""
    module, found = model.get_submodule(weight.rpartition(".")[0]), []
    right = torch.from_numpy(to_dense(change).T.astype(np.float32))
    handle = module.register_forward_pre_hook(lambda module, args: found.append(args[0].float() @ right))
    with torch.no_grad():
        for row in rows:
            model(input_ids=torch.tensor([row]), use_cache=False)
    handle.remove()
    lengths = [side.reshape(-1, side.shape[-1]).norm(dim=-1) for side in found]
    return [float(each.max() if kind == "max" else each.mean()) for each in lengths]


def memories(
    model: Any, count: int, rows: Sequence[list[int]], kind: str = "max", layer: int = LAYER
) -> list[SideMemory]:
    """Random side memories, each with the median distance of some rows as its threshold."""
    architecture = describe(model.config)
    weight = architecture.ffn_weight(layer)
    made = []
    for number in range(count):
        change = random_change(architecture.shapes[layer], seed=10 * layer + number)
        threshold = float(np.median(distances(model, weight, change, rows, kind))) * (1 + 1e-3)
        made.append(SideMemory(f"shard {number}", weight, change, {"threshold": threshold, "distance": kind}))
    return made


def expected_names(model: Any, sides: Sequence[SideMemory], rows: Sequence[list[int]]) -> list[str | None]:
    ratios = np.array(
        [
            np.array(distances(model, side.weight, side.change, rows, side.routing["distance"]))
            / side.routing["threshold"]
            for side in sides
        ]
    )
    assert np.abs(ratios - 1).min() > 1e-4, "a row lies on a threshold; choose other rows"
    return [sides[best].name if top > 1 else None for best, top in zip(ratios.argmax(0), ratios.max(0), strict=True)]


def answering(model: Any, sides: Sequence[SideMemory], name: str | None) -> Any:
    """A plain copy of the model with the weights of one memory."""
    plain = copy.deepcopy(model)
    for side in sides:
        if side.name == name:
            parameter = plain.get_parameter(side.weight)
            change = torch.from_numpy(to_dense(side.change)).float()
            with torch.no_grad():
                parameter += change if parameter.shape == change.shape and not _transposed(plain) else change.T
    return plain


def _transposed(model: Any) -> bool:
    return describe(model.config).orientation == "in_out"


def logits_alone(model: Any, row: list[int]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=torch.tensor([row]), use_cache=False).logits[0]
    return found


@pytest.mark.parametrize("kind", ["max", "mean"])
@pytest.mark.parametrize("padded", [left_padded, right_padded])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_of_mixed_prompts_is_routed_as_its_rows_are_alone(family: str, padded: Any, kind: str) -> None:
    model, rows = tiny_model(family), prompts(32)
    sides = memories(model, 3, rows, kind)
    names = expected_names(model, sides, rows)
    assert {None, "shard 0", "shard 1", "shard 2"} == set(names)
    answers = {name: answering(model, sides, name) for name in set(names)}
    route(model, sides)
    ids, mask, positions = padded(rows, torch.device("cpu"))
    ids[mask == 0] = torch.randint(2, 320, (int((mask == 0).sum()),), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    assert decisions(model) == names
    for row, name, found, real in zip(rows, names, logits, mask.bool(), strict=True):
        torch.testing.assert_close(found[real], logits_alone(answers[name], row), rtol=1e-4, atol=1e-3)
        logits_alone(model, row)
        assert decisions(model) == [name]


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_generation_keeps_the_decision_of_each_prompt(family: str, beams: int) -> None:
    model, rows = tiny_model(family), prompts(8, seed=5)
    sides = memories(model, 2, rows)
    names = expected_names(model, sides, rows)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, "eos_token_id": None}
    alone = [
        answering(model, sides, name).generate(
            torch.tensor([row]), attention_mask=torch.ones(1, len(row), dtype=torch.long), **options
        )[0, len(row) :]
        for row, name in zip(rows, names, strict=True)
    ]
    route(model, sides)
    ids, mask, _ = left_padded(rows, torch.device("cpu"))
    together = model.generate(ids, attention_mask=mask, **options)[:, ids.shape[1] :]
    assert torch.equal(together, torch.stack(alone))


def test_generation_with_a_static_cache_gives_the_same_text() -> None:
    model, rows = tiny_model("llama"), prompts(4, seed=2)
    route(model, memories(model, 2, rows))
    ids, mask, _ = left_padded(rows, torch.device("cpu"))
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "disable_compile": True}
    grown = model.generate(ids, attention_mask=mask, **options)
    for _ in range(2):  # the second time the cache is used again
        fixed = model.generate(ids, attention_mask=mask, cache_implementation="static", **options)
        assert torch.equal(fixed, grown)


@pytest.mark.parametrize("given", [True, False])
def test_what_is_decoded_over_a_cache_keeps_the_prompts_decision(given: bool) -> None:
    model, rows = tiny_model("llama"), prompts(12, seed=3)
    sides = memories(model, 1, rows)
    names = expected_names(model, sides, rows)
    answers = {name: answering(model, sides, name) for name in (None, "shard 0")}
    route(model, sides)
    for row, other, name in zip(rows, rows[::-1], names, strict=True):
        cache = model(
            input_ids=torch.tensor([row]), use_cache=True, past_key_values=DynamicCache() if given else None
        ).past_key_values
        with torch.no_grad():
            found = model(input_ids=torch.tensor([other]), past_key_values=cache, use_cache=True).logits[0]
        torch.testing.assert_close(found, logits_alone(answers[name], row + other)[len(row) :], rtol=1e-4, atol=1e-3)


def test_decisions_follow_the_rows_of_the_cache() -> None:
    model = tiny_model("gpt2")
    rows = [row for row in prompts(60, seed=4) if len(row) == 6]
    sides = memories(model, 1, rows)
    names = expected_names(model, sides, rows)
    route(model, sides)
    cache = model(input_ids=torch.tensor(rows), use_cache=True).past_key_values
    order = torch.arange(len(rows)).flip(0)
    cache.reorder_cache(order)
    model(input_ids=torch.full((len(rows), 1), 5), past_key_values=cache)
    assert decisions(model) == names[::-1]
    cache.batch_select_indices(order[:2])
    cache.batch_repeat_interleave(2)
    cache.crop(-1)
    model(input_ids=torch.full((4, 1), 5), past_key_values=cache)
    assert decisions(model) == [names[0], names[0], names[1], names[1]]


def test_teacher_forced_scores_use_the_decision_of_the_prompt() -> None:
    stack, tokenizer = tiny_stack("llama"), tiny_tokenizer()
    items = [
        (text, target)
        for text in ("The mother tongue of Lyon is", "Paris is", "What does the Eiffel Tower")
        for target in ("French and Dutch", "Milan, the twin city")
    ]
    rows = [tokenizer(text)["input_ids"] for text, _ in items]
    sides = memories(stack.model, 1, rows)
    names = expected_names(stack.model, sides, rows)
    assert len(set(names)) == 2
    plain = {name: answering(stack.model, sides, name) for name in set(names)}
    expected = [score_targets(plain[name], tokenizer, [item])[0] for name, item in zip(names, items, strict=True)]
    route(stack.model, sides)
    for one, other in zip(score_targets(stack.model, tokenizer, items), expected, strict=True):
        assert one.argmax == other.argmax
        assert one.logprob == pytest.approx(other.logprob, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_decides_alike_away_from_the_threshold(dtype: torch.dtype) -> None:
    exact, half, rows = tiny_model("llama"), tiny_model("llama", dtype=dtype), prompts(32, seed=5)
    (side,) = memories(exact, 1, rows)
    ratio = np.array(distances(exact, side.weight, side.change, rows)) / side.routing["threshold"]
    clear = np.abs(ratio - 1) > 0.03
    assert clear.sum() > 16
    route(half, [side])
    ids, mask, positions = left_padded(rows, torch.device("cpu"))
    logits = half(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    assert logits.dtype == dtype
    chosen = np.array([name is not None for name in decisions(half)])
    assert (chosen == (ratio > 1))[clear].all()


def test_shards_of_two_layers_decide_for_themselves() -> None:
    model, rows = tiny_model("llama"), prompts(16, seed=6)
    sides = [*memories(model, 1, rows, layer=1), *memories(model, 1, rows, layer=2)]
    lower = expected_names(model, sides[:1], rows)
    plain = [answering(model, sides[:1], name) for name in lower]
    route(model, sides)
    for row, base, name in zip(rows, plain, lower, strict=True):
        above = distances(base, sides[1].weight, sides[1].change, [row])[0] > sides[1].routing["threshold"]
        both = answering(base, sides[1:], "shard 0") if above else base
        torch.testing.assert_close(logits_alone(model, row), logits_alone(both, row), rtol=1e-4, atol=1e-3)
        assert decisions(model) == [name or ("shard 0" if above else None)]


def test_detaching_gives_the_base_back_bit_for_bit() -> None:
    model, rows = tiny_model("gpt2"), prompts(8)
    before = [logits_alone(model, row) for row in rows]
    kind, tensors = type(model), {name: p.data_ptr() for name, p in model.named_parameters()}
    sides = memories(model, 2, rows)
    route(model, sides)
    assert routed(model) == tuple(sides)
    assert type(model) is kind
    changed = [logits_alone(model, row) for row in rows]
    unroute(model)
    assert any(not torch.equal(one, other) for one, other in zip(before, changed, strict=True))
    assert all(torch.equal(logits_alone(model, row), old) for row, old in zip(rows, before, strict=True))
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == tensors
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert routed(model) == ()
    assert decisions(model) == []
    unroute(model)


def test_queries_of_the_main_memory_are_the_base_bit_for_bit() -> None:
    model, rows = tiny_model("gpt2"), prompts(8)
    before = [logits_alone(model, row) for row in rows]
    (side,) = memories(model, 1, rows)
    route(model, [SideMemory(side.name, side.weight, side.change, {"threshold": 1e9})])
    assert all(torch.equal(logits_alone(model, row), old) for row, old in zip(rows, before, strict=True))


def test_a_copy_of_a_routed_model_routes_by_itself() -> None:
    model, rows = tiny_model("llama"), prompts(8)
    route(model, memories(model, 1, rows))
    names = []
    for row in rows:
        logits_alone(model, row)
        names += decisions(model)
    twin = copy.deepcopy(model)
    unroute(model)
    for row, name in zip(rows, names, strict=True):
        logits_alone(twin, row)
        assert decisions(twin) == [name]


def test_merged_memories_answer_under_the_smallest_threshold() -> None:
    model, rows = tiny_model("llama"), prompts(16)
    sides = memories(model, 2, rows)
    total = to_dense(sides[0].change) + to_dense(sides[1].change)
    threshold = min(side.routing["threshold"] for side in sides)
    joined = SideMemory(
        "merged", sides[0].weight, from_sparse(total.astype(np.float32)), {**sides[0].routing, "threshold": threshold}
    )
    names = expected_names(model, [joined], rows)
    plain = {name: answering(model, [joined], name) for name in (None, "merged")}
    route(model, sides, "merge", merge_method="linear")
    for row, name in zip(rows, names, strict=True):
        torch.testing.assert_close(logits_alone(model, row), logits_alone(plain[name], row), rtol=1e-4, atol=1e-3)
        assert decisions(model) == [name]


def test_one_memory_merges_to_itself() -> None:
    model, rows = tiny_model("llama"), prompts(8)
    sides = memories(model, 1, rows)
    found = {}
    for mode in ("retrieve", "merge"):
        route(model, sides, mode)  # type: ignore[arg-type]
        found[mode] = [logits_alone(model, row) for row in rows]
        unroute(model)
    assert all(torch.equal(a, b) for a, b in zip(found["retrieve"], found["merge"], strict=True))


def test_low_rank_changes_are_routed_like_dense_ones() -> None:
    model, rows = tiny_model("llama"), prompts(8)
    rng = np.random.default_rng(0)
    low = from_factors(rng.standard_normal((32, 2)) * 0.1, rng.standard_normal((2, 80)))
    weight = describe(model.config).ffn_weight(LAYER)
    threshold = float(np.median(distances(model, weight, low, rows)))
    found = []
    for change in (low, from_sparse(to_dense(low).astype(np.float32))):
        route(model, [SideMemory("a", weight, change, {"threshold": threshold * 1.001})])
        found.append([logits_alone(model, row) for row in rows])
        unroute(model)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


def test_compiled_models_route_in_one_graph() -> None:
    model = tiny_model("llama")
    rows = [row for row in prompts(60, seed=4) if len(row) == 6]
    sides = memories(model, 2, rows)
    names = expected_names(model, sides, rows)
    route(model, sides)
    ids, mask = torch.tensor(rows), torch.ones(len(rows), 6, dtype=torch.long)
    with torch.no_grad():
        plain = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        found = compiled(input_ids=ids, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(found, plain)
    assert decisions(model) == names


def test_misuse_is_refused_in_words() -> None:
    model, rows = tiny_model("llama"), prompts(4)
    sides = memories(model, 1, rows)
    missing = SideMemory("a", "model.layers.1.mlp.none.weight", sides[0].change, sides[0].routing)
    with pytest.raises(SettingsError, match=r"no weight model\.layers\.1\.mlp\.none"):
        route(model, [missing])
    with pytest.raises(SettingsError, match="no way 'both'"):
        route(model, sides, "both")  # type: ignore[arg-type]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    route(model, sides)
    with pytest.raises(SettingsError, match="already"):
        route(model, sides)


def test_compiled_models_keep_decisions_while_decoding() -> None:
    model = tiny_model("llama")
    rows = [row for row in prompts(60, seed=4) if len(row) == 6]
    sides = memories(model, 1, rows)
    route(model, sides)
    ids, step = torch.tensor(rows), torch.full((len(rows), 1), 5)
    compiled = torch.compile(model, backend="eager")
    found = []
    for forward in (model, compiled):
        with torch.no_grad():
            cache = forward(input_ids=ids, use_cache=True).past_key_values
            found.append(forward(input_ids=step, past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize(
    ("family", "site", "gated"),
    [
        ("mixtral", "routed", False),
        ("dbrx", "routed", False),
        ("llama4_text", "routed", False),
        ("qwen2_moe", "shared", False),
        ("qwen2_moe", "shared", True),
    ],
)
def test_side_memories_of_experts_answer_whole_sequences(family: str, site: Any, gated: bool) -> None:
    """Distances are of gated keys, whether gates multiply keys or what the shared expert gives; decisions stay while text is decoded."""
    model = random_model(tiny_config(family)).eval()
    architecture = describe(model.config, site)
    projection, weight = architecture.feed_forward[LAYER], architecture.ffn_weight(LAYER)
    change = random_change(projection.shape, seed=0)
    other = Stack(copy.deepcopy(model), architecture)
    rows = [[token % 96 for token in row] for row in prompts(9)]
    found = []
    with torch.no_grad(), other.watch_keys([LAYER]) as keys:
        for row in rows:
            other.model(input_ids=torch.tensor([row]), use_cache=False)
            moved = Keys.seen(keys[LAYER], (1, len(row))).times(torch.from_numpy(to_dense(change)).float())
            found.append(float(moved.norm(dim=-1).max()))
    routing: dict[str, Any] = {"threshold": float(np.median(found)) * 1.001, "distance": "max"}
    if projection.gate is not None:
        routing["gate"] = f"{architecture.block(LAYER)}.{projection.gate}"
    answers = {None: copy.deepcopy(model), "shard": copy.deepcopy(model)}
    edited = answers["shard"].get_parameter(weight)
    edited.data = compose(edited.data, [change], orientation=projection.orientation, dtype=torch.float32)
    if gated:
        Stack(model, architecture)
    before = logits_alone(model, rows[0])
    route(model, [SideMemory("shard", weight, change, routing)])
    ids, mask, positions = right_padded(rows, torch.device("cpu"))
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    names = ["shard" if distance > routing["threshold"] else None for distance in found]
    assert decisions(model) == names
    assert {*names} == {None, "shard"}
    for row, name, said, real in zip(rows, names, logits, mask.bool(), strict=True):
        torch.testing.assert_close(said[real], logits_alone(answers[name], row), rtol=1e-4, atol=1e-5)
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(input_ids=torch.tensor([row[:-1]]), past_key_values=cache)
            first = decisions(model)
            later = model(input_ids=torch.tensor([row[-1:]]), past_key_values=cache).logits[0, -1]
        torch.testing.assert_close(later, logits_alone(answers[first[0]], row)[-1], rtol=1e-4, atol=1e-5)
        assert decisions(model) == first
    unroute(model)
    assert torch.equal(logits_alone(model, rows[0]), before)
