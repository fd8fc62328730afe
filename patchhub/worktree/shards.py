"""Side memories made and measured: from requests to shards in the store.

A commit continues the open shard, opens new ones, and trains those again that lose a fact; `refresh` measures thresholds again where the
weights below a shard changed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Final

from patchhub.cache import Kind
from patchhub.canonical import canonical_json
from patchhub.delta import Delta, write_deltas
from patchhub.editing.settings import WiseSettings
from patchhub.editing.settings import default_wise_settings as default_settings
from patchhub.editing.wise import training
from patchhub.editing.wise.texts import Shard, recompress
from patchhub.errors import SettingsError
from patchhub.models.architectures import Architecture
from patchhub.objects import Element, Patch, Request
from patchhub.progress import Progress
from patchhub.runtime.patched_model import switch
from patchhub.sets.columns import read_state
from patchhub.sets.commits import Written, store_patch
from patchhub.sets.elements import Plan
from patchhub.sets.shards import (
    METHOD,
    Reshape,
    ShardPlan,
    ShardRecord,
    active_shards,
    below_of,
    next_number,
    open_shard,
    shard_record,
    shrink,
    stale_shards,
    texts_of,
)
from patchhub.sets.sums import solve_change
from patchhub.store.store import Store
from patchhub.text.sampling import context_templates, sample_documents
from patchhub.worktree.metric import kept_text, set_aside, with_held
from patchhub.worktree.opening import Worktree, base_files, open_worktree, patch_state, stored_shard

TEXT: Final = Kind("wise", ".json")

_TOKENS: Final = 4_096  # at least
_TOKENS_PER_INPUT: Final = 6  # of the widest feed-forward network: fewer, and locality suffers (docs/wise.md)
_LENGTH: Final = 64


@dataclass(frozen=True)
class WiseText:
    """Templates with one ``{}``, the bare prompt first; and the token ids of each document."""

    contexts: tuple[str, ...]
    locality: tuple[tuple[int, ...], ...]


def open_wise_text(repository: Store, tree: Worktree, seed: int, progress: Progress) -> WiseText:
    """The text for a seed, sampled from the unpatched base and kept in the cache: a function of base and seed.

    It is the metric's text of that seed, without the part that is held aside.
    """
    slot = repository.cache.slot(TEXT, of=repository.config.base_id, seed=seed)
    for kept in map(json.loads, slot.contents()):
        return WiseText(tuple(kept["contexts"]), tuple(map(tuple, kept["locality"])))
    widest = max(p.shape[1] // max(1, p.experts) for p in tree.architecture.feed_forward)
    tokens = max(_TOKENS, _TOKENS_PER_INPUT * widest)
    progress.stage("text from the base", with_held(tokens))
    with _unpatched(repository, tree):
        documents = sample_documents(
            tree.stack,
            tree.tokenizer,
            with_held(tokens),
            length=_LENGTH,
            seed=seed,
            kept=kept_text(repository),
            progress=progress.advance,
        )
        locality = set_aside(documents)[0]
        text = WiseText(context_templates(tree.stack, tree.tokenizer), tuple(map(tuple, locality)))
    slot.keep([canonical_json(asdict(text))])
    return text


@contextmanager
def _unpatched(repository: Store, tree: Worktree) -> Iterator[None]:
    """The model as the base while the block runs."""
    switch(tree.model, tree.checkpoint, patch_state(repository, {}, None))
    try:
        yield
    finally:
        switch(tree.model, tree.checkpoint, patch_state(repository, tree.state.weights, None))


@dataclass(frozen=True)
class Making:
    """How a shard is made.

    Attributes:
        settings: of the training.
        number: which random subspace it lives in.
        follows: the shard that it takes the place of, if any.
        kept: the requests of that shard which it goes on to hold; its values are where training starts. Empty: it starts anew.
        rank: recompress it to this rank; None keeps it as trained, bit for bit.
    """

    settings: WiseSettings
    number: int
    follows: str | None = None
    kept: tuple[Request, ...] = ()
    rank: int | None = None


def wise_settings(
    repository: Store, architecture: Architecture, given: Mapping[str, Any]
) -> tuple[WiseSettings, int | None]:
    """The default rule, changed by the repository's config, changed by what was given; and the rank to recompress to.

    Raises:
        SettingsError: there is no such setting or layer, or a value cannot be used.
    """
    prefix = f"{METHOD}."
    configured = {k[len(prefix) :]: v for k, v in repository.config.settings.items() if k.startswith(prefix)}
    chosen = {**configured, **given}
    chosen.pop("mode", None)
    rank = chosen.pop("rank", None)
    return _settings(architecture, chosen), rank


def train_shard(
    repository: Store,
    tree: Worktree,
    beside: frozenset[Element],
    requests: Sequence[Request],
    making: Making,
    progress: Progress,
) -> Patch:
    """Train a shard for ``requests``, and for those that it keeps, and store it.

    Args:
        tree: the model in the main weights of the state that the shard will be beside.
        beside: that state's elements, without the shard that this one takes the place of.

    Raises:
        EditError: the training is not finite.
    """
    settings = making.settings
    text = open_wise_text(repository, tree, settings.seed, progress)
    start = stored_shard(repository, making.follows) if making.follows and making.kept else None
    progress.stage("training a shard", len(requests))
    trained = training.train(
        tree.stack,
        tree.tokenizer,
        requests,
        text.contexts,
        settings,
        text.locality,
        start=start,
        earlier=making.kept,
        number=making.number,
        progress=lambda stage, done: progress.advance(done),
    )
    shard, report = trained.shard, dict(trained.report)
    held = (*making.kept, *requests)
    if making.rank is not None:
        shard, error = recompress(shard, making.rank)
        shard = training.measure(tree.stack, tree.tokenizer, shard, held, text.contexts, settings, text.locality)
        report |= {"rank": making.rank, "relative_error": error}
    record = ShardRecord(
        below=below_of(repository, beside, layers_below(tree.architecture, shard.weight)),
        contexts=text.contexts,
        follows=making.follows,
        number=making.number,
        report=report,
        routing=shard.routing,
        training=settings.to_json(),
    )
    return store_shard(repository, shard, record, held, beside)


def measure_again(
    repository: Store, tree: Worktree, beside: frozenset[Element], identity: str, progress: Progress
) -> Patch:
    """The shard of a patch with its threshold measured again on the present main weights, as a new patch.

    Raises:
        RepositoryError: the texts of its requests are withheld.
    """
    patch = repository.patch(identity)
    record = shard_record(patch)
    requests = texts_of(repository, identity)
    settings = _settings(tree.architecture, dict(record.training))
    text = open_wise_text(repository, tree, settings.seed, progress)
    shard = training.measure(
        tree.stack,
        tree.tokenizer,
        stored_shard(repository, identity),
        requests,
        record.contexts,
        settings,
        text.locality,
    )
    below = below_of(repository, beside, record.below.weights)
    renewed = replace(record, below=below, follows=identity, routing=shard.routing)
    return store_shard(repository, shard, renewed, requests, beside)


def train_again(
    repository: Store, tree: Worktree, beside: frozenset[Element], reshape: Reshape, progress: Progress
) -> Patch:
    """The shard that ``reshape`` asks for: continued where it only takes facts in, trained anew where it forgets some.

    Raises:
        RepositoryError: the texts of its facts are withheld.
        EditError: as in `train_shard`.
    """
    texts = reshape.texts(repository)
    held = repository.patch(reshape.shard).requests
    making = made_like(repository, tree.architecture, reshape.shard)
    if making.rank is None and reshape.facts.issuperset(held):
        making = replace(making, kept=tuple(texts[fact] for fact in held))
    kept = {request.id for request in making.kept}
    requests = [request for request in texts.values() if request.id not in kept]
    return train_shard(repository, tree, beside, requests, making, progress)


def made_like(repository: Store, architecture: Architecture, identity: str) -> Making:
    """How to make a shard anew in the place of a stored one."""
    record = shard_record(repository.patch(identity))
    settings = _settings(architecture, dict(record.training))
    return Making(settings, record.number, identity, rank=record.report.get("rank"))


def store_shard(
    repository: Store, shard: Shard, record: ShardRecord, requests: Sequence[Request], beside: frozenset[Element]
) -> Patch:
    """Write a shard and its patch; ``beside`` is the set that it was made on."""
    return store_patch(
        repository,
        kind="shard",
        method=METHOD,
        requests=requests,
        settings=record.to_json(),
        tensors=write_deltas({shard.weight: shard.change}),
        weights={shard.weight: shard.change.shape},
        below=beside,
    )


def layers_below(architecture: Architecture, weight: str) -> list[str]:
    """The weights that can be edited at or below the layer of one."""
    return [architecture.ffn_weight(layer) for layer in range(architecture.layer_of(weight) + 1)]


def _settings(architecture: Architecture, chosen: Mapping[str, Any]) -> WiseSettings:
    known = {entry.name for entry in fields(WiseSettings)}
    unknown = sorted(chosen.keys() - known)
    if unknown:
        raise SettingsError(
            f"WISE has no setting {unknown[0]!r}", remedy=f"Its settings are {', '.join(sorted(known))}."
        )
    settings = replace(default_settings(architecture), **chosen)
    architecture.block(settings.layer)
    return settings


def deltas_near(repository: Store, active: frozenset[Element], elements: frozenset[Element]) -> dict[str, list[Delta]]:
    """The deltas of a set that is near HEAD's, which is ``active``."""
    deltas = {weight: list(found) for weight, found in read_state(repository, repository.head[1]).items()}
    for weight, part in solve_change(repository, active, elements, near=repository.head[1]).items():
        deltas.setdefault(weight, []).append(part)
    return deltas


