"""One fixed history: what the command line makes of columns, a shard and an adapter that are written here by hand.

Every number that is stored is an exact dyadic fraction, so that its bytes, and with them all ids, are the same on every machine whatever
its BLAS: weights have one row, so that a change is kept dense and nothing is factorised; keys are rows of a Hadamard matrix, the metric
is a multiple of the identity, and lambda makes each Gram matrix one whose Cholesky factor is dyadic. Dora's key is not orthogonal to
Ann's, so the two are never solved apart.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
from click.testing import CliRunner
from safetensors.numpy import load, save, save_file

from patchhub.cli.main import main
from patchhub.constraints import Columns, difference, join, no_columns
from patchhub.delta import compact, from_sparse, write_deltas
from patchhub.objects import (
    Base,
    Commit,
    Element,
    Metric,
    Patch,
    Request,
    TensorRecord,
    object_id,
    requests_json,
    set_digest,
    set_json,
)
from patchhub.store.store import Store

AUTHOR = "Ada <ada@example.org>"
TIME = "2026-11-21T09:30:00Z"
EPOCH = "1795253400"
"""`TIME` as SOURCE_DATE_EPOCH."""

SHAPE = (1, 8)
WEIGHTS = ("h.0.weight", "h.1.weight")
BASE = Base(architecture={"model_type": "example"}, tensors={w: TensorRecord("F32", SHAPE, "0" * 64) for w in WEIGHTS})
METRIC = Metric(BASE.id, "covariance", {"epsilon": 0.0}, {"kind": "file", "names": ["text"]}, "1" * 64, 100, 10)

HADAMARD = reduce(np.kron, [np.array([[1, 1], [1, -1]])] * 3)
INVERSE = 1.5
"""C^-1 is this multiple of the identity."""
KEYS = {
    "Ann": HADAMARD[0],
    "Bob": HADAMARD[1],
    "Cleo": HADAMARD[2],
    "Dora": HADAMARD[0] + HADAMARD[7],
    "Eve": HADAMARD[3],
    "Finn": HADAMARD[4],
}
LAMBDA = {subject: 1.0 if subject == "Dora" else 4.0 for subject in KEYS}
RESIDUALS = {"French": 64.0, "German": 128.0, "Dutch": 256.0, "Czech": 512.0, "Greek": 1024.0, "Irish": 2048.0}
"""What each target asks of the first weight; of the second it asks three times as much."""


def request(subject: str, target: str) -> Request:
    return Request.make("The mother tongue of {} is", subject, target)


def columns(requests: Sequence[Request]) -> dict[str, Columns]:
    """Keys (n, 8), preimages (n, 8), residuals (n, 1) and lambda (n,) per weight."""
    keys = np.array([KEYS[fact.subject] for fact in requests], np.float32)
    residuals = np.array([[RESIDUALS[fact.target_new]] for fact in requests], np.float32)
    ridge = np.array([LAMBDA[fact.subject] for fact in requests], np.float32)
    return {
        weight: Columns(keys, np.float32(INVERSE) * keys, np.float32(scale) * residuals, ridge)
        for weight, scale in zip(WEIGHTS, (1, 3), strict=True)
    }


def init(folder: Path) -> None:
    """An empty store; the base's files are nowhere, so the guard has nothing to measure on them."""
    weights = {weight: {"norm": 1.0, "shape": list(SHAPE)} for weight in WEIGHTS}
    info = {"model_type": "example", "orientation": "out_in", "path": str(folder), "revision": None, "weights": weights}
    Store.init(folder, BASE.to_json(), base_info=info, settings={}, author=AUTHOR, time=TIME).close()


def commit_facts(folder: Path, message: str, facts: Mapping[str, str]) -> None:
    """Commit facts (subject: target) on HEAD, from handmade columns, as `commit` does from recorded ones."""
    requests = [request(subject, target) for subject, target in facts.items()]
    with Store.open(folder) as repository:
        head = repository.head[1]
        before = repository.active(head)
        added = columns(requests)
        arrays = {"z": np.arange(4 * len(requests), dtype=np.float32).reshape(-1, 4)}
        for weight, found in added.items():
            parts = (found.keys, found.preimages, found.residuals, found.ridge)
            arrays |= {f"{weight}.{part}": array for part, array in zip(("k", "u", "r", "lambda"), parts, strict=True)}
        patch = _put_patch(repository, "closed_form", "memit", requests, save(arrays), {"layers": [0, 1]}, WEIGHTS)
        there = _columns_of(repository, before)
        nothing = no_columns(SHAPE)
        delta = {weight: compact(difference(there.get(weight, nothing), added[weight], nothing)) for weight in WEIGHTS}
        _record(repository, patch.elements, message, repository.objects.put(write_deltas(delta)))


def commit_shard(folder: Path, message: str, facts: Mapping[str, str]) -> None:
    """Commit a shard beside the first weight that holds facts (subject: target)."""
    requests = [request(subject, target) for subject, target in facts.items()]
    matrix = np.array([[0, 0.5, 0, -2, 0, 0, 0.25, 0]], np.float32)
    with Store.open(folder) as repository:
        whole = {e for e in repository.active(repository.head[1]) if WEIGHTS[0] in repository.patch(e[0]).weights}
        settings = {
            "below": {"set": object_id(set_json(whole)), "weights": [WEIGHTS[0]]},
            "contexts": ["{}"],
            "follows": None,
            "number": 0,
            "report": {},
            "routing": {"threshold": 2.5, "distance": "max"},
            "training": {"layer": 0, "merge_method": "ties", "merge_density": 0.5},
        }
        data = write_deltas({WEIGHTS[0]: from_sparse(matrix)})
        patch = _put_patch(repository, "shard", "wise", requests, data, settings, WEIGHTS[:1])
        _record(repository, patch.elements, message, None)


