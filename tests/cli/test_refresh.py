"""`refresh`: on the shipped model, facts recorded again on another state, and on the first one again."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load

import patchhub
from patchhub.store.repository import Repository
from tests.cli.conftest import FACTS, Run
from tests.cli.test_verbs import commit, held


def columns(folder: Path, patch: str) -> dict[str, np.ndarray]:
    """The tensors of a patch with its rows in order of request id."""
    with Repository.open(folder) as repository:
        found = repository.patch(patch)
        order = np.argsort(found.requests)
        return {name: array[order] for name, array in load(repository.objects.get(found.tensors)).items()}


def newest_patch(folder: Path) -> str:
    with Repository.open(folder) as repository:
        (patch,) = {patch for patch, _ in repository.commit(str(repository.head[1])).added}
        return patch


def test_what_a_merge_brought_is_recorded_on_the_other_side_and_back_again(run: Run, store: Path) -> None:
    run("switch", "-c", "side", "base")
    second = FACTS[10:16]
    first = str(commit(run, second, "on the base")["patches"][0])
    run("switch", "main")
    done = json.loads(run("merge", "side", "--refresh", "--json").stdout)
    assert done["outcome"] == "merged"
    assert len(done["refreshed"]["facts"]) == len(second)
    assert done["refreshed"]["proof"] < 1e-4
    assert done["refreshed"]["left"] == 0
    assert "refreshed" not in json.loads(run("merge", "side", "--refresh", "--json").stdout)
    model = patchhub.load(store)
    assert held(model, FACTS[:10]) >= 9
    assert held(model, second) >= len(second) - 1
    on_ours = newest_patch(store)
    assert any(not np.allclose(a, columns(store, first)[name]) for name, a in columns(store, on_ours).items())
    assert "nothing of HEAD is due" in run("refresh", code=5).stderr

    reverted = json.loads(run("revert", "HEAD~1^1", "--json").stdout)  # the first ten facts
    assert reverted["stale"] == len(second)
    run("refresh")
    for name, array in columns(store, newest_patch(store)).items():
        np.testing.assert_allclose(array, columns(store, first)[name], rtol=1e-3, atol=1e-4, err_msg=name)
    assert json.loads(run("status", "--json").stdout)["active"] == len(second)

    reverted = json.loads(
        run("revert", "side", "--json").stdout
    )  # finds its facts although they were recorded again, twice
    assert len(reverted["removed"]) == len(second)
    assert reverted["skipped"] == []
    assert json.loads(run("status", "--json").stdout)["active"] == 0
    assert "sound" in run("fsck").stdout
