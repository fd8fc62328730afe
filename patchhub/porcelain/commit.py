"""`commit` and `update`: write a batch of facts into the model and record what that asked of its weights."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from patchhub.canonical import nfc
from patchhub.constraints import no_columns
from patchhub.delta import Delta
from patchhub.editing.budget import release_memory, step_budget
from patchhub.editing.editor import EDITORS, encode_facts
from patchhub.editing.keys import key_rows, mean_keys
from patchhub.editing.metric import MEMORY
from patchhub.editing.presets import preset
from patchhub.editing.record import Edit, State
from patchhub.editing.requests import Batch, Origin
from patchhub.editing.settings import EditSettings
from patchhub.editing.values import KeptValues, ValueSettings
from patchhub.errors import RequestError, SettingsError
from patchhub.models.architectures import Architecture, additive_probe, describe, read_config
from patchhub.models.checkpoint import Checkpoint
from patchhub.models.placement import Placement, runs_beside
from patchhub.objects import SLOT, Metric, Patch, Request, requests_json, set_digest
from patchhub.progress import Progress
from patchhub.sets.columns import read_additive, read_columns, read_state, solve_change, write_columns
from patchhub.sets.commits import Draft, Stamp, Written, snapshot
from patchhub.sets.elements import OnConflict, Plan, active_requests, distinct, plan_batch
from patchhub.sets.merging import refuse_stopped
from patchhub.sets.rivals import Rival, competition, refuse, suspects, warnings
from patchhub.sets.settings import metric_settings, read_setting
from patchhub.sets.shards import METHOD, active_shards, without_shards
from patchhub.store.store import Store
from patchhub.text.tokens import context_length
from patchhub.worktree.judging import judge_edit
from patchhub.worktree.loading import SURVIVAL_LIMIT, open_base
from patchhub.worktree.metric import Recorder, open_recorder
from patchhub.worktree.opening import Opened, open_model, placement_of
from patchhub.worktree.shards import forget_replaced, wise_settings, write_shards

_NULL_SPACE_RIDGE = 1.0  # AlphaEdit weighs requests by 1 and the norm of the change by l2


def chosen_settings(
    repository: Store, method: str, architecture: Architecture, given: Mapping[str, Any]
) -> EditSettings:
    """The settings of a closed-form editor in this repository.

    Args:
        given: values that replace all others, by field of `EditSettings`; ``preset`` names a preset.

    Raises:
        SettingsError: a value cannot be used, or there is no such layer or preset.
    """
    values = {**_configured(repository, method), **given}
    name = values.pop("preset", None)
    settings = EDITORS[method].default_settings(architecture)
    if name is not None:
        settings = preset(str(name), method, architecture).settings
    if _kind(repository) == "null_space":
        settings = replace(settings, ridge=_NULL_SPACE_RIDGE)
    if "layers" in values:
        values["layers"] = tuple(values["layers"])
        for layer in values["layers"]:
            architecture.block(layer)
    return replace(settings, **values)


def read_overrides(texts: Sequence[str], method: str) -> dict[str, Any]:
    """``KEY=VALUE`` texts as settings of one edit; a key is one of the config's, with or without the editor in front.

    Raises:
        SettingsError: not of that form, another editor's key or no key at all, or a value that cannot be used.
    """
    found: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        name = key.strip().removeprefix(f"{method}.")
        if not equals:
            raise SettingsError(f"{text!r} is not KEY=VALUE", remedy="For example --set layers=3-5 or --set ridge=200.")
        found[name] = read_setting(name if name == "preset" else f"{method}.{name}", value.strip())
    return found


def _configured(repository: Store, method: str) -> dict[str, Any]:
    settings = repository.config.settings
    named = {"preset": settings["preset"]} if "preset" in settings else {}
    prefix = f"{method}."
    return named | {key[len(prefix) :]: value for key, value in settings.items() if key.startswith(prefix)}


def _kind(repository: Store) -> str:
    """The kind of the metric that is pinned, else of the one that will be."""
    pinned = repository.config.recording
    if pinned is None:
        return metric_settings(repository)[0]
    return Metric.from_json(repository.objects.get(pinned.metric)).kind


def state_without(repository: Store, plan: Plan, state: Mapping[str, Sequence[Delta]]) -> dict[str, list[Delta]]:
    """The deltas of the state that the new facts are recorded on: HEAD's, without the facts they replace."""
    found = {weight: list(deltas) for weight, deltas in state.items()}
    if plan.replaced:
        for weight, part in solve_change(repository, repository.active(plan.parent), plan.kept).items():
            found.setdefault(weight, []).append(part)
    return found


