"""Facts written into a base whose blocks stay in its files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from patchhub.errors import SettingsError
from patchhub.porcelain.model import init
from patchhub.progress import Silent
from patchhub.repository import Repository
from patchhub.who import Who
from tests.porcelain.taught import AUTHOR, PLACES, TIME, fact
from tests.tiny_models import tiny_model, tiny_tokenizer

FACTS = [fact(*pair) for pair in PLACES[:3]]
TEXT = [f"The Space Needle is located in Seattle, and number {number} is a twin city of Lyon." for number in range(40)]


def repository(folder: Path, device: str) -> Repository:
    tiny_model("llama").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    init(folder, str(folder / "model"), Silent(), who=Who(AUTHOR, TIME))
    made = Repository(folder, progress=Silent())
    settings = {"memit.layers": "1,2", "memit.steps": "4", "dtype": "float32", "device": device}
    for key, value in settings.items():
        made.config(key, value)
    return made


def test_a_streamed_base_is_asked_to_hold_what_it_is_asked_in_memory(tmp_path: Path) -> None:
    """Second moments, keys, values and what they ask of the weights, bit for bit: the patch has one id, and the model says one thing."""
    text = tmp_path / "text.json"
    text.write_text(json.dumps(TEXT))
    patches, answers = [], []
    for device in ("cpu", "stream"):
        made = repository(tmp_path / device, device)
        done = made.commit(FACTS, message="facts", text=[text], author=AUTHOR, time=TIME, force=True)
        patches.append({patch for patch, _ in made.store.commit(done.commit).added})
        answers.append([row.continuation for row in made.ask([FACTS[0].text])])
    assert patches[0] == patches[1]
    assert answers[0] == answers[1]


def test_a_streamed_base_writes_no_text_for_its_metric(tmp_path: Path) -> None:
    made = repository(tmp_path, "cpu")
    with pytest.raises(SettingsError, match="read all of them for every token") as caught:
        made.metric_compute(device="stream")
    assert "--text FILE" in caught.value.remedy
