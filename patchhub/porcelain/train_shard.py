"""Shards are trained, measured and kept: from requests to a shard patch in the store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from patchhub.delta import write_deltas
from patchhub.editing import wise
from patchhub.editing.wise import Shard
from patchhub.editing.wise_settings import WiseSettings, default_settings
from patchhub.errors import SettingsError
from patchhub.models.architectures import Architecture
from patchhub.objects import Element, Patch, Request, requests_json, set_digest
from patchhub.porcelain.opened import Opened
from patchhub.porcelain.progress import Progress
from patchhub.porcelain.reshape import Reshape
from patchhub.porcelain.routing_state import stored_shard
from patchhub.porcelain.shards import METHOD, ShardRecord, below_of, shard_record, texts_of
from patchhub.porcelain.wise_text import open_wise_text
from patchhub.store.repository import Repository


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
    repository: Repository, architecture: Architecture, given: Mapping[str, Any]
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
    repository: Repository,
    opened: Opened,
    beside: frozenset[Element],
    requests: Sequence[Request],
    making: Making,
    progress: Progress,
) -> Patch:
    """Train a shard for ``requests``, and for those that it keeps, and store it.

    Args:
        opened: the model in the main weights of the state that the shard will be beside.
        beside: that state's elements, without the shard that this one takes the place of.

    Raises:
        EditError: the training is not finite.
    """
    settings = making.settings
    text = open_wise_text(repository, opened, settings.seed, progress)
    start = stored_shard(repository, making.follows) if making.follows and making.kept else None
    progress.stage("training a shard", len(requests))
    trained = wise.train(
        opened.stack,
        opened.tokenizer,
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
        shard, error = wise.recompress(shard, making.rank)
        shard = wise.measure(opened.stack, opened.tokenizer, shard, held, text.contexts, settings, text.locality)
        report |= {"rank": making.rank, "relative_error": error}
    record = ShardRecord(
        below=below_of(repository, beside, layers_below(opened.architecture, shard.weight)),
        contexts=text.contexts,
        follows=making.follows,
        number=making.number,
        report=report,
        routing=shard.routing,
        training=settings.to_json(),
    )
    return store_shard(repository, shard, record, held, beside)


def measure_again(
    repository: Repository, opened: Opened, beside: frozenset[Element], identity: str, progress: Progress
) -> Patch:
    """The shard of a patch with its threshold measured again on the present main weights, as a new patch.

    Raises:
        RepositoryError: the texts of its requests are withheld.
    """
    patch = repository.patch(identity)
    record = shard_record(patch)
    requests = texts_of(repository, identity)
    settings = _settings(opened.architecture, dict(record.training))
    text = open_wise_text(repository, opened, settings.seed, progress)
    shard = wise.measure(
        opened.stack,
        opened.tokenizer,
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
    repository: Repository, opened: Opened, beside: frozenset[Element], reshape: Reshape, progress: Progress
) -> Patch:
    """The shard that ``reshape`` asks for: continued where it only takes facts in, trained anew where it forgets some.

    Raises:
        RepositoryError: the texts of its facts are withheld.
        EditError: as in `train_shard`.
    """
    texts = reshape.texts(repository)
    held = repository.patch(reshape.shard).requests
    making = made_like(repository, opened.architecture, reshape.shard)
    if making.rank is None and reshape.facts.issuperset(held):
        making = replace(making, kept=tuple(texts[fact] for fact in held))
    kept = {request.id for request in making.kept}
    requests = [request for request in texts.values() if request.id not in kept]
    return train_shard(repository, opened, beside, requests, making, progress)


def made_like(repository: Repository, architecture: Architecture, identity: str) -> Making:
    """How to make a shard anew in the place of a stored one."""
    record = shard_record(repository.patch(identity))
    settings = _settings(architecture, dict(record.training))
    return Making(settings, record.number, identity, rank=record.report.get("rank"))


def store_shard(
    repository: Repository, shard: Shard, record: ShardRecord, requests: Sequence[Request], beside: frozenset[Element]
) -> Patch:
    """Write a shard and its patch; ``beside`` is the set that it was made on."""
    patch = Patch(
        base=repository.config.base_id,
        kind="shard",
        made_on=set_digest(beside),
        method=METHOD,
        metric=None,
        requests=tuple(request.id for request in requests),
        requests_blob=repository.objects.put(requests_json(requests)),
        settings=record.to_json(),
        tensors=repository.objects.put(write_deltas({shard.weight: shard.change})),
        weights={shard.weight: shard.change.shape},
    )
    repository.objects.put(patch.to_json())
    return patch


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
