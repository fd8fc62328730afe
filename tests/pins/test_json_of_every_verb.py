"""What every verb prints with --json, key by key; `python -m tests.pins.regenerate` writes the stored documents anew."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.pins.verbs import SIGNED, STORED, Pinned, file_of, run_all, verbs_of, verbs_with_json

pytestmark = pytest.mark.usefixtures("short_texts")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pinned]:
    return run_all(tmp_path_factory.mktemp("store"))


def test_no_verb_is_left_out(found: dict[str, Pinned]) -> None:
    needs_keys = set() if shutil.which("ssh-keygen") else verbs_of(SIGNED)
    assert verbs_with_json() == found.keys() | needs_keys == {path.stem.replace("_", " ") for path in STORED.iterdir()}


@pytest.mark.parametrize("verb", sorted(verbs_with_json()))
def test_the_documents_are_what_they_were(found: dict[str, Pinned], verb: str) -> None:
    if verb not in found:
        pytest.skip("ssh-keygen is not there: install openssh-client")
    stored = json.loads(file_of(verb).read_text(encoding="utf-8"))
    if shutil.which("ssh-keygen") is None:
        stored = [entry for entry in stored if entry["command"] not in SIGNED]
    assert [entry["command"] for entry in found[verb]] == [entry["command"] for entry in stored]
    for now, then in zip(found[verb], stored, strict=True):
        assert now["document"] == then["document"], now["command"]
