"""Blocks with a state that cannot be cut: texts are read from their beginning, which is slower and gives the same numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from patchhub.cache import Cache
from patchhub.editing.editor import EDITORS
from patchhub.editing.metric import MetricCache
from patchhub.editing.record import State, record
from patchhub.editing.rows import key_rows
from patchhub.editing.values import optimise_values
from patchhub.evaluation.live import continue_greedily
from patchhub.evaluation.metrics import score_targets
from patchhub.models.architectures import describe
from patchhub.models.tracing import Stack
from tests.models.test_families import FACTS, LAYERS, RIDGE, SETTINGS, louder
from tests.models.tiny_configs import SUPPORTED, make_config, random_model
from tests.tiny_models import BOS, EOS, VOCABULARY, tiny_stack, tiny_tokenizer

PLACES = {"vocab_size": VOCABULARY, "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": EOS}
PROMPTS = ("The mother tongue of Ada is", "Lyon is", "The Space Needle is located in the city of")


@pytest.mark.parametrize("method", EDITORS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_numbers_are_those_of_the_steps_over_a_prefix(family: str, method: str, tmp_path: Path) -> None:
    over = tiny_stack(family)
    whole = tiny_stack(family)
    whole.architecture = replace(whole.architecture, recurrent=True)
    found = []
    for stack in (over, whole):
        way = EDITORS[method].way(stack.architecture)
        values = optimise_values(way.site(stack, LAYERS), FACTS, SETTINGS)
        metric = MetricCache(Cache(tmp_path), "0" * 64)
        for layer in LAYERS:
            inner = stack.architecture.shapes[layer][1]
            metric.store(stack.architecture.ffn_weight(layer), torch.eye(inner, dtype=torch.float64))
        rows = key_rows([fact.rows for fact in FACTS])
        made = record(stack, LAYERS, rows, values.targets, RIDGE, metric, State({}, {}), way.spread)
        found.append((values, made))
    (values, made), (others, again) = found
    torch.testing.assert_close(values.targets, others.targets, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(values.loss, others.loss, rtol=1e-3, atol=1e-4)
    for name, columns in made.columns.items():
        for one, other in (
            (columns.keys, again.columns[name].keys),
            (columns.residuals, again.columns[name].residuals),
        ):
            torch.testing.assert_close(torch.from_numpy(one), torch.from_numpy(other), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("family", ["qwen3_5_text", "bamba"])
def test_scores_and_texts_are_those_of_prompts_read_alone(family: str) -> None:
    """Targets are scored, and text is written, in one batch of prompts of different lengths as in passes without any cache."""
    model = louder(random_model(make_config(family, {**SUPPORTED[family], **PLACES})))
    assert describe(model.config).recurrent
    Stack(model, describe(model.config))
    tokenizer = tiny_tokenizer()
    items = [(prompt, target) for prompt in PROMPTS for target in ("French", "in Seattle")]
    for (prompt, target), score in zip(items, score_targets(model, tokenizer, items), strict=True):
        ids = tokenizer(f"{prompt} {target}", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logprobs = model(ids, use_cache=False).logits[0].log_softmax(-1)
        count = len(score.tokens)
        expected = logprobs[-count - 1 : -1].gather(1, ids[0, -count:, None]).sum()
        assert score.logprob == pytest.approx(float(expected), rel=1e-3, abs=1e-3)
    for prompt, text in zip(PROMPTS, continue_greedily(model, tokenizer, PROMPTS, max_new_tokens=4), strict=True):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        start = ids.shape[1]
        for _ in range(4):
            with torch.no_grad():
                best = model(ids, use_cache=False).logits[0, -1].argmax()
            if int(best) == EOS:
                break
            ids = torch.cat([ids, best.view(1, 1)], dim=1)
        assert text == tokenizer.decode(ids[0, start:], skip_special_tokens=True)
