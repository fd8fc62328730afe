"""The worktree: the base in memory at a state, ready to be edited or asked. `open_worktree` is the one way to make it.

It answers the questions that every verb with a model has: where the base is and whether it is the repository's, what its architecture is,
on which device, in which type or quantisation it runs, in which chat form it is asked, and which state it is in: the deltas of a commit,
read on first use, and the side memories of its shards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from patchhub.cache import Cache
from patchhub.delta import Delta
from patchhub.editing.steps import reading_positions
from patchhub.editing.wise.texts import Shard
from patchhub.errors import BaseError, CorruptStoreError, RepositoryError, SettingsError
from patchhub.evaluation.metrics import BATCH_TOKENS
from patchhub.fsio import make_directories, read_chunks, write_atomically
from patchhub.models.architectures import Architecture, describe, read_config
from patchhub.models.checkpoint import Checkpoint, open_checkpoint
from patchhub.models.fingerprint import check_tensors
from patchhub.models.placement import DEFAULT, Placement, load_base, runs_beside
from patchhub.models.tracing import Stack
from patchhub.objects import Base, Patch
from patchhub.progress import Progress
from patchhub.runtime.patched_model import UNROUTED, PatchState, Routing, attach, switch
from patchhub.runtime.routing import Mode, SideMemory
from patchhub.sets.columns import Shapes, read_shard_change, read_state, stacked_orientations, weight_shapes
from patchhub.sets.shards import ShardRecord, shard_record, shards_at
from patchhub.store.store import Store
from patchhub.text.tokens import Chat, chat_of, load_tokenizer, tokenise

MODES: Final[tuple[Mode, ...]] = ("retrieve", "merge")


def base_object(repository: Store) -> Base:
    return Base.from_json(repository.objects.get(repository.config.base_id))


class StoredDeltas(Mapping[str, Sequence[Delta]]):
    """The deltas of a commit per weight, read from the store when they are first asked for."""

    def __init__(self, repository: Store, commit: str | None) -> None:
        self._repository, self._commit = repository, commit
        self._read: dict[str, list[Delta]] | None = None

    @property
    def _deltas(self) -> dict[str, list[Delta]]:
        if self._read is None:
            self._read = read_state(self._repository, self._commit)
        return self._read

    def __getitem__(self, weight: str) -> Sequence[Delta]:
        return self._deltas[weight]

    def __iter__(self) -> Iterator[str]:
        return iter(self._deltas)

    def __len__(self) -> int:
        return len(self._deltas)


def state_at(repository: Store, revision: str, wise: Mode | None = None) -> PatchState:
    """What is to be attached for a revision: its deltas, which are read on first use, and its side memories."""
    commit = repository.resolve(revision)
    return patch_state(
        repository, StoredDeltas(repository, commit), commit, routing=routing_at(repository, commit, wise)
    )


def main_state_at(repository: Store, revision: str) -> PatchState:
    """The main weights of a revision, without its side memories."""
    commit = repository.resolve(revision)
    return patch_state(repository, StoredDeltas(repository, commit), commit)


def patch_state(
    repository: Store,
    deltas: Mapping[str, Sequence[Delta]],
    commit: str | None,
    *,
    routing: Routing = UNROUTED,
) -> PatchState:
    return PatchState(
        base=base_object(repository),
        orientation=repository.config.base["orientation"],
        stored=stacked_orientations(repository),
        weights=deltas,
        commit=commit,
        routing=routing,
        proof=None if commit is None else repository.standing(commit).proof,
    )


def routing_at(repository: Store, commit: str | None, mode: Mode | None = None) -> Routing:
    """How a commit routes queries: `UNROUTED` where no shard is active.

    Args:
        mode: None stands for the repository's ``wise.mode``, and that for "retrieve".

    Raises:
        SettingsError: there is no such mode.
    """
    chosen = chosen_mode(repository, mode)
    return read_routing(shards_at(repository, commit), repository.objects.get, weight_shapes(repository), chosen)


def read_routing(
    patches: Mapping[str, Patch], tensors_of: Callable[[str], bytes | Path], shapes: Shapes, mode: Mode
) -> Routing:
    """Side memories of the shards among some patches, in ascending order of id.

    Args:
        patches: by id; those of another kind are left out.
        tensors_of: the bytes, or a verified file, of a tensors object.
        shapes: (out, in) of each weight of the base that can be edited.

    Raises:
        CorruptStoreError: a shard is not what its manifest says.
    """
    shards = {identity: patch for identity, patch in sorted(patches.items()) if patch.kind == "shard"}
    if not shards:
        return UNROUTED
    records = {identity: shard_record(patch) for identity, patch in shards.items()}
    memories = [
        SideMemory(identity, *read_shard_change(patch, tensors_of(patch.tensors), shapes), records[identity].routing)
        for identity, patch in shards.items()
    ]
    return Routing(memories, mode, *_merging(records.values()))


def stored_shard(repository: Store, identity: str) -> Shard:
    """A shard of this store, bit for bit as its training left it."""
    patch = repository.patch(identity)
    change = read_shard_change(patch, repository.objects.get(patch.tensors), weight_shapes(repository))
    return Shard(*change, shard_record(patch).routing)


def chosen_mode(repository: Store, mode: Mode | None) -> Mode:
    """``mode``, or where that is None what the repository's config says."""
    return checked_mode(mode or repository.config.settings.get("wise.mode", MODES[0]))


