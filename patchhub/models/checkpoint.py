"""The files of a base model: a folder of safetensors with its configuration, opened without loading it.

The headers of the safetensors files are read here without any tensor library, because verbs that only compare hashes need none."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from jaxtyping import Float, UInt32

from patchhub.canonical import canonical_json
from patchhub.errors import BaseError, SettingsError

if TYPE_CHECKING:
    import torch


BITS: Final = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    "F4": 4,
}
"""Size of one value of each safetensors dtype."""

FLOATS: Final = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32, "F64": np.float64}
"""How each float dtype lies on disk. NumPy has no bfloat16: its bits are read as integers and widened."""

_LENGTH_BYTES = 8
_MAX_HEADER = 100_000_000  # as in the safetensors library

_EXPERTS = re.compile(r"(?:model\.language_model\.)?(?P<block>.+?\.\d+)\.\w+\.experts\.down_proj")
_INSIDE = re.compile(r"(?:.+\.)?(?P<block>\w+\.\d+)\.\w+\.(?P<rest>.+\.weight)")
_WRAPPED, _UNWRAPPED = "model.language_model.", ("language_model.model.", "model.")


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


def widened(bits: np.ndarray) -> Float[np.ndarray, ...]:
    """bfloat16 as float32, exactly: its bits are the upper half of the float32 of the same value."""
    wide: UInt32[np.ndarray, ...] = bits.astype(np.uint32) << 16
    return wide.view(np.float32)


def read_floats(entry: TensorEntry) -> Float[np.ndarray, ...]:
    """A tensor's values, in its own type, and in float32 where that is bfloat16.

    Raises:
        BaseError: it is of another type than `FLOATS`, or its file became shorter or cannot be read.
    """
    if entry.dtype not in FLOATS:
        raise BaseError(
            f"{entry.file} holds a tensor of type {entry.dtype}", remedy=f"Store it as one of {', '.join(FLOATS)}."
        )
    try:
        raw = np.fromfile(entry.file, FLOATS[entry.dtype], math.prod(entry.shape), offset=entry.begin)
        raw = raw.reshape(entry.shape)
    except (OSError, ValueError) as error:
        raise BaseError(f"{entry.file} cannot be read ({error})", remedy="Download or copy the file again.") from error
    return widened(raw) if entry.dtype == "BF16" else raw


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


CONFIG: Final = "config.json"
SINGLE_FILE: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"

_SMALL_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken"]
_CONVERT = "Load the model once with transformers and write it with save_pretrained(FOLDER), then use that folder."
_TORCH_DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}


@dataclass(frozen=True)
class Checkpoint:
    """A model folder.

    Attributes:
        folder: where the files are.
        name: as the user named it: a path or a Hub id.
        revision: the Hub commit that the files are of, 40 hex digits; None for a local folder.
        config: the content of ``config.json``.
        files: the safetensors files, in the order of their names.
        tensors: every tensor of these files.
    """

    folder: Path
    name: str
    revision: str | None
    config: Mapping[str, Any]
    files: tuple[Path, ...]
    tensors: Mapping[str, TensorEntry]

    def read(self, name: str) -> torch.Tensor:
        """The tensor of a checkpoint name, in its own dtype, on the CPU, in memory of its own.

        Raises:
            BaseError: there is no such tensor, its dtype is unknown to torch, or the file became shorter.
        """
        return read_tensor(self.entry(name))

    def dtype(self, name: str) -> torch.dtype:
        """The torch dtype of a tensor, by its checkpoint name.

        Raises:
            BaseError: there is no such tensor, or torch has no such dtype.
        """
        return _torch_dtype(self.entry(name), name)

    def resolve_name(self, parameter: str) -> str:
        """The checkpoint's name of a model parameter.

        Checkpoints of a bare decoder lack the prefix that the causal language model gives it
        (``h.0.mlp.c_proj.weight`` for ``transformer.h.0.mlp.c_proj.weight``), others have one more. Those of models that see images
        and read text have the text model's under other names than the parameters (``language_model.model.layers`` or
        ``model.layers`` for ``model.language_model.layers``), and some call the feed-forward part of a block otherwise
        (``model.layers.3.block_sparse_moe.down_proj.weight`` for ``model.layers.3.mlp.down_proj.weight``).

        Raises:
            BaseError: no tensor, or more than one, can be meant.
        """
        if parameter in self.tensors:
            return parameter
        found = [n for n in self.tensors if parameter.endswith("." + n) or n.endswith("." + parameter)]
        if not found and parameter.startswith(_WRAPPED):
            found = [
                n for n in (stored + parameter.removeprefix(_WRAPPED) for stored in _UNWRAPPED) if n in self.tensors
            ]
        if not found and (inside := _INSIDE.fullmatch(parameter)):
            other = re.compile(rf"(?:.+\.)?{re.escape(inside['block'])}\.\w+\.{re.escape(inside['rest'])}")
            found = [name for name in self.tensors if other.fullmatch(name)]
        if len(found) != 1:
            raise BaseError(
                f"{self.name} has {len(found) or 'no'} tensors that could be the parameter {parameter}",
                remedy="Use the model that this repository was made for.",
                parameter=parameter,
                candidates=sorted(found),
            )
        return found[0]

    def parts(self, parameter: str) -> tuple[str, ...]:
        """The checkpoint's names of the tensors that hold a model parameter: one, or of stacked experts one of each, in order.

        transformers stacks experts while it loads: ``model.layers.3.mlp.experts.down_proj`` is made from
        ``model.layers.3.block_sparse_moe.experts.0.w2.weight`` and its siblings (Mixtral), from
        ``...mlp.experts.0.down_proj.weight`` (Qwen), or from ``...block_sparse_moe.output_linear.weight``, which is stacked already
        (Granite).

        Raises:
            BaseError: no tensors can be meant, or more than once.
        """
        found = _EXPERTS.fullmatch(parameter)
        if found is None or parameter in self.tensors:
            return (self.resolve_name(parameter),)
        block, inner = re.escape(found["block"]), re.escape(found["block"].removeprefix("model."))
        block = (
            rf"(?:{block}|language_model\.{inner})"  # where a model that sees images is read as a language model alone
        )
        one = re.compile(rf"(?:.+\.)?{block}\.\w+\.(?:output_linear\.weight|experts\.down_proj)")
        each = re.compile(rf"((?:.+\.)?{block}\.\w+\.experts)\.(\d+)\.(?:down_proj|w2)\.weight")
        stacked = [name for name, entry in self.tensors.items() if len(entry.shape) == 3 and one.fullmatch(name)]
        matches = [match for match in map(each.fullmatch, self.tensors) if match]
        series = {int(match[2]): match[0] for match in matches}
        whole = len({match[1] for match in matches}) == 1 and sorted(series) == list(range(len(matches)))
        if len(stacked) + whole != 1:
            return (self.resolve_name(parameter),)
        return tuple(stacked) if stacked else tuple(series[number] for number in range(len(series)))

    def read_parameter(self, parameter: str) -> torch.Tensor:
        """A model parameter as it is stored; experts of tensors of their own are stacked.

        Raises:
            BaseError: as `read` and `parts`.
        """
        import torch

        parts = self.parts(parameter)
        return self.read(parts[0]) if len(parts) == 1 else torch.stack([self.read(part) for part in parts])

    def entry(self, name: str) -> TensorEntry:
        """Where the tensor of a checkpoint name lies.

        Raises:
            BaseError: there is no such tensor.
        """
        if name not in self.tensors:
            raise BaseError(
                f"{self.name} has no tensor {name}",
                remedy="Use the model that this repository was made for.",
                tensor=name,
            )
        return self.tensors[name]


def read_tensor(entry: TensorEntry) -> torch.Tensor:
    """A tensor in its own dtype, on the CPU, in memory of its own.

    Raises:
        BaseError: its dtype is unknown to torch, or the file became shorter or cannot be read.
    """
    import torch

    dtype = _torch_dtype(entry, entry.file.name)
    data = torch.empty(entry.size, dtype=torch.uint8)
    try:
        with open(entry.file, "rb") as stream:
            stream.seek(entry.begin)
            read = stream.readinto(data.numpy().data)
    except OSError as error:
        raise BaseError(
            f"{entry.file} cannot be read ({error.strerror})",
            remedy="Check the file and its disk.",
            file=str(entry.file),
        ) from error
    if read != entry.size:
        raise BaseError(f"{entry.file} became shorter while it was read", remedy="Open it again.", file=str(entry.file))
    return data.view(dtype).reshape(entry.shape)


def _torch_dtype(entry: TensorEntry, name: str) -> torch.dtype:
    import torch

    if entry.dtype not in _TORCH_DTYPES:
        raise BaseError(
            f"tensor {name} has the type {entry.dtype}, which cannot be edited",
            remedy="Use a checkpoint in a float type.",
            tensor=name,
        )
    found: torch.dtype = getattr(torch, _TORCH_DTYPES[entry.dtype])
    return found


def not_finite(model: str, tensor: str) -> BaseError:
    """The error that a base has NaN or infinity among its weights."""
    return BaseError(
        f"{model} has values in {tensor} that are not finite (NaN or infinity)",
        remedy="Download or convert the model again.",
        tensor=tensor,
    )


def open_checkpoint(name: str | Path, revision: str | None = None, *, local: bool = False) -> Checkpoint:
    """Open a local model folder, or download one of the Hugging Face Hub (or take it from its cache).

    Args:
        name: a folder, or a Hub id such as ``openai-community/gpt2``; a folder that exists wins.
        revision: branch, tag or commit on the Hub.
        local: take only what is on this machine.

    Raises:
        BaseError: not found, unreachable, no configuration, no safetensors, or malformed files.
        SettingsError: a revision of a local folder.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise SettingsError(
                f"{folder} is a local folder and has no revision {revision}", remedy="Leave the revision out."
            )
        return _open_folder(folder, str(name), None)
    text = str(name)
    if isinstance(name, Path) or text.startswith(("/", ".", "~")) or text.count("/") > 1 or "\\" in text:
        raise BaseError(
            f"there is no model folder {text}", remedy="Give a folder with config.json and safetensors, or a Hub id."
        )
    downloaded = _download(text, revision, local)
    return _open_folder(downloaded, text, downloaded.name)


