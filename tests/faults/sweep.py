"""Every verb that writes, with a disk that dies or fails at each call that changes it; run under the shim.

    cc -shared -fPIC -o shim.so tests/faults/shim.c -ldl
    LD_PRELOAD=./shim.so python -m tests.faults.sweep shim.so [--stride 7] [--verbs merge push]

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
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final

import numpy as np
from safetensors.numpy import save_file

from patchhub.errors import PatchhubError, RepositoryError
from patchhub.fsio import is_shared
from patchhub.porcelain import change, refs, share
from patchhub.porcelain.exchange import import_change
from patchhub.porcelain.merge import abort_merge, merge, then_refreshed
from patchhub.porcelain.trust.signing import approve, sign
from patchhub.progress import Silent
from patchhub.remotes import parcels
from patchhub.signing.ssh import SshKey
from patchhub.store.fsck import check
from patchhub.store.store import Store
from patchhub.who import Who
from tests.remotes.stores import AUTHOR, TIME, add_batch, add_patch, make_history, make_request, make_store

WHO = Who(AUTHOR, TIME, "swept")
HOW = {"killed before": 1, "killed half-way": 2, "killed after": 3, "fails once": 4, "fails from then on": 5}
DIED, WELL, SAID, MADE, CRASHED = 77, 0, 3, 4, 1

Verb = Callable[[Path], object]
"""What is done in a folder that `prepare` or `prepare_with_model` filled."""


def on_store(verb: Callable[[Store, Path], object], name: str = "store") -> Verb:
    def done(folder: Path) -> object:
        with Store.open(folder / name) as store:
            return verb(store, folder)

    return done


def packed(folder: Path, verb: str) -> object:
    """A verb by which few objects travel in packs as well; in this process alone, which ends then."""
    parcels.PACK_FROM = 1  # type: ignore[misc]
    return VERBS[verb](folder)


def signing(folder: Path) -> Who:
    return Who(AUTHOR, TIME, "swept", SshKey(folder / "key", dict(os.environ)))


VERBS: Final[Mapping[str, Verb]] = {
    "commit": on_store(lambda s, _: add_batch(s, range(20, 22))),
    "merge": on_store(lambda s, _: merge(s, "side", WHO)),
    "merge, which stops": on_store(lambda s, _: merge(s, "against", WHO)),
    "merge --abort": on_store(lambda s, _: abort_merge(s), "stopped"),
    "revert": on_store(lambda s, _: change.revert(s, "HEAD", WHO)),
    "revert, signed": on_store(lambda s, f: change.revert(s, "HEAD", signing(f))),
    "cherry-pick": on_store(lambda s, _: change.cherry_pick(s, "side", WHO)),
    "squash": on_store(lambda s, _: change.squash(s, "2", WHO)),
    "import": on_store(lambda s, f: import_change(s, f / "adapter", WHO, Silent(), tolerance=1e-6)),
    "branch": on_store(lambda s, _: refs.create_branch(s, "new", "HEAD", WHO)),
    "branch -m": on_store(lambda s, _: refs.rename_branch(s, "side", "new", WHO)),
    "branch -d": on_store(lambda s, _: refs.delete_branch(s, "side", WHO)),
    "tag": on_store(lambda s, _: refs.create_tag(s, "v2", "HEAD", WHO)),
    "tag -s": on_store(lambda s, f: refs.create_tag(s, "v2", "HEAD", signing(f))),
    "tag -d": on_store(lambda s, _: refs.delete_tag(s, "v1", WHO)),
    "sign": on_store(lambda s, f: sign(s, "HEAD~1..HEAD", signing(f))),
    "approve": on_store(lambda s, f: approve(s, "HEAD", signing(f))),
    "switch": on_store(lambda s, _: refs.switch(s, "side", WHO)),
    "reset": on_store(lambda s, _: refs.reset(s, "HEAD~1", WHO)),
    "undo": on_store(lambda s, _: refs.undo(s, who=WHO)),
    "redo": on_store(lambda s, _: refs.redo(s, who=WHO), "undone"),
    "config": on_store(lambda s, _: refs.config_set(s, "author", "Bob <bob@example.org>")),
    "remote add": on_store(lambda s, f: share.remote_add(s, "other", str(f / "other"))),
    "remote set-url": on_store(lambda s, _: share.remote_set_url(s, "full", "/elsewhere")),
    "remote rename": on_store(lambda s, _: share.remote_rename(s, "full", "filled", who=WHO)),
    "remote remove": on_store(lambda s, _: share.remote_remove(s, "full", who=WHO)),
    "push": on_store(lambda s, _: share.push(s, "origin", share.CURRENT, Silent(), who=WHO)),
    "push, packed": lambda folder: packed(folder, "push"),
    "fetch, packed": lambda folder: packed(folder, "fetch"),
    "fetch": on_store(lambda s, _: share.fetch(s, "full", Silent(), who=WHO)),
    "pull": on_store(lambda s, _: share.pull(s, "full", Silent(), who=WHO)),
    "gc": on_store(lambda s, _: refs.collect(s, now="2030-01-01T00:00:00Z")),
    "gc --pack": on_store(lambda s, _: refs.collect(s, now="2030-01-01T00:00:00Z", pack=True)),
    "gc --pack, of packs": on_store(lambda s, _: refs.collect(s, now="2030-01-01T00:00:00Z", pack=True), "packed"),
    "fsck --reindex": on_store(lambda s, _: refs.fsck(s, Silent(), rebuild=True)),
}


def init(folder: Path, *, shared: bool = False) -> object:
    from patchhub.porcelain.model import init as made

    return made(folder / "new", str(folder / "store" / "model"), Silent(), who=WHO, shared=shared)


def clone(folder: Path, *, shared: bool = False) -> object:
    base = str(folder / "store" / "model")
    return share.clone(str(folder / "remote"), folder / "new", Silent(), who=WHO, base=base, shared=shared)


def commit_signed(store: Store, folder: Path) -> object:
    from patchhub.editing.requests import Batch, Origin
    from patchhub.porcelain.commit import commit
    from tests.porcelain.taught import fact

    batch = Batch((fact("Seattle is what", "Milan"),), (Origin("a test"),), 0)
    return commit(store, batch, signing(folder), Silent(), force=True)


def update(store: Store, _: Path) -> object:
    from patchhub.porcelain.commit import update as updated

    return updated(store, "Manila", "French", WHO, Silent(), force=True)


def refresh(store: Store, _: Path) -> object:
    from patchhub.porcelain.commit import refresh as refreshed

    return refreshed(store, WHO, Silent(), force=True)


def merge_and_refresh(store: Store, _: Path) -> object:
    return then_refreshed(store, merge(store, "other", WHO), WHO, Silent(), force=True)


def evaluated(store: Store, _: Path) -> object:
    from patchhub.porcelain.measure import Evaluator, Facts, evaluate
    from tests.porcelain.taught import PLACES, fact

    return evaluate(Evaluator(store, Facts((fact(*PLACES[0]),), contexts=("So. {}",)), Silent()), "HEAD", WHO)


def metric(store: Store, _: Path) -> object:
    from patchhub.porcelain.metric import compute

    return compute(store, Silent(), layers=(3,))


def metric_imported(store: Store, folder: Path) -> object:
    from patchhub.porcelain.metric import import_any

    return import_any(store, [str(folder / "metric")], Silent())


MODEL_VERBS: Final[Mapping[str, Verb]] = {
    "init": init,
    "init --shared": lambda folder: init(folder, shared=True),
    "clone": clone,
    "clone --shared": lambda folder: clone(folder, shared=True),
    "commit -s": on_store(commit_signed),
    "update": on_store(update),
    "refresh": on_store(refresh),
    "merge --refresh": on_store(merge_and_refresh),
    "eval": on_store(evaluated),
    "metric compute": on_store(metric),
    "metric import": on_store(metric_imported, "bare"),
}
"""Those that run a model, a tiny one."""

REPEATED = ("init", "init --shared", "clone", "clone --shared")
"""Verbs that make a store: what one leaves that died is taken up, or taken away, by the next."""

IN_STEPS = ("push", "push, packed", "pull", "merge --refresh")
"""Verbs that may end after one of their steps: the remote and then what is known of it; the fetch, and then the merge; and so on."""

UNSWEPT: Mapping[str, str] = {
    "apply": "writes a checkpoint outside of the store",
    "bench": "works on copies of the store, and writes into the cache alone",
    "bisect": "runs `ask` and programs",
    "export": "writes outside of the store",
    "metric_export": "writes outside of the store",
    "report": "writes outside of the store",
    "tune": "writes what `config` writes",
}
"""Methods of `Repository` that write and are not here, with the reason; the first word stands for all that begin with it."""

LOOKS = """
    ask attach audit blame close diff load log made merge_base metric op_log reflog remote_list search show status verify verify_served
