"""Every verb that writes, with a disk that dies or fails at each call that changes it; run under the shim.

    cc -shared -fPIC -o shim.so tests/faults/shim.c -ldl
    LD_PRELOAD=./shim.so python -m tests.faults.sweep shim.so [--stride 7] [--verbs merge,push]

Each case is a forked process on a copy of one store. Afterwards the store must be sound, and it and the remote hold what they held before
or what the verb makes of it; a verb that ended well must have landed, and one that fails must say so in an error of patchhub's own.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import json
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

from patchhub.errors import PatchhubError
from patchhub.porcelain import change, refs, share, upkeep
from patchhub.porcelain.merge import merge
from patchhub.progress import Silent
from patchhub.store.fsck import check
from patchhub.store.store import Store
from patchhub.who import Who
from tests.remotes.stores import AUTHOR, TIME, add_batch, make_history, make_store

WHO = Who(AUTHOR, TIME, "swept")
HOW = {"killed before": 1, "killed half-way": 2, "killed after": 3, "fails once": 4, "fails from then on": 5}
DIED, WELL, SAID, MADE, CRASHED = 77, 0, 3, 4, 1

VERBS: Mapping[str, Callable[[Store, Path], object]] = {
    "commit": lambda s, _: add_batch(s, range(20, 22)),
    "merge": lambda s, _: merge(s, "side", WHO),
    "revert": lambda s, _: change.revert(s, "HEAD", WHO),
    "cherry-pick": lambda s, _: change.cherry_pick(s, "side", WHO),
    "squash": lambda s, _: change.squash(s, "2", WHO),
    "branch": lambda s, _: refs.create_branch(s, "new", "HEAD", WHO),
    "tag": lambda s, _: refs.create_tag(s, "v2", "HEAD", WHO),
    "switch": lambda s, _: refs.switch(s, "side", WHO),
    "reset": lambda s, _: refs.reset(s, "HEAD~1", WHO),
    "undo": lambda s, _: refs.undo(s, who=WHO),
    "config": lambda s, _: upkeep.config_set(s, "author", "Bob <bob@example.org>"),
    "remote add": lambda s, f: share.remote_add(s, "other", str(f / "other")),
    "push": lambda s, _: share.push(s, "origin", (), Silent(), who=WHO),
    "fetch": lambda s, _: share.fetch(s, "full", Silent(), who=WHO),
    "gc": lambda s, _: upkeep.collect(s, now="2030-01-01T00:00:00Z"),
    "fsck --reindex": lambda s, _: upkeep.fsck(s, Silent(), rebuild=True),
}


def prepare(folder: Path) -> None:
    """A store with two branches, an empty remote, one that holds more than the store does, and garbage to collect."""
    with make_store(folder / "theirs") as theirs:
        add_batch(theirs, range(40, 43))
        share.remote_add(theirs, "full", str(folder / "full"))
        share.push(theirs, "full", (), Silent(), who=WHO)
    with make_history(folder / "store") as store:
        share.remote_add(store, "origin", str(folder / "remote"))
        share.remote_add(store, "full", str(folder / "full"))
        store.objects.put(b"needed by nothing")
    for path in (folder / "store").rglob("*"):
        os.utime(path, (1, 1))


def state(folder: Path) -> str:
    """What is there to lose: refs and config of the store, and the refs of the remote."""
    with Store.open(folder / "store") as store:
        found = {"refs": store.refs(), "settings": dict(store.config.settings)}
    manifest = folder / "remote" / "patchhub.json"
    if manifest.exists():
        found["remote"] = json.loads(manifest.read_text())["refs"]
    return json.dumps(found, sort_keys=True)


def act(verb: str, folder: Path) -> int:
    """What became of a verb: one of the codes above."""
    try:
        with Store.open(folder / "store") as store:
            VERBS[verb](store, folder)
    except PatchhubError as error:
        return MADE if "is made" in error.message else SAID
    return WELL


class Sweep:
    def __init__(self, shim: str, folder: Path) -> None:
        self._shim = ctypes.CDLL(shim)
        self._shim.counted.restype = ctypes.c_long
        self._folder = folder
        self.found: Counter[tuple[str, str, str]] = Counter()
        self.wrong: list[str] = []

    def run(self, verb: str, stride: int, first: int = 1) -> int:
        """All cases of one verb; returns how many calls it makes."""
        made = self._case(verb, 0, 0)
        calls = self._counted
        before, after = state(self._folder / "made"), state(self._folder / "copy")
        assert made == WELL, f"{verb} fails without a fault"
        for name, how in HOW.items():
            for number in range(first, calls + 1, stride):
                code = self._case(verb, number, how)
                self._judge(f"{verb}, {name} call {number}", (verb, name), code, before, after)
        return calls

    def _case(self, verb: str, number: int, how: int) -> int:
        copy = self._folder / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(self._folder / "made", copy)
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            code = CRASHED
            try:
                os.chdir(copy)
                self._shim.arm(
                    os.fsencode(copy), number, how, errno.ENOSPC if how == HOW["fails from then on"] else errno.EIO
                )
                code = act(verb, copy)
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                calls = self._shim.counted()
                self._shim.arm(b"", 0, 0, 0)
                os.write(writing, str(calls).encode())
                os._exit(code)
        os.close(writing)
        with os.fdopen(reading) as pipe:
            told = pipe.read()
        self._counted = int(told or 0)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def _judge(self, case: str, kind: tuple[str, str], code: int, before: str, after: str) -> None:
        problem = ""
        try:
            with Store.open(self._folder / "copy" / "store") as store:
                report = check(store)
            problem = "" if report.sound else f"not sound: {report.words()}"
            found = state(self._folder / "copy")
            if found not in (before, after) and "push" not in case:  # a push moves the remote, then what is known of it
                problem = problem or "neither the old state nor the new one"
            landed = before != after and found == after
            if code == WELL and before != after and not landed:
                problem = problem or "said well, and did not land"
            if code == SAID and landed:
                problem = problem or "said failed, and landed"
        except PatchhubError as error:
            problem = f"cannot be opened: {error}"
        if code == CRASHED:
            problem = problem or "a traceback"
        self.found[(*kind, "wrong" if problem else "right")] += 1
        if problem:
            self.wrong.append(f"{case}: {problem}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shim")
    parser.add_argument("--stride", type=int, default=1)
    parser.add_argument("--first", type=int, default=1)
    parser.add_argument("--verbs", default=",".join(VERBS))
    options = parser.parse_args()
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as name:
        folder = Path(name).resolve()
        (folder / "made").mkdir()
        prepare_at = folder / "made"
        sweep = Sweep(options.shim, folder)
        # remotes are named by absolute path, so the store is made where the copies will be
        (folder / "copy").mkdir()
        prepare(folder / "copy")
        shutil.rmtree(prepare_at)
        shutil.move(folder / "copy", prepare_at)
        calls = {verb: sweep.run(verb, options.stride, options.first) for verb in options.verbs.split(",")}
    ends = ("right", "wrong")
    table = {how: {end: sum(sweep.found[verb, how, end] for verb in VERBS) for end in ends} for how in HOW}
    json.dump({"calls": calls, "cases": table, "wrong": sweep.wrong}, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
