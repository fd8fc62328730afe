"""A model taken apart is the model: embed, blocks, prefixes and head compose to its logits, and nothing is left behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.cache_utils import DynamicCache

from patchhub.errors import UnsupportedModelError
from patchhub.models.architectures import describe
from patchhub.models.tracing import Prefix, Stack, left_padded, right_padded
from tests.tiny_models import FAMILIES, VOCABULARY, tiny_model, tiny_stack

LENGTHS = (7, 3, 11, 1)
CLOSE = 1e-5  # relative, float32
CPU = torch.device("cpu")
WINDOW = {"sliding_window": 4}  # a Mistral whose layers look back three positions


def rows_of(lengths: tuple[int, ...], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


@torch.no_grad()
def whole(model: Any, row: list[int]) -> Tensor:
    """The model's own logits for one row without padding."""
    ids = torch.tensor([row])
    result: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0]
    return result


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def stack_of(family: str) -> Stack:
    return tiny_stack(family, **(WINDOW if family == "mistral" else {}))


def children_with_hooks(model: nn.Module) -> list[str]:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return [name for name, module in model.named_modules() if any(getattr(module, kind) for kind in kinds)]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_pieces_compose_to_the_logits_from_any_block(family):
    stack = tiny_stack(family)
    rows = rows_of(LENGTHS)
    ids, mask, positions = right_padded(rows, CPU)
    start = stack.begin(ids, mask, positions)
    blocks = len(stack.blocks)
    at_once = start.run(start.hidden, 0, blocks)
    assert torch.equal(start.run(start.hidden, 0, 0), start.hidden)
    for middle in range(blocks + 1):
        hidden = start.run(start.hidden, 0, middle)
        assert torch.equal(start.run(hidden, middle, blocks), at_once)
    for number, row in enumerate(rows):
        assert distance(stack.logits(at_once[number, : len(row)]), whole(stack.model, row)) < CLOSE


@pytest.mark.parametrize("family", ["gptj", "llama"])
def test_both_ways_in_which_blocks_return_are_met(family):
    """GPT-J's blocks return tuples, Llama's tensors: the law above covers both as long as this holds."""
    model = tiny_model(family)
    seen: list[Any] = []
    model.get_submodule(describe(model.config).blocks)[0].register_forward_hook(lambda _m, _a, out: seen.append(out))
    model(input_ids=torch.tensor([[1, 2]]), use_cache=False)
    assert isinstance(seen[0], tuple) == (family == "gptj")


