"""Verbs `remote add`, `list`, `remove`: addresses by name, kept in the store's configuration. No torch, no NumPy."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Final

from patchhub.errors import SettingsError
from patchhub.remotes.addresses import normalised
from patchhub.store.repository import Repository
from patchhub.store.revisions import REMOTES

ORIGIN: Final = "origin"

_KEY = "remote."
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


def remotes(repository: Repository) -> dict[str, str]:
    """Address of every remote by name."""
    settings = repository.config.settings
    return {key[len(_KEY) :]: str(value) for key, value in sorted(settings.items()) if key.startswith(_KEY)}


def remote_add(repository: Repository, name: str, address: str) -> str:
    """Give an address a name; returns the address as it is kept.

    Raises:
        SettingsError: a name or an address that cannot be used, or a name that is taken.
    """
    if _NAME.fullmatch(name) is None:
        raise SettingsError(f"{name!r} cannot name a remote", remedy="Use letters, digits, `-` and `_`.")
    if name in remotes(repository):
        raise SettingsError(f"there is a remote {name} already", remedy=f"Remove it: `patchhub remote remove {name}`.")
    kept = normalised(address)
    _change_settings(repository, lambda settings: {**settings, _KEY + name: kept})
    return kept


def remote_remove(repository: Repository, name: str, *, author: str, time: str) -> None:
    """Forget a remote and where its branches were; `SettingsError` if there is none of that name."""
    address_of(repository, name)
    prefix = f"{REMOTES}{name}/"
    gone: dict[str, tuple[str | None, str | None]] = {
        ref: (target, None) for ref, target in repository.refs().items() if ref.startswith(prefix)
    }
    if gone:
        repository.move_refs(gone, command="remote", arguments={"remove": name}, author=author, time=time)
    _change_settings(repository, lambda settings: {k: v for k, v in settings.items() if k != _KEY + name})


def address_of(repository: Repository, name: str) -> str:
    """The address of a remote; `SettingsError` if there is none of that name."""
    known = remotes(repository)
    if name not in known:
        listed = f"The remotes are {', '.join(known)}." if known else "Add one: `patchhub remote add NAME ADDRESS`."
        raise SettingsError(f"there is no remote {name!r}", remedy=listed)
    return known[name]


def default_remote(repository: Repository) -> str:
    """The only remote, or ``origin``."""
    known = remotes(repository)
    return next(iter(known)) if len(known) == 1 else ORIGIN


def _change_settings(repository: Repository, change: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> None:
    repository.change_config(lambda config: replace(config, settings=change(config.settings)))
