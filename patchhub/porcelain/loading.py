"""The base and its patched states as models: what `load`, `attach`, `ask` and `commit` share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from patchhub.delta import Delta
from patchhub.errors import BaseError, RepositoryError, SettingsError
from patchhub.models.checkpoint import Checkpoint, open_checkpoint
from patchhub.models.fingerprint import check_tensors
from patchhub.objects import Base
from patchhub.porcelain.applied import is_applied, load_applied
from patchhub.porcelain.columns import read_state
from patchhub.porcelain.published import hub_name, open_published
from patchhub.porcelain.routing_state import routing_at
from patchhub.remotes.manifest import NAME as REMOTE
from patchhub.runtime import patched_model
from patchhub.runtime.patched_model import UNROUTED, PatchState, Routing
from patchhub.runtime.ready import ReadyWeights
from patchhub.runtime.routing import Mode
from patchhub.store.repository import DIRECTORY, Repository

SURVIVAL_LIMIT = 0.9  # warn when rounding to the base's type loses more than a tenth of a change


def load(
    path_or_repo: str | Path,
    revision: str = "HEAD",
    *,
    base: str | Path | None = None,
    verify: bool = False,
    wise: Mode | None = None,
    side_path: bool = False,
    **kwargs: Any,
) -> Any:
    """The model at a revision, as an ordinary transformers model; side memories of WISE shards are routed to.

    Args:
        path_or_repo: the folder that holds a store, the store itself, ``user/repo`` on the Hub, or a checkpoint that `apply` wrote of a
            state with shards.
        revision: a branch, tag, commit, ``HEAD~2``, ... ; ``base`` is the unpatched model.
        base: where the base model is, if not where the repository says.
        verify: hash every tensor of the base, not only those that the patch touches.
        wise: keep shards apart and let each query choose ("retrieve"), or join them into one side memory ("merge"). Default: the
            repository's ``wise.mode``, which is "retrieve" unless it was set.
        side_path: leave the weights as they are and run the changes beside them in float32, so that none is lost to rounding.
            A quantised model always does.
        kwargs: passed to ``AutoModelForCausalLM.from_pretrained``: dtype, device_map, quantization_config, ...

    Raises:
        RevisionError: no such revision.
        BaseError: the model found is not the repository's base.
        SettingsError: a checkpoint that `apply` wrote is named, and what only a store can give.
    """
    published = hub_name(path_or_repo)
    if published is not None:
        checkpoint, state = open_published(published, revision, base=base, verify=verify, wise=wise)
        return patched_model.load_patched(checkpoint, state, side_path=side_path, **kwargs)
    if is_applied(Path(path_or_repo)):
        _refuse_choices(path_or_repo, revision, base=base, verify=verify, side_path=side_path)
        return load_applied(Path(path_or_repo), wise, **kwargs)
    with open_path(path_or_repo) as repository:
        state = state_at(repository, revision, wise)
        checkpoint = open_base(repository, base, verify=verify)
        ready = ReadyWeights(repository.cache / "weights", repository.config.base_id, repository.state(state.commit))
        return patched_model.load_patched(
            checkpoint, state, cache=repository.cache, ready=ready, side_path=side_path, **kwargs
        )


def _refuse_choices(folder: str | Path, revision: str, **choices: Any) -> None:
    """Refuse what cannot be chosen for a checkpoint that `apply` wrote: it has one state, on its own weights."""
    given = [*(["revision"] if revision != "HEAD" else []), *(name for name, value in choices.items() if value)]
    if given:
        raise SettingsError(
            f"{folder} was written by apply, and {', '.join(given)} cannot be chosen for it",
            remedy="Leave that out, or load from the repository.",
            given=given,
        )


def attach(
    model: Any,
    path_or_repo: str | Path,
    revision: str = "HEAD",
    *,
    base: str | Path | None = None,
    wise: Mode | None = None,
    side_path: bool = False,
) -> Any:
    """Put a model that is in memory, the base or any patched state of it, into the state of a revision.

    The base's own tensors are kept, so any later `attach` or `detach` is exact. ``wise`` and ``side_path`` are as in `load`; a model that
    has a patch keeps to the way in which that is attached.

    Raises:
        RevisionError, BaseError: as in `load`.
    """
    published = hub_name(path_or_repo)
    if published is not None:
        checkpoint, state = open_published(published, revision, base=base, wise=wise)
        _attach(model, checkpoint, state, side_path=side_path)
        return model
    with open_path(path_or_repo) as repository:
        checkpoint, state = open_base(repository, base), state_at(repository, revision, wise)
        _attach(model, checkpoint, state, side_path=side_path, cache=repository.cache)
    return model


def _attach(
    model: Any, checkpoint: Checkpoint, state: PatchState, *, side_path: bool, cache: Path | None = None
) -> None:
    if patched_model.is_attached(model):
        patched_model.switch(model, checkpoint, state, cache=cache)
    else:
        patched_model.attach(model, checkpoint, state, cache=cache, side_path=side_path)


def open_path(path: str | Path) -> Repository:
    """The store in a folder, or the store itself."""
    folder = Path(path)
    if not folder.is_dir():
        raise RepositoryError(
            f"{path} is not a folder with a patchhub store", remedy="Give the folder in which `patchhub init` was run."
        )
    if (folder / REMOTE).is_file() and not (folder / DIRECTORY).is_dir():
        raise RepositoryError(
            f"{path} is a remote, not a store", remedy=f"Clone it: `patchhub clone {path} FOLDER`.", path=str(path)
        )
    return Repository.open(folder.parent if folder.name == DIRECTORY else folder)


def open_base(repository: Repository, path: str | Path | None = None, *, verify: bool = False) -> Checkpoint:
    """The repository's base model; with ``verify``, every tensor is hashed."""
    known = repository.config.base
    checkpoint = open_checkpoint(path if path is not None else known["path"], None if path else known["revision"])
    if verify:
        check_tensors(base_object(repository), checkpoint, None)
    return checkpoint


