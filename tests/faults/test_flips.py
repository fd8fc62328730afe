"""One flipped bit in a file of every kind under ``.patchhub``: it is found, or it changes nothing that can be asked of the store."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from patchhub.errors import PatchhubError
from patchhub.porcelain import refs
from patchhub.porcelain.merge import merge
from patchhub.porcelain.search import search
from patchhub.sets.merging import stopped_merge
from patchhub.store.fsck import check
from patchhub.store.store import Store
from patchhub.who import Who
from tests.porcelain.taught import AUTHOR, TIME, make_store, teach

PLACES = int(os.environ.get("PATCHHUB_FLIPS", "4"))
"""How many bits of each file, and 25 times as many of the database; docs/reliability.md has the table."""
WHO = Who(AUTHOR, TIME, "a test")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with facts of a tiny model, caches, scores, and a merge that waits."""
    folder = tmp_path_factory.mktemp("store")
    with make_store(folder) as store:
        refs.switch_to_new(store, "side", "main~1", WHO)
        teach(store, [("Seattle", "Dutch")], "side")
        refs.switch(store, "main", WHO)
        assert merge(store, "side", WHO).outcome == "stopped"
    return folder


def kind_of(path: Path, root: Path) -> str:
    first, *rest = path.relative_to(root).parts
    if first == "cache":
        return f"cache: {rest[0]}"
    if first != "objects":
        return first
    data = path.read_bytes()
    if data[:1] not in (b"{", b"["):
        return "object: tensors"
    found = json.loads(data)
    return f"object: {found.get('type', 'other') if isinstance(found, dict) else 'texts'}"


def answers(folder: Path) -> Any:
    """What the store says of itself, after it was checked; a `PatchhubError` or a finding is an answer too."""
    try:
        with Store.open(folder) as store:
            report = check(store)
            if report.findings:
                return "found"
            tips = [target for ref, target in sorted(store.refs().items()) if ref.startswith("refs/")]
            return (
                json.loads((store.root / "config.json").read_bytes()),
                store.refs(),
                [(identity, found.to_json()) for identity, found in store.log(*tips)],
                [store.state(tip) for tip in tips if tip],
                [name for name, _ in store.operations()],
                [hit.to_json() for hit in search(store, "Seattle")],
                stopped_merge(store),
            )
    except PatchhubError:
        return "found"


@pytest.mark.slow
def test_a_flipped_bit_in_any_file_is_found_or_harmless(original: Path, tmp_path: Path) -> None:
    folder = tmp_path / "store"
    shutil.copytree(original / ".patchhub", folder / ".patchhub")
    root, generator = folder / ".patchhub", random.Random(7)
    right, ends, missed = answers(folder), Counter[tuple[str, str]](), list[str]()
    assert right != "found"
    files = sorted(path for path in root.rglob("*") if path.is_file() and path.stat().st_size)
    for path in files:
        kind, data, status = kind_of(path, root), path.read_bytes(), path.stat()
        for place in sorted(generator.sample(range(8 * len(data)), PLACES * (25 if path.suffix == ".db" else 1))):
            changed = bytearray(data)
            changed[place // 8] ^= 1 << place % 8
            path.chmod(0o644)
            path.write_bytes(changed)
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
            found = answers(folder)
            end = "found" if found == "found" else "harmless" if found == right else "MISSED"
            ends[kind, end] += 1
            if end == "MISSED":
                missed.append(f"{kind}: {path.relative_to(root)}, bit {place % 8} of byte {place // 8}")
            for beside in root.glob("patchhub.db-*"):
                beside.unlink()
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert answers(folder) == right
    for kind in sorted({kind for kind, _ in ends}):
        print(f"{kind}: {ends[kind, 'found']} found, {ends[kind, 'harmless']} harmless")
    assert missed == []
