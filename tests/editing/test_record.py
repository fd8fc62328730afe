"""Recording: one fresh batch is the published sweep, and batches on top of one another are their joint solution."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from patchhub.cache import Cache
from patchhub.constraints import Columns, join, no_columns, proof, solve
from patchhub.delta import Delta, Dense, LowRank, from_factors, to_dense
from patchhub.editing import record as under_test
from patchhub.editing.editor import EDITORS, EQUAL_SHARES, ROOT_SHARES
from patchhub.editing.locate import encode_prompts
from patchhub.editing.metric import MetricCache, regularised
from patchhub.editing.record import Edit, Recording, Running, Spread, State, record, side_paths
from patchhub.editing.rows import KeyRow, key_rows
from patchhub.editing.settings import EditSettings
from patchhub.errors import SettingsError
from patchhub.models.architectures import Architecture
from patchhub.models.tracing import Stack
from patchhub.objects import Request
from tests.reference import plain, plain_pmet
from tests.tiny_models import FAMILIES, tiny_model, tiny_stack, tiny_tokenizer

LAYERS = (0, 1, 2)
RIDGE = 5.0
CONTEXTS = ("{}", "The tower looked. {}", "Therefore. {}", "Because I think that you know. {}")
SETTINGS = EditSettings(
    LAYERS, RIDGE, steps=4, learning_rate=0.2, weight_decay=0.02, kl_factor=0.0625, clamp=4.0, stop_loss=0.0
)
edit = EDITORS["memit"].edit
EMPTY = State({}, {})


def request(prompt: str, subject: str, target: str) -> Request:
    return Request.make(prompt=prompt, subject=subject, target_new=target)


A = (
    request("The mother tongue of {} is", "Danielle Darrieux", "English"),
    request("{} is a twin city of", "Lyon", "Manila"),
    request("{} plays", "I", "the piano"),
)
B = (
    request("Where is it? I think that it is near {}", "the Eiffel Tower", "Rome"),
    request("{} is located in the state of", "The Space Needle", "Utah"),
)


def moments(inner: int) -> dict[int, Tensor]:
    """A well-conditioned second moment per layer."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for layer in LAYERS:
        draws = torch.randn(4 * inner, inner, generator=generator, dtype=torch.float64)
        found[layer] = draws.T @ draws / len(draws)
    return found


@pytest.fixture
def rounding() -> None:
    """Asked for by tests of columns as they are stored."""


