"""From a new active set to a commit: its delta, its state, its proof. NumPy only, no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from patchhub.constraints import no_columns, proof
from patchhub.delta import Delta, LowRank, add, compact, negative, norm, to_dense, write_deltas
from patchhub.errors import EditError
from patchhub.objects import SLOT, Commit, Element, Keyframe, Patch, Request, requests_json, set_digest, set_json
from patchhub.sets.columns import (
    Shapes,
    additive_patches,
    read_additive,
    read_state,
    solved_state,
    stacked_weights,
    tensor_shapes,
    weight_shapes,
)
from patchhub.sets.guard import base_norms
from patchhub.sets.merging import refuse_stopped
from patchhub.sets.rivals import Rival
from patchhub.sets.shards import without_shards
from patchhub.sets.sums import asked_for, solve_change
from patchhub.signing.statements import sign_commit
from patchhub.store.store import Store
from patchhub.who import Signer, Who

if TYPE_CHECKING:
    from patchhub.text.tokens import Chat  # needs transformers

_ENDLESS: Final = (
    1 << 62
)  # bytes: a state that is solved lists no blobs, so only the commits that its set is read from count

WORTH_KEEPING: Final = 1 << 18
"""A delta of so many bytes is kept in any case: reading it is cheaper than what it would save."""


MOST_SOLVED: Final = 1 << 35
"""Operations a weight that readers of a state are made to do at the most, two seconds of one core: 576 facts of SmolLM2 135M, which is
the smaller side of its weights, 682 of Llama 3 8B, 482 of Llama 3 70B."""


@dataclass(frozen=True)
class Draft:
    """A commit that is about to be made: the set it has, and how it came about."""

    parents: tuple[str, ...]
    elements: frozenset[Element]
    metric: str | None
    command: str
    arguments: Mapping[str, Any]


def store_patch(
    repository: Store,
    *,
    kind: str,
    method: str,
    requests: Sequence[Request],
    settings: Mapping[str, Any],
    tensors: bytes,
    weights: Shapes,
    below: frozenset[Element] | None,
    metric: str | None = None,
) -> Patch:
    """Write a patch with its texts and tensors; no ref leads to it before a commit does.

    Args:
        tensors: a safetensors file, as docs/format.md has it for ``kind``.
        weights: (out, in) of each weight that it changes.
        below: the set that it was made on; None: it does not depend on one.
    """
    patch = Patch(
        base=repository.config.base_id,
        kind=kind,
        made_on=None if below is None else set_digest(below),
        method=method,
        metric=metric,
        requests=tuple(request.id for request in requests),
        requests_blob=repository.objects.put(requests_json(requests)),
        settings=settings,
        tensors=repository.objects.put(tensors),
        weights=weights,
    )
    repository.objects.put(patch.to_json())
    return patch


def begin(repository: Store) -> str | None:
    """The commit that a new one goes on top of. Every verb that commits begins here.

    Raises:
        RepositoryError: a stopped merge waits on it.
    """
    refuse_stopped(repository)
    return repository.head[1]


def record(
    repository: Store,
    commit: Commit,
    draft: Draft,
    signer: Signer | None = None,
    *,
    instead_of: str | None = None,
) -> str:
    """Write a commit that was prepared from ``draft`` and judged, and move the current branch to it; returns its id.

    Args:
        signer: signs it, in the same operation.
        instead_of: the commit that it takes the place of; None: it follows its first parent.

    Raises:
        SettingsError: the key cannot sign; nothing was committed.
    """
    return repository.record(
        commit,
        command=draft.command,
        arguments=draft.arguments,
        author=commit.author,
        time=commit.time,
        instead_of=instead_of,
        beside=sign_commit(repository, commit, signer),
    )


@np.errstate(over="ignore", invalid="ignore")  # what overflows is refused
def prepare(
    repository: Store,
    draft: Draft,
    who: Who,
    *,
    change: Mapping[str, Delta] | None = None,
) -> Commit:
    """The commit of ``draft``, with all that it refers to in the store; it is not in the store itself.

    A set that an ancestor had takes that ancestor's state, bit for bit; otherwise the change against the first parent is
    ``change`` or, where that is None, solved from the recorded columns. It is left out where whoever reads the state can solve it
    from the set's columns at no great cost (`_left_out`): both are the same function of the same numbers. Where an additive patch
    leaves the set, the state is solved anew and kept as a keyframe: the patch may be far larger than what stays, and so may the
    rounding of a sum in which it cancels. Either way the state is proven to be the joint solution of the set and the proof is kept in
    the commit. A set of shards alone has the base's weights, bit for bit: a keyframe without deltas says so.

    Raises:
        EditError: the columns ask for a change that cannot be solved, or that float32 does not hold.
    """
    parent = draft.parents[0] if draft.parents else None
    before = repository.active(parent)
    digest = set_digest(draft.elements)
    same_as = repository.find_same_set(digest, *draft.parents)
    if same_as is not None or not draft.elements:
        kept = _Kept(read_state(repository, same_as))
    else:
        factors = solve_change(repository, before, draft.elements, near=parent) if change is None else change
        kept = _keep(repository, parent, draft.elements, factors)
    return Commit(
        added=frozenset(draft.elements - before),
        author=who.author,
        base=repository.config.base_id,
        check=_measured(repository, draft.elements, parent, kept.state, tensor_shapes(repository)),
        keyframe=kept.keyframe,
        message=who.message,
        metric=draft.metric,
        parents=draft.parents,
        removed=frozenset(before - draft.elements),
        same_as=same_as,
        set_digest=digest,
        solved=kept.solved,
        tensors=kept.tensors,
        time=who.time,
    )


@dataclass(frozen=True, eq=False)
class _Kept:
    """The state of a commit, and what of it is kept: its delta against the first parent's, the whole, or neither."""

    state: Mapping[str, Sequence[Delta]]
    tensors: str | None = None
    keyframe: Keyframe | None = None
    solved: bool = False


