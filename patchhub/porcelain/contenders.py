"""What `bench` compares, as it is typed. No torch, no NumPy: a wrong name is refused before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from patchhub.errors import SettingsError
from patchhub.porcelain.settings import EDITORS, SETTINGS


@dataclass(frozen=True)
class Contender:
    """An editor with settings of its own, under the name that the user gave it."""

    name: str
    method: str
    settings: Mapping[str, Any]


def contender(text: str) -> Contender:
    """``memit``, or with settings ``pmet:ridge=200:layers=2-4``.

    Raises:
        SettingsError: there is no such editor, or a setting is malformed or unknown.
    """
    method, *parts = text.split(":")
    if method not in EDITORS:
        raise SettingsError(f"there is no editor {method!r}", remedy=f"The editors are {', '.join(EDITORS)}.")
    settings = {}
    for part in parts:
        name, _, value = part.partition("=")
        known = SETTINGS.get(f"{method}.{name}")
        if known is None or not value:
            names = [key.partition(".")[2] for key in SETTINGS if key.startswith(f"{method}.")]
            raise SettingsError(
                f"{text!r}: {part!r} sets nothing of {method}",
                remedy=f"Write {method}:NAME=VALUE with one of {', '.join(names)}.",
            )
        try:
            settings[name] = known.read(value)
        except ValueError as error:
            raise SettingsError(
                f"{text!r}: {name} cannot be {value!r}: {error}", remedy=f"`{name}`: {known.purpose}."
            ) from None
    return Contender(text, method, settings)
