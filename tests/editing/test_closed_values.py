"""Values of closed targets and of several facts of one subject are those of the plain procedure, which runs the whole model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial

import pytest
import torch
from torch import Tensor

from patchhub.cache import Cache
from patchhub.editing.editor import NOTHING_ELSE, _saying_once, encode_facts, of_one_subject
from patchhub.editing.locate import Encoded, encode_marked, mark_text
from patchhub.editing.rows import BlockOutput, Fact
from patchhub.editing.settings import EditSettings
from patchhub.editing.values import KeptValues, Values, ValueSettings, fact_key, optimise_values
from patchhub.models.tracing import Stack
from patchhub.objects import Request
from patchhub.text.tokens import Closers
from tests.reference import plain_closed
from tests.tiny_models import tiny_model, tiny_stack, tiny_tokenizer

LAYER = 1
SEED = 4
WRITTEN = EditSettings(
    layers=(1,), ridge=1.0, steps=3, learning_rate=0.2, weight_decay=0.02, kl_factor=0.0625, clamp=4.0, closing=0.7
)
CONTEXTS = ("{}", "The tower looked. {}", "Therefore. {}")
SETTINGS = ValueSettings(
    steps=3, learning_rate=0.2, weight_decay=0.02, kl_factor=0.0625, clamp=4.0, stop_loss=0.0, closing=0.7
)


def request(prompt: str, subject: str, target: str) -> Request:
    return Request.make(prompt=prompt, subject=subject, target_new=target)


REQUESTS = (
    request("The mother tongue of {} is", "Danielle Darrieux", "English"),
    request("{} is a twin city of", "Lyon", "Manila"),
    request("Where is it? I think that it is near {}", "the Eiffel Tower", "Rome"),
    request("The capital of {} is", "Lyon", "the piano, and well"),
    request("In the north of the United States, {} is located in the state of", "Danielle Darrieux", "1998"),
    request("I know that the name of {} is written", "Lyon", "東京"),
)


@cache
def stack(family: str) -> Stack:
    return tiny_stack(family, seed=SEED)


@cache
def closers(family: str) -> Closers:
    return Closers.of(tiny_tokenizer(), stack(family).vocabulary)


def facts(family: str, requests: Sequence[Request] = REQUESTS) -> list[Fact]:
    return encode_facts(tiny_tokenizer(), requests, CONTEXTS, closers=closers(family))


def plainly(family: str, settings: ValueSettings, groups: Sequence[Sequence[int]]) -> Values:
    """The plain procedure in float64, one group after the other."""
    model = tiny_model(family, seed=SEED).double()
    found = {}
    for group in groups:
        same = [REQUESTS[place] for place in group]
        steps = settings.steps * (1 if len(group) == 1 else 10)
        values = plain_closed.find_values(
            model,
            tiny_tokenizer(),
            stack(family).architecture,
            same,
            CONTEXTS,
            LAYER,
            replace(settings, steps=steps),
            settings.closing,
            lambda target: closers(family).after(target)[: len(tiny_tokenizer())].tolist(),
        )
        found.update(zip(group, values, strict=True))
    ordered = [found[place] for place in range(len(REQUESTS))]
    return Values(
        torch.stack([value.target for value in ordered]),
        torch.stack([value.hidden for value in ordered]),
        torch.tensor([value.loss for value in ordered]),
        torch.tensor([value.steps for value in ordered]),
    )


def distances(a: Tensor, b: Tensor) -> Tensor:
    return (a.double() - b.double()).norm(dim=1) / b.double().norm(dim=1)


APART = [[place] for place in range(len(REQUESTS))]
TOGETHER = of_one_subject(REQUESTS)


def test_facts_of_one_subject_are_found():
    assert TOGETHER == [[0, 4], [1, 3, 5], [2]]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("groups", [APART, TOGETHER], ids=["apart", "together"])
@pytest.mark.parametrize(
    "settings",
    [
        SETTINGS,
        pytest.param(replace(SETTINGS, closing=3.0), marks=pytest.mark.slow),
        pytest.param(replace(SETTINGS, clamp=0.2), marks=pytest.mark.slow),
    ],
)
def test_it_is_the_plain_procedure(family, groups, settings):
    ours = optimise_values(BlockOutput(stack(family), LAYER), facts(family), settings, together=groups)
    theirs = plainly(family, settings, groups)
    assert float(distances(ours.hidden, theirs.hidden).max()) < 1e-5
    assert float(distances(ours.targets, theirs.targets).max()) < 1e-4
    torch.testing.assert_close(ours.loss.double(), theirs.loss.double(), rtol=1e-5, atol=1e-5)
    assert float(distances(theirs.targets, theirs.hidden).min()) > 0.05


SENTENCES = (("{} is a", "city in the north of France"), ("Tell me about {}.", "The tower is in Rome, and well"))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize(("asking", "said"), SENTENCES)
def test_what_is_said_of_the_subject_stays_likely(family, asking, said):
    """The plain procedure with the same sentence; and the more it weighs, the less its words lose."""
    asked, tokenizer, (head, tail) = [REQUESTS[1], REQUESTS[3]], tiny_tokenizer(), asking.split("{}")
    encoded = facts(family, asked)
    [sentence] = encode_marked(tokenizer, [mark_text(head, "Lyon", tail, said)])
    encoded[0] = replace(encoded[0], sentence=sentence)
    model, lost = tiny_model(family, seed=SEED).double(), []
    for essence in (0.0, 0.5, 8.0):
        settings = replace(SETTINGS, essence=essence, learning_rate=0.1)
        ours = optimise_values(BlockOutput(stack(family), LAYER), encoded, settings, together=[[0, 1]])
        theirs = plain_closed.find_values(
            model,
            tokenizer,
            stack(family).architecture,
            asked,
            CONTEXTS,
            LAYER,
            replace(settings, steps=30),
            settings.closing,
            lambda target: closers(family).after(target)[: len(tokenizer)].tolist(),
            sentence=(asking, said),
            essence_weight=essence,
        )
        assert float(distances(ours.targets, torch.stack([value.target for value in theirs])).max()) < 1e-4
        losses = torch.tensor([value.loss for value in theirs]).double()
        torch.testing.assert_close(ours.loss.double(), losses, rtol=1e-5, atol=1e-5)
        lost.append(loss_of_words(family, sentence, ours))
    assert lost[0] > lost[1] > lost[2] >= 0


def loss_of_words(family: str, text: Encoded, values: Values) -> float:
    """What the words of a sentence lose by a value, in nats a word."""
    ids, (start, stop) = torch.tensor([text.input_ids]), text.target
    place, found = torch.zeros(len(text.input_ids), 1).index_fill(0, torch.tensor(text.subject_last), 1.0), []
    for change in (torch.zeros(values.targets.shape[1]), values.targets[0] - values.hidden[0]):
        added = partial(torch.add, place * change)
        handle = stack(family).blocks[LAYER].register_forward_hook(lambda module, args, out, added=added: added(out))
        with torch.no_grad():
            log_probs = stack(family).model(input_ids=ids).logits[0].log_softmax(-1)
        handle.remove()
        found.append(log_probs[range(start - 1, stop - 1), ids[0, start:stop]])
    return float((found[0] - found[1]).clamp(min=0).mean())


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("gap", [",", ", and the city of"])
def test_where_the_target_was_said_again_it_must_not_be(family, gap):
    """The plain procedure with the same gap; and the more it weighs, the less likely the target is there."""
    asked = REQUESTS[0]
    model = tiny_model(family, seed=SEED).double()
    [fact] = facts(family, [asked])
    fact = _saying_once(tiny_tokenizer(), asked, fact, [gap], WRITTEN, NOTHING_ELSE)
    [row, other] = fact.rows[:2]
    assert tiny_tokenizer().decode(row.input_ids[row.target[1] :]).strip() == gap
    assert (row.after, other.after) == (len(row.input_ids) - row.target[1], 0)
    assert fact_key(fact.rows) != fact_key(facts(family, [asked])[0].rows)
    for steps in (1, 3):
        settings = replace(SETTINGS, steps=steps)
        ours = optimise_values(BlockOutput(stack(family), LAYER), [fact], settings)
        [theirs] = plain_closed.find_values(
            model,
            tiny_tokenizer(),
            stack(family).architecture,
            [asked],
            CONTEXTS,
            LAYER,
            settings,
            settings.closing,
            lambda target: closers(family).after(target)[: len(tiny_tokenizer())].tolist(),
            gap=gap,
        )
        torch.testing.assert_close(ours.loss[0].double(), torch.tensor(theirs.loss).double(), rtol=1e-5, atol=1e-5)
        assert float((ours.targets[0] - theirs.target).norm() / theirs.target.norm()) < 1e-4


def test_one_step_measures_the_objective_itself():
    """Without a step there is no Adam in between: the objective agrees to rounding."""
    settings = replace(SETTINGS, steps=1)
    for groups in (APART, TOGETHER):
        ours = optimise_values(BlockOutput(stack("llama"), LAYER), facts("llama"), settings, together=groups)
        torch.testing.assert_close(
            ours.loss.double(), plainly("llama", settings, groups).loss.double(), rtol=1e-5, atol=1e-6
        )


def test_facts_of_one_subject_share_their_change():
    ours = optimise_values(BlockOutput(stack("llama"), LAYER), facts("llama"), SETTINGS, together=TOGETHER)
    change = ours.targets - ours.hidden
    for group in TOGETHER:
        for place in group[1:]:
            torch.testing.assert_close(change[place], change[group[0]], rtol=0, atol=1e-5)
    assert float((change[0] - change[1]).norm()) > 0.01


def test_without_closers_it_is_the_objective_of_before():
    published = replace(SETTINGS, closing=0.0)
    site = BlockOutput(stack("llama"), LAYER)
    plain = encode_facts(tiny_tokenizer(), REQUESTS, CONTEXTS)
    ours, before = optimise_values(site, facts("llama"), published), optimise_values(site, plain, published)
    assert float(distances(ours.targets, before.targets).max()) < 1e-5


def test_kept_values_of_a_group_depend_on_all_of_it(tmp_path):
    site, kept = BlockOutput(stack("llama"), LAYER), KeptValues(Cache(tmp_path), {}, 32)
    first = optimise_values(site, facts("llama"), SETTINGS, together=TOGETHER, kept=kept)
    assert len(kept.read()) == len(REQUESTS)
    again = optimise_values(site, facts("llama"), SETTINGS, together=TOGETHER, kept=kept)
    assert torch.equal(again.targets, first.targets)
    optimise_values(site, facts("llama"), SETTINGS, together=APART, kept=kept)
    alone = sum(len(group) == 1 for group in TOGETHER)
    assert len(kept.read()) == 2 * len(REQUESTS) - alone


@pytest.mark.slow
@pytest.mark.parametrize("memory", [0, 4 << 30])
def test_the_size_of_a_batch_and_finished_groups_do_not_matter(memory):
    site = BlockOutput(stack("llama"), LAYER)
    stopping = replace(SETTINGS, steps=10, learning_rate=0.5, clamp=8.0, stop_loss=9.0)
    whole = optimise_values(site, facts("llama"), stopping, together=TOGETHER)
    assert len(set(whole.steps.tolist())) > 1
    parts = optimise_values(site, facts("llama"), stopping, together=TOGETHER, memory=memory)
    assert float(distances(parts.targets, whole.targets).max()) < 1e-5