""".split()  # noqa: SIM905  # twenty names are one line of words
"""Methods of `Repository` that change no ref, object or setting."""


def key_at(path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)


def adapter_at(folder: Path) -> None:
    """A LoRA adapter of rank 1 for the second weight."""
    folder.mkdir()
    config = {"peft_type": "LORA", "lora_alpha": 2, "r": 1, "target_modules": ["h.1.out"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    factors = {"A": np.ones((1, 48), np.float32), "B": np.ones((6, 1), np.float32)}
    names = {f"base_model.model.h.1.out.lora_{name}.weight": factor for name, factor in factors.items()}
    save_file(names, folder / "adapter_model.safetensors")


def prepare(folder: Path) -> None:
    """A store with three branches, an empty remote, one that holds more than the store does, and garbage to collect; and two copies of
    it, in which a merge waits and in which something is undone, and one that is packed, its garbage too."""
    key_at(folder / "key")
    adapter_at(folder / "adapter")
    with make_store(folder / "theirs") as theirs:
        add_batch(theirs, range(40, 43))
        share.remote_add(theirs, "full", str(folder / "full"))
        share.push(theirs, "full", share.CURRENT, Silent(), who=WHO)
    with make_history(folder / "store") as store:
        refs.switch_to_new(store, "against", "HEAD~1", WHO)
        asked = make_request(3)
        add_patch(store, [type(asked).make(asked.prompt, asked.subject, "Dutch")], (99,))
        refs.switch(store, "main", WHO)
        share.remote_add(store, "origin", str(folder / "remote"))
        share.remote_add(store, "full", str(folder / "full"))
        store.objects.put(b"needed by nothing")
    for name in ("stopped", "undone", "packed"):
        shutil.copytree(folder / "store", folder / name)
    with Store.open(folder / "packed") as store:
        every = list(store.objects.loose())
        store.objects.replace_packs([], more=every)
        for identity in every:
            store.objects.delete_loose(identity)
        add_batch(store, range(60, 62))
    with Store.open(folder / "stopped") as store:
        merge(store, "against", WHO)
    with Store.open(folder / "undone") as store:
        refs.undo(store, who=WHO)
    for name in ("store", "stopped", "undone", "packed"):
        for path in (folder / name).rglob("*"):
            os.utime(path, (1, 1))


def prepare_with_model(folder: Path) -> None:
    """A store on a tiny model whose HEAD is a merge that brought facts, another branch to merge, a remote that holds all of it, its metric
    as a file, and a store that has none."""
    from patchhub.porcelain.metric import export_metric
    from patchhub.porcelain.model import init as made
    from tests.porcelain.taught import make_store as taught
    from tests.porcelain.taught import teach

    key_at(folder / "key")
    with taught(folder / "store") as store:
        for path in (folder / "store" / "model").iterdir():
            os.utime(
                path, (1, 1)
            )  # of files that were written just now no digests are kept, so verbs would make more calls or fewer
        refs.config_set(store, "memit.repairs", "0")
        for name, fact in (("side", ("Lyon", "Dutch")), ("other", ("Milan", "Dutch"))):
            refs.switch_to_new(store, name, "main~1", WHO)
            teach(store, [fact], name)
        refs.switch(store, "main", WHO)
        merge(store, "side", WHO)
        share.remote_add(store, "origin", str(folder / "remote"))
        share.push(store, "origin", share.CURRENT, Silent(), who=WHO)
        export_metric(store, folder / "metric")
    made(folder / "bare", str(folder / "store" / "model"), Silent(), who=WHO)


STAGES: tuple[tuple[Callable[[Path], None], Mapping[str, Verb]], ...] = (
    (prepare, VERBS),
    (prepare_with_model, MODEL_VERBS),
)


def stores(folder: Path) -> Iterator[Store]:
    """Every store in a folder, open; what a verb leaves of one that it could not make is none."""
    for name in ("store", "stopped", "undone", "packed", "bare", "new"):
        if (folder / name).exists():
            try:
                store = Store.open(folder / name)
            except RepositoryError:
                if name != "new":
                    raise
                continue
            with store:
                yield store


def state(folder: Path) -> str:
    """What is there to lose: refs, config and stopped merges of the stores, and the refs of the remote."""
    found: dict[str, object] = {}
    for store in stores(folder):
        waiting = store.root / "merge.json"
        merging = waiting.read_text(encoding="utf-8") if waiting.exists() else None
        name = store.root.parent.name
        pinned = None if store.config.recording is None else store.config.recording.metric
        found[name] = {
            "refs": store.refs(),
            "settings": dict(store.config.settings),
            "merging": merging,
            "metric": pinned,
        }
    manifest = folder / "remote" / "patchhub.json"
    if manifest.exists():
        found["remote"] = json.loads(manifest.read_text())["refs"]
    return json.dumps(found, sort_keys=True)


def unshared(folder: Path, *, died: bool) -> str:
    """What a group cannot write of a store that it shares, in words; empty for none, and where there is no store.

    Who died may leave one empty directory to themselves: the next write there gives it to the group.
    """
    root = folder / ".patchhub"
    kept = [path for path in (root, *root.rglob("*")) if path.is_dir() and not is_shared(path)] if root.exists() else []
    allowed = died and len(kept) == 1 and not any(kept[0].iterdir())
    return f"{kept[0]} is not the group's" if kept and not allowed else ""


def act(verb: str, folder: Path) -> int:
    """What became of a verb: one of the codes above."""
    try:
        {**VERBS, **MODEL_VERBS}[verb](folder)
    except PatchhubError as error:
        return MADE if "is made" in error.message else SAID
    return WELL


class Sweep:
    """All cases of one stage.

    Attributes:
        folder: where the stage is made, copied and broken.
        found: how many cases of a verb and a way to die ended right, or wrong.
        wrong: what was wrong, in words.
    """

    def __init__(self, shim: str, folder: Path) -> None:
        self._shim = ctypes.CDLL(shim)
        self._shim.counted.restype = ctypes.c_long
        self._folder = folder
        self._calls = 0
        self.found: Counter[tuple[str, str]] = Counter()
        self.wrong: list[str] = []

    def make(self, prepare: Callable[[Path], None]) -> None:
        """Fill the folder that all cases copy; in a process of its own, so that no thread of a model is forked later."""
        made, copy = self._folder / "made", self._folder / "copy"
        for folder in (made, copy):
            shutil.rmtree(folder, ignore_errors=True)
        copy.mkdir()  # remotes and bases are named by absolute path, so they are made where the copies will be
        assert self._fork(lambda: (prepare(copy), WELL)[1]) == WELL, "the stage cannot be made"
        shutil.move(copy, made)

    def run(self, verb: str, stride: int, first: int = 1) -> int:
        """All cases of one verb; returns how many calls it makes."""
        made = self._case(verb, 0, 0)
        calls = self._calls
        before, after = state(self._folder / "made"), state(self._folder / "copy")
        assert made == WELL, f"{verb} fails without a fault"
        for name, how in HOW.items():
            for number in range(first, calls + 1, stride):
                code = self._case(verb, number, how)
                self._judge(verb, f"{name} call {number}", name, code, before, after)
        return calls

    def _case(self, verb: str, number: int, how: int) -> int:
        copy = self._folder / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(self._folder / "made", copy)
        error = errno.ENOSPC if how == HOW["fails from then on"] else errno.EIO
        return self._fork(lambda: act(verb, copy), (os.fsencode(copy), number, how, error))

    def _fork(self, action: Callable[[], int], armed: tuple[bytes, int, int, int] = (b"", 0, 0, 0)) -> int:
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            code = CRASHED
            try:
                os.chdir(self._folder / "copy")
                self._shim.arm(*armed)
                code = action()
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
        self._calls = int(told or 0)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def _judge(self, verb: str, case: str, how: str, code: int, before: str, after: str) -> None:
        problem, copy = "", self._folder / "copy"
        try:
            for store in stores(copy):
                report = check(store)
                problem = problem or ("" if report.sound else f"not sound: {report.words()}")
            found = state(copy)
            whole = verb not in IN_STEPS and verb not in REPEATED
            if found not in (before, after) and whole:
                problem = problem or "neither the old state nor the new one"
            landed = before != after and found == after
            if code == WELL and before != after and not landed:
                problem = problem or "said well, and did not land"
            if code == SAID and landed:
                problem = problem or "said failed, and landed"
            if verb in REPEATED and not landed and (again := self._fork(lambda: act(verb, copy))) != WELL:
                problem = problem or f"cannot be repeated ({again})"
            if verb in REPEATED and state(copy) != after:
                problem = problem or "another state when it is repeated"
        except PatchhubError as error:
            problem = f"cannot be opened: {error}"
        if "--shared" in verb:
            problem = problem or unshared(copy / "new", died=code == DIED)
        if code == CRASHED:
            problem = problem or "a traceback"
        self.found[how, "wrong" if problem else "right"] += 1
        if problem:
            self.wrong.append(f"{verb}, {case}: {problem}")
            print(self.wrong[-1], file=sys.stderr, flush=True)  # a sweep takes long, and may be ended


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shim")
    parser.add_argument("--stride", type=int, default=1, help="of verbs that run no model")
    parser.add_argument("--model-stride", type=int, default=1)
    parser.add_argument("--first", type=int, default=1)
    parser.add_argument("--verbs", nargs="+", default=[*VERBS, *MODEL_VERBS])
    options = parser.parse_args()
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as name:
        sweep, calls = Sweep(options.shim, Path(name).resolve()), {}
        os.environ["PATCHHUB_CACHE"] = str(Path(name).resolve() / "copy" / "cache of the user")
        for prepare_stage, verbs in STAGES:
            stride = options.stride if verbs is VERBS else options.model_stride
            chosen = [verb for verb in options.verbs if verb in verbs]
            if chosen:
                sweep.make(prepare_stage)
            calls |= {verb: sweep.run(verb, stride, min(options.first, stride)) for verb in chosen}
    table = {how: {end: sweep.found[how, end] for end in ("right", "wrong")} for how in HOW}
    json.dump({"calls": calls, "cases": table, "wrong": sweep.wrong}, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
