"""Composed weights kept on disk, so that loading a state again costs what loading its base costs.

One file per state, type and kind of device that composed. It is cache: it can be deleted at any time, and it is used only while its
size and time of change are those of the moment it was written. Tensors are memory-mapped, privately, as transformers maps the base's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from patchhub.canonical import canonical_json, object_id
from patchhub.fsio import temporary_path

LIMIT: Final = 4 << 30
"""Bytes that all kept states together may take; the oldest go first."""


@dataclass(frozen=True)
class ReadyWeights:
    """The kept weights of one state.

    Attributes:
        folder: where all states' files are.
        base: id of the base.
        blobs: ids of the delta blobs of the state, in order.
        limit: bytes that all files together may take.
    """

    folder: Path
    base: str
    blobs: tuple[str, ...]
    limit: int = LIMIT

    def open(self, dtype: torch.dtype, device: str) -> dict[str, Tensor] | None:
        """Parameter name -> composed weight; None where they are not kept, or not as they were written.

        Args:
            device: the type of the device that composes them, such as "cuda": libraries round differently.
        """
        file, stamp = self._paths(dtype, device)
        try:
            if json.loads(stamp.read_bytes()) != _stamp(file):
                return None
            return load_file(file)
        except (OSError, ValueError, SafetensorError):
            return None

    def keep(self, dtype: torch.dtype, device: str, weights: Mapping[str, Tensor]) -> None:
        """Write them, if they fit; a failure to write is no error."""
        if not weights or sum(tensor.nbytes for tensor in weights.values()) > self.limit:
            return
        file, stamp = self._paths(dtype, device)
        temporary = temporary_path(file)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            stamp.unlink(missing_ok=True)
            save_file({name: tensor.cpu().contiguous() for name, tensor in weights.items()}, temporary)
            temporary.replace(file)
            stamp.write_text(json.dumps(_stamp(file)))
            self._evict(file)
        except (OSError, SafetensorError):  # safetensors has its own error for a full disk
            with suppress(OSError):
                temporary.unlink(missing_ok=True)

    def _paths(self, dtype: torch.dtype, device: str) -> tuple[Path, Path]:
        """The file and its stamp; the name hashes all that the bits depend on."""
        versions = {"dtype": str(dtype), "device": device, "torch": torch.__version__}
        name = object_id(canonical_json({"base": self.base, "blobs": list(self.blobs), **versions}))
        return self.folder / f"{name}.safetensors", self.folder / f"{name}.json"

    def _evict(self, newest: Path) -> None:
        files = sorted(self.folder.glob("*.safetensors"), key=lambda path: path.stat().st_mtime_ns)
        total = sum(path.stat().st_size for path in files)
        for path in files:
            if total <= self.limit or path == newest:
                break
            total -= path.stat().st_size
            path.with_suffix(".json").unlink(missing_ok=True)
            path.unlink()


def _stamp(file: Path) -> dict[str, Any]:
    status = file.stat()
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns}
