"""Facts per second of wall time that a commit writes with several workers, beside one worker and beside the process alone.

    python -m tests.benchmarks.workers --model DIR --facts FILE --text FILE [--count N] [--workers 1,2]

The metric is made first, from the text; then each number of workers commits the same facts to a copy of the same empty repository, one
after the other. Every process has one thread. Whether the commits are the same is said, and how the time is shared among the stages; the
machine's load is read before each run, since whatever else runs takes the processors that the workers need: CPU seconds say more then."""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from patchhub.progress import Silent

AUTHOR, TIME = "Ada <ada@example.org>", "2026-01-01T00:00:00Z"


class Stopwatch(Silent):
    """Hears of stages, and keeps their seconds."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: dict[str, float] = {}
        self._label, self._begun = "opening", time.perf_counter()

    def stage(self, label: str, total: int) -> None:
        now = time.perf_counter()
        self.seconds[self._label] = self.seconds.get(self._label, 0.0) + now - self._begun
        self._label, self._begun = label, now


def run(folder: Path, facts: list[dict[str, str]], workers: int) -> None:
    """One commit, in a process of its own; what was measured goes to the standard output as JSON."""
    from patchhub.repository import Repository

    watch, begun = Stopwatch(), time.perf_counter()
    repository = Repository(folder, progress=watch)
    done = repository.commit(facts, message="x", author=AUTHOR, time=TIME, force=True, workers=workers or None)
    watch.stage("", 0)
    driver, others = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    commit = repository.store.commit(done.commit)
    print(
        json.dumps(
            {
                "seconds": time.perf_counter() - begun,
                "driver": driver.ru_utime + driver.ru_stime,
                "others": others.ru_utime + others.ru_stime,
                "commit": done.commit,
                "set": commit.set_digest,
                "held": done.held,
                "stages": watch.seconds,
            }
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--facts", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--workers", default="1,2", help="0 is the process alone")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    if given.one:
        run(given.one, json.loads(given.facts.read_text())[: given.count], int(given.workers))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["PATCHHUB_CACHE"] = str(folder / "own")
        first, command = folder / "first", [sys.executable, "-m", "patchhub", "--repo", str(folder / "first")]
        first.mkdir()
        for arguments in (["init", str(given.model)], ["metric", "compute", "--text", str(given.text)]):
            subprocess.run([*command, *arguments], check=True, stdout=subprocess.DEVNULL)
        found = []
        for workers in given.workers.split(","):
            copy = folder / f"with-{workers}"
            shutil.copytree(first, copy)
            load = os.getloadavg()[0]
            again = [sys.executable, "-m", "tests.benchmarks.workers", *sys.argv[1:]]
            done = subprocess.run(
                [*again, "--one", str(copy), "--workers", workers], check=True, stdout=subprocess.PIPE
            )
            found.append({"workers": int(workers), "load": load, **json.loads(done.stdout)})
            one = found[-1]
            cpu = f"CPU {one['driver']:.0f} s in the driver and {one['others']:.0f} s in workers"
            print(
                f"{workers} workers: {given.count / one['seconds']:.3f} facts/s ({one['seconds']:.1f} s; {cpu}; load {load:.1f} "
                f"before), {one['held']} held, commit {one['commit'][:12]}"
            )
            stages = [f"{label} {seconds:.1f}" for label, seconds in one["stages"].items() if seconds >= 0.5]
            print(f"    {', '.join(stages)}", flush=True)
        same = len({one["commit"] for one in found}) == 1
        ratio = found[0]["seconds"] / found[-1]["seconds"]
        values = [one["stages"].get("optimising values", 0.0) for one in found]
        print(
            f"{found[-1]['workers']} beside {found[0]['workers']}: {ratio:.2f} times the facts per second of the whole commit, "
            f"{values[0] / values[-1]:.2f} of the values alone; {'the same commit' if same else 'OTHER COMMITS'}"
        )


if __name__ == "__main__":
    main()