@pytest.mark.parametrize("family", [*FAMILIES, "mistral"])
@torch.no_grad()
def test_a_prefix_and_what_follows_are_the_whole(family):
    """Also a prefix without positions in a batch where others have some, and after rows were left out."""
    stack = stack_of(family)
    rows, cuts = rows_of((9, 6, 12, 5)), (6, 0, 8, 1)
    before = [row[:cut] for row, cut in zip(rows, cuts, strict=True)]
    after = [row[cut:] for row, cut in zip(rows, cuts, strict=True)]
    prefix_ids, prefix_mask, prefix_positions = left_padded(before, CPU)
    prefix = stack.read_prefix(prefix_ids, prefix_mask, prefix_positions)
    ids, mask, positions = right_padded(after, CPU)
    positions = positions + torch.tensor(cuts)[:, None]
    mask = torch.cat([prefix_mask, mask], dim=1)
    for chosen in ([0, 1, 2, 3], [3, 1], [1]):
        index = torch.tensor(chosen)
        start = stack.begin(ids[index], mask[index], positions[index], prefix.select(index))
        hidden = start.run(start.hidden, 0, len(stack.blocks))
        again = start.run(start.hidden, 0, len(stack.blocks))
        assert torch.equal(hidden, again)  # the prefix did not grow
        for place, number in enumerate(chosen):
            expected = whole(stack.model, rows[number])[cuts[number] :]
            assert distance(stack.logits(hidden[place, : len(after[number])]), expected) < CLOSE


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_prefix_read_in_two_parts_and_closed_up_is_the_prefix(family):
    """A shared beginning padded on the left, then the rest padded on the right, then all padding moved to the left."""
    stack = stack_of(family)
    front, rest = rows_of((4, 2, 3)), rows_of((2, 5, 1), seed=1)
    ids, front_mask, positions = left_padded(front, CPU)
    shared = stack.read_prefix(ids, front_mask, positions)
    ids, mask, positions = right_padded(rest, CPU)
    mask = torch.cat([front_mask, mask], dim=1)
    both = stack.read_prefix(ids, mask, positions + front_mask.sum(1, keepdim=True), shared)
    assert shared.get_seq_length() == 4
    closed = both.rearrange(mask.sort(dim=1, stable=True).indices[:, -7:])
    for number, row in enumerate([a + b for a, b in zip(front, rest, strict=True)]):
        alone = stack.read_prefix(*right_padded([row], CPU))
        for ours, expected in zip(closed.layers, alone.layers, strict=True):
            assert distance(ours.keys[number, :, -len(row) :], expected.keys[0]) < CLOSE
            assert distance(ours.values[number, :, -len(row) :], expected.values[0]) < CLOSE


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_end_at_some_positions_is_the_end_of_all(family):
    """From any block, the last feed-forward part run at these positions only."""
    stack = stack_of(family)
    start = stack.begin(*right_padded(rows_of(LENGTHS), CPU))
    row, column = torch.tensor([2, 0, 2, 3]), torch.tensor([10, 0, 4, 0])
    for first in range(len(stack.blocks) + 1):
        hidden = start.run(start.hidden, 0, first)
        expected = start.run(hidden, first, len(stack.blocks))[row, column]
        assert distance(start.finish(hidden, first, row, column), expected) < CLOSE


@pytest.mark.parametrize("family", ["gpt2", "gptj"])
@torch.no_grad()
def test_the_fast_model_is_the_model(family):
    stack = stack_of(family)
    row = rows_of((9,))[0]
    expected = whole(stack.model, row)
    with stack.fast():
        assert distance(whole(stack.model, row), expected) < CLOSE
    assert torch.equal(whole(stack.model, row), expected)


