"""`refresh`: record facts again on the present state, from their stored values, by forward passes alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from patchhub.canonical import canonical_json
from patchhub.delta import Delta
from patchhub.editing.editors import EDITORS
from patchhub.editing.facts import encode_facts
from patchhub.editing.record import Recording, State, key_rows, record
from patchhub.errors import RevisionError
from patchhub.models.architectures import describe, read_config
from patchhub.models.checkpoint import Checkpoint
from patchhub.models.tracing import Stack
from patchhub.objects import Element, Patch, Request, requests_json, set_digest
from patchhub.porcelain.change import largest_proof
from patchhub.porcelain.columns import read_additive, read_columns, read_state, solve_change, write_columns
from patchhub.porcelain.facts import active_requests
from patchhub.porcelain.loading import load_for_editing, open_base, patch_state
from patchhub.porcelain.progress import Progress
from patchhub.porcelain.recorded import is_stale
from patchhub.porcelain.recording import Recorder, open_recorder
from patchhub.porcelain.snapshot import Draft, Stamp, snapshot
from patchhub.runtime.patched_model import attach
from patchhub.store.repository import Repository


@dataclass(frozen=True)
class Refreshed:
    """What `refresh` did.

    Attributes:
        commit: the new commit.
        facts: the facts that were recorded again.
        left: facts that could not be, because their texts are withheld.
        proof: the largest relative residual of the joint solution over the weights.
        seconds: wall time.
    """

    commit: str
    facts: tuple[Request, ...]
    left: int
    proof: float
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return {
            "commit": self.commit,
            "facts": [request.id for request in self.facts],
            "left": self.left,
            "proof": self.proof,
            "seconds": self.seconds,
        }


@dataclass(frozen=True)
class _Group:
    """Facts that were recorded with the same settings: their patches, and z (n, d) of each."""

    method: str
    settings: Mapping[str, Any]
    patches: tuple[str, ...]
    requests: tuple[Request, ...]
    targets: np.ndarray


def refresh(repository: Repository, stamp: Stamp, progress: Progress) -> Refreshed:
    """Record what is due again on the state that holds all other facts, as a new patch in a commit on HEAD.

    Due are stale columns and, on a merge commit, those of the facts that it brought to its first parent: they were recorded
    without the other side below them. Values are not optimised again; z of each request is kept in its patch.

    Raises:
        RevisionError: nothing is due.
        BaseError: the base is missing or changed.
    """
    begun = perf_counter()
    _, head = repository.head
    active = repository.active(head)
    wanted = _due(repository, head)
    texts = active_requests(repository, wanted)
    if head is None or not texts:
        raise RevisionError(
            "no column of HEAD is due to be recorded again",
            remedy="Columns are due when the state they were recorded on is gone, or right after a merge.",
        )
    groups = _groups(repository, texts)
    staying = active - texts.keys()
    deltas = read_state(repository, head)
    for weight, part in solve_change(repository, active, staying).items():
        deltas.setdefault(weight, []).append(part)
    checkpoint = open_base(repository)
    stack, tokenizer, recorder = _open(repository, checkpoint, groups, deltas, progress)
    state = State(read_columns(repository, staying), deltas, read_additive(repository, staying))
    elements = staying
    for group in groups:
        recording = _record(stack, tokenizer, group, recorder, state)
        elements |= _store(repository, group, recorder.metric, staying, recording).elements
        progress.advance(len(group.requests))
    message = stamp.message or f"Refresh {len(texts)} facts"
    draft = Draft((head,), elements, recorder.metric, "refresh", {"facts": len(texts)})
    identity = snapshot(repository, draft, Stamp(stamp.author, stamp.time, message))
    progress.close()
    return Refreshed(
        commit=identity,
        facts=tuple(texts.values()),
        left=len(wanted) - len(texts),
        proof=largest_proof(repository.commit(identity)),
        seconds=perf_counter() - begun,
    )


def _due(repository: Repository, head: str | None) -> frozenset[Element]:
    active = repository.active(head)
    commit = repository.commit(head) if head else None
    brought = commit.added if commit is not None and len(commit.parents) > 1 else frozenset()
    stale = {patch for patch in {patch for patch, _ in active} if is_stale(repository, patch, active)}
    return frozenset(e for e in active if e[1] is not None and (e in brought or e[0] in stale))


def _groups(repository: Repository, texts: Mapping[Element, Request]) -> list[_Group]:
    """The facts by method and settings, in order of request id."""
    found: dict[bytes, list[tuple[Element, Request]]] = {}
    for (identity, request_id), request in texts.items():
        patch = repository.patch(identity)
        settings = {**patch.settings, "refreshes": []}
        found.setdefault(canonical_json([patch.method, settings]), []).append(((identity, request_id), request))
    groups = []
    for _, items in sorted(found.items()):
        items.sort(key=lambda item: item[1].id)
        patches = tuple(sorted({identity for (identity, _), _ in items}))
        first = repository.patch(patches[0])
        targets = _targets(repository, [element for element, _ in items])
        groups.append(_Group(first.method, first.settings, patches, tuple(r for _, r in items), targets))
    return groups


def _targets(repository: Repository, elements: Sequence[Element]) -> np.ndarray:
    """z of each element."""
    stored: dict[Element, np.ndarray] = {}
    for identity in {identity for identity, _ in elements}:
        patch = repository.patch(identity)
        rows = load(repository.objects.get(patch.tensors))["z"]
        stored |= {(identity, request): row for request, row in zip(patch.requests, rows, strict=True)}
    return np.stack([stored[identity, str(request)] for identity, request in elements])


def _open(
    repository: Repository,
    checkpoint: Checkpoint,
    groups: Iterable[_Group],
    deltas: Mapping[str, Sequence[Delta]],
    progress: Progress,
) -> tuple[Stack, PreTrainedTokenizerBase, Recorder]:
    architecture = describe(read_config(checkpoint.folder))
    layers = sorted({layer for group in groups for layer in group.settings["layers"]})
    progress.stage("loading the base", 0)
    model = load_for_editing(repository, checkpoint, [architecture.ffn_weight(layer) for layer in layers])
    attach(model, checkpoint, patch_state(repository, deltas, None))
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder, local_files_only=True)
    stack = Stack(model, architecture)
    recorder = open_recorder(repository, stack, tokenizer, layers, (), progress)
    progress.stage("recording again", sum(len(group.requests) for group in groups))
    return stack, tokenizer, recorder


def _record(
    stack: Stack, tokenizer: PreTrainedTokenizerBase, group: _Group, recorder: Recorder, state: State
) -> Recording:
    facts = encode_facts(tokenizer, group.requests, group.settings["contexts"])
    return record(
        stack,
        group.settings["layers"],
        key_rows([fact.rows for fact in facts]),
        torch.from_numpy(group.targets),
        group.settings["ridge"],
        recorder.cache,
        state,
        EDITORS[group.method].spread,
    )


def _store(
    repository: Repository, group: _Group, metric: str, below: frozenset[Element], recording: Recording
) -> Patch:
    patch = Patch(
        base=repository.config.base_id,
        kind="closed_form",
        made_on=set_digest(below),
        method=group.method,
        metric=metric,
        requests=tuple(request.id for request in group.requests),
        requests_blob=repository.objects.put(requests_json(group.requests)),
        settings={**group.settings, "refreshes": list(group.patches)},
        tensors=repository.objects.put(write_columns(recording.columns, group.targets)),
        weights={weight: found.shape for weight, found in recording.columns.items()},
    )
    repository.objects.put(patch.to_json())
    return patch