def _keep(repository: Store, parent: str | None, elements: frozenset[Element], change: Mapping[str, Delta]) -> _Kept:
    """Store what the state of a set, which is ``change`` away from a commit's, has to keep (docs/format.md)."""
    shapes = tensor_shapes(repository)
    delta = _finite({weight: compact(part) for weight, part in change.items() if norm(part)})
    data = write_deltas(delta) if delta else b""
    if _left_out(repository, elements, len(data)):
        state = {weight: [part] for weight, part in _finite(solved_state(repository, elements)).items()}
        framed = repository.needs_keyframe(parent, 0, _ENDLESS)
        return _Kept(state, None, Keyframe(repository.objects.put(set_json(elements)), None) if framed else None, True)
    tensors = repository.objects.put(data) if delta else None
    anew = bool(additive_patches(repository, repository.active(parent) - elements))
    if anew:
        solved = solve_change(repository, frozenset(), elements, near=parent)
        state = {weight: [part] for weight, part in _finite(solved).items() if norm(part)}
    else:
        state = _extended(read_state(repository, parent), delta) if without_shards(repository, elements) else {}
    keyframe = _keyframe(repository, parent, len(data), elements, state, shapes, anew=anew)
    if keyframe is not None and keyframe.tensors is not None:
        state = _whole(state, shapes)
    return _Kept(state, tensors, keyframe)


def _left_out(repository: Store, elements: frozenset[Element], size: int) -> bool:
    """Whether a commit with that set keeps no delta of so many bytes: its state is then solved from the set.

    That takes about 4 n^2 (in + out) operations a weight. Stacked weights have keys of which most is not kept, and imported changes are
    no columns.
    """
    asking = frozenset(element for element in elements if element[1] is not None)
    weights = {weight for patch in {patch for patch, _ in asking} for weight in repository.patch(patch).weights}
    count, shapes = len(asking), weight_shapes(repository)
    return (
        size > WORTH_KEEPING
        and weights.isdisjoint(stacked_weights(repository))
        and all(count <= min(shapes[weight]) for weight in weights)
        and all(4 * count**2 * sum(shapes[weight]) <= MOST_SOLVED for weight in weights)
        and not additive_patches(repository, elements)
    )