def write_adapter(folder: Path) -> None:
    """A LoRA adapter of rank 1 for the second weight, of scale 2."""
    folder.mkdir()
    config = {"peft_type": "LORA", "lora_alpha": 2, "r": 1, "target_modules": ["h.1"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    name = "base_model.model.h.1.lora_{}.weight"
    factors = {"A": (HADAMARD[:1] + 2 * HADAMARD[6:7]) / 4, "B": np.array([[0.5]])}
    save_file({name.format(k): v.astype(np.float32) for k, v in factors.items()}, folder / "adapter_model.safetensors")


def make_history(folder: Path) -> None:
    """Commits, a stopped merge, an import, a shard, cherry-picks, reverts, squashes, a tag; SOURCE_DATE_EPOCH must be `EPOCH`."""

    def run(*arguments: str, code: int = 0) -> None:
        result = CliRunner().invoke(main, ["--repo", str(folder), *arguments])
        assert result.exit_code == code, f"{arguments}: exit {result.exit_code}\n{result.stdout}\n{result.stderr}"

    by = ("--author", AUTHOR)
    init(folder)
    commit_facts(folder, "three facts", {"Ann": "French", "Bob": "German", "Cleo": "Dutch"})
    run("tag", "v1", *by)
    run("switch", "-c", "side", *by)
    commit_facts(folder, "two facts on the side", {"Eve": "Czech", "Finn": "Greek"})
    run("switch", "main", *by)
    commit_facts(folder, "two facts", {"Dora": "Irish", "Eve": "French"})
    run("merge", "side", *by, code=4)
    run("merge", "--continue", "--theirs", *by)
    write_adapter(folder / "adapter")
    run("import", str(folder / "adapter"), "-m", "an adapter", *by)
    commit_shard(folder, "a shard", {"Gus": "Greek"})
    run("revert", "--subject", "Cleo", *by)
    run("revert", "HEAD~1", *by)
    run("undo", *by)
    run("redo", *by)
    run("switch", "-c", "picks", "v1", *by)
    run("cherry-pick", "side", *by)
    run("revert", "HEAD", *by)
    run("revert", "HEAD", "-m", "the facts of the side again", *by)
    run("cherry-pick", "main~2", *by)
    run("squash", "2", "-m", "two in one", *by)


def found_in(folder: Path) -> dict[str, Any]:
    """What is pinned of a store: ids of commits by message, refs, operations, the config, and what every object holds."""
    with Store.open(folder) as repository:
        refs = repository.refs()
        tips = [target for ref, target in sorted(refs.items()) if ref.startswith("refs/")]
        config = json.loads((repository.root / "config.json").read_bytes())
        config["base"].pop("path")
        config.pop("digest")  # covers the path
        objects = {path.parent.name + path.name: path.read_bytes() for path in repository.root.glob("objects/*/*")}
        return {
            "commits": [[identity, commit.message] for identity, commit in repository.log(*tips)],
            "refs": refs,
            "operations": [[identity, operation.command] for identity, operation in repository.operations()],
            "config": config,
            "objects": {identity: content(data) for identity, data in sorted(objects.items())},
        }


def content(data: bytes) -> Any:
    """An object as JSON: itself, or the values of its tensors."""
    if data[:1] in (b"{", b"["):
        return json.loads(data)
    return {name: array.tolist() for name, array in sorted(load(data).items())}


def _put_patch(
    repository: Store,
    kind: str,
    method: str,
    requests: Sequence[Request],
    data: bytes,
    settings: Mapping[str, object],
    weights: Sequence[str],
) -> Patch:
    patch = Patch(
        base=BASE.id,
        kind=kind,
        made_on=set_digest(repository.active(repository.head[1])),
        method=method,
        metric=None if kind == "shard" else repository.objects.put(METRIC.to_json()),
        requests=tuple(fact.id for fact in requests),
        requests_blob=repository.objects.put(requests_json(requests)),
        settings=settings,
        tensors=repository.objects.put(data),
        weights=dict.fromkeys(weights, SHAPE),
    )
    repository.objects.put(patch.to_json())
    return patch


def _record(repository: Store, added: frozenset[Element], message: str, tensors: str | None) -> None:
    """Commit elements on HEAD; ``tensors`` is the blob of the change."""
    head = repository.head[1]
    commit = Commit(
        added=added,
        author=AUTHOR,
        base=BASE.id,
        check={},
        keyframe=None,
        message=message,
        metric=METRIC.id,
        parents=(head,) if head else (),
        removed=frozenset(),
        same_as=None,
        set_digest=set_digest(repository.active(head) | added),
        tensors=tensors,
        time=TIME,
    )
    repository.record(commit, command="commit", arguments={}, author=AUTHOR, time=TIME)


def _columns_of(repository: Store, elements: frozenset[Element]) -> dict[str, Columns]:
    """The columns of a set as they are stored."""
    found: dict[str, list[Columns]] = {}
    for identity, fact in sorted(elements, key=lambda element: (element[0], element[1] or "")):
        patch = repository.patch(identity)
        if patch.kind == "closed_form":
            arrays, row = load(repository.objects.get(patch.tensors)), [patch.requests.index(str(fact))]
            for weight in patch.weights:
                parts = (arrays[f"{weight}.{part}"][row] for part in ("k", "u", "r", "lambda"))
                found.setdefault(weight, []).append(Columns(*parts))
    return {weight: join(parts) for weight, parts in found.items()}