def checked_mode(mode: Any) -> Mode:
    """``mode`` if it is one; `SettingsError` otherwise."""
    if mode not in MODES:
        raise SettingsError(f"there is no way {mode!r} to route to shards", remedy=f"Choose {' or '.join(MODES)}.")
    found: Mode = mode
    return found


def _merging(records: Iterable[ShardRecord]) -> tuple[Literal["ties", "linear"], float]:
    """How shards are joined: as the first of them says.

    Raises:
        CorruptStoreError: it says what there is not.
    """
    training = next(iter(records)).training
    method = training.get("merge_method", UNROUTED.merge_method)
    density = training.get("merge_density", UNROUTED.merge_density)
    if method not in ("ties", "linear") or type(density) not in (int, float) or not 0 < density <= 1:
        raise CorruptStoreError(
            f"a shard says that shards are joined by {method!r} at density {density!r}, which cannot be",
            remedy="Do not use it.",
        )
    return method, float(density)


def not_finite(model: str, tensor: str) -> BaseError:
    """The error that a base has NaN or infinity among its weights."""
    return BaseError(
        f"{model} has values in {tensor} that are not finite (NaN or infinity)",
        remedy="Download or convert the model again.",
        tensor=tensor,
    )


@dataclass(frozen=True, eq=False)
class BaseFiles:
    """The files of a base and where its parts are: what is known of it before it is in memory."""

    checkpoint: Checkpoint
    architecture: Architecture


@dataclass(frozen=True, eq=False)
class Worktree:
    """A base in memory.

    Attributes:
        repository: whose base it is.
        checkpoint: the base's files.
        architecture: where its parts are.
        model: the base with ``state`` attached.
        tokenizer: the base's.
        state: what is attached: deltas per weight, and side memories.
        chat: the chat form in which its facts are written and asked; None: as plain text.
        memory: bytes that the process may hold, as `commit --memory` says; None: no limit.
        placement: where and in which type the model runs, as it was asked for.
    """

    repository: Store
    checkpoint: Checkpoint
    architecture: Architecture
    model: Any
    tokenizer: PreTrainedTokenizerBase
    state: PatchState
    chat: Chat | None = None
    memory: int | None = None
    placement: Placement = DEFAULT

    @property
    def batch_tokens(self) -> int:
        """How many padded positions may be read at once, now."""
        return reading_positions(self.stack, self.memory, BATCH_TOKENS)

    @cached_property
    def stack(self) -> Stack:
        """The model as a stack of blocks."""
        return Stack(self.model, self.architecture)

    def moved(self, state: PatchState) -> Worktree:
        """The same model, put into another state; this value no longer says what state it is in."""
        switch(self.model, self.checkpoint, state, cache=self.repository.cache)
        moved = replace(self, state=state)
        if "stack" in self.__dict__:  # the stack is about the same model: its probes need not run again
            moved.__dict__["stack"] = self.stack
        return moved


def open_base(repository: Store, path: str | Path | None = None, *, verify: bool = False) -> Checkpoint:
    """The repository's base model; with ``verify``, every tensor is hashed."""
    known = repository.config.base
    place = path if path is not None else repository.config.base_place(repository.root)
    if path is None:
        repository.config.refuse_lost_base(repository.root)
    checkpoint = open_checkpoint(place, None if path else known["revision"])
    if verify:
        check_tensors(base_object(repository), checkpoint, None)
    return checkpoint


def base_files(repository: Store, path: str | Path | None = None) -> BaseFiles:
    """The repository's base model and its architecture, before anything of it is checked or loaded."""
    checkpoint = open_base(repository, path)
    return BaseFiles(checkpoint, describe(read_config(checkpoint.folder), repository.config.base.get("experts")))


def check_base(repository: Store, checkpoint: Checkpoint, weights: Sequence[str] = ()) -> None:
    """Check every tensor of a checkpoint, those of files that have not changed since the last check by their size and time alone.

    Args:
        weights: tensors that are hashed in any case, because they will be edited.

    Raises:
        BaseError: it is not the repository's base.
    """
    base = base_object(repository)
    check_tensors(base, checkpoint, None, cache=repository.cache)
    check_tensors(base, checkpoint, weights)


