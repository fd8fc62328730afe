"""`refresh`: record facts, and measure thresholds of shards, again on the present state, by forward passes alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any, Final

import numpy as np
import torch
from safetensors.numpy import load
from transformers import PreTrainedTokenizerBase

from patchhub.canonical import canonical_json
from patchhub.editing.editor import EDITORS, encode_facts
from patchhub.editing.record import Recording, State, record
from patchhub.editing.rows import key_rows
from patchhub.errors import RepositoryError, RevisionError
from patchhub.models.architectures import Architecture
from patchhub.models.tracing import Stack
from patchhub.objects import Element, Patch, Request
from patchhub.porcelain.change import largest_proof
from patchhub.progress import Progress
from patchhub.results import Result
from patchhub.sets.columns import read_additive, stacked_weights, write_columns
from patchhub.sets.commits import Draft, begin, prepare, store_patch
from patchhub.sets.commits import record as record_commit
from patchhub.sets.elements import active_requests, distinct, due, nothing_due
from patchhub.sets.shards import active_shards, stale_shards, without_shards
from patchhub.sets.sums import asked_for
from patchhub.store.store import Store
from patchhub.text.tokens import Chat
from patchhub.who import Who
from patchhub.worktree.judging import Guarding, judge
from patchhub.worktree.metric import Recorder, open_recorder
from patchhub.worktree.opening import Worktree, base_files, open_worktree, patch_state
from patchhub.worktree.shards import deltas_near, measure_shards

_REMEDY: Final = "Leave the facts as they are recorded now"


@dataclass(frozen=True)
class Refreshed(Result):
    """What `refresh` did.

    Attributes:
        commit: the new commit.
        facts: the facts that were recorded again.
        left: facts that could not be, because their texts are withheld.
        shards: the shards whose threshold was measured again.
        proof: the largest relative residual of the joint solution over the weights.
        seconds: wall time.
    """

    commit: str
    facts: tuple[Request, ...]
    left: int
    proof: float
    seconds: float
    shards: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Group:
    """Facts that were recorded with the same settings: their patches, and z (n, d) of each."""

    method: str
    settings: Mapping[str, Any]
    patches: tuple[str, ...]
    requests: tuple[Request, ...]
    targets: np.ndarray


def refresh(repository: Store, who: Who, progress: Progress, *, force: bool = False) -> Refreshed:
    """Record what is due again on the state that holds all other facts, as a new patch in a commit on HEAD.

    Due are stale columns and, on a merge commit, those of the facts that it brought to its first parent: they were recorded
    without the other side below them. Values are not optimised again; z of each request is kept in its patch. Then the shards whose
    threshold was measured on other weights at or below their layer are measured on the new ones.

    Args:
        force: write what fails the guard all the same, and say so in the commit.

    Raises:
        RevisionError: nothing is due.
        BaseError: the base is missing or changed.
        GuardError: a check of the new state failed; nothing was committed.
    """
    begun = perf_counter()
    head = begin(repository)
    active = repository.active(head)
    wanted = due(repository, head)
    texts = active_requests(repository, wanted)
    if head is None or not (texts or stale_shards(repository, active)):
        raise nothing_due()
    groups = _groups(repository, texts)
    staying = active - texts.keys()
    tree = _open(repository, groups, active, staying, progress)
    elements, metric = staying, repository.commit(head).metric
    if groups:
        elements, metric = _record_groups(repository, tree, groups, staying, progress)
    elements, measured, withheld = measure_shards(repository, tree, active, elements, progress)
    if elements == active:
        raise _withheld_error(withheld)
    draft = Draft((head,), elements, metric, "refresh", {"facts": len(texts), "shards": len(measured)})
    commit = prepare(repository, draft, who.saying(f"Refresh {_words(len(texts), len(measured))}"))
    entered = len(distinct(active_requests(repository, commit.added)))
    # No fact is new: what is asked is whether those that held still do.
    asked = _in_form(tree, groups)
    commit = judge(repository, commit, progress, Guarding(force), tree=asked, facts=entered, remedy=_REMEDY)
    identity = record_commit(repository, commit, draft, who.signer)
    progress.close()
    return Refreshed(
        commit=identity,
        facts=tuple(texts.values()),
        left=len(wanted) - len(texts) + sum(len(repository.patch(shard).requests) for shard in withheld),
        proof=largest_proof(commit),
        seconds=perf_counter() - begun,
        shards=measured,
    )


def _in_form(tree: Worktree, groups: Sequence[_Group]) -> Worktree:
    """The model, to be asked in the chat form of the facts that are recorded again, where all have one."""
    forms = {Chat.from_json(group.settings.get("chat")) for group in groups}
    return replace(tree, chat=forms.pop() if len(forms) == 1 else None)


def _words(facts: int, shards: int) -> str:
    parts = [
        f"{number} {noun}{'' if number == 1 else 's'}"
        for number, noun in ((facts, "fact"), (shards, "shard"))
        if number
    ]
    return " and ".join(parts)


def _withheld_error(shards: Sequence[str]) -> RevisionError:
    return RevisionError(
        f"the texts of shard {shards[0][:12]} are withheld, so its threshold cannot be measured again",
        remedy="Refresh where the texts are.",
        shards=list(shards),
    )


def _groups(repository: Store, texts: Mapping[Element, Request]) -> list[_Group]:
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


def _refuse_incomplete(repository: Store, group: _Group, architecture: Architecture) -> None:
    """Raise `RepositoryError` for settings, which may come from another store, that do not say how columns are recorded."""
    weights = {weight for patch in group.patches for weight in repository.patch(patch).weights}
    whole = group.method in EDITORS and {"contexts", "layers", "ridge"} <= group.settings.keys()
    if not whole or {architecture.ffn_weight(layer) for layer in group.settings["layers"]} != weights:
        raise RepositoryError(
            f"patch {group.patches[0][:12]} cannot be recorded again: its settings do not say how",
            remedy="Revert its facts, and commit them again.",
            patch=group.patches[0],
        )


def _targets(repository: Store, elements: Sequence[Element]) -> np.ndarray:
    """z of each element."""
    stored: dict[Element, np.ndarray] = {}
    for identity in {identity for identity, _ in elements}:
        patch = repository.patch(identity)
        rows = load(repository.objects.get(patch.tensors))["z"]
        stored |= {(identity, request): row for request, row in zip(patch.requests, rows, strict=True)}
    return np.stack([stored[identity, str(request)] for identity, request in elements])


def _open(
    repository: Store,
    groups: Iterable[_Group],
    active: frozenset[Element],
    staying: frozenset[Element],
    progress: Progress,
) -> Worktree:
    """The base in the state of the facts that stay as they are."""
    files = base_files(repository)
    for group in groups:
        _refuse_incomplete(repository, group, files.architecture)
    layers = {layer for group in groups for layer in group.settings["layers"]}
    weights = {files.architecture.ffn_weight(layer) for layer in layers}
    weights |= {weight for patch in active_shards(repository, active).values() for weight in patch.weights}
    state = patch_state(repository, deltas_near(repository, active, staying), None)
    # Each group has a chat form of its own, so none is asked for here.
    return open_worktree(repository, progress, state, base=files, chat=False, edits=sorted(weights))


def _record_groups(
    repository: Store,
    tree: Worktree,
    groups: Sequence[_Group],
    staying: frozenset[Element],
    progress: Progress,
) -> tuple[frozenset[Element], str]:
    """The set with the groups' facts recorded again, and its metric."""
    layers = sorted({layer for group in groups for layer in group.settings["layers"]})
    recorder = open_recorder(repository, tree.stack, tree.tokenizer, layers, (), progress)
    progress.stage("recording again", sum(len(group.requests) for group in groups))
    fixed = read_additive(repository, staying)
    state = State(asked_for(repository, repository.head[1], staying, fixed), tree.state.weights, fixed)
    elements = staying
    for group in groups:
        recording = _record(tree.stack, tree.tokenizer, group, recorder, state)
        elements |= _store(repository, group, recorder.metric, staying, recording).elements
        progress.advance(len(group.requests))
    return elements, recorder.metric


def _record(
    stack: Stack, tokenizer: PreTrainedTokenizerBase, group: _Group, recorder: Recorder, state: State
) -> Recording:
    kept = set(group.settings.get("keeps", ()))
    chat = Chat.from_json(group.settings.get("chat"))
    facts = encode_facts(tokenizer, group.requests, group.settings["contexts"], chat=chat)
    return record(
        stack,
        group.settings["layers"],
        key_rows([fact.rows for fact in facts]),
        torch.from_numpy(group.targets),
        group.settings["ridge"],
        recorder.cache,
        state,
        EDITORS[group.method].way(stack.architecture).spread,
        still=[place for place, request in enumerate(group.requests) if request.id in kept],
    )


def _store(repository: Store, group: _Group, metric: str, below: frozenset[Element], recording: Recording) -> Patch:
    return store_patch(
        repository,
        kind="closed_form",
        method=group.method,
        requests=group.requests,
        settings={**group.settings, "refreshes": list(group.patches)},
        tensors=write_columns(recording.columns, group.targets, stacked_weights(repository)),
        weights={weight: found.shape for weight, found in recording.columns.items()},
        below=without_shards(repository, below),
        metric=metric,
    )
