"""The closed-form part of `commit`: optimise values, record columns, keep them as a patch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from patchhub.constraints import no_columns
from patchhub.delta import Delta
from patchhub.editing.budget import release_memory, step_budget
from patchhub.editing.editors import EDITORS
from patchhub.editing.facts import encode_facts
from patchhub.editing.kept_values import KeptValues
from patchhub.editing.key_rows import key_rows
from patchhub.editing.keys import mean_keys
from patchhub.editing.lengths import context_length
from patchhub.editing.metric import MEMORY
from patchhub.editing.record import Edit, State
from patchhub.editing.settings import EditSettings
from patchhub.editing.values import ValueSettings
from patchhub.models.architectures import additive_probe
from patchhub.objects import Patch, Request, requests_json, set_digest
from patchhub.porcelain.columns import read_additive, read_columns, solve_change, write_columns
from patchhub.porcelain.competition import Rival, competition, refuse, suspects, warnings
from patchhub.porcelain.opened import Opened
from patchhub.porcelain.plan import Plan
from patchhub.porcelain.progress import Progress
from patchhub.porcelain.recording import Recorder, open_recorder
from patchhub.porcelain.shards import without_shards
from patchhub.porcelain.written import Written
from patchhub.store.repository import Repository


def state_without(repository: Repository, plan: Plan, state: Mapping[str, Sequence[Delta]]) -> dict[str, list[Delta]]:
    """The deltas of the state that the new facts are recorded on: HEAD's, without the facts they replace."""
    found = {weight: list(deltas) for weight, deltas in state.items()}
    if plan.replaced:
        for weight, part in solve_change(repository, repository.active(plan.parent), plan.kept).items():
            found.setdefault(weight, []).append(part)
    return found


def write_closed_form(
    repository: Repository,
    opened: Opened,
    plan: Plan,
    method: str,
    settings: EditSettings,
    text: Sequence[Path],
    progress: Progress,
    *,
    strict: bool = False,
    memory: int | None = None,
) -> Written:
    """Write the facts of ``plan`` with MEMIT or PMET; ``opened`` is in the state of `state_without`.

    Args:
        strict: refuse facts that compete with others for a key, before anything is optimised.
        memory: bytes that the process may hold, the base included; None: half of what is free is used besides.

    Raises:
        InterferenceError: there are such facts, under ``strict``.
        EditError: the optimisation or the solve is not finite.
        UnsupportedModelError: an edited layer is not additive.
    """
    settings = replace(settings, chat=opened.chat)
    for layer in settings.layers:
        additive_probe(opened.model, opened.architecture, layer)
    budget = step_budget(opened.stack.device, memory)
    recorder = open_recorder(
        repository, opened.stack, opened.tokenizer, settings.layers, text, progress, memory=min(MEMORY, budget)
    )
    below = State(read_columns(repository, plan.kept), opened.deltas, read_additive(repository, plan.kept))
    rivals = _rivals(repository, opened, plan, recorder, settings, below)
    if rivals and strict:
        raise refuse(rivals)
    for warning in warnings(rivals):
        progress.warn(warning)
    edit = _edit(repository, opened, plan, recorder, method, settings, below, memory, progress)
    patch = _store_patch(repository, plan, recorder, method, settings, edit)
    if memory is not None:
        release_memory()
    change = None if plan.replaced else edit.recording.change
    return Written((patch.id,), plan.kept | patch.elements, recorder.metric, change, rivals)


def _rivals(
    repository: Repository, opened: Opened, plan: Plan, recorder: Recorder, settings: EditSettings, below: State
) -> tuple[Rival, ...]:
    """What the batch competes with, from its keys at the lowest edited layer."""
    layer = settings.layers[0]
    weight = opened.architecture.ffn_weight(layer)
    active = below.columns.get(weight, no_columns(opened.architecture.shapes[layer]))

    def read(requests: Sequence[Request], contexts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        limit = context_length(opened.model)
        facts = encode_facts(opened.tokenizer, requests, contexts, chat=settings.chat, limit=limit)
        keys = mean_keys(opened.stack, layer, key_rows([fact.rows for fact in facts]))
        return keys.numpy(), recorder.cache.preimages(weight, keys).numpy()

    found = [plan.requests[row] for row in suspects(*read(plan.requests, recorder.contexts[:1]), active)]
    if not found:
        return ()
    keys, preimages = read(found, recorder.contexts)
    return competition(repository, weight, found, keys, preimages, settings.ridge, plan.kept, active)


def _edit(
    repository: Repository,
    opened: Opened,
    plan: Plan,
    recorder: Recorder,
    method: str,
    settings: EditSettings,
    state: State,
    memory: int | None,
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
        opened.stack,
        opened.tokenizer,
        plan.requests,
        recorder.contexts,
        settings,
        recorder.cache,
        state,
        memory=memory,
        kept=lambda values: _kept_values(repository, opened, plan, method, settings.layers[-1], values),
        progress=report,
    )


def _kept_values(
    repository: Repository, opened: Opened, plan: Plan, method: str, layer: int, values: ValueSettings
) -> KeptValues:
    """Where the values of facts are kept that are optimised on this state with these settings."""
    config = opened.model.config
    inputs = {
        "base": repository.config.base_id,
        "dtype": str(opened.model.dtype),
        "layer": layer,
        "method": method,
        "quantization": str(getattr(config, "quantization_config", None)),
        "settings": asdict(values),
        "state": set_digest(without_shards(repository, plan.kept)),
    }
    return KeptValues(repository.cache / "values", inputs, opened.architecture.d_model)


def _store_patch(
    repository: Repository, plan: Plan, recorder: Recorder, method: str, settings: EditSettings, edit: Edit
) -> Patch:
    columns = edit.recording.columns
    patch = Patch(
        base=repository.config.base_id,
        kind="closed_form",
        made_on=set_digest(without_shards(repository, plan.kept)),
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