def measure_shards(
    repository: Store,
    tree: Worktree,
    active: frozenset[Element],
    elements: frozenset[Element],
    progress: Progress,
) -> tuple[frozenset[Element], tuple[str, ...], tuple[str, ...]]:
    """The set with stale thresholds measured on its weights; the new shards, and those whose texts are withheld."""
    stale = stale_shards(repository, elements)
    withheld = tuple(shard for shard in stale if not repository.requests(repository.patch(shard)))
    due = [shard for shard in stale if shard not in withheld]
    made: list[str] = []
    if due:
        tree = tree.moved(patch_state(repository, deltas_near(repository, active, elements), None))
        progress.stage("measuring thresholds", len(due))
    for shard in due:
        beside = elements - {(shard, None)}
        patch = measure_again(repository, tree, beside, shard, progress)
        elements = beside | patch.elements
        made.append(patch.id)
        progress.advance(1)
    return elements, tuple(made), withheld


def write_shards(
    repository: Store,
    tree: Worktree,
    plan: Plan,
    settings: WiseSettings,
    rank: int | None,
    progress: Progress,
) -> Written:
    """Write the facts of ``plan`` with WISE; ``tree`` is in the main weights of HEAD, without the columns that are replaced.

    The open shard takes facts until it is full; for the rest shards are begun, each in its own random subspace.

    Raises:
        RepositoryError: the texts of the open shard, or of one that loses a fact, are withheld.
        EditError: the training is not finite.
    """
    weight = tree.architecture.ffn_weight(settings.layer)
    current = open_shard(active_shards(repository, plan.kept), weight, settings.shard_size)
    others = {shard: facts for shard, facts in plan.shrunk.items() if shard != current}
    elements = trained(repository, tree, plan.kept, shrink(repository, others), progress)
    left, made = list(plan.requests), []
    while left:
        making = _next(repository, elements, current, plan, settings)
        elements -= {(current, None)}
        room = settings.shard_size - len(making.kept)
        patch = train_shard(repository, tree, elements, left[:room], replace(making, rank=rank), progress)
        elements, left, current = elements | patch.elements, left[room:], None
        made.append(patch.id)
    metric = repository.commit(plan.parent).metric if plan.parent else None
    replaced_columns = repository.active(plan.parent) - plan.kept
    return Written(tuple(made), elements, metric, None if replaced_columns else {})