def _open_folder(folder: Path, name: str, revision: str | None) -> Checkpoint:
    config = _read_json(folder / CONFIG, missing="it is no transformers model folder")
    files = _weight_files(folder)
    tensors: dict[str, TensorEntry] = {}
    for file in files:
        for tensor, entry in read_header(file).items():
            if tensor in tensors:
                raise BaseError(
                    f"tensor {tensor} is in {tensors[tensor].file.name} and in {file.name}",
                    remedy=_CONVERT,
                    tensor=tensor,
                )
            tensors[tensor] = entry
    if not (folder / SINGLE_FILE).is_file():
        _check_index(folder, tensors)
    return Checkpoint(folder, name, revision, config, files, tensors)


def _weight_files(folder: Path) -> tuple[Path, ...]:
    if (folder / SINGLE_FILE).is_file():
        return (folder / SINGLE_FILE,)
    if not (folder / INDEX).is_file():
        raise BaseError(
            f"{folder} has no weights in safetensors ({SINGLE_FILE} or {INDEX}); other formats, such as pickled .bin "
            "files, are never opened",
            remedy=_CONVERT,
            folder=str(folder),
        )
    return tuple(folder / file for file in sorted(set(_weight_map(folder).values())))


def _weight_map(folder: Path) -> dict[str, str]:
    """Tensor name -> file name, from the index of a sharded checkpoint."""
    mapping = _read_json(folder / INDEX, missing="the index of a sharded checkpoint is missing").get("weight_map")
    if not isinstance(mapping, dict) or not mapping or not all(_is_plain_file_name(f) for f in mapping.values()):
        raise BaseError(f"{folder / INDEX} has no valid weight_map", remedy="Download or copy the file again.")
    return mapping


