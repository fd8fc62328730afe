"""`bench`: editors compared on one list of facts, each on a branch of its own of a temporary repository."""

from __future__ import annotations

import csv
import io
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from patchhub.editing.editors import EDITORS
from patchhub.editing.requests import Batch, Origin
from patchhub.errors import EditError, SettingsError
from patchhub.evaluation.definitions import BESIDE, DEFINITIONS, LEADING
from patchhub.models.architectures import describe, read_config
from patchhub.objects import Metric, Request
from patchhub.porcelain.contenders import Contender
from patchhub.porcelain.edit import Committed, commit
from patchhub.porcelain.edit_settings import chosen_settings
from patchhub.porcelain.evaluate import Evaluator
from patchhub.porcelain.evaluation_facts import Facts
from patchhub.porcelain.loading import open_base
from patchhub.porcelain.measuring import BASE
from patchhub.porcelain.metric import compute
from patchhub.porcelain.model import init
from patchhub.porcelain.progress import Progress
from patchhub.porcelain.refs import Signature, switch_to_new
from patchhub.porcelain.scores import Score
from patchhub.porcelain.snapshot import Stamp
from patchhub.store.repository import Repository

_SHARED_CACHE: Final = ("metric", "held")
COSTS: Final[Mapping[str, str]] = {
    "held": "share of the facts that were the model's answer (argmax) when they were committed",
    "seconds": "wall time of the commits per fact, without the metric",
    "kB": "bytes that the commits added to the store, per fact, in thousands",
}


@dataclass(frozen=True)
class BenchRow:
    """What one contender reached, and at what cost per fact; the first row is the base's, which costs nothing.

    Attributes:
        scores: empty where its edit was refused, with the reason in `failure`.
        costs: by the names in `COSTS`.
    """

    name: str
    scores: Mapping[str, Score]
    costs: Mapping[str, float]
    failure: str | None = None

    def to_json(self) -> dict[str, Any]:
        scores = {name: score.to_json() for name, score in self.scores.items()}
        return {"name": self.name, "scores": scores, "costs": dict(self.costs), "failure": self.failure}


@dataclass(frozen=True)
class Bench:
    """A comparison: what it was on, and a row per contender below the base's."""

    settings: Mapping[str, Any]
    rows: tuple[BenchRow, ...]

    @property
    def titles(self) -> list[str]:
        """The columns of a table: the leading scores, what is said beside them, drift, fluency and costs."""
        names = (*LEADING[self.settings["metrics"]], *BESIDE, "kl", "fluency")
        return [*(name for name in names if any(name in row.scores for row in self.rows)), *COSTS]

    @property
    def definitions(self) -> dict[str, str]:
        return {title: COSTS.get(title) or DEFINITIONS[title] for title in self.titles}

    def to_json(self) -> dict[str, Any]:
        return {
            "settings": dict(self.settings),
            "rows": [row.to_json() for row in self.rows],
            "definitions": {**{name: DEFINITIONS[name] for row in self.rows for name in row.scores}, **COSTS},
        }


def bench(
    repository: Repository,
    contenders: Sequence[Contender],
    facts: Facts,
    progress: Progress,
    *,
    author: str,
    time: str,
    batch: int | None = None,
    chat: bool | None = None,
) -> Bench:
    """Write the facts with each contender, on the base alone, and evaluate what comes out.

    The repository gives the base, the settings and the metric, and stays as it is; `scratch_repository` makes one from a base alone.
    An edit that fails, or that its method does not do, is a row with the reason; what only the guard would refuse is measured all the
    same.

    Args:
        batch: commit so many facts at a time; None: all at once.
        chat: write and ask the facts in the base's chat form; None: as the repository's config says.

    Raises:
        SettingsError, RequestError, BaseError: as in `commit` and `Evaluator`.
    """
    with _beside(repository, author=author, time=time) as trial:
        _complete_metric(trial, contenders, progress)
        evaluator = Evaluator(trial, facts, progress, chat=chat)
        rows = [BenchRow(BASE, evaluator.evaluate(BASE).scores, {})]
        chosen = evaluator.requests
        for number, one in enumerate(contenders):
            switch_to_new(trial, f"trial-{number}", BASE, Signature(author, time))
            before = _stored(trial)
            try:
                stamp = Stamp(author, time, one.name)
                made = list(_commits(trial, one, chosen, batch or len(chosen), stamp, progress, chat))
                done = evaluator.evaluate("HEAD")
            except (EditError, SettingsError) as error:
                rows.append(BenchRow(one.name, {}, {}, error.message))
                continue
            rows.append(BenchRow(one.name, done.scores, _costs(made, _stored(trial) - before, len(chosen))))
    return Bench({**evaluator.settings, "batch": batch}, tuple(rows))


