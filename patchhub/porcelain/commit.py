"""`commit` and `update`: write facts into the model and record what that asked of its weights; `refresh`: record it again, by forward
passes alone, and measure thresholds of shards again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any, Final

import numpy as np
import torch
from safetensors.numpy import load
from transformers import PreTrainedTokenizerBase

from patchhub.canonical import canonical_json
from patchhub.editing.editor import EDITORS, encode_facts
from patchhub.editing.record import Recording, State
from patchhub.editing.record import record as record_columns
from patchhub.editing.requests import Batch, Keep, Origin
from patchhub.editing.rows import key_rows
from patchhub.editing.settings import EditSettings, WiseSettings
from patchhub.editing.steps import release_memory
from patchhub.errors import RepositoryError, RevisionError, SettingsError
from patchhub.evaluation.guard import Fault, Report
from patchhub.evaluation.guard import Measured as GuardMeasured
from patchhub.models.architectures import Architecture
from patchhub.models.placement import Placement, runs_beside
from patchhub.models.tracing import Stack
from patchhub.objects import METADATA_BYTES, SLOT, Commit, Element, Patch, Request
from patchhub.porcelain.change import largest_proof
from patchhub.progress import Progress
from patchhub.results import Result
from patchhub.sets.columns import read_additive, stacked_weights, write_columns
from patchhub.sets.commits import Draft, Written, begin, prepare, record, store_patch
from patchhub.sets.elements import OnConflict, Plan, active_requests, distinct, due, nothing_due, plan_batch, retargeted
from patchhub.sets.rivals import Rival
from patchhub.sets.settings import chosen_method
from patchhub.sets.shards import METHOD, active_shards, stale_shards, without_shards
from patchhub.sets.sums import asked_for
from patchhub.store.store import Store
from patchhub.text.tokens import Chat, context_length, refuse_unknown
from patchhub.who import Who
from patchhub.worktree.judging import Guarding, judge
from patchhub.worktree.loading import warn_of_losses
from patchhub.worktree.metric import Recorder, open_recorder
from patchhub.worktree.opening import BaseFiles, Worktree, base_files, in_chat, open_worktree, patch_state
from patchhub.worktree.recording import chosen_settings, state_without, write_closed_form
from patchhub.worktree.shards import deltas_near, forget_replaced, measure_shards, wise_settings, write_shards
from patchhub.worktree.workers import refuse_without_ray, workers_of


@dataclass(frozen=True)
class Committed(Result):
    """What `commit` did.

    Attributes:
        commit, patches: ids of the new objects; WISE makes more than one patch where a shard is filled.
        written, replaced: facts that are active now, and that are not any more.
        again: active facts of the same subjects, which were optimised and recorded once more together with the new ones.
        kept: prompts that are active now with the answers that must stay.
        already_active, duplicates: facts that were left out because they were active, or twice in the input.
        held: how many of the written facts the patched model answers with (argmax, teacher forced, float32).
        faults: facts that are not said by the model or run on, and other subjects' prompts that say them now, the worst first and
            `evaluation.guard.KEPT_FAULTS` at most.
        seconds: wall time.
        survival: per weight, the share of the state's change that rounding to the base's type keeps.
        rivals: facts of the batch and of before that compete for a key, the largest expected loss first.
    """

    commit: str
    patches: tuple[str, ...]
    written: tuple[Request, ...]
    replaced: tuple[Request, ...]
    again: tuple[Request, ...]
    kept: tuple[Request, ...]
    already_active: int
    duplicates: int
    held: int
    seconds: float
    survival: Mapping[str, float]
    rivals: tuple[Rival, ...] = ()
    faults: tuple[Fault, ...] = ()

    def words(self) -> str:
        replaced = f", {len(self.replaced)} replaced" if self.replaced else ""
        return f"{self.commit[:12]}: {len(self.written)} written{replaced}, {self.held} held, {self.seconds:.1f} s"


@dataclass(frozen=True)
class Writing:
    """How facts are written.

    Attributes:
        method: the editor, "memit", "pmet" or "wise"; None: as the repository's config says.
        settings: its settings that differ from the repository's config and the default rule.
        text: files to compute the metric from; only before the first commit.
        keep: prompts whose answers must stay (MEMIT and PMET): they become active like facts, and ask for no change.
        find_keeps: keep the same prompts about other subjects as well, those that the change would move most.
        on_conflict: what a contradiction with an active fact does: refuse the commit, replace the old fact, or keep both.
        strict: refuse facts that compete with others for a key (MEMIT and PMET), before anything is optimised.
        memory: bytes that the process may hold, the base included (MEMIT and PMET); None: half of what is free is used besides.
        workers: how many processes optimise values and read the base (MEMIT and PMET); None: this one, or as many as ``on`` has room for.
        on: the address of the Ray cluster that has them; None: this machine.
    """

    method: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    text: Sequence[Path] = ()
    keep: Sequence[Keep] = ()
    find_keeps: bool = False
    on_conflict: OnConflict = "refuse"
    strict: bool = False
    memory: int | None = None
    workers: int | None = None
    on: str | None = None


AS_CONFIGURED: Final = Writing()


def commit(
    repository: Store,
    batch: Batch,
    who: Who,
    progress: Progress,
    writing: Writing = AS_CONFIGURED,
    *,
    force: bool = False,
    all_facts: bool = False,
    placement: Placement | None = None,
    chat: bool | None = None,
    plan: Plan | None = None,
) -> Committed:
    """Write ``batch`` on top of HEAD and move the current branch to the new commit.

    Args:
        writing: how.
        force: write what fails the guard all the same, and say so in the commit.
        all_facts: refuse as soon as one fact does not hold, runs on, or is said of another subject.
        placement: on which device, in which type or quantisation the base is edited; None: as the repository's config says.
        chat: write the facts as answers in the base's chat template (MEMIT and PMET); None: as the repository's config says.
        plan: what the batch changes, where that was found out already.

    Raises:
        RequestError: nothing to write, a text longer than the model reads, a contradiction, or under ``strict`` a competition.
        RepositoryError: a stopped merge waits on HEAD.
        BaseError: the base is missing, changed or cannot be edited.
        EditError: the edit failed; nothing was committed.
        GuardError: the edit is finished and a check of it failed; nothing was committed.
    """
    begun, method = perf_counter(), chosen_method(repository, writing.method)
    _refuse_unusable(method, writing)
    begin(repository)
    _warn_of_what_is_left_out(batch, progress)
    if plan is None:
        plan = plan_batch(repository, batch, writing.on_conflict, by_subject=method in EDITORS, keeps=writing.keep)
    files = base_files(repository)
    editor = _editor(repository, files.architecture, method, writing.settings, len(plan.kept) + len(plan.requests))
    tree = _open(repository, progress, plan, files, editor, placement, chat, writing.memory)
    written = _write(repository, tree, plan, method, editor, writing, progress)
    progress.stage("writing the commit", 0)
    told = {"patches": list(written.patches)}
    draft = Draft((plan.parent,) if plan.parent else (), written.elements, written.metric, "commit", told)
    prepared = prepare(repository, draft, who, change=written.change)
    if writing.memory is not None:
        release_memory()  # what the edit left in pieces would come on top of what the guard reads
    asked: dict[str, Any] = {"tree": tree, "written": plan.requests, "sentences": written.sentences}
    made = judge(repository, prepared, progress, Guarding(force, all=all_facts), **asked)
    identity = record(repository, made, draft, who.signer)
    warn_of_losses(
        made.check.get("survival", {}),
        progress,
        "when it is rounded to the base's type",
        "load(..., side_path=True) keeps it",
    )
    done = _committed(identity, made, plan, written, batch.duplicates, perf_counter() - begun)
    if plan.requests and not done.held:
        progress.warn(_none_holds(method))
    progress.close()
    return done


def _committed(identity: str, made: Commit, plan: Plan, written: Written, duplicates: int, seconds: float) -> Committed:
    """What was done, and what the guard found."""
    report = Report.from_json(made.check)
    measured = report.measured if report else GuardMeasured()
    return Committed(
        commit=identity,
        patches=written.patches,
        written=plan.requests[: len(plan.requests) - len(plan.again)],
        again=tuple(plan.again.values()),
        kept=written.keeps,
        replaced=tuple(plan.replaced.values()),
        already_active=plan.already_active,
        duplicates=duplicates,
        held=measured.own.count if measured.own else 0,
        seconds=seconds,
        survival=made.check.get("survival", {}),
        rivals=written.rivals,
        faults=measured.spoken.faults if measured.spoken else (),
    )


def _refuse_unusable(method: str, writing: Writing) -> None:
    """Refuse what the method cannot do, or this machine has not installed, before anything is loaded."""
    if (writing.keep or writing.find_keeps) and method == METHOD:
        raise SettingsError(
            "WISE leaves what it does not route as it is", remedy="Leave --keep out, or use memit or pmet."
        )
    if (writing.workers or writing.on) and method == METHOD:
        raise SettingsError("WISE trains one side memory in one process", remedy="Leave --workers and --on out.")
    if writing.on:
        refuse_without_ray()


@dataclass(frozen=True)
class ClosedForm:
    """MEMIT or PMET with its settings, and the weights that it changes."""

    settings: EditSettings
    weights: tuple[str, ...]


@dataclass(frozen=True)
class SideMemories:
    """WISE with its settings, the rank that shards are recompressed to (None: kept as trained), and the weight that it changes."""

    settings: WiseSettings
    rank: int | None
    weights: tuple[str, ...]


def _editor(
    repository: Store, architecture: Architecture, method: str, given: Mapping[str, Any], facts: int
) -> ClosedForm | SideMemories:
    """The editor of that name in this repository, for a set of so many facts.

    Raises:
        SettingsError: there is none, or a setting cannot be used.
    """
    if method == METHOD:
        wise, rank = wise_settings(repository, architecture, given)
        return SideMemories(wise, rank, (architecture.ffn_weight(wise.layer),))
    if method not in EDITORS:
        raise SettingsError(
            f"there is no editor {method!r}", remedy=f"The editors are {', '.join((*EDITORS, METHOD))}."
        )
    chosen = chosen_settings(repository, method, architecture, given, facts)
    return ClosedForm(chosen, tuple(architecture.ffn_weight(layer) for layer in chosen.layers))


def _open(
    repository: Store,
    progress: Progress,
    plan: Plan,
    files: BaseFiles,
    editor: ClosedForm | SideMemories,
    placement: Placement | None,
    chat: bool | None,
    memory: int | None,
) -> Worktree:
    """The base in the state that the plan is written on; facts that are longer than it reads are refused here.

    Raises:
        SettingsError: WISE is to write in a chat, or side memories are to be trained in another type than float32.
    """
    wise = isinstance(editor, SideMemories)
    if wise and in_chat(repository, chat):
        raise SettingsError("WISE does not write inside a chat template", remedy="Use memit or pmet, or --no-chat.")
    state = patch_state(repository, state_without(repository, plan), None)
    options: dict[str, Any] = {"placement": placement, "chat": chat, "edits": editor.weights, "memory": memory}
    tree = open_worktree(repository, progress, state, base=files, **options)
    if runs_beside(tree.model) and (wise or active_shards(repository, plan.kept)):
        raise SettingsError(
            "WISE's side memories need a base in float32, and in memory, while facts are written",
            remedy="Say --dtype float32, and leave --quantization and --device stream out.",
        )
    facts = encode_facts(tree.tokenizer, plan.requests, (SLOT,), chat=tree.chat, limit=context_length(tree.model))
    for fact, request in zip(facts, plan.requests, strict=True):
        refuse_unknown(tree.model, tree.tokenizer, fact.rows[0].input_ids, f"{request.text} {request.target_new}")
    return tree


def _write(
    repository: Store,
    tree: Worktree,
    plan: Plan,
    method: str,
    editor: ClosedForm | SideMemories,
    writing: Writing,
    progress: Progress,
) -> Written:
    """The plan, written by its editor: patches in the store, and the set that their commit shall have."""
    if isinstance(editor, SideMemories):
        return write_shards(repository, tree, plan, editor.settings, editor.rank, progress)
    options: dict[str, Any] = {"strict": writing.strict, "find_keeps": writing.find_keeps}
    with workers_of(tree, writing.workers, writing.on, progress) as workers:
        options |= {"workers": workers}
        written = write_closed_form(repository, tree, plan, method, editor.settings, writing.text, progress, **options)
    return forget_replaced(repository, tree, plan, written, progress) if plan.shrunk else written


def _warn_of_what_is_left_out(batch: Batch, progress: Progress) -> None:
    if batch.duplicates:
        progress.warn(f"{batch.duplicates} exact duplicate{'' if batch.duplicates == 1 else 's'} counted once")
    if batch.unanswered:
        left = f"{batch.unanswered} neighborhood prompt{'' if batch.unanswered == 1 else 's'}"
        progress.warn(f"{left} without an answer left out")
    if batch.kept:
        progress.warn(f"kept as metadata, which `patchhub show -v` tells: {_fields(batch.kept)}")
    if batch.ignored:
        most = f"too long ({METADATA_BYTES} bytes a fact) or no JSON"
        progress.warn(f"left out, as {most}: {_fields(batch.ignored)}")


def _fields(found: Mapping[str, int]) -> str:
    """Names of fields, and how many records have each: "source (2 records)"."""
    listed = [f"{name} ({count} record{'' if count == 1 else 's'})" for name, count in found.items()]
    return ", ".join(listed[:_LISTED]) + (f" and {len(listed) - _LISTED} more" if len(listed) > _LISTED else "")


def _none_holds(method: str) -> str:
    """What is said when the model answers with none of the facts that were written."""
    other = "try another --method" if method == METHOD else "try the settings that `patchhub tune` finds"
    return f"none of these facts is the model's answer now: take them back with `patchhub undo`, check their prompts, or {other}"


_LISTED = 8


def update(
    repository: Store,
    subject: str,
    target: str,
    who: Who,
    progress: Progress,
    writing: Writing = AS_CONFIGURED,
    *,
    prompt: str | None = None,
    force: bool = False,
    all_facts: bool = False,
) -> Committed:
    """Retarget the active fact about a subject; its evaluation prompts stay.

    Args:
        subject: as it is in the fact.
        prompt: which of the subject's facts, with ``{}`` or with the subject filled in; needed only where it has several.
        writing, force, all_facts: as in `commit`; the old target is replaced, whatever ``writing`` says.

    Raises:
        RequestError: no active fact is meant, or several are, or it says so already.
        BaseError, EditError, GuardError: as in `commit`.
    """
    chosen, new = retargeted(repository, subject, target, prompt=prompt)
    before = ", ".join(fact.target_new for fact in chosen)
    return commit(
        repository,
        Batch((new,), (Origin("update"),), 0),
        who.saying(f"{new.text}: {before} -> {new.target_new}"),
        progress,
        replace(writing, on_conflict="replace"),
        force=force,
        all_facts=all_facts,
    )


# --- refresh --------------------------------------------------------------------------------------------------------

_NOT_REFRESHED: Final = "Leave the facts as they are recorded now"


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
    tree = _open_beside(repository, groups, active, staying, progress)
    elements, metric = staying, repository.commit(head).metric
    if groups:
        elements, metric = _record_groups(repository, tree, groups, staying, progress)
    elements, measured, withheld = measure_shards(repository, tree, active, elements, progress)
    if elements == active:
        raise _withheld_error(withheld)
    draft = Draft((head,), elements, metric, "refresh", {"facts": len(texts), "shards": len(measured)})
    made = prepare(repository, draft, who.saying(f"Refresh {_recorded_again(len(texts), len(measured))}"))
    entered = len(distinct(active_requests(repository, made.added)))
    # No fact is new: what is asked is whether those that held still do.
    asked = _in_form(tree, groups)
    made = judge(repository, made, progress, Guarding(force), tree=asked, facts=entered, remedy=_NOT_REFRESHED)
    identity = record(repository, made, draft, who.signer)
    progress.close()
    return Refreshed(
        commit=identity,
        facts=tuple(texts.values()),
        left=len(wanted) - len(texts) + sum(len(repository.patch(shard).requests) for shard in withheld),
        proof=largest_proof(made),
        seconds=perf_counter() - begun,
        shards=measured,
    )


def _in_form(tree: Worktree, groups: Sequence[_Group]) -> Worktree:
    """The model, to be asked in the chat form of the facts that are recorded again, where all have one."""
    forms = {Chat.from_json(group.settings.get("chat")) for group in groups}
    return replace(tree, chat=forms.pop() if len(forms) == 1 else None)


def _recorded_again(facts: int, shards: int) -> str:
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


def _open_beside(
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
        recording = _again(tree.stack, tree.tokenizer, group, recorder, state)
        elements |= _store(repository, group, recorder.metric, staying, recording).elements
        progress.advance(len(group.requests))
    return elements, recorder.metric


def _again(
    stack: Stack, tokenizer: PreTrainedTokenizerBase, group: _Group, recorder: Recorder, state: State
) -> Recording:
    kept = set(group.settings.get("keeps", ()))
    chat = Chat.from_json(group.settings.get("chat"))
    facts = encode_facts(tokenizer, group.requests, group.settings["contexts"], chat=chat)
    return record_columns(
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
