"""What other programs made and what they are given: `import`, `export`, `verify-served`. NumPy only; no model runs here.

`import` takes the change that another program made to the base, `export` writes states in other programs' forms, and `verify-served` tells
whether a server answers with a revision's facts.

A server is asked over the OpenAI-compatible interface: vLLM, SGLang, TGI, llama.cpp, Ollama and LM Studio answer `/v1/completions` and
`/v1/chat/completions` alike. A fact counts as said where the greedy continuation of its prompt begins with its target, in a
chat where the answer says it. Facts that the commit was noted not to say are not asked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, Literal

import numpy as np

from patchhub.delta import Delta, add, compact, negative, norm, read_deltas, to_dense, write_deltas
from patchhub.errors import BaseError, RepositoryError, RequestError, SettingsError
from patchhub.evaluation.guard import Report
from patchhub.evaluation.outside import Server, root_of
from patchhub.export import adapters
from patchhub.export.adapters import (
    CONFIG,
    EXACT,
    LORA_IN_VLLM,
    WEIGHTS,
    Adapter,
    BaseName,
    adapter_files,
    check_adapter,
    in_every_layer,
    make_adapter,
)
from patchhub.export.foreign import form_of, from_difference, is_nothing, read_adapter
from patchhub.fsio import os_errors, write_atomically
from patchhub.models.checkpoint import Checkpoint, open_checkpoint, read_floats
from patchhub.models.fingerprint import tensor_digest
from patchhub.objects import Base, Request
from patchhub.porcelain.scores import DEFINITIONS, notes_of
from patchhub.progress import Progress
from patchhub.remotes.hub import AdapterNote, Card, ScoreLine, adapter_name, write_card
from patchhub.results import Result, told
from patchhub.sets.columns import (
    flat_weights,
    linear_shapes,
    read_state,
    stacked_weights,
    tensor_shapes,
    turned_weights,
    weight_shapes,
)
from patchhub.sets.commits import Draft, begin, prepare, record, store_patch
from patchhub.sets.elements import active_requests, distinct
from patchhub.sets.guard import base_norms
from patchhub.sets.shards import shards_at
from patchhub.store.store import Store, refuse_store
from patchhub.who import Who
from patchhub.worktree.judging import GUARDED, Guarding, judge

_MANY_FACTS: Final = 100
"""What a change that does not say how many facts it brings may drift as much as (docs/guard.md)."""
_REMEDY: Final = "Import a smaller change, such as an adapter with a lower lora_alpha, or raise the limit in the config"


def _named(weights: Mapping[str, tuple[str, float]]) -> dict[str, dict[str, Any]]:
    return {weight: {"form": form, "error": error} for weight, (form, error) in weights.items()}


@dataclass(frozen=True)
class Imported(Result):
    """What `import` committed: for each weight the form of its change, and what that form leaves out (relative)."""

    commit: str
    patch: str
    weights: Mapping[str, tuple[str, float]] = field(metadata=told(by=_named))


@dataclass(frozen=True)
class _Change:
    """A change from elsewhere: how it was found, and per weight its delta, the form's name and its relative error."""

    method: str
    deltas: Mapping[str, tuple[Delta, str, float]]


