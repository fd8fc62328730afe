"""The client's other ways of transfer: Xet, through its own local store, and uploads in parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from patchhub.errors import RemoteError
from patchhub.remotes.hub import HubRemote
from patchhub.store.fsck import check
from tests.remotes import minihub
from tests.remotes.conftest import TOKEN
from tests.remotes.stores import add_batch, make_history, make_store
from tests.remotes.test_conformance import fetch, push
from tests.remotes.test_hub import COMMIT, commits_of


@pytest.mark.slow
def test_push_and_fetch_over_xet(hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Objects travel through Xet up and down; a lost answer is resolved as without it; a client without Xet reads them."""
    pytest.importorskip("hf_xet")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    (tmp_path / "xet").mkdir()
    server = minihub.start(tmp_path / "xet-hub", xet=tmp_path / "xet")

    def connect() -> HubRemote:
        return HubRemote("tester/facts", endpoint=server.url, token=TOKEN, sleep=lambda seconds: None)

    ours, theirs, plain = (make_history(tmp_path / "ours"), make_store(tmp_path / "a"), make_store(tmp_path / "b"))
    push(ours, connect())
    add_batch(ours, range(30, 33))
    server.faults.append({"kind": "drop_response", "match": COMMIT})
    push(ours, connect(), "main")
    assert [entry for entry in server.log if "xet-write-token" in entry["line"]]
    assert len(commits_of(server)) == 3
    fetch(theirs, connect())
    assert [entry for entry in server.log if "xet-read-token" in entry["line"]]
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    fetch(plain, connect())
    for store in (theirs, plain):
        assert store.refs()["refs/remotes/origin/main"] == ours.refs()["refs/heads/main"]
        assert check(store).sound
    server.stop()


@pytest.mark.slow
def test_a_hub_without_xet_gives_a_clear_error(
    hub: Any, hub_remote: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("hf_xet")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    ours = make_history(tmp_path / "ours")
    with pytest.raises(RemoteError) as refused:
        push(ours, hub_remote(), "main")
    assert "HF_HUB_DISABLE_XET=1" in str(refused.value.remedy)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    push(ours, hub_remote(), "main")


def test_large_objects_travel_in_parts(hub: Any, tmp_path: Path) -> None:
    server = minihub.start(tmp_path / "parts", multipart_threshold=500, part_size=300)
    ours, theirs = make_history(tmp_path / "ours"), make_store(tmp_path / "theirs")
    remote = HubRemote("tester/facts", endpoint=server.url, token=TOKEN)
    push(ours, remote)
    assert [entry for entry in server.log if entry["line"].startswith("PUT /_lfs/") and entry["line"].endswith("/2")]
    fetch(theirs, remote)
    assert check(theirs).sound
    server.stop()
