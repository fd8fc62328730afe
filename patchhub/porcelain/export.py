"""Verbs `export peft` and `export diff`, and the pages of a Hub repository. NumPy only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from patchhub.delta import add, compact, norm, read_deltas, write_deltas
from patchhub.errors import RepositoryError, SettingsError
from patchhub.evaluation.definitions import DEFINITIONS
from patchhub.export.peft import (
    CONFIG,
    EXACT,
    WEIGHTS,
    Adapter,
    BaseName,
    adapter_files,
    check_adapter,
    make_adapter,
)
from patchhub.fsio import os_errors, write_atomically
from patchhub.porcelain.columns import read_state, weight_shapes
from patchhub.porcelain.facts import active_requests, distinct
from patchhub.porcelain.progress import Progress
from patchhub.porcelain.scores import notes_of
from patchhub.porcelain.shards import shards_at
from patchhub.remotes.card import AdapterNote, Card, ScoreLine, adapter_name, write_card
from patchhub.store.repository import Repository, refuse_store

TOLERANCE: Final = 1e-3
"""Relative error per weight up to which a recompressed adapter is offered, with the error stated."""


@dataclass(frozen=True)
class Exported:
    """What an export wrote: the folder or file, the commit, and how near it is to the state (relative, the worst weight)."""

    out: Path
    commit: str | None
    rank: int | None
    error: float

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "out": str(self.out)}


def export_peft(
    repository: Repository,
    revision: str,
    out: Path,
    progress: Progress,
    *,
    tolerance: float = EXACT,
    rank: int | None = None,
    overwrite: bool = False,
) -> Exported:
    """Write a PEFT LoRA adapter of a revision into the folder ``out/<name>-<commit>``, read it back and compare.

    Args:
        tolerance: largest relative error of a weight; the default accepts exact adapters only.
        rank: the rank of the adapter; None: the smallest that servers know and that is exact.

    Raises:
        RevisionError: no such revision.
        RepositoryError: the state has no adapter within the tolerance.
        SettingsError: the folder is there already, or in a store.
    """
    commit = repository.resolve(revision)
    progress.stage("decomposing", 0)
    state = read_state(repository, commit)
    adapter = _adapter(repository, commit, tolerance=tolerance, rank=rank)
    files = adapter_files(adapter, _base_name(repository))
    error = check_adapter(files, state, weight_shapes(repository))
    if error > max(tolerance, EXACT):
        raise RepositoryError(
            f"the written adapter differs from the state by {error:.1e}",
            remedy="Report this: it is a bug.",
            error=error,
        )
    folder = out / adapter_name(out.name or "facts", commit or "base")
    refuse_store(repository, folder)
    _write(folder, files, overwrite=overwrite)
    progress.close()
    return Exported(folder, commit, adapter.rank, error)


def export_diff(
    repository: Repository, revision: str, out: Path, progress: Progress, *, overwrite: bool = False
) -> Exported:
    """Write the change of each weight against the base as one safetensors file, in the forms of docs/format.md.

    Raises:
        RevisionError: no such revision.
        RepositoryError: the state has shards.
        SettingsError: the file is there already, or in a store.
    """
    refuse_store(repository, out)
    commit = repository.resolve(revision)
    _refuse_routed(repository, commit, "file of weight changes")
    shapes = weight_shapes(repository)
    progress.stage("adding deltas", 0)
    totals = {weight: add(deltas, shapes[weight]) for weight, deltas in read_state(repository, commit).items()}
    data = write_deltas({weight: compact(total) for weight, total in totals.items()})
    read_deltas(data, shapes)  # what is written can be read
    _write(out.parent, {out.name: data}, overwrite=overwrite)
    progress.close()
    return Exported(out, commit, None, 0.0)


def hub_pages(
    repository: Repository, repo: str, commit: str, progress: Progress, *, withheld: bool
) -> Mapping[str, bytes | None]:
    """What the root of a Hub repository holds beside the store: the card, and the adapter where there can be one."""
    note: AdapterNote | str
    files: dict[str, bytes | None] = {CONFIG: None, WEIGHTS: None}
    try:
        adapter = _adapter(repository, commit, tolerance=TOLERANCE, rank=None)
    except RepositoryError as error:
        note = error.message
        progress.warn(f"no PEFT adapter is pushed: {note}")
    else:
        files |= adapter_files(adapter, _base_name(repository))
        note = AdapterNote(adapter.rank, adapter.error)
        if adapter.error > EXACT:
            progress.warn(f"the PEFT adapter is recompressed; its relative error is {adapter.error:.1e}")
    return {**files, "README.md": write_card(_card(repository, repo, commit, note, withheld=withheld))}


def _adapter(repository: Repository, commit: str | None, *, tolerance: float, rank: int | None) -> Adapter:
    _refuse_routed(repository, commit, "LoRA adapter")
    return make_adapter(read_state(repository, commit), weight_shapes(repository), tolerance=tolerance, rank=rank)


def _refuse_routed(repository: Repository, commit: str | None, what: str) -> None:
    shards = shards_at(repository, commit)
    if shards:
        raise RepositoryError(
            f"this state routes queries to a side memory, which no {what} can do",
            remedy="Load it with patchhub, or write a checkpoint with its side memory beside it: `patchhub apply`.",
            patches=list(shards),
        )


def _card(repository: Repository, repo: str, commit: str, adapter: AdapterNote | str, *, withheld: bool) -> Card:
    found = repository.commit(commit)
    elements = repository.active(commit)
    requests = distinct(active_requests(repository, elements))
    base = _base_name(repository)
    shapes = weight_shapes(repository)
    weights: Mapping[str, Mapping[str, float]] = repository.config.base["weights"]
    totals = {weight: norm(add(deltas, shapes[weight])) for weight, deltas in read_state(repository, commit).items()}
    return Card(
        repo=repo,
        commit=commit,
        message=found.message,
        author=found.author,
        time=found.time,
        base=repository.config.base_id,
        base_model=base.model,
        base_revision=base.revision,
        requests=None if withheld or (elements and not requests) else requests,
        active=repository.active_count(commit),
        methods=sorted({repository.patch(patch).method for patch in {patch for patch, _ in elements}}),
        adapter=adapter,
        changes={weight: total / (weights[weight]["norm"] or 1.0) for weight, total in totals.items()},
        scores=_score_lines(repository, commit),
    )


def _score_lines(repository: Repository, commit: str) -> list[ScoreLine]:
    """What is noted about a commit."""
    return [
        ScoreLine(
            suite=f"{noted.kind}, {noted.facts} facts" if noted.facts else noted.suite,
            name=name,
            value=score.value,
            interval=None if score.low is None or score.high is None else (score.low, score.high),
            base=score.base,
            meaning=DEFINITIONS.get(name, ""),
        )
        for noted in notes_of(repository, commit)
        for name, score in noted.scores.items()
    ]


def _base_name(repository: Repository) -> BaseName:
    base = repository.config.base
    on_hub = base.get("revision") is not None
    return BaseName(
        base["path"] if on_hub else None,
        base["revision"] if on_hub else None,
        fan_in_fan_out=base["orientation"] == "in_out",
    )


def _write(folder: Path, files: Mapping[str, bytes], *, overwrite: bool) -> None:
    there = [name for name in files if (folder / name).exists()]
    if there and not overwrite:
        raise SettingsError(f"{folder / there[0]} is there already", remedy="Choose another place, or --overwrite.")
    with os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        write_atomically(folder / name, (data,))