def import_change(
    repository: Store,
    folder: Path,
    who: Who,
    progress: Progress,
    *,
    tolerance: float,
    base: str | None = None,
    guarding: Guarding = GUARDED,
) -> Imported:
    """Commit what a LoRA adapter or a fine-tuned checkpoint changes, on top of HEAD.

    Facts that are active keep what they ask for: their columns are solved again on top of what was imported.

    Args:
        folder: holds ``adapter_config.json`` (or one folder below it does), or a checkpoint of the base's architecture.
        tolerance: relative error up to which a difference of checkpoints is taken as low rank.
        base: where the base is, if it moved; needed for checkpoints only.

    Raises:
        RequestError: it is neither, changes what patchhub does not edit, changes nothing, or is active already.
        RepositoryError: a stopped merge waits on HEAD.
        BaseError: the base or the checkpoint cannot be read.
        GuardError: a check of the new state failed; nothing was committed.
    """
    head = begin(repository)
    folder = _holder(folder)
    if (folder / CONFIG).exists():
        found = _from_adapter(folder, repository, base)
    else:
        from patchhub.worktree.opening import open_base

        found = _from_checkpoint(repository, open_base(repository, base), open_checkpoint(folder), tolerance, progress)
    if not found.deltas:
        raise RequestError(f"{folder} changes nothing", remedy="Give an adapter or a checkpoint that differs.")
    _refuse_large(folder, found.deltas)
    shapes = tensor_shapes(repository)
    patch = store_patch(
        repository,
        kind="additive",
        method=found.method,
        requests=(),
        settings={"tolerance": tolerance},
        tensors=write_deltas({weight: entry[0] for weight, entry in found.deltas.items()}),
        weights={weight: shapes[weight] for weight in found.deltas},
        below=None,
    )
    identity = patch.id
    active = repository.active(head)
    if patch.elements <= active:
        raise RequestError(f"what {folder} changes is active already", remedy="See `patchhub status`.", patch=identity)
    metric = repository.commit(head).metric if head else None
    draft = Draft((head,) if head else (), active | patch.elements, metric, "import", {"patch": identity})
    progress.stage("writing the commit", 0)
    commit = prepare(repository, draft, who)
    commit = judge(repository, commit, progress, guarding, facts=_MANY_FACTS, remedy=_REMEDY)
    written = record(repository, commit, draft, who.signer)
    progress.close()
    return Imported(written, identity, {weight: entry[1:] for weight, entry in found.deltas.items()})


def _holder(folder: Path) -> Path:
    """The folder itself, or the one below it that has an adapter: `export peft` names it after the commit.

    Raises:
        RequestError: there is neither an adapter nor a checkpoint, or several adapters below.
    """
    if (folder / CONFIG).exists() or (folder / "config.json").exists():
        return folder
    below = sorted(path.parent for path in folder.glob(f"*/{CONFIG}"))
    if len(below) == 1:
        return below[0]
    if below:
        raise RequestError(
            f"{folder} holds {len(below)} adapters: {', '.join(path.name for path in below)}",
            remedy="Name one of them.",
        )
    raise RequestError(
        f"{folder} holds neither an adapter ({CONFIG}) nor a checkpoint (config.json)",
        remedy="Give the folder with a PEFT LoRA adapter, or with a fine-tuned checkpoint.",
    )


LARGEST: Final = 4 << 30
"""Bytes of the changes that an import may bring (docs/hub.md): every one of them is kept, pushed and solved against."""


def _refuse_large(folder: Path, deltas: Mapping[str, tuple[Delta, str, float]]) -> None:
    size = sum(
        found.nbytes for delta, _, _ in deltas.values() for found in vars(delta).values() if hasattr(found, "nbytes")
    )
    if size > LARGEST:
        raise RequestError(
            f"what {folder} changes takes {size / 1e9:.1f} GB, and an import may take {LARGEST / 1e9:.1f}",
            remedy="Make a store of that model itself: `patchhub init`.",
            bytes=size,
        )


def _from_adapter(folder: Path, repository: Store, base: str | None) -> _Change:
    """What an adapter changes; the base's own values are read only where the adapter has whole tensors in their place."""

    def of_base(weight: str) -> np.ndarray:
        from patchhub.worktree.opening import open_base

        files = open_base(repository, base)
        return read_floats(files.entry(files.resolve_name(weight)))

    tied = repository.base.architecture.get("tie_word_embeddings")
    transposed = repository.config.base["orientation"] == "in_out"
    found = read_adapter(folder, tensor_shapes(repository), of_base, tied=tied, transposed=transposed)
    kept = {weight: (delta, form_of(delta), 0.0) for weight, delta in found.items() if not is_nothing(delta)}
    return _Change("lora", kept)


