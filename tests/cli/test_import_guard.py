"""`import` and the guard, on the shipped model: an adapter of ten facts as it is, and with its change multiplied."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from patchhub.evaluation.guard import Report
from patchhub.store.store import Store
from tests.cli.conftest import FACTS, Run


@pytest.fixture
def adapter(run: Run, store: Path, tmp_path: Path) -> Path:
    """The ten facts at HEAD as an adapter, and a branch without them."""
    folder = Path(json.loads(run("export", "peft", "--out", str(tmp_path / "out"), "--json").stdout)["out"])
    run("switch", "-c", "empty", "base")
    return folder


def times(folder: Path, factor: float) -> str:
    """Multiply the change that an adapter makes."""
    file = folder / "adapter_model.safetensors"
    save_file({name: (array * factor if "lora_B" in name else array) for name, array in load_file(file).items()}, file)
    return str(folder)


def report_at(folder: Path) -> Report:
    with Store.open(folder) as repository:
        report = Report.from_json(repository.commit(str(repository.head[1])).check)
    assert report is not None
    return report


def test_a_change_far_larger_than_the_weights_is_refused_from_vectors(run: Run, store: Path, adapter: Path) -> None:
    source = times(adapter, 30)
    refused = run("import", source, code=10).stderr
    assert "guard.spectrum is 50" in refused
    assert "lower lora_alpha" in refused
    assert "Nothing was committed" in refused
    assert json.loads(run("status", "--json").stdout)["head"] is None
    run("import", source, "--force")
    report = report_at(store)
    assert report.forced
    assert "times as large as the weight" in report.failed[0]
    assert "forced although" in run("show").stdout
    assert json.loads(run("fsck", "--json").stdout)["sound"]


def test_the_model_is_asked_under_check_alone(run: Run, store: Path, adapter: Path) -> None:
    """And an import may drift as much as many facts may, though it names none."""
    source = times(adapter, 3)
    run("import", source, "--check")
    found = report_at(store).measured.drift
    assert found is not None
    assert 0.1 < found.kl < 0.6
    run("reset", "base")
    run("config", "guard.drift", "0.1")
    error = json.loads(run("import", source, "--check", "--json", code=10).stderr.splitlines()[-1])["error"]
    assert [(found["check"], found["limit"]) for found in error["facts"]["findings"]] == [("drift", 0.1)]
    run("import", source)
    measured = report_at(store).measured
    assert measured.drift is None
    assert measured.spectrum is not None


def test_facts_that_an_import_takes_away_are_earlier_ones(run: Run, store: Path, adapter: Path) -> None:
    file = store / "other.json"
    file.write_text(json.dumps(FACTS[10:13]), encoding="utf-8")
    run("commit", str(file), "-m", "three others")
    run("import", str(adapter), "--check")
    found = report_at(store).measured
    assert found.crushed is not None
    assert found.earlier is not None
    assert found.crushed.of == found.active == 3
    assert found.crushed.count == 0
    assert "of 3 earlier facts" in run("show").stdout
