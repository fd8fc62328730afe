"""`commit`: write a batch of facts into the model and record what that asked of its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from patchhub.delta import Delta
from patchhub.editing.editors import EDITORS
from patchhub.editing.record import Edit, State
from patchhub.editing.requests import Batch, contradiction_error, find_contradictions
from patchhub.editing.settings import EditSettings
from patchhub.errors import RequestError, SettingsError
from patchhub.evaluation.metrics import score_targets
from patchhub.models.architectures import Architecture, additive_probe, describe, read_config
from patchhub.models.tracing import Stack
from patchhub.objects import Element, Patch, Request, requests_json, set_digest
from patchhub.porcelain.columns import read_additive, read_columns, read_state, solve_change, write_columns
from patchhub.porcelain.facts import active_requests
from patchhub.porcelain.loading import (
    SURVIVAL_LIMIT,
    load_for_editing,
    open_base,
    patch_state,
    state_at,
    survival_report,
)
from patchhub.porcelain.progress import Progress
from patchhub.porcelain.recording import Recorder, open_recorder
from patchhub.porcelain.snapshot import Draft, Stamp, snapshot
from patchhub.runtime.patched_model import attach, switch
from patchhub.store.repository import Repository

OnConflict = Literal["refuse", "replace", "keep"]


@dataclass(frozen=True)
class Committed:
    """What `commit` did.

    Attributes:
        commit, patch: ids of the new objects.
        written, replaced: facts that are active now, and that are not any more.
        already_active, duplicates: facts that were left out because they were active, or twice in the input.
        held: how many of the written facts the patched model answers with (argmax, teacher forced, float32).
        seconds: wall time.
        survival: per weight, the share of the state's change that rounding to the base's type keeps.
    """

    commit: str
    patch: str
    written: tuple[Request, ...]
    replaced: tuple[Request, ...]
    already_active: int
    duplicates: int
    held: int
    seconds: float
    survival: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "written": [request.id for request in self.written],
            "replaced": [request.id for request in self.replaced],
        }


@dataclass(frozen=True)
class _Plan:
    """What a batch changes about the active set."""

    parent: str | None
    requests: tuple[Request, ...]
    kept: frozenset[Element]
    replaced: Mapping[Element, Request]
    already_active: int


def commit(
    repository: Repository,
    batch: Batch,
    stamp: Stamp,
    progress: Progress,
    *,
    method: str = "memit",
    settings: Mapping[str, Any] | None = None,
    text: Sequence[Path] = (),
    on_conflict: OnConflict = "refuse",
) -> Committed:
    """Write ``batch`` on top of HEAD and move the current branch to the new commit.

    Args:
        method: the editor, "memit" or "pmet".
        settings: its settings that differ from the repository's config and the default rule.
        text: files to compute the metric from; only before the first commit.
        on_conflict: what a contradiction with an active fact does: refuse the commit, replace the old fact, or keep both.

    Raises:
        RequestError: nothing to write, or a contradiction.
        BaseError: the base is missing, changed or cannot be edited.
        EditError: the edit failed; nothing was committed.
    """
    if method not in EDITORS:
        raise SettingsError(f"there is no editor {method!r}", remedy=f"The editors are {', '.join(EDITORS)}.")
    begun = perf_counter()
    plan = _plan(repository, batch, on_conflict)
    checkpoint = open_base(repository)
    architecture = describe(read_config(checkpoint.folder))
    chosen = _settings(repository, method, architecture, settings or {})
    progress.stage("loading the base", 0)
    model = load_for_editing(repository, checkpoint, [architecture.ffn_weight(layer) for layer in chosen.layers])
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder, local_files_only=True)
    deltas = _state_without(repository, plan)
    attach(model, checkpoint, patch_state(repository, deltas, None))
    stack = Stack(model, architecture)
    for layer in chosen.layers:
        additive_probe(model, architecture, layer)
    recorder = open_recorder(repository, stack, tokenizer, chosen.layers, text, progress)
    below = State(read_columns(repository, plan.kept), deltas, read_additive(repository, plan.kept))
    edit = _edit(stack, tokenizer, plan, recorder, method, chosen, below, progress)
    patch = _store_patch(repository, plan, recorder, method, chosen, edit)
    elements = plan.kept | patch.elements
    change = None if plan.replaced else edit.recording.change
    progress.stage("writing the commit", 0)
    identity = snapshot(
        repository,
        Draft((plan.parent,) if plan.parent else (), elements, recorder.metric, "commit", {"patch": patch.id}),
        stamp,
        change=change,
    )
    switch(model, checkpoint, state_at(repository, identity))
    scores = score_targets(model, tokenizer, [(request.text, request.target_new) for request in plan.requests])
    survival = survival_report(repository, checkpoint, identity)
    _warn_of_losses(survival, progress)
    progress.close()
    return Committed(
        commit=identity,
        patch=patch.id,
        written=plan.requests,
        replaced=tuple(plan.replaced.values()),
        already_active=plan.already_active,
        duplicates=batch.duplicates,
        held=sum(score.argmax_right for score in scores),
        seconds=perf_counter() - begun,
        survival=survival,
    )


def _warn_of_losses(survival: Mapping[str, float], progress: Progress) -> None:
    for weight, share in survival.items():
        if share < SURVIVAL_LIMIT:
            progress.warn(f"{1 - share:.0%} of the change of {weight} is lost when it is rounded to the base's type")


def _plan(repository: Repository, batch: Batch, on_conflict: OnConflict) -> _Plan:
    _, parent = repository.head
    elements = repository.active(parent)
    active = active_requests(repository, elements)
    here = {request.id for request in active.values()}
    new = tuple(request for request in batch.requests if request.id not in here)
    if not new:
        raise RequestError(
            "every one of these facts is active already, so there is nothing to commit",
            remedy="See `patchhub status`; to write a fact again, revert it first.",
        )
    replaced: dict[Element, Request] = {}
    if on_conflict != "keep":
        if inner := find_contradictions(new):
            raise contradiction_error(inner)
        outer = find_contradictions(new, active.values())
        if outer and on_conflict == "refuse":
            raise contradiction_error(outer)
        gone = {pair.earlier.id for pair in outer}
        replaced = {element: request for element, request in active.items() if request.id in gone}
    already = len(batch.requests) - len(new)
    return _Plan(parent, new, elements - replaced.keys(), replaced, already)


def _settings(
    repository: Repository, method: str, architecture: Architecture, given: Mapping[str, Any]
) -> EditSettings:
    """The editor's default rule, changed by the repository's config, changed by what was given."""
    configured = repository.config.settings
    prefix = f"{method}."
    chosen = {key[len(prefix) :]: value for key, value in configured.items() if key.startswith(prefix)} | dict(given)
    if "layers" in chosen:
        chosen["layers"] = tuple(chosen["layers"])
        for layer in chosen["layers"]:
            architecture.block(layer)
    return replace(EDITORS[method].default_settings(architecture), **chosen)


def _state_without(repository: Repository, plan: _Plan) -> dict[str, list[Delta]]:
    """The deltas of the state that the new facts are recorded on: HEAD's, without the facts they replace."""
    state = read_state(repository, plan.parent)
    if plan.replaced:
        for weight, part in solve_change(repository, repository.active(plan.parent), plan.kept).items():
            state.setdefault(weight, []).append(part)
    return state