def _from_checkpoint(
    repository: Store, base: Checkpoint, other: Checkpoint, tolerance: float, progress: Progress
) -> _Change:
    """The difference of two checkpoints, weight by weight; every other tensor must be the same."""
    shapes = tensor_shapes(repository)
    stored = {base.resolve_name(weight): weight for weight in shapes}
    progress.stage("comparing", len(other.tensors))
    differing = _differing(repository.base, base, other, progress.advance)
    foreign = [name for name in differing if name not in stored]
    if foreign:
        noun = "tensor" if len(foreign) == 1 else "tensors"
        raise RequestError(
            f"{other.name} differs from the base in {len(foreign)} {noun} that patchhub does not edit "
            f"({', '.join(foreign[:3])}{', ...' if len(foreign) > 3 else ''})",
            remedy="Of models that store weights (out, in) under their parameters' names any matrix and vector can be imported, of others "
            "only linear weights of the blocks.",
            tensors=foreign,
        )
    transposed = repository.config.base["orientation"] == "in_out"
    progress.stage("decomposing", len(differing))
    deltas = {}
    for name in differing:
        change = (other.read(name).double() - base.read(name).double()).numpy()
        if not bool(np.isfinite(change).all()):
            raise BaseError(f"{name} of {other.name} is not finite", remedy="Use a sound checkpoint.", tensor=name)
        change = change[:, None] if change.ndim == 1 else change.T if transposed else change
        deltas[stored[name]] = from_difference(change, tolerance)
        progress.advance(1)
    return _Change("difference", dict(sorted(deltas.items())))


def _differing(base: Base, files: Checkpoint, other: Checkpoint, advance: Callable[[int], None]) -> list[str]:
    """Names of tensors of a checkpoint whose values are not the base's; both must have the same tensors.

    A tensor of another type than the base's is the same where it holds the base's values rounded to that type.
    """
    shapes = {name: entry.shape for name, entry in other.tensors.items()}
    if shapes != {name: record.shape for name, record in base.tensors.items()}:
        raise RequestError(
            f"{other.name} has other tensors or shapes than the base", remedy="Give a checkpoint made from the base."
        )
    found = []
    for name in sorted(shapes):
        if other.tensors[name].dtype == base.tensors[name].dtype:
            same = tensor_digest(other, name) == base.tensors[name].sha256
        else:
            tensor = other.read(name)
            same = bool((tensor == files.read(name).to(tensor.dtype)).all())
        if not same:
            found.append(name)
        advance(1)
    return found


TOLERANCE: Final = 1e-3
"""Relative error per weight up to which a recompressed adapter is offered, with the error stated."""


@dataclass(frozen=True)
class Exported(Result):
    """What an export wrote: the folder or file, the commit, and how near it is to the state (relative, the worst weight)."""

    out: Path
    commit: str | None
    rank: int | None
    error: float


