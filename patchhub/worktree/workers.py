"""Workers: other processes, here or on a Ray cluster, that hold the same base in the same state and are given tasks (docs/scale.md).

The driver plans the tasks and joins what comes back, so what a commit holds does not depend on how many workers there are. A task is a
function of the model alone: one whose worker is lost is given to another."""

from __future__ import annotations

import multiprocessing
import pickle
import platform
import signal
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from importlib import import_module, metadata
from importlib.util import find_spec
from multiprocessing.connection import Connection, wait
from pathlib import Path
from traceback import format_exc
from typing import Any, Final

import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from patchhub.cache import Cache
from patchhub.delta import Delta
from patchhub.editing.record import side_paths
from patchhub.errors import BaseError, EditError, PatchhubError, RemoteError, SettingsError
from patchhub.evaluation.live import NOTHING, continue_within, read_together
from patchhub.models.architectures import Architecture, describe, read_config
from patchhub.models.checkpoint import Checkpoint, open_checkpoint
from patchhub.models.fingerprint import check_tensors
from patchhub.models.placement import Placement, is_quantised, load_base, name_of, runs_beside
from patchhub.models.tracing import Stack
from patchhub.progress import Progress
from patchhub.runtime.patched_model import PatchState, attach, switch
from patchhub.text.tokens import Chat, load_tokenizer
from patchhub.worktree.opening import Worktree

_TRIES: Final = 3  # workers that one task, or the loading of the base, may lose
_PATIENCE: Final = 5.0  # seconds for a process to end

NO_CHANGES: Final[Mapping[int, Sequence[Delta]]] = {}
"""The model as it is."""


@dataclass(frozen=True, eq=False)
class Opened:
    """The base in a worker: the driver's model as far as its numbers go."""

    checkpoint: Checkpoint
    architecture: Architecture
    model: Any
    tokenizer: PreTrainedTokenizerBase
    memory: int | None

    @cached_property
    def stack(self) -> Stack:
        """The model as a stack of blocks."""
        return Stack(self.model, self.architecture)


Task = Callable[[Opened], Any]
"""What a worker is asked to do. Task and answer travel as pickles: module-level functions with `functools.partial`."""


@dataclass(frozen=True, eq=False)
class Opening:
    """All that a worker needs to hold the driver's model.

    Attributes:
        version: the driver's patchhub.
        folder: where the base is on the driver's machine.
        name, revision: what it is called on the Hub, for machines that do not have the folder; None: nothing.
        cache: the driver's folder of kept digests, of use where it is at hand.
    """

    version: str
    folder: str
    name: str | None
    revision: str | None
    experts: Any
    placement: Placement
    state: PatchState
    beside: bool
    memory: int | None
    cache: str

    @classmethod
    def of(cls, tree: Worktree, *, asked: bool = False) -> Opening:
        """What makes a worker's model that of a worktree. The type of its numbers is told, since "auto" depends on the machine.

        Args:
            asked: the model is only asked: it has the changes in its weights, whatever their type.
        """
        config, checkpoint = tree.repository.config, tree.checkpoint
        same = {} if is_quantised(tree.model) else {"dtype": name_of(tree.model.dtype)}
        named = config.settings.get("base.name")
        return cls(
            version=_installed(),
            folder=str(checkpoint.folder.resolve()),
            name=checkpoint.name if checkpoint.revision else named and str(named),
            revision=checkpoint.revision,
            experts=config.base.get("experts"),
            placement=replace(tree.placement, **same),
            state=replace(tree.state, weights={name: list(deltas) for name, deltas in tree.state.weights.items()}),
            beside=not asked and runs_beside(tree.model),
            memory=tree.memory,
            cache=str(tree.repository.cache.folder.resolve()),
        )

    def open(self, before: Opened | None = None) -> Opened:
        """Load the base of this machine, every tensor of it checked, and put it into the driver's state.

        Args:
            before: what was opened of the same base in another state, which is put into this one.

        Raises:
            SettingsError: another patchhub is installed here.
            BaseError: the base is missing here, or is another one.
        """
        if self.version != _installed():
            raise SettingsError(
                f"patchhub {_installed()} is installed there, and {self.version} here", remedy="Install the same one."
            )
        if before is not None:
            switch(before.model, before.checkpoint, self.state)
            return before
        checkpoint = self._checkpoint()
        cache = Cache(Path(self.cache)) if Path(self.cache).is_dir() else None
        check_tensors(self.state.base, checkpoint, None, cache=cache)
        model = load_base(checkpoint, self.placement).eval()
        attach(model, checkpoint, self.state, side_path=self.beside)
        architecture = describe(read_config(checkpoint.folder), self.experts)
        return Opened(checkpoint, architecture, model, load_tokenizer(checkpoint), self.memory)

    def _checkpoint(self) -> Checkpoint:
        if Path(self.folder).is_dir():
            return open_checkpoint(self.folder)
        if self.name is not None:
            return open_checkpoint(self.name, self.revision)
        raise BaseError(
            f"there is no base at {self.folder}",
            remedy="Put it there on every machine, or say its name on the Hub: `patchhub config base.name ORG/MODEL`.",
        )


