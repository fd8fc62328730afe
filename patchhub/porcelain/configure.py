"""`config`: the settings of a repository, shown and changed. No torch, no NumPy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from patchhub.errors import SettingsError
from patchhub.porcelain.settings import known_setting, read_setting, refuse_fixed, without_metric
from patchhub.store.config import Config
from patchhub.store.repository import Repository


def config_values(repository: Repository) -> dict[str, Any]:
    """Every setting that differs from its default."""
    values = {"base.path": repository.config.base["path"], **repository.config.settings}
    return dict(sorted(values.items()))


def config_get(repository: Repository, key: str) -> Any:
    """One setting, None where the default holds.

    Raises:
        SettingsError: there is no such key.
    """
    known_setting(key)
    return config_values(repository).get(key)


def config_set(repository: Repository, key: str, text: str) -> Any:
    """Set one key from text; returns the value.

    Raises:
        SettingsError: no such key, or the value cannot be used.
        RepositoryError: facts are recorded with the metric already, so its settings are fixed.
    """
    known_setting(key)
    refuse_fixed(repository, key)
    value = read_setting(key, text)
    if key == "base.path":
        if not Path(value).is_dir():
            raise SettingsError(f"there is no folder {value}", remedy="Give the base model's folder.")
        if not (Path(value) / "config.json").is_file():
            raise SettingsError(
                f"there is no model in {value}: it has no config.json", remedy="Give the base model's folder."
            )
        place = {"path": str(Path(value).resolve()), "revision": None}
        repository.change_config(lambda config: replace(config, base={**config.base, **place}))
    else:
        repository.change_config(
            lambda config: without_metric(key, replace(config, settings={**config.settings, key: value}))
        )
    return value


def config_unset(repository: Repository, key: str) -> None:
    """Go back to the default.

    Raises:
        SettingsError: there is no such key, or it has no default.
        RepositoryError: as in `config_set`.
    """
    known_setting(key)
    if key == "base.path":
        raise SettingsError(
            "base.path has no default: a store is about one base",
            remedy="Say where it is: `patchhub config base.path FOLDER`.",
        )
    refuse_fixed(repository, key)

    def without(config: Config) -> Config:
        kept = {name: value for name, value in config.settings.items() if name != key}
        return without_metric(key, replace(config, settings=kept))

    repository.change_config(without)
