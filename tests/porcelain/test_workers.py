"""Many processes write the commit that one writes, bit for bit, whatever becomes of them on the way."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from patchhub.delta import Delta, LowRank
from patchhub.editing import steps
from patchhub.errors import BaseError, EditError, SettingsError
from patchhub.evaluation.live import read_together
from patchhub.porcelain.model import init
from patchhub.progress import Silent
from patchhub.repository import Repository
from patchhub.store.store import Store
from patchhub.who import Who
from patchhub.worktree import measuring
from patchhub.worktree import opening as worktree
from patchhub.worktree.opening import open_worktree
from patchhub.worktree.workers import Machines, Opened, Opening, Serving, Worker, Workers, workers_of, written_by
from tests.porcelain.taught import AUTHOR, PLACES, TIME, TONGUES, fact, make_store
from tests.tiny_models import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("short_texts")

LONG_TEXTS = measuring.FLUENCY_TOKENS
FACTS = [fact(*pair) for pair in (*PLACES, *TONGUES)]
DEMO = Path(str(files("patchhub") / "demo_model"))
DEMO_FACTS: list[dict[str, Any]] = json.loads((files("patchhub") / "demo_facts.json").read_text(encoding="utf-8"))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A repository of a tiny model, nothing committed."""
    return tiny_store(tmp_path / "first")


def tiny_store(folder: Path) -> Store:
    tiny_model("gpt2").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    init(folder, str(folder / "model"), Silent(), who=Who(AUTHOR, TIME))
    repository = Repository(folder, progress=Silent())
    for key, value in (("metric.tokens", "1500"), ("memit.layers", "1,2"), ("memit.steps", "12")):
        repository.config(key, value)
    return repository.store


def written(folder: Path, progress: Silent | None = None, **options: Any) -> tuple[str, str, dict[str, Any]]:
    """What a first commit of the facts is: its id, its set's, and what the guard found."""
    own = folder.parent / f"{folder.name}-cache"
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PATCHHUB_CACHE", str(own))
        repository = Repository(folder, progress=progress or Silent())
    done = repository.commit(FACTS, message="facts", author=AUTHOR, time=TIME, force=True, **options)
    commit = repository.store.commit(done.commit)
    return done.commit, commit.set_digest, dict(commit.check)


@pytest.fixture
def opening(store: Store) -> Opening:
    return Opening.of(open_worktree(store, Silent()))


def test_a_worker_holds_the_drivers_model(opening: Opening, store: Store) -> None:
    opened, tree = opening.open(), open_worktree(store, Silent())
    ours = dict(opened.stack.model.named_parameters())
    assert all(torch.equal(ours[name], found) for name, found in tree.model.named_parameters())


def test_a_worker_whose_base_differs_refuses_in_a_sentence(opening: Opening) -> None:
    tiny_model("gpt2", seed=1).save_pretrained(Path(opening.folder))
    with pytest.raises(BaseError, match="is not this repository's base"):
        opening.open()
    shutil.rmtree(opening.folder)
    with pytest.raises(BaseError, match="there is no base at") as caught:
        opening.open()
    assert "base.name" in str(caught.value.remedy)


def test_a_worker_of_another_version_refuses(opening: Opening) -> None:
    with pytest.raises(SettingsError, match="is installed there"):
        replace(opening, version="0.0.1").open()


def test_a_side_memory_is_trained_by_one_process(store: Store) -> None:
    with pytest.raises(SettingsError, match="one process"):
        Repository(store.root.parent).commit(FACTS, message="x", method="wise", workers=2)


def test_without_ray_a_sentence_says_what_to_install(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SettingsError) as caught:
        Repository(store.root.parent).commit(FACTS, message="x", on="auto")
    assert "patchhub[ray]" in str(caught.value.remedy)


# --- workers in this process


class Near(Machines):
    """Workers in this process, which are sent the same bytes as others."""

    def __init__(self, count: int) -> None:
        self.count, self.opened = count, 0

    def start(self, number: int, opening: Opening) -> Worker:
        worker = NearWorker()
        worker.give(pickle.dumps(opening))
        self.opened += 1
        return worker

    def answered(self, workers: Sequence[Worker]) -> list[Worker]:
        return list(workers)[:1]

    def close(self) -> None:
        pass


