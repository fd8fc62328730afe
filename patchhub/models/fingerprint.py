"""The identity of a base: the architecture fields of its configuration, and the SHA-256 of every tensor's raw bytes.

Digests are kept between runs. A kept digest is valid while the path, size and time of change of its file stay the same."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypedDict

from patchhub.errors import BaseError
from patchhub.fsio import keep
from patchhub.models.checkpoint import Checkpoint, TensorEntry
from patchhub.objects import Base, TensorRecord

FILE_NAME: Final = "tensor-digests.json"

_SETTLED_NS = 2_000_000_000  # a file that changed later than this before it was read may change with the same time


class _FileRecord(TypedDict):
    size: int
    mtime_ns: int
    digests: dict[str, str]


@dataclass(frozen=True)
class Stamps:
    """The content of one cache file. Without a folder nothing is found and nothing is kept.

    The file is cache: whatever cannot be read in it is ignored and written anew.
    """

    folder: Path | None
    records: dict[str, _FileRecord]
    seen: dict[str, _FileRecord] = field(default_factory=dict)  # stamps as they were when first asked for

    @classmethod
    def load(cls, folder: Path | None) -> Stamps:
        """Read the cache file of a folder, if there is one."""
        try:
            records = json.loads((folder / FILE_NAME).read_bytes()) if folder else {}
        except (OSError, ValueError):
            records = {}
        return cls(folder, {path: r for path, r in records.items() if _valid(r)} if isinstance(records, dict) else {})

    def get(self, entry: TensorEntry) -> str | None:
        """The digest of a tensor, if its file is as it was when the digest was made."""
        path = str(entry.file.resolve())
        now = self.seen.setdefault(path, _stamp(entry.file))
        known = self.records.get(path)
        if known is None or not _same(known, now):
            return None
        return known["digests"].get(_place(entry))

    def add(self, entry: TensorEntry, digest: str) -> None:
        """Keep the digest of a tensor that `get` was asked for before it was read."""
        self.seen[str(entry.file.resolve())]["digests"][_place(entry)] = digest

    def save(self) -> None:
        """Write what was added for files that did not change meanwhile and have not changed for two seconds."""
        if self.folder is None or not any(record["digests"] for record in self.seen.values()):
            return
        limit = time.time_ns() - _SETTLED_NS
        merged = dict(self.records)
        for path, record in self.seen.items():
            if record["mtime_ns"] < limit and _same(record, _stamp(Path(path))):
                before = merged.get(path)
                known = before["digests"] if before and _same(before, record) else {}
                merged[path] = {**record, "digests": {**known, **record["digests"]}}
        keep(self.folder / FILE_NAME, [json.dumps(merged, sort_keys=True).encode()])


def _stamp(file: Path) -> _FileRecord:
    status = file.stat()
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "digests": {}}


def _same(one: _FileRecord, other: _FileRecord) -> bool:
    return (one["size"], one["mtime_ns"]) == (other["size"], other["mtime_ns"])


def _place(entry: TensorEntry) -> str:
    return f"{entry.begin}-{entry.end}"


def _valid(record: Any) -> bool:
    match record:
        case {"size": int(), "mtime_ns": int(), "digests": dict(digests), **rest} if not rest:
            return all(isinstance(digest, str) for digest in digests.values())
    return False


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
    cache: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Base:
    """The base object of a checkpoint; its ``id`` is the base's identity. How tensors are spread over files is no part.

    Args:
        checkpoint: the model's files; every byte is read once, unless ``cache`` knows the file.
        cache: a folder to keep digests in, by path, size and time of change; None: read everything.
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
    cache: Path | None = None,
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
    wanted = list(base.tensors) if names is None else [checkpoint.resolve_name(name) for name in names]
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
    wanted: Mapping[str, TensorEntry], cache: Path | None, progress: Callable[[int, int], None]
) -> dict[str, str]:
    """The digest of each wanted tensor: from the cache, or hashed on two threads in the order of the bytes."""
    stamps = Stamps.load(cache)
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
