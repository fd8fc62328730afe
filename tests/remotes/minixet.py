"""Xet for minihub through hf_xet's own ``local://`` store: the client writes xorbs and shards into it, we read them."""

from __future__ import annotations

import hashlib
import os
import secrets
import struct
from collections.abc import Iterator
from pathlib import Path

_ROW = 48  # bytes of every record of a shard
_END = b"\xff" * 32


def materialize(folder: Path, sha256: str, blob: Path) -> str | None:
    """Write the file with that SHA-256 to `blob`, if it is not there, from the store in `folder`.

    Returns:
        Its Xet hash; None if the store does not hold it.
    """
    for shard in Path(folder, "xet/xorbs/shards").glob("*.mdb"):
        for xet_hash, size, digest in _files(shard.read_bytes()):
            if digest == sha256:
                if not blob.exists():
                    _rebuild(folder, xet_hash, size, sha256, blob)
                return xet_hash
    return None


def _files(shard: bytes) -> Iterator[tuple[str, int, str]]:
    """(Xet hash, size, SHA-256) of each file of a shard: a header, n segments, perhaps n verifications, its SHA-256."""
    offset = _ROW
    while shard[offset : offset + 32] != _END:
        flags, segments = struct.unpack("<II", shard[offset + 32 : offset + 40])
        begins = range(offset + _ROW, offset + _ROW * (1 + segments), _ROW)
        size = sum(struct.unpack("<I", shard[begin + 36 : begin + 40])[0] for begin in begins)
        xet_hash = _hexadecimal(shard[offset : offset + 32])
        offset += _ROW * (1 + segments * (1 + (flags >> 31 & 1)))
        if flags >> 30 & 1:
            yield xet_hash, size, _hexadecimal(shard[offset : offset + 32])
            offset += _ROW


def _hexadecimal(data: bytes) -> str:
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", data))


def _rebuild(folder: Path, xet_hash: str, size: int, sha256: str, blob: Path) -> None:
    import hf_xet

    temporary = blob.with_name(f"xet-{secrets.token_hex(4)}").absolute()
    with hf_xet.XetSession().new_file_download_group(endpoint=f"local://{folder}") as group:
        group.start_download_file(hf_xet.XetFileInfo(xet_hash, size), str(temporary))
    if hashlib.sha256(temporary.read_bytes()).hexdigest() != sha256:
        raise ValueError(f"the Xet store does not give back {sha256}")
    os.replace(temporary, blob)
