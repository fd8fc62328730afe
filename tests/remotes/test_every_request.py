"""Every request that a push or a fetch makes fails once, in every way that the loopback Hub knows."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from patchhub.objects import Note
from patchhub.remotes.hub import HubRemote
from patchhub.store.fsck import check
from patchhub.store.store import Store
from tests.benchmarks.synthetic_store import HastyDisk
from tests.remotes import minihub
from tests.remotes.conftest import TOKEN
from tests.remotes.stores import AUTHOR, TIME, add_batch, make_history, make_store, move, published
from tests.remotes.test_conformance import fetch, push
from tests.remotes.test_hub import commits_of, do_not_wait, failure_of

FAULTS: dict[str, dict[str, Any]] = {
    "500": {"kind": "status", "status": 500},
    "429": {"kind": "status", "status": 429, "headers": {"Retry-After": "3"}},
    "403": {"kind": "status", "status": 403},
    "answer lost": {"kind": "drop_response"},
    "upload cut": {"kind": "drop_upload", "after": 60},
    "download cut": {"kind": "drop_download", "after": 60},
    "a byte flipped": {"kind": "corrupt", "offset": 25},
    "late": {"kind": "delay", "seconds": 0.05},
}
UNSEEN = ("429", "download cut", "a byte flipped", "late")
"""What nobody needs to hear about: the same command succeeds by itself."""
ALIKE = ("403", "late")
"""What takes the ways of 500 and of 429."""
ONLY = {"upload cut": r"^\^(PUT|POST)", "download cut": "resolve|_cdn", "a byte flipped": "resolve|_cdn"}
"""The requests that a fault can meet at all."""


def prepared(folder: Path) -> None:
    """``hub`` holds the first commits of ``ours``; ``ours`` has then a commit, a branch, a tag and a note more."""
    server = minihub.start(folder / "hub")
    with make_history(folder / "ours") as ours:
        push(ours, connected(server), "main", "side")
        head = add_batch(ours, range(60, 62))
        move(ours, {"refs/heads/new": (None, head), "refs/tags/v2": (None, head)})
        note = Note(commit=head, made_by="patchhub", scores={"S": 0.7}, settings={}, suite="zsre")
        ours.add_note(note, command="evaluate", arguments={}, author=AUTHOR, time=TIME)
    make_store(folder / "theirs").close()
    server.stop()


def connected(server: Any) -> HubRemote:
    return HubRemote("tester/facts", endpoint=server.url, token=TOKEN, sleep=lambda seconds: None)


def pattern_of(line: str) -> str:
    """A regular expression for a request, whatever commits and objects it names."""
    return (
        "^"
        + re.sub(r"[0-9a-f]{16,64}|(?<=objects/)[0-9a-f]{2}", "[0-9a-f]+", re.escape(line).replace("\\-", "-"))
        + "$"
    )


def heals(step: Callable[[], object], server: Any) -> bool:
    """Whether a step failed, in a declared way; without the fault it succeeds then."""
    error = failure_of(step)
    if error is None:
        return False
    assert error.remedy
    assert "\n" not in error.message
    server.faults.clear()
    step()
    return True


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("template")


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault", [pytest.param(fault, marks=pytest.mark.long) if fault in ALIKE else fault for fault in FAULTS]
)
def test_every_request_may_fail_once(
    fault: str, hub: Any, template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    do_not_wait(monkeypatch)
    if not (template / "ours").exists():
        prepared(template)
    plain, _ = scenario(template, tmp_path / "plain", None)
    assert len(plain) > 10
    requests = [request for request in plain if re.search(ONLY.get(fault, ""), request)]
    met = failed = 0
    for number, request in enumerate(requests):
        lines, failures = scenario(template, tmp_path / str(number), {**FAULTS[fault], "match": request})
        met += bool(lines)
        failed += failures
    assert met > len(requests) / 2
    assert not (failed and fault in UNSEEN)


def scenario(template: Path, folder: Path, fault: dict[str, Any] | None) -> tuple[list[str], int]:
    """Push all that is new, then fetch it, with a fault waiting; returns the requests that were made, or met the fault, and
    how many steps had to be repeated."""
    shutil.copytree(template, folder)
    server = minihub.start(folder / "hub")
    before = len(commits_of(server))
    server.faults.extend([fault] if fault else [])
    with (
        Store.open(folder / "ours", disk=HastyDisk()) as ours,
        Store.open(folder / "theirs", disk=HastyDisk()) as theirs,
    ):
        failures = heals(lambda: push(ours, connected(server)), server)
        failures += heals(lambda: fetch(theirs, connected(server)), server)
        assert len(commits_of(server)) == before + 1, "one commit of the Hub for one push"
        tips = {ref: tip.commit for ref, tip in connected(server).view().tips.items()}
        assert tips == published(ours)
        arrived = {ref.replace("remotes/origin", "heads"): commit for ref, commit in theirs.refs().items()}
        assert published(ours).items() <= arrived.items()
        assert {ref for ref in theirs.refs() if "notes" in ref} == {ref for ref in ours.refs() if "notes" in ref}
        assert check(ours).sound
        assert check(theirs).sound
    server.stop()
    rows = [entry for entry in server.log if fault is None or entry["fault"]]
    return sorted({pattern_of(entry["line"]) for entry in rows}), failures
