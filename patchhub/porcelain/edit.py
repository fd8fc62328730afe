"""`commit`: write a batch of facts into the model and record what that asked of its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from patchhub.editing.editors import EDITORS
from patchhub.editing.facts import encode_facts
from patchhub.editing.lengths import context_length
from patchhub.editing.requests import Batch
from patchhub.errors import SettingsError
from patchhub.models.architectures import Architecture, describe, read_config
from patchhub.models.checkpoint import Checkpoint
from patchhub.models.placement import Placement, runs_beside
from patchhub.objects import SLOT, Request
from patchhub.porcelain.columns import read_state
from patchhub.porcelain.competition import Rival
from patchhub.porcelain.edit_closed_form import state_without, write_closed_form
from patchhub.porcelain.edit_settings import chosen_settings
from patchhub.porcelain.edit_shard import forget_replaced, write_shards
from patchhub.porcelain.judging import judge_edit
from patchhub.porcelain.loading import SURVIVAL_LIMIT, open_base
from patchhub.porcelain.opened import Opened, open_model
from patchhub.porcelain.placements import placement_of
from patchhub.porcelain.plan import OnConflict, Plan, plan_batch
from patchhub.porcelain.progress import Progress
from patchhub.porcelain.shards import METHOD, active_shards
from patchhub.porcelain.snapshot import Draft, Stamp, snapshot
from patchhub.porcelain.stopped_merge import refuse_stopped
from patchhub.porcelain.train_shard import wise_settings
from patchhub.porcelain.written import Written
from patchhub.store.repository import Repository

__all__ = ["Committed", "OnConflict", "commit"]


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
    repository: Repository,
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
    write: Callable[[Repository, Opened, Plan, Progress], Written]


def _chosen_edit(
    repository: Repository,
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

    def write(repository: Repository, opened: Opened, plan: Plan, progress: Progress) -> Written:
        written = write_closed_form(
            repository, opened, plan, method, chosen, text, progress, strict=strict, memory=memory
        )
        return forget_replaced(repository, opened, plan, written, progress)

    return _Edit(architecture, [architecture.ffn_weight(layer) for layer in chosen.layers], write)


def _open(
    repository: Repository, checkpoint: Checkpoint, edit: _Edit, plan: Plan, placement: Placement | None, *, chat: bool
) -> Opened:
    """The base in the state that the plan is written on; facts that are longer than it reads are refused here."""
    deltas = state_without(repository, plan, read_state(repository, plan.parent))
    place = placement or placement_of(repository)
    opened = open_model(repository, checkpoint, edit.architecture, edit.weights, deltas, place, chat=chat)
    limit = context_length(opened.model)
    encode_facts(opened.tokenizer, plan.requests, (SLOT,), chat=opened.chat, limit=limit)
    return opened


def _in_chat(repository: Repository, method: str, asked: bool | None) -> bool:
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
