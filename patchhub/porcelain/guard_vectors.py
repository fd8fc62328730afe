"""What the guard tells of a prepared commit from stored vectors and the base's files alone. NumPy only, no model.

Misfits say which facts the new state serves, as their columns tell; the largest singular values how far a weight goes at most; the survival
how much of the change the cast to the base's type keeps.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from patchhub.constraints import Columns
from patchhub.delta import Delta, add, image, negative
from patchhub.errors import BaseError
from patchhub.evaluation.guard import Measured, Share
from patchhub.fsio import keep
from patchhub.interference import misfit
from patchhub.models.checkpoint import Checkpoint, open_checkpoint
from patchhub.objects import Commit, Element
from patchhub.porcelain.base_weights import open_weight, survival
from patchhub.porcelain.columns import Shapes, read_blobs, read_columns, read_state, weight_shapes
from patchhub.porcelain.facts import Place, active_requests
from patchhub.porcelain.spectrum import largest_of_delta, largest_singular_value
from patchhub.store import states
from patchhub.store.repository import Repository

UNMET: Final = 0.5
"""A fact whose misfit is larger at some weight gets less than half of its change there."""

State = Mapping[str, Sequence[Delta]]


@dataclass(frozen=True, eq=False)
class Prepared:
    """A commit that is not in the store yet.

    Attributes:
        commit: the commit.
        elements: its active set.
        before, after: the deltas of its first parent's state, and of its own.
        columns: those of its set per weight, against the base's weights whatever additive patches bring, since states are held
            against them; and `rows` which element each of their rows is of.
    """

    commit: Commit
    elements: frozenset[Element]
    before: State
    after: State
    columns: Mapping[str, Columns]
    rows: Mapping[str, Sequence[Element]]


def prepared(repository: Repository, commit: Commit) -> Prepared:
    """Read what the guard needs of a commit that `snapshot.prepare` made."""
    identity, parent = commit.id, states.first_parent(commit)
    blobs = states.state(identity, lambda name: commit if name == identity else repository.commit(name), {})
    elements = (repository.active(parent) - commit.removed) | commit.added
    columns = read_columns(repository, (element for element in elements if element[1] is not None))
    rows = _rows(repository, elements, columns)
    return Prepared(commit, elements, read_state(repository, parent), read_blobs(repository, blobs), columns, rows)


def from_vectors(repository: Repository, found: Prepared) -> Measured:
    """The checks that need no model.

    Those that need the base's files are left out where the files are not on this machine. A state that an ancestor had is not measured
    again.
    """
    facts = len(found.commit.added)
    if found.commit.same_as is not None or not found.elements:
        return Measured(facts=facts)
    unmet, crushed = _misfits(repository, found)
    checkpoint = _local_base(repository)
    if checkpoint is None:
        return Measured(facts=facts, unmet=unmet, crushed=crushed)
    return Measured(
        facts=facts,
        unmet=unmet,
        crushed=crushed,
        spectrum=_spectrum(repository, found, checkpoint),
        survival=_survival(repository, found, checkpoint),
    )


def most_moved(repository: Repository, found: Prepared, places: Iterable[Place]) -> list[Place]:
    """Some places of facts, those first whose outputs the change moves most: ||dD k|| / ||r||, the largest over the weights."""
    shapes = weight_shapes(repository)
    moved: dict[Place, float] = dict.fromkeys(places, 0.0)
    for weight, columns in found.columns.items():
        change = image(_change(found, weight, shapes[weight]), columns.keys)
        asked = np.linalg.norm(columns.residuals.astype(np.float64), axis=1)
        shares = np.linalg.norm(change, axis=1) / np.where(asked > 0, asked, np.inf)
        for element, share in zip(found.rows[weight], shares.tolist(), strict=True):
            if element in moved:
                moved[element] = max(moved[element], share)
    return sorted(moved, key=lambda place: (-moved[place], place[0], place[1] or ""))


def _misfits(repository: Repository, found: Prepared) -> tuple[Share, Share]:
    """(unmet, crushed) of `Measured`."""
    shapes = weight_shapes(repository)
    after = _worst_misfits(found, found.after, shapes)
    met_before: set[Element] = set()
    for parent in found.commit.parents:
        state = found.before if parent == found.commit.parents[0] else read_state(repository, parent)
        then, active = _worst_misfits(found, state, shapes), repository.active(parent)
        met_before |= {element for element, value in then.items() if element in active and value <= UNMET}
    new = (found.commit.added | _contradicted(repository, found)) & after.keys()
    others = (met_before & after.keys()) - new
    return (
        Share(sum(after[element] > UNMET for element in new), len(new)),
        Share(sum(after[element] > UNMET for element in others), len(others)),
    )


def _contradicted(repository: Repository, found: Prepared) -> frozenset[Place]:
    """What stays although an added fact says otherwise about the same prompt and subject."""
    texts = active_requests(repository, found.elements)
    told = {(texts[e].prompt, texts[e].subject) for e in found.commit.added if e in texts}
    return frozenset(
        place
        for place, request in texts.items()
        if place not in found.commit.added and (request.prompt, request.subject) in told
    )


def _rows(repository: Repository, elements: Iterable[Element], columns: Iterable[str]) -> dict[str, list[Element]]:
    """Which element each row of `read_columns` is of, per weight."""
    ordered = sorted((e for e in elements if e[1] is not None), key=lambda element: (element[0], str(element[1])))
    weights = {patch: repository.patch(patch).weights.keys() for patch in {patch for patch, _ in ordered}}
    return {weight: [element for element in ordered if weight in weights[element[0]]] for weight in columns}


def _worst_misfits(found: Prepared, state: State, shapes: Shapes) -> dict[Element, float]:
    """Each element's largest misfit over the weights."""
    worst: dict[Element, float] = {}
    for weight, columns in found.columns.items():
        values = misfit([add(state.get(weight, ()), shapes[weight])], columns).tolist()
        for element, value in zip(found.rows[weight], values, strict=True):
            worst[element] = max(worst.get(element, 0.0), value)
    return worst


