"""Remotes of every kind behind one fixture, and a Hub on this machine for the unmodified client."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from patchhub.remotes import parcels
from patchhub.remotes.hub import HubRemote
from patchhub.remotes.remote import Remote
from patchhub.remotes.sync import open_remote
from tests.remotes import minihub

TOKEN = "hf_write"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The client's uploads call its own HTTP library in a way that this one deprecates."""
    for item in items:
        item.add_marker(pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A loopback Hub that the client of this process may talk to, over plain HTTP uploads (without Xet)."""
    from huggingface_hub import constants
    from huggingface_hub.utils import disable_progress_bars

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf-cache"))
    disable_progress_bars()
    server = minihub.start(tmp_path / "minihub")
    yield server
    server.stop()


@pytest.fixture
def waits() -> list[float]:
    """The seconds that a remote would have slept."""
    return []


@pytest.fixture
def hub_remote(hub: Any, waits: list[float]) -> Callable[..., HubRemote]:
    """A new client of ``tester/facts``; ``token`` says whose."""

    def connect(token: str = TOKEN, repo: str = "tester/facts") -> HubRemote:
        return HubRemote(repo, endpoint=hub.url, token=token, sleep=waits.append)

    return connect


@pytest.fixture
def packing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few objects travel in packs as well."""
    monkeypatch.setattr(parcels, "PACK_FROM", 1)


KINDS = ["folder", "memory", "file", "hub", "folder, packed", pytest.param("hub, packed", marks=pytest.mark.slow)]


@pytest.fixture(params=KINDS)
def connect(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Remote]:
    """A new client of one and the same empty remote, once per kind of remote."""
    kind = request.param.partition(",")[0]
    if kind != request.param:
        request.getfixturevalue("packing")
    if kind == "hub":
        made: Callable[[], Remote] = request.getfixturevalue("hub_remote")
        return made
    addresses = {
        "folder": str(tmp_path / "remote"),
        "memory": f"memory://{uuid.uuid4().hex}/remote",
        "file": f"file://{tmp_path}/remote",
    }
    return lambda: open_remote(addresses[kind])