class NearWorker(Worker):
    def __init__(self) -> None:
        self.serving, self.answers = Serving(torch.get_num_threads()), list[bytes]()

    def give(self, message: bytes) -> None:
        self.answers.append(self.serving.answer(message))

    def take(self) -> bytes:
        return self.answers.pop(0)

    def stop(self) -> None:
        pass


class Lagging(Near):
    """All but the first worker load until the others are moved; from then on the last is heard first."""

    def __init__(self, count: int) -> None:
        super().__init__(count)
        self.messages: list[list[bytes]] = []

    def start(self, number: int, opening: Opening) -> Worker:
        worker = super().start(number, opening)
        given: list[bytes] = []
        self.messages.append(given)
        give = worker.give

        def noted(message: bytes) -> None:
            given.append(message)
            give(message)

        worker.give = noted  # type: ignore[method-assign]
        return worker

    def answered(self, workers: Sequence[Worker]) -> list[Worker]:
        moved = any(isinstance(pickle.loads(message), Opening) for given in self.messages for message in given)
        return list(workers)[-1:] if moved else list(workers)[:1]


def enough(prompt: str, text: str) -> bool:
    return len(text) > 8


def test_workers_write_what_one_model_writes_batch_by_batch(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worktree, "BATCH_TOKENS", 40)
    tree, progress, machines = open_worktree(store, Silent()), Silent(), Near(2)
    width, height = tree.architecture.shapes[1]
    random = np.random.default_rng(0)
    change: Delta = LowRank(B=random.normal(size=(width, 1)), A=random.normal(size=(1, height)))
    prompts = [request.text for request in FACTS]
    room = {prompt: 1 + 3 * number for number, prompt in enumerate(prompts)}
    batches = read_together(tree.tokenizer, room, batch_tokens=tree.batch_tokens)
    assert sorted(prompt for batch in batches for prompt in batch) == sorted(room)
    found = []
    for workers in (None, Workers(machines, Opening.of(tree), progress)):
        for changes in ({}, {1: [change]}):
            for end in (None, enough):
                found.append(written_by(workers, tree, room, changes=changes, enough=end))
    half = len(found) // 2
    assert found[:half] == found[half:]
    assert found[0] != found[2]  # the change is heard
    assert machines.opened == 2 <= len(batches)


def evaluated(folder: Path, **options: Any) -> tuple[Any, ...]:
    done = Repository(folder, progress=Silent()).eval("HEAD", suite=FACTS[1:4], author=AUTHOR, time=TIME, **options)
    return done.scores, done.base, list(done.records()), done.note


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple[Any, ...]]:
    """A store, and what one process says of it; copied before it was asked."""
    folder = tmp_path_factory.mktemp("taught")
    make_store(folder / "one").close()
    shutil.copytree(folder / "one", folder / "unasked")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(measuring, "_KEPT_AT_ONCE", 2)
        return folder / "unasked", evaluated(folder / "one")