def export_peft(
    repository: Store,
    revision: str,
    out: Path,
    progress: Progress,
    *,
    tolerance: float = EXACT,
    rank: int | None = None,
    every_layer: bool = False,
    overwrite: bool = False,
) -> Exported:
    """Write a PEFT LoRA adapter of a revision into the folder ``out/<name>-<commit>``, read it back and compare.

    Args:
        tolerance: largest relative error of a weight; the default accepts exact adapters only.
        rank: the rank of the adapter; None: the smallest that servers know and that is exact.
        every_layer: hold factors of zeros for the layers that do not change.

    Raises:
        RevisionError: no such revision.
        RepositoryError: the state has no adapter within the tolerance.
        SettingsError: the folder is there already, or in a store.
    """
    commit = repository.resolve(revision)
    progress.stage("decomposing", 0)
    state = read_state(repository, commit)
    adapter = _adapter(repository, commit, tolerance=tolerance, rank=rank)
    if every_layer:
        adapter = in_every_layer(adapter, weight_shapes(repository))
    files = adapter_files(adapter, _base_name(repository))
    error = check_adapter(files, state, linear_shapes(repository), turned_weights(repository))
    if error > max(tolerance, EXACT):
        raise RepositoryError(
            f"the written adapter differs from the state by {error:.1e}",
            remedy="Report this: it is a bug.",
            error=error,
        )
    if adapter.factors.keys() & stacked_weights(repository).keys():
        progress.warn(
            "this adapter changes routed experts (target_parameters): PEFT loads it, but servers were seen to leave such adapters "
            "out without a word; ask the server for a changed fact, or serve what `patchhub apply` writes"
        )
    folder = out / adapter_name(out.name or "facts", commit or "base")
    refuse_store(repository, folder)
    _write(folder, files, overwrite=overwrite)
    progress.close()
    return Exported(folder, commit, adapter.rank, error)


def export_gguf(
    repository: Store,
    revision: str,
    out: Path,
    progress: Progress,
    *,
    tolerance: float = EXACT,
    rank: int | None = None,
    fuse: Path | None = None,
    overwrite: bool = False,
) -> Exported:
    """Write an adapter as llama.cpp and Ollama read one, ``out/<name>-<commit>.gguf`` and a Modelfile; read it back and compare.

    Args:
        fuse: a GGUF file of the base: write the whole model instead, with all of that file but the weights that change.

    Raises:
        RevisionError: no such revision.
        RepositoryError: the state has no adapter within the tolerance.
        SettingsError: the extra that writes it is missing, llama.cpp does not know the architecture or a weight, or a file is there.
        BaseError: ``fuse`` is no GGUF of the base.
    """
    refuse_store(repository, out)
    commit = repository.resolve(revision)
    name = f"{adapter_name(out.name or 'facts', commit or 'base')}.gguf"
    _refuse_present(out, (name, "Modelfile"), overwrite=overwrite)
    if fuse is not None:
        return _fused(repository, commit, fuse, out / name, progress)
    state, base = read_state(repository, commit), repository.config.base
    adapter = _adapter(repository, commit, tolerance=tolerance, rank=rank)
    model_type, layers, named = base["model_type"], len(base["weights"]), _base_name(repository).model
    with TemporaryDirectory(prefix="patchhub-gguf-") as folder:
        adapters.write_gguf(adapter, model_type, layers, Path(folder) / name, base=named)
        data = (Path(folder) / name).read_bytes()
        there, shapes = adapters.read_gguf(Path(folder) / name), linear_shapes(repository)
    errors = [1.0]
    for weight, called in adapters.names_in_llama_cpp(adapter.factors, model_type, layers).items():
        total = add(state[weight], shapes[weight])
        errors.append(norm(add([there[called], negative(total)], shapes[weight])) / norm(total))
    error = max(errors[1:])
    if error > max(tolerance, EXACT):
        raise RepositoryError(
            f"the written file differs from the state by {error:.1e}", remedy="Report this: it is a bug."
        )
    _write(out, {name: data, "Modelfile": adapters.modelfile(named, name).encode()}, overwrite=overwrite)
    return Exported(out / name, commit, adapter.rank, error)


