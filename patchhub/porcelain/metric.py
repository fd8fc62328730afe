"""`metric`: what the repository's metric is, making it, and sharing it as one file (docs/format.md).

Second moments that a published editor computed can be imported. Showing reads JSON only: what needs torch is imported where it is used."""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

from patchhub.cache import METRIC
from patchhub.canonical import FORMAT, canonical_json
from patchhub.errors import CorruptStoreError, PatchhubError, RepositoryError, SettingsError
from patchhub.fsio import CHUNK, os_errors, temporary_path
from patchhub.objects import METRIC_MATRICES, Metric
from patchhub.progress import Progress
from patchhub.results import Result
from patchhub.sets.settings import is_metric_used, metric_settings
from patchhub.store.store import Store, refuse_store

if TYPE_CHECKING:
    from patchhub.editing.metric import MetricCache
    from patchhub.models.architectures import Architecture
    from patchhub.models.placement import Placement


@dataclass(frozen=True)
class Shown(Result):
    """What `metric` shows.

    Attributes:
        id: the metric's id; None where none is computed yet, and then only ``kind`` and ``settings`` say what will be.
        kind, settings, source, tokens: those of the metric.
        weights: bytes in the cache per weight that it has something for.
        protected: of a null-space metric, how many of each weight's input directions nothing may be written to.
        used: whether facts are recorded with it, so that it cannot be replaced.
        contexts: how many contexts a request is read in.
    """

    id: str | None
    kind: str
    settings: dict[str, float]
    source: dict[str, Any] | None
    tokens: int | None
    weights: dict[str, int]
    protected: dict[str, int]
    used: bool
    contexts: int


def show(repository: Store) -> Shown:
    """The repository's metric."""
    pinned = repository.config.recording
    used = is_metric_used(repository)
    if pinned is None:
        kind, settings = metric_settings(repository)
        return Shown(None, kind, settings, None, None, {}, {}, used, 0)
    metric = Metric.from_json(repository.objects.get(pinned.metric))
    files = _files_of(repository, metric)
    return Shown(
        metric.id,
        metric.kind,
        {name: float(value) for name, value in metric.settings.items()},
        dict(metric.source),
        metric.tokens,
        {name: path.stat().st_size for name, path in files.items()},
        {name: _columns(repository, name, path) for name, path in files.items() if metric.kind == "null_space"},
        used,
        len(pinned.contexts),
    )


def _files_of(repository: Store, metric: Metric) -> dict[str, Path]:
    """The file in the cache of every weight that it has something for."""
    matrix = METRIC_MATRICES[metric.kind]
    found = {
        weight: repository.cache.slot(METRIC, of=metric.id, weight=weight, matrix=matrix).path()
        for weight in editable_weights(repository)
    }
    return {weight: path for weight, path in found.items() if path is not None}


def _columns(repository: Store, weight: str, path: Path) -> int:
    """Columns of the float32 matrix in a .npy file that has a row for every input of the weight."""
    inner = int(repository.config.base["weights"][weight]["shape"][1])
    return path.stat().st_size // (4 * inner)  # the header is shorter than a column


def compute(
    repository: Store,
    progress: Progress,
    *,
    layers: Sequence[int] = (),
    text: Sequence[Path] = (),
    placement: Placement | None = None,
    memory: int | None = None,
    workers: int | None = None,
    on: str | None = None,
) -> Shown:
    """Compute the metric now, or what it lacks for some layers.

    Before the first commit, text of the user's makes a new metric in place of the one that is there.

    Args:
        layers: for which layers; none: those that the repository's editor writes to.
        text: files to compute it from; none: the base writes it.
        placement: where and in which type the base runs; None: as the repository's config says.
        memory: bytes that sums and factors may take.
        workers, on: how many processes do it, and the Ray cluster that they run on.

    Raises:
        SettingsError: there is no such layer.
        RepositoryError: facts are recorded with a metric of other text.
    """
    from patchhub.editing.metric import MEMORY
    from patchhub.worktree.metric import open_recorder, start_recorder
    from patchhub.worktree.opening import base_files, open_worktree
    from patchhub.worktree.workers import workers_of

    files = base_files(repository)
    chosen = tuple(layers) or edited_layers(repository, files.architecture)
    weights = [files.architecture.ffn_weight(layer) for layer in chosen]
    tree = open_worktree(repository, progress, base=files, placement=placement, edits=weights)
    begin = start_recorder if text and not is_metric_used(repository) else open_recorder
    with workers_of(tree, workers, on, progress) as others:
        options: dict[str, Any] = {"memory": memory or MEMORY, "workers": others}
        begin(repository, tree.stack, tree.tokenizer, chosen, text, progress, **options)
    progress.close()
    return show(repository)


