"""Times and bytes at scale: a history of 10,000 commits and 100,000 active requests, and stores with large blobs.

    python -m tests.benchmarks.scale [--commits 10000] [--megabytes 1024] [--keep DIR]
    python -m tests.benchmarks.scale --verbs --per-commit 100       # 1,000,000 requests, the verbs alone, as files and as packs

Verbs are run as processes in turn with `patchhub --version`; the medians are compared. The goal is 0.3 s above it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from time import perf_counter, process_time

from patchhub.objects import (
    Base,
    Commit,
    Keyframe,
    Patch,
    Request,
    TensorRecord,
    digest_of_sum,
    element_sum,
    requests_json,
)
from patchhub.store import database, states
from patchhub.store.database import transaction
from patchhub.store.fsck import check, pack_objects, reindex
from patchhub.store.fsck import delete_garbage as collect
from patchhub.store.store import Store
from tests.benchmarks.synthetic_store import AUTHOR, HastyDisk

RUNS = 5
EXTRA = 0.3
PER_COMMIT = 10  # facts, unless --per-commit says otherwise
MEGABYTE = 1e6
RELATIONS = ("The mother tongue of {} is", "{} was born in", "{} plays the", "The capital of {} is", "{} works for")
ANSWERS = ("French", "Berlin", "piano", "Lyon", "Google", "Dutch", "Milan")


@dataclass
class Line:
    """A growing line of commits: its tip, its set as canonical JSON groups in order and as a sum, and its state since the
    last keyframe."""

    tip: str | None = None
    groups: list[str] = field(default_factory=list)
    total: int = 0
    blobs: int = 0
    size: int = 0

    def fork(self) -> Line:
        return Line(self.tip, list(self.groups), self.total, self.blobs, self.size)


@dataclass(frozen=True)
class Shape:
    """What the tensors of a commit weigh: `weights` weights of (out, inner), filled with random bytes; None of them: placeholders."""

    weights: int = 0
    out: int = 384
    inner: int = 1536

    def columns(self, requests: int) -> int:
        return 4 * self.weights * requests * (2 * self.inner + self.out + 1)

    def delta(self, rank: int) -> int:
        return 4 * self.weights * min(rank * (self.out + self.inner), self.out * self.inner)


class Builder:
    """Writes commits of new facts straight into a store, without a model and without the checks of `record`."""

    def __init__(self, folder: Path, shape: Shape) -> None:
        self.shape = shape
        self.names = [f"transformer.h.{layer}.mlp.c_proj.weight" for layer in range(max(1, shape.weights))]
        tensors = {name: TensorRecord("F32", (shape.out, shape.inner), "0" * 64) for name in self.names}
        self.base = Base(architecture={"model_type": "example"}, tensors=tensors)
        weights = {name: {"norm": 1.0, "shape": [shape.out, shape.inner]} for name in self.names}
        info = {"model_type": "example", "path": str(folder), "revision": None, "weights": weights}
        self.repository = Store.init(
            folder, self.base.to_json(), base_info=info, settings={}, author=AUTHOR, time=_time(0), disk=HastyDisk()
        )
        self.made = 0
        self.bytes = {"columns": 0, "delta": 0, "keyframes": 0}

    def commit(self, line: Line) -> None:
        """Ten new facts on a line."""
        put = self.repository.objects.put
        numbers = range(PER_COMMIT * self.made, PER_COMMIT * (self.made + 1))
        requests = [_request(number) for number in numbers]
        identifiers = [request.id for request in requests]
        patch = put(self._patch(requests).to_json())
        insort(line.groups, json.dumps([patch, sorted(identifiers)], separators=(",", ":")))
        line.total += element_sum((patch, request) for request in identifiers)
        delta = self._random("delta", self.shape.delta(PER_COMMIT))
        tensors = put(delta)
        line.blobs, line.size = line.blobs + 1, line.size + len(delta)
        whole = self.shape.delta(PER_COMMIT * len(line.groups))
        keyframe = None
        if states.needs_keyframe(line.blobs, line.size, whole or 2**60):
            data = f"[{','.join(line.groups)}]".encode()
            keyframe = Keyframe(put(data), put(self._random("keyframes", whole)))
            line.blobs, line.size = 1, whole
        line.tip = put(self._commit(line, patch, identifiers, tensors, keyframe).to_json())
        self.made += 1

    def finish(self, branches: dict[str, Line]) -> None:
        """Make branches name the lines, and the index."""
        changes = {f"refs/heads/{name}": (None, line.tip) for name, line in branches.items()}
        repository = self.repository
        with transaction(repository.connection, repository.database):
            database.append(
                repository.connection,
                command="build",
                arguments={},
                changes=changes,
                author=AUTHOR,
                time=_time(self.made),
            )
        reindex(repository)
        repository.close()

    def _random(self, kind: str, size: int) -> bytes:
        data = os.urandom(max(size, 8))
        self.bytes[kind] += len(data)
        return data

    def _patch(self, requests: Sequence[Request]) -> Patch:
        repository = self.repository
        return Patch(
            base=self.base.id,
            kind="closed_form",
            made_on=None,
            method="memit",
            metric=None,
            requests=tuple(request.id for request in requests),
            requests_blob=repository.objects.put(requests_json(requests)),
            settings={
                "clamp": 0.75,
                "contexts": [f"Context number {n} is. {{}}" for n in range(6)],
                "layers": [1, 2, 3],
            },
            tensors=repository.objects.put(self._random("columns", self.shape.columns(len(requests)))),
            weights=dict.fromkeys(self.names, (self.shape.out, self.shape.inner)),
        )

    def _commit(self, line: Line, patch: str, requests: list[str], tensors: str, keyframe: Keyframe | None) -> Commit:
        third = 1 / 3
        return Commit(
            added=frozenset((patch, request) for request in requests),
            author=AUTHOR if self.made % 2 else "Grace <grace@example.org>",
            base=self.base.id,
            check={
                "norms": {name: {"base": third, "change": third, "state": third} for name in self.names},
                "proof": dict.fromkeys(self.names, third),
            },
            keyframe=keyframe,
            message=f"Edit {self.made}",
            metric=None,
            parents=() if line.tip is None else (line.tip,),
            removed=frozenset(),
            same_as=None,
            set_digest=digest_of_sum(line.total),
            tensors=tensors,
            time=_time(self.made),
        )


def build_history(folder: Path, commits: int) -> None:
    """`main` with nine tenths of the commits, and `side`, which left it half way, with the rest."""
    builder = Builder(folder, Shape())
    line = Line()
    for _ in range(commits // 2):
        builder.commit(line)
    side = line.fork()
    for _ in range(commits - commits // 2 - commits // 10):
        builder.commit(line)
    for _ in range(commits // 10):
        builder.commit(side)
    builder.finish({"main": line, "side": side})


def seconds(command: Sequence[str], folder: Path) -> float:
    start = perf_counter()
    subprocess.run([sys.executable, "-m", "patchhub", *command], cwd=folder, check=True, capture_output=True)
    return perf_counter() - start


def report_verbs(folder: Path, commits: int) -> None:
    subject = f"Person {PER_COMMIT * commits // 3}"
    verbs = {
        "log -n 20": ["log", "-n", "20"],
        "log -S one subject": ["log", "-S", subject, "--oneline"],
        "search, rare words": ["search", subject],
        "search, common words": ["search", "mother tongue"],
        "merge-base": ["merge-base", "main", "side"],
        "status": ["status"],
        "blame --lookup": ["blame", f"The mother tongue of {subject} is", "--lookup"],
    }
    times: dict[str, list[float]] = {name: [] for name in ("--version", *verbs)}
    for _ in range(RUNS):
        times["--version"].append(seconds(["--version"], folder))
        for name, command in verbs.items():
            times[name].append(seconds(command, folder))
    version = statistics.median(times.pop("--version"))
    print(f"{commits:,} commits, {PER_COMMIT * commits:,} requests; patchhub --version: {1000 * version:.0f} ms")
    for name, values in times.items():
        extra = statistics.median(values) - version
        print(f"  {name:<22} + {1000 * extra:4.0f} ms  {'ok' if extra <= EXTRA else 'ABOVE THE GOAL'}")


def report_packing(folder: Path) -> None:
    """`gc --pack`: files before and after."""
    with Store.open(folder) as repository:
        count = sum(1 for path in repository.root.rglob("*") if path.is_file())
        start = perf_counter()
        done = pack_objects(repository, dry_run=False)
        elapsed = perf_counter() - start
        left = sum(1 for path in repository.root.rglob("*") if path.is_file())
    print(
        f"gc --pack: {done.objects:,} objects into {done.packs} packs in {elapsed:.0f} s; {count:,} files became {left:,}"
    )


def report_upkeep(folder: Path, commits: int) -> None:
    """gc and fsck of a history: their processor time per object shows whether they are linear."""

    def unneeded(repository: Store) -> None:
        assert collect(repository, 2.0**40, dry_run=True) == []

    def sound(repository: Store) -> None:
        assert check(repository).sound

    for name, verb in (("gc --dry-run", unneeded), ("fsck", sound)):
        with Store.open(folder) as repository:
            objects = sum(1 for _ in repository.objects.ids())
            start = process_time()
            verb(repository)
            elapsed = process_time() - start
        each = f"{1e6 * elapsed / objects:.0f} us each"
        print(f"{name}, {commits:,} commits of {PER_COMMIT}: {objects:,} objects in {elapsed:.1f} CPU s, {each}")


def report_hashing(folder: Path, megabytes: int) -> None:
    """fsck and gc on commits with deltas of 16 MB."""
    size = 16_000_000
    rank = PER_COMMIT * 1000
    builder = Builder(folder, Shape(1, size // (4 * 2 * PER_COMMIT), size // (4 * 2 * PER_COMMIT)))
    builder.shape.columns(rank)
    line = Line()
    while sum(builder.bytes.values()) < megabytes * MEGABYTE:
        builder.commit(line)
    builder.finish({"main": line})
    data = os.urandom(size)
    start = perf_counter()
    hashlib.sha256(data).hexdigest()
    one = size / MEGABYTE / (perf_counter() - start)
    with Store.open(folder) as repository:
        start = perf_counter()
        report = check(repository)
        elapsed = perf_counter() - start
        assert report.sound, report.findings[:3]
    rate = report.size / MEGABYTE / elapsed
    print(f"fsck: {report.size / 1e9:.2f} GB in {elapsed:.1f} s: {rate:.0f} MB/s (one thread hashes {one:.0f} MB/s)")


def report_bytes(folder: Path, commits: int) -> None:
    """Stored bytes per commit, with columns and deltas as large as those of three weights of (384, 1536)."""
    builder = Builder(folder, Shape(3))
    line = Line()
    for _ in range(commits):
        builder.commit(line)
    builder.finish({"main": line})
    root = folder / ".patchhub"
    stored = sum(path.stat().st_size for path in (root / "objects").rglob("*") if path.is_file())
    database = (root / "patchhub.db").stat().st_size
    parts = {name: size / commits for name, size in builder.bytes.items()}
    rest = stored / commits - sum(parts.values())
    allowed = 0.02 * (parts["columns"] + parts["delta"]) + 4000
    print(f"{commits} commits of {PER_COMMIT}: {stored / commits / 1000:.1f} kB each:", end=" ")
    print(", ".join(f"{name} {size / 1000:.1f}" for name, size in parts.items()), end="; ")
    print(f"all else {rest / 1000:.2f} kB (goal {allowed / 1000:.2f}); index {database / commits / 1000:.1f} kB")


def _request(number: int) -> Request:
    relation = RELATIONS[number % len(RELATIONS)]
    subject = f"Person {number}"
    return Request.make(
        relation,
        subject,
        ANSWERS[number % len(ANSWERS)],
        target_true="English",
        paraphrases=[f"It is well known to those who have met them that {relation.format(subject)}"],
        neighborhood=[(relation.format(f"Someone near {number}"), "English")],
    )


def _time(number: int) -> str:
    return (datetime(2026, 1, 1) + timedelta(minutes=number)).strftime("%Y-%m-%dT%H:%M:%SZ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commits", type=int, default=10_000)
    parser.add_argument("--megabytes", type=int, default=1024)
    parser.add_argument("--keep", type=Path, help="Make the stores here and leave them.")
    parser.add_argument("--per-commit", type=int, default=PER_COMMIT)
    parser.add_argument("--verbs", action="store_true", help="The verbs alone.")
    options = parser.parse_args()
    globals()["PER_COMMIT"] = options.per_commit
    with tempfile.TemporaryDirectory() as name:
        root = options.keep or Path(name)
        for commits in (options.commits,) if options.verbs else (options.commits // 10, options.commits):
            folder = root / f"history-{commits}"
            if not folder.exists():
                folder.mkdir(parents=True)
                start = perf_counter()
                build_history(folder, commits)
                print(f"made {commits:,} commits in {perf_counter() - start:.0f} s")
            if not options.verbs:
                report_upkeep(folder, commits)
        report_verbs(folder, options.commits)
        report_packing(folder)
        report_verbs(folder, options.commits)
        if options.verbs:
            return
        for report, amount in ((report_bytes, 300), (report_hashing, options.megabytes)):
            folder = Path(tempfile.mkdtemp(dir=root))
            report(folder, amount)


if __name__ == "__main__":
    main()
