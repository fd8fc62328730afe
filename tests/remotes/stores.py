"""Stores with real columns and real solved deltas over a base of two small weights, made without a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from patchhub.constraints import Columns
from patchhub.objects import EMPTY_SET, Base, Metric, Note, Patch, Request, TensorRecord, requests_json, set_digest
from patchhub.sets.columns import weight_shapes, write_columns
from patchhub.sets.commits import Draft, prepare, record
from patchhub.store.config import Config, Recording
from patchhub.store.states import Reference, closure, references
from patchhub.store.store import Store
from patchhub.who import Who
from tests.benchmarks.synthetic_store import HastyDisk

AUTHOR = "Ada <ada@example.org>"
TIME = "2026-11-21T09:30:00Z"
STAMP = Who(AUTHOR, TIME, "")
SHAPES = {"h.0.out.weight": (6, 48), "h.1.out.weight": (6, 48)}
BASE = Base(
    architecture={"hidden_size": 6},
    tensors={name: TensorRecord("F32", shape, "0" * 64) for name, shape in SHAPES.items()},
)


def make_store(folder: Path, *, base: Base = BASE) -> Store:
    info = {
        "path": str(folder / "base"),
        "revision": None,
        "model_type": "test",
        "orientation": "out_in",
        "weights": {name: {"norm": 1.0, "shape": list(shape)} for name, shape in SHAPES.items()},
    }
    return Store.init(folder, base.to_json(), base_info=info, settings={}, author=AUTHOR, time=TIME, disk=HastyDisk())


def make_request(number: int) -> Request:
    return Request.make("The mother tongue of {} is", f"Person {number}", "French", target_true="English")


def metric_of(repository: Store) -> str:
    metric = Metric(
        repository.config.base_id, "covariance", {"epsilon": 0.01}, {"kind": "file", "names": []}, "1" * 64, 100, 10
    )
    identity = repository.objects.put(metric.to_json())
    if repository.config.recording is None:
        config = repository.config
        repository.write_config(Config(config.base, config.settings, Recording(identity, ("{}",))))
    return identity


def put_patch(repository: Store, requests: Sequence[Request], seed: Sequence[int]) -> Patch:
    """A patch with one random column per request and weight; requests and seed alone decide its content."""
    generator = np.random.default_rng(seed)
    columns, shapes = {}, weight_shapes(repository)
    for name, (out, inner) in shapes.items():
        keys = generator.standard_normal((len(requests), inner)).astype(np.float32)
        residuals = generator.standard_normal((len(requests), out)).astype(np.float32)
        columns[name] = Columns(keys, keys, residuals, np.full(len(requests), 2.0, np.float32))
    targets = generator.standard_normal((len(requests), 6))
    patch = Patch(
        base=repository.config.base_id,
        kind="closed_form",
        made_on=EMPTY_SET,
        method="memit",
        metric=metric_of(repository),
        requests=tuple(request.id for request in requests),
        requests_blob=repository.objects.put(requests_json(requests)),
        settings={"contexts": ["{}"]},
        tensors=repository.objects.put(write_columns(columns, targets)),
        weights=shapes,
    )
    repository.objects.put(patch.to_json())
    return patch


def add_batch(repository: Store, numbers: range, message: str = "") -> str:
    """Commit one fact per number on the current branch; the numbers alone decide their columns."""
    requests = [make_request(number) for number in numbers]
    return add_patch(repository, requests, list(numbers), message or f"facts {numbers.start} to {numbers.stop}")


def add_patch(
    repository: Store, requests: Sequence[Request], seed: Sequence[int] = (0,), message: str = "facts"
) -> str:
    """Commit facts on the current branch."""
    patch = put_patch(repository, requests, seed)
    _, head = repository.head
    elements = repository.active(head) | patch.elements
    draft = Draft((head,) if head else (), elements, patch.metric, "commit", {"patch": patch.id})
    return record(repository, prepare(repository, draft, Who(AUTHOR, TIME, message)), draft)


def move(repository: Store, changes: dict[str, tuple[str | None, str | None]], command: str = "branch") -> None:
    repository.move_refs(changes, command=command, arguments={}, author=AUTHOR, time=TIME)


def switch(repository: Store, branch: str) -> None:
    move(repository, {"HEAD": (repository.refs()["HEAD"], f"ref: refs/heads/{branch}")}, "switch")


def make_history(folder: Path) -> Store:
    """Three commits on two branches, a tag on the first one and a note about it."""
    repository = make_store(folder)
    first = add_batch(repository, range(3))
    move(repository, {"refs/heads/side": (None, first), "refs/tags/v1": (None, first)})
    add_batch(repository, range(3, 5))
    switch(repository, "side")
    add_batch(repository, range(5, 8))
    switch(repository, "main")
    note = Note(commit=first, made_by="patchhub", scores={"S": 0.5}, settings={}, suite="counterfact")
    repository.add_note(note, command="evaluate", arguments={}, author=AUTHOR, time=TIME)
    return repository


def published(repository: Store) -> dict[str, str]:
    """What of a store's refs a remote shares."""
    return {ref: target for ref, target in repository.refs().items() if ref.startswith(("refs/heads/", "refs/tags/"))}


def content(repository: Store, commit: str) -> tuple[str, tuple[str, ...]]:
    """What a commit is: the digest of its set and the blobs of its state, whose names are their bytes."""
    return set_digest(repository.active(commit)), repository.state(commit)


def closure_of(repository: Store, ref: str) -> list[str]:
    """Ids of all that a ref needs."""

    def follow(reference: Reference) -> list[Reference]:
        return references(reference.kind, repository.objects.get(reference.id))

    return [reference.id for reference in closure([Reference("commit", repository.refs()[ref])], follow)]