def _edit(
    stack: Stack,
    tokenizer: PreTrainedTokenizerBase,
    plan: _Plan,
    recorder: Recorder,
    method: str,
    settings: EditSettings,
    state: State,
    progress: Progress,
) -> Edit:
    stages = {"values": ("optimising values", len(plan.requests)), "layers": ("writing layers", len(settings.layers))}
    open_stage = ""

    def report(stage: str, done: int) -> None:
        nonlocal open_stage
        if stage != open_stage:
            progress.stage(*stages[stage])
            open_stage = stage
        progress.advance(done)

    report("values", 0)
    return EDITORS[method].edit(
        stack, tokenizer, plan.requests, recorder.contexts, settings, recorder.cache, state, progress=report
    )


def _store_patch(
    repository: Repository, plan: _Plan, recorder: Recorder, method: str, settings: EditSettings, edit: Edit
) -> Patch:
    columns = edit.recording.columns
    patch = Patch(
        base=repository.config.base_id,
        kind="closed_form",
        made_on=set_digest(plan.kept),
        method=method,
        metric=recorder.metric,
        requests=tuple(request.id for request in plan.requests),
        requests_blob=repository.objects.put(requests_json(plan.requests)),
        settings={**settings.to_json(), "contexts": list(recorder.contexts)},
        tensors=repository.objects.put(write_columns(columns, edit.values.targets.numpy())),
        weights={weight: found.shape for weight, found in columns.items()},
    )
    repository.objects.put(patch.to_json())
    return patch
