"""A base byte for byte: its identity, and a copy of it with some tensors replaced. No tensor is computed here.

The identity is the architecture fields of its configuration, and the SHA-256 of every tensor's raw bytes. Digests are kept between runs; a
kept one is valid while the path, size and time of change of its file stay the same. In a copy everything else stays as it was."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from patchhub.cache import Cache, Kind
from patchhub.errors import BaseError, SettingsError
from patchhub.fsio import DISK, os_errors, temporary_path, write_atomically
from patchhub.models.checkpoint import CONFIG, INDEX, Checkpoint, TensorEntry
from patchhub.objects import Base, TensorRecord

if TYPE_CHECKING:
    from torch import Tensor


KIND: Final = Kind("digests", ".json")

_SETTLED_NS = 2_000_000_000  # a file that changed later than this before it was read may change with the same time


@dataclass(frozen=True)
class _File:
    """A checkpoint's file as it was when it was first asked for, and the digests of its tensors by place: known, and new."""

    path: Path
    size: int
    mtime_ns: int
    known: dict[str, str]
    found: dict[str, str]


class Stamps:
    """The digests that are kept of a checkpoint's files. Without a cache nothing is found and nothing is kept."""

    def __init__(self, cache: Cache | None) -> None:
        self._cache = cache
        self._files: dict[Path, _File] = {}

    def get(self, entry: TensorEntry) -> str | None:
        """The digest of a tensor, if its file is as it was when the digest was made."""
        if entry.file not in self._files:
            path, (size, mtime_ns) = entry.file.resolve(), _stamp(entry.file)
            file = self._files[entry.file] = _File(path, size, mtime_ns, {}, {})
            for kept in self._cache.slot(KIND, **_inputs(file)).contents() if self._cache else ():
                file.known.update(json.loads(kept))
        return self._files[entry.file].known.get(_place(entry))

    def add(self, entry: TensorEntry, digest: str) -> None:
        """Keep the digest of a tensor that `get` was asked for before it was read."""
        self._files[entry.file].found[_place(entry)] = digest

    def save(self) -> None:
        """Write what was added for files that did not change meanwhile and have not changed for two seconds."""
        limit = time.time_ns() - _SETTLED_NS
        for file in self._files.values():
            settled = file.mtime_ns < limit and (file.size, file.mtime_ns) == _stamp(file.path)
            if self._cache and file.found and settled:
                self._cache.slot(KIND, **_inputs(file)).keep([json.dumps(file.found, sort_keys=True).encode()])


def _inputs(file: _File) -> dict[str, Any]:
    return {"path": str(file.path), "size": file.size, "mtime_ns": file.mtime_ns}


