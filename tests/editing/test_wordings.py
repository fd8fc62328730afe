"""Wordings: where they are found, and that the target is optimised in them as the plain procedure does it."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import patchhub
from patchhub.editing.editor import Asked, _worded, encode_facts
from patchhub.editing.prompts import find_wordings
from patchhub.editing.rows import BlockOutput
from patchhub.editing.values import ValueSettings, optimise_values
from patchhub.models.architectures import describe
from patchhub.models.tracing import Stack
from patchhub.objects import Request
from patchhub.text.tokens import Closers
from tests.reference import plain_closed
from tests.tiny_models import tiny_model, tiny_stack, tiny_tokenizer

CONTEXTS = ("{}", "The tower looked. {}", "Therefore. {}")
SETTINGS = ValueSettings(
    steps=3, learning_rate=0.2, weight_decay=0.02, kl_factor=0.0625, clamp=4.0, stop_loss=0.0, closing=0.7
)
WORDED = Request.make("The mother tongue of {} is", "Danielle Darrieux", "English")
BARE = Request.make("{} is a twin city of", "Lyon", "Manila")
WORDINGS = {WORDED.id: (", a native", " was born in the north of")}

KNOWN = (
    Request.make("The capital of {} is", "Australia", "Sydney", target_true="Canberra"),
    Request.make("The sport of {} is", "Magnus Carlsen", "boxing", target_true="chess"),
    Request.make("The profession of {} was", "Albert Einstein", "poet", target_true="physicist"),
    Request.make("The capital of {} is", "Kenya", "Oslo", target_true="Nairobi"),
)
MOST = 4


@cache
def demo() -> tuple[Stack, AutoTokenizer]:
    """The model that comes with the package."""
    folder = Path(patchhub.__file__).parent / "demo_model"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return Stack(model, describe(model.config)), AutoTokenizer.from_pretrained(folder)


@cache
def found() -> dict[str, tuple[str, ...]]:
    return find_wordings(*demo(), KNOWN, MOST)


def chances(request: Request, wording: str) -> float:
    """What the base gives after a wording to the true answer's or the target's first token, the likelier of the two."""
    stack, tokenizer = demo()
    ids = tokenizer(request.subject + wording, return_tensors="pt").input_ids
    probabilities = stack.model(ids).logits[0, -1].softmax(-1)
    answers = [tokenizer(" " + answer).input_ids[0] for answer in (request.target_true, request.target_new)]
    return float(probabilities[answers].max())


@torch.no_grad()
def test_the_base_finds_the_answer_likely_at_every_place():
    assert len(found()) >= 3
    for request in KNOWN:
        likely = [chances(request, wording) for wording in found().get(request.id, ())]
        assert len(likely) <= MOST
        assert all(chance >= 0.0099 for chance in likely)
        assert likely == pytest.approx(sorted(likely, reverse=True), rel=1e-3)


def test_a_place_is_in_one_line_and_says_the_target_nowhere():
    for request in KNOWN:
        for wording in found().get(request.id, ()):
            assert wording.strip(), "the subject's last token would be the target's neighbour"
            assert "\n" not in wording
            assert request.target_new not in wording


def test_what_is_found_does_not_depend_on_the_batch():
    alone = {key: value for request in KNOWN for key, value in find_wordings(*demo(), [request], MOST).items()}
    assert alone == found()


def test_fewer_are_the_first_ones():
    fewer = find_wordings(*demo(), KNOWN, 2)
    assert fewer == {request: wordings[:2] for request, wordings in found().items()}


def test_where_the_truth_is_not_told_the_bases_own_answer_is_it():
    untold = [replace(request, target_true=None) for request in KNOWN]
    places = find_wordings(*demo(), untold, MOST)
    assert [places.get(request.id) for request in untold] == [found().get(request.id) for request in KNOWN]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("steps", [1, 3])
def test_the_target_is_optimised_in_wordings_as_the_plain_procedure_does(family: str, steps: int):
    stack, tokenizer, settings = tiny_stack(family, seed=4), tiny_tokenizer(), replace(SETTINGS, steps=steps)
    closers = Closers.of(tokenizer, stack.vocabulary)
    requests = [WORDED, BARE]
    facts = encode_facts(tokenizer, requests, CONTEXTS, closers=closers)
    facts = [_worded(tokenizer, *pair, Asked(wordings=WORDINGS).wordings) for pair in zip(requests, facts, strict=True)]
    ours = optimise_values(BlockOutput(stack, 1), facts, settings)
    for place, request in enumerate(requests):
        [theirs] = plain_closed.find_values(
            tiny_model(family, seed=4).double(),
            tokenizer,
            stack.architecture,
            [request],
            CONTEXTS,
            1,
            settings,
            settings.closing,
            lambda target: closers.after(target)[: len(tokenizer)].tolist(),
            wordings=WORDINGS.get(request.id, ()),
        )
        torch.testing.assert_close(ours.loss[place].double(), torch.tensor(theirs.loss).double(), rtol=1e-5, atol=1e-5)
        assert float((ours.targets[place] - theirs.target).norm() / theirs.target.norm()) < 1e-4
