"""States with shards on a remote: what travels, what is refused, and loading them from the Hub without a store."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import patchhub
from patchhub.errors import PatchhubError
from patchhub.models.checkpoint import open_checkpoint
from patchhub.objects import Patch, set_digest
from patchhub.porcelain import share as verbs
from patchhub.porcelain.share import Access, Chosen, remote_add
from patchhub.progress import Silent
from patchhub.runtime.patched_model import load_patched
from patchhub.runtime.routing import routed
from patchhub.sets.shards import shards_at
from patchhub.store.store import Store
from patchhub.who import Who
from patchhub.worktree.loading import open_published
from patchhub.worktree.opening import state_at
from tests.export.models import load_base, logits, model_folder, model_store
from tests.porcelain.handmade_shards import commit_shard
from tests.remotes.conftest import TOKEN
from tests.remotes.stores import AUTHOR, TIME, make_request, move
from tests.remotes.test_hub import tree_of


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return model_folder(tmp_path / "base", "gpt2")


@pytest.fixture
def store(base: Path, tmp_path: Path, hub: Any, monkeypatch: pytest.MonkeyPatch) -> Store:
    """Columns, then a shard that is continued once, pushed to ``tester/facts``; every query is answered by the shard."""
    from huggingface_hub import constants, hf_api

    template = hub.url + constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants.ENDPOINT)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(hf_api.api, "endpoint", hub.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    repository = model_store(tmp_path / "store", base, range(3))
    first = commit_shard(repository, [make_request(10)], threshold=0.0)
    move(repository, {"refs/tags/v1": (None, str(repository.head[1]))})
    commit_shard(repository, [make_request(11)], follows=first.id, threshold=0.0)
    remote_add(repository, "origin", "hf://tester/facts")
    push(repository, hub)
    return repository


def push(repository: Store, hub: Any) -> Silent:
    progress = Silent()
    access = Access(hub.url, TOKEN)
    verbs.push(repository, "origin", Chosen(everything=True), progress, who=Who(AUTHOR, TIME), access=access)
    return progress


def test_the_hub_copy_routes_like_the_store(store: Store, base: Path) -> None:
    for revision in ("main", "v1"):
        for mode in ("retrieve", "merge"):
            expected = load_patched(open_checkpoint(base), state_at(store, revision, mode))
            loaded = patchhub.load("tester/facts", revision, base=base, wise=mode)
            assert [memory.name for memory in routed(loaded)] == list(shards_at(store, store.resolve(revision)))
            assert torch.equal(logits(loaded), logits(expected))
    assert not torch.equal(logits(patchhub.load("tester/facts", "main", base=base)), logits(loaded))
    assert not torch.equal(logits(load_base(base)), logits(loaded))


def test_of_the_shards_only_the_active_one_is_read(store: Store, base: Path, hub: Any) -> None:
    hub.log.clear()
    open_published("tester/facts", "main", base=base)
    ((_, now),) = shards_at(store, store.head[1]).items()
    ((_, then),) = shards_at(store, store.resolve("v1")).items()
    asked = "".join(entry["line"] for entry in hub.log)
    assert now.tensors[2:] in asked
    for unneeded in (then.tensors, then.id, now.requests_blob, then.requests_blob):
        assert unneeded[2:] not in asked


def test_there_is_no_adapter_and_the_card_says_why(store: Store, hub: Any) -> None:
    tree = tree_of(hub)
    assert "adapter_config.json" not in tree
    card = (hub.root / "blobs" / tree["README.md"]["oid"]).read_text()
    assert "routes queries to a side memory" in card
    assert "5 facts" in card
    move(store, {"refs/heads/side": (None, str(store.head[1]))})
    assert any("side memory" in warning for warning in push(store, hub).warnings)


@pytest.mark.parametrize(
    "change",
    [
        {"weights": {"transformer.h.0.mlp.c_proj.weight": (3, 3)}},
        {"weights": {"lm_head.weight": (32, 128)}},
        {"settings": {}},
        {"requests": (), "settings": {"number": 0}},
    ],
)
def test_what_is_no_shard_does_not_get_in(change: dict[str, Any], store: Store, base: Path, tmp_path: Path) -> None:
    """A commit that brings a shard whose patch is wrong is refused on the way in, and nothing moves."""
    ((identity, patch),) = shards_at(store, store.head[1]).items()
    broken: Patch = replace(patch, **change)
    wrong = store.objects.put(broken.to_json())
    head = str(store.head[1])
    elements = (store.active(head) - {(identity, None)}) | {(wrong, None)}
    commit = replace(
        store.commit(head),
        parents=(head,),
        added=frozenset({(wrong, None)}),
        removed=frozenset({(identity, None)}),
        keyframe=None,
        set_digest=set_digest(elements),
    )
    remote, clone = tmp_path / "remote", tmp_path / "clone"
    store.record(commit, command="commit", arguments={}, author=AUTHOR, time=TIME)
    remote_add(store, "folder", f"file://{remote}")
    verbs.push(store, "folder", verbs.CURRENT, Silent(), who=Who(AUTHOR, TIME))
    with pytest.raises(PatchhubError, match=r"shard|weight|refused"):
        verbs.clone(f"file://{remote}", clone, Silent(), who=Who(AUTHOR, TIME), base=str(base))
    assert not clone.exists()
