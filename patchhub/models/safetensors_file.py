"""The header of a safetensors file, read without any tensor library.

A file is 8 bytes of header length (little-endian), the header (JSON: name -> dtype, shape, [begin, end] into the data)
and the data, which the tensors fill without holes.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from patchhub.errors import BaseError

BITS: Final = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    "F4": 4,
}
"""Size of one value of each safetensors dtype."""

_LENGTH_BYTES = 8
_MAX_HEADER = 100_000_000  # as in the safetensors library


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: ``begin`` and ``end`` are absolute offsets in ``file``."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def size(self) -> int:
        """Bytes."""
        return self.end - self.begin


def read_header(file: Path) -> dict[str, TensorEntry]:
    """The tensors of one file by name, in the order of their bytes.

    Raises:
        BaseError: the file is truncated or malformed, or cannot be read.
    """
    try:
        total = file.stat().st_size
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
            if not 2 <= length <= min(_MAX_HEADER, total - _LENGTH_BYTES):
                raise _malformed(file, f"its header would be {length} bytes long")
            header = json.loads(stream.read(length), object_pairs_hook=_unique)
    except OSError as error:
        raise BaseError(
            f"{file} cannot be read ({error.strerror})", remedy="Check the file and its permissions.", file=str(file)
        ) from error
    except (ValueError, RecursionError) as error:
        raise _malformed(file, "its header is not valid JSON") from error
    if not isinstance(header, dict):
        raise _malformed(file, "its header is not a JSON object")
    header.pop("__metadata__", None)
    start = _LENGTH_BYTES + length
    entries = {name: _entry(file, name, fields, start) for name, fields in header.items()}
    ordered = dict(sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)))
    position = start
    for name, entry in ordered.items():
        if entry.begin != position:
            raise _malformed(file, f"the bytes of {name} do not begin where the tensor before ends")
        position = entry.end
    if position != total:
        raise _malformed(file, f"it is {total} bytes long and its header speaks of {position}")
    return ordered


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result


def _entry(file: Path, name: str, fields: Any, start: int) -> TensorEntry:
    match fields:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(begin), int(end)]} if dtype in BITS:
            sizes_valid = all(type(size) is int and size >= 0 for size in shape)
            if sizes_valid and 0 <= begin <= end and (end - begin) * 8 == math.prod(shape) * BITS[dtype]:
                return TensorEntry(file, dtype, tuple(shape), start + begin, start + end)
    raise _malformed(file, f"the entry of {name} does not fit its dtype and shape")


def _malformed(file: Path, reason: str) -> BaseError:
    return BaseError(
        f"{file} is not a whole safetensors file: {reason}",
        remedy="Download or copy the file again.",
        file=str(file),
    )
