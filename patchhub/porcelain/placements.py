"""How a repository's verbs put its base into memory: its settings, changed by what the caller says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from patchhub.models.checkpoint import Checkpoint
from patchhub.models.fingerprint import check_tensors
from patchhub.models.placement import Placement, load_base
from patchhub.porcelain.base_check import check_base
from patchhub.porcelain.loading import base_object, not_finite
from patchhub.store.repository import Repository


def placement_of(
    repository: Repository, *, device: str | None = None, dtype: str | None = None, quantization: str | None = None
) -> Placement:
    """The placement that the arguments ask for; where they are None, the repository's settings, then the default rule.

    Raises:
        SettingsError: a value cannot be used.
    """
    given = {"device": device, "dtype": dtype, "quantization": quantization}
    configured = {name: repository.config.settings.get(name) for name in given}
    chosen = {name: value if value is not None else configured[name] for name, value in given.items()}
    return Placement(**{name: value for name, value in chosen.items() if value is not None})


def load_for_editing(
    repository: Repository, checkpoint: Checkpoint, weights: Sequence[str], placement: Placement
) -> Any:
    """The base in memory, checked against the repository's base, the edited weights by their bytes in any case.

    Raises:
        BaseError: the base is changed, not finite, or does not fit.
    """
    check_base(repository, checkpoint)
    check_tensors(base_object(repository), checkpoint, weights)
    model = load_base(checkpoint, placement)
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise not_finite(checkpoint.name, name)
    return model