def editable_weights(repository: Store) -> list[str]:
    """Every weight of the base that can be edited, by layer; the config has them in order of text."""
    return sorted(repository.config.base["weights"], key=lambda name: [int(n) for n in re.findall(r"\d+", name)])


def edited_layers(repository: Store, architecture: Architecture) -> tuple[int, ...]:
    """The layers that the repository's closed-form editor writes to."""
    from patchhub.editing.editor import EDITORS
    from patchhub.worktree.recording import chosen_settings

    method = str(repository.config.settings.get("method", "memit"))
    return chosen_settings(repository, method if method in EDITORS else "memit", architecture, {}).layers


def refuse_other(repository: Store, metric: Metric) -> None:
    """Raise if facts are recorded with another metric than this one."""
    pinned = repository.config.recording
    if pinned is not None and pinned.metric != metric.id and is_metric_used(repository):
        raise RepositoryError(
            f"facts of this repository are recorded with metric {pinned.metric[:12]}, and this is {metric.id[:12]}",
            remedy="Start another repository for another metric; columns of two metrics do not mix.",
            metric=metric.id,
        )


def import_any(repository: Store, sources: Sequence[str], progress: Progress) -> Shown:
    """`import_metric` of a file that `export_metric` wrote, else `import_moments`; errors as theirs."""
    if not sources:
        raise SettingsError("there is nothing to import", remedy="Name a file, a folder of files, or LAYER=FILE.")
    for source in sources:
        if "=" not in source and not Path(source).exists():
            raise SettingsError(f"there is no {source}", remedy="Name a file, a folder of files, or LAYER=FILE.")
    if len(sources) == 1 and is_metric_file(Path(sources[0])):
        return import_metric(repository, Path(sources[0]))
    return import_moments(repository, sources, progress)


def import_moments(repository: Store, sources: Sequence[str], progress: Progress) -> Shown:
    """Make a metric from files of second moments and pin it, with the kind and numbers that the repository's settings say.

    One matrix is in memory at a time. Whether the moments are of this base cannot be checked beyond their shape.

    Args:
        sources: ``FILE``, a folder of files, or ``LAYER=FILE`` where the name does not say the weight.

    Raises:
        SettingsError: a file cannot be used, or two are for one weight.
        RepositoryError: facts are recorded with another metric.
    """
    import torch

    from patchhub.editing.metric import read_moment
    from patchhub.worktree.metric import metric_cache, pin

    files = _files(repository, sources)
    shapes = repository.config.base["weights"]
    progress.stage("reading moments", 2 * len(files))
    digests, tokens = {}, []
    for weight, path in files.items():
        if "experts" in shapes[weight]:
            raise SettingsError(
                f"{weight} is the stack of {shapes[weight]['experts']} experts, each with a second moment of its own, and {path} holds one",
                remedy="Leave the files out: the second moments are computed from text. Or write into shared experts.",
                weight=weight,
            )
        found = read_moment(path, shapes[weight]["shape"][1])
        digests[weight] = found.digest
        tokens.append(found.tokens)
        progress.advance(1)
    kind, numbers = metric_settings(repository)
    source = {"kind": "imported", "moments": digests}
    metric = Metric(repository.config.base_id, kind, numbers, source, None, min(tokens), None)
    refuse_other(repository, metric)
    cache = metric_cache(repository, metric)
    for weight, path in files.items():
        cache.store(weight, torch.from_numpy(read_moment(path, shapes[weight]["shape"][1]).moment))
        progress.advance(1)
    pinned = repository.config.recording
    if pinned is None or pinned.metric != metric.id:
        pin(repository, metric, _contexts(repository, progress))
    progress.close()
    return show(repository)


def _files(repository: Store, sources: Sequence[str]) -> dict[str, Path]:
    """The file of each weight, in the order of the layers."""
    from patchhub.editing.metric import weight_of

    weights = editable_weights(repository)
    found: dict[str, Path] = {}
    for source in sources:
        layer, equals, rest = source.partition("=")
        if equals and layer.strip().isdecimal():
            named = {_weight_at(weights, int(layer)): Path(rest)}
        else:
            path = Path(source)
            if not path.exists():
                raise SettingsError(f"there is no {path}", remedy="Name a file, a folder of files, or LAYER=FILE.")
            paths = sorted(path.glob("*.npz")) if path.is_dir() else [path]
            if not paths:
                raise SettingsError(f"there is no .npz file in {path}", remedy="Name the files, or their folder.")
            named = {weight_of(one, weights): one for one in paths}
            if len(named) < len(paths):
                raise _twice(next(one for one in paths if one not in named.values()))
        for weight, one in named.items():
            if weight in found:
                raise _twice(one)
            found[weight] = one
    return {weight: found[weight] for weight in weights if weight in found}


