"""`metric import` of second moments that a published editor computed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from patchhub.editing.published_moments import read_moment, weight_of
from patchhub.editing.sampling import context_templates
from patchhub.errors import SettingsError
from patchhub.models.architectures import describe, read_config
from patchhub.objects import Metric
from patchhub.porcelain.loading import open_base
from patchhub.porcelain.metric import Shown, editable_weights, refuse_other, show
from patchhub.porcelain.opened import open_model
from patchhub.porcelain.placements import placement_of
from patchhub.porcelain.progress import Progress
from patchhub.porcelain.recording import metric_cache, pin
from patchhub.porcelain.settings import metric_settings
from patchhub.store.repository import Repository


def import_moments(repository: Repository, sources: Sequence[str], progress: Progress) -> Shown:
    """Make a metric from files of second moments and pin it, with the kind and numbers that the repository's settings say.

    One matrix is in memory at a time. Whether the moments are of this base cannot be checked beyond their shape.

    Args:
        sources: ``FILE``, a folder of files, or ``LAYER=FILE`` where the name does not say the weight.

    Raises:
        SettingsError: a file cannot be used, or two are for one weight.
        RepositoryError: facts are recorded with another metric.
    """
    files = _files(repository, sources)
    shapes = repository.config.base["weights"]
    progress.stage("reading moments", 2 * len(files))
    digests, tokens = {}, []
    for weight, path in files.items():
        found = read_moment(path, shapes[weight]["shape"][1])
        digests[weight] = found.digest
        tokens.append(found.tokens)
        progress.advance(1)
    kind, numbers = metric_settings(repository)
    source = {"kind": "imported", "moments": digests}
    metric = Metric(repository.config.base_id, kind, numbers, source, None, min(tokens), None)
    refuse_other(repository, metric)
    cache = metric_cache(repository, metric)
    for weight, path in files.items():
        cache.store(weight, torch.from_numpy(read_moment(path, shapes[weight]["shape"][1]).moment))
        progress.advance(1)
    pinned = repository.config.recording
    if pinned is None or pinned.metric != metric.id:
        pin(repository, metric, _contexts(repository, progress))
    progress.close()
    return show(repository)


def _files(repository: Repository, sources: Sequence[str]) -> dict[str, Path]:
    """The file of each weight, in the order of the layers."""
    weights = editable_weights(repository)
    found: dict[str, Path] = {}
    for source in sources:
        layer, equals, rest = source.partition("=")
        if equals and layer.strip().isdecimal():
            named = {_weight_at(weights, int(layer)): Path(rest)}
        else:
            path = Path(source)
            if not path.exists():
                raise SettingsError(f"there is no {path}", remedy="Name a file, a folder of files, or LAYER=FILE.")
            paths = sorted(path.glob("*.npz")) if path.is_dir() else [path]
            if not paths:
                raise SettingsError(f"there is no .npz file in {path}", remedy="Name the files, or their folder.")
            named = {weight_of(one, weights): one for one in paths}
            if len(named) < len(paths):
                raise _twice(next(one for one in paths if one not in named.values()))
        for weight, one in named.items():
            if weight in found:
                raise _twice(one)
            found[weight] = one
    return {weight: found[weight] for weight in weights if weight in found}


def _weight_at(weights: Sequence[str], layer: int) -> str:
    if layer >= len(weights):
        raise SettingsError(f"there is no layer {layer}", remedy=f"Choose layers from 0 to {len(weights) - 1}.")
    return weights[layer]


def _twice(path: Path) -> SettingsError:
    return SettingsError(f"{path} is the second file for one weight", remedy="Give one file for each weight.")


def _contexts(repository: Repository, progress: Progress) -> tuple[str, ...]:
    checkpoint = open_base(repository)
    progress.stage("loading the base", 0)
    opened = open_model(
        repository, checkpoint, describe(read_config(checkpoint.folder)), [], {}, placement_of(repository)
    )
    return context_templates(opened.stack, opened.tokenizer)
