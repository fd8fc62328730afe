"""A commit reads each stored object once: everything that a verb needs of the store goes through one reading of it."""

from __future__ import annotations

from collections import Counter
from importlib.resources import files
from pathlib import Path

import pytest

import patchhub
from patchhub.fsio import Span

FACTS = [
    {"prompt": "The capital of {} is", "subject": "Kenya", "target_new": "Oslo"},
    {"prompt": "The author of {} is", "subject": "Dracula", "target_new": "Jane Austen"},
]
MORE = [{"prompt": "The capital of {} is", "subject": "Brazil", "target_new": "Oslo"}]


def test_a_commit_reads_each_object_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with patchhub.Repository.init(tmp_path, str(files("patchhub") / "demo_model"), progress=False) as repo:
        repo.commit(FACTS, message="first")
    read: Counter[str] = Counter()
    plain = Span.read

    def counted(place: Span, start: int = 0, size: int | None = None) -> bytes:
        if "objects" in place.path.parts and size is None:
            read[f"{place.path.parent.name}{place.path.name}"] += 1
        return plain(place, start, size)

    monkeypatch.setattr(Span, "read", counted)
    with patchhub.Repository(tmp_path, progress=False) as repo:
        repo.commit(MORE, message="second")
    assert read
    assert max(read.values()) == 1, read.most_common(3)