def write_closed_form(
    repository: Store,
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
    repository: Store, opened: Opened, plan: Plan, recorder: Recorder, settings: EditSettings, below: State
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
    repository: Store,
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
    repository: Store, opened: Opened, plan: Plan, method: str, layer: int, values: ValueSettings
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
    return KeptValues(repository.cache, inputs, opened.architecture.d_model)


def _store_patch(
    repository: Store, plan: Plan, recorder: Recorder, method: str, settings: EditSettings, edit: Edit
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


@dataclass(frozen=True)
class Committed:
    """What `commit` did.

    Attributes:
        commit, patches: ids of the new objects; WISE makes more than one patch where a shard is filled.
        written, replaced: facts that are active now, and that are not any more.
        already_active, duplicates: facts that were left out because they were active, or twice in the input.
        held: how many of the written facts the patched model answers with (argmax, teacher forced, float32).
        seconds: wall time.
        survival: per weight, the share of the state's change that rounding to the base's type keeps.
        rivals: facts of the batch and of before that compete for a key, the largest expected loss first.
    """

    commit: str
    patches: tuple[str, ...]
    written: tuple[Request, ...]
    replaced: tuple[Request, ...]
    already_active: int
    duplicates: int
    held: int
    seconds: float
    survival: Mapping[str, float]
    rivals: tuple[Rival, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "written": [request.id for request in self.written],
            "replaced": [request.id for request in self.replaced],
        }


def commit(
    repository: Store,
    batch: Batch,
    stamp: Stamp,
    progress: Progress,
    *,
    method: str = "memit",
    settings: Mapping[str, Any] | None = None,
    text: Sequence[Path] = (),
    on_conflict: OnConflict = "refuse",
    strict: bool = False,
    force: bool = False,
    placement: Placement | None = None,
    chat: bool | None = None,
    memory: int | None = None,
) -> Committed:
    """Write ``batch`` on top of HEAD and move the current branch to the new commit.

    Args:
        method: the editor, "memit", "pmet" or "wise".
        settings: its settings that differ from the repository's config and the default rule.
        text: files to compute the metric from; only before the first commit.
        on_conflict: what a contradiction with an active fact does: refuse the commit, replace the old fact, or keep both.
        strict: refuse facts that compete with others for a key (MEMIT and PMET), before anything is optimised.
        force: write what fails the guard all the same, and say so in the commit.
        placement: on which device, in which type or quantisation the base is edited; None: as the repository's config says.
        chat: write the facts as answers in the base's chat template (MEMIT and PMET); None: as the repository's config says.
        memory: bytes that the process may hold, the base included (MEMIT and PMET); None: half of what is free is used besides.

    Raises:
        RequestError: nothing to write, a text longer than the model reads, a contradiction, or under ``strict`` a competition.
        RepositoryError: a stopped merge waits on HEAD.
        BaseError: the base is missing, changed or cannot be edited.
        EditError: the edit failed; nothing was committed.
        GuardError: the edit is finished and a check of it failed; nothing was committed.
    """
    begun = perf_counter()
    refuse_stopped(repository)
    plan = plan_batch(repository, batch, on_conflict)
    checkpoint = open_base(repository)
    edit = _chosen_edit(repository, checkpoint, method, settings or {}, text, strict, memory)
    progress.stage("loading the base", 0)
    opened = _open(repository, checkpoint, edit, plan, placement, chat=_in_chat(repository, method, chat))
    if runs_beside(opened.model) and (method == METHOD or active_shards(repository, plan.kept)):
        raise SettingsError(
            "WISE's side memories need a base in float32 while facts are written",
            remedy="Say --dtype float32, and leave --quantization out.",
        )
    written = edit.write(repository, opened, plan, progress)
    progress.stage("writing the commit", 0)
    parents = (plan.parent,) if plan.parent else ()
    draft = Draft(parents, written.elements, written.metric, "commit", {"patches": list(written.patches)})
    judge = judge_edit(repository, opened, plan.requests, progress, force=force)
    identity = snapshot(repository, draft, stamp, change=written.change, judge=judge)
    check = repository.commit(identity).check
    survival: Mapping[str, float] = check.get("survival", {})
    _warn_of_losses(survival, progress)
    held = check["guard"]["own"]["count"]
    if plan.requests and not held:
        progress.warn(_none_holds(method))
    progress.close()
    return Committed(
        commit=identity,
        patches=written.patches,
        written=plan.requests,
        replaced=tuple(plan.replaced.values()),
        already_active=plan.already_active,
        duplicates=batch.duplicates,
        held=held,
        seconds=perf_counter() - begun,
        survival=survival,
        rivals=written.rivals,
    )


@dataclass(frozen=True)
class _Edit:
    """An editor with its settings: the weights that it changes, and how it writes a plan."""

    architecture: Architecture
    weights: Sequence[str]
    write: Callable[[Store, Opened, Plan, Progress], Written]


def _chosen_edit(
    repository: Store,
    checkpoint: Checkpoint,
    method: str,
    given: Mapping[str, Any],
    text: Sequence[Path],
    strict: bool,
    memory: int | None,
) -> _Edit:
    """The editor of that name.

    Raises:
        SettingsError: there is none, or a setting cannot be used.
    """
    architecture = describe(read_config(checkpoint.folder))
    if method == METHOD:
        wise, rank = wise_settings(repository, architecture, given)
        weights = [architecture.ffn_weight(wise.layer)]
        return _Edit(architecture, weights, lambda r, o, p, progress: write_shards(r, o, p, wise, rank, progress))
    if method not in EDITORS:
        raise SettingsError(
            f"there is no editor {method!r}", remedy=f"The editors are {', '.join((*EDITORS, METHOD))}."
        )
    chosen = chosen_settings(repository, method, architecture, given)

    def write(repository: Store, opened: Opened, plan: Plan, progress: Progress) -> Written:
        written = write_closed_form(
            repository, opened, plan, method, chosen, text, progress, strict=strict, memory=memory
        )
        return forget_replaced(repository, opened, plan, written, progress)

    return _Edit(architecture, [architecture.ffn_weight(layer) for layer in chosen.layers], write)


def _open(
    repository: Store, checkpoint: Checkpoint, edit: _Edit, plan: Plan, placement: Placement | None, *, chat: bool
) -> Opened:
    """The base in the state that the plan is written on; facts that are longer than it reads are refused here."""
    deltas = state_without(repository, plan, read_state(repository, plan.parent))
    place = placement or placement_of(repository)
    opened = open_model(repository, checkpoint, edit.architecture, edit.weights, deltas, place, chat=chat)
    limit = context_length(opened.model)
    encode_facts(opened.tokenizer, plan.requests, (SLOT,), chat=opened.chat, limit=limit)
    return opened


def _in_chat(repository: Store, method: str, asked: bool | None) -> bool:
    """Whether facts are written in a chat.

    Raises:
        SettingsError: they are to be, with WISE.
    """
    chat = bool(repository.config.settings.get("chat", False)) if asked is None else asked
    if chat and method == METHOD:
        raise SettingsError("WISE does not write inside a chat template", remedy="Use memit or pmet, or --no-chat.")
    return chat


def _none_holds(method: str) -> str:
    """What is said when the model answers with none of the facts that were written."""
    other = "try another --method" if method == METHOD else "try the settings that `patchhub tune` finds"
    return f"none of these facts is the model's answer now: take them back with `patchhub undo`, check their prompts, or {other}"


def _warn_of_losses(survival: Mapping[str, float], progress: Progress) -> None:
    for weight, share in survival.items():
        if share < SURVIVAL_LIMIT:
            progress.warn(
                f"{1 - share:.0%} of the change of {weight} is lost when it is rounded to the base's type; "
                "load(..., side_path=True) keeps it"
            )


_LISTED = 8


def update(
    repository: Store,
    subject: str,
    target: str,
    stamp: Stamp,
    progress: Progress,
    *,
    prompt: str | None = None,
    method: str = "memit",
    settings: Mapping[str, Any] | None = None,
    strict: bool = False,
    force: bool = False,
) -> Committed:
    """Retarget the active fact about a subject; its evaluation prompts stay.

    Args:
        subject: as it is in the fact.
        prompt: which of the subject's facts, with ``{}`` or with the subject filled in; needed only where it has several.
        method, settings, strict, force: as in `commit`.

    Raises:
        RequestError: no active fact is meant, or several are, or it says so already.
        BaseError, EditError, GuardError: as in `commit`.
    """
    facts = distinct(active_requests(repository, repository.active(repository.head[1])))
    chosen = _chosen(facts, nfc(subject).strip(), None if prompt is None else nfc(prompt).strip())
    new = _retargeted(chosen[0], target)
    if any(fact.target_new == new.target_new for fact in chosen):
        raise RequestError(
            f"'{new.text}' is '{new.target_new}' already",
            remedy="Give another target; `patchhub revert --request` takes back one of several that contradict each other."
            if len(chosen) > 1
            else "Give another target.",
        )
    before = ", ".join(fact.target_new for fact in chosen)
    message = stamp.message or f"{new.text}: {before} -> {new.target_new}"
    return commit(
        repository,
        Batch((new,), (Origin("update"),), 0),
        Stamp(stamp.author, stamp.time, message),
        progress,
        method=method,
        settings=settings,
        on_conflict="replace",
        strict=strict,
        force=force,
    )


def _chosen(facts: Sequence[Request], subject: str, prompt: str | None) -> list[Request]:
    """The active requests of the one prompt about a subject that is meant."""
    about = [fact for fact in facts if fact.subject == subject]
    if not about:
        close = difflib.get_close_matches(subject, sorted({fact.subject for fact in facts}), n=1)
        remedy = f"Did you mean '{close[0]}'?" if close else "`patchhub commit` writes a new fact."
        raise RequestError(f"no active fact is about '{subject}'", remedy=remedy, subject=subject)
    found = [fact for fact in about if prompt is None or prompt in (fact.prompt, fact.text)]
    prompts = sorted({fact.prompt for fact in found or about})
    if len(prompts) == 1 and found:
        return found
    listed = "; ".join(prompts[:_LISTED]) + ("; ..." if len(prompts) > _LISTED else "")
    problem = f"{len(prompts)} active facts are" if found else f"no active fact with the prompt {prompt!r} is"
    raise RequestError(
        f"{problem} about '{subject}'", remedy=f"Say which with --prompt: {listed}", subject=subject, prompts=prompts
    )


def _retargeted(fact: Request, target: str) -> Request:
    """The request with another target. Where that is the true answer, there is nothing left to compare it with."""
    new = Request.make(fact.prompt, fact.subject, target)
    return Request(
        prompt=fact.prompt,
        subject=fact.subject,
        target_new=new.target_new,
        target_true=None if new.target_new == fact.target_true else fact.target_true,
        paraphrases=fact.paraphrases,
        neighborhood=fact.neighborhood,
    )
