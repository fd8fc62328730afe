"""The WISE part of `commit`: continue the open shard, open new ones, and train again the shards that lose a fact."""

from __future__ import annotations

from dataclasses import replace

from patchhub.editing.wise_settings import WiseSettings
from patchhub.models.architectures import describe, read_config
from patchhub.objects import Element
from patchhub.porcelain.columns import read_state, solve_change
from patchhub.porcelain.loading import open_base
from patchhub.porcelain.opened import Opened, open_model
from patchhub.porcelain.placements import placement_of
from patchhub.porcelain.plan import Plan
from patchhub.porcelain.progress import Progress
from patchhub.porcelain.refresh_shards import deltas_near
from patchhub.porcelain.reshape import ShardPlan, shrink
from patchhub.porcelain.shards import active_shards, next_number, open_shard, shard_record, texts_of
from patchhub.porcelain.train_shard import Making, train_again, train_shard
from patchhub.porcelain.written import Written
from patchhub.store.repository import Repository


def write_shards(
    repository: Repository,
    opened: Opened,
    plan: Plan,
    settings: WiseSettings,
    rank: int | None,
    progress: Progress,
) -> Written:
    """Write the facts of ``plan`` with WISE; ``opened`` is in the main weights of HEAD, without the columns that are replaced.

    The open shard takes facts until it is full; for the rest shards are opened, each in its own random subspace.

    Raises:
        RepositoryError: the texts of the open shard, or of one that loses a fact, are withheld.
        EditError: the training is not finite.
    """
    weight = opened.architecture.ffn_weight(settings.layer)
    current = open_shard(active_shards(repository, plan.kept), weight, settings.shard_size)
    others = {shard: facts for shard, facts in plan.shrunk.items() if shard != current}
    elements = trained(repository, opened, plan.kept, shrink(repository, others), progress)
    left, made = list(plan.requests), []
    while left:
        making = _next(repository, elements, current, plan, settings)
        elements -= {(current, None)}
        room = settings.shard_size - len(making.kept)
        patch = train_shard(repository, opened, elements, left[:room], replace(making, rank=rank), progress)
        elements, left, current = elements | patch.elements, left[room:], None
        made.append(patch.id)
    metric = repository.commit(plan.parent).metric if plan.parent else None
    replaced_columns = repository.active(plan.parent) - plan.kept
    return Written(tuple(made), elements, metric, None if replaced_columns else {})


def forget_replaced(
    repository: Repository, opened: Opened, plan: Plan, written: Written, progress: Progress
) -> Written:
    """A closed-form edit, with the shards of its state trained again where they hold facts that it replaces."""
    if not plan.shrunk:
        return written
    change = written.change
    if change is None:
        change = solve_change(repository, repository.active(plan.parent), written.elements)
    deltas = {weight: list(found) for weight, found in read_state(repository, plan.parent).items()}
    for weight, part in change.items():
        deltas.setdefault(weight, []).append(part)
    there = opened.moved(repository, deltas)
    elements = trained(repository, there, written.elements, shrink(repository, plan.shrunk), progress)
    return replace(written, elements=elements, change=change)


def open_for_shards(
    repository: Repository, before: frozenset[Element], after: frozenset[Element], progress: Progress
) -> Opened:
    """The base in the main weights of a set that is about to be committed on HEAD, whose set is ``before``.

    Raises:
        BaseError: the base is missing, changed or cannot be edited.
    """
    deltas = deltas_near(repository, before, after)
    weights = {weight for patch in active_shards(repository, before | after).values() for weight in patch.weights}
    checkpoint = open_base(repository)
    progress.stage("loading the base", 0)
    architecture = describe(read_config(checkpoint.folder))
    return open_model(repository, checkpoint, architecture, sorted(weights), deltas, placement_of(repository))


def trained(
    repository: Repository, opened: Opened, elements: frozenset[Element], plan: ShardPlan, progress: Progress
) -> frozenset[Element]:
    """A set after what ``plan`` asks of its shards; ``opened`` is in the main weights of that set."""
    elements = (elements - plan.remove) | plan.restore
    for reshape in plan.train:
        beside = elements - {(reshape.shard, None)}
        elements = beside | train_again(repository, opened, beside, reshape, progress).elements
    return elements


def _next(
    repository: Repository, elements: frozenset[Element], current: str | None, plan: Plan, settings: WiseSettings
) -> Making:
    """How the next shard is made: from the open one, in its subspace, or a new one."""
    if current is None:
        return Making(settings, next_number(active_shards(repository, elements)))
    record = shard_record(repository.patch(current))
    gone = plan.shrunk.get(current, frozenset())
    kept = tuple(request for request in texts_of(repository, current) if request.id not in gone)
    subspace = {name: record.training[name] for name in ("seed", "mask_ratio") if name in record.training}
    return Making(replace(settings, **subspace), record.number, current, kept)


def train_reshaped(
    repository: Repository,
    before: frozenset[Element],
    after: frozenset[Element],
    shards: ShardPlan,
    progress: Progress,
) -> tuple[frozenset[Element], tuple[str, ...]]:
    """A set with the shards of ``shards.train`` trained again, and their ids. Loads the base.

    Args:
        before: HEAD's set.
        after: the set, with the shards that are to be trained as they were.

    Raises:
        BaseError: the base is missing, changed or cannot be edited.
        RepositoryError: the texts of a shard are withheld.
        EditError: a training is not finite.
    """
    opened = open_for_shards(repository, before, after, progress)
    done = trained(repository, opened, after, ShardPlan(train=shards.train), progress)
    progress.close()
    return done, tuple(sorted(patch for patch, _ in done - after))
