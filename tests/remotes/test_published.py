"""A pushed repository for those who only load it: with patchhub, offline, and with PEFT, which knows nothing of patchhub."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, ModelCard

import patchhub
from patchhub.delta import Dense, read_deltas, to_dense, write_deltas
from patchhub.errors import PatchhubError, RemoteError, RevisionError
from patchhub.models.checkpoint import open_checkpoint
from patchhub.porcelain import share as verbs
from patchhub.porcelain.share import Access, Chosen, remote_add
from patchhub.progress import Silent
from patchhub.remotes.hub import HubRemote
from patchhub.remotes.hub_files import HubFiles
from patchhub.remotes.sync import Manner
from patchhub.repository.vllm import Named, served_adapter
from patchhub.runtime.patched_model import load_patched
from patchhub.sets import commits
from patchhub.sets.columns import weight_shapes
from patchhub.store.store import Store
from patchhub.who import Who
from patchhub.worktree.loading import hub_name, open_published
from patchhub.worktree.opening import state_at
from tests.export.models import distance, load_base, logits, model_folder, model_store
from tests.remotes.conftest import TOKEN
from tests.remotes.stores import AUTHOR, TIME, add_batch, content, make_store, move, switch
from tests.remotes.test_hub import tree_of

OLD_WAY = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT asks transformers so


@pytest.fixture(params=["gpt2", "llama"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return model_folder(tmp_path / "base", request.param)


@pytest.fixture
def deltas_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commits keep their deltas, as all did once, and as those of many facts, of experts and on top of imported changes do."""
    monkeypatch.setattr(commits, "WORTH_KEEPING", 1 << 40)


