"""Verbs around the base: `init`, `apply`, `ask`; and what a revision answers to given facts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from patchhub.cache import Cache
from patchhub.delta import Delta, is_zero, section
from patchhub.errors import SettingsError
from patchhub.evaluation.metrics import score_targets
from patchhub.models.architectures import Architecture, Site, describe, read_config
from patchhub.models.checkpoint import Checkpoint, not_finite, open_checkpoint
from patchhub.models.fingerprint import check_tensors, fingerprint, write_patched
from patchhub.models.placement import Placement
from patchhub.models.structure import Orientation, Projection
from patchhub.objects import Request
from patchhub.progress import Progress, Silent, increments
from patchhub.results import Result
from patchhub.runtime.compose import compose, survival
from patchhub.runtime.routing import Mode
from patchhub.sets.columns import read_state, stacked_orientations
from patchhub.sets.shards import shards_at
from patchhub.store.config import beside
from patchhub.store.store import DIRECTORY, Store, refuse_existing, refuse_store
from patchhub.text.tokens import context_length, lacks_tokenizer, refuse_unknown, tokenise, too_long
from patchhub.who import Who
from patchhub.worktree.loading import side_memory_files, warn_of_losses
from patchhub.worktree.opening import (
    Worktree,
    chosen_mode,
    keep_digests,
    open_checked,
    open_worktree,
    state_at,
)

_TOP = 5
_CONTINUATION = 12


@dataclass(frozen=True)
class Initialised(Result):
    """What `init` found and what it cost."""

    store: Path
    base: str
    model_type: str
    layers: int
    tensors: int
    gigabytes: float
    seconds: float


@dataclass(frozen=True)
class Applied(Result):
    """What `apply` wrote: the touched weights with the share of their change that the cast kept, and how many shards lie beside."""

    out: Path
    commit: str | None
    survival: Mapping[str, float]
    shards: int = 0


@dataclass(frozen=True)
class Answer(Result):
    """What one revision says to a prompt: the most probable next tokens and a greedy continuation; in a chat of its answer."""

    revision: str
    commit: str | None
    top: tuple[tuple[str, float], ...]
    continuation: str
    chat: bool = False
    prompt: str = ""

    def words(self) -> str:
        likely = ", ".join(f"{token!r} {probability:.1%}" for token, probability in self.top[:3])
        return f"{self.revision}: {self.continuation.strip()!r} ({likely})"


def init(
    folder: Path,
    base: str,
    progress: Progress,
    *,
    who: Who,
    revision: str | None = None,
    experts: Site | None = None,
    shared: bool = False,
    settings: Mapping[str, Any] | None = None,
) -> Initialised:
    """Make a store for a base model; reads every byte of the base once.

    Args:
        folder: where ``.patchhub`` is made.
        base: a model folder or a Hub id.
        experts: which experts facts are written into; None: the default where there are both.
        shared: let the group of the folder write in the store.
        settings: what its config holds from the beginning.

    Raises:
        RepositoryError: there is a store already.
        BaseError: the base cannot be read or cannot be edited.
    """
    refuse_existing(folder)
    begun = perf_counter()
    checkpoint = open_checkpoint(base, revision)
    architecture = describe(read_config(checkpoint.folder), experts)
    total = sum(entry.size for entry in checkpoint.tensors.values())
    _warn_of_hindrances(checkpoint, architecture, progress)
    progress.stage("hashing the base", total)
    with TemporaryDirectory() as kept:
        identity = fingerprint(checkpoint, cache=Cache(Path(kept)), progress=increments(progress))
        info = {
            "id": identity.id,
            **_place(checkpoint, base, folder / DIRECTORY),
            "model_type": architecture.model_type,
            "orientation": architecture.orientation,
            "weights": _weights(checkpoint, architecture.chosen, progress),
            **_experts(checkpoint, architecture, progress),
        }
        made: dict[str, Any] = {"author": who.author, "time": who.time, "shared": shared, "settings": settings or {}}
        with Store.init(folder, identity.to_json(), base_info=info, **made) as repository:
            keep_digests(repository, Path(kept))
    progress.close()
    seconds = perf_counter() - begun
    return Initialised(
        folder / DIRECTORY,
        identity.id,
        architecture.model_type,
        architecture.n_layers,
        len(checkpoint.tensors),
        total / 1e9,
        seconds,
    )


def _place(checkpoint: Checkpoint, base: str, store: Path) -> dict[str, str | None]:
    """Where a base is, for the config: on the Hub, or in a folder and the way there from the store."""
    if checkpoint.revision is not None:
        return {"path": base, "revision": checkpoint.revision, "near": None}
    near = beside(checkpoint.folder, store)
    return {"path": str(checkpoint.folder.resolve()), "revision": None, "near": near}


def _warn_of_hindrances(checkpoint: Checkpoint, architecture: Architecture, progress: Progress) -> None:
    """Say what of a base makes editing impossible or slow."""
    lacking = lacks_tokenizer(checkpoint.folder)
    if lacking is not None:
        progress.warn(f"{checkpoint.folder} has {lacking}; facts can be written and asked only once it has one")
    if architecture.recurrent:
        progress.warn(
            "some blocks of this model keep a state that cannot be cut after a token; while facts are written, texts are read from their "
            "beginning at each step, which is slower and gives the same numbers"
        )


def apply(
    repository: Store,
    revision: str,
    out: Path,
    progress: Progress,
    *,
    base: str | None = None,
    overwrite: bool = False,
    link: bool = True,
    wise: Mode | None = None,
) -> Applied:
    """Write the model of a revision as an ordinary checkpoint folder, one tensor at a time.

    Shards cannot be in the weights: they are put into a folder beside them, and `patchhub.load` of the checkpoint routes to them,
    by default as ``wise`` says (None: the repository's ``wise.mode``). Other loaders read the main weights alone.

    Raises:
        RevisionError: no such revision.
        SettingsError: ``out`` is there already, or would replace what is no model.
        BaseError: the base is not where it was, or is another model now.
    """
    refuse_store(repository, out)
    commit = repository.resolve(revision)
    state = read_state(repository, commit)
    checkpoint = open_checked(repository, base)
    check_tensors(repository.base, checkpoint, list(state))
    orientation = repository.config.base["orientation"]
    stacked = stacked_orientations(repository)
    kept: dict[str, float] = {}

    def replacement(weight: str, deltas: Sequence[Delta], orientation: Orientation) -> Callable[[Tensor], Tensor]:
        def composed(stored: Tensor) -> Tensor:
            result = compose(stored, deltas, orientation=orientation, dtype=stored.dtype)
            found = survival(stored, deltas, result, orientation=orientation)
            kept[weight] = min(kept.get(weight, 1.0), found)
            return result

        return composed

    replaced: dict[str, Callable[[Tensor], Tensor]] = {}
    for weight, deltas in state.items():
        tensors = checkpoint.parts(weight)
        for tensor, parts in zip(tensors, _of_each(deltas, len(tensors)), strict=True):
            if len(tensors) == 1 or not all(map(is_zero, parts)):
                replaced[tensor] = replacement(weight, parts, stacked.get(weight, orientation))

    shards = shards_at(repository, commit)
    progress.stage("writing", sum(entry.size for entry in checkpoint.tensors.values()))
    write_patched(
        checkpoint,
        out,
        replaced,
        overwrite=overwrite,
        link=link,
        extra=side_memory_files(repository, commit, shards, chosen_mode(repository, wise)),
        progress=increments(progress),
    )
    warn_of_losses(kept, progress, "in the base's type", "patchhub.load(..., side_path=True) keeps it")
    progress.close()
    return Applied(out, commit, kept, len(shards))


def _of_each(deltas: Sequence[Delta], tensors: int) -> list[Sequence[Delta]]:
    """The deltas of each of the tensors that hold a weight: all of them, or those of each expert."""
    if tensors == 1:
        return [deltas]
    inner = deltas[0].shape[1] // tensors
    return [[section(delta, slice(e * inner, (e + 1) * inner)) for delta in deltas] for e in range(tensors)]


def ask(
    repository: Store,
    prompts: Sequence[str],
    revisions: Sequence[str],
    progress: Progress,
    *,
    base: str | None = None,
    placement: Placement | None = None,
    chat: bool | None = None,
) -> list[Answer]:
    """What the model says to each prompt, at each revision: one model in memory, switched from state to state once.

    Args:
        placement: on which device, in which type or quantisation the base is loaded; None: as the repository's config says.
        chat: give the prompt as the user's message of the base's chat template; None: as the repository's config says.

    Raises:
        RevisionError: no such revision.
        SettingsError: a prompt is empty, or there is no chat template.
    """
    found = answers(repository, prompts, revisions, progress, base=base, placement=placement, chat=chat)
    return [answered for of_prompt in zip(*found, strict=True) for answered in of_prompt]


def answers(
    repository: Store,
    prompts: Sequence[str],
    revisions: Sequence[str],
    progress: Progress,
    *,
    base: str | None = None,
    placement: Placement | None = None,
    chat: bool | None = None,
) -> list[list[Answer]]:
    """For each revision the answers to all prompts; errors as in `ask`."""
    if not all(prompt.strip() for prompt in prompts):
        raise SettingsError("the prompt is empty", remedy='For example: patchhub ask "The capital of France is"')
    states = [state_at(repository, revision) for revision in revisions]
    found: list[list[Answer]] = []
    if not states:
        return found
    tree = open_worktree(repository, progress, states[0], base=base, placement=placement, chat=chat)
    for revision, state in zip(revisions, states, strict=True):
        tree = tree if tree.state is state else tree.moved(state)
        found.append([_answer(tree, prompt, revision) for prompt in prompts])
    progress.close()
    return found


@torch.no_grad()
def _answer(tree: Worktree, prompt: str, revision: str) -> Answer:
    model, chat = tree.model, tree.chat
    tokenizer: Any = tree.tokenizer
    text = prompt.rstrip() if chat is None else chat.asking(prompt.strip())
    # As facts are read: without what the tokenizer appends, and only what the model has positions and embeddings for.
    ((ids, _),) = tokenise(tokenizer, [text], special_tokens=chat is None)
    refuse_unknown(model, tokenizer, ids, text)
    room = context_length(model) - len(ids)
    if room < 1:
        raise too_long(text, len(ids), context_length(model))
    inputs = {"input_ids": torch.tensor([ids], device=model.device)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    probabilities = model(**inputs).logits[0, -1].float().softmax(-1)
    top = probabilities.topk(min(_TOP, len(probabilities)))
    tokens = model.generate(
        **inputs, max_new_tokens=min(_CONTINUATION, room), do_sample=False, pad_token_id=tokenizer.eos_token_id or 0
    )
    said = tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    likely = tuple((tokenizer.decode([token]), float(value)) for token, value in pairs)
    return Answer(revision, tree.state.commit, likely, said, chat=chat is not None, prompt=prompt)


def _experts(checkpoint: Checkpoint, architecture: Architecture, progress: Progress) -> dict[str, Any]:
    """What the config says of a mixture of experts besides: which of them are edited, and the weights of the others."""
    if architecture.site is None:
        return {}
    other = {name: p for name, p in architecture.weights.items() if name not in architecture.chosen}
    return {"experts": architecture.site, "beside": _weights(checkpoint, other, progress)}


def _weights(
    checkpoint: Checkpoint, projections: Mapping[str, Projection], progress: Progress
) -> dict[str, dict[str, Any]]:
    """Shape (out, in) and Frobenius norm of weights that can be edited; of experts how many they are and how each is stored."""
    progress.stage("measuring weights", len(projections))
    found = {}
    for name, projection in projections.items():
        norms = [float(checkpoint.read(part).float().norm()) for part in checkpoint.parts(name)]
        norm = math.hypot(*norms) if len(norms) > 1 else norms[0]
        if not math.isfinite(norm):
            raise not_finite(checkpoint.name, name)
        found[name] = {"norm": norm, "shape": list(projection.shape)}
        if projection.experts:
            found[name] |= {"experts": projection.experts, "orientation": projection.orientation}
        if projection.apart:
            found[name]["apart"] = True
        if projection.flat:
            found[name]["flat"] = True
        progress.advance(1)
    return found


@dataclass(frozen=True)
class Answers:
    """What one revision says about some facts: its first words at each prompt, and counts over their evaluation prompts."""

    answers: tuple[str, ...]
    paraphrases_right: int
    paraphrases: int
    neighbors_right: int
    neighbors: int


def score_facts(repository: Store, requests: Sequence[Request], revision: str, expected: Sequence[str]) -> Answers:
    """What a revision answers: at each prompt, with as many tokens as the expected answer has, and at the evaluation prompts.

    Answers are teacher forced; paraphrases are right with the new target, neighbours with their own.

    Raises:
        RevisionError: no such revision.
    """
    tree = open_worktree(repository, Silent(), state_at(repository, revision), chat=False)
    prompts = [(request.text, answer) for request, answer in zip(requests, expected, strict=True)]
    paraphrases = [(text, request.target_new) for request in requests for text in request.paraphrases]
    neighbors = [(near.prompt, near.target) for request in requests for near in request.neighborhood]
    scores = score_targets(tree.model, tree.tokenizer, [*prompts, *paraphrases, *neighbors])
    right = [score.argmax_right for score in scores]
    end = len(prompts) + len(paraphrases)
    return Answers(
        tuple(str(tree.tokenizer.decode(list(score.argmax))).strip() for score in scores[: len(prompts)]),
        sum(right[len(prompts) : end]),
        len(paraphrases),
        sum(right[end:]),
        len(neighbors),
    )


def differing_tensors(one: Path, other: Path) -> list[str]:
    """Names of tensors whose type, shape or bytes differ between two checkpoint folders, or that only one of them has."""
    a, b = fingerprint(open_checkpoint(one)).tensors, fingerprint(open_checkpoint(other)).tensors
    return sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))
