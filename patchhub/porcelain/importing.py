"""`import`: the change that another program made to the base, as an additive patch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from patchhub.delta import Delta, write_deltas
from patchhub.errors import BaseError, RequestError
from patchhub.export.foreign import form_of, from_difference, is_nothing, read_adapter
from patchhub.export.peft import CONFIG
from patchhub.models.checkpoint import Checkpoint, open_checkpoint
from patchhub.models.fingerprint import tensor_digest
from patchhub.objects import Base, Patch, requests_json
from patchhub.porcelain.columns import weight_shapes
from patchhub.porcelain.judging import GUARDED, Guarding
from patchhub.porcelain.loading import base_object, open_base
from patchhub.porcelain.progress import Progress
from patchhub.porcelain.snapshot import Draft, Stamp, snapshot
from patchhub.porcelain.stopped_merge import refuse_stopped
from patchhub.store.repository import Repository

_MANY_FACTS: Final = 100
"""What a change that does not say how many facts it brings may drift as much as (docs/guard.md)."""
_REMEDY: Final = "Import a smaller change, such as an adapter with a lower lora_alpha, or raise the limit in the config"


@dataclass(frozen=True)
class Imported:
    """What `import` committed: for each weight the form of its change, and what that form leaves out (relative)."""

    commit: str
    patch: str
    weights: Mapping[str, tuple[str, float]]

    def to_json(self) -> dict[str, Any]:
        weights = {weight: {"form": form, "error": error} for weight, (form, error) in self.weights.items()}
        return {"commit": self.commit, "patch": self.patch, "weights": weights}


@dataclass(frozen=True)
class _Change:
    """A change from elsewhere: how it was found, and per weight its delta, the form's name and its relative error."""

    method: str
    deltas: Mapping[str, tuple[Delta, str, float]]


def import_change(
    repository: Repository,
    folder: Path,
    stamp: Stamp,
    progress: Progress,
    *,
    tolerance: float,
    base: str | None = None,
    guarding: Guarding = GUARDED,
) -> Imported:
    """Commit what a LoRA adapter or a fine-tuned checkpoint changes, on top of HEAD.

    Facts that are active keep what they ask for: their columns are solved again on top of what was imported.

    Args:
        folder: holds ``adapter_config.json`` (or one folder below it does), or a checkpoint of the base's architecture.
        tolerance: relative error up to which a difference of checkpoints is taken as low rank.
        base: where the base is, if it moved; needed for checkpoints only.

    Raises:
        RequestError: it is neither, changes what patchhub does not edit, changes nothing, or is active already.
        RepositoryError: a stopped merge waits on HEAD.
        BaseError: the base or the checkpoint cannot be read.
        GuardError: a check of the new state failed; nothing was committed.
    """
    refuse_stopped(repository)
    folder = _holder(folder)
    if (folder / CONFIG).exists():
        found = _from_adapter(folder, repository)
    else:
        found = _from_checkpoint(repository, open_base(repository, base), open_checkpoint(folder), tolerance, progress)
    if not found.deltas:
        raise RequestError(f"{folder} changes nothing", remedy="Give an adapter or a checkpoint that differs.")
    shapes = weight_shapes(repository)
    patch = Patch(
        base=repository.config.base_id,
        kind="additive",
        made_on=None,
        method=found.method,
        metric=None,
        requests=(),
        requests_blob=repository.objects.put(requests_json(())),
        settings={"tolerance": tolerance},
        tensors=repository.objects.put(write_deltas({weight: entry[0] for weight, entry in found.deltas.items()})),
        weights={weight: shapes[weight] for weight in found.deltas},
    )
    identity = repository.objects.put(patch.to_json())
    _, head = repository.head
    active = repository.active(head)
    if patch.elements <= active:
        raise RequestError(f"what {folder} changes is active already", remedy="See `patchhub status`.", patch=identity)
    metric = repository.commit(head).metric if head else None
    draft = Draft((head,) if head else (), active | patch.elements, metric, "import", {"patch": identity})
    progress.stage("writing the commit", 0)
    judge = guarding.judge(repository, progress, facts=_MANY_FACTS, remedy=_REMEDY)
    commit = snapshot(repository, draft, stamp, judge=judge)
    progress.close()
    return Imported(commit, identity, {weight: entry[1:] for weight, entry in found.deltas.items()})


def _holder(folder: Path) -> Path:
    """The folder itself, or the one below it that has an adapter: `export peft` names it after the commit.

    Raises:
        RequestError: there is neither an adapter nor a checkpoint, or several adapters below.
    """
    if (folder / CONFIG).exists() or (folder / "config.json").exists():
        return folder
    below = sorted(path.parent for path in folder.glob(f"*/{CONFIG}"))
    if len(below) == 1:
        return below[0]
    if below:
        raise RequestError(
            f"{folder} holds {len(below)} adapters: {', '.join(path.name for path in below)}",
            remedy="Name one of them.",
        )
    raise RequestError(
        f"{folder} holds neither an adapter ({CONFIG}) nor a checkpoint (config.json)",
        remedy="Give the folder with a PEFT LoRA adapter, or with a fine-tuned checkpoint.",
    )


def _from_adapter(folder: Path, repository: Repository) -> _Change:
    deltas = read_adapter(folder, weight_shapes(repository)).items()
    return _Change("lora", {weight: (delta, form_of(delta), 0.0) for weight, delta in deltas if not is_nothing(delta)})


def _from_checkpoint(
    repository: Repository, base: Checkpoint, other: Checkpoint, tolerance: float, progress: Progress
) -> _Change:
    """The difference of two checkpoints, weight by weight; every other tensor must be the same."""
    shapes = weight_shapes(repository)
    stored = {base.resolve_name(weight): weight for weight in shapes}
    progress.stage("comparing", len(other.tensors))
    differing = _differing(base_object(repository), other, progress.advance)
    foreign = [name for name in differing if name not in stored]
    if foreign:
        noun = "tensor" if len(foreign) == 1 else "tensors"
        raise RequestError(
            f"{other.name} differs from the base in {len(foreign)} {noun} that patchhub does not edit "
            f"({', '.join(foreign[:3])}{', ...' if len(foreign) > 3 else ''})",
            remedy="Only feed-forward output projections can be imported.",
            tensors=foreign,
        )
    transposed = repository.config.base["orientation"] == "in_out"
    progress.stage("decomposing", len(differing))
    deltas = {}
    for name in differing:
        change = (other.read(name).double() - base.read(name).double()).numpy()
        if not bool(np.isfinite(change).all()):
            raise BaseError(f"{name} of {other.name} is not finite", remedy="Use a sound checkpoint.", tensor=name)
        deltas[stored[name]] = from_difference(change.T if transposed else change, tolerance)
        progress.advance(1)
    return _Change("difference", dict(sorted(deltas.items())))


def _differing(base: Base, other: Checkpoint, advance: Callable[[int], None]) -> list[str]:
    """Names of tensors of a checkpoint whose values are not the base's; both must have the same tensors."""
    shapes = {name: entry.shape for name, entry in other.tensors.items()}
    if shapes != {name: record.shape for name, record in base.tensors.items()}:
        raise RequestError(
            f"{other.name} has other tensors or shapes than the base", remedy="Give a checkpoint made from the base."
        )
    found = []
    for name in sorted(shapes):
        if tensor_digest(other, name) != base.tensors[name].sha256:
            found.append(name)
        advance(1)
    return found