def forget_replaced(repository: Store, tree: Worktree, plan: Plan, written: Written, progress: Progress) -> Written:
    """A closed-form edit, with the shards of its state trained again where they hold facts that it replaces."""
    if not plan.shrunk:
        return written
    change = written.change
    if change is None:
        change = solve_change(repository, repository.active(plan.parent), written.elements, near=plan.parent)
    deltas = {weight: list(found) for weight, found in read_state(repository, plan.parent).items()}
    for weight, part in change.items():
        deltas.setdefault(weight, []).append(part)
    there = tree.moved(patch_state(repository, deltas, None))
    elements = trained(repository, there, written.elements, shrink(repository, plan.shrunk), progress)
    return replace(written, elements=elements, change=change)


def open_for_shards(
    repository: Store, before: frozenset[Element], after: frozenset[Element], progress: Progress
) -> Worktree:
    """The base in the main weights of a set that is about to be committed on HEAD, whose set is ``before``.

    Raises:
        BaseError: the base is missing, changed or cannot be edited.
    """
    files = base_files(repository)
    weights = {weight for patch in active_shards(repository, before | after).values() for weight in patch.weights}
    state = patch_state(repository, deltas_near(repository, before, after), None)
    return open_worktree(repository, progress, state, base=files, chat=False, edits=sorted(weights))


def trained(
    repository: Store, tree: Worktree, elements: frozenset[Element], plan: ShardPlan, progress: Progress
) -> frozenset[Element]:
    """A set after what ``plan`` asks of its shards; ``tree`` is in the main weights of that set."""
    elements = (elements - plan.remove) | plan.restore
    for reshape in plan.train:
        beside = elements - {(reshape.shard, None)}
        elements = beside | train_again(repository, tree, beside, reshape, progress).elements
    return elements


def _next(
    repository: Store, elements: frozenset[Element], current: str | None, plan: Plan, settings: WiseSettings
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
    repository: Store,
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
    tree = open_for_shards(repository, before, after, progress)
    done = trained(repository, tree, after, ShardPlan(train=shards.train), progress)
    progress.close()
    return done, tuple(sorted(patch for patch, _ in done - after))