def _fused(repository: Store, commit: str | None, base: Path, out: Path, progress: Progress) -> Exported:
    """Write a GGUF of the base with the change of a commit fused in, and a Modelfile of it."""
    from patchhub.worktree.opening import open_checked

    _refuse_routed(repository, commit, "GGUF file")
    _refuse_beyond(repository, commit, "GGUF file")
    known, shapes, state = repository.config.base, linear_shapes(repository), read_state(repository, commit)
    names = adapters.names_in_llama_cpp(state, known["model_type"], len(known["weights"]))
    files = open_checked(repository) if state else None
    changed = {}
    for weight, deltas in state.items():
        assert files is not None
        stored = read_floats(files.entry(files.resolve_name(weight))).astype(np.float32)
        old = stored.T if known["orientation"] == "in_out" else stored
        changed[names[weight]] = (old, old + to_dense(add(deltas, shapes[weight])))
    with os_errors(out.parent):
        out.parent.mkdir(parents=True, exist_ok=True)
        progress.stage("writing", base.stat().st_size if base.is_file() else 0)
    layers = len(known["weights"])
    error = adapters.fuse_gguf(base, out, changed, known["model_type"], layers, progress.advance)
    progress.close()
    write_atomically(out.with_name("Modelfile"), (adapters.modelfile(out.name, None).encode(),))
    return Exported(out, commit, None, error)


def export_diff(
    repository: Store, revision: str, out: Path, progress: Progress, *, overwrite: bool = False
) -> Exported:
    """Write the change of each weight against the base as one safetensors file, in the forms of docs/format.md.

    Raises:
        RevisionError: no such revision.
        RepositoryError: the state has shards.
        SettingsError: the file is there already, or in a store.
    """
    refuse_store(repository, out)
    commit = repository.resolve(revision)
    _refuse_routed(repository, commit, "file of weight changes")
    shapes = tensor_shapes(repository)
    progress.stage("adding deltas", 0)
    totals = {weight: add(deltas, shapes[weight]) for weight, deltas in read_state(repository, commit).items()}
    data = write_deltas({weight: compact(total) for weight, total in totals.items()})
    read_deltas(data, shapes)  # what is written can be read
    _write(out.parent, {out.name: data}, overwrite=overwrite)
    progress.close()
    return Exported(out, commit, None, 0.0)


def hub_pages(
    repository: Store, repo: str, commit: str, progress: Progress, *, withheld: bool
) -> Mapping[str, bytes | None]:
    """What the root of a Hub repository holds beside the store: the card, and the adapter where there can be one."""
    note: AdapterNote | str
    files: dict[str, bytes | None] = {CONFIG: None, WEIGHTS: None}
    try:
        adapter = _adapter(repository, commit, tolerance=TOLERANCE, rank=None)
    except RepositoryError as error:
        note = error.message
        progress.warn(f"no PEFT adapter is pushed: {note}")
    else:
        model_type, dense = repository.config.base["model_type"], not stacked_weights(repository)
        written = _for_servers(adapter, weight_shapes(repository)) if dense else adapter
        files |= adapter_files(written, _base_name(repository))
        note = AdapterNote(
            adapter.rank,
            adapter.error,
            every_layer=written.factors.keys() >= weight_shapes(repository).keys(),
            vllm=dense and model_type in LORA_IN_VLLM,
            llama_cpp=adapters.known_to_llama_cpp(model_type)
            and adapter.factors.keys() <= weight_shapes(repository).keys(),
        )
        if adapter.error > EXACT:
            progress.warn(f"the PEFT adapter is recompressed; its relative error is {adapter.error:.1e}")
    return {**files, "README.md": write_card(_card(repository, repo, commit, note, withheld=withheld))}


_ZEROS: Final = 16 << 20
"""Bytes of zero factors up to which a pushed adapter has every layer: a download of seconds, so that no server leaves it out."""


def _for_servers(adapter: Adapter, shapes: Mapping[str, tuple[int, int]]) -> Adapter:
    """The adapter with factors in every layer, unless their zeros would be more than `_ZEROS`."""
    zeros = sum(4 * adapter.rank * sum(shape) for weight, shape in shapes.items() if weight not in adapter.factors)
    return in_every_layer(adapter, shapes) if zeros <= _ZEROS else adapter


