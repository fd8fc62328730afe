"""Second moments of a base that is streamed: those of the base in memory, bit for bit, through interruption and damage."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from patchhub.cache import Cache, Slot
from patchhub.editing import metric as under_test
from patchhub.editing.metric import SPILLED, second_moments, streamed_moments
from patchhub.errors import EditError, RepositoryError
from patchhub.models.architectures import describe
from patchhub.models.checkpoint import open_checkpoint
from patchhub.models.placement import Placement, load_base
from patchhub.models.tracing import Stack
from tests.tiny_models import VOCABULARY, tiny_model

LAYERS = (1, 3)
_DRAWN = torch.Generator().manual_seed(0)
DOCUMENTS = [torch.randint(1, VOCABULARY, (length,), generator=_DRAWN).tolist() for length in (9, 2, 17, 1, 5, 17) * 4]
TOKENS = sum(map(len, DOCUMENTS))


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several parts of several batches."""
    monkeypatch.setattr(under_test, "_TOKENS_PER_BATCH", 40)
    monkeypatch.setattr(under_test, "_PART", 2)


def stacks(folder: Path, family: str = "llama", dtype: str = "float32") -> list[Stack]:
    """A base in memory, and streamed."""
    tiny_model(family).save_pretrained(folder)
    checkpoint = open_checkpoint(folder)
    models = [load_base(checkpoint, Placement(device, dtype)) for device in ("cpu", "stream")]
    return [Stack(model, describe(model.config)) for model in models]


def spill(cache: Cache) -> Callable[[int], Slot]:
    return lambda index: cache.slot(SPILLED, block=index)


def streamed(stack: Stack, cache: Cache, progress: Any = lambda tokens: None) -> dict[int, Tensor]:
    return dict(streamed_moments(stack, LAYERS, DOCUMENTS, spill(cache), progress=progress))


def equal(a: dict[int, Tensor], b: dict[int, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[layer], b[layer]) for layer in a)


@pytest.mark.parametrize(
    ("family", "dtype"), [("gpt2", "bfloat16"), ("llama", "float32"), ("gemma2", "float32"), ("mixtral", "float32")]
)
def test_streamed_moments_are_those_of_the_base_in_memory_bit_for_bit(family: str, dtype: str, tmp_path: Path) -> None:
    whole, parts = stacks(tmp_path / "model", family, dtype)
    cache, counted = Cache(tmp_path / "cache"), list[int]()
    assert equal(streamed(parts, cache, counted.append), second_moments(whole, LAYERS, DOCUMENTS))
    assert sum(counted) == TOKENS * (LAYERS[-1] + 1)
    assert list(cache.files()) == [], "what lay between the blocks is gone"


class Interrupted(Exception):
    """What Ctrl-C is."""


def stopped(stack: Stack, cache: Cache, after: int) -> None:
    """Run into an interruption in the batch with which so many tokens have gone through blocks."""
    done = 0

    def count(tokens: int) -> None:
        nonlocal done
        done += tokens
        if done > after:
            raise Interrupted

    with pytest.raises(Interrupted):
        streamed(stack, cache, count)


def test_what_was_interrupted_goes_on_at_the_block_where_it_stopped(tmp_path: Path) -> None:
    whole, parts = stacks(tmp_path / "model")
    cache, counted = Cache(tmp_path / "cache"), list[int]()
    expected = second_moments(whole, LAYERS, DOCUMENTS)
    stopped(parts, cache, TOKENS * 5 // 2)
    assert [path.stat().st_size for path in cache.files()] == [4 * 32 * padded()]
    # Layer 1 had been handed over; what is left begins behind it.
    rest = dict(streamed_moments(parts, [3], DOCUMENTS, spill(cache), progress=counted.append))
    assert torch.equal(rest[3], expected[3])
    assert (counted[0], sum(counted[1:])) == (2 * TOKENS, 2 * TOKENS)
    assert list(cache.files()) == []


def padded() -> int:
    """Positions of all batches."""
    parts = under_test._parts(DOCUMENTS)
    return sum(len(batch) * len(batch[-1]) for part in parts for batch in under_test._batches(part, 40))


@pytest.mark.parametrize("cut", [True, False])
def test_damaged_states_are_told_and_made_again(cut: bool, tmp_path: Path) -> None:
    whole, parts = stacks(tmp_path / "model")
    told: list[str] = []
    cache = Cache(tmp_path / "cache", told.append)
    stopped(parts, cache, TOKENS * 3 // 2)
    [path] = cache.files()
    data = path.read_bytes()
    path.write_bytes(data[:-4] if cut else data[:100] + bytes([data[100] ^ 1]) + data[101:])
    assert equal(streamed(parts, cache), second_moments(whole, LAYERS, DOCUMENTS))
    [sentence] = told
    assert "made again" in sentence


def test_states_that_end_while_they_are_read_are_a_sentence(tmp_path: Path) -> None:
    _, parts = stacks(tmp_path / "model")
    cache, done = Cache(tmp_path / "cache"), list[int]()

    def cut(tokens: int) -> None:
        done.append(tokens)
        if sum(done) > TOKENS * 3 // 2:
            for path in cache.files():
                path.write_bytes(path.read_bytes()[:64])

    with pytest.raises(RepositoryError, match=r"the hidden states before block 1, .* are gone or damaged"):
        streamed(parts, cache, cut)


def test_no_text_is_an_error(tmp_path: Path) -> None:
    _, parts = stacks(tmp_path / "model")
    with pytest.raises(EditError):
        dict(streamed_moments(parts, LAYERS, [[]], spill(Cache(tmp_path / "cache"))))
