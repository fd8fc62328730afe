"""The closed-form editors by name."""

from __future__ import annotations

from collections.abc import Mapping

from patchhub.editing.editor import Editor
from patchhub.editing.memit import MEMIT
from patchhub.editing.pmet import PMET

EDITORS: Mapping[str, Editor] = {"memit": MEMIT, "pmet": PMET}
