"""Changes from elsewhere as additive patches: what is imported is what the other program computes, and it composes."""

from __future__ import annotations

import dataclasses
import json
import pickle
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis.extra.numpy import arrays
from safetensors.numpy import load_file, save_file

import patchhub
from patchhub.constraints import beyond, no_columns, solve
from patchhub.delta import Dense, LowRank, Sparse, add, to_dense
from patchhub.errors import PatchhubError, RequestError
from patchhub.export.foreign import FIELDS, from_difference, read_adapter
from patchhub.models.checkpoint import read_header, widened
from patchhub.porcelain.change import revert
from patchhub.porcelain.exchange import export_gguf, export_peft, import_change
from patchhub.porcelain.history import show
from patchhub.porcelain.merge import merge
from patchhub.porcelain.model import apply
from patchhub.porcelain.share import Chosen, clone, push, remote_add
from patchhub.progress import Silent
from patchhub.sets.columns import linear_shapes, read_additive, read_columns, read_state, weight_shapes
from patchhub.sets.proofs import prove
from patchhub.store.fsck import check, every_commit
from patchhub.store.store import Store
from patchhub.who import Who
from tests.export.adapters import ADAPTED, KINDS, REFUSED
from tests.export.models import distance, load_base, logits, model_folder, model_store
from tests.remotes.stores import AUTHOR, TIME, add_batch, move, switch

TYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}
NAME = "model.layers.1.mlp.down_proj.weight"
STAMP = Who(AUTHOR, TIME, "import")
OLD_WAY = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT asks transformers so
BIASED = pytest.mark.filterwarnings(
    "ignore:Adapter 'default'"
)  # PEFT takes the biases of B for factors that were not gathered


def imported(repository: Store, folder: Path, tolerance: float = 1e-6) -> dict[str, tuple[str, float]]:
    return dict(import_change(repository, folder, STAMP, Silent(), tolerance=tolerance).weights)


def lora(base: Path, folder: Path, modules: list[str], **options: Any) -> Any:
    """A LoRA made and saved by PEFT, with random factors; the adapted model."""
    from peft import LoraConfig, get_peft_model

    fixed = {"r": 3, "target_modules": modules, "lora_alpha": 7, "task_type": "CAUSAL_LM"}
    config = LoraConfig(**(fixed | options))
    model = get_peft_model(load_base(base), config).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data *= 1 + 0.3 * torch.rand(parameter.shape, generator=generator)
        elif any(part in name for part in ("lora_", "modules_to_save", "trainable_tokens_delta")) or (
            name.endswith(".bias") and options.get("bias")
        ):
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    return model


