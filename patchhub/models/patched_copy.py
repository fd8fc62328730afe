"""Writing a checkpoint anew with some tensors replaced; everything else stays byte for byte as it was."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from patchhub.errors import SettingsError
from patchhub.fsio import DISK, os_errors, temporary_path, write_atomically
from patchhub.models.checkpoint import CONFIG, INDEX, Checkpoint

if TYPE_CHECKING:
    from torch import Tensor

Replacement = Callable[["Tensor"], "Tensor"]
"""From the stored tensor to the tensor that takes its place, of the same dtype and shape."""

_OTHER_WEIGHTS: Final = {
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".tflite", ".ot",
}  # fmt: skip
_NOT_COPIED: Final = {
    "README.md",  # the base's model card does not describe the patched model
    "adapter_config.json",  # transformers would put the adapter on that a training left beside the weights
}
_TEMPLATES: Final = "additional_chat_templates"


def write_patched(
    checkpoint: Checkpoint,
    out: Path,
    replace: Mapping[str, Replacement],
    *,
    overwrite: bool = False,
    link: bool = True,
    extra: Mapping[str, bytes] = MappingProxyType({}),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write a copy of a checkpoint in which the named tensors are replaced, as a folder that transformers loads.

    Headers, tensor order, names, dtypes and metadata stay as they are. The folder is filled under a temporary name
    beside ``out`` and renamed at the end, so an interruption leaves no half-written ``out``. One replaced tensor is in
    memory at a time.

    Safetensors files without a replaced tensor are hard links to the base's files where the file system allows it:
    no second copy on disk, but one content under two names. Replacing or deleting such a file harms nothing; a program
    that writes *into* it, as ``save_pretrained`` into the same folder may, changes the base too. ``link=False`` copies
    instead.

    Args:
        checkpoint: the base.
        out: the new folder; an existing one must be empty unless ``overwrite``. A symbolic link stands for what it names.
        replace: by parameter name.
        overwrite: replace an existing folder ``out``, with all that it holds, if it is a model's.
        link: see above.
        extra: files to write beside the checkpoint's, by path relative to ``out``.
        progress: called with bytes done and bytes in all.

    Raises:
        SettingsError: ``out`` is there already, is no model's folder, or is or holds the base.
        BaseError: a name is not in the checkpoint.
        RepositoryError: the disk is full or refuses the write.
    """
    out = Path(os.path.realpath(out))
    refuse_occupied(checkpoint.folder, out, overwrite=overwrite)
    by_tensor = {checkpoint.resolve_name(name): replacement for name, replacement in replace.items()}
    with os_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_path(out)
        temporary.mkdir()
        try:
            _copy_companions(checkpoint.folder, temporary)
            _copy_weights(checkpoint, temporary, by_tensor, link=link, progress=progress)
            for name, data in extra.items():
                (temporary / name).parent.mkdir(parents=True, exist_ok=True)
                write_atomically(temporary / name, (data,))
            DISK.sync_directory(temporary)
            _put_in_place(temporary, out)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def refuse_occupied(base: Path | None, out: Path, *, overwrite: bool) -> None:
    """Refuse a folder that something is in which would be lost.

    Args:
        base: the base's folder, if it is known.

    Raises:
        SettingsError: ``out`` is there already, is no model's folder, or is or holds the base.
    """
    out, home = Path(os.path.realpath(out)), Path(os.path.realpath(os.path.expanduser("~")))
    base = base.resolve() if base is not None else None
    if base is not None and out in (base, *base.parents):
        raise SettingsError(f"{out} is or holds the base itself", remedy="Choose another folder.", out=str(out))
    if out in (home, *home.parents):
        raise SettingsError(f"{out} is or holds the home folder", remedy="Choose another folder.", out=str(out))
    if not out.exists():
        return
    if not out.is_dir():
        raise SettingsError(f"{out} is a file", remedy="Choose a folder that does not exist.", out=str(out))
    if not any(out.iterdir()):
        return
    if not overwrite:
        raise SettingsError(
            f"{out} is not empty", remedy="Choose another folder, or allow replacing it with --overwrite.", out=str(out)
        )
    if not _is_checkpoint(out):
        raise SettingsError(
            f"{out} is not a model's folder, and all that it holds would be lost",
            remedy="Choose a folder that does not exist.",
            out=str(out),
        )


def _is_checkpoint(folder: Path) -> bool:
    """Whether a folder is what `write_patched` or ``save_pretrained`` writes."""
    try:
        config = json.loads((folder / CONFIG).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "model_type" in config


def _copy_companions(source: Path, target: Path) -> None:
    """Configuration, tokenizer, templates, licence: every plain file but weights and the model card."""
    for path in sorted(source.iterdir()):
        foreign_index = path.name.endswith(".index.json") and path.name != INDEX
        hidden = path.name.startswith(".")
        if path.is_file() and not (
            hidden or foreign_index or path.suffix in _OTHER_WEIGHTS or path.name in _NOT_COPIED
        ):
            shutil.copyfile(path, target / path.name)
    if (source / _TEMPLATES).is_dir():
        shutil.copytree(source / _TEMPLATES, target / _TEMPLATES)


def _copy_weights(
    checkpoint: Checkpoint,
    target: Path,
    replace: Mapping[str, Replacement],
    *,
    link: bool,
    progress: Callable[[int, int], None],
) -> None:
    total = sum(file.stat().st_size for file in checkpoint.files)
    done = 0
    for file in checkpoint.files:
        touched = [name for name in replace if checkpoint.tensors[name].file == file]
        copy = target / file.name
        if touched or not (link and _link(file, copy)):
            shutil.copyfile(file, copy)
        if touched:
            _overwrite(checkpoint, copy, {name: replace[name] for name in touched})
        done += file.stat().st_size
        progress(done, total)


def _link(source: Path, target: Path) -> bool:
    """Give the file behind ``source`` (the Hub's cache holds symbolic links) a second name, if that is possible."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        return False
    return True


def _overwrite(checkpoint: Checkpoint, copy: Path, replace: Mapping[str, Replacement]) -> None:
    import torch

    with open(copy, "r+b") as stream:
        for name, replacement in replace.items():
            before = checkpoint.read(name)
            after = replacement(before)
            if after.dtype != before.dtype or after.shape != before.shape:
                raise ValueError(
                    f"{name}: {after.dtype} {tuple(after.shape)} cannot replace {before.dtype} {before.shape}"
                )
            stream.seek(checkpoint.tensors[name].begin)
            stream.write(after.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        stream.flush()
        os.fsync(stream.fileno())


def _put_in_place(temporary: Path, out: Path) -> None:
    if not out.exists():
        DISK.rename(temporary, out)
    else:
        old = temporary_path(out)
        DISK.rename(out, old)
        try:
            DISK.rename(temporary, out)
        except BaseException:
            DISK.rename(old, out)
            raise
        shutil.rmtree(old)
    DISK.sync_directory(out.parent)