@pytest.mark.parametrize("count", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_any_number_of_workers_gives_the_scores_that_one_process_gives(
    one: tuple[Path, tuple[Any, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    unasked, alone = one
    shutil.copytree(unasked, tmp_path / "more")
    monkeypatch.setattr(measuring, "_KEPT_AT_ONCE", 2)  # the parts of an evaluation are the tasks
    machines = Near(count)
    monkeypatch.setattr(measuring, "machines_of", lambda count, on: machines)
    assert evaluated(tmp_path / "more", workers=count) == alone
    assert machines.opened == count  # for the revision and the base alike


def test_a_worker_that_is_moved_before_it_has_loaded_is_moved(
    one: tuple[Path, tuple[Any, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unasked, alone = one
    shutil.copytree(unasked, tmp_path / "more")
    monkeypatch.setattr(measuring, "_KEPT_AT_ONCE", 2)
    machines = Lagging(2)
    monkeypatch.setattr(measuring, "machines_of", lambda count, on: machines)
    assert evaluated(tmp_path / "more", workers=2) == alone
    assert len(machines.messages) == 2
    for given in machines.messages:  # each was moved, and was asked after that
        places = [number for number, message in enumerate(given) if isinstance(pickle.loads(message), Opening)]
        assert max(places) < len(given) - 1


@pytest.mark.slow
def test_processes_give_the_scores_that_one_process_gives(
    one: tuple[Path, tuple[Any, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "two"):
        shutil.copytree(one[0], tmp_path / name)
    monkeypatch.setattr(measuring, "_KEPT_AT_ONCE", 10)
    monkeypatch.setattr(measuring, "FLUENCY_TOKENS", LONG_TEXTS)  # other processes know of no shorter ones
    assert evaluated(tmp_path / "two", workers=2) == evaluated(tmp_path / "one")
    assert not multiprocessing.active_children()


def test_without_ray_an_evaluation_says_what_to_install(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SettingsError, match="Ray is not installed"):
        Repository(store.root.parent).eval("base", suite=FACTS, on="auto")


# --- processes


class Killing(Silent):
    """Hears that the first facts are finished, and kills all workers."""

    def __init__(self) -> None:
        super().__init__()
        self.label, self.killed = "", 0

    def stage(self, label: str, total: int) -> None:
        self.label = label

    def advance(self, amount: int) -> None:
        if amount and self.label == "optimising values" and not self.killed:
            for child in multiprocessing.active_children():
                child.kill()
                self.killed += 1


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Facts are optimised one by one, so that there are as many tasks."""
    monkeypatch.setattr(steps, "POSITIONS", 1)


@pytest.mark.slow
@pytest.mark.usefixtures("apart")
def test_any_number_of_workers_writes_the_same_commit_and_the_lost_ones_are_made_good(tmp_path: Path) -> None:
    first, killing = tiny_store(tmp_path / "one").root.parent, Killing()
    for name in ("two", "killed"):
        shutil.copytree(first, tmp_path / name)
    alone = written(first)
    assert written(tmp_path / "two", workers=2) == alone
    assert written(tmp_path / "killed", killing, workers=2) == alone
    assert killing.killed == 2
    assert any("a worker was lost" in warning for warning in killing.warnings)
    assert not multiprocessing.active_children()


def refuse(opened: Opened) -> None:
    raise EditError("no", remedy="Another.", place=3)


def stumble(opened: Opened) -> None:
    raise ZeroDivisionError("a mistake")


def vanish(opened: Opened) -> None:
    os._exit(1)


def rest(seconds: float, opened: Opened) -> None:
    time.sleep(seconds)


def width(opened: Opened) -> int:
    return int(opened.stack.architecture.d_model)


@pytest.mark.slow
@pytest.mark.long
def test_errors_come_back_as_they_were_and_a_task_that_kills_is_given_up(store: Store) -> None:
    tree, progress = open_worktree(store, Silent()), Silent()
    with workers_of(tree, 2, None, progress) as workers:
        assert workers is not None
        assert sorted(workers.map([width, width])) == [(0, 32), (1, 32)]
        late = workers.map([partial(rest, seconds) for seconds in (0.4, 0.0, 0.2, 0.0)], in_order=True)
        assert [place for place, _ in late] == [0, 1, 2, 3]
        with pytest.raises(EditError, match=r"^no$") as caught:
            list(workers.map([refuse]))
        assert (caught.value.remedy, caught.value.facts) == ("Another.", {"place": 3})
        with pytest.raises(RuntimeError, match="a mistake"):
            list(workers.map([stumble]))
        with pytest.raises(EditError, match="3 workers were lost"):
            list(workers.map([vanish]))
        assert len(progress.warnings) == 2
    tiny_model("gpt2", seed=1).save_pretrained(tree.checkpoint.folder)
    with workers_of(tree, 1, None, progress) as others:
        assert others is not None
        with pytest.raises(BaseError, match=r"the worker on .* cannot begin: .* is not this repository's base"):
            list(others.map([width]))
    assert not multiprocessing.active_children()


def processes(session: int) -> list[int]:
    """The processes of a session that are still there."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="processes are read from /proc")
def test_ctrl_c_leaves_no_process_and_the_next_run_goes_on(tmp_path: Path) -> None:
    """The terminal sends it to all processes of the group."""
    (tmp_path / "facts.json").write_text(json.dumps(DEMO_FACTS[:16]))
    command = [sys.executable, "-m", "patchhub", "--repo", str(tmp_path)]
    environment = {**os.environ, "PATCHHUB_CACHE": str(tmp_path / "own")}
    subprocess.run([*command, "init", str(DEMO)], check=True, env=environment, capture_output=True)
    commit = [*command, "commit", str(tmp_path / "facts.json"), "-m", "x", "--workers", "2", "--set", "steps=40"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    process = subprocess.Popen(commit, start_new_session=True, **pipes)
    kept = tmp_path / ".patchhub" / "cache" / "values"
    until = time.monotonic() + 240
    while not list(kept.glob("*/*.values")) and process.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "Traceback" not in said
    time.sleep(1)
    assert not processes(process.pid)
    before = {path.name for path in kept.glob("*/*.values")}
    again = subprocess.run(commit, check=False, **pipes)
    assert again.returncode == 0, again.stderr
    assert before
    assert before <= {path.name for path in kept.glob("*/*.values")}


# --- a Ray cluster


@dataclass
class Cluster:
    """Two machines of one processor each, which are processes of this one.

    Attributes:
        ports: of the cluster, and for clients from elsewhere.
        machines: the session of each one's processes.
    """

    ports: tuple[int, int]
    machines: list[int]

    def kill(self, machine: int) -> None:
        while left := processes(machine):
            for process in left:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)


def free_ports() -> tuple[int, int]:
    with socket.socket() as one, socket.socket() as other:
        for each in (one, other):
            each.bind(("127.0.0.1", 0))
        return one.getsockname()[1], other.getsockname()[1]


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    made, folder = Cluster(free_ports(), []), tempfile.mkdtemp(prefix="ray-")  # paths of sockets must be short
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    size = ["--num-cpus=1", "--object-store-memory=100000000", "--disable-usage-stats"]
    head = ["--head", f"--port={made.ports[0]}", f"--ray-client-server-port={made.ports[1]}", f"--temp-dir={folder}"]
    try:
        for role in (
            [*head, "--node-ip-address=127.0.0.1", "--include-dashboard=false"],
            [f"--address=127.0.0.1:{made.ports[0]}"],
        ):
            program = [str(Path(sys.executable).with_name("ray")), "start", *role, *size]
            pipe: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            process = subprocess.Popen(program, env=environment, start_new_session=True, **pipe)
            made.machines.append(process.pid)
            assert process.wait(120) == 0
        yield made
    finally:
        for machine in made.machines:
            made.kill(machine)
        shutil.rmtree(folder, ignore_errors=True)


def machine_of(opened: Opened) -> int:
    time.sleep(0.5)
    return os.getsid(0)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.usefixtures("apart")
@pytest.mark.skipif(sys.platform != "linux", reason="processes are read from /proc")
@pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: pip install 'patchhub[ray]'")
def test_a_ray_cluster_writes_the_same_commit_and_may_lose_a_machine(tmp_path: Path, cluster: Cluster) -> None:
    first, progress = tiny_store(tmp_path / "one").root.parent, Silent()
    shutil.copytree(first, tmp_path / "ray")
    assert written(tmp_path / "ray", on=f"ray://127.0.0.1:{cluster.ports[1]}") == written(first)
    tree, found, lost = open_worktree(Store.open(first), Silent()), dict[int, int](), cluster.machines[1]
    with workers_of(tree, None, f"127.0.0.1:{cluster.ports[0]}", progress) as workers:
        assert workers is not None
        for place, machine in workers.map([machine_of] * 60):
            found[place] = machine
            if set(found.values()) == set(cluster.machines):
                cluster.kill(lost)
    assert sorted(found) == list(range(60))
    assert set(found.values()) == set(cluster.machines)
    assert progress.warnings
    assert all("a worker was lost" in warning for warning in progress.warnings)