def _weight_at(weights: Sequence[str], layer: int) -> str:
    if layer >= len(weights):
        raise SettingsError(f"there is no layer {layer}", remedy=f"Choose layers from 0 to {len(weights) - 1}.")
    return weights[layer]


def _twice(path: Path) -> SettingsError:
    return SettingsError(f"{path} is the second file for one weight", remedy="Give one file for each weight.")


def _contexts(repository: Store, progress: Progress) -> tuple[str, ...]:
    from patchhub.text.sampling import context_templates
    from patchhub.worktree.opening import open_worktree

    tree = open_worktree(repository, progress, edits=())
    return context_templates(tree.stack, tree.tokenizer)


MANIFEST: Final = "metric.json"
_TEXT: Final = "text.json"
_MOST_MANIFEST: Final = 1 << 20
_ENCRYPTED: Final = 0x1
_EPOCH: Final = (1980, 1, 1, 0, 0, 0)


def is_metric_file(path: Path) -> bool:
    """Whether a file looks like one that `export_metric` wrote."""
    try:
        with zipfile.ZipFile(path) as archive:
            return MANIFEST in archive.namelist()
    except (OSError, zipfile.BadZipFile):
        return False


def export_metric(repository: Store, out: Path, *, overwrite: bool = False) -> str:
    """Write the repository's metric with all that its cache holds; returns the file's SHA-256.

    The same metric gives the same bytes. Matrices are streamed.

    Raises:
        RepositoryError: there is no metric, its cache is empty, or ``out`` exists.
        SettingsError: ``out`` is in a store.
    """
    refuse_store(repository, out)
    pinned = repository.config.recording
    if pinned is None:
        raise RepositoryError("this repository has no metric yet", remedy="Run `patchhub metric compute`.")
    if out.exists() and not overwrite:
        raise RepositoryError(f"{out} exists already", remedy="Choose another file, or --overwrite.")
    from patchhub.worktree.metric import metric_cache

    metric = Metric.from_json(repository.objects.get(pinned.metric))
    cache = metric_cache(repository, metric)
    paths = {cache.name(weight): path for weight, path in _files_of(repository, metric).items()}
    if not paths:
        raise RepositoryError(
            f"the cache holds nothing of metric {metric.id[:12]}", remedy="Run `patchhub metric compute`."
        )
    text = metric.text if metric.text is not None and metric.text in repository.objects else None
    manifest = {
        "contexts": list(pinned.contexts),
        "files": {name: _digest(path) for name, path in paths.items()},
        "format": FORMAT,
        "metric": json.loads(metric.to_json()),
        "type": "metric file",
    }
    temporary = temporary_path(out)
    try:
        with os_errors(out), zipfile.ZipFile(temporary, "x", zipfile.ZIP_STORED) as archive:
            _write(archive, MANIFEST, [canonical_json(manifest)])
            if text is not None:
                _write(archive, _TEXT, [repository.objects.get(text)])
            for name, path in paths.items():
                _write(archive, name, _chunks(path))
        temporary.replace(out)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    return _digest(out)


