"""`metric` and `metric compute`: what the repository's metric is, and making it. Showing reads JSON only."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchhub.errors import RepositoryError
from patchhub.objects import Metric
from patchhub.porcelain.progress import Progress
from patchhub.porcelain.settings import is_metric_used, metric_settings
from patchhub.store.repository import Repository

if TYPE_CHECKING:
    from patchhub.models.architectures import Architecture


@dataclass(frozen=True)
class Shown:
    """What `metric` shows.

    Attributes:
        id: the metric's id; None where none is computed yet, and then only ``kind`` and ``settings`` say what will be.
        kind, settings, source, tokens: those of the metric.
        weights: bytes in the cache per weight that it has something for.
        protected: of a null-space metric, how many of each weight's input directions nothing may be written to.
        used: whether facts are recorded with it, so that it cannot be replaced.
        contexts: how many contexts a request is read in.
    """

    id: str | None
    kind: str
    settings: dict[str, float]
    source: dict[str, Any] | None
    tokens: int | None
    weights: dict[str, int]
    protected: dict[str, int]
    used: bool
    contexts: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def show(repository: Repository) -> Shown:
    """The repository's metric."""
    pinned = repository.config.recording
    used = is_metric_used(repository)
    if pinned is None:
        kind, settings = metric_settings(repository)
        return Shown(None, kind, settings, None, None, {}, {}, used, 0)
    metric = Metric.from_json(repository.objects.get(pinned.metric))
    folder = repository.cache / "metric" / metric.id
    files = {name: path for name in editable_weights(repository) for path in folder.glob(f"{name}.*.npy")}
    return Shown(
        metric.id,
        metric.kind,
        {name: float(value) for name, value in metric.settings.items()},
        dict(metric.source),
        metric.tokens,
        {name: path.stat().st_size for name, path in files.items()},
        {name: _columns(repository, name, path) for name, path in files.items() if metric.kind == "null_space"},
        used,
        len(pinned.contexts),
    )


def _columns(repository: Repository, weight: str, path: Path) -> int:
    """Columns of the float32 matrix in a .npy file that has a row for every input of the weight."""
    inner = int(repository.config.base["weights"][weight]["shape"][1])
    return path.stat().st_size // (4 * inner)  # the header is shorter than a column


def compute(
    repository: Repository,
    progress: Progress,
    *,
    layers: Sequence[int] = (),
    text: Sequence[Path] = (),
    memory: int | None = None,
) -> Shown:
    """Compute the metric now, or what it lacks for some layers.

    Before the first commit, text of the user's makes a new metric in place of the one that is there.

    Args:
        layers: for which layers; none: those that the repository's editor writes to.
        text: files to compute it from; none: the base writes it.
        memory: bytes that sums and factors may take.

    Raises:
        SettingsError: there is no such layer.
        RepositoryError: facts are recorded with a metric of other text.
    """
    from patchhub.editing.metric import MEMORY
    from patchhub.models.architectures import describe, read_config
    from patchhub.porcelain.loading import open_base
    from patchhub.porcelain.opened import open_model
    from patchhub.porcelain.placements import placement_of
    from patchhub.porcelain.recording import open_recorder, start_recorder

    checkpoint = open_base(repository)
    architecture = describe(read_config(checkpoint.folder))
    chosen = tuple(layers) or edited_layers(repository, architecture)
    weights = [architecture.ffn_weight(layer) for layer in chosen]
    progress.stage("loading the base", 0)
    opened = open_model(repository, checkpoint, architecture, weights, {}, placement_of(repository))
    begin = start_recorder if text and not is_metric_used(repository) else open_recorder
    begin(repository, opened.stack, opened.tokenizer, chosen, text, progress, memory=memory or MEMORY)
    progress.close()
    return show(repository)


def editable_weights(repository: Repository) -> list[str]:
    """Every weight of the base that can be edited, by layer; the config has them in order of text."""
    return sorted(repository.config.base["weights"], key=lambda name: [int(n) for n in re.findall(r"\d+", name)])


def edited_layers(repository: Repository, architecture: Architecture) -> tuple[int, ...]:
    """The layers that the repository's closed-form editor writes to."""
    from patchhub.editing.editors import EDITORS
    from patchhub.porcelain.edit_settings import chosen_settings

    method = str(repository.config.settings.get("method", "memit"))
    return chosen_settings(repository, method if method in EDITORS else "memit", architecture, {}).layers


def refuse_other(repository: Repository, metric: Metric) -> None:
    """Raise if facts are recorded with another metric than this one."""
    pinned = repository.config.recording
    if pinned is not None and pinned.metric != metric.id and is_metric_used(repository):
        raise RepositoryError(
            f"facts of this repository are recorded with metric {pinned.metric[:12]}, and this is {metric.id[:12]}",
            remedy="Start another repository for another metric; columns of two metrics do not mix.",
            metric=metric.id,
        )