@OLD_WAY
@BIASED
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:lora with eva initialization:UserWarning")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("qwen2", {"bias": "lora_only", "target_modules": ["q_proj"]}),
        ("gpt2", {"fan_in_fan_out": True}),
        ("gpt2", {"fan_in_fan_out": True, "use_dora": True}),
        ("llama", {"trainable_token_indices": [3, 17], "tie_word_embeddings": True}),
        *(("qwen2" if "lora_bias" in options else "llama", options) for options in ADAPTED.values()),
    ],
    ids=["biases that are there", "Conv1D", "Conv1D resized", "tokens of one table", *ADAPTED],
)
def test_an_imported_lora_is_what_peft_loads(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    from peft import PeftModel

    options = dict(options)
    ties = {"tie_word_embeddings": True} if options.pop("tie_word_embeddings", False) else {}
    base = model_folder(tmp_path / "base", family, **ties)
    lora(base, tmp_path / "lora", ["mlp.c_proj" if family == "gpt2" else "down_proj"], **options)
    with model_store(tmp_path / "store", base) as store:
        found = {form for form, _ in imported(store, tmp_path / "lora").values()}
        dense = {"dense"} if options.keys() & {"use_dora", "modules_to_save", "bias", "lora_bias"} else set()
        sparse = {"sparse"} if "trainable_token_indices" in options else set()
        assert found <= {"rank 2", "rank 3", "rank 4"} | dense | sparse
        assert check(store).sound
    adapted = PeftModel.from_pretrained(load_base(base), tmp_path / "lora").eval()
    assert distance(logits(patchhub.load(tmp_path / "store")), logits(adapted)) < 1e-5


@OLD_WAY
def test_what_mergekit_extracts_is_what_peft_loads(tmp_path: Path) -> None:
    """As mergekit-extract-lora writes it: factors of embedding, head and every linear weight, norms whole, ranks by full names."""
    from peft import PeftModel

    base = model_folder(tmp_path / "base", "llama")
    generator = torch.Generator().manual_seed(0)
    tensors, ranks, ends = {}, {}, {"factors": set[str](), "whole": set[str]()}
    for name, module in load_base(base).named_modules():
        if not isinstance(weight := getattr(module, "weight", None), torch.Tensor):
            continue
        whole = weight.dim() == 1
        ends["whole" if whole else "factors"].add(name.rpartition(".")[2])
        if whole:
            tensors[f"base_model.model.{name}.weight"] = (weight.detach() * 1.25).numpy()
            continue
        ranks[name] = 2 if name.endswith("q_proj") else 3
        table = isinstance(module, torch.nn.Embedding)
        out, inner = weight.shape[::-1] if table else weight.shape
        a = 0.1 * torch.randn((ranks[name], inner), generator=generator).numpy()
        b = 0.1 * torch.randn((out, ranks[name]), generator=generator).numpy()
        left, right = ("lora_embedding_A", "lora_embedding_B") if table else ("lora_A.weight", "lora_B.weight")
        tensors |= {f"base_model.model.{name}.{left}": a, f"base_model.model.{name}.{right}": b}
    pattern = {name: rank for name, rank in ranks.items() if rank != 3}
    config = {
        **{"alpha_pattern": pattern, "rank_pattern": pattern, "r": 3, "lora_alpha": 3, "peft_type": "LORA"},
        **{"auto_mapping": None, "base_model_name_or_path": "base", "bias": "none", "fan_in_fan_out": False},
        **{"inference_mode": True, "init_lora_weights": True, "layers_pattern": None, "layers_to_transform": None},
        **{"loftq_config": {}, "lora_dropout": 0, "megatron_config": None, "megatron_core": "megatron.core"},
        **{"modules_to_save": sorted(ends["whole"]), "target_modules": sorted(ends["factors"])},
        **{"revision": None, "task_type": "CAUSAL_LM", "use_rslora": False},
    }
    folder = tmp_path / "extracted"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(tensors, folder / "adapter_model.safetensors")
    with model_store(tmp_path / "store", base) as store:
        imported(store, folder)
    adapted = PeftModel.from_pretrained(load_base(base), folder).eval()
    assert distance(logits(patchhub.load(tmp_path / "store")), logits(adapted)) < 1e-5


@OLD_WAY
@BIASED
@pytest.mark.filterwarnings("ignore:.lora_bias=True. was passed but the targeted layer:")
@pytest.mark.parametrize(
    ("options", "changes", "words"),
    [
        ({"lora_bias": True}, {}, "its lora_bias is true, and the base has no model.layers.0.mlp.down_proj.bias"),
        ({"lora_bias": True}, {"lora_bias": False}, "its lora_bias and what it holds"),
        ({"trainable_token_indices": [3, 9]}, {"trainable_token_indices": [3]}, "not those of 1 tokens"),
        ({"trainable_token_indices": [3, 9]}, {"trainable_token_indices": [3, 99999]}, "not those of 2 tokens"),
        ({"trainable_token_indices": [3, 9]}, {"trainable_token_indices": [3, 3]}, "do not say which rows"),
        ({"trainable_token_indices": [3, 9]}, {"trainable_token_indices": None}, "do not say which rows"),
        (
            {"trainable_token_indices": [3, 9]},
            {"trainable_token_indices": [-1, 3]},
            "its trainable_token_indices is malformed",
        ),
    ],
)
def test_biases_and_tokens_that_do_not_fit_are_refused(
    options: dict[str, Any], changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    base = model_folder(tmp_path / "base", "llama")
    lora(base, tmp_path / "lora", ["down_proj"], **options)
    _edit(tmp_path / "lora", **changes)
    with model_store(tmp_path / "store", base) as store, pytest.raises(RequestError, match=words) as refused:
        imported(store, tmp_path / "lora")
    assert refused.value.facts["field"] == next(iter(options))
    assert refused.value.remedy


@pytest.mark.parametrize("kind", REFUSED)
def test_an_adapter_that_is_no_change_of_the_base_is_refused_by_its_field(kind: str, tmp_path: Path) -> None:
    field, value = REFUSED[kind]
    _plain_adapter(tmp_path, {field: value})
    with pytest.raises(RequestError, match=rf"its {field} is ") as refused:
        read_adapter(tmp_path, {NAME: (6, 5)})
    assert refused.value.remedy


def test_every_field_of_the_installed_peft_is_known_and_harmless_at_its_default(tmp_path: Path) -> None:
    """A field that a newer PEFT brings fails here, and until it is understood its other values are refused."""
    from peft import LoraConfig

    config = LoraConfig(r=2, target_modules=["down_proj"], lora_alpha=2, task_type="CAUSAL_LM")
    assert {field.name for field in dataclasses.fields(LoraConfig)} <= FIELDS.keys()
    config.save_pretrained(tmp_path)
    _plain_adapter(tmp_path, json.loads((tmp_path / "adapter_config.json").read_text()))
    assert read_adapter(tmp_path, {NAME: (6, 5)}).keys() == {NAME}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lens": {"tilt": 1}}, r"the field lens \(.*tilt.*\), which patchhub does not know"),
        ({"lens": 0.5}, "the field lens"),
        ({"lens": True}, "the field lens"),
        ({"r": 3}, "have rank 2, its adapter_config.json says 3"),
        ({"rank_pattern": {"down_proj": 5}}, "have rank 2, its adapter_config.json says 5"),
        ({"target_modules": ["up_proj"]}, "its target_modules leave that module out"),
        ({"target_modules": ["proj"]}, "its target_modules leave that module out"),
        ({"target_modules": r".*up_proj"}, "its target_modules leave that module out"),
        ({"exclude_modules": ["down_proj"]}, "its target_modules leave that module out"),
        ({"layers_to_transform": 0}, "its target_modules leave that module out"),
        ({"init_lora_weights": 1}, "its init_lora_weights is 1"),
        ({"r": True}, "its r or rank_pattern"),
        ({"lora_alpha": True}, "its lora_alpha or alpha_pattern"),
        ({"layers_to_transform": ["1"]}, "its layers_to_transform"),
        ({"target_modules": 3}, "its target_modules"),
    ],
)
def test_what_peft_would_read_otherwise_is_refused(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    _plain_adapter(tmp_path, options)
    with pytest.raises(RequestError, match=words):
        read_adapter(tmp_path, {NAME: (6, 5)})


def test_factors_of_what_is_no_linear_weight_of_a_block_are_refused(tmp_path: Path) -> None:
    _plain_adapter(tmp_path, {})
    with pytest.raises(RequestError, match=r"down_proj\.weight, which is no linear weight of the base's blocks"):
        read_adapter(tmp_path, {"model.layers.0.mlp.down_proj.weight": (6, 5)})


def test_a_field_that_is_not_known_and_switched_off_says_nothing(tmp_path: Path) -> None:
    _plain_adapter(tmp_path, {"lens": None, "prism": False, "mirror": {}, "layers_to_transform": [1]})
    assert read_adapter(tmp_path, {NAME: (6, 5)}).keys() == {NAME}


@pytest.mark.filterwarnings("ignore")  # of PEFT, about defaults
def test_every_kind_of_adapter_that_peft_makes_is_in_the_table(tmp_path: Path) -> None:
    """Each but LoRA is refused by its name, from the configuration that PEFT itself writes wherever that can be made here."""
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    kinds = {kind.value for kind in PeftType} - {"LORA"}
    assert kinds <= set(KINDS), "a newer PEFT has more: import them, or list them in tests/export/adapters.py"
    made = 0
    for kind in sorted(kinds):
        folder = tmp_path / kind
        folder.mkdir()
        _plain_adapter(folder, {"peft_type": kind})
        with suppress(ImportError, ValueError, TypeError):  # some need a package, or more arguments
            PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)](task_type="CAUSAL_LM").save_pretrained(folder)
            made += 1
        with pytest.raises(RequestError, match=f"its peft_type is .*{kind}") as refused:
            read_adapter(folder, {NAME: (6, 5)})
        assert refused.value.remedy
    assert made > len(kinds) / 2


