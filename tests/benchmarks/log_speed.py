"""How long `patchhub log -n 20` takes in a store of 10,000 commits, beside a Python that only imports click and sqlite3.

    python -m tests.benchmarks.log_speed [COMMITS]

The goal is less than twice the empty program's time plus 150 ms. Both are run in turn; the medians are compared.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

from patchhub.store.store import Store
from tests.benchmarks.synthetic_store import build

RUNS = 11
EMPTY = (sys.executable, "-c", "import click, sqlite3")
LOG = (sys.executable, "-m", "patchhub", "log", "-n", "20")


def open_and_read(directory: Path) -> float:
    """Seconds to open the store and read 20 commits, within a running program."""
    start = time.perf_counter()
    with Store.open(directory) as repository:
        tip = repository.resolve("HEAD")
        assert tip is not None
        assert len(list(islice(repository.log(tip), 20))) == 20
    return time.perf_counter() - start


def run(command: tuple[str, ...], directory: Path) -> float:
    """Seconds that a process takes."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    start = time.perf_counter()
    subprocess.run(command, cwd=directory, env=environment, check=True, capture_output=True)
    return time.perf_counter() - start


def main(commits: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        build(directory, commits)
        inside = statistics.median(open_and_read(directory) for _ in range(RUNS))
        pairs = [(run(EMPTY, directory), run(LOG, directory)) for _ in range(RUNS)]
    empty, log = (statistics.median(times) for times in zip(*pairs, strict=True))
    print(f"{commits} commits: open and read 20 of them in {1000 * inside:.1f} ms")
    print(f"patchhub log -n 20: {1000 * log:.0f} ms, empty program: {1000 * empty:.0f} ms, ratio {log / empty:.2f}")
    print(f"goal: below {1000 * (2 * empty + 0.15):.0f} ms: {'met' if log < 2 * empty + 0.15 else 'missed'}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000)