@contextmanager
def scratch_repository(base: str, progress: Progress, *, author: str, time: str) -> Iterator[Repository]:
    """A repository about a base that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="patchhub-bench-") as name:
        init(Path(name), base, progress, author=author, time=time)
        with Repository.open(Path(name)) as repository:
            yield repository


def bench_csv(found: Bench) -> str:
    """One line per contender, in full precision."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["editor", *found.titles])
    for row in found.rows:
        writer.writerow([row.name, *("" if value is None else value for value in row_values(found, row))])
    return buffer.getvalue()


def row_values(found: Bench, row: BenchRow) -> list[float | None]:
    """The numbers of one row under the comparison's titles."""
    known = {**{name: score.value for name, score in row.scores.items()}, **row.costs}
    return [known.get(title) for title in found.titles]


@contextmanager
def _beside(repository: Repository, *, author: str, time: str) -> Iterator[Repository]:
    """A temporary repository with the same base, settings and metric, and without commits."""
    with tempfile.TemporaryDirectory(prefix="patchhub-bench-") as name:
        config, root = repository.config, Path(name)
        with Repository.init(
            root,
            repository.objects.get(config.base_id),
            base_info=config.base,
            settings=config.settings,
            author=author,
            time=time,
        ) as trial:
            _share_cache(repository, trial)
            if config.recording is not None:
                data = repository.objects.get(config.recording.metric)
                text = Metric.from_json(data).text
                trial.objects.put(data)
                if text is not None and text in repository.objects:
                    trial.objects.put(repository.objects.get(text))
                trial.write_config(config)
            yield trial


def _share_cache(repository: Repository, trial: Repository) -> None:
    """Second moments and held text are the same for the same metric, and dear."""
    trial.cache.mkdir(exist_ok=True)
    for part in _SHARED_CACHE:
        source = (repository.cache / part).resolve()
        source.mkdir(parents=True, exist_ok=True)
        (trial.cache / part).symlink_to(source, target_is_directory=True)


def _complete_metric(trial: Repository, contenders: Sequence[Contender], progress: Progress) -> None:
    """Compute what the editors need of the metric beforehand, so that no one of them pays for it."""
    architecture = describe(read_config(open_base(trial).folder))
    layers = {
        layer
        for one in contenders
        if one.method in EDITORS
        for layer in chosen_settings(trial, one.method, architecture, one.settings).layers
    }
    compute(trial, progress, layers=sorted(layers))


def _commits(
    trial: Repository,
    one: Contender,
    facts: Sequence[Request],
    size: int,
    stamp: Stamp,
    progress: Progress,
    chat: bool | None,
) -> Iterator[Committed]:
    for start in range(0, len(facts), size):
        part = tuple(facts[start : start + size])
        batch = Batch(part, tuple(Origin(one.name) for _ in part), 0)
        yield commit(trial, batch, stamp, progress, method=one.method, settings=one.settings, force=True, chat=chat)


def _costs(made: Sequence[Committed], size: int, facts: int) -> dict[str, float]:
    return {
        "held": sum(done.held for done in made) / facts,
        "seconds": sum(done.seconds for done in made) / facts,
        "kB": size / facts / 1000,
    }


def _stored(repository: Repository) -> int:
    return sum(repository.objects.path(identity).stat().st_size for identity in repository.objects.ids())