@pytest.fixture(autouse=True)
def unrounded(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compared with the papers' formulas, or between two ways of computing it, is recorded in float32."""
    if "rounding" not in request.fixturenames:
        monkeypatch.setattr(under_test, "rounded", lambda array: np.ascontiguousarray(array, np.float32))


@pytest.fixture
def metric(tmp_path: Path) -> MetricCache:
    """Factors of `moments` for every weight name that the tests' models have."""
    cache = MetricCache(Cache(tmp_path / "metric"), "0" * 64)
    for family in FAMILIES:
        architecture = tiny_stack(family).architecture
        for layer, moment in moments(architecture.shapes[0][1]).items():
            cache.store(architecture.ffn_weight(layer), moment)
    return cache


def relative(a: np.ndarray | Tensor, b: np.ndarray | Tensor) -> float:
    x, y = (np.asarray(m, dtype=np.float64) for m in (a, b))
    return float(np.linalg.norm(x - y) / np.linalg.norm(y))


def rows_of(requests: Sequence[Request], contexts: Sequence[str] = CONTEXTS) -> list[KeyRow]:
    return key_rows([encode_prompts(tiny_tokenizer(), [(c, one) for c in contexts]) for one in requests])


def wanted(n: int, seed: int = 0) -> Tensor:
    """Any targets will do for the sweep."""
    return 5 * torch.randn(n, 32, generator=torch.Generator().manual_seed(seed))


def change_of(stack: Stack, recording: Recording) -> dict[int, list[Delta]]:
    """The change by layer, rounded as a commit stores it."""
    changes = {stack.architecture.layer_of(name): delta for name, delta in recording.change.items()}
    return {layer: [from_factors(delta.B, delta.A)] for layer, delta in changes.items()}


def states(stack: Stack, recordings: Sequence[Recording]) -> State:
    names = [stack.architecture.ffn_weight(layer) for layer in LAYERS]
    return State(
        {name: join([recording.columns[name] for recording in recordings]) for name in names},
        {name: [change_of(stack, r)[stack.architecture.layer_of(name)][0] for r in recordings] for name in names},
    )


# --- the published sweep


def measured_by(spread: Spread, model: Any, places: Architecture) -> nn.Module:
    return {"block": plain.block, "projection": plain.projection}[spread.measured](model, places, LAYERS[-1])


@pytest.mark.parametrize("spread", [EQUAL_SHARES, ROOT_SHARES], ids=["memit", "pmet"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_batch_is_the_published_sweep(family, spread, metric):
    stack, targets = tiny_stack(family), wanted(len(A))
    ours = record(stack, LAYERS, rows_of(A), targets, RIDGE, metric, EMPTY, spread)
    model, places = tiny_model(family).double(), stack.architecture
    theirs = plain.spread(
        model,
        tiny_tokenizer(),
        places,
        A,
        CONTEXTS,
        LAYERS,
        targets,
        RIDGE,
        moments(places.shapes[0][1]),
        measured=measured_by(spread, model, places),
        divisor=spread.divisor,
    )
    assert list(ours.columns) == list(ours.change) == [places.ffn_weight(layer) for layer in LAYERS]
    for layer in LAYERS:
        name = places.ffn_weight(layer)
        columns = ours.columns[name]
        assert columns.shape == places.shapes[layer]
        assert relative(columns.keys, theirs.keys[layer]) < 1e-4
        assert relative(columns.residuals, theirs.shares[layer]) < 1e-4
        assert relative(to_dense(ours.change[name]), theirs.changes[layer]) < 1e-4
        preimages = np.linalg.solve(moments(places.shapes[0][1])[layer].numpy(), theirs.keys[layer].numpy().T).T
        assert relative(columns.preimages, preimages) < 1e-4
        assert columns.ridge.tolist() == [RIDGE] * len(A)
        assert {a.dtype for a in (columns.keys, columns.preimages, columns.residuals, columns.ridge)} == {
            np.dtype("f4")
        }


def test_the_shares_are_the_published_ones():
    assert [EQUAL_SHARES.divisor(left) for left in (3, 2, 1)] == [3, 2, 1]
    assert [ROOT_SHARES.divisor(left) for left in (4, 1)] == [2, 1]
    assert (EQUAL_SHARES.measured, ROOT_SHARES.measured) == ("block", "projection")


@pytest.mark.parametrize("method", ["memit", "pmet"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_whole_edit_is_the_published_one(family, method, metric):
    stack = tiny_stack(family, seed=4)
    ours = EDITORS[method].edit(stack, tiny_tokenizer(), A, CONTEXTS, SETTINGS, metric, EMPTY)
    model, places = tiny_model(family, seed=4).double(), stack.architecture
    common = (model, tiny_tokenizer(), places, A, CONTEXTS, LAYERS, SETTINGS, RIDGE, moments(places.shapes[0][1]))
    if method == "memit":
        values, written = plain.memit(*common)
        targets = [value.target for value in values]
    else:
        pairs, written = plain_pmet.pmet(*common)
        targets = [value.ffn.target for value in pairs]
    assert relative(ours.values.targets, torch.stack(targets)) < 1e-4
    for layer in LAYERS:
        assert relative(to_dense(ours.recording.change[places.ffn_weight(layer)]), written.changes[layer]) < 5e-4


@pytest.mark.parametrize("layers", [(1,), (0, 2)])
def test_one_layer_and_layers_with_gaps(layers, metric):
    stack, targets = tiny_stack("llama"), wanted(len(B))
    ours = record(stack, layers, rows_of(B), targets, RIDGE, metric, EMPTY, EQUAL_SHARES)
    model, places = tiny_model("llama").double(), stack.architecture
    theirs = plain.spread(
        model,
        tiny_tokenizer(),
        places,
        B,
        CONTEXTS,
        layers,
        targets,
        RIDGE,
        moments(places.shapes[0][1]),
        measured=plain.block(model, places, layers[-1]),
        divisor=float,
    )
    for layer in layers:
        assert relative(to_dense(ours.change[places.ffn_weight(layer)]), theirs.changes[layer]) < 1e-4


def test_a_small_ridge_reaches_the_targets(metric):
    """The end of the sweep: with the changes in place, the bare prompts give z at the last layer."""
    stack, targets = tiny_stack("gpt2"), wanted(len(A))
    ours = record(stack, LAYERS, rows_of(A, ("{}",)), targets, 1e-4, metric, EMPTY, EQUAL_SHARES)
    last = stack.blocks[LAYERS[-1]]
    before = [plain.present_output(stack.model, tiny_tokenizer(), one, last) for one in A]
    with side_paths(stack, change_of(stack, ours)):
        after = [plain.present_output(stack.model, tiny_tokenizer(), one, last) for one in A]
    assert min(relative(hidden, target) for hidden, target in zip(before, targets, strict=True)) > 0.5
    assert max(relative(hidden, target) for hidden, target in zip(after, targets, strict=True)) < 1e-2


def test_keys_are_weighted_half_for_the_bare_prompt():
    rows = rows_of(A[:1])
    assert [row.weight for row in rows] == [0.5, *[pytest.approx(1 / 6)] * 3]
    assert [row.context for row in rows] == [0, 1, 2, 3]
    assert [row.weight for row in rows_of(A, ("{}",))] == [1.0] * len(A)
    tokenizer = tiny_tokenizer()
    assert tokenizer.decode(list(rows[0].tokens)) == "The mother tongue of Danielle Darrieux"


@pytest.mark.parametrize("positions", [1, 24])
def test_batches_of_rows_and_their_order_do_not_matter(monkeypatch, metric, positions):
    stack, targets = tiny_stack("gptj"), wanted(len(A))
    whole = record(stack, LAYERS, rows_of(A), targets, RIDGE, metric, EMPTY, EQUAL_SHARES)
    monkeypatch.setattr(under_test, "POSITIONS", positions)
    monkeypatch.setattr(under_test, "_LEAST_POSITIONS", positions)
    parts = record(stack, LAYERS, rows_of(A)[::-1], targets, RIDGE, metric, EMPTY, EQUAL_SHARES)
    for name, columns in whole.columns.items():
        assert relative(parts.columns[name].keys, columns.keys) < 1e-5
        assert relative(parts.columns[name].residuals, columns.residuals) < 1e-5


# --- on top of what is there


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_batches_recorded_on_top_of_one_another_are_their_joint_solution(family, metric):
    stack = tiny_stack(family)
    recordings: list[Recording] = []
    for number, batch in enumerate((A, B, A[:1])):
        with ExitStack() as open_paths:
            if recordings:
                state = states(stack, recordings)
                present = {layer: [d for r in recordings for d in change_of(stack, r)[layer]] for layer in LAYERS}
                open_paths.enter_context(side_paths(stack, present))
            else:
                state = EMPTY
            recordings.append(
                record(stack, LAYERS, rows_of(batch), wanted(len(batch), number), RIDGE, metric, state, EQUAL_SHARES)
            )
    total = states(stack, recordings)
    for name, columns in total.columns.items():
        summed = sum(to_dense(delta) for delta in total.deltas[name])
        assert relative(summed, to_dense(solve(columns))) < 1e-6
        assert proof(total.deltas[name], columns) < 1e-5
        alone = to_dense(solve(recordings[1].columns[name]))
        assert relative(to_dense(recordings[1].change[name]), alone) > 1e-3  # the history matters


def test_a_residual_is_asked_of_the_base_and_not_of_the_present_weight(metric):
    """r = v - W0 k: on top of a state, D k of that state is part of what the column asks."""
    stack, rng = tiny_stack("llama"), np.random.default_rng(0)
    layer, name = 1, stack.architecture.ffn_weight(1)
    delta = LowRank(rng.standard_normal((32, 2)).astype(np.float32), rng.standard_normal((2, 80)).astype(np.float32))
    nothing = no_columns((32, 80))
    with side_paths(stack, {layer: [delta]}):
        blind = record(stack, [layer], rows_of(B), wanted(2), RIDGE, metric, EMPTY, EQUAL_SHARES).columns[name]
        knowing = record(
            stack, [layer], rows_of(B), wanted(2), RIDGE, metric, State({name: nothing}, {name: [delta]}), EQUAL_SHARES
        )
    np.testing.assert_array_equal(knowing.columns[name].keys, blind.keys)
    expected = blind.residuals + blind.keys @ to_dense(delta).T
    assert relative(knowing.columns[name].residuals, expected) < 1e-6


# --- rounded columns


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_what_is_recorded_is_float16_and_its_change_is_the_exact_solution_of_that(family, metric, rounding):
    stack, targets = tiny_stack(family), wanted(len(A))
    found = record(stack, LAYERS, rows_of(A), targets, RIDGE, metric, EMPTY, EQUAL_SHARES)
    for name, columns in found.columns.items():
        for array in (columns.keys, columns.preimages, columns.residuals):
            np.testing.assert_array_equal(array, array.astype(np.float16))
        again = metric.preimages(name, torch.from_numpy(columns.keys)).numpy()
        assert relative(columns.preimages, again) < 2**-11, "the preimage is that of the rounded key"
        assert relative(to_dense(found.change[name]), to_dense(solve(columns))) < 1e-12


def test_rounding_moves_a_change_by_little_and_what_facts_get_of_it_by_less(metric, rounding, monkeypatch):
    stack, targets = tiny_stack("llama"), wanted(len(A))
    half = record(stack, LAYERS[:1], rows_of(A), targets, RIDGE, metric, EMPTY, EQUAL_SHARES)
    monkeypatch.setattr(under_test, "rounded", lambda array: np.ascontiguousarray(array, np.float32))
    single = record(stack, LAYERS[:1], rows_of(A), targets, RIDGE, metric, EMPTY, EQUAL_SHARES)
    for name, columns in single.columns.items():
        exact, near = (to_dense(found.change[name]) for found in (single, half))
        assert 0 < relative(near, exact) < 2e-3
        assert relative(columns.keys @ near.T, columns.keys @ exact.T) < 5e-4


# --- side paths


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_side_paths_are_the_weights_changed(family):
    rng = np.random.default_rng(1)
    stack, model = tiny_stack(family), tiny_model(family)
    out, inner = stack.architecture.shapes[0]
    low = LowRank(rng.standard_normal((out, 3)) * 0.2, rng.standard_normal((3, inner)) * 0.2)
    dense = Dense((rng.standard_normal((out, inner)) * 0.1).astype(np.float32))
    parts: dict[int, list[Delta]] = {0: [low], 2: [low, dense], 3: []}
    for layer, deltas in parts.items():
        projection = plain.projection(model, stack.architecture, layer)
        for delta in deltas:
            matrix = torch.from_numpy(to_dense(delta)).float()
            projection.weight += matrix if isinstance(projection, nn.Linear) else matrix.T
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    before = stack.model(input_ids=ids).logits
    with side_paths(stack, parts):
        torch.testing.assert_close(stack.model(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(stack.model(input_ids=ids).logits, before)


# --- what is left behind, and settings


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("after", [0, 1, 3, None])
def test_the_model_is_untouched_also_after_an_interruption(metric, after):
    stack = tiny_stack("gpt2")
    before = {name: parameter.clone() for name, parameter in stack.model.named_parameters()}
    random = torch.get_rng_state()
    calls = 0

    def progress(stage: str, done: int) -> None:
        nonlocal calls
        calls += 1
        if after is not None and calls > after:
            raise Interrupted

    finished: Edit | None = None
    with suppress(Interrupted):
        finished = edit(
            stack, tiny_tokenizer(), A, CONTEXTS, SETTINGS, metric, EMPTY, running=Running(progress=progress)
        )
    assert (finished is None) == (after is not None)
    assert all(torch.equal(p, before[name]) for name, p in stack.model.named_parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in stack.model.modules())
    assert torch.equal(torch.get_rng_state(), random)


def test_progress_reports_every_request_and_layer(metric):
    stages: dict[str, int] = {}

    def progress(stage: str, done: int) -> None:
        stages[stage] = stages.get(stage, 0) + done

    edit(
        tiny_stack("gpt2"),
        tiny_tokenizer(),
        A + B,
        CONTEXTS,
        SETTINGS,
        metric,
        EMPTY,
        running=Running(progress=progress),
    )
    assert stages == {"values": 5, "layers": 3}


def test_the_same_edit_gives_the_same_bits(metric):
    first, second = (
        edit(tiny_stack("phi"), tiny_tokenizer(), A, CONTEXTS, SETTINGS, metric, EMPTY).recording for _ in range(2)
    )
    for name, columns in first.columns.items():
        for field in ("keys", "preimages", "residuals", "ridge"):
            np.testing.assert_array_equal(getattr(columns, field), getattr(second.columns[name], field))


@pytest.mark.parametrize(
    "wrong",
    [
        {"layers": ()},
        {"layers": (2, 1)},
        {"layers": (1, 1)},
        {"layers": (-1, 0)},
        {"ridge": 0.0},
        {"ridge": float("nan")},
        {"steps": 0},
        {"learning_rate": -1.0},
        {"clamp": 0.0},
        {"nll_factor": 0.0},
    ],
)
def test_settings_that_mean_nothing_are_refused(wrong):
    with pytest.raises(SettingsError) as caught:
        EditSettings(**{**vars(SETTINGS), **wrong})
    assert caught.value.remedy


@pytest.mark.parametrize("method", EDITORS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_default_rule_gives_layers_that_exist(family, method):
    architecture = tiny_stack(family).architecture
    settings = EDITORS[method].default_settings(architecture)
    assert settings.layers[-1] < architecture.n_layers - 1
    assert settings.to_json()["layers"] == list(settings.layers)
    assert settings.ridge > 0


def test_second_moments_of_the_text_make_a_metric(tmp_path: Path):
    """The fixture's moments are drawn; the real ones give the published sweep as well."""
    from patchhub.editing.metric import second_moments

    stack, targets = tiny_stack("gpt2"), wanted(len(A))
    documents = [list(range(start, start + 40)) for start in range(1, 240, 7)]
    found = {layer: regularised(m, 0.1) for layer, m in second_moments(stack, LAYERS, documents).items()}
    cache = MetricCache(Cache(tmp_path), "0" * 64)
    for layer, moment in found.items():
        cache.store(stack.architecture.ffn_weight(layer), moment)
    ours = record(stack, LAYERS, rows_of(A), targets, RIDGE, cache, EMPTY, EQUAL_SHARES)
    model, places = tiny_model("gpt2").double(), stack.architecture
    theirs = plain.spread(
        model,
        tiny_tokenizer(),
        places,
        A,
        CONTEXTS,
        LAYERS,
        targets,
        RIDGE,
        found,
        measured=plain.block(model, places, LAYERS[-1]),
        divisor=float,
    )
    for layer in LAYERS:
        assert relative(to_dense(ours.change[places.ffn_weight(layer)]), theirs.changes[layer]) < 1e-3


def test_columns_of_the_recording_fit_their_requests(metric):
    """Row i belongs to request i, whatever order lengths put the rows in."""
    stack = tiny_stack("gpt2")
    together = record(stack, [0], rows_of(A + B), wanted(5), RIDGE, metric, EMPTY, EQUAL_SHARES)
    name = stack.architecture.ffn_weight(0)
    for number, one in enumerate(A + B):
        alone: Columns = record(
            stack, [0], rows_of([one]), wanted(5)[number : number + 1], RIDGE, metric, EMPTY, EQUAL_SHARES
        ).columns[name]
        assert relative(together.columns[name].keys[number], alone.keys[0]) < 1e-5
        assert relative(together.columns[name].residuals[number], alone.residuals[0]) < 1e-5
