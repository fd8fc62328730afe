"""What a batch begins with is read once, and what was expected wrongly stays in the cache: nothing of it is heard, in any family."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest

from patchhub.evaluation import live, metrics
from patchhub.models.structure import takes_gaps
from tests.models.test_families import louder
from tests.models.tiny_configs import SUPPORTED, random_model, tiny_config

FEW = ("gemma3_text", "gpt2", "llama", "mpt", "qwen3_next")
TOKENS = range(3, 60)


def written(model: Any, rows: Sequence[tuple[int, ...]], room: Sequence[int], ahead: Any = None) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in rows]
    with metrics.reading(model):
        greedily = (lambda logits, step, rows: logits.argmax(-1), ahead or [()] * len(rows), lambda row: False)
        live._continue(model, rows, room, *greedily, found)
    return found


def scored(model: Any, keys: Sequence[Any]) -> list[float]:
    found = {}
    with metrics.reading(model):
        for batch in metrics._batches(metrics._rows(keys), 2048):
            found.update(metrics._score_batch(model, batch))
    return [found[key].logprob for key in keys]


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name in FEW else pytest.mark.slow) for name in SUPPORTED]
)
def test_many_texts_that_begin_alike_are_read_as_each_is_alone(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_SHARED", 8)
    seen = []
    monkeypatch.setattr(metrics, "takes_gaps", lambda *given: seen.append(takes_gaps(*given)) or seen[-1])
    model, drawn = louder(random_model(tiny_config(family))), random.Random(0)
    model.generation_config.eos_token_id = None
    head = tuple(drawn.choices(TOKENS, k=12))
    rows, room = [head + tuple(drawn.choices(TOKENS, k=more)) for more in (1, 4, 7, 2)], (6, 3, 6, 5)
    alone = [written(model, [row], [most])[0] for row, most in zip(rows, room, strict=True)]
    right, partly, wrong = alone[0][:4], [alone[1][0], 1 + alone[1][1] % 50], [7, 8]
    assert written(model, rows, room) == alone
    assert written(model, rows, room, [right, partly, wrong, ()]) == alone
    longer = [(*row, *right) for row in rows[:1]]  # begins as the first goes on
    assert written(model, [*rows, *longer], [*room, 2], [right, partly, wrong, (), ()]) == [*alone, alone[0][4:6]]
    keys = [(row, tuple(new[:count])) for row, new in zip(rows, alone, strict=True) for count in (1, 3)]
    assert scored(model, keys) == pytest.approx([scored(model, [key])[0] for key in keys], abs=1e-4)
    assert any(seen) == takes_gaps(model, 40)


def test_a_model_that_reads_its_blocks_for_each_pass_has_no_further_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model, passes = random_model(tiny_config("llama")), []
    model.generation_config.eos_token_id = None
    model.register_forward_pre_hook(lambda _, args, kwargs: passes.append(1), with_kwargs=True)
    rows = [(*range(3, 23), last) for last in range(50, 55)]
    found = []
    for disk in (None, model):
        monkeypatch.setattr(metrics, "streamed", lambda _, disk=disk: disk)
        passes.clear()
        found.append((written(model, rows, [3] * len(rows)), len(passes)))
    assert [text for text, _ in found] == [found[0][0]] * 2
    assert [number for _, number in found] == [4, 3]


def test_a_window_that_is_narrower_than_a_text_takes_no_gaps() -> None:
    model = random_model(tiny_config("llama"))
    limit = model.config.max_position_embeddings
    assert takes_gaps(model, limit)
    assert not takes_gaps(model, limit + 1)
    narrow = random_model(tiny_config("gemma3_text", sliding_window=32))
    assert takes_gaps(narrow, 32)
    assert not takes_gaps(narrow, 33)