def _plain_adapter(folder: Path, config: dict[str, Any]) -> None:
    generator = np.random.default_rng(0)
    plain = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["down_proj"], "bias": "none"}
    module = f"base_model.model.{NAME.removesuffix('.weight')}"
    shapes = {f"{module}.lora_A.weight": (2, 5), f"{module}.lora_B.weight": (6, 2)}
    tensors = {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    (folder / "adapter_config.json").write_text(json.dumps(plain | config))
    save_file(tensors, folder / "adapter_model.safetensors")


@OLD_WAY
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize(
    ("modules", "options"),
    [(["lm_head"], {}), (["embed_tokens"], {}), (["q_proj"], {"modules_to_save": ["embed_tokens"]})],
)
def test_one_end_of_a_model_whose_ends_are_one_tensor_is_refused(
    modules: list[str], options: dict[str, Any], tmp_path: Path
) -> None:
    """PEFT changes the one alone, and no change of the shared tensor does; the whole model can be tuned."""
    base = model_folder(tmp_path / "base", "llama", tie_word_embeddings=True)
    lora(base, tmp_path / "lora", modules, **options)
    with model_store(tmp_path / "store", base) as store:
        with pytest.raises(RequestError, match="embedding and head are one tensor"):
            imported(store, tmp_path / "lora")
        tuned_everywhere(base, tmp_path / "tuned")
        imported(store, tmp_path / "tuned")
    assert distance(logits(patchhub.load(tmp_path / "store")), logits(load_base(tmp_path / "tuned"))) < 1e-5


def tuned_everywhere(base: Path, folder: Path) -> None:
    """A fine-tune that changed every parameter."""
    model, generator = load_base(base), torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)