def _installed() -> str:
    try:
        return metadata.version("patchhub")
    except metadata.PackageNotFoundError:  # run from its source
        return "of no version"


class Serving:
    """One worker's side: it is given an `Opening` first, and tasks then, or one of another state; whatever they raise is its answer."""

    def __init__(self, threads: int) -> None:
        torch.set_num_threads(threads)
        disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers' own; the driver's is the one that is seen
        self._opened: Opened | None = None

    def answer(self, message: bytes) -> bytes:
        """What came of a message: (found, None) or (None, error)."""
        try:
            task = pickle.loads(message)
            if isinstance(task, Opening):
                self._opened = _opened_here(task, self._opened)
                return pickle.dumps((None, None))
            return pickle.dumps((task(self._opened), None))
        except PatchhubError as error:
            return pickle.dumps((None, error))
        except Exception:
            return pickle.dumps((None, RuntimeError(f"in a worker on {platform.node()}:\n{format_exc()}")))


def _opened_here(opening: Opening, before: Opened | None) -> Opened:
    """What is opened; an error says on which machine."""
    try:
        return opening.open(before)
    except PatchhubError as error:
        error.message = f"the worker on {platform.node()} cannot begin: {error.message}"
        error.args = (error.message,)
        raise


class Lost(Exception):
    """A worker ended before it had answered."""


class Worker(ABC):
    """The driver's side of one worker."""

    @abstractmethod
    def give(self, message: bytes) -> None:
        """Send it something, to which it will have an answer."""

    @abstractmethod
    def take(self) -> bytes:
        """The answer; raises `Lost`."""

    @abstractmethod
    def stop(self) -> None:
        """End it, whatever it is doing."""


class Machines(ABC):
    """Where workers run.

    Attributes:
        count: how many there are to be.
    """

    count: int

    @abstractmethod
    def start(self, number: int, opening: Opening) -> Worker:
        """A new worker, which loads the base; its first answer is that of the opening."""

    @abstractmethod
    def answered(self, workers: Sequence[Worker]) -> list[Worker]:
        """Wait until at least one of some workers has answered, or is lost; those that have."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the machines, whose workers are stopped."""


class Here(Machines):
    """Processes on this machine, which share its processors. With several GPUs each has one of them, in turn."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._threads = max(1, torch.get_num_threads() // count)

    def start(self, number: int, opening: Opening) -> Worker:
        placement, gpus = opening.placement, torch.cuda.device_count()
        if placement.device == "auto" and gpus > 1:
            opening = replace(opening, placement=replace(placement, device=f"cuda:{number % gpus}"))
        worker = _Process(self._threads)
        worker.give(pickle.dumps(opening))
        return worker

    def answered(self, workers: Sequence[Worker]) -> list[Worker]:
        by_connection = {worker.connection: worker for worker in workers if isinstance(worker, _Process)}
        return [by_connection[found] for found in wait(list(by_connection)) if isinstance(found, Connection)]

    def close(self) -> None:
        pass


class _Process(Worker):
    def __init__(self, threads: int) -> None:
        context = multiprocessing.get_context(
            "spawn"
        )  # a fork would take the driver's threads and GPU in the middle of things
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, threads), daemon=True)
        with _no_interrupts():
            self._process.start()
        theirs.close()

    def give(self, message: bytes) -> None:
        with suppress(OSError):  # it has ended: `take` says so
            self.connection.send_bytes(message)

    def take(self) -> bytes:
        try:
            return self.connection.recv_bytes()
        except (EOFError, OSError):
            raise Lost from None

    def stop(self) -> None:
        self._process.terminate()
        self._process.join(_PATIENCE)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self.connection.close()


@contextmanager
def _no_interrupts() -> Iterator[None]:
    """While open, processes are started that do not hear Ctrl-C, which a terminal sends to all: the driver hears it and stops them."""
    try:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    except ValueError:  # not in the main thread, where Python lets nobody set this
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _serve(connection: Connection, threads: int) -> None:
    """A worker's life: until the driver hangs up."""
    serving = Serving(threads)
    with connection, suppress(EOFError, OSError):
        while True:
            connection.send_bytes(serving.answer(connection.recv_bytes()))


