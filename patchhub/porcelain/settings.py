"""`config`: the defaults of a repository, typed and named. No torch, no NumPy."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from patchhub.errors import RepositoryError, SettingsError
from patchhub.store.repository import Repository


@dataclass(frozen=True)
class Setting:
    """One key: how its text is read, and what it is for."""

    read: Callable[[str], Any]
    purpose: str


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise ValueError("it must be above 0")
    return value


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise ValueError("it must not be negative")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError("it must be at least 1")
    return value


def _layers(text: str) -> list[int]:
    """``3,4,5`` or ``3-5``."""
    layers: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        layers += range(int(first), int(last or first) + 1)
    if not layers or layers != sorted(set(layers)):
        raise ValueError("write ascending layers such as 3,4,5 or 3-5")
    return layers


def _method(text: str) -> str:
    if text not in ("memit", "pmet"):
        raise ValueError("the editors are memit and pmet")
    return text


def _of_editor(name: str) -> dict[str, Setting]:
    return {
        f"{name}.clamp": Setting(_positive, "largest change of a value, relative to its norm"),
        f"{name}.kl_factor": Setting(_fraction, "weight of the KL term that keeps the subject's essence"),
        f"{name}.layers": Setting(_layers, "edited layers, such as 3,4,5 or 3-5; default: from the model's depth"),
        f"{name}.learning_rate": Setting(_positive, "Adam step of the value optimisation"),
        f"{name}.nll_factor": Setting(_positive, "weight of the target's likelihood in the loss"),
        f"{name}.ridge": Setting(_positive, "lambda, the weight of what is preserved; default: from the FFN's width"),
        f"{name}.steps": Setting(_count, "most steps of the value optimisation"),
        f"{name}.stop_loss": Setting(_fraction, "a fact is finished below this loss"),
        f"{name}.weight_decay": Setting(_fraction, "weight of the change's norm in the loss"),
    }


SETTINGS: Mapping[str, Setting] = {
    "author": Setting(str, 'who commits, "Ada <ada@example.org>"; default: git\'s identity'),
    "base.path": Setting(str, "where the base model is"),
    **_of_editor("memit"),
    "method": Setting(_method, "default editor"),
    "metric.epsilon": Setting(_fraction, "ridge of the second moments, relative to their mean eigenvalue"),
    "metric.seed": Setting(int, "seed of the text that is sampled from the base"),
    "metric.tokens": Setting(_count, "tokens of text that are sampled from the base"),
    **_of_editor("pmet"),
}


def config_values(repository: Repository) -> dict[str, Any]:
    """Every setting that differs from its default."""
    values = {"base.path": repository.config.base["path"], **repository.config.settings}
    return dict(sorted(values.items()))


def config_get(repository: Repository, key: str) -> Any:
    """One setting, None where the default holds.

    Raises:
        SettingsError: there is no such key.
    """
    _known(key)
    return config_values(repository).get(key)


def config_set(repository: Repository, key: str, text: str) -> Any:
    """Set one key from text; returns the value.

    Raises:
        SettingsError: no such key, or the value cannot be used.
        RepositoryError: the metric was computed already and its settings are fixed.
    """
    setting = _known(key)
    _refuse_fixed(repository, key)
    try:
        value = setting.read(text)
    except ValueError as error:
        raise SettingsError(f"{key} cannot be {text!r}: {error}", remedy=f"{key} is {setting.purpose}.") from None
    config = repository.config
    if key == "base.path":
        if not Path(value).is_dir():
            raise SettingsError(f"there is no folder {value}", remedy="Give the base model's folder.")
        config = replace(config, base={**config.base, "path": str(Path(value).resolve()), "revision": None})
    else:
        config = replace(config, settings={**config.settings, key: value})
    repository.write_config(config)
    return value


def config_unset(repository: Repository, key: str) -> None:
    """Go back to the default."""
    _known(key)
    _refuse_fixed(repository, key)
    kept = {name: value for name, value in repository.config.settings.items() if name != key}
    repository.write_config(replace(repository.config, settings=kept))


def _known(key: str) -> Setting:
    if key not in SETTINGS:
        close = difflib.get_close_matches(key, SETTINGS, n=1)
        hint = f"Did you mean {close[0]}?" if close else f"The settings are {', '.join(SETTINGS)}."
        raise SettingsError(f"there is no setting {key!r}", remedy=hint)
    return SETTINGS[key]


def _refuse_fixed(repository: Repository, key: str) -> None:
    if key.startswith("metric.") and repository.config.recording is not None:
        raise RepositoryError(
            f"{key} is fixed: one repository has one metric, and this one has been computed",
            remedy="Start another repository for another metric.",
        )