@pytest.fixture
def deltas_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commits keep no delta however small it is."""
    monkeypatch.setattr(commits, "WORTH_KEEPING", 0)


@pytest.fixture
def store(base: Path, tmp_path: Path, hub: Any, monkeypatch: pytest.MonkeyPatch) -> Store:
    """Three commits on two branches about a tiny model, pushed to ``tester/facts`` of the loopback Hub."""
    from huggingface_hub import constants, hf_api

    template = hub.url + constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants.ENDPOINT)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(hf_api.api, "endpoint", hub.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    repository = model_store(tmp_path / "store", base, range(3), range(3, 6))
    first = repository.commit(str(repository.head[1])).parents[0]
    move(repository, {"refs/heads/side": (None, first), "refs/tags/v1": (None, first)})
    switch(repository, "side")
    add_batch(repository, range(6, 8))
    switch(repository, "main")
    remote_add(repository, "origin", "hf://tester/facts")
    push(repository, hub, everything=True)
    return repository


def push(repository: Store, hub: Any, *, everything: bool = False, private_facts: bool | None = None) -> None:
    chosen, manner, access = Chosen(everything=everything), Manner(private_facts), Access(hub.url, TOKEN)
    verbs.push(repository, "origin", chosen, Silent(), who=Who(AUTHOR, TIME), manner=manner, access=access)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT asks transformers the old way
@pytest.mark.parametrize("revision", ["main", "side", "v1"])
def test_peft_loads_a_pushed_repository(revision: str, store: Store, base: Path) -> None:
    from peft import PeftModel

    adapted = PeftModel.from_pretrained(load_base(base), "tester/facts", revision=revision).eval()
    expected = logits(load_patched(open_checkpoint(base), state_at(store, revision)))
    assert distance(logits(adapted), expected) < 1e-5
    assert distance(logits(load_base(base)), expected) > 1e-2


def test_load_from_the_hub_and_then_offline(
    store: Store, base: Path, hub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    for revision in ("main", "side", "v1"):
        expected = load_patched(open_checkpoint(base), state_at(store, revision)).state_dict()
        loaded = patchhub.load("tester/facts", revision, base=base).state_dict()
        assert all(bool((loaded[name] == tensor).all()) for name, tensor in expected.items())
    commit = str(store.resolve("main~1"))
    for name in (commit, commit[:12]):
        assert open_published("tester/facts", name, base=base)[1].commit == commit
    named_by_the_hub = HubRemote("tester/facts").view().tips["refs/heads/side"].token
    _, state = open_published("tester/facts", named_by_the_hub, base=base)
    assert state.commit == store.resolve("side")
    hub.stop()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    _, cached = open_published("tester/facts", "main", base=base)
    assert cached.commit == store.resolve("main")
    assert open_published("tester/facts", commit, base=base)[1].commit == commit
    with pytest.raises(PatchhubError):
        open_published("tester/facts", "never-seen", base=base)


def test_load_from_packs_and_then_offline_without_columns_and_texts(
    packing: None, deltas_kept: None, store: Store, base: Path, hub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.log.clear()
    patches = [store.patch(patch) for patch, _ in store.active(store.resolve("main"))]
    view = HubRemote("tester/facts", endpoint=hub.url).view()
    contents = HubFiles("tester/facts", HfApi(endpoint=hub.url)).contents(view.tips["refs/heads/main"].token)
    assert not contents.alone
    unneeded = contents.grouped({one for patch in patches for one in (patch.tensors, patch.requests_blob)})[1]
    assert len(unneeded) >= 2
    test_load_from_the_hub_and_then_offline(store, base, hub, monkeypatch)
    for name in unneeded:
        assert not [entry for entry in hub.log if f"{name}.pack" in entry["line"]]


def test_load_reads_no_columns_and_no_texts(deltas_kept: None, store: Store, base: Path, hub: Any) -> None:
    hub.log.clear()
    open_published("tester/facts", "main", base=base)
    heads = [str(store.resolve(name)) for name in ("main", "main~1")]
    patches = [store.patch(patch) for patch, _ in store.active(heads[0])]
    for unneeded in {patch.tensors for patch in patches} | {patch.requests_blob for patch in patches}:
        assert not [entry for entry in hub.log if unneeded[2:] in entry["line"]]


@pytest.mark.usefixtures("deltas_left_out")
def test_load_solves_what_keeps_no_delta_from_the_columns_of_active_facts_alone(
    store: Store, base: Path, hub: Any
) -> None:
    old, new = (store.commit(str(store.resolve(name))) for name in ("main~1", "main"))
    assert [(c.solved, c.tensors) for c in (old, new)] == [(True, None)] * 2
    kept = store.active(str(store.resolve("main"))) - store.active(str(store.resolve("main~1")))
    prepared = commits.prepare(
        store, commits.Draft((str(store.resolve("main")),), kept, new.metric, "revert", {}), Who(AUTHOR, TIME, "back")
    )
    move(store, {"refs/heads/back": (None, store.objects.put(prepared.to_json()))})
    verbs.push(store, "origin", Chosen(("back",)), Silent(), who=Who(AUTHOR, TIME), access=Access(hub.url, TOKEN))
    hub.log.clear()
    ours = load_patched(open_checkpoint(base), state_at(store, "back")).state_dict()
    theirs = patchhub.load("tester/facts", "back", base=base).state_dict()
    assert all(bool((theirs[name] == tensor).all()) for name, tensor in ours.items())
    active, gone = ([store.patch(p) for p in {p for p, _ in elements}] for elements in (kept, old.added))
    unneeded = {patch.tensors for patch in gone} | {patch.requests_blob for patch in active + gone}
    asked = [entry["line"] for entry in hub.log]
    assert not [line for line in asked if any(one[2:] in line for one in unneeded)]
    assert all(any(patch.tensors[2:] in line for line in asked) for patch in active)


@pytest.mark.usefixtures("deltas_left_out")
def test_columns_that_a_solved_state_is_made_of_are_checked(store: Store, base: Path, hub: Any) -> None:
    (patch,) = (store.patch(p) for p in {p for p, _ in store.commit(str(store.resolve("v1"))).added})
    hub.faults.append({"kind": "corrupt", "match": f"{patch.tensors[2:]}", "offset": 200, "times": -1})
    with pytest.raises(RemoteError, match="hash"):
        open_published("tester/facts", "v1", base=base)


def test_load_proves_when_it_is_asked_to(deltas_kept: None, store: Store, base: Path, hub: Any) -> None:
    claimed = patchhub.load("tester/facts", base=base)
    assert claimed.patchhub.proof == "claimed"
    proven = patchhub.load("tester/facts", base=base, prove=True)
    assert (proven.patchhub.proof, proven.patchhub.commit) == ("checked", store.resolve("main"))
    assert load_patched(open_checkpoint(base), state_at(store, "main")).patchhub.proof == "checked"
    weights = weight_shapes(store)
    commit = store.commit(str(store.head[1]))
    lying = {
        weight: Dense(2 * to_dense(delta).astype("float32"))
        for weight, delta in read_deltas(store.objects.get(str(commit.tensors)), weights).items()
    }
    other = replace(commit, tensors=store.objects.put(write_deltas(lying)))
    move(store, {"refs/heads/lie": (None, store.objects.put(other.to_json()))})
    verbs.push(store, "origin", Chosen(("lie",)), Silent(), who=Who(AUTHOR, TIME), access=Access(hub.url, TOKEN))
    assert patchhub.load("tester/facts", "lie", base=base).patchhub.proof == "claimed"
    with pytest.raises(RemoteError, match="not those of the facts"):
        patchhub.load("tester/facts", "lie", base=base, prove=True)
    attached = patchhub.attach(claimed, "tester/facts", base=base, prove=True)
    assert attached.patchhub.proof == "checked"
    with pytest.raises(RemoteError, match="not those of the facts"):
        patchhub.attach(attached, "tester/facts", "lie", base=base, prove=True)
    assert (attached.patchhub.proof, attached.patchhub.commit) == ("checked", store.resolve("main"))


def test_load_finds_damage(deltas_kept: None, store: Store, base: Path, hub: Any) -> None:
    hub.faults.append({"kind": "corrupt", "match": "/_cdn/", "offset": 200, "times": 1})
    open_published("tester/facts", "main", base=base)  # fetched once more
    cached = next((hub.root.parent / "hf-cache").glob(f"**/{store.state(store.head[1])[0][2:]}"))
    blob = cached.resolve()
    blob.write_bytes(b"\0" + blob.read_bytes()[1:])
    open_published("tester/facts", "main", base=base)
    hub.faults.append({"kind": "corrupt", "match": "/_cdn/", "offset": 200, "times": -1})
    blob.write_bytes(b"\0" + blob.read_bytes()[1:])
    with pytest.raises(RemoteError, match="hash"):
        open_published("tester/facts", "main", base=base)


def test_load_checks_the_base_and_the_revision(store: Store, base: Path, tmp_path: Path) -> None:
    with pytest.raises(RevisionError, match="no revision"):
        open_published("tester/facts", "nosuch", base=base)
    with pytest.raises(RemoteError, match="does not exist"):
        open_published("tester/nothing", "main", base=base)
    with pytest.raises(PatchhubError, match="does not say where its base is"):
        open_published("tester/facts", "main")
    family = json.loads((base / "config.json").read_text())["model_type"]
    other = model_folder(tmp_path / "other", family, seed=1)
    with pytest.raises(PatchhubError, match="not this repository's base"):
        patchhub.load("tester/facts", base=other)


def test_a_clone_is_a_store_like_any_other(store: Store, base: Path, hub: Any, tmp_path: Path) -> None:
    done = verbs.clone(
        "hf://tester/facts",
        tmp_path / "clone",
        Silent(),
        who=Who(AUTHOR, TIME),
        base=str(base),
        access=Access(hub.url, TOKEN),
    )
    with Store.open(tmp_path / "clone") as clone:
        assert done.commit == store.resolve("main") == clone.head[1]
        assert clone.config.recording == store.config.recording
        for ours_name, name in (("main", "main"), ("side", "origin/side"), ("v1", "v1")):
            commit = str(clone.resolve(name))
            assert commit == store.resolve(ours_name)
            assert content(clone, commit) == content(store, commit)
            ours, theirs = (load_patched(open_checkpoint(base), state_at(r, commit)) for r in (store, clone))
            for tensor, other in zip(ours.parameters(), theirs.parameters(), strict=True):
                assert bool((tensor == other).all())


def test_a_failed_clone_leaves_nothing(store: Store, hub: Any, base: Path, tmp_path: Path) -> None:
    family = json.loads((base / "config.json").read_text())["model_type"]
    other = model_folder(tmp_path / "other", family, seed=1)
    with pytest.raises(RemoteError, match="is not the base"):
        verbs.clone(
            "hf://tester/facts",
            tmp_path / "clone",
            Silent(),
            who=Who(AUTHOR, TIME),
            base=str(other),
            access=Access(hub.url, TOKEN),
        )
    assert not (tmp_path / "clone").exists()


def test_the_page_is_a_model_card(store: Store, hub: Any) -> None:
    card = ModelCard((hub.root / "blobs" / tree_of(hub)["README.md"]["oid"]).read_text())
    assert card.data.library_name == "peft"
    assert "patchhub" in card.data.tags
    assert "Person 4" in card.text
    push(store, hub, private_facts=True)
    add_batch(store, range(8, 9))
    push(store, hub)
    hidden = (hub.root / "blobs" / tree_of(hub)["README.md"]["oid"]).read_text()
    assert "Person" not in hidden
    assert "withheld" in hidden


def test_what_the_owner_wrote_on_the_card_stays(store: Store, hub: Any) -> None:
    api = HfApi(hub.url, token=TOKEN)
    before = (hub.root / "blobs" / tree_of(hub)["README.md"]["oid"]).read_text()
    theirs = before.replace("tags:", "language: en\nlicense: mit\ntags:", 1) + "\n## Contact\n\nWrite to Ada.\n"
    theirs = theirs.replace("<!-- patchhub:begin", "A word before.\n\n<!-- patchhub:begin", 1).replace(
        '["patchhub"', '["mine", "patchhub"'
    )
    api.upload_file(path_or_fileobj=theirs.encode(), path_in_repo="README.md", repo_id="tester/facts")
    verbs.fetch(store, "origin", Silent(), who=Who(AUTHOR, TIME), access=Access(hub.url, TOKEN))
    store.change_config(lambda config: replace(config, settings={**config.settings, "card.title": "Facts of Ada"}))
    add_batch(store, range(300, 302))
    push(store, hub)
    after = (hub.root / "blobs" / tree_of(hub)["README.md"]["oid"]).read_text()
    card = ModelCard(after)
    assert (card.data.language, card.data.license) == ("en", "mit")
    assert {"mine", "patchhub"} <= set(card.data.tags)
    assert after.count("patchhub:begin") == after.count("patchhub:end") == 1
    assert "A word before." in after.split("<!-- patchhub:begin")[0]
    assert after.endswith("## Contact\n\nWrite to Ada.\n")
    assert "# Facts of Ada" in after
    assert "Person 301" in after


def test_a_second_push_costs_what_is_new(store: Store, hub: Any) -> None:
    known = set(store.objects.ids())
    add_batch(store, range(100, 200))
    new = sum(store.objects.path(name).stat().st_size for name in set(store.objects.ids()) - known)
    hub.log.clear()
    push(store, hub)
    adapter = tree_of(hub)["adapter_model.safetensors"]["size"]
    assert sum(entry["in"] for entry in hub.log) <= 1.1 * (new + adapter)


def test_names_of_the_hub() -> None:
    assert hub_name("user/repo") == hub_name("hf://user/repo") == "user/repo"
    assert hub_name("./user/repo") is None
    assert hub_name("/user/repo") is None
    assert hub_name(Path("user/repo")) is None
    assert hub_name("repo") is None


def test_nothing_there_is_said(hub: Any, tmp_path: Path) -> None:
    with make_store(tmp_path / "store") as repository:
        remote_add(repository, "origin", "hf://tester/facts")
        with pytest.raises(RemoteError, match="holds no patchhub store"):
            verbs.fetch(repository, "origin", Silent(), who=Who(AUTHOR, TIME), access=Access(hub.url, TOKEN))


@OLD_WAY
def test_a_tag_of_the_hub_is_served_as_the_adapter_of_its_name(store: Store, base: Path, tmp_path: Path) -> None:
    found = served_adapter(Named("tester/facts", "v1"), str(base), tmp_path / "cache")
    assert found.commit == store.resolve("v1")
    expected = patchhub.load("tester/facts", revision="v1", base=base, dtype=torch.float32)
    from peft import PeftModel

    assert distance(logits(PeftModel.from_pretrained(load_base(base), found.folder)), logits(expected)) < 1e-5
