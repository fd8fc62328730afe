"""Changes from elsewhere as additive patches: what is imported is what the other program computes, and it composes."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import patchhub
from patchhub.constraints import beyond, no_columns, solve
from patchhub.delta import Dense, LowRank, Sparse, add, to_dense
from patchhub.errors import PatchhubError, RequestError
from patchhub.export.foreign import from_difference
from patchhub.porcelain.change import revert
from patchhub.porcelain.exchange import export_peft, import_change
from patchhub.porcelain.history import show
from patchhub.porcelain.merge import merge
from patchhub.porcelain.model import apply
from patchhub.progress import Silent
from patchhub.sets.columns import read_additive, read_columns, read_state, weight_shapes
from patchhub.store.fsck import check
from patchhub.store.store import Store
from patchhub.who import Who
from tests.export.models import distance, load_base, logits, model_folder, model_store
from tests.remotes.stores import AUTHOR, TIME, add_batch, move, switch

STAMP = Who(AUTHOR, TIME, "import")
OLD_WAY = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT asks transformers so


def imported(repository: Store, folder: Path, tolerance: float = 1e-6) -> dict[str, tuple[str, float]]:
    return dict(import_change(repository, folder, STAMP, Silent(), tolerance=tolerance).weights)


def lora(base: Path, folder: Path, modules: list[str], **options: Any) -> Any:
    """A LoRA made and saved by PEFT, with random factors; the adapted model."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=3, target_modules=modules, lora_alpha=7, task_type="CAUSAL_LM", **options)
    model = get_peft_model(load_base(base), config).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    return model


@OLD_WAY
@pytest.mark.parametrize(
    ("family", "module", "options"),
    [
        ("gpt2", "mlp.c_proj", {"fan_in_fan_out": True}),
        ("llama", "down_proj", {}),
        ("llama", "down_proj", {"use_rslora": True}),
        ("llama", "down_proj", {"alpha_pattern": {"layers.1.mlp.down_proj": 2, "^model.layers.2.mlp.down_proj": 5}}),
        ("llama", "down_proj", {"rank_pattern": {"layers.1.mlp.down_proj": 2}}),
    ],
)
def test_an_imported_lora_is_what_peft_computes(
    family: str, module: str, options: dict[str, Any], tmp_path: Path
) -> None:
    base = model_folder(tmp_path / "base", family)
    adapted = lora(base, tmp_path / "lora", [module], **options)
    with model_store(tmp_path / "store", base) as store:
        assert {form for form, _ in imported(store, tmp_path / "lora").values()} <= {"rank 3", "rank 2"}
        assert check(store).sound
    assert distance(logits(patchhub.load(tmp_path / "store")), logits(adapted)) < 1e-5


@OLD_WAY
def test_a_lora_of_other_modules_is_refused(tmp_path: Path) -> None:
    base = model_folder(tmp_path / "base", "llama")
    lora(base, tmp_path / "lora", ["q_proj"])
    with (
        model_store(tmp_path / "store", base) as store,
        pytest.raises(RequestError, match=r"q_proj\.weight, which patchhub does not edit"),
    ):
        imported(store, tmp_path / "lora")


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
            {"bias": "all"},
            {"modules_to_save": ["lm_head"]},
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