def _finite(change: Mapping[str, Delta]) -> Mapping[str, Delta]:
    """The change of each weight; refused where numbers do not hold it, as columns that somebody else wrote may ask."""
    for weight, delta in change.items():
        parts = (delta.A, delta.B) if isinstance(delta, LowRank) else (to_dense(delta),)
        if not all(np.isfinite(part).all() for part in parts):
            raise EditError(
                f"the columns of these facts ask for a change of {weight} that is too large for float32",
                remedy="One of them is out of all proportion; `patchhub log` says who brought it: take back or leave out that commit.",
                weight=weight,
            )
    return change


def _extended(state: Mapping[str, Sequence[Delta]], delta: Mapping[str, Delta]) -> dict[str, list[Delta]]:
    return {
        weight: [*state.get(weight, ()), *([delta[weight]] if weight in delta else [])]
        for weight in sorted(state.keys() | delta.keys())
    }


def _keyframe(
    repository: Store,
    parent: str | None,
    new_bytes: int,
    elements: frozenset[Element],
    state: Mapping[str, Sequence[Delta]],
    shapes: Shapes,
    *,
    anew: bool,
) -> Keyframe | None:
    """The whole state, where reading it commit by commit would cost too much (docs/format.md), or it was solved anew."""
    full = additive_patches(repository, elements)  # they may be of any rank
    rank = max((max(shapes[weight]) for weight in state), default=0) if full else len(elements)
    whole = sum(4 * min(out * inner, rank * (out + inner)) for out, inner in (shapes[weight] for weight in state))
    if not (anew or repository.needs_keyframe(parent, new_bytes, whole)):
        return None
    set_id = repository.objects.put(set_json(elements))
    deltas = {weight: found[0] for weight, found in _whole(state, shapes).items()}
    return Keyframe(set_id, repository.objects.put(write_deltas(deltas)) if deltas else None)


def _whole(state: Mapping[str, Sequence[Delta]], shapes: Shapes) -> dict[str, list[Delta]]:
    return {weight: [compact(add(deltas, shapes[weight]))] for weight, deltas in state.items()}


def _measured(
    repository: Store,
    elements: frozenset[Element],
    parent: str | None,
    state: Mapping[str, Sequence[Delta]],
    shapes: Shapes,
) -> dict[str, Any]:
    """Frobenius norms of the state and of its change, and the proof, per weight."""
    additive = read_additive(repository, elements)
    columns = asked_for(repository, parent, elements, additive)
    previous = read_state(repository, parent)
    proofs: dict[str, float] = {}
    norms: dict[str, dict[str, float]] = {}
    weights = sorted(state.keys() | previous.keys() | columns.keys())
    base = base_norms(repository, weights)
    for weight in weights:
        now, then = add(state.get(weight, ()), shapes[weight]), add(previous.get(weight, ()), shapes[weight])
        norms[weight] = {
            **({"base": base[weight]} if weight in base else {}),
            "change": norm(add([now, negative(then)], shapes[weight])),
            "state": norm(now),
        }
        solved = [*state.get(weight, ()), *map(negative, additive.get(weight, ()))]
        if weight in columns or weight not in additive:
            proofs[weight] = proof(solved, columns.get(weight, no_columns(shapes[weight])))
        else:
            proofs[weight] = norm(add(solved, shapes[weight])) / (norms[weight]["state"] or 1.0)
    return {"norms": norms, "proof": proofs}


@dataclass(frozen=True, eq=False)
class Sentence:
    """What the model says of a subject by itself: asked by a text with its place, in plain text or as the user's message of a chat form."""

    subject: str
    chat: Chat | None
    asking: str
    said: str

    @property
    def prompt(self) -> str:
        return self.asking.replace(SLOT, self.subject)


@dataclass(frozen=True)
class Written:
    """An edit that is finished and not committed.

    Attributes:
        patches: ids of the patches that were made.
        elements: the active set of the commit.
        metric: the metric of its columns; None where it has none.
        change: the delta of each weight against HEAD; None: to be solved from the recorded columns.
        rivals: facts that compete for a key, found before anything was optimised.
        keeps: prompts that were recorded beside the facts, with the answers that must stay.
        sentences: what the model said of the subjects before.
    """

    patches: tuple[str, ...]
    elements: frozenset[Element]
    metric: str | None
    change: Mapping[str, Delta] | None
    rivals: tuple[Rival, ...] = ()
    keeps: tuple[Request, ...] = ()
    sentences: tuple[Sentence, ...] = ()