def base_object(repository: Repository) -> Base:
    return Base.from_json(repository.objects.get(repository.config.base_id))


class StoredDeltas(Mapping[str, Sequence[Delta]]):
    """The deltas of a commit per weight, read from the store when they are first asked for."""

    def __init__(self, repository: Repository, commit: str | None) -> None:
        self._repository, self._commit = repository, commit
        self._read: dict[str, list[Delta]] | None = None

    @property
    def _deltas(self) -> dict[str, list[Delta]]:
        if self._read is None:
            self._read = read_state(self._repository, self._commit)
        return self._read

    def __getitem__(self, weight: str) -> Sequence[Delta]:
        return self._deltas[weight]

    def __iter__(self) -> Iterator[str]:
        return iter(self._deltas)

    def __len__(self) -> int:
        return len(self._deltas)


def state_at(repository: Repository, revision: str, wise: Mode | None = None) -> PatchState:
    """What is to be attached for a revision: its deltas, which are read on first use, and its side memories."""
    commit = repository.resolve(revision)
    return patch_state(
        repository, StoredDeltas(repository, commit), commit, routing=routing_at(repository, commit, wise)
    )


def main_state_at(repository: Repository, revision: str) -> PatchState:
    """The main weights of a revision, without its side memories."""
    commit = repository.resolve(revision)
    return patch_state(repository, StoredDeltas(repository, commit), commit)


def patch_state(
    repository: Repository,
    deltas: Mapping[str, Sequence[Delta]],
    commit: str | None,
    *,
    routing: Routing = UNROUTED,
) -> PatchState:
    return PatchState(
        base=base_object(repository),
        orientation=repository.config.base["orientation"],
        weights=deltas,
        commit=commit,
        routing=routing,
    )


def not_finite(model: str, tensor: str) -> BaseError:
    """The error that a base has NaN or infinity among its weights."""
    return BaseError(
        f"{model} has values in {tensor} that are not finite (NaN or infinity)",
        remedy="Download or convert the model again.",
        tensor=tensor,
    )
