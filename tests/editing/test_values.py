"""Value optimisation: many at once is one by one, and one by one is the published procedure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from patchhub.cache import Cache
from patchhub.editing.editor import encode_facts
from patchhub.editing.locate import Encoded
from patchhub.editing.rows import BlockOutput, Fact, Projections, Row, beginnings, open_rows, run_trunk
from patchhub.editing.values import KeptValues, Values, ValueSettings, fact_key, optimise_values
from patchhub.errors import EditError
from patchhub.models import placement
from patchhub.models.tracing import Stack
from patchhub.objects import Request
from tests.reference import plain, plain_pmet
from tests.tiny_models import FAMILIES, tiny_model, tiny_stack, tiny_tokenizer

LAYER = 1
SEED = 4  # Adam's first step is the sign of the gradient: no component may be near zero, where rounding decides it
CONTEXTS = ("{}", "The tower looked. {}", "Therefore. {}", "Because I think that you know. {}")
SETTINGS = ValueSettings(
    steps=7, learning_rate=0.2, weight_decay=0.02, kl_factor=0.0625, clamp=4.0, stop_loss=0.0
)  # neither clamps nor stops
STOPPING = replace(SETTINGS, steps=14, learning_rate=0.5, clamp=8.0, stop_loss=6.06)  # random models do not learn fast
CLAMPED = replace(SETTINGS, clamp=0.2)
CASES = [(family, SETTINGS) for family in FAMILIES]
CASES += [(family, settings) for family in ("gpt2", "llama") for settings in (STOPPING, CLAMPED)]


def request(prompt: str, subject: str, target: str) -> Request:
    return Request.make(prompt=prompt, subject=subject, target_new=target)


REQUESTS = (
    request("The mother tongue of {} is", "Danielle Darrieux", "English"),
    request("{} is a twin city of", "Lyon", "Manila"),  # the subject first
    request("{} plays", "I", "the piano, and well"),  # one token, a long target
    request("Where is it? I think that it is near {}", "the Eiffel Tower", "Rome"),  # the prompt ends with the subject
    request("In the north of the United States, {} is located in the state of", "Zoë Kravitz Hall", "東京"),
)


def facts(
    requests: Sequence[Request] = REQUESTS, contexts: Sequence[str] = CONTEXTS, *, bos: bool = False
) -> list[Fact]:
    return encode_facts(tiny_tokenizer(bos=bos), requests, contexts)


@cache
def stack(family: str) -> Stack:
    return tiny_stack(family, seed=SEED)


def distances(a: Tensor, b: Tensor) -> list[float]:
    """Relative distance of each row."""
    return ((a.double() - b.double()).norm(dim=1) / b.double().norm(dim=1)).tolist()


def one_by_one(family: str, settings: ValueSettings, contexts: Sequence[str] = CONTEXTS) -> Values:
    parts = [optimise_values(BlockOutput(stack(family), LAYER), facts([one], contexts), settings) for one in REQUESTS]
    return Values(
        *(torch.cat([getattr(part, name) for part in parts]) for name in ("targets", "hidden", "loss", "steps"))
    )


@cache
def published(
    family: str, settings: ValueSettings, contexts: tuple[str, ...] = CONTEXTS, *, bos: bool = False
) -> Values:
    """The plain implementation in float64, so that differences are the float32 rounding of the code under test."""
    model = tiny_model(family, seed=SEED).double()
    places = stack(family).architecture
    found = [
        plain.find_value(model, tiny_tokenizer(bos=bos), places, one, contexts, LAYER, settings) for one in REQUESTS
    ]
    return Values(
        torch.stack([value.target for value in found]),
        torch.stack([value.hidden for value in found]),
        torch.tensor([value.loss for value in found]),
        torch.tensor([value.steps for value in found]),
    )


def test_the_requests_are_the_cases_that_matter():
    found = facts()
    assert REQUESTS[1].prompt.startswith("{}")
    assert found[2].rows[0].subject_last == 0
    assert found[2].essence.subject_last == 0
    assert len({fact.rows[0].target[1] - fact.rows[0].target[0] for fact in found}) >= 4
    assert found[3].rows[0].target[0] == found[3].rows[0].subject_last + 1
    assert len({row.subject_last for fact in found for row in fact.rows}) > 8


@pytest.mark.parametrize(("family", "settings"), CASES)
def test_many_at_once_is_one_by_one(family, settings):
    together, apart = (
        optimise_values(BlockOutput(stack(family), LAYER), facts(), settings),
        one_by_one(family, settings),
    )
    assert max(distances(together.targets, apart.targets)) < 1e-5
    assert max(distances(together.hidden, apart.hidden)) < 1e-5
    torch.testing.assert_close(together.loss, apart.loss, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("family", "settings"), CASES)
def test_it_is_the_published_procedure(family, settings):
    ours, theirs = optimise_values(BlockOutput(stack(family), LAYER), facts(), settings), published(family, settings)
    assert max(distances(ours.hidden, theirs.hidden)) < 1e-5
    assert max(distances(ours.targets, theirs.targets)) < 1e-4
    torch.testing.assert_close(ours.loss.double(), theirs.loss.double(), rtol=1e-3, atol=1e-4)
    moved = torch.tensor(distances(theirs.targets, theirs.hidden))
    assert (theirs.steps > 0).sum() > 2
    assert float(moved[theirs.steps > 0].min()) > 0.05  # else the law says nothing


@pytest.mark.parametrize("contexts", [("{}",), ("{}", "I know. {}")])
def test_it_is_the_published_procedure_with_fewer_contexts(contexts):
    ours = optimise_values(BlockOutput(stack("llama"), LAYER), facts(contexts=contexts), SETTINGS)
    assert max(distances(ours.targets, published("llama", SETTINGS, contexts).targets)) < 1e-4


def test_it_is_the_published_procedure_with_a_token_in_front_of_every_text():
    ours = optimise_values(BlockOutput(stack("llama"), LAYER), facts(bos=True), SETTINGS)
    assert max(distances(ours.targets, published("llama", SETTINGS, bos=True).targets)) < 1e-4


def test_every_term_of_the_objective_matters():
    """A parity test could pass with a term of weight zero; each of these moves z by more than parity allows."""
    start = optimise_values(BlockOutput(stack("gpt2"), LAYER), facts(), SETTINGS).targets
    for name, value in (("kl_factor", 5.0), ("weight_decay", 2.0), ("learning_rate", 0.1), ("clamp", 0.1)):
        other = replace(SETTINGS, **{name: value})
        ours = optimise_values(BlockOutput(stack("gpt2"), LAYER), facts(), other).targets
        assert min(distances(ours, start)) > 1e-3
        assert max(distances(ours, published("gpt2", other).targets)) < 1e-4


@pytest.mark.parametrize("layer", [0, 2, 3])
def test_any_layer_can_be_the_one(layer):
    model = tiny_model("gpt2", seed=SEED).double()
    theirs = [
        plain.find_value(model, tiny_tokenizer(), stack("gpt2").architecture, one, CONTEXTS, layer, SETTINGS).target
        for one in REQUESTS
    ]
    ours = optimise_values(BlockOutput(stack("gpt2"), layer), facts(), SETTINGS).targets
    moves = [one.rows[0].target[0] == one.rows[0].subject_last + 1 for one in facts()]
    for number, distance in enumerate(distances(ours, torch.stack(theirs))):
        # After the last block only a target right behind the subject depends on delta, but for the KL and the decay.
        if layer < 3 or moves[number]:
            assert distance < 1e-4


# --- stop and clamp


def test_it_stops_below_the_limit_and_not_before():
    theirs, ours = published("gpt2", STOPPING), optimise_values(BlockOutput(stack("gpt2"), LAYER), facts(), STOPPING)
    stopped = theirs.steps < STOPPING.steps - 1
    counts = {int(count) for count in theirs.steps[stopped]} - {0}
    assert counts
    assert not bool(stopped.all())
    assert bool((ours.loss[stopped] < STOPPING.stop_loss).all())
    assert bool((ours.loss[~stopped] >= STOPPING.stop_loss).all())
    for count in counts:  # so many steps, and one forward pass less than it took
        shorter = optimise_values(BlockOutput(stack("gpt2"), LAYER), facts(), replace(STOPPING, steps=count))
        assert bool((shorter.loss[theirs.steps == count] >= STOPPING.stop_loss).all())


def test_steps_count_what_each_fact_took():
    ours = optimise_values(BlockOutput(stack("gpt2"), LAYER), facts(), STOPPING)
    assert ours.steps.tolist() == published("gpt2", STOPPING).steps.tolist()


def test_one_step_only_measures():
    ours = optimise_values(BlockOutput(stack("gpt2"), LAYER), facts(), replace(SETTINGS, steps=1))
    assert torch.equal(ours.targets, ours.hidden)
    assert ours.steps.tolist() == [0] * len(REQUESTS)
    first = published("gpt2", replace(SETTINGS, steps=1))
    torch.testing.assert_close(ours.loss.double(), first.loss.double(), rtol=1e-5, atol=1e-6)


def test_a_fact_that_the_model_knows_is_left_alone():
    ours = optimise_values(BlockOutput(stack("gpt2"), LAYER), facts(), replace(SETTINGS, stop_loss=1e9))
    assert torch.equal(ours.targets, ours.hidden)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("clamp", [0.05, 0.15])
def test_the_change_is_clamped_to_a_share_of_the_hidden_state(family, clamp):
    ours = optimise_values(BlockOutput(stack(family), LAYER), facts(), replace(SETTINGS, clamp=clamp))
    sizes = (ours.targets - ours.hidden).norm(dim=1) / ours.hidden.norm(dim=1)
    torch.testing.assert_close(sizes, torch.full_like(sizes, clamp), rtol=1e-4, atol=0)


def test_dropping_finished_facts_does_not_change_the_others():
    finished: list[int] = []
    ours = optimise_values(BlockOutput(stack("llama"), LAYER), facts(), STOPPING, progress=finished.append)
    assert max(distances(ours.targets, published("llama", STOPPING).targets)) < 1e-4
    assert sum(finished) == len(REQUESTS)


@pytest.mark.parametrize("memory", [0, 4 << 30])
def test_the_size_of_a_batch_does_not_matter(memory):
    site = BlockOutput(stack("gpt2"), LAYER)
    whole = optimise_values(site, facts(), SETTINGS).targets
    assert max(distances(optimise_values(site, facts(), SETTINGS, memory=memory).targets, whole)) < 1e-5


def test_a_step_that_does_not_fit_is_halved_until_it_does():
    """Memory that ends in the middle of a batch, at its second step, twice."""
    site = BlockOutput(stack("gpt2"), LAYER)
    same = [
        request("The mother tongue of {} is", name, "English") for name in ("Danielle Darrieux", "Zoë Kravitz Hall")
    ]
    whole = optimise_values(site, facts(same), SETTINGS)
    sizes: list[int] = []

    class Tight(BlockOutput):
        def run(self, rows, change, row, column):  # type: ignore[no-untyped-def]
            sizes.append(len(change))
            if len(change) > len(CONTEXTS) + 1 and len(sizes) > 3:
                raise RuntimeError(
                    "[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"
                )
            return super().run(rows, change, row, column)

    finished: list[int] = []
    ours = optimise_values(Tight(stack("gpt2"), LAYER), facts(same), SETTINGS, progress=finished.append)
    assert max(sizes) > len(CONTEXTS) + 1
    assert max(distances(ours.targets, whole.targets)) < 1e-5
    assert sum(finished) == len(same)


def test_a_single_fact_that_does_not_fit_is_an_error_with_a_remedy():
    class Full(BlockOutput):
        def run(self, rows, change, row, column):  # type: ignore[no-untyped-def]
            raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(EditError, match="not enough memory") as caught:
        optimise_values(Full(stack("gpt2"), LAYER), facts(), SETTINGS)
    assert "--memory" in caught.value.remedy


def test_an_error_that_is_not_of_memory_is_not_hidden():
    class Broken(BlockOutput):
        def run(self, rows, change, row, column):  # type: ignore[no-untyped-def]
            raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        optimise_values(Broken(stack("gpt2"), LAYER), facts(), SETTINGS)


# --- values that are kept


def kept_in(folder: Path, **inputs: str) -> KeptValues:
    return KeptValues(Cache(folder), inputs, 32)


def entries(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.values"))


def test_kept_values_are_not_optimised_again_and_are_the_same_bits(tmp_path):
    site = BlockOutput(stack("gpt2"), LAYER)
    first = optimise_values(site, facts(), SETTINGS, kept=kept_in(tmp_path))

    class Idle(BlockOutput):
        def run(self, rows, change, row, column):  # type: ignore[no-untyped-def]
            raise AssertionError("everything is there")

    finished: list[int] = []
    again = optimise_values(
        Idle(stack("gpt2"), LAYER), facts(), SETTINGS, kept=kept_in(tmp_path), progress=finished.append
    )
    for name in ("targets", "hidden", "loss", "steps"):
        assert torch.equal(getattr(again, name), getattr(first, name))
    assert sum(finished) == len(REQUESTS)
    other = kept_in(tmp_path, state="another")
    assert not other.read()


def test_an_interrupted_optimisation_goes_on_where_it_stopped(tmp_path):
    site, done = BlockOutput(stack("gpt2"), LAYER), 0

    def stop(finished: int) -> None:
        nonlocal done
        done += finished
        if done >= 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimise_values(site, facts(), SETTINGS, memory=0, kept=kept_in(tmp_path), progress=stop)
    kept = kept_in(tmp_path)
    assert len(kept.read()) == 2
    file = entries(tmp_path)[0]
    file.write_bytes(file.read_bytes()[:-5])
    assert len(kept.read()) == 1
    advanced: list[int] = []
    whole = optimise_values(site, facts(), SETTINGS, kept=kept, progress=advanced.append)
    assert advanced[0] == 1
    assert max(distances(whole.targets, optimise_values(site, facts(), SETTINGS).targets)) < 1e-5
    assert len(kept.read()) == len(REQUESTS)


def test_a_damaged_batch_is_made_again(tmp_path):
    site, kept = BlockOutput(stack("gpt2"), LAYER), kept_in(tmp_path)
    first = optimise_values(site, facts(), SETTINGS, memory=0, kept=kept)
    file = entries(tmp_path)[0]
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)
    assert len(kept.read()) == len(REQUESTS) - 1
    again = optimise_values(site, facts(), SETTINGS, kept=kept)
    assert max(distances(again.targets, first.targets)) < 1e-5
    assert len(kept.read()) == len(REQUESTS)


@pytest.mark.parametrize("place", range(len(CONTEXTS) + 1))
def test_the_key_of_a_fact_hashes_every_text(place):
    text = Encoded((1, 2, 3), 1, (2, 3))
    texts = [text] * (len(CONTEXTS) + 1)
    keys = {fact_key(texts)}
    changes = {"input_ids": (1, 2, 4)}, {"subject_last": 0}, {"target": (1, 3)}, {"opening": 1}
    for change in changes:
        keys.add(fact_key([*texts[:place], replace(text, **change), *texts[place + 1 :]]))
    assert len(keys) == 5


def test_the_order_of_the_facts_does_not_matter():
    order = [3, 0, 4, 2, 1]
    straight = optimise_values(BlockOutput(stack("qwen3"), LAYER), facts(), SETTINGS)
    mixed = optimise_values(BlockOutput(stack("qwen3"), LAYER), [facts()[i] for i in order], SETTINGS)
    assert max(distances(mixed.targets, straight.targets[order])) < 1e-5
    assert max(distances(mixed.hidden, straight.hidden[order])) < 1e-5


# --- the two vectors of PMET

TWO = replace(SETTINGS, learning_rate=0.1, nll_factor=0.7)
PLACES = (
    ("The mother tongue of {}", "Danielle Darrieux"),
    ("{}", "Lyon"),
    ("I think that it is near {}", "the Eiffel Tower"),
)
SURE = replace(TWO, steps=25, kl_factor=0.004, nll_factor=1.0, clamp=20.0, until_sure=True)
EASY = {
    family: [request(prompt, subject, target) for (prompt, subject), target in zip(PLACES, targets, strict=True)]
    for family, targets in {"gpt2": ("mo", "ton", "mo"), "llama": ("is", "mother", "i")}.items()
}
"""One token right behind the subject, and one that the random model can be made to say."""


def both_published(
    family: str, requests: Sequence[Request], settings: ValueSettings
) -> tuple[list[plain_pmet.Values], Tensor]:
    model = tiny_model(family, seed=SEED).double()
    places = stack(family).architecture
    found = [
        plain_pmet.find_values(model, tiny_tokenizer(), places, one, CONTEXTS, LAYER, settings) for one in requests
    ]
    return found, torch.stack([values.ffn.target for values in found])


@pytest.mark.parametrize(("family", "clamp"), [*((family, 4.0) for family in FAMILIES), ("gpt2", 0.2)])
def test_two_vectors_are_optimised_as_published(family, clamp):
    settings = replace(TWO, clamp=clamp)
    theirs, targets = both_published(family, REQUESTS, settings)
    ours = optimise_values(Projections(stack(family), LAYER), facts(), settings)
    hidden = torch.stack([values.ffn.hidden for values in theirs])
    assert max(distances(ours.hidden, hidden)) < 1e-5
    assert max(distances(ours.targets, targets)) < 1e-4
    assert min(distances(targets, hidden)) > 0.05
    alone = replace(settings, learning_rate=1e-9)
    assert (
        min(distances(ours.targets, optimise_values(Projections(stack(family), LAYER), facts(), alone).targets)) > 0.05
    )


def test_two_vectors_one_by_one_are_two_vectors_together():
    site = Projections(stack("gptj"), LAYER)
    together = optimise_values(site, facts(), TWO)
    apart = torch.cat([optimise_values(site, facts([one]), TWO).targets for one in REQUESTS])
    assert max(distances(together.targets, apart)) < 1e-5


@pytest.mark.parametrize("kl_factor", [0.0001, 0.02])
@pytest.mark.parametrize("family", EASY)
def test_the_stop_rule_of_pmet_is_the_published_one(family, kl_factor):
    """With a small KL term being sure ends it; with a larger one the likelihood weighs a tenth until the term has fallen."""
    settings = replace(SURE, kl_factor=kl_factor)
    theirs, targets = both_published(family, EASY[family], settings)
    site = Projections(stack(family), LAYER)
    ours = optimise_values(site, facts(EASY[family]), settings)
    assert max(distances(ours.targets, targets)) < 1e-4
    assert min(values.ffn.loss for values in theirs) > SURE.stop_loss  # so only the extra rule can have ended it
    if kl_factor == 0.0001:
        assert max(values.ffn.steps for values in theirs) < SURE.steps - 1
    without = optimise_values(site, facts(EASY[family]), replace(settings, until_sure=False))
    assert max(distances(without.targets, targets)) > 1e-2


# --- what is computed once


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_hidden_states_over_a_frozen_prefix_are_those_of_a_full_forward(family):
    """At every kept position, with and without a change, for rows with and without a prefix in one batch."""
    texts = [fact.rows for fact in facts()]
    rows = [
        Row(text, len(text.input_ids) - text.subject_last, context, fact)
        for fact, contexts in enumerate(texts)
        for context, text in enumerate(contexts)
    ]
    site = BlockOutput(stack(family), LAYER)
    batch = open_rows(site, rows, run_trunk(site.stack, beginnings(site.stack, list(zip(*texts, strict=True)))))
    deltas = torch.randn(len(rows), 32, generator=torch.Generator().manual_seed(0))
    for number, row in enumerate(rows):
        text, columns = row.encoded, torch.arange(row.kept)
        logits = _full_forward(stack(family), text.input_ids, text.subject_last, deltas[number])
        final = site.run(batch, deltas[:, None], torch.full_like(columns, number), columns)
        ours, whole = stack(family).logits(final), logits[text.subject_last :]
        torch.testing.assert_close(ours, whole, rtol=1e-4, atol=1e-4)
        assert float((ours - whole).norm() / whole.norm()) < 1e-5


def _full_forward(stack: Stack, ids: Sequence[int], place: int, delta: Tensor) -> Tensor:
    def add(hidden: Tensor) -> Tensor:
        changed = hidden.clone()
        changed[0, place] += delta
        return changed

    tokens = torch.tensor([list(ids)])
    with plain.output_hook(stack.blocks[LAYER], add):
        return plain.logits(stack.model, tokens, torch.ones_like(tokens))[0]


# --- what is left behind, and failures


def test_the_model_is_left_as_it_was():
    fresh = tiny_stack("llama")
    before = {name: parameter.clone() for name, parameter in fresh.model.named_parameters()}
    with torch.random.fork_rng(devices=[]):
        state = torch.get_rng_state()
        optimise_values(BlockOutput(fresh, LAYER), facts(), SETTINGS)
        assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, before[name]) for name, p in fresh.model.named_parameters())
    assert all(parameter.grad is None for parameter in fresh.model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in fresh.model.modules())


def test_the_same_call_gives_the_same_bits():
    first, second = (optimise_values(BlockOutput(stack("phi"), LAYER), facts(), SETTINGS) for _ in range(2))
    assert torch.equal(first.targets, second.targets)


def test_no_facts_give_no_values():
    nothing = optimise_values(BlockOutput(stack("gpt2"), LAYER), [], SETTINGS)
    assert nothing.targets.shape == (0, 32)


@pytest.mark.parametrize("layer", [0, 3])
def test_weights_that_are_not_numbers_are_an_error(layer):
    fresh = tiny_stack("gpt2")
    fresh.model.transformer.h[layer].mlp.c_proj.weight.data[3, 5] = float("nan")
    with pytest.raises(EditError) as caught:
        optimise_values(BlockOutput(fresh, LAYER), facts(), SETTINGS)
    assert caught.value.remedy


def test_half_precision_follows_the_single_one():
    single = optimise_values(BlockOutput(stack("llama"), LAYER), facts(), CLAMPED)
    model = tiny_model("llama", seed=SEED, dtype=torch.bfloat16)
    half = optimise_values(BlockOutput(Stack(model, stack("llama").architecture), LAYER), facts(), CLAMPED)
    assert half.targets.dtype == torch.float32
    assert max(distances(half.hidden, single.hidden)) < 0.05
    assert max(distances(half.targets, single.targets)) < 0.15


class _Waits(TorchFunctionMode):
    """Counts the calls at which the host would wait for a device: numbers read back, and sizes that numbers decide."""

    READ = (Tensor.cpu, Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.__bool__, Tensor.__int__, Tensor.__float__)
    SIZED = (Tensor.nonzero, torch.nonzero, Tensor.masked_select, Tensor.unique)

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        found = func(*args, **(kwargs or {}))
        self.count += func in self.READ or func in self.SIZED
        if func is Tensor.__getitem__:
            places = args[1] if isinstance(args[1], tuple) else (args[1],)
            self.count += any(isinstance(place, Tensor) and place.dtype == torch.bool for place in places)
        return found


@pytest.mark.parametrize("until_sure", [False, True])
def test_a_step_waits_for_the_device_once(until_sure: bool) -> None:
    site, counts = BlockOutput(stack("llama"), LAYER), []
    for steps in (3, 8):
        settings = replace(SETTINGS, steps=steps, stop_loss=0.0, until_sure=until_sure, kl_factor=1e3)
        with _Waits() as waits:
            values = optimise_values(site, facts(), settings)
        assert values.steps.tolist() == [steps - 1] * len(values.steps)
        counts.append(waits.count)
    assert counts[1] - counts[0] == 5


@pytest.mark.parametrize("until_sure", [False, True])
def test_steps_in_two_rounds_are_steps_in_one(until_sure: bool) -> None:
    """So what does not read right yet is gone on from; one fact was done before the others."""
    site = (Projections if until_sure else BlockOutput)(stack("llama"), LAYER)
    eight = replace(SETTINGS, steps=8, stop_loss=0.0, until_sure=until_sure)
    three = replace(
        eight, steps=3, stop_loss=float(optimise_values(site, facts(), replace(eight, steps=2)).loss.max()) - 1e-3
    )
    first = optimise_values(site, facts(), three, begun={})
    assert set(first.paused) == set(range(len(facts())))
    assert min(first.steps.tolist()) < 2
    again = optimise_values(site, facts(), eight, begun=first.paused)
    once = optimise_values(site, facts(), eight)
    assert not once.paused
    assert again.steps.tolist() == once.steps.tolist()
    assert max(distances(again.targets, once.targets)) < 1e-5
    part = optimise_values(site, facts()[:2], eight, begun={1: first.paused[1]})
    assert max(distances(part.targets, once.targets[:2])) < 1e-5, "some are begun, others are gone on from"


def test_a_large_model_is_optimised_in_bfloat16_from_its_own_hidden_states(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = optimise_values(BlockOutput(stack("llama"), LAYER), facts(), CLAMPED)
    monkeypatch.setattr(placement, "_LARGE", 0)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    assert placement.optimised_in(stack("llama").model, None) == torch.bfloat16
    assert placement.optimised_in(stack("llama").model, 1 << 30) == torch.float32
    quick = optimise_values(BlockOutput(stack("llama"), LAYER), facts(), CLAMPED)
    assert torch.equal(quick.hidden, alone.hidden)
    assert 0 < max(distances(quick.targets, alone.targets)) < 0.15
    assert stack("llama").model.dtype == torch.float32


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_with_some_contexts_in_turn_a_step_is_that_of_a_fact_with_these_contexts(family: str) -> None:
    """One step from nothing: its direction is the gradient's sign, so each turn's is that of the fact with fewer contexts, weighed anew."""
    site, every = (
        BlockOutput(stack(family), LAYER),
        [fact for fact in facts() if len(fact.rows) == len(facts()[0].rows)],
    )
    contexts = len(every[0].rows)
    assert contexts > 2
    once = replace(SETTINGS, steps=1, stop_loss=0.0)
    whole = optimise_values(site, every, once)
    means = []
    for chosen in range(1, contexts):
        few = [replace(fact, rows=(fact.rows[0], fact.rows[chosen])) for fact in every]
        one = [replace(fact, rows=(fact.rows[0],)) for fact in every]
        pair, bare = optimise_values(site, few, once).loss, optimise_values(site, one, once).loss
        means.append(((2 * pair - bare) * (contexts - 1) + bare) / contexts)
    torch.testing.assert_close(optimise_values(site, every, replace(once, alternate=1)).loss, means[0])
    torch.testing.assert_close(torch.stack(means).mean(0), whole.loss)
    assert torch.equal(optimise_values(site, every, replace(once, alternate=contexts - 1)).loss, whole.loss)


def test_each_context_has_its_turn() -> None:
    alone = optimise_values(BlockOutput(stack("llama"), LAYER), facts(), replace(CLAMPED, alternate=1))
    again = optimise_values(BlockOutput(stack("llama"), LAYER), facts(), replace(CLAMPED, alternate=1))
    assert torch.equal(alone.targets, again.targets)
    first = optimise_values(
        BlockOutput(stack("llama"), LAYER), facts(), replace(CLAMPED, alternate=1, steps=2), begun={}
    )
    gone_on = optimise_values(
        BlockOutput(stack("llama"), LAYER), facts(), replace(CLAMPED, alternate=1), begun=first.paused
    )
    assert max(distances(gone_on.targets, alone.targets)) < 1e-5