def open_checked(repository: Store, path: str | Path | None = None) -> Checkpoint:
    """The repository's base model, every tensor checked.

    Raises:
        BaseError: the base is not where it was, or is another model now.
    """
    checkpoint = open_base(repository, path)
    check_base(repository, checkpoint)
    return checkpoint


def keep_digests(repository: Store, folder: Path) -> None:
    """Put digests that ``fingerprint`` kept in another folder, made before there was a store, into the store's cache."""
    with suppress(OSError, RepositoryError):
        for path in Cache(folder).files():  # copied by content: a temporary folder's permissions are its maker's alone
            target = repository.cache.folder / path.relative_to(folder)
            make_directories(target.parent)
            write_atomically(target, read_chunks(path))


def placement_of(
    repository: Store, *, device: str | None = None, dtype: str | None = None, quantization: str | None = None
) -> Placement:
    """The placement that the arguments ask for; where they are None, the repository's settings, then the default rule.

    Raises:
        SettingsError: a value cannot be used.
    """
    given = {"device": device, "dtype": dtype, "quantization": quantization}
    configured = {name: repository.config.settings.get(name) for name in given}
    chosen = {name: value if value is not None else configured[name] for name, value in given.items()}
    return Placement(**{name: value for name, value in chosen.items() if value is not None})


def in_chat(repository: Store, asked: bool | None) -> bool:
    """Whether facts are written and asked in a chat: what the caller says, else the repository's config."""
    return bool(repository.config.settings.get("chat", False)) if asked is None else asked


def other_form(tree: Worktree) -> Chat | None:
    """The base's chat form where facts are asked outside it; None where they are asked in it, or there is none that the model can read."""
    if tree.chat is not None:
        return None
    with suppress(SettingsError):
        form = chat_of(tree.tokenizer)
        embeddings: Any = tree.model.get_input_embeddings()
        ((ids, _),) = tokenise(tree.tokenizer, [form.around("a")], special_tokens=False)
        return form if max(ids) < int(embeddings.weight.shape[0]) else None
    return None


def chat_form(repository: Store, tokenizer: PreTrainedTokenizerBase, asked: bool | None) -> Chat | None:
    """The base's chat form where prompts are read in it; None where they are read as they are.

    Args:
        asked: what the caller says; None: as the repository's config says.

    Raises:
        SettingsError: prompts are to be read in a chat, and the base has no chat template that can be used.
    """
    return chat_of(tokenizer) if in_chat(repository, asked) else None


def _is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite: then one of them would be in the sum, which is read off memory once."""
    return bool(tensor.sum(dtype=torch.float32).isfinite()) or bool(tensor.isfinite().all())


def open_worktree(
    repository: Store,
    progress: Progress,
    state: PatchState | None = None,
    *,
    base: str | Path | BaseFiles | None = None,
    placement: Placement | None = None,
    chat: bool | None = None,
    edits: Sequence[str] | None = None,
    memory: int | None = None,
) -> Worktree:
    """The repository's base in memory with a state attached, every tensor of it checked.

    Args:
        state: what is attached; None: nothing.
        base: where the base is, if not where the repository says, or its files if they are open.
        placement: on which device, in which type or quantisation it runs; None: as the repository's config says.
        chat: whether facts are written and asked in the base's chat template; None: as the config says.
        edits: names of the weights that will be edited, for a model to record on; None: a model to ask. A model to record on has
            the deltas in its weights only where it is in float32, else beside them, so that no rounding is recorded; its values must be
            finite. A model to ask answers as `load` does: the weights are rounded to its type.
        memory: bytes that the process may hold, which batches of texts follow; None: no limit.

    Raises:
        SettingsError: the base has no chat template that can be used, under ``chat``.
        BaseError: the base is missing, changed, not finite, or does not fit.
    """
    files = base if isinstance(base, BaseFiles) else base_files(repository, base)
    checkpoint = files.checkpoint
    check_base(repository, checkpoint, edits or ())
    progress.stage("loading the base", 0)
    tokenizer = load_tokenizer(checkpoint)
    form = chat_form(repository, tokenizer, chat)
    placement = placement or placement_of(repository)
    model = load_base(checkpoint, placement).eval()
    if edits is not None:
        for name, parameter in model.named_parameters():
            if not _is_finite(parameter):
                raise not_finite(checkpoint.name, name)
    state = patch_state(repository, {}, None) if state is None else state
    beside = edits is not None and runs_beside(model)
    attach(model, checkpoint, state, cache=repository.cache, side_path=beside)
    return Worktree(repository, checkpoint, files.architecture, model, tokenizer, state, form, memory, placement)