def test_a_fine_tune_of_everything_lives_with_facts(tmp_path: Path) -> None:
    """Embedding, head and norms too: committed, with facts below and above, exported, cloned, attached, detached, and taken back."""
    base = model_folder(tmp_path / "base", "llama")
    tuned_everywhere(base, tmp_path / "tuned")
    tuned = logits(load_base(tmp_path / "tuned"))
    with model_store(tmp_path / "alone", base) as store:
        weights = imported(store, tmp_path / "tuned")
        assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= weights.keys()
    assert distance(logits(patchhub.load(tmp_path / "alone")), tuned) < 1e-5
    with model_store(tmp_path / "store", base, range(3)) as store:
        imported(store, tmp_path / "tuned")
        ours = str(store.head[1])
        add_batch(store, range(3, 6))
        assert_joint(store)
        both = logits(patchhub.load(tmp_path / "store"))
        apply(store, "HEAD", tmp_path / "applied", Silent())
        for export in (export_peft, export_gguf):
            with pytest.raises(PatchhubError, match="holds more than linear weights"):
                export(store, "HEAD", tmp_path / "out", Silent())
        remote_add(store, "origin", str(tmp_path / "remote"))
        push(store, "origin", Chosen(["main"]), Silent(), who=Who(AUTHOR, TIME))
    clone(str(tmp_path / "remote"), tmp_path / "clone", Silent(), who=Who(AUTHOR, TIME), base=str(base))
    for place in (load_base(tmp_path / "applied"), patchhub.load(tmp_path / "clone", prove=True)):
        assert distance(logits(place), both) < 1e-5
    model = load_base(base)
    plain = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    patchhub.attach(model, tmp_path / "store")
    assert torch.equal(logits(model), both)
    patchhub.detach(model)
    assert all(torch.equal(tensor, plain[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(PatchhubError, match="no weight of a linear module"):
        patchhub.load(tmp_path / "store", side_path=True)
    with Store.open(tmp_path / "store") as store:
        revert(store, ours, STAMP)
        assert check(store).sound
        left = read_state(store, store.head[1])
    with model_store(tmp_path / "plain", base, range(3), range(3, 6)) as store:
        expected = read_state(store, store.head[1])
        for weight, shape in linear_shapes(store).items():
            alone = to_dense(add(expected.get(weight, ()), shape))
            assert np.linalg.norm(to_dense(add(left.get(weight, ()), shape)) - alone) <= 1e-6 * np.linalg.norm(alone)


def test_an_import_has_a_largest_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = model_folder(tmp_path / "base", "llama")
    tuned_everywhere(base, tmp_path / "tuned")
    monkeypatch.setattr("patchhub.porcelain.exchange.LARGEST", 1000)
    with model_store(tmp_path / "store", base) as store, pytest.raises(RequestError, match="an import may take"):
        imported(store, tmp_path / "tuned")


def test_a_long_matrix_is_decomposed_as_any(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    low = generator.standard_normal((900, 3)) @ generator.standard_normal((3, 20))
    delta, form, error = from_difference(low, 1e-6)
    assert form == "rank 3"
    assert error < 1e-12
    assert np.linalg.norm(to_dense(delta) - low) <= 1e-6 * np.linalg.norm(low)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_fine_tuned_checkpoint_is_what_its_difference_was(family: str, tmp_path: Path) -> None:
    base = model_folder(tmp_path / "base", family)
    with model_store(tmp_path / "made", base, range(3)) as made:
        apply(made, "HEAD", tmp_path / "tuned", Silent())
    with model_store(tmp_path / "store", base) as store:
        imported(store, tmp_path / "tuned")
        with pytest.raises(RequestError, match="active already"):
            imported(store, tmp_path / "tuned")
    loaded, tuned = patchhub.load(tmp_path / "store").state_dict(), load_base(tmp_path / "tuned").state_dict()
    for name, tensor in tuned.items():
        assert torch.allclose(loaded[name], tensor, rtol=1e-6, atol=1e-6)
    with model_store(tmp_path / "other", base) as store, pytest.raises(RequestError, match="changes nothing"):
        imported(store, base)


@OLD_WAY
@pytest.mark.parametrize("dtype", TYPES)
def test_factors_of_any_float_type_are_what_peft_loads(dtype: torch.dtype, tmp_path: Path) -> None:
    base = model_folder(tmp_path / "base", "llama")
    adapted = lora(base, tmp_path / "lora", ["down_proj"])
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    adapted.save_pretrained(tmp_path / "lora")
    entries = read_header(tmp_path / "lora" / "adapter_model.safetensors").values()
    assert {entry.dtype for entry in entries} == {TYPES[dtype]}
    for _, parameter in adapted.named_parameters():
        parameter.data = parameter.data.float()
    with model_store(tmp_path / "store", base) as store:
        imported(store, tmp_path / "lora")
    assert distance(logits(patchhub.load(tmp_path / "store")), logits(adapted)) < 1e-5


@pytest.mark.parametrize("dtype", TYPES)
def test_a_checkpoint_of_another_type_is_compared_by_value(dtype: torch.dtype, tmp_path: Path) -> None:
    base, weight = model_folder(tmp_path / "base", "llama"), "model.layers.1.mlp.down_proj.weight"
    model = load_base(base)
    model.to(dtype).save_pretrained(tmp_path / "same")
    parameter = model.get_parameter(weight)
    parameter.data += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    model.save_pretrained(tmp_path / "tuned")
    with model_store(tmp_path / "store", base) as store:
        with pytest.raises(RequestError, match="changes nothing"):
            imported(store, tmp_path / "same")
        assert imported(store, tmp_path / "tuned").keys() == {weight}
    loaded = patchhub.load(tmp_path / "store").get_parameter(weight)
    assert torch.allclose(loaded, parameter.data.float(), rtol=1e-6, atol=1e-6)


@given(arrays(np.uint16, 64))
def test_bfloat16_is_widened_as_torch_widens_it(bits: np.ndarray) -> None:
    expected = torch.from_numpy(bits).view(torch.bfloat16).float().numpy()
    assert np.array_equal(widened(bits), expected, equal_nan=True)


def test_a_difference_takes_its_smallest_form() -> None:
    generator = np.random.default_rng(0)
    low = generator.standard_normal((40, 3)) @ generator.standard_normal((3, 50))
    few = np.where(generator.random((40, 50)) < 0.02, 1.0, 0.0) * generator.standard_normal((40, 50))
    full = generator.standard_normal((40, 50))
    for matrix, kind in ((low, LowRank), (few, Sparse), (full, Dense)):
        delta, _, error = from_difference(matrix, 1e-6)
        assert isinstance(delta, kind)
        assert np.linalg.norm(to_dense(delta) - matrix) <= (error + 1e-6) * np.linalg.norm(matrix)
    noisy = low + 1e-4 * full
    exact, _, _ = from_difference(noisy, 1e-6)
    near, _, error = from_difference(noisy, 1e-2)
    assert isinstance(exact, Dense)
    assert isinstance(near, LowRank)
    assert near.rank == 3
    assert np.linalg.norm(to_dense(near) - noisy) == pytest.approx(error * np.linalg.norm(noisy), rel=1e-3)


def joint(store: Store, commit: str) -> dict[str, np.ndarray]:
    """X + the solve of r - X k, weight by weight, from what is active at a commit: the definition."""
    elements, shapes = store.active(commit), weight_shapes(store)
    additive = read_additive(store, elements)
    columns = read_columns(store, elements)  # on top of the additive patches already
    found = {}
    for weight, shape in shapes.items():
        solved = solve(columns.get(weight, no_columns(shape)))
        found[weight] = to_dense(add([*additive.get(weight, ()), solved], shape))
    return found


def assert_joint(store: Store) -> None:
    commit = str(store.head[1])
    expected, shapes, state = joint(store, commit), weight_shapes(store), read_state(store, commit)
    for weight, shape in shapes.items():
        found = to_dense(add(state.get(weight, ()), shape))
        assert np.linalg.norm(found - expected[weight]) <= 1e-5 * max(np.linalg.norm(expected[weight]), 1e-9)
    assert max(store.commit(commit).check["proof"].values()) < 1e-4
    proofs = prove(store, every_commit(store))
    assert proofs.unproven == ()
    assert {one.kind for one in proofs.unprovable} == {
        "additive"
    }  # it follows from no facts, and what stands on it does


@OLD_WAY
def test_an_import_lives_with_facts(tmp_path: Path) -> None:
    """Before, after, merged and reverted: the weights are always those of the set, whatever the order."""
    base = model_folder(tmp_path / "base", "llama")
    lora(base, tmp_path / "lora", ["down_proj"])
    with model_store(tmp_path / "store", base, range(2)) as store:
        first = str(store.head[1])
        imported(store, tmp_path / "lora")
        assert_joint(store)
        middle = str(store.head[1])
        add_batch(store, range(2, 4))
        assert_joint(store)
        move(store, {"refs/heads/side": (None, first)})
        switch(store, "side")
        add_batch(store, range(4, 6))
        merge(store, "main", STAMP)
        assert_joint(store)
        assert len(store.active(store.head[1])) == 7
        revert(store, middle, STAMP)
        assert_joint(store)
        assert len(store.active(store.head[1])) == 6
        assert check(store).sound


@OLD_WAY
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_lora_of_every_linear_weight_lives_with_facts(family: str, tmp_path: Path) -> None:
    """Loaded, exported, applied, merged and pushed it is what PEFT computes; taken back, nothing of it is left in the facts' state."""
    base = model_folder(tmp_path / "base", family)
    adapted = lora(base, tmp_path / "lora", "all-linear", fan_in_fan_out=family == "gpt2")
    with model_store(tmp_path / "store", base) as store:
        weights = imported(store, tmp_path / "lora")
        assert weights.keys() == linear_shapes(store).keys() > weight_shapes(store).keys()
        imports = str(store.head[1])
        assert distance(logits(patchhub.load(tmp_path / "store")), logits(adapted)) < 1e-5
        exported = export_peft(store, "HEAD", tmp_path / "out", Silent()).out
        apply(store, "HEAD", tmp_path / "applied", Silent())
        add_batch(store, range(2))
        assert_joint(store)
        both = logits(patchhub.load(tmp_path / "store"))
        revert(store, imports, STAMP)
        assert_joint(store)
        shapes, state = linear_shapes(store), read_state(store, store.head[1])
        facts = {weight: to_dense(add(deltas, shapes[weight])) for weight, deltas in state.items()}
        revert(store, str(store.head[1]), STAMP)
        assert distance(logits(patchhub.load(tmp_path / "store")), both) < 1e-5
        assert check(store).sound
    assert distance(logits(load_base(tmp_path / "applied")), logits(adapted)) < 1e-5
    from peft import PeftModel

    assert distance(logits(PeftModel.from_pretrained(load_base(base), str(exported)).eval()), logits(adapted)) < 1e-5
    with model_store(tmp_path / "plain", base, range(2)) as plain:
        expected = read_state(plain, plain.head[1])
        for weight, shape in linear_shapes(plain).items():
            alone = to_dense(add(expected.get(weight, ()), shape))
            left = facts.get(weight, np.zeros(shape)) - alone
            assert np.linalg.norm(left) <= 1e-6 * np.linalg.norm(alone)


@OLD_WAY
def test_an_import_of_every_linear_weight_travels(tmp_path: Path) -> None:
    base = model_folder(tmp_path / "base", "llama")
    adapted = lora(base, tmp_path / "lora", "all-linear")
    with model_store(tmp_path / "store", base) as store:
        imported(store, tmp_path / "lora")
        remote_add(store, "origin", str(tmp_path / "remote"))
        push(store, "origin", Chosen(["main"]), Silent(), who=Who(AUTHOR, TIME))
    clone(str(tmp_path / "remote"), tmp_path / "clone", Silent(), who=Who(AUTHOR, TIME), base=str(base))
    assert distance(logits(patchhub.load(tmp_path / "clone")), logits(adapted)) < 1e-5


def test_changes_that_cancel_make_a_commit_too(tmp_path: Path) -> None:
    base, weight = model_folder(tmp_path / "base", "llama"), "model.layers.1.mlp.down_proj.weight"
    model = load_base(base)
    parameter = model.get_parameter(weight)
    stored = (64 * parameter.data).round() / 64  # sums of such numbers are exact
    change = torch.randint(-9, 9, stored.shape, generator=torch.Generator().manual_seed(0)) / 64
    for name, factor in (("base", 0), ("up", 1), ("down", -1)):
        parameter.data = stored + factor * change
        model.save_pretrained(tmp_path / name)
    with model_store(tmp_path / "store", base) as store:
        for name in ("up", "down"):
            imported(store, tmp_path / name)
        assert store.commit(str(store.head[1])).check["proof"][weight] == 0.0


def test_columns_on_top_ask_for_the_rest() -> None:
    generator = np.random.default_rng(0)
    keys = generator.standard_normal((2, 5))
    x = Dense(generator.standard_normal((4, 5)))
    columns = solve_input(keys, generator.standard_normal((2, 4)))
    rest = beyond(columns, [x])
    assert np.allclose(rest.residuals + keys @ x.matrix.T, columns.residuals)
    assert beyond(columns, []) is columns


def solve_input(keys: np.ndarray, residuals: np.ndarray) -> Any:
    from patchhub.constraints import Columns

    return Columns(keys, keys, residuals, np.ones(len(keys)))


def _edit(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_malformed_adapters_are_refused(tmp_path: Path) -> None:
    base = model_folder(tmp_path / "base", "llama")
    with model_store(tmp_path / "store", base, range(2)) as store:
        good = export_peft(store, "HEAD", tmp_path / "out", Silent()).out
        tensors = load_file(good / "adapter_model.safetensors")
        name = sorted(tensors)[0]

        def attempt(number: int, **changes: Any) -> None:
            folder = tmp_path / str(number)
            folder.mkdir()
            (folder / "adapter_config.json").write_bytes((good / "adapter_config.json").read_bytes())
            save_file(tensors | changes.pop("tensors", {}), folder / "adapter_model.safetensors")
            _edit(folder, **changes)
            head = store.head
            with pytest.raises(PatchhubError):
                imported(store, folder)
            assert store.head == head

        cases: list[dict[str, Any]] = [
            {"use_dora": True},
            {"bias": "some"},
            {"modules_to_save": "lm_head"},
            {"peft_type": "LOHA"},
            {"lora_alpha": "16"},
            {"lora_alpha": float("inf")},
            {"alpha_pattern": {"(": 3}},
            {"alpha_pattern": {"(?i)down_proj": 3}},
            {"alpha_pattern": 3},
            {"tensors": {"other": np.zeros(3, np.float32)}},
            {"tensors": {name: np.zeros((3, 3), np.float32)}},
            {"tensors": {name: np.full_like(tensors[name], np.nan)}},
        ]
        for number, case in enumerate(cases):
            attempt(number, **case)
        bare = tmp_path / "bare"
        bare.mkdir()
        (bare / "adapter_config.json").write_bytes((good / "adapter_config.json").read_bytes())
        (bare / "adapter_model.bin").write_bytes(pickle.dumps(tensors))
        with pytest.raises(RequestError, match="cannot be read"):
            imported(store, bare)


def test_what_was_exported_comes_back(tmp_path: Path) -> None:
    base = model_folder(tmp_path / "base", "gpt2")
    with model_store(tmp_path / "made", base, range(3)) as made:
        folder = export_peft(made, "HEAD", tmp_path / "out", Silent()).out
    with model_store(tmp_path / "store", base) as store:
        imported(store, tmp_path / "out")  # the one adapter in it
        entry = show(store).entry
        assert (entry.added, entry.active, entry.imported, entry.active_imports) == (0, 0, 1, 1)
    shutil.copytree(folder, tmp_path / "out" / "second")
    with model_store(tmp_path / "other", base) as store:
        with pytest.raises(RequestError, match="2 adapters"):
            imported(store, tmp_path / "out")
        with pytest.raises(RequestError, match=r"adapter_config\.json.*config\.json"):
            imported(store, tmp_path / "store")
    assert distance(logits(patchhub.load(tmp_path / "store")), logits(patchhub.load(tmp_path / "made"))) < 1e-5