def _is_plain_file_name(name: Any) -> bool:
    return isinstance(name, str) and name.endswith(".safetensors") and Path(name).name == name and "\\" not in name


def _check_index(folder: Path, tensors: Mapping[str, TensorEntry]) -> None:
    for name, file in _weight_map(folder).items():
        if name not in tensors or tensors[name].file.name != file:
            raise BaseError(
                f"{folder / INDEX} says that tensor {name} is in {file}, which is not so",
                remedy="Download or copy the checkpoint again.",
                tensor=name,
                file=file,
            )


def _read_json(path: Path, *, missing: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
        canonical_json(content)  # refuses numbers that are not finite and text that is not Unicode
    except FileNotFoundError:
        raise BaseError(
            f"there is no {path}: {missing}", remedy="Give a folder written by save_pretrained, or a Hub id."
        ) from None
    except OSError as error:
        raise BaseError(f"{path} cannot be read ({error.strerror})", remedy="Check its permissions.") from error
    except (ValueError, RecursionError) as error:
        raise BaseError(f"{path} is not valid JSON ({error})", remedy="Download or copy the file again.") from error
    if not isinstance(content, dict):
        raise BaseError(f"{path} is not a JSON object", remedy="Download or copy the file again.")
    return content


# --- the Hub --------------------------------------------------------------------------------------------------------


def _download(name: str, revision: str | None, local: bool) -> Path:
    """The snapshot folder of a Hub model: small files first, then exactly the weight files that they name."""
    small = _snapshot(name, revision, _SMALL_FILES, local)
    commit = small.name
    if (small / INDEX).is_file():
        return _snapshot(name, commit, [*_SMALL_FILES, *sorted(set(_weight_map(small).values()))], local)
    return _snapshot(name, commit, [*_SMALL_FILES, SINGLE_FILE], local)


def _snapshot(name: str, revision: str | None, patterns: list[str], local: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    # In this order: a gated repository is a kind of repository that is not found.
    reasons: list[tuple[type[Exception], str, str]] = [
        (GatedRepoError, "needs its owner's permission", "Ask for access on its page, then run `hf auth login`."),
        (RepositoryNotFoundError, "does not exist or is private", "Check the name, or run `hf auth login`."),
        (RevisionNotFoundError, f"has no revision {revision}", "Use a branch, tag or commit that its page lists."),
        (HFValidationError, "is neither a folder nor a valid Hub id", "Give an existing folder or a Hub id."),
        (Exception, "cannot be downloaded and is not in the local cache", "Go online, or give a local folder."),
    ]
    download: Callable[..., str] = snapshot_download
    try:
        return Path(download(name, revision=revision, allow_patterns=patterns, local_files_only=local))
    except Exception as error:
        reason, remedy = next((reason, remedy) for kind, reason, remedy in reasons if isinstance(error, kind))
        raise BaseError(
            f"the model {name} {reason}",
            remedy=remedy,
            model=name,
            revision=revision,
            cause=str(error).partition("\n")[0],
        ) from error