def _stamp(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns


def _place(entry: TensorEntry) -> str:
    return f"{entry.begin}-{entry.end}"


VOLATILE_FIELDS: Final = frozenset(
    {
        # where the files came from and who wrote them
        "_commit_hash",
        "_name_or_path",
        "architectures",
        "transformers_version",
        # how it is run; the types of the weights are in the tensors
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_experts_implementation",
        "attn_implementation",
        "dtype",
        "gradient_checkpointing",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "return_dict",
        "torch_dtype",
        "torchscript",
        "use_cache",
        "use_return_dict",
        # labels and tasks of other heads
        "chunk_size_feed_forward",
        "finetuning_task",
        "id2label",
        "label2id",
        "num_labels",
        "prefix",
        "problem_type",
        "summary_activation",
        "summary_first_dropout",
        "summary_proj_to_labels",
        "summary_type",
        "summary_use_proj",
        "task_specific_params",
        "tokenizer_class",
        # how text is generated
        "bad_words_ids",
        "begin_suppress_tokens",
        "bos_token_id",
        "decoder_start_token_id",
        "diversity_penalty",
        "do_sample",
        "early_stopping",
        "encoder_no_repeat_ngram_size",
        "eos_token_id",
        "exponential_decay_length_penalty",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "length_penalty",
        "max_length",
        "max_new_tokens",
        "min_length",
        "no_repeat_ngram_size",
        "num_beam_groups",
        "num_beams",
        "num_return_sequences",
        "output_scores",
        "pad_token_id",
        "remove_invalid_values",
        "repetition_penalty",
        "return_dict_in_generate",
        "sep_token_id",
        "suppress_tokens",
        "temperature",
        "top_k",
        "top_p",
        "typical_p",
    }
)
"""Fields of ``config.json``, at any depth, that do not change what the model computes from token ids."""

_THREADS = 2
_CHUNK = 1 << 23  # large, so that hashing beside Python code seldom waits for the interpreter lock
_OTHER_MODEL = "Point to the model that this repository was made for, or run `patchhub init` elsewhere for this one."


def fingerprint(
    checkpoint: Checkpoint,
    *,
    cache: Cache | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Base:
    """The base object of a checkpoint; its ``id`` is the base's identity. How tensors are spread over files is no part.

    Args:
        checkpoint: the model's files; every byte is read once, unless ``cache`` knows the file.
        cache: where digests are kept by path, size and time of change; None: read everything.
        progress: called with bytes done and bytes in all.
    """
    digests = _digests(checkpoint.tensors, cache, progress)
    tensors = {name: _record(entry, digests[name]) for name, entry in checkpoint.tensors.items()}
    return Base(architecture=_stable(checkpoint.config), tensors=tensors)


def tensor_digest(checkpoint: Checkpoint, name: str) -> str:
    """SHA-256 of the raw bytes of one tensor, by its checkpoint name.

    Raises:
        BaseError: there is no such tensor, or its file became shorter.
    """
    return _hash(checkpoint.entry(name))


def check_tensors(
    base: Base,
    checkpoint: Checkpoint,
    names: Iterable[str] | None,
    *,
    architecture: bool = True,
    cache: Cache | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Check that a checkpoint is the base, as far as the named tensors go.

    Args:
        base: the repository's base.
        checkpoint: the model at hand.
        names: parameter names; None: every tensor of the base.
        architecture: compare the configuration as well, in the fields that both state.
        cache: as in `fingerprint`.
        progress: as in `fingerprint`.

    Raises:
        BaseError: a tensor is missing or differs, or the configurations contradict each other.
    """
    if architecture:
        _check_architecture(base, checkpoint)
    wanted = list(base.tensors) if names is None else [part for name in names for part in checkpoint.parts(name)]
    missing = sorted({name for name in wanted if name not in checkpoint.tensors or name not in base.tensors})
    present = {name: checkpoint.tensors[name] for name in wanted if name not in missing}
    digests = _digests(present, cache, progress)
    differing = sorted(n for n, entry in present.items() if _record(entry, digests[n]) != base.tensors[n])
    if missing or differing:
        raise not_the_base(checkpoint.name, missing=missing, differing=differing)


def not_the_base(model: str, *, missing: Iterable[str] = (), differing: Iterable[str] = ()) -> BaseError:
    """The error that a model is not the repository's base, naming the tensors that show it."""
    missing, differing = list(missing), list(differing)
    parts = [(differing, "differs", "differ"), (missing, "is missing", "are missing")]
    message = " and ".join(
        f"{'1 tensor ' + one if len(names) == 1 else f'{len(names)} tensors {many}'} ({_some(names)})"
        for names, one, many in parts
        if names
    )
    return BaseError(
        f"{model} is not this repository's base: {message}", remedy=_OTHER_MODEL, missing=missing, differing=differing
    )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _record(entry: TensorEntry, digest: str) -> TensorRecord:
    return TensorRecord(entry.dtype, entry.shape, digest)


def _stable(value: Any) -> Any:
    """A configuration without its volatile fields, at any depth."""
    if isinstance(value, Mapping):
        return {key: _stable(item) for key, item in value.items() if key not in VOLATILE_FIELDS}
    return [_stable(item) for item in value] if isinstance(value, list) else value


def _check_architecture(base: Base, checkpoint: Checkpoint) -> None:
    stated = _stable(checkpoint.config)
    shared = base.architecture.keys() & stated.keys()
    fields = sorted(field for field in shared if _contradict(base.architecture[field], stated[field]))
    if fields:
        raise BaseError(
            f"{checkpoint.name} is not this repository's base: its configuration differs in {_some(fields)}",
            remedy=_OTHER_MODEL,
            fields=fields,
        )


def _contradict(one: Any, other: Any) -> bool:
    """Whether two configuration values differ in a field that both state; null states nothing."""
    if one is None or other is None:
        return False
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return any(_contradict(one[field], other[field]) for field in one.keys() & other.keys())
    return bool(one != other)


def _digests(
    wanted: Mapping[str, TensorEntry], cache: Cache | None, progress: Callable[[int, int], None]
) -> dict[str, str]:
    """The digest of each wanted tensor: from the cache, or hashed on two threads in the order of the bytes."""
    stamps = Stamps(cache)
    found = {name: stamps.get(entry) for name, entry in wanted.items()}
    missing = {name: wanted[name] for name, digest in found.items() if digest is None}
    result = {name: digest for name, digest in found.items() if digest is not None}
    total = sum(entry.size for entry in wanted.values())
    done = sum(wanted[name].size for name in result)
    progress(done, total)
    pool = ThreadPoolExecutor(_THREADS)
    try:
        for (name, entry), digest in zip(missing.items(), pool.map(_hash, missing.values()), strict=True):
            result[name] = digest
            stamps.add(entry, digest)
            done += entry.size
            progress(done, total)
    finally:
        pool.shutdown(cancel_futures=True)
    stamps.save()
    return result


def _hash(entry: TensorEntry) -> str:
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(min(_CHUNK, entry.size)))
    left = entry.size
    with open(entry.file, "rb", buffering=0) as stream:
        stream.seek(entry.begin)
        while left:
            count = stream.readinto(buffer[:left])
            if not count:
                raise BaseError(f"{entry.file} became shorter while it was read", remedy="Try again.")
            digest.update(buffer[:count])
            left -= count
    return digest.hexdigest()


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
