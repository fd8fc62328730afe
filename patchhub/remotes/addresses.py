"""From an address as the user writes it to a remote."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from patchhub.errors import SettingsError
from patchhub.remotes.file import FileRemote
from patchhub.remotes.files import FsspecFiles, LocalFiles
from patchhub.remotes.remote import Remote

HUB: Final = "hf://"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*/[A-Za-z0-9][\w.\-]*", re.ASCII)


def hub_id(address: str) -> str | None:
    """``user/repo`` of a Hub address; None for any other address.

    Raises:
        SettingsError: a Hub address that names no repository.
    """
    if not address.startswith(HUB):
        return None
    name = address[len(HUB) :].rstrip("/")
    if _HUB_ID.fullmatch(name) is None:
        raise SettingsError(f"{address} names no repository of the Hub", remedy="Write hf://user/repo.")
    return name


def normalised(address: str) -> str:
    """The address as it is kept: folders of this machine by their absolute path.

    Raises:
        SettingsError: it is empty, names no repository of the Hub, or has a scheme that nothing here opens.
    """
    if not address:
        raise SettingsError("the address of the remote is empty", remedy="Give a folder or hf://user/repo.")
    if hub_id(address) is not None:
        return address.rstrip("/")
    if "://" in address:
        _check_schemes(address.partition("://")[0])
        return address.rstrip("/")
    return str(Path(address).expanduser().resolve())


def _check_schemes(schemes: str) -> None:
    """Refuse schemes, such as ``s3`` or chained ``simplecache::s3``, that fsspec does not know."""
    import fsspec

    known = fsspec.available_protocols()
    for scheme in schemes.split("::"):
        if scheme not in known:
            raise SettingsError(
                f"no remote can be at {scheme}://",
                remedy=f"Give a folder, hf://user/repo, or an address that begins with one of {', '.join(sorted(known))}.",
                scheme=scheme,
            )


def open_remote(address: str, *, endpoint: str | None = None, token: str | None = None) -> Remote:
    """The remote at ``hf://user/repo``, at an fsspec address, or in a folder; nothing is read yet.

    Args:
        endpoint, token: of the Hub; None: as huggingface_hub finds them.
    """
    name = hub_id(address)
    if name is not None:
        from patchhub.remotes.hub import HubRemote

        return HubRemote(name, endpoint=endpoint, token=token)
    if "://" in address:
        return FileRemote(address, FsspecFiles(address))
    return FileRemote(address, LocalFiles(Path(address)))