def _adapter(repository: Store, commit: str | None, *, tolerance: float, rank: int | None) -> Adapter:
    _refuse_routed(repository, commit, "LoRA adapter")
    _refuse_beyond(repository, commit, "LoRA adapter")
    _refuse_flat(repository, commit)
    return make_adapter(read_state(repository, commit), linear_shapes(repository), tolerance=tolerance, rank=rank)


def _refuse_beyond(repository: Store, commit: str | None, what: str) -> None:
    beyond = sorted(read_state(repository, commit).keys() - {*linear_shapes(repository)})
    if beyond:
        raise RepositoryError(
            f"this state changes {beyond[0]}{f' and {len(beyond) - 1} more' if beyond[1:] else ''}, and no {what} holds more than linear "
            "weights of the blocks",
            remedy="Write a checkpoint: `patchhub apply`.",
            weights=beyond,
        )


def _refuse_flat(repository: Store, commit: str | None) -> None:
    flat = sorted(read_state(repository, commit).keys() & flat_weights(repository))
    if flat:
        raise RepositoryError(
            f"{flat[0]} holds its experts one below the other in a matrix that their module reads by itself, and PEFT, which wraps what "
            "holds the matrix, has no adapter that such a module runs with",
            remedy="Write a checkpoint: `patchhub apply`.",
            weights=flat,
        )


def _refuse_routed(repository: Store, commit: str | None, what: str) -> None:
    shards = shards_at(repository, commit)
    if shards:
        raise RepositoryError(
            f"this state routes queries to a side memory, which no {what} can do",
            remedy="Load it with patchhub, or write a checkpoint with its side memory beside it: `patchhub apply`.",
            patches=list(shards),
        )


def _card(repository: Store, repo: str, commit: str, adapter: AdapterNote | str, *, withheld: bool) -> Card:
    found = repository.commit(commit)
    elements = repository.active(commit)
    requests = distinct(active_requests(repository, elements))
    base = _base_name(repository)
    shapes = tensor_shapes(repository)
    totals = {weight: norm(add(deltas, shapes[weight])) for weight, deltas in read_state(repository, commit).items()}
    norms = base_norms(repository, totals)
    return Card(
        repo=repo,
        commit=commit,
        message=found.message,
        author=found.author,
        time=found.time,
        base=repository.config.base_id,
        base_model=base.model,
        base_revision=base.revision,
        requests=None if withheld or (elements and not requests) else requests,
        active=repository.active_count(commit),
        methods=sorted({repository.patch(patch).method for patch in {patch for patch, _ in elements}}),
        adapter=adapter,
        changes={weight: total / (norms[weight] or 1.0) for weight, total in totals.items() if weight in norms},
        scores=_score_lines(repository, commit),
        title=repository.config.settings.get("card.title"),
        license=repository.config.settings.get("card.license"),
    )


def _score_lines(repository: Store, commit: str) -> list[ScoreLine]:
    """What is noted about a commit."""
    return [
        ScoreLine(
            suite=f"{noted.kind}, {noted.facts} facts" if noted.facts else noted.suite,
            name=name,
            value=score.value,
            interval=None if score.low is None or score.high is None else (score.low, score.high),
            base=score.base,
            meaning=DEFINITIONS.get(name, ""),
        )
        for noted in notes_of(repository, commit)
        for name, score in noted.scores.items()
    ]


def _base_name(repository: Store) -> BaseName:
    base = repository.config.base
    on_hub = base.get("revision") is not None
    return BaseName(
        base["path"] if on_hub else repository.config.settings.get("base.name"),
        base["revision"] if on_hub else None,
        fan_in_fan_out=base["orientation"] == "in_out",
        mixture="experts" in base,
        experts=stacked_weights(repository),
        turned=turned_weights(repository),
    )


def _refuse_present(folder: Path, names: Iterable[str], *, overwrite: bool) -> None:
    there = [name for name in names if (folder / name).exists()]
    if there and not overwrite:
        raise SettingsError(f"{folder / there[0]} is there already", remedy="Choose another place, or --overwrite.")