def _change(found: Prepared, weight: str, shape: tuple[int, int]) -> Delta:
    after, before = (add(state.get(weight, ()), shape) for state in (found.after, found.before))
    return add([after, negative(before)], shape)


def _spectrum(repository: Repository, found: Prepared, checkpoint: Checkpoint) -> dict[str, dict[str, float]]:
    """Largest singular values of each weight's base, change and state."""
    shapes = weight_shapes(repository)
    base = _base_values(repository, found.after, checkpoint)
    values = {}
    for weight in sorted(base):
        values[weight] = {
            "base": base[weight],
            "change": largest_of_delta(_change(found, weight, shapes[weight])),
            "state": largest_of_delta(add(found.after.get(weight, ()), shapes[weight])),
        }
    return values


def _base_values(repository: Repository, weights: Iterable[str], checkpoint: Checkpoint) -> dict[str, float]:
    """The largest singular value of each base weight, computed once and kept in the cache."""
    path = repository.cache / "spectrum.json"
    try:
        known: dict[str, float] = {str(k): float(v) for k, v in json.loads(path.read_bytes()).items()}
    except (OSError, ValueError, AttributeError, TypeError):
        known = {}
    missing = [weight for weight in weights if weight not in known]
    for weight in missing:
        opened = open_weight(checkpoint, weight, repository.config.base["orientation"])
        if opened is not None:
            known[weight] = largest_singular_value(opened.rows(slice(None)))
    if missing:
        keep(path, [json.dumps(known, sort_keys=True).encode()])
    return {weight: known[weight] for weight in weights if weight in known}


def _survival(repository: Repository, found: Prepared, checkpoint: Checkpoint) -> dict[str, float]:
    kept = {}
    for weight, deltas in sorted(found.after.items()):
        opened = open_weight(checkpoint, weight, repository.config.base["orientation"])
        if opened is not None:
            kept[weight] = survival(opened, deltas)
    return kept


def _local_base(repository: Repository) -> Checkpoint | None:
    """The base's files where they are on this machine."""
    known = repository.config.base
    try:
        return open_checkpoint(known["path"], known["revision"], local=True)
    except BaseError:
        return None
