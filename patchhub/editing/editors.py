"""The closed-form editors by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from patchhub.editing import memit, pmet
from patchhub.editing.record import Edit, Spread
from patchhub.editing.settings import EditSettings
from patchhub.models.architectures import Architecture


@dataclass(frozen=True)
class Editor:
    """An editor: its default settings for a model, the edit, and how it spreads what is missing over the layers."""

    default_settings: Callable[[Architecture], EditSettings]
    edit: Callable[..., Edit]
    spread: Spread


EDITORS: Mapping[str, Editor] = {
    "memit": Editor(memit.default_settings, memit.edit, memit.EQUAL_SHARES),
    "pmet": Editor(pmet.default_settings, pmet.edit, pmet.ROOT_SHARES),
}
