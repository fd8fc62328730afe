"""Many writers of one branch, all at once: every commit lands, none is lost."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from patchhub.porcelain.merge import merge
from patchhub.remotes.remote import Remote, RemoteMovedError
from patchhub.remotes.sync import open_remote
from patchhub.store.fsck import check
from tests.remotes.stores import STAMP, add_batch, make_history, make_store, move
from tests.remotes.test_conformance import fetch, push

Connect = Callable[[], Remote]


@pytest.fixture(params=["folder", "file", "hub"])
def shared(request: pytest.FixtureRequest, tmp_path: Path) -> Connect:
    """A new client of one and the same empty remote, once per kind of remote that several processes can share."""
    if request.param == "hub":
        made: Connect = request.getfixturevalue("hub_remote")
        return made
    address = {"folder": str(tmp_path / "remote"), "file": f"file://{tmp_path}/remote"}[request.param]
    return lambda: open_remote(address)


@pytest.mark.parametrize(
    "clients",
    [4, pytest.param(10, marks=pytest.mark.slow), pytest.param(20, marks=(pytest.mark.slow, pytest.mark.long))],
)
def test_many_clients_on_one_branch_all_land(clients: int, shared: Connect, tmp_path: Path) -> None:
    """Each loops over pull, with a merge, and push until its commit is there."""
    ours = make_history(tmp_path / "ours")
    push(ours, shared(), "main")
    first = ours.refs()["refs/heads/main"]
    made: dict[int, str] = {}
    errors: list[BaseException] = []

    def client(number: int) -> None:
        try:
            made[number] = _land(shared, tmp_path / f"client{number}", number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    final = make_store(tmp_path / "final")
    fetch(final, shared())
    head = final.refs()["refs/remotes/origin/main"]
    history = {identity for identity, _ in final.log(head)}
    assert history >= {first, *made.values()}
    assert len(final.active(head)) == 5 + clients
    assert check(final).sound


def _land(connect: Connect, folder: Path, number: int) -> str:
    """Make one commit on the branch as it was at the start, and bring it to the remote, merging as often as it takes."""
    with make_store(folder) as repository:
        fetch(repository, connect())
        move(repository, {"refs/heads/main": (None, repository.refs()["refs/remotes/origin/main"])})
        commit = add_batch(repository, range(100 + number, 101 + number))
        for _ in range(200):
            try:
                push(repository, connect(), "main")
            except RemoteMovedError:
                fetch(repository, connect())
                merge(repository, "refs/remotes/origin/main", STAMP)
            else:
                return commit
    raise AssertionError(f"client {number} never landed")
