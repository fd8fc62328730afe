"""Packs beside files: what a push, a fetch and `gc --pack` of a long history leave on the disk, and what they take.

    python -m tests.benchmarks.packs [--commits 1000] [--facts 2]

Each way in turn, on one store of real columns and solved deltas of two small weights, to a folder. Seconds are of the wall and of the
processor; the disk is waited for as ever.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter, process_time

from patchhub.progress import Silent
from patchhub.remotes import parcels, receive, sync
from patchhub.remotes.receive import Intake, Limits
from patchhub.remotes.remote import Source
from patchhub.sets.columns import tensor_check
from patchhub.store.fsck import check, pack_objects
from patchhub.store.store import Store
from patchhub.who import Who
from tests.remotes.stores import AUTHOR, SHAPES, TIME, add_batch, make_store

WHO = Who(AUTHOR, TIME)


def files(folder: Path) -> str:
    found = [path for path in folder.rglob("*") if path.is_file() and path.name not in ("lock", "patchhub.db")]
    return f"{len(found):6,} files {sum(path.stat().st_size for path in found) / 1e6:8.1f} MB"


def timed(name: str, act: Callable[[], object], folder: Path) -> None:
    wall, cpu = perf_counter(), process_time()
    act()
    print(f"{name:<32} {perf_counter() - wall:7.2f} s {process_time() - cpu:7.2f} CPU s  {files(folder)}", flush=True)


def push(store: Store, address: Path) -> None:
    shown = sync.Shown(Source(store.config.base_id, None, None), lambda commit, withheld: {})
    sync.push(store, sync.open_remote(str(address)), "origin", ["refs/heads/main"], shown, who=WHO)


def fetch(folder: Path, address: Path) -> None:
    with Store.open(folder) as store:
        intake = Intake(Limits(1 << 34, SHAPES, SHAPES), tensor_check(SHAPES, SHAPES))
        receive.fetch(store, sync.open_remote(str(address)), "origin", intake, who=WHO, progress=Silent())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commits", type=int, default=1000)
    parser.add_argument("--facts", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        ours = make_store(root / "ours")
        start = perf_counter()
        for number in range(options.commits):
            add_batch(ours, range(options.facts * number, options.facts * (number + 1)))
        print(f"made {options.commits:,} commits in {perf_counter() - start:.0f} s; {files(ours.root)}")
        ours.close()
        for kind, least in (("files", 1 << 60), ("packs", 16)):
            parcels.PACK_FROM = least  # type: ignore[misc]
            make_store(root / kind).close()
            address = root / f"remote of {kind}"
            with Store.open(root / "ours") as store:
                timed(f"push as {kind}", lambda s=store, a=address: push(s, a), address)  # type: ignore[misc]
            timed(f"fetch as {kind}", lambda k=kind, a=address: fetch(root / k, a), root / kind)  # type: ignore[misc]
        with Store.open(root / "ours") as store:
            for kind in ("files", "packs"):
                if kind == "packs":
                    timed("gc --pack", lambda: pack_objects(store, dry_run=False), store.root)
                timed(f"fsck of {kind}, without proofs", lambda: check(store), store.root)
    os.sync()


if __name__ == "__main__":
    main()
