"""`metric` and `tune` as a user runs them, on the shipped model."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import patchhub
from patchhub.delta import to_dense
from patchhub.editing.metric import Covariance, MetricCache, NullSpace, second_moments
from patchhub.errors import RepositoryError
from patchhub.models.architectures import describe, read_config
from patchhub.models.tracing import Stack
from patchhub.objects import Metric, Text
from patchhub.porcelain.metric import import_metric
from patchhub.sets.columns import read_state
from patchhub.store.store import Store
from patchhub.worktree.metric import measured_part
from tests.cli.conftest import FACTS, MODEL, invoke

WEIGHT = "model.layers.{}.mlp.down_proj.weight"


def new_store(folder: Path) -> Path:
    invoke(folder, "init", str(MODEL))
    invoke(folder, "config", "metric.tokens", "3000")
    return folder


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store without commits whose metric is computed for layers 1 to 3, from less text than by default."""
    folder = tmp_path_factory.mktemp("empty")
    new_store(folder)
    invoke(folder, "metric", "compute")
    return folder


@pytest.fixture
def empty(empty_store: Path, tmp_path: Path) -> Path:
    shutil.copytree(empty_store, tmp_path / "empty")
    return tmp_path / "empty"


def shown(folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(invoke(folder, "metric", "--json").stdout)
    return document


def factor(folder: Path, layer: int, name: str = "factor") -> np.ndarray:
    with Store.open(folder) as repository:
        cache = MetricCache(
            repository.cache, shown(folder)["id"], {"factor": Covariance(), "complement": NullSpace(1, 1)}[name]
        )
        return np.load(str(cache.path(WEIGHT.format(layer))))


def commit_of(folder: Path, *options: str) -> dict[str, Any]:
    """Three facts, whatever the guard says of a metric from so little text."""
    lines = "\n".join(json.dumps(fact) for fact in FACTS[:3])
    result = invoke(folder, "commit", "-", "-m", "x", "--json", "--force", *options, stdin=lines)
    document: dict[str, Any] = json.loads(result.stdout)
    return document


QUICK = ("--set", "steps=2", "--set", "repairs=0")
"""Of commits whose facts need not hold."""


def moments_of(folder: Path) -> tuple[dict[int, torch.Tensor], int]:
    """The second moments of the shipped model on the text that a store's metric was sampled from."""
    with Store.open(folder) as repository:
        metric = Metric.from_json(repository.objects.get(shown(folder)["id"]))
        documents = measured_part(Text.from_json(repository.objects.get(str(metric.text))).token_ids, metric)
    stack = Stack(patchhub.load(folder, "base", dtype=torch.float32), describe(read_config(MODEL)))
    return second_moments(stack, [1, 2, 3], documents), metric.tokens


def write_published(folder: Path, moments: dict[int, torch.Tensor], tokens: int) -> None:
    folder.mkdir()
    for layer, moment in moments.items():
        name = WEIGHT.format(layer).removesuffix(".weight")
        state = {"mom2.mom2": (moment * tokens).numpy(), "mom2.count": tokens, "mom2.constructor": "SecondMoment()"}
        np.savez(folder / f"{name}_float32_mom2_100000.npz", **state)


# --- show and compute


def test_before_anything_is_computed_the_plan_is_shown(tmp_path: Path) -> None:
    invoke(tmp_path, "init", str(MODEL))
    assert "No metric yet" in invoke(tmp_path, "metric").stdout
    assert shown(tmp_path)["settings"] == {"epsilon": 0.01}
    invoke(tmp_path, "metric", "export", str(tmp_path / "m"), code=6)


def test_the_first_commit_uses_what_was_computed(empty: Path) -> None:
    before = shown(empty)
    assert list(before["weights"]) == [WEIGHT.format(layer) for layer in (1, 2, 3)]
    assert not before["used"]
    assert "can still be replaced" in invoke(empty, "metric").stdout
    commit_of(empty, *QUICK)
    after = shown(empty)
    assert (after["id"], after["weights"], after["used"]) == (before["id"], before["weights"], True)


def test_small_memory_gives_the_same_factors_in_more_passes(empty: Path, tmp_path: Path) -> None:
    new_store(tmp_path)
    invoke(tmp_path, "metric", "compute", "--memory", "0.001GB")
    assert shown(tmp_path)["id"] == shown(empty)["id"]
    for layer in (1, 2, 3):
        ours, theirs = (found @ found.T for found in (factor(empty, layer), factor(tmp_path, layer)))
        assert np.linalg.norm(ours - theirs) < 1e-5 * np.linalg.norm(ours)


def test_settings_make_another_metric_until_facts_are_recorded(empty: Path) -> None:
    first = shown(empty)["id"]
    invoke(empty, "config", "metric.epsilon", "0.1")
    assert shown(empty)["id"] is None
    invoke(empty, "metric", "compute")
    second = shown(empty)
    assert second["id"] != first
    assert second["settings"] == {"epsilon": 0.1}
    commit_of(empty, *QUICK)
    assert "fixed" in invoke(empty, "config", "metric.epsilon", "0.2", code=6).stderr
    assert "fixed" in invoke(empty, "config", "metric.kind", "null_space", code=6).stderr
    invoke(empty, "undo")
    assert "fixed" in invoke(empty, "config", "metric.epsilon", "0.2", code=6).stderr


def test_text_of_ones_own_replaces_the_metric_until_facts_are_recorded(empty: Path) -> None:
    text = empty / "text.txt"
    text.write_text("\n".join(fact["prompt"].replace("{}", fact["subject"]) for fact in FACTS), encoding="utf-8")
    before = shown(empty)["id"]
    invoke(empty, "metric", "compute", "--text", str(text))
    assert shown(empty)["source"]["kind"] == "file"
    assert shown(empty)["id"] != before
    commit_of(empty, *QUICK)
    invoke(empty, "metric", "compute", "--text", str(text))
    text.write_text("Something else.\n", encoding="utf-8")
    assert "one metric" in invoke(empty, "metric", "compute", "--text", str(text), code=6).stderr


@pytest.mark.parametrize("name", ["text.jsonl", "text.json"])
def test_text_files_are_read_as_their_format_says(empty: Path, name: str) -> None:
    text, texts = empty / name, ["One line\u2028and more.", "Another\u0085line.", *(fact["prompt"] for fact in FACTS)]
    lines = [json.dumps({"text": line}, ensure_ascii=False) for line in texts]
    text.write_text("\n".join(lines) if name.endswith("l") else f"[{','.join(lines)}]", encoding="utf-8")
    invoke(empty, "metric", "compute", "--text", str(text))
    text.write_text("5", encoding="utf-8")
    assert "not a list of texts" in invoke(empty, "metric", "compute", "--text", str(text), code=3).stderr


def test_layers_that_are_added_later_are_those_of_the_unpatched_base(empty: Path, tmp_path: Path) -> None:
    """Computed after commits, by `metric compute` and by a commit that edits a layer above the earlier ones."""
    other = tmp_path / "other"
    shutil.copytree(empty, other)
    invoke(other, "metric", "compute", "--layers", "4,5")
    commit_of(empty, *QUICK)
    invoke(empty, "metric", "compute", "--layers", "4")
    assert np.array_equal(factor(empty, 4), factor(other, 4))
    fact = json.dumps(FACTS[12])
    invoke(empty, "commit", "-", "-m", "x", "--force", "--set", "layers=3-5", *QUICK, stdin=fact)
    assert np.array_equal(factor(empty, 5), factor(other, 5))


def test_layers_that_are_not_there_are_refused(empty: Path) -> None:
    assert "layer 9 does not exist" in invoke(empty, "metric", "compute", "--layers", "9", code=2).stderr
    assert "3-5" in invoke(empty, "metric", "compute", "--layers", "x", code=2).stderr


# --- the null space


def test_a_null_space_metric_writes_facts_and_leaves_the_texts_directions_alone(tmp_path: Path) -> None:
    new_store(tmp_path)
    for key, value in (("metric.kind", "null_space"), ("metric.threshold", "0.01"), ("metric.l2", "2")):
        invoke(tmp_path, "config", key, value)
    done = commit_of(tmp_path)
    assert done["held"] == 3
    found = shown(tmp_path)
    assert found["settings"] == {"l2": 2.0, "threshold": 0.01}
    for layer in (1, 2, 3):
        assert found["protected"][WEIGHT.format(layer)] == factor(tmp_path, layer, "complement").shape[1]
    with Store.open(tmp_path) as repository:
        state = read_state(repository, done["commit"])
        (patch,) = {patch for patch, _ in repository.active(done["commit"])}
        assert repository.patch(patch).settings["ridge"] == 1.0
    for layer in (1, 2, 3):
        (delta,) = state[WEIGHT.format(layer)]
        change, protected = to_dense(delta), factor(tmp_path, layer, "complement")
        assert np.linalg.norm(change @ protected) < 1e-4 * np.linalg.norm(change)


# --- sharing


def test_a_metric_travels_between_stores_of_one_base(empty: Path, tmp_path: Path) -> None:
    file, other = tmp_path / "metric.zip", tmp_path / "other"
    digest = json.loads(invoke(empty, "metric", "export", str(file), "--json").stdout)["sha256"]
    again = json.loads(invoke(empty, "metric", "export", str(tmp_path / "again.zip"), "--json").stdout)["sha256"]
    assert digest == again
    assert "exists already" in invoke(empty, "metric", "export", str(file), code=6).stderr
    invoke(other, "init", str(MODEL))
    invoke(other, "metric", "import", str(file))
    assert shown(other) == shown(empty)
    for layer in (1, 2, 3):
        assert np.array_equal(factor(other, layer), factor(empty, layer))
    assert commit_of(other, *QUICK)["patches"] == commit_of(empty, *QUICK)["patches"]
    invoke(other, "metric", "compute", "--layers", "4")  # the text travelled too


def test_a_metric_of_another_kind_or_base_is_refused(empty: Path, store: Path, tmp_path: Path) -> None:
    invoke(empty, "config", "metric.epsilon", "0.1")
    invoke(empty, "metric", "compute")
    file = tmp_path / "metric.zip"
    invoke(empty, "metric", "export", str(file))
    assert "recorded with metric" in invoke(store, "metric", "import", str(file), code=6).stderr
    changed = tmp_path / "changed"
    shutil.copytree(MODEL, changed)
    weights = next(changed.glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    other = tmp_path / "other"
    invoke(other, "init", str(changed))
    assert "is the metric of base" in invoke(other, "metric", "import", str(file), code=6).stderr


def rewritten(source: Path, target: Path, change: Any) -> Path:
    """A metric file with its members passed through ``change(name, bytes) -> bytes or None``."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            data = change(name, old.read(name))
            if data is not None:
                new.writestr(name, data)
    return target


def test_a_damaged_metric_file_changes_nothing(empty: Path, tmp_path: Path) -> None:
    file, other = tmp_path / "metric.zip", tmp_path / "other"
    invoke(empty, "metric", "export", str(file))
    invoke(other, "init", str(MODEL))

    def flipped(part: str) -> Any:
        return lambda name, data: data[:-1] + bytes([data[-1] ^ 1]) if part in name else data

    damages = {
        "bit": flipped("layers.2"),
        "text": flipped("text"),
        "manifest": flipped("metric.json"),
        "missing": lambda name, data: None if "layers.3" in name else data,
        "foreign": lambda name, data: data.replace(b"layers.1", b"layers.9") if name == "metric.json" else data,
    }
    for name, change in damages.items():
        path = rewritten(file, tmp_path / f"{name}.zip", change)
        invoke(other, "metric", "import", str(path), code=2 if name == "none" else 7)
        assert shown(other)["id"] is None
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(tmp_path / "packed.zip", "w") as new:
        for name in old.namelist():
            packed = zipfile.ZIP_DEFLATED if name == "text.json" else zipfile.ZIP_STORED
            new.writestr(name, old.read(name), compress_type=packed)
    assert "text.json is compressed" in invoke(other, "metric", "import", str(tmp_path / "packed.zip"), code=7).stderr
    locked = bytearray(file.read_bytes())
    locked[locked.rindex(b"PK\x01\x02") + 8] |= 1  # the flag of the last member in the directory
    (tmp_path / "locked.zip").write_bytes(locked)
    assert "encrypted" in invoke(other, "metric", "import", str(tmp_path / "locked.zip"), code=7).stderr
    with Store.open(other) as repository, pytest.raises(RepositoryError, match="cannot be read"):
        import_metric(repository, tmp_path / "vanished.zip")
    assert shown(other)["id"] is None
    (tmp_path / "cut.zip").write_bytes(file.read_bytes()[:2000])
    assert invoke(other, "metric", "import", str(tmp_path / "cut.zip"), code=2).stderr


def test_moments_of_the_published_editors_make_the_same_factors(empty: Path, tmp_path: Path) -> None:
    moments, tokens = moments_of(empty)
    stats, other = tmp_path / "stats", tmp_path / "other"
    write_published(stats, moments, tokens)
    invoke(other, "init", str(MODEL))
    invoke(other, "metric", "import", str(stats))
    found = shown(other)
    assert (found["source"]["kind"], found["tokens"], found["contexts"]) == ("imported", tokens, 6)
    for layer in (1, 2, 3):
        ours, theirs = (found @ found.T for found in (factor(empty, layer), factor(other, layer)))
        assert np.linalg.norm(ours - theirs) < 1e-5 * np.linalg.norm(ours)
    assert commit_of(other)["held"] == 3
    assert "layers.4" in invoke(other, "metric", "compute", "--layers", "4", code=6).stderr
    files = sorted(map(str, stats.iterdir()))
    third = tmp_path / "third"
    invoke(third, "init", str(MODEL))
    renamed = tmp_path / "renamed.npz"
    shutil.copy(files[0], renamed)
    assert "does not say which weight" in invoke(third, "metric", "import", str(renamed), code=2).stderr
    invoke(third, "metric", "import", f"1={renamed}", *files[1:])
    assert shown(third)["id"] == found["id"]
    assert "second file for one weight" in invoke(third, "metric", "import", f"1={renamed}", *files, code=2).stderr


# --- tune


@pytest.mark.slow
@pytest.mark.long
def test_tune_writes_what_is_better_and_only_then(empty: Path, tmp_path: Path) -> None:
    facts = tmp_path / "facts.json"
    facts.write_text(json.dumps(FACTS[:5]), encoding="utf-8")
    dry = json.loads(invoke(empty, "tune", str(facts), "--dry-run", "--json").stdout)
    assert dry["written"] == {}
    assert json.loads(invoke(empty, "config", "--json").stdout).keys() == {"base.path", "metric.tokens"}
    present, best = dry["trials"][dry["present"]], dry["trials"][0]
    assert present["facts"] == best["facts"] == dry["facts"] == 5
    assert present["layers"] == [1, 2, 3]
    assert best["score"] >= present["score"]
    result = invoke(empty, "tune", str(facts))
    assert "as it is" in result.stdout
    written = json.loads(invoke(empty, "config", "--json").stdout)
    wanted = {f"memit.{name}": best[name] for name in ("layers", "learning_rate", "ridge")}
    if best["score"] > present["score"]:
        assert written.items() >= {key: v for key, v in wanted.items() if v != present[key[6:]]}.items()
        commit_of(empty)
        with Store.open(empty) as repository:
            (patch,) = {patch for patch, _ in repository.active(repository.head[1])}
            assert repository.patch(patch).settings["layers"] == best["layers"]
    else:
        assert written.keys() == {"base.path", "metric.tokens"}


@pytest.mark.slow
def test_tune_holds_facts_back_where_they_bring_no_neighbours(empty: Path) -> None:
    bare = [{name: fact[name] for name in ("prompt", "subject", "target_new")} for fact in FACTS[:3]]
    lines = "\n".join(map(json.dumps, bare))
    found = json.loads(invoke(empty, "tune", "-", "--dry-run", "--method", "pmet", "--json", stdin=lines).stdout)
    assert (found["facts"], found["held_back"], found["method"]) == (2, 1, "pmet")
    assert all(trial["marks"]["paraphrase"] is None for trial in found["trials"])
    assert all(trial["marks"]["neighborhood"] is not None for trial in found["trials"])


def test_tune_refuses_what_it_cannot_use(empty: Path) -> None:
    assert "does not know" in invoke(empty, "tune", "-", "--method", "wise", code=2, stdin=json.dumps(FACTS[0])).stderr
    invoke(empty, "tune", "-", code=3, stdin="")
