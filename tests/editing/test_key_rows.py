"""Keys read over a shared beginning are the keys of a whole forward pass."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from patchhub.delta import LowRank
from patchhub.editing.locate import encode_prompts
from patchhub.editing.record import side_paths
from patchhub.editing.rows import Beginnings, KeyRow, batches, key_rows, mean_keys
from patchhub.models.tracing import Stack
from patchhub.objects import Request
from tests.tiny_models import FAMILIES, tiny_stack, tiny_tokenizer

CONTEXTS = ("{}", "The tower looked. {}", "Because I think that you know. {}")
REQUESTS = (
    Request.make("The mother tongue of {} is", "Danielle Darrieux", "English"),
    Request.make("{} is a twin city of", "Lyon", "Manila"),
    Request.make("Where is it? I think that it is near {}", "the Eiffel Tower", "Rome"),
)


def rows_of(requests: Sequence[Request], contexts: Sequence[str] = CONTEXTS) -> list[KeyRow]:
    return key_rows([encode_prompts(tiny_tokenizer(), [(c, one) for c in contexts]) for one in requests])


@torch.no_grad()
def whole(stack: Stack, layer: int, rows: Sequence[KeyRow], requests: int) -> Tensor:
    """The same means from one forward pass of the whole model for each row."""
    keys = torch.zeros(requests, stack.architecture.shapes[layer][1], dtype=torch.float64)
    for row in rows:
        with stack.watch_keys([layer]) as seen:
            stack.model(input_ids=torch.tensor([row.tokens]))
        keys[row.request] += row.weight * seen[layer][0, -1].double()
    return keys


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layer", [0, 2])
def test_mean_keys_are_those_of_whole_forward_passes(family, layer):
    stack, rows = tiny_stack(family), rows_of(REQUESTS)
    torch.testing.assert_close(
        mean_keys(stack, layer, rows), whole(stack, layer, rows, len(REQUESTS)), rtol=1e-4, atol=1e-5
    )


def test_beginnings_are_run_on_the_present_weights():
    stack, rows, generator = tiny_stack("llama"), rows_of(REQUESTS), torch.Generator().manual_seed(0)
    out, inner = stack.architecture.shapes[0]
    change = LowRank(
        torch.randn(out, 2, generator=generator).numpy(), torch.randn(2, inner, generator=generator).numpy()
    )
    before = mean_keys(stack, 2, rows)
    with side_paths(stack, {0: [change]}):
        after, expected = mean_keys(stack, 2, rows), whole(stack, 2, rows, len(REQUESTS))
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-4)
    assert (after - before).norm() > 0.1 * before.norm()


@pytest.mark.parametrize(
    ("requests", "contexts", "lengths"),
    [
        (REQUESTS, CONTEXTS, "the words of the context"),
        (REQUESTS[:1], CONTEXTS, "all but the last token"),
        (REQUESTS[1:], ("{}",), "nothing"),
    ],
)
def test_rows_keep_what_follows_their_beginning(requests, contexts, lengths):
    rows = rows_of(requests, contexts)
    beginnings = Beginnings.of(rows, tiny_stack("llama"))
    for row in rows:
        front = beginnings.tokens[row.context]
        assert front + beginnings.own(row) == row.tokens
        assert beginnings.own(row)
    decoded = [tiny_tokenizer().decode(list(tokens)).strip() for tokens in beginnings.tokens]
    expected = {
        "the words of the context": ["", *(context.removesuffix(" {}") for context in contexts[1:])],
        "all but the last token": [tiny_tokenizer().decode(list(row.tokens[:-1])).strip() for row in rows],
        "nothing": [""],
    }
    assert decoded == expected[lengths]


def test_batches_hold_every_row_once_and_keep_bare_prompts_apart():
    rows = rows_of(REQUESTS)
    beginnings = Beginnings.of(rows, tiny_stack("llama"))
    found = list(batches(rows, beginnings, 12))
    assert sorted(id(row) for batch in found for row in batch) == sorted(map(id, rows))
    assert all(len({row.context == 0 for row in batch}) == 1 for batch in found)
    assert all(len(batch) == 1 or len(batch) * max(len(beginnings.own(row)) for row in batch) <= 12 for batch in found)
