"""`refresh`: on the shipped model, facts recorded again on another state, and on the first one again; and what the guard says of it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load, save
from transformers import AutoTokenizer

import patchhub
from patchhub.evaluation.guard import Report
from patchhub.evaluation.metrics import score_targets
from patchhub.sets.commits import Draft
from patchhub.store.store import Store
from patchhub.text.tokens import Chat
from patchhub.who import Who
from tests.cli.conftest import FACTS, MODEL, Run, invoke
from tests.cli.test_verbs import commit, held
from tests.porcelain.synthetic import write


def columns(folder: Path, patch: str) -> dict[str, np.ndarray]:
    """The tensors of a patch with its rows in order of request id."""
    with Store.open(folder) as repository:
        found = repository.patch(patch)
        order = np.argsort(found.requests)
        tensors = load(repository.objects.get(found.tensors))
        return {name: array[order].astype(np.float32) for name, array in tensors.items()}


def newest_patch(folder: Path) -> str:
    with Store.open(folder) as repository:
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
        before = columns(store, first)[name]  # the same but for a rounding of float16 here and there
        assert np.linalg.norm(array - before) < 1e-3 * np.linalg.norm(before), name
    assert json.loads(run("status", "--json").stdout)["active"] == len(second)

    reverted = json.loads(
        run("revert", "side", "--json").stdout
    )  # finds its facts although they were recorded again, twice
    assert len(reverted["removed"]) == len(second)
    assert reverted["skipped"] == []
    assert json.loads(run("status", "--json").stdout)["active"] == 0
    assert "sound" in run("fsck").stdout


# --- the guard ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def branched(first_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """On main, with three other facts on the branch side; none of the two has the other's."""
    folder = Path(shutil.copytree(first_store, tmp_path_factory.mktemp("branched") / "store"))
    run: Run = partial(invoke, folder)
    run("switch", "-c", "side", "base")
    commit(run, FACTS[10:13], "on the base")
    run("switch", "main")
    return folder


@pytest.fixture
def branches(branched: Path, store: Path) -> Run:
    shutil.rmtree(store)
    shutil.copytree(branched, store)
    return partial(invoke, store)


def report_at(folder: Path) -> Report:
    with Store.open(folder) as repository:
        report = Report.from_json(repository.commit(str(repository.head[1])).check)
    assert report is not None
    return report


def spoil(folder: Path, factor: float) -> None:
    """Multiply the targets that the patch at HEAD keeps; its columns are as they were."""
    with Store.open(folder) as repository:
        _, head = repository.head
        found = repository.commit(str(head))
        patch = repository.patch(newest_patch(folder))
        tensors = load(repository.objects.get(patch.tensors))
        tensors["z"] *= np.float32(factor)
        spoilt = replace(patch, tensors=repository.objects.put(save(tensors)))
        repository.objects.put(spoilt.to_json())
        draft = Draft((str(head),), spoilt.elements, found.metric, "commit", {})
        write(repository, draft, Who(found.author, found.time, "other targets"))


def test_a_refresh_is_judged_by_the_model_and_brings_no_new_facts(branches: Run, store: Path) -> None:
    branches("merge", "side")
    branches("refresh")
    found = report_at(store).measured
    assert found.drift is not None
    assert found.own is not None
    assert found.earlier is not None
    assert (found.own.of, found.active, found.facts) == (0, 13, 0)
    assert found.earlier.of >= 12
    assert found.earlier.count == 0
    assert found.unmet is not None
    assert found.unmet.of == 3
    shown = branches("show").stdout
    assert "guard: passed" in shown
    assert "earlier facts that were read and held are lost (13 active)" in shown
    assert "new facts are the model's answer" not in shown


def test_a_refresh_that_breaks_the_model_is_refused_and_the_merge_before_it_stays(branches: Run, store: Path) -> None:
    branches("switch", "side")
    spoil(store, 100.0)
    branches("switch", "main")
    refused = branches("merge", "side", "--refresh", code=10)
    assert "merges the two; to refresh it failed" in refused.stderr
    assert "on text that has nothing to do with the facts" in refused.stderr
    assert "Leave the facts as they are recorded now; --force" in refused.stderr
    merged = json.loads(branches("status", "--json").stdout)["head"]
    assert (merged["message"], merged["active"]) == ("Merge branch 'side'", 13)
    error = json.loads(branches("refresh", "--json", code=10).stderr.splitlines()[-1])["error"]
    assert (error["kind"], error["facts"]["findings"][0]["check"]) == ("GuardError", "drift")
    assert json.loads(branches("status", "--json").stdout)["head"] == merged
    branches("refresh", "--force")
    report = report_at(store)
    assert report.forced
    assert report.failed
    assert json.loads(branches("fsck", "--json").stdout)["sound"]


@pytest.mark.parametrize("changed", [{"ridge": None}, {"layers": [0]}])
def test_settings_that_do_not_say_how_to_record_are_refused(
    changed: dict[str, object], branches: Run, store: Path
) -> None:
    """A patch of another store may have such settings."""
    branches("switch", "side")
    with Store.open(store) as repository:
        _, head = repository.head
        found = repository.commit(str(head))
        patch = repository.patch(newest_patch(store))
        settings = {key: value for key, value in {**patch.settings, **changed}.items() if value is not None}
        foreign = replace(patch, settings=settings)
        repository.objects.put(foreign.to_json())
        draft = Draft((str(head),), foreign.elements, found.metric, "commit", {})
        write(repository, draft, Who(found.author, found.time, "other settings"))
    branches("switch", "main")
    branches("merge", "side")
    assert "its settings do not say how" in branches("refresh", code=6).stderr


def test_merge_hands_its_force_on_to_the_refresh(branches: Run, store: Path) -> None:
    branches("switch", "side")
    spoil(store, 100.0)
    branches("switch", "main")
    assert "3 facts recorded again" in branches("merge", "side", "--refresh", "--force").stdout
    assert report_at(store).failed


@pytest.mark.slow
def test_facts_of_a_chat_are_asked_in_it(tmp_path: Path) -> None:
    """In front of so odd a text the small model answers otherwise than without it."""
    model = tmp_path / "model"
    shutil.copytree(MODEL, model)
    before, after = "<|endoftext|>Long ago in a village by the sea there was a question, and it was this one: ", " - "
    template = (
        f"{{% for m in messages %}}{{{{ ('{before}' if m.role == 'user' else '{after}') + m.content }}}}{{% endfor %}}"
    )
    (model / "chat_template.jinja").write_text(template, encoding="utf-8")
    by = ("--author", "Ada <ada@example.org>")
    invoke(tmp_path, "init", str(model), *by)
    for number, facts in enumerate((FACTS[:1], FACTS[5:10])):
        file = tmp_path / f"{number}.json"
        file.write_text(json.dumps(facts), encoding="utf-8")
        invoke(tmp_path, "commit", str(file), "-m", "in a chat", "--chat", "--force", *by)  # that few hold is the point
    invoke(tmp_path, "revert", "HEAD~1", *by)
    invoke(tmp_path, "refresh", *by)
    tokenizer = AutoTokenizer.from_pretrained(model)
    asked = [(fact["prompt"].format(fact["subject"]), fact["target_new"]) for fact in FACTS[5:10]]
    plain, inside = (
        sum(score.argmax_right for score in score_targets(patchhub.load(tmp_path), tokenizer, asked, chat=chat))
        for chat in (None, Chat(before, after))
    )
    found = report_at(tmp_path).measured.earlier
    assert found is not None
    assert found.of - found.count == inside != plain