class LargestTensor(TorchDispatchMode):
    """Notes the number of elements of the largest argument that an operation gets, counting what is expanded."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        sizes = [value.numel() for value in args if isinstance(value, Tensor)]
        self.elements = max([self.elements, *sizes])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@torch.no_grad()
def test_the_head_of_the_last_positions_takes_no_copy_of_its_weight_per_row(family):
    stack = tiny_stack(family)
    ids = torch.tensor(rows_of((9,) * 16))
    largest = LargestTensor()
    with stack.fast(), largest:
        stack.model(input_ids=ids, use_cache=False, logits_to_keep=1)
    parameters = max(parameter.numel() for parameter in stack.model.parameters())
    activations = ids.numel() * max(inner for _, inner in stack.architecture.shapes)
    assert largest.elements <= 2 * max(parameters, activations)


@torch.no_grad()
def test_a_lent_prefix_is_the_selected_one():
    stack = tiny_stack("llama")
    prefix = stack.read_prefix(*left_padded(rows_of((5, 4)), CPU))
    mask = left_padded(rows_of((5, 4)), CPU)[1]
    ids, own, positions = right_padded(rows_of((3, 2, 3)), CPU)
    rows = torch.tensor([1, 0, 1])
    mask, positions = torch.cat([mask[rows], own], dim=1), positions + torch.tensor([[4], [5], [4]])
    passes = [stack.begin(ids, mask, positions, given) for given in (prefix.select(rows), prefix.lend(rows))]
    selected, lent = (one.run(one.hidden, 0, len(stack.blocks)) for one in passes)
    assert torch.equal(selected, lent)


@torch.no_grad()
def test_a_prefix_never_grows():
    stack = tiny_stack("llama")
    ids, mask, positions = left_padded(rows_of((5, 4)), CPU)
    prefix = stack.read_prefix(ids, mask, positions)
    before = [(layer.keys.clone(), layer.values.clone()) for layer in prefix.layers]
    stack.model(input_ids=ids, past_key_values=prefix, use_cache=True)
    assert prefix.get_seq_length() == 5
    for layer, (keys, values) in zip(prefix.layers, before, strict=True):
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)
    assert isinstance(prefix.select(torch.tensor([1])), Prefix)
    assert prefix.select(torch.tensor([1])).layers[0].keys.shape[0] == 1


@pytest.mark.parametrize("family", ["gpt2", "gptj", "llama"])
def test_gradients_flow_through_the_blocks_and_the_head(family):
    stack = tiny_stack(family)
    ids, mask, positions = right_padded(rows_of((5, 3)), CPU)
    start = stack.begin(ids, mask, positions)
    hidden = start.run(start.hidden, 0, 2).requires_grad_()
    stack.logits(start.run(hidden, 2, 4))[:, 0].sum().backward()
    assert hidden.grad is not None
    assert torch.equal(hidden.grad[:, 1:], torch.zeros_like(hidden.grad[:, 1:]))  # causal
    assert float(hidden.grad[:, 0].norm()) > 1e-3
    assert not any(parameter.requires_grad for parameter in stack.model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_keys_are_the_inputs_of_the_ffn_projection(family):
    stack = tiny_stack(family)
    rows = rows_of(LENGTHS)
    ids, mask, positions = right_padded(rows, CPU)
    start = stack.begin(ids, mask, positions)
    with stack.watch_keys([0, 2]) as seen:
        start.run(start.hidden, 0, 3)
    assert seen.keys() == {0, 2}
    for layer, keys in seen.items():
        expected: list[Tensor] = []
        handle = stack.model.get_submodule(stack.architecture.ffn_module(layer)).register_forward_hook(
            lambda _m, args, _o, into=expected: into.append(args[0])
        )
        for row in rows:
            whole(stack.model, row)
        handle.remove()
        for number, row in enumerate(rows):
            assert distance(keys[number, : len(row)], expected[number][0]) < CLOSE
    assert stack.architecture.shapes[0][1] == seen[0].shape[-1]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_nothing_is_left_behind(family):
    model = tiny_model(family)
    row = rows_of((6,))[0]
    before, parameters = whole(model, row), {name: p.clone() for name, p in model.named_parameters()}
    stack = Stack(model, describe(model.config))
    ids, mask, positions = right_padded([row], CPU)
    start = stack.begin(ids, mask, positions, stack.read_prefix(ids, mask, positions).select(torch.tensor([0])))
    assert start.hidden.shape == (1, 6, 32)
    with pytest.raises(RuntimeError, match="inside"), stack.watch_keys([0, 1]):
        raise RuntimeError("inside")
    with pytest.raises(IndexError):  # a token that does not exist
        stack.begin(torch.tensor([[10**6]]), torch.ones(1, 1, dtype=torch.long), torch.zeros(1, 1, dtype=torch.long))
    assert torch.equal(whole(model, row), before)
    assert children_with_hooks(model) == []
    assert not any("forward" in vars(module) for module in model.modules())
    assert all(torch.equal(p, parameters[name]) for name, p in model.named_parameters())


@torch.no_grad()
def test_a_forward_of_the_instance_is_put_back():
    """Libraries that dispatch or offload put their own forward on the instance."""
    model = tiny_model("llama")
    block = model.model.layers[1]
    inner, calls = block.forward, []

    def own(*args: Any, **kwargs: Any) -> Any:
        calls.append(len(args))
        return inner(*args, **kwargs)

    block.forward = own
    stack = Stack(model, describe(model.config))
    ids, mask, positions = right_padded(rows_of((4,)), CPU)
    calls.clear()
    start = stack.begin(ids, mask, positions)
    assert block.forward is own
    assert calls == []
    start.run(start.hidden, 0, 4)
    assert calls == [1]


def test_evaluation_mode_is_set():
    model = tiny_model("gpt2", resid_pdrop=0.5).train()
    stack = Stack(model, describe(model.config))
    assert not any(module.training for module in stack.model.modules())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@torch.no_grad()
def test_other_types_compose_too(dtype):
    stack = tiny_stack("llama", dtype=dtype)
    row = rows_of((6,))[0]
    start = stack.begin(*right_padded([row], CPU))
    logits = stack.logits(start.run(start.hidden, 0, 4))[0]
    assert logits.dtype == dtype
    assert distance(logits.double(), whole(stack.model, row).double()) < (1e-12 if dtype == torch.float64 else 3e-2)


def test_a_model_that_its_pieces_do_not_make_is_refused():
    model = tiny_model("llama")
    architecture = describe(model.config)
    model.register_forward_hook(lambda _m, _a, out: out.__setitem__("logits", out.logits + out.logits.roll(1, 1)))
    with pytest.raises(UnsupportedModelError) as caught:
        Stack(model, architecture)
    assert caught.value.remedy
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("gemma2", {"final_logit_softcapping": 3.0}),
        ("cohere", {"logit_scale": 0.3}),
        ("granite", {"logits_scaling": 4.0, "residual_multiplier": 0.3, "embedding_multiplier": 2.0}),
    ],
)
def test_what_a_model_does_with_its_logits_is_part_of_the_head(family, changes):
    stack = tiny_stack(family, **changes)
    ids = torch.arange(5, 11)[None]
    with torch.no_grad():
        start = stack.begin(ids, torch.ones_like(ids), torch.arange(6)[None])
        hidden = start.run(start.hidden, 0, len(stack.blocks))
        theirs = stack.model(input_ids=ids, use_cache=False).logits
        assert distance(stack.logits(hidden), theirs) < 1e-5
        assert distance(stack.logits(hidden[0, [4, 1]]), theirs[0, [4, 1]]) < 1e-5
        plain = stack.model.get_output_embeddings()(stack._norm(hidden))
        assert distance(plain, theirs) > 0.1


def test_a_model_with_weights_that_are_not_numbers_is_refused():
    model = tiny_model("gpt2")
    model.transformer.h[2].mlp.c_fc.weight.data[0, 0] = float("nan")
    with pytest.raises(UnsupportedModelError):
        Stack(model, describe(model.config))


def test_padding_puts_every_token_at_its_place():
    rows = [[5, 6, 7], [8], []]
    ids, mask, positions = left_padded(rows, CPU)
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1], [0, 0, 0]]
    assert ids[mask.bool()].tolist() == [5, 6, 7, 8]
    assert positions[0].tolist() == [0, 1, 2]
    assert positions[1, 2] == 0
    ids, mask, positions = right_padded(rows, CPU)
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0], [0, 0, 0]]
    assert ids[mask.bool()].tolist() == [5, 6, 7, 8]
    assert positions[:, 0].tolist() == [0, 0, 0]


@torch.no_grad()
def test_a_cache_of_ones_own_still_works_afterwards():
    stack = tiny_stack("llama")
    row = rows_of((6,))[0]
    stack.begin(*right_padded([row], CPU))
    cache = DynamicCache(config=stack.model.config)
    first = stack.model(input_ids=torch.tensor([row[:4]]), past_key_values=cache, use_cache=True).logits[0]
    second = stack.model(input_ids=torch.tensor([row[4:]]), past_key_values=cache, use_cache=True).logits[0]
    assert distance(torch.cat([first, second]), whole(stack.model, row)) < CLOSE


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_prefix_of_the_first_blocks_serves_passes_that_go_no_further(family):
    stack = stack_of(family)
    ids, mask, positions = right_padded(rows_of((5, 4)), CPU)
    length, stop = ids.shape[1], len(stack.blocks) - 1
    found = []
    for prefix in (stack.read_prefix(ids, mask, positions), stack.read_prefix(ids, mask, positions, stop=stop)):
        after = torch.cat([mask, torch.ones_like(ids)], dim=1)
        start = stack.begin(ids, after, positions + length, prefix)
        found.append(start.run(start.hidden, 0, stop))
    assert torch.equal(*found)