def _write(folder: Path, files: Mapping[str, bytes], *, overwrite: bool) -> None:
    _refuse_present(folder, files, overwrite=overwrite)
    with os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        write_atomically(folder / name, (data,))


Verdict = Literal["on", "off", "partly"]

_TOKENS: Final = 24  # a target of a few words, and what follows it
_ENOUGH: Final = 0.8  # share of the facts that are said where a revision is on


@dataclass(frozen=True)
class Said(Result):
    """What the server wrote after the prompt of a fact, and whether that says the target, or what was true before."""

    prompt: str
    target: str
    continuation: str
    holds: bool
    as_before: bool


@dataclass(frozen=True)
class Served(Result):
    """Whether a server answers as a revision does.

    Attributes:
        verdict: ``on`` where at least 8 in 10 facts are said, ``off`` where none is, else ``partly``.
        model: the name that was asked.
        commit: the revision.
        answers: of each fact that was asked.
    """

    verdict: Verdict
    url: str
    model: str
    commit: str
    answers: tuple[Said, ...]

    @property
    def said(self) -> int:
        """How many facts are said."""
        return sum(answer.holds for answer in self.answers)

    def words(self) -> str:
        return f"{self.model} at {self.url}: {self.verdict}, {self.said} of {len(self.answers)} facts are said"


def verify_served(
    repository: Store,
    url: str,
    progress: Progress,
    *,
    revision: str = "HEAD",
    model: str | None = None,
    limit: int = 8,
    chat: bool = False,
) -> Served:
    """Ask a server a few facts of a revision.

    Args:
        url: where the interface begins, such as ``http://localhost:8000`` or ``http://localhost:8000/v1``.
        model: the name of the model or adapter there; None: the only one, or the first.
        limit: at most so many facts, spread over all that are active.
        chat: ask as a user's message, not as a text to continue.

    Raises:
        SettingsError: ``url`` is no http address.
        RequestError: the revision holds no fact whose text is here.
        RemoteError: the server cannot be reached, or its answers are of another form.
    """
    server = Server(root_of(url))
    commit = repository.resolve(revision)
    facts = _facts(repository, commit, limit)
    if commit is None or not facts:
        raise RequestError(
            f"{revision} holds no fact that could be asked", remedy="Name a revision with facts by --rev."
        )
    name, fields = model or server.first_model(), server.unremembering()
    progress.stage("asking", len(facts))
    answers = []
    for fact in facts:
        continuation = server.complete(name, fact.text, tokens=_TOKENS, chat=chat, fields=fields)
        answers.append(_judged(fact, continuation, chat=chat))
        progress.advance(1)
    progress.close()
    held = sum(answer.holds for answer in answers)
    verdict: Verdict = "on" if held >= _ENOUGH * len(answers) else "partly" if held else "off"
    return Served(verdict, server.root, name, commit, tuple(answers))


def _facts(repository: Store, commit: str | None, limit: int) -> list[Request]:
    """Facts that the model at a commit says by itself as far as is known, spread over all of them."""
    active = distinct(active_requests(repository, repository.active(commit)))
    report = Report.from_json(repository.commit(commit).check) if commit else None
    spoken = report.measured.spoken if report else None
    unsaid = {fault.request for fault in spoken.faults if fault.why == "not said"} if spoken else set()
    known = [fact for fact in active if fact.id not in unsaid] or list(active)
    step = max(1, len(known) // limit)
    return known[::step][:limit]


def _judged(fact: Request, continuation: str, *, chat: bool) -> Said:
    """In a chat the target may stand anywhere in the answer, which keeps the base's own words before it."""
    from patchhub.evaluation.suites import said

    text = " ".join(continuation.split())
    before = fact.target_true
    holds, as_before = (
        bool(target) and said(text, target, anywhere=chat) for target in (fact.target_new, before or "")
    )
    return Said(fact.text, fact.target_new, text, holds, as_before)
