"""Which settings an edit runs with: the rule, a preset, the metric's kind, the repository's config and the command, later ones first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from patchhub.editing.editors import EDITORS
from patchhub.editing.presets import preset
from patchhub.editing.settings import EditSettings
from patchhub.errors import SettingsError
from patchhub.models.architectures import Architecture
from patchhub.objects import Metric
from patchhub.porcelain.settings import metric_settings, read_setting
from patchhub.store.repository import Repository

_NULL_SPACE_RIDGE = 1.0  # AlphaEdit weighs requests by 1 and the norm of the change by l2


def chosen_settings(
    repository: Repository, method: str, architecture: Architecture, given: Mapping[str, Any]
) -> EditSettings:
    """The settings of a closed-form editor in this repository.

    Args:
        given: values that replace all others, by field of `EditSettings`; ``preset`` names a preset.

    Raises:
        SettingsError: a value cannot be used, or there is no such layer or preset.
    """
    values = {**_configured(repository, method), **given}
    name = values.pop("preset", None)
    settings = EDITORS[method].default_settings(architecture)
    if name is not None:
        settings = preset(str(name), method, architecture).settings
    if _kind(repository) == "null_space":
        settings = replace(settings, ridge=_NULL_SPACE_RIDGE)
    if "layers" in values:
        values["layers"] = tuple(values["layers"])
        for layer in values["layers"]:
            architecture.block(layer)
    return replace(settings, **values)


def read_overrides(texts: Sequence[str], method: str) -> dict[str, Any]:
    """``KEY=VALUE`` texts as settings of one edit; a key is one of the config's, with or without the editor in front.

    Raises:
        SettingsError: not of that form, another editor's key or no key at all, or a value that cannot be used.
    """
    found: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        name = key.strip().removeprefix(f"{method}.")
        if not equals:
            raise SettingsError(f"{text!r} is not KEY=VALUE", remedy="For example --set layers=3-5 or --set ridge=200.")
        found[name] = read_setting(name if name == "preset" else f"{method}.{name}", value.strip())
    return found


def _configured(repository: Repository, method: str) -> dict[str, Any]:
    settings = repository.config.settings
    named = {"preset": settings["preset"]} if "preset" in settings else {}
    prefix = f"{method}."
    return named | {key[len(prefix) :]: value for key, value in settings.items() if key.startswith(prefix)}


def _kind(repository: Repository) -> str:
    """The kind of the metric that is pinned, else of the one that will be."""
    pinned = repository.config.recording
    if pinned is None:
        return metric_settings(repository)[0]
    return Metric.from_json(repository.objects.get(pinned.metric)).kind
