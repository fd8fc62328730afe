"""vLLM's plug-in, with vLLM's own resolver and its own reader of adapters where they import (without its kernels they do)."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

import patchhub
from patchhub.errors import RepositoryError, SettingsError, UnsupportedModelError
from patchhub.repository import vllm as plugin
from patchhub.repository.vllm import Named, served_adapter
from patchhub.store.store import Store
from tests.export.models import distance, load_base, logits, model_folder, model_store
from tests.export.test_importing import imported, tuned_everywhere
from tests.remotes.stores import move


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Path]:
    """A store of two commits, the first with a tag, and its base."""
    folder = tmp_path_factory.mktemp("vllm")
    base = model_folder(folder / "base", "llama")
    repository = model_store(folder / "store", base, range(3), range(3, 6))
    first = repository.commit(str(repository.head[1])).parents[0]
    move(repository, {"refs/tags/v1.2": (None, first)})
    return repository, base


def test_only_listed_places_are_opened(tmp_path: Path) -> None:
    allowed = ["user/facts", str(tmp_path)]
    assert Named.parse("user/facts@v1.2", allowed) == Named("user/facts", "v1.2")
    assert Named.parse("hf://user/facts", allowed) == Named("user/facts", "HEAD")
    assert Named.parse(f"{tmp_path}/../{tmp_path.name}@main", allowed) == Named(str(tmp_path), "main")
    for name in ("user/other@v1", "llama", "", "/etc", f"{tmp_path}/below@v1", f"{tmp_path}/..", "user/facts/../../x"):
        assert Named.parse(name, allowed) is None
    assert plugin.places_of({plugin.PLACES: " user/facts, /srv/facts ,"}) == ("user/facts", "/srv/facts")
    assert plugin.places_of({}) == ()
    with pytest.raises(SettingsError, match="neither"):
        plugin.places_of({plugin.PLACES: "facts"})
    with pytest.raises(SettingsError, match="not a rank"):
        plugin.max_rank_of({plugin.MAX_RANK: "many"})


def test_vllm_finds_the_plug_in() -> None:
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    registered = (
        f'[project.entry-points."vllm.general_plugins"]\npatchhub = "{plugin.__name__}:{plugin.register.__name__}"'
    )
    assert registered in project


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT asks transformers the old way
@pytest.mark.parametrize("revision", ["HEAD", "v1.2"])
def test_the_adapter_of_a_name_is_the_revision(served: tuple[Store, Path], tmp_path: Path, revision: str) -> None:
    repository, base = served
    found = served_adapter(Named(str(repository.root), revision), str(base), tmp_path)
    assert found.commit == repository.resolve(revision)
    assert found.commit[:12] in found.folder.name
    plain = load_base(base)
    adapted = logits(PeftModel.from_pretrained(plain, found.folder))
    with patchhub.Repository(repository.root, progress=False) as repo:
        expected = logits(repo.load(revision, dtype=torch.float32))
    assert distance(adapted, expected) < 1e-5
    assert distance(logits(load_base(base)), expected) > 1e-3


def test_what_a_server_would_serve_wrongly_is_refused(served: tuple[Store, Path], tmp_path: Path) -> None:
    repository, base = served
    place = str(repository.root)
    with pytest.raises(RepositoryError, match="rank 8, and the server takes 4"):
        served_adapter(Named(place, "HEAD"), str(base), tmp_path, max_rank=4)
    with pytest.raises(RepositoryError, match="changes nothing"):
        served_adapter(Named(place, "base"), str(base), tmp_path)
    other = model_folder(tmp_path / "other", "llama", seed=1)
    with pytest.raises(patchhub.PatchhubError, match="not this repository's base"):
        served_adapter(Named(place, "HEAD"), str(other), tmp_path)
    assert not (tmp_path / "served").exists()


def test_a_fine_tune_of_everything_is_refused(tmp_path: Path) -> None:
    base = model_folder(tmp_path / "base", "llama")
    tuned_everywhere(base, tmp_path / "tuned")
    with model_store(tmp_path / "store", base) as repository:
        imported(repository, tmp_path / "tuned")
    with pytest.raises(RepositoryError, match=r"holds more than linear weights"):
        served_adapter(Named(str(tmp_path / "store"), "HEAD"), str(base), tmp_path / "cache")


def test_routed_experts_are_refused(tmp_path: Path) -> None:
    base = model_folder(tmp_path / "base", "mixtral")
    repository = model_store(tmp_path / "store", base, range(2))
    with pytest.raises(UnsupportedModelError, match="routed experts"):
        served_adapter(Named(str(repository.root), "HEAD"), str(base), tmp_path)


# --- vLLM's own code ------------------------------------------------------------------------------------------------


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Any:
    """vLLM's registry of resolvers, as it was afterwards."""
    monkeypatch.setenv("VLLM_CONFIGURE_LOGGING", "0")
    found = pytest.importorskip("vllm.lora.resolver", reason="vLLM is not here").LoRAResolverRegistry
    monkeypatch.setattr(found, "resolvers", {})
    return found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_vllm_resolves_a_revision_and_reads_its_adapter(
    served: tuple[Store, Path], tmp_path: Path, registry: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository, base = served
    plugin.register()
    assert not registry.get_supported_resolvers()  # nobody said what may be served
    monkeypatch.setenv(plugin.PLACES, str(repository.root))
    monkeypatch.setenv("PATCHHUB_CACHE", str(tmp_path))
    plugin.register()
    plugin.register()
    resolver = registry.get_resolver(plugin.NAME)
    name = f"{repository.root}@v1.2"
    request = asyncio.run(resolver.resolve_lora(str(base), name))
    assert (request.lora_name, os.path.isdir(request.lora_path)) == (name, True)
    assert request.lora_int_id > 0
    assert asyncio.run(resolver.resolve_lora(str(base), "user/facts")) is None
    with pytest.raises(ValueError, match=r"is not served: .*v9"):
        asyncio.run(resolver.resolve_lora(str(base), f"{repository.root}@v9"))

    helper = pytest.importorskip("vllm.lora.peft_helper", reason="vLLM's dependencies are not here").PEFTHelper
    config = pytest.importorskip("vllm.config.lora").LoRAConfig
    read = helper.from_local_dir(request.lora_path, max_position_embeddings=None)
    read.validate_legal(config(max_lora_rank=8))
    assert read.get_rank_and_scaling("model.layers.1.mlp.down_proj") == (8, 1.0)
    with pytest.raises(ValueError, match="greater than max_lora_rank"):
        helper.from_dict({"r": 16, "lora_alpha": 16, "target_modules": ["down_proj"]}).validate_legal(
            config(max_lora_rank=8)
        )