def import_metric(repository: Store, path: Path) -> Shown:
    """Take a metric and what it was exported with into the repository, and pin it.

    Every member is checked before it counts: its hash, type, shape and that its numbers are finite. The metric's object is the
    identity, so columns that both repositories record merge. Whether the matrices follow from the text that it names is not computed again.

    Raises:
        CorruptStoreError: the file is damaged or not of this format.
        RepositoryError: it cannot be tree, is of another base, or facts are recorded with another metric.
    """
    from patchhub.worktree.metric import metric_cache, pin

    try:
        with _opened(path) as archive:
            metric, contexts, files = _manifest(archive, path)
            if metric.base != repository.config.base_id:
                raise RepositoryError(
                    f"{path} is the metric of base {metric.base[:12]}, and this repository is about "
                    f"{repository.config.base_id[:12]}",
                    remedy="Import it into a repository of that base.",
                    base=metric.base,
                )
            refuse_other(repository, metric)
            cache = metric_cache(repository, metric)
            wanted = {cache.name(weight): weight for weight in editable_weights(repository)}
            for name, digest in files.items():
                if name not in wanted:
                    raise _damaged(path, f"{name} is of no weight of the base")
                _take(archive, path, name, digest, cache, wanted[name], _inner(repository, wanted[name]))
            _take_text(archive, path, repository, metric)
    except (OSError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise _damaged(path, str(error)) from error
    pin(repository, metric, contexts)
    return show(repository)


def _opened(path: Path) -> zipfile.ZipFile:
    """The archive, none of whose members is encrypted."""
    try:
        archive = zipfile.ZipFile(path)
    except OSError as error:
        raise RepositoryError(
            f"{path} cannot be read ({error.strerror})", remedy="Check the path and its permissions.", path=str(path)
        ) from error
    if any(member.flag_bits & _ENCRYPTED for member in archive.infolist()):
        archive.close()
        raise _damaged(path, "it is encrypted")
    return archive


def _manifest(archive: zipfile.ZipFile, path: Path) -> tuple[Metric, tuple[str, ...], Mapping[str, str]]:
    if MANIFEST not in archive.namelist() or archive.getinfo(MANIFEST).file_size > _MOST_MANIFEST:
        raise _damaged(path, f"it has no {MANIFEST}")
    data = archive.read(MANIFEST)
    try:
        value = json.loads(data)
        sound = isinstance(value, dict) and value.keys() == {"contexts", "files", "format", "metric", "type"}
        sound = sound and value["format"] == FORMAT and value["type"] == "metric file" and canonical_json(value) == data
        contexts, files = (value["contexts"], value["files"]) if sound else (None, None)
        if not (_is_texts(contexts) and isinstance(files, dict) and _is_texts(list(files.values()))):
            raise ValueError("its fields are not those of format 1")
        return Metric.from_json(canonical_json(value["metric"])), tuple(contexts or ()), files
    except (ValueError, RecursionError, PatchhubError) as error:
        raise _damaged(path, f"{MANIFEST}: {error}") from None


def _take(
    archive: zipfile.ZipFile, path: Path, name: str, digest: str, cache: MetricCache, weight: str, inner: int
) -> None:
    """Put one matrix into the cache, if its bytes are what the manifest says and a matrix of this weight."""
    if name not in archive.namelist() or archive.getinfo(name).compress_type != zipfile.ZIP_STORED:
        raise _damaged(path, f"{name} is missing or compressed")
    if archive.getinfo(name).file_size > 4 * inner * inner + CHUNK:
        raise _damaged(path, f"{name} is larger than a matrix of this weight")

    def check(received: Path) -> None:
        if _digest(received) != digest:
            raise _damaged(path, f"the bytes of {name} are not those that were exported")
        if not _is_matrix(received, inner):
            raise _damaged(path, f"{name} is not a finite float32 matrix of {inner} rows")

    with archive.open(name) as member:
        cache.put(weight, _read(member), check=check)


def _take_text(archive: zipfile.ZipFile, path: Path, repository: Store, metric: Metric) -> None:
    """Keep the text that the metric was computed from, if the file has it: other layers can be computed from it."""
    if _TEXT not in archive.namelist() or metric.text is None or metric.text in repository.objects:
        return
    member = archive.getinfo(_TEXT)
    if member.compress_type != zipfile.ZIP_STORED or member.file_size > path.stat().st_size:
        raise _damaged(path, f"{_TEXT} is compressed")
    data = archive.read(_TEXT)
    if hashlib.sha256(data).hexdigest() != metric.text:
        raise _damaged(path, f"{_TEXT} is not the text that the metric names")
    repository.objects.put(data)


def _is_matrix(path: Path, inner: int) -> bool:
    import numpy as np

    try:
        matrix = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return False
    if matrix.dtype != np.float32 or matrix.ndim != 2 or len(matrix) != inner or matrix.shape[1] > inner:
        return False
    step = max(1, CHUNK // (4 * max(1, matrix.shape[1])))
    return all(bool(np.isfinite(matrix[start : start + step]).all()) for start in range(0, inner, step))


def _inner(repository: Store, weight: str) -> int:
    return int(repository.config.base["weights"][weight]["shape"][1])


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _write(archive: zipfile.ZipFile, name: str, chunks: Any) -> None:
    with archive.open(zipfile.ZipInfo(name, _EPOCH), "w", force_zip64=True) as member:
        for chunk in chunks:
            member.write(chunk)


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        yield from _read(file)


def _read(file: IO[bytes]) -> Iterator[bytes]:
    while chunk := file.read(CHUNK):
        yield chunk


def _digest(path: Path) -> str:
    found = hashlib.sha256()
    for chunk in _chunks(path):
        found.update(chunk)
    return found.hexdigest()


def _damaged(path: Path, reason: str) -> CorruptStoreError:
    return CorruptStoreError(
        f"{path} cannot be used as a metric file: {reason}", remedy="Export it again.", path=str(path)
    )
