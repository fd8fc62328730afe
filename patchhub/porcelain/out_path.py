"""Where exports may not write: into a store, or over the folder that holds one."""

from __future__ import annotations

import os
from pathlib import Path

from patchhub.errors import SettingsError
from patchhub.store.repository import DIRECTORY, Repository


def refuse_store(repository: Repository, out: Path) -> None:
    """Refuse a file or folder to write that is in a store, is one, or holds one; symbolic links are followed.

    Raises:
        SettingsError: writing or replacing ``out`` would damage a store.
    """
    target, store = Path(os.path.realpath(out)), Path(os.path.realpath(repository.root))
    if store in (target, *target.parents) or DIRECTORY in target.parts:
        what = "is in a patchhub store"
    elif target in store.parents or (target / DIRECTORY).exists():
        what = "holds a patchhub store"
    else:
        return
    raise SettingsError(f"{out} {what}", remedy="Choose a place outside of it, such as a new folder.", out=str(out))