def refuse_without_ray() -> None:
    """Raise `SettingsError` where Ray is not installed."""
    if find_spec("ray") is None:
        raise SettingsError("Ray is not installed", remedy="pip install 'patchhub[ray]'")


class OnRay(Machines):
    """Actors on a Ray cluster, each with a GPU where the cluster has some, and its share of the processors.

    Args:
        address: as `ray.init` takes it: ``ray://HOST:10001``, ``HOST:6379`` or ``auto``.
        count: how many; None: as many as there are GPUs, else as there are machines.

    Raises:
        SettingsError: Ray is not installed.
        RemoteError: no cluster answers.
    """

    def __init__(self, address: str, count: int | None) -> None:
        refuse_without_ray()
        ray: Any = import_module("ray")
        self._ray = ray
        self._sent: tuple[Opening | None, Any] = (None, None)
        self._joined = not ray.is_initialized()
        if self._joined:
            try:
                ray.init(address=address, log_to_driver=False, logging_level="ERROR")
            except (ConnectionError, RuntimeError, ValueError, OSError, TimeoutError) as error:
                reason = str(error).partition("\n")[0]
                raise RemoteError(
                    f"no Ray cluster answers at {address} ({reason})", remedy="Start one: `ray start --head`."
                ) from error
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
        gpus, processors = (int(sum(node.get(name, 0) for node in nodes)) for name in ("GPU", "CPU"))
        self.count = count or gpus or max(1, len(nodes))
        smallest = min((int(node["CPU"]) for node in nodes), default=1)
        self._processors = max(1, min(smallest, processors // self.count))
        self._gpus = {"num_gpus": min(1.0, gpus / self.count)} if gpus else {}

    def start(self, number: int, opening: Opening) -> Worker:
        if self._sent[0] is not opening:
            self._sent = opening, self._ray.put(pickle.dumps(opening))  # it travels once to each machine
        remote = self._ray.remote(num_cpus=self._processors, scheduling_strategy="SPREAD", **self._gpus)(Serving)
        worker = _Actor(self._ray, remote.remote(self._processors))
        worker.give(self._sent[1])
        return worker

    def answered(self, workers: Sequence[Worker]) -> list[Worker]:
        by_answer = {worker.awaited: worker for worker in workers if isinstance(worker, _Actor)}
        return [by_answer[found] for found in self._ray.wait(list(by_answer), num_returns=1)[0]]

    def close(self) -> None:
        if self._joined:
            self._ray.shutdown()


class _Actor(Worker):
    def __init__(self, ray: Any, actor: Any) -> None:
        self._ray, self._actor = ray, actor
        self.awaited: Any = None

    def give(self, message: Any) -> None:
        self.awaited = self._actor.answer.remote(message)

    def take(self) -> bytes:
        try:
            found: bytes = self._ray.get(self.awaited)
        except self._ray.exceptions.RayError:
            raise Lost from None
        return found

    def stop(self) -> None:
        with suppress(Exception):  # the machine may be gone
            self._ray.kill(self._actor)


class Workers:
    """Workers of one state of a base. They are started when there is something to do, and as many as there is to do."""

    def __init__(self, machines: Machines, opening: Opening, progress: Progress) -> None:
        self._machines, self._opening, self._progress = machines, opening, progress
        self._alive, self._idle = set[Worker](), list[Worker]()
        self._loading = dict[Worker, int]()  # how many openings each has not answered
        self._started = 0

    def each(
        self, function: Callable[..., Any], *given: Any, in_order: bool = False
    ) -> Callable[[Sequence[Any]], Iterator[tuple[int, Any]]]:
        """`map` of ``function(*given, part, opened)`` over parts; a module-level function."""
        return lambda parts: self.map([partial(function, *given, part) for part in parts], in_order=in_order)

    def map(self, tasks: Sequence[Task], *, in_order: bool = False) -> Iterator[tuple[int, Any]]:
        """The place of each task and what came of it, as they are finished. They are begun in their order.

        Args:
            in_order: give them back in their order too. A worker that is ahead keeps its answer, and is given nothing until it is taken:
                so the driver never holds more than one.

        Raises:
            PatchhubError: what a task raised, or the loading of the base: the others are stopped then.
            EditError: one task, or the loading of the base with nothing finished between, lost three workers.
        """
        waiting, given = deque(range(len(tasks))), dict[Worker, int]()
        lost: Counter[int | None] = Counter()
        turn = 0
        try:
            while waiting or given:
                self._start(min(self._machines.count, len(waiting) + len(given)) - len(given))
                while waiting and self._idle:
                    worker, number = self._idle.pop(), waiting.popleft()
                    given[worker] = number
                    worker.give(pickle.dumps(tasks[number]))
                awaited = [worker for worker, number in given.items() if not in_order or number == turn]
                for worker in self._machines.answered([*awaited, *self._loading]):
                    place, openings = given.pop(worker, None), self._loading.pop(worker, 0)
                    try:
                        found = _read(worker.take())
                    except Lost:
                        lost[place] += 1
                        self._lose(worker, place, lost[place])
                        waiting.extendleft([] if place is None else [place])
                        continue
                    if openings > 1:  # it was moved before it had loaded
                        self._loading[worker] = openings - 1
                        continue
                    self._idle.append(worker)
                    lost[None] = (
                        0  # a cluster that has not noticed yet that a machine is gone may put a new worker there
                    )
                    if place is not None:
                        turn += 1
                        yield place, found
        except BaseException:
            self.close()
            raise

    def move(self, opening: Opening) -> None:
        """Put the workers, none of which has a task, into another state of the same base; those still to be started begin there."""
        self._opening, message = opening, pickle.dumps(opening)
        for worker in (*self._loading, *self._idle):
            worker.give(message)
            self._loading[worker] = self._loading.get(worker, 0) + 1
        self._idle = []

    def _start(self, wanted: int) -> None:
        """See to it that so many workers are idle or on their way there."""
        for _ in range(wanted - len(self._idle) - len(self._loading)):
            worker = self._machines.start(self._started, self._opening)
            self._alive.add(worker)
            self._loading[worker] = 1
            self._started += 1

    def _lose(self, worker: Worker, place: int | None, times: int) -> None:
        worker.stop()
        self._alive.discard(worker)
        what = "loading the base" if place is None else "the same task"
        if times >= _TRIES:
            raise EditError(
                f"{times} workers were lost at {what}",
                remedy="Is there memory for so many? Give fewer --workers; in a script, commit under `if __name__ == '__main__':`.",
            )
        self._progress.warn(
            f"a worker was lost at {what if place is None else 'its task'}, which another one does again"
        )

    def close(self) -> None:
        """Stop all, whatever they are doing."""
        for worker in self._alive:
            worker.stop()
        self._alive, self._idle, self._loading = set(), [], {}


def _read(answer: bytes) -> Any:
    found, error = pickle.loads(answer)
    if error is not None:
        raise error
    return found


def written_by(
    workers: Workers | None,
    tree: Worktree,
    room: Mapping[str, int],
    *,
    changes: Mapping[int, Sequence[Delta]] = NO_CHANGES,
    chat: Chat | None = None,
    expected: Mapping[str, Sequence[int]] = NOTHING,
    enough: Callable[[str, str], bool] | None = None,
) -> dict[str, str]:
    """What a worktree's model writes after each prompt (`continue_within`), by its workers where there are some.

    The batches, and so what is written, are the same either way.

    Args:
        changes: what the FFN output projection of each layer adds besides.
        enough: can be pickled.
    """
    size = tree.batch_tokens
    how: dict[str, Any] = {"chat": chat, "batch_tokens": size, "enough": enough}
    batches = read_together(tree.tokenizer, room, chat=chat, batch_tokens=size) if workers else []
    if workers is None or len(batches) < 2:
        with side_paths(tree.stack, changes):
            return continue_within(tree.model, tree.tokenizer, room, expected=expected, **how)
    written = dict.fromkeys(room, "")
    parts = [({p: room[p] for p in batch}, {p: expected[p] for p in batch if p in expected}) for batch in batches]
    for _, found in workers.each(_written, changes, how)(parts):
        written.update(found)
    return written


def _written(
    changes: Mapping[int, Sequence[Delta]],
    how: Mapping[str, Any],
    part: tuple[Mapping[str, int], Mapping[str, Sequence[int]]],
    opened: Opened,
) -> dict[str, str]:
    """A worker's batch."""
    room, expected = part
    with side_paths(opened.stack, changes):
        return continue_within(opened.model, opened.tokenizer, room, expected=expected, **how)


def machines_of(count: int | None, on: str | None) -> Machines:
    """Where workers run; arguments as for `workers_of`, one of them given."""
    return Here(count) if count is not None and on is None else OnRay(str(on), count)


@contextmanager
def workers_of(tree: Worktree, count: int | None, on: str | None, progress: Progress) -> Iterator[Workers | None]:
    """Workers that hold a worktree's model, stopped at the end; None where neither a number nor a cluster is given.

    Args:
        count: how many; None: as many as the cluster has GPUs, or machines.
        on: the address of a Ray cluster; None: this machine.
    """
    if count is None and on is None:
        yield None
        return
    machines = machines_of(count, on)
    workers = Workers(machines, Opening.of(tree), progress)
    try:
        yield workers
    finally:
        workers.close()
        machines.close()
