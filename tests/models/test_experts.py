"""Experts as one stacked weight: keys, second moments, columns, checkpoints, and a whole history on random mixtures."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.numpy import load
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import patchhub
from patchhub.constraints import Columns, solve
from patchhub.delta import LowRank, section, to_dense
from patchhub.editing.locate import Encoded
from patchhub.editing.metric import drawn_to_mean, second_moments
from patchhub.editing.rows import Projections
from patchhub.editing.values import Fact, ValueSettings, optimise_values
from patchhub.errors import RepositoryError, SettingsError, UnsupportedModelError
from patchhub.models.architectures import additive_probe, describe
from patchhub.models.checkpoint import open_checkpoint
from patchhub.models.experts import Groups, Routed, check_experts, grouped_forwards, shape_of, watch_routes
from patchhub.models.tracing import Stack, add_beside, fast, right_padded
from patchhub.repository import Repository
from patchhub.runtime import routing
from patchhub.sets.columns import read_columns, read_state, write_columns
from patchhub.store.store import Store
from tests.models.tiny_configs import SUPPORTED, make_config, random_model, tiny_config
from tests.tiny_models import BOS, EOS, VOCABULARY, tiny_tokenizer

MIXTURES = ("mixtral", "qwen3_moe", "gpt_oss", "granitemoe", "deepseek_v3", "qwen2_moe", "llama4_text", "dbrx")
PLACES = {"vocab_size": VOCABULARY, "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": EOS}
PLACES |= {"max_position_embeddings": 96}


def stack_of(family: str) -> Stack:
    model = random_model(tiny_config(family)).eval()
    return Stack(model, describe(model.config))


@pytest.mark.parametrize("family", MIXTURES)
def test_gated_keys_and_the_stacked_weight_give_what_the_experts_give(family: str) -> None:
    stack, layer = stack_of(family), 1
    projection, module = stack.architecture.feed_forward[layer], stack.ffn_out[layer]
    assert projection.experts == 4
    assert projection.active == 2
    ids = torch.arange(1, 9).view(2, 4)
    with torch.no_grad(), stack.watch_keys([layer]) as keys, stack.watch_values([layer]) as values:
        stack.model(input_ids=ids, use_cache=False)
    seen = keys[layer]
    assert isinstance(seen, Routed)
    known = shape_of(module)
    assert known is not None
    weight = dict(module.named_parameters())[known.parameter].detach()
    weight = weight.mT if projection.orientation == "in_out" else weight
    stacked = weight if projection.flat else torch.cat(list(weight), dim=1)
    assert stacked.shape == projection.shape
    bias = dict(module.named_parameters()).get("down_proj_bias")
    dense = seen[torch.arange(2)[:, None], torch.arange(4)]
    assert int((dense.view(2, 4, 4, -1) != 0).any(-1).sum()) == 2 * 4 * 2
    expected = dense @ stacked.T
    torch.testing.assert_close(seen.times(stacked), expected)
    assert expected.any()
    if bias is None or not bias.any():
        torch.testing.assert_close(values[layer], expected)


@pytest.mark.parametrize("family", MIXTURES)
def test_what_experts_give_by_groups_is_what_they_give(family: str) -> None:
    """The same logits and the same gradient of the states, for few and for many tokens of an expert."""
    model = random_model(tiny_config(family)).eval().requires_grad_(False)
    assert list(grouped_forwards(model))
    for tokens in (1, 60):
        states = torch.randn(3, tokens, 32, generator=torch.Generator().manual_seed(tokens), requires_grad=True)
        found = []
        for how in (nullcontext(), fast(model)):
            with how:
                logits = model(inputs_embeds=states, use_cache=False).logits
                found.append((logits, *torch.autograd.grad(logits.square().sum(), states)))
        torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-3, atol=1e-5 * float(found[0][1].abs().max()))


def test_products_by_groups_are_those_of_each_pair_and_zero_where_a_slot_is_of_no_expert() -> None:
    draw = torch.Generator().manual_seed(0)
    experts = torch.randint(0, 6, (90, 2), generator=draw)  # 5: none
    states, weights = torch.randn(180, 3, generator=draw), torch.randn(5, 4, 3, generator=draw)
    groups = Groups.of(experts, 5)
    torch.testing.assert_close(groups.back(groups.sorted(states)), states, rtol=0, atol=0)
    padded = torch.cat([weights, torch.zeros(1, 4, 3)])[experts.flatten()]
    expected = (padded @ states[:, :, None])[..., 0]
    torch.testing.assert_close(groups.back(groups.product(groups.sorted(states), weights)), expected)


class LouderExperts(Qwen3MoeExperts):
    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        found: Tensor = super().forward(hidden_states, top_k_index, top_k_weights)
        return 0.9 * found


def test_experts_that_compute_something_else_are_refused_by_name() -> None:
    model = random_model(tiny_config("qwen3_moe"))
    architecture = describe(model.config)
    experts = model.model.layers[1].mlp.experts
    assert check_experts(experts)
    low_rank = LowRank(np.ones((32, 1), np.float32), np.ones((1, 96), np.float32))
    handle = add_beside(experts, [low_rank])  # as an earlier commit's change
    assert check_experts(experts)
    handle.remove()
    model.requires_grad_(False)
    assert len(list(grouped_forwards(model))) == 3
    experts.__class__ = LouderExperts
    assert len(list(grouped_forwards(model))) == 2
    assert not check_experts(experts)
    with pytest.raises(UnsupportedModelError, match="LouderExperts"):
        additive_probe(model, architecture, 1)


def test_of_other_modules_there_is_no_shape() -> None:
    assert shape_of(torch.nn.Linear(3, 4)) is None
    experts = random_model(tiny_config("llama4_text")).model.layers[0].feed_forward.experts
    assert shape_of(experts) is not None
    experts.down_proj = torch.nn.Parameter(torch.ones(4, 7, 32))
    assert shape_of(experts) is None


@pytest.mark.parametrize("step", [1, 2])
def test_experts_that_are_given_gated_states_of_all_tokens(step: int) -> None:
    """Llama 4: the gate enters the expert and the caller sums. Each token has the experts that its router chose; a vector added behind
    the sum moves the block's output by itself, and so does a change beside the weights. Dense blocks in between are plain."""
    model = random_model(tiny_config("llama4_text", interleave_moe_layer_step=step)).eval()
    stack, ids = Stack(model, describe(model.config)), torch.arange(1, 9).view(2, 4)
    assert [p.experts for p in stack.architecture.feed_forward] == [4 if n % step == step - 1 else 0 for n in range(3)]
    for layer in range(3):
        additive_probe(model, stack.architecture, layer)
    chosen: list[Tensor] = []
    router = model.model.layers[1].feed_forward.router
    router.register_forward_hook(lambda module, args, output: chosen.append(output[0] > 0))
    change = LowRank(np.full((32, 1), 0.5, np.float32), np.full((1, 4 * 80), 0.01, np.float32))
    with torch.no_grad(), stack.watch_keys([1]) as keys, stack.watch_values([1]) as values:
        with watch_routes(model) as routes:
            model(ids)
        before, own = values[1], keys[1]
    add_beside(stack.ffn_out[1], [change])
    with torch.no_grad(), stack.watch_values([1]) as values:
        model(ids)
    dense = own[torch.arange(2)[:, None], torch.arange(4)].view(8, 4, -1)
    assert torch.equal((dense != 0).any(-1), chosen[0])
    found = torch.zeros(8, 4, dtype=torch.bool).scatter(1, routes[1 if step == 1 else 0], True)
    assert torch.equal(found, chosen[0])
    torch.testing.assert_close(
        values[1] - before, own.times(torch.from_numpy(to_dense(change)).float()), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize(
    ("family", "site"),
    [("deepseek_v3", "routed"), ("deepseek_v3", "shared"), ("glm4_moe", "shared"), ("qwen2_moe", "shared")],
)
def test_the_site_says_which_experts_are_edited(family: str, site: Any) -> None:
    model = random_model(tiny_config(family)).eval()
    found = describe(model.config, site)
    assert found.site == site
    if family != "qwen2_moe":
        assert found.feed_forward[0].path == "mlp.down_proj"  # the first layer is dense
    assert bool(found.feed_forward[1].experts) == (site == "routed")
    assert describe(model.config, "shared" if site == "routed" else "routed").feed_forward[1] == found.beside[1]
    additive_probe(model, found, 1)
    Stack(model, found)


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_next", "qwen3_5_moe_text"])
def test_a_shared_experts_gate_multiplies_its_key(family: str) -> None:
    """What the model says is the same, and W (g k) is what the shared expert put into the stream; a second stack changes nothing more."""
    config = tiny_config(family)
    plain, model = random_model(config).eval(), random_model(config).eval()
    ids, seen = torch.arange(1, 9).view(2, 4), list[Tensor]()
    expert, gate = (
        plain.get_submodule(f"model.layers.1.mlp.{name}") for name in ("shared_expert", "shared_expert_gate")
    )
    expert.register_forward_hook(lambda module, args, output: seen.append(output))
    gate.register_forward_hook(lambda module, args, output: seen.append(output.sigmoid()))
    for _ in range(2):
        stack = Stack(model, describe(config, "shared"))
        with torch.no_grad(), stack.watch_keys([1]) as keys, stack.watch_values([1]) as values:
            torch.testing.assert_close(model(ids).logits, plain(ids).logits)
        torch.testing.assert_close(values[1].flatten(0, 1), (seen[-1] * seen[-2]).view(8, -1))
        weight = stack.ffn_out[1].get_parameter("weight")
        torch.testing.assert_close(keys[1] @ weight.T, values[1])
    assert model.state_dict().keys() == plain.state_dict().keys()


def test_a_gate_that_is_something_else_is_refused() -> None:
    model = random_model(tiny_config("qwen2_moe")).eval()
    for parameter in model.parameters():
        parameter.data.mul_(20)
    model.model.layers[1].mlp.shared_expert_gate.register_forward_hook(lambda module, args, output: output + 5)
    with pytest.raises(UnsupportedModelError, match="behind gates"):
        additive_probe(model, describe(model.config, "shared"), 1)


@pytest.mark.parametrize(("family", "site"), [("mixtral", "shared"), ("granitemoe", "shared")])
def test_a_site_that_is_not_there_is_refused(family: str, site: Any) -> None:
    with pytest.raises(SettingsError, match=f"no {site} experts"):
        describe(tiny_config(family), site)


def test_a_value_in_a_mixture_may_be_much_longer_than_what_its_experts_give() -> None:
    """PMET's clamp and decay are relative to the stream: at some tokens experts give next to nothing."""
    stack, layer = stack_of("mixtral"), 1
    for name, parameter in stack.model.named_parameters():
        if name.endswith("experts.down_proj"):
            parameter.data.mul_(1e-3)
    site = Projections(stack, layer)
    fact = Fact((Encoded((3, 7, 20, 9, 11), 2, (4, 5)),), Encoded((20, 9), 0, (2, 2)))
    settings = ValueSettings(steps=6, learning_rate=0.1, weight_decay=0.0, kl_factor=0.0, clamp=2.0, stop_loss=0.0)
    found = optimise_values(site, [fact], settings)
    moved, output = float((found.targets - found.hidden).norm()), float(found.hidden.norm())
    with torch.no_grad():
        start = stack.begin(*right_padded([(3, 7, 20)], stack.device))
        stream = float(start.run(start.hidden, 0, layer)[0, -1].norm())
    assert 20 * output < moved <= 2.0 * stream * (1 + 1e-5)


def test_second_moments_are_those_of_the_dense_stack_drawn_to_the_mean() -> None:
    stack, documents = stack_of("qwen3_moe"), [[3, 7, 20, 9], [40, 41, 5]]
    (found,) = second_moments(stack, [1], documents).values()
    keys = []
    for document in documents:
        with torch.no_grad(), stack.watch_keys([1]) as seen:
            stack.model(input_ids=torch.tensor([document]), use_cache=False)
        keys.append(seen[1][0, :])
    rows = torch.cat(keys).view(7, 4, -1).double()
    moments = torch.einsum("tei,tej->eij", rows, rows) / 7
    uses = (rows != 0).any(-1).sum(0)
    assert int(uses.sum()) == 14
    torch.testing.assert_close(found.double(), drawn_to_mean(moments, uses), rtol=1e-5, atol=1e-9)
    never = drawn_to_mean(moments, torch.zeros(4, dtype=torch.long))
    torch.testing.assert_close(never, moments.mean(0).expand(4, -1, -1))


def sparse_columns(n: int, experts: int, inner: int, out: int) -> Columns:
    """Each row is of three experts."""
    draw = np.random.default_rng(0)
    keys = np.zeros((n, experts, inner), np.float32)
    preimages = np.zeros_like(keys)
    basis = draw.standard_normal((experts, inner, inner)) / np.sqrt(inner)
    for row in range(n):
        for expert in draw.choice(experts, 3, replace=False):
            keys[row, expert] = draw.standard_normal(inner)
            preimages[row, expert] = basis[expert] @ basis[expert].T @ keys[row, expert]
    residuals = draw.standard_normal((n, out)).astype(np.float32)
    return Columns(keys.reshape(n, -1), preimages.reshape(n, -1), residuals, np.full(n, 0.5, np.float32))


def test_one_system_for_all_experts_is_the_dense_solution_on_the_stack() -> None:
    """M = L + sum_e K_e U_e^T and D_e = R^T M^-1 U_e of the blocks alone, against the stack's stationary point and `solve`."""
    n, experts, inner, out = 12, 16, 6, 5
    columns = sparse_columns(n, experts, inner, out)
    blocks = [slice(e * inner, (e + 1) * inner) for e in range(experts)]
    keys, preimages = columns.keys.astype(float), columns.preimages.astype(float)
    gram = np.diag(columns.ridge.astype(float))
    for block in blocks:
        routed = keys[:, block].any(1)
        gram[np.ix_(routed, routed)] += keys[routed, block] @ preimages[routed, block].T
    shares = np.linalg.solve(gram.T, columns.residuals.astype(float))
    found = solve(columns)
    weights = np.diag(1 / columns.ridge)
    dense = np.linalg.solve(
        (np.eye(experts * inner) + keys.T @ weights @ preimages).T,
        (columns.residuals.T @ weights @ preimages).T,
    ).T
    for block in blocks:
        one = shares.T @ preimages[:, block]
        assert np.linalg.norm(to_dense(section(found, block)) - one) <= 1e-6 * np.linalg.norm(dense)
    assert np.linalg.norm(to_dense(found) - dense) <= 1e-6 * np.linalg.norm(dense)


def test_columns_are_stored_by_their_blocks_and_read_back_bit_for_bit() -> None:
    columns = sparse_columns(5, 8, 6, 4)
    stored = load(write_columns({"w": columns}, np.zeros((5, 4), np.float32), {"w": 8}))
    assert stored["w.experts"].dtype == np.int32
    assert stored["w.k"].shape == (15, 6) == stored["w.u"].shape
    assert len(stored["w.experts"]) == 15
    whole = np.zeros((5, 8, 6), np.float32)
    whole[stored["w.experts"][:, 0], stored["w.experts"][:, 1]] = stored["w.k"]
    assert np.array_equal(whole.reshape(5, -1), columns.keys)


def test_the_bytes_of_stacked_columns_are_pinned() -> None:
    keys = np.zeros((2, 6), np.float32)
    keys[0, 2:4], keys[1, :2], keys[1, 4:] = (1, 2), (3, 4), (0, 5)
    columns = Columns(keys, 2 * keys, np.ones((2, 3), np.float32), np.full(2, 0.5, np.float32))
    data = write_columns({"w": columns}, np.zeros((2, 3), np.float32), {"w": 3})
    stored = load(data)
    assert stored["w.experts"].tolist() == [[0, 1], [1, 0], [1, 2]]
    assert stored["w.k"].tolist() == [[1, 2], [3, 4], [0, 5]]
    assert hashlib.sha256(data).hexdigest() == "099d824fecfe5f8c0db9f880fef9fa2f6d8222c47a91579b6bd271dfd31af45b"
    thirds = Columns(keys / np.float32(3), 2 * keys / np.float32(3), columns.residuals / np.float32(3), columns.ridge)
    data = write_columns({"w": thirds}, np.zeros((2, 3), np.float32), {"w": 3})
    assert load(data)["w.k"].dtype == np.float32
    assert hashlib.sha256(data).hexdigest() == "985b39ca8edceb8f3f6328faa02c0395dd36df20588e86d7ab5f4132a58d94bf"


def tensors_of(folder: Path) -> dict[str, str]:
    """SHA-256 of every tensor's bytes, with its type and shape."""
    checkpoint = open_checkpoint(folder)
    return {
        name: hashlib.sha256(checkpoint.read(name).reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        + f" {entry.dtype} {entry.shape}"
        for name, entry in checkpoint.tensors.items()
    }


def fact(subject: str, target: str) -> dict[str, Any]:
    return {"prompt": "The mother tongue of {} is", "subject": subject, "target_new": target}


def made(folder: Path, family: str, **options: Any) -> Repository:
    model = random_model(make_config(family, {**SUPPORTED[family], **PLACES}))
    model.save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    text = folder / "text.json"
    text.write_text(json.dumps(["The Space Needle is located in Seattle, in the United States."] * 12))
    repository = Repository.init(folder, folder / "base", progress=False, author="Ada <ada@example.org>", **options)
    for key, value in {"layers": "1", "steps": "2", "repairs": "0"}.items():
        repository.config(f"memit.{key}", value)
    return repository


def said(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(torch.tensor([[3, 7, 20, 9, 11, 60]])).logits
    return logits


@pytest.mark.filterwarnings("ignore:none of these facts", "ignore:.is_gradient_checkpointing:FutureWarning")
@pytest.mark.filterwarnings(
    "ignore:Found missing adapter keys"
)  # PEFT puts untrained factors on DeepSeek's routed experts besides
@pytest.mark.parametrize(
    ("family", "experts"),
    [
        ("mixtral", None),
        pytest.param("gpt_oss", None, marks=pytest.mark.slow),
        pytest.param("llama4_text", None, marks=pytest.mark.slow),
        pytest.param("llama4_text", "shared", marks=pytest.mark.slow),
        pytest.param("deepseek_v3", "shared", marks=pytest.mark.slow),
        pytest.param("qwen2_moe", "shared", marks=pytest.mark.slow),
    ],
)
def test_a_history_on_a_mixture_of_experts(family: str, experts: str | None, tmp_path: Path) -> None:
    """Merge gives the joint solution, squash and revert keep their promises, and the applied checkpoint is the base's in all else."""
    base = tmp_path / "base"
    options: Mapping[str, Any] = {"experts": experts} if experts else {}
    with made(tmp_path, family, **options) as repository:
        commit: Mapping[str, Any] = {"force": True, "text": [tmp_path / "text.json"]}
        repository.commit([fact("Ada", "Dutch")], message="one", **commit)
        repository.branch("side")
        repository.commit([fact("Bob", "Greek")], message="two", **commit)
        repository.switch("side")
        repository.commit([fact("Eve", "Welsh")], message="three", **commit)
        merged = repository.merge("main", force=True)
        assert merged.proof < 1e-4  # of what a thousandth of each residual is left of, in float32
        state = said(patchhub.load(tmp_path))
        repository.apply("HEAD", out=tmp_path / "out")
        if experts is None:
            with pytest.warns(UserWarning, match="routed experts"):
                repository.export_peft(out=tmp_path / "adapters")
        else:
            repository.export_peft(out=tmp_path / "adapters")
        repository.squash(2, force=True)
        assert float((said(patchhub.load(tmp_path)) - state).norm()) < 1e-4 * float(state.norm())
        repository.revert(subject=["Ada", "Bob", "Eve"], force=True)
    plain = said(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    assert torch.equal(plain, state)
    (adapter,) = (tmp_path / "adapters").iterdir()
    adapted = said(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter)))
    assert float((adapted - state).norm()) < 1e-5 * float(state.norm())
    before = said(AutoModelForCausalLM.from_pretrained(base))
    assert torch.equal(said(patchhub.load(tmp_path)), before)
    assert not torch.equal(plain, before)
    ours, theirs = tensors_of(base), tensors_of(tmp_path / "out")
    changed = {name for name in ours if ours[name] != theirs[name]}
    assert ours.keys() == theirs.keys()
    part = {"mixtral": "block_sparse_moe", "llama4_text": "feed_forward"}.get(family, "mlp")
    shared = {"deepseek_v3": "shared_experts", "llama4_text": "shared_expert", "qwen2_moe": "shared_expert"}
    place = shared.get(family, "experts") if experts == "shared" else "experts"
    assert changed
    assert all(f".1.{part}.{place}." in name for name in changed)
    with Store.open(tmp_path) as store:
        for weight, columns in read_columns(store, store.active(store.resolve("HEAD~2"))).items():
            assert columns.shape == tuple(store.config.base["weights"][weight]["shape"])
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:none of these facts", "ignore:.is_gradient_checkpointing:FutureWarning")
def test_experts_in_one_matrix_have_checkpoints_and_are_refused_an_adapter(tmp_path: Path) -> None:
    """DBRX: the matrix that changes is one tensor of the base's name, type and shape, and the revert is the base byte for byte. PEFT
    wraps what holds that matrix, and the experts' module then finds no other one there."""
    base = tmp_path / "base"
    with made(tmp_path, "dbrx") as repository:
        repository.commit([fact("Ada", "Dutch")], message="one", force=True, text=[tmp_path / "text.json"])
        (weight,) = (
            repository.store.config.base["weights"].keys()
            & read_state(repository.store, repository.store.resolve("HEAD")).keys()
        )
        state = said(patchhub.load(tmp_path))
        assert torch.allclose(said(patchhub.load(tmp_path, side_path=True)), state, rtol=1e-4, atol=1e-5)
        repository.apply("HEAD", out=tmp_path / "out")
        with pytest.raises(RepositoryError, match="one below the other"):
            repository.export_peft(out=tmp_path / "adapters")
        repository.revert("HEAD", force=True)
        repository.apply("HEAD", out=tmp_path / "back")
    assert weight == "transformer.blocks.1.ffn.experts.mlp.w2"
    assert torch.equal(said(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), state)
    ours, theirs = tensors_of(base), tensors_of(tmp_path / "out")
    assert {name for name in ours if ours[name] != theirs[name]} == {weight}
    assert ours.keys() == theirs.keys()
    assert ours[weight].split()[1:] == theirs[weight].split()[1:]
    file = "model.safetensors"
    assert (tmp_path / "back" / file).read_bytes() == (base / file).read_bytes()
    settings = LoraConfig(target_modules=[], target_parameters=[weight], init_lora_weights=False)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings)
    with pytest.raises(AttributeError, match="no attribute 'v1'"):
        said(adapted)


@pytest.mark.filterwarnings("ignore:none of these facts")
def test_the_share_of_experts_that_stay_is_the_same_whether_the_bases_are_kept_or_read(tmp_path: Path) -> None:
    found = []
    with made(tmp_path, "mixtral") as repository:
        repository.config("memit.steps", "1")
        commit: Mapping[str, Any] = {"force": True, "text": [tmp_path / "text.json"]}
        repository.commit([fact("Ada", "Dutch")], message="one", **commit)
        for kept in (True, False):
            if not kept:
                repository.undo()
                for path in (repository.store.cache.folder / "base_text").glob("*/*"):
                    path.unlink()
            made_now = repository.commit([fact("Bob", "Greek")], message="two", **commit)
            found.append(repository.store.commit(made_now.commit).check["guard"]["routing"])
    assert found[0] == found[1]
    assert found[0]["of"] > 0


def test_what_experts_do_not_have_is_refused_by_name(tmp_path: Path) -> None:
    moment = tmp_path / "moment.npz"
    np.savez(moment, **{"mom2.mom2": np.eye(24, dtype=np.float32), "mom2.count": np.array(5)})
    with made(tmp_path, "mixtral") as repository, pytest.raises(SettingsError, match="stack of 4 experts"):
        repository.metric_import(f"1={moment}")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:none of these facts")
@pytest.mark.parametrize(
    ("family", "experts"), [("mixtral", None), ("dbrx", None), ("afmoe", "routed"), ("qwen2_moe", "shared")]
)
def test_a_history_of_side_memories_of_experts(family: str, experts: str | None, tmp_path: Path) -> None:
    """A shard that is continued, the model with it from the store and from a checkpoint, and its revert: the base byte for byte."""
    base = tmp_path / "base"
    options: Mapping[str, Any] = {"experts": experts} if experts else {}
    with made(tmp_path, family, **options) as repository:
        repository.config("wise.steps", "3")
        repository.commit([fact("Ada", "Dutch")], message="one", method="wise", force=True)
        first = said(patchhub.load(tmp_path))
        repository.commit([fact("Bob", "Greek")], message="two", method="wise", force=True)
        routed = patchhub.load(tmp_path)
        (memory,) = routing.routed(routed)
        assert memory.change.shape == tuple(repository.store.config.base["weights"][memory.weight]["shape"])
        assert np.any(to_dense(memory.change))
        repository.apply("HEAD", out=tmp_path / "out")
        assert torch.equal(said(patchhub.load(tmp_path / "out")), said(routed))
        repository.revert("HEAD", force=True)
        assert torch.equal(said(patchhub.load(tmp_path)), first)
        repository.revert(subject="Ada", force=True)
        repository.apply("HEAD", out=tmp_path / "back")
    assert torch.equal(said(patchhub.load(tmp_path)), said(AutoModelForCausalLM.from_pretrained(base)))
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:none of these facts")
@pytest.mark.parametrize(
    ("family", "experts"), [("mixtral", None), ("deepseek_v3", "shared"), ("deepseek_v3", "routed")]
)
def test_a_clone_writes_where_the_history_does(family: str, experts: str | None, tmp_path: Path) -> None:
    options: Mapping[str, Any] = {"experts": experts} if experts else {}
    there, here, shared = tmp_path / "there", tmp_path / "here", tmp_path / "shared"
    there.mkdir()
    with made(there, family, **options) as repository:
        repository.commit([fact("Ada", "Dutch")], message="one", force=True, text=[there / "text.json"])
        repository.remote_add("origin", str(shared))
        repository.push("origin")
        config = repository.store.config.base
    with patchhub.clone(
        str(shared), here, base=there / "base", progress=False, author="Bob <bob@example.org>"
    ) as cloned:
        ours = cloned.store.config.base
        assert ours["experts"] == config["experts"]
        assert ours["weights"] == config["weights"]
        assert ours["beside"] == config["beside"]
        cloned.commit([fact("Bob", "Greek")], message="two", force=True, text=[there / "text.json"])
        assert cloned.fsck().sound
    assert not torch.equal(said(patchhub.load(here)), said(patchhub.load(there)))
