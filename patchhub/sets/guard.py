"""What the guard tells of a prepared commit from stored vectors and the base's files alone, and its judgement. NumPy only.

Weights of the base are read as arrays, to tell what rounding keeps of a change and how large a change is beside its weight."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Final

import numpy as np
from jaxtyping import Float, UInt32

from patchhub.cache import Kind
from patchhub.constraints import Columns, misfit
from patchhub.delta import NEGLIGIBLE, Delta, LowRank, add, image, negative, to_dense
from patchhub.errors import BaseError, GuardError
from patchhub.evaluation.guard import Fault, Finding, Limits, Measured, Report, Share, judge
from patchhub.models.checkpoint import FLOATS, Checkpoint, open_checkpoint, widened
from patchhub.objects import Commit, Element
from patchhub.sets.columns import Shapes, read_blobs, read_state, stacked_orientations, tensor_shapes
from patchhub.sets.elements import Place, active_requests
from patchhub.sets.sums import recorded_columns
from patchhub.store import states
from patchhub.store.store import Store

NORMS: Final = Kind("norms", ".json")
SPECTRUM: Final = Kind("spectrum", ".json")

_SAMPLED_ENTRIES: Final = 1 << 22


def _to_bfloat16(values: Float[np.ndarray, ...]) -> Float[np.ndarray, ...]:
    """Rounded to the nearest, ties to even; still float32."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded: UInt32[np.ndarray, ...] = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return rounded.view(np.float32)


def _to_float16(values: Float[np.ndarray, ...]) -> Float[np.ndarray, ...]:
    with np.errstate(over="ignore"):
        return values.astype(np.float16).astype(np.float32)


@dataclass(frozen=True)
class _Type:
    """How one safetensors dtype is read, and how a float32 is rounded to it."""

    read: Callable[[np.ndarray], np.ndarray]
    rounded: Callable[[np.ndarray], np.ndarray]


_TYPES: Final[Mapping[str, _Type]] = {
    "F16": _Type(lambda raw: raw.astype(np.float32), _to_float16),
    "BF16": _Type(widened, _to_bfloat16),
    "F32": _Type(np.asarray, lambda values: values.astype(np.float32)),
}


@dataclass(frozen=True, eq=False)
class BaseWeight:
    """One weight as the checkpoint stores it, mapped from its file.

    Attributes:
        raw: (rows, columns) in the stored type.
        kind: that type.
        transposed: it is stored (in, out).
    """

    raw: np.ndarray
    kind: _Type
    transposed: bool

    def rows(self, part: slice) -> Float[np.ndarray, "some columns"]:
        """Some rows in float32."""
        return self.kind.read(self.raw[part])


def open_weight(checkpoint: Checkpoint, parameter: str, orientation: str) -> BaseWeight | None:
    """A weight of the base by its parameter name; None where it is of a type that is not read here.

    Of experts, which are mapped from one tensor or one each, it is the stacked weight, copied; ``orientation`` is each expert's.

    Raises:
        BaseError: the checkpoint has no such weight.
    """
    entries = [checkpoint.entry(part) for part in checkpoint.parts(parameter)]
    kind = _TYPES.get(entries[0].dtype)
    if kind is None or any(entry.dtype != entries[0].dtype for entry in entries):
        return None
    raw = [np.memmap(entry.file, FLOATS[entry.dtype], "r", entry.begin, entry.shape) for entry in entries]
    if len(raw) == 1 and raw[0].ndim == 1:
        return BaseWeight(raw[0][:, None], kind, False)
    if len(raw) == 1 and raw[0].ndim == 2:
        return BaseWeight(raw[0], kind, orientation == "in_out")
    experts = raw[0] if len(raw) == 1 else raw
    stacked = np.concatenate([expert.T if orientation == "in_out" else expert for expert in experts], axis=1)
    return BaseWeight(stacked, kind, False)


def local_base(repository: Store) -> Checkpoint | None:
    """The base's files where they are on this machine."""
    known = repository.config.base
    try:
        return open_checkpoint(repository.config.base_place(repository.root), known["revision"], local=True)
    except BaseError:
        return None


def base_norms(repository: Store, weights: Iterable[str]) -> dict[str, float]:
    """The Frobenius norm of base weights.

    Those that facts are written into are in the config; others are computed once and kept in the cache, and left out where the base's files
    are not on this machine.
    """
    config: Mapping[str, Mapping[str, float]] = repository.config.base["weights"]
    found = {weight: config[weight]["norm"] for weight in weights if weight in config}
    others = [weight for weight in weights if weight not in config]
    return found | _kept(repository, NORMS, others, _norm) if others else found


def largest_singular_values(repository: Store, weights: Iterable[str]) -> dict[str, float]:
    """The largest singular value of base weights, computed once and kept in the cache; as `base_norms` where files are missing."""
    return _kept(repository, SPECTRUM, list(weights), lambda weight: largest_singular_value(weight.rows(slice(None))))


def _kept(
    repository: Store, kind: Kind, weights: Sequence[str], compute: Callable[[BaseWeight], float]
) -> dict[str, float]:
    """A number of each base weight, from the cache or computed and put there."""
    slot = repository.cache.slot(kind, of=repository.config.base_id)
    known: dict[str, float] = {weight: value for kept in slot.contents() for weight, value in json.loads(kept).items()}
    missing = [weight for weight in weights if weight not in known]
    checkpoint = local_base(repository) if missing else None
    if checkpoint is not None:
        found: dict[str, float] = {}
        for weight in missing:
            opened = open_weight(checkpoint, weight, _orientation(repository, weight))
            if opened is not None:
                found[weight] = compute(opened)
        if found:
            slot.keep([json.dumps(found, sort_keys=True).encode()])
        known |= found
    return {weight: known[weight] for weight in weights if weight in known}


def _orientation(repository: Store, weight: str) -> str:
    orientation: str = stacked_orientations(repository).get(weight, repository.config.base["orientation"])
    return orientation


def _norm(weight: BaseWeight) -> float:
    """Frobenius norm, some rows at a time."""
    rows, columns = weight.raw.shape
    step = max(1, _SAMPLED_ENTRIES // columns)
    parts = [float(np.linalg.norm(weight.rows(slice(start, start + step)))) for start in range(0, rows, step)]
    return float(np.linalg.norm(parts))


def survival(weight: BaseWeight, deltas: Sequence[Delta], *, entries: int = _SAMPLED_ENTRIES) -> float:
    """The share of a change that the cast keeps: 1 - ||(cast(W0 + D) - W0) - D|| / ||D||, D the sum of the deltas; 0 where less than none.

    1 of a change that is `NEGLIGIBLE` beside the weight. As `runtime.compose.survival`, but on evenly spaced rows of about so many entries.
    """
    rows, columns = weight.raw.shape
    total = add(deltas, (columns, rows) if weight.transposed else (rows, columns))
    part = slice(0, rows, max(1, rows * columns // entries))
    base, wanted = weight.rows(part), _base_rows(total, part, weight.transposed)
    size = float(np.linalg.norm(wanted))
    lost = float(np.linalg.norm(weight.kind.rounded(base + wanted) - base - wanted))
    return 1.0 if size <= NEGLIGIBLE * float(np.linalg.norm(base)) else max(0.0, 1.0 - lost / size)


def _base_rows(delta: Delta, part: slice, transposed: bool) -> Float[np.ndarray, "some columns"]:
    """Some rows of a delta in the orientation of the stored weight, in float32."""
    if isinstance(delta, LowRank):
        left, right = (delta.A.T, delta.B.T) if transposed else (delta.B, delta.A)
        found: Float[np.ndarray, "some columns"] = (left[part] @ right).astype(np.float32)
        return found
    dense = to_dense(delta)
    return (dense.T if transposed else dense)[part].astype(np.float32)


_STEPS: Final = 40  # the value is then right to about a per cent, whatever the gap to the next one

Vector = Float[np.ndarray, " width"]


def largest_singular_value(matrix: Float[np.ndarray, "rows columns"]) -> float:
    """Lower bound of the largest singular value of a matrix, by power iteration."""
    matrix = _at_least_single(matrix)
    return _largest(lambda x: matrix @ x, lambda y: matrix.T @ y, matrix.shape[1], matrix.dtype)


def largest_of_delta(delta: Delta) -> float:
    """Lower bound of the largest singular value of a delta; factors are not multiplied out."""
    if isinstance(delta, LowRank):
        B, A = _at_least_single(delta.B), _at_least_single(delta.A)
        return _largest(lambda x: B @ (A @ x), lambda y: A.T @ (B.T @ y), A.shape[1], A.dtype)
    return largest_singular_value(to_dense(delta))


def _largest(
    apply: Callable[[Vector], Vector], back: Callable[[Vector], Vector], width: int, dtype: np.dtype[Any]
) -> float:
    """max ||M x|| over unit x, M given by its products with vectors from both sides.

    Vectors are of M's own type: a product of two types copies the whole matrix to the wider one, every time.
    """
    x = np.random.default_rng(0).standard_normal(width).astype(dtype)
    value = 0.0
    for _ in range(_STEPS):
        size = float(np.linalg.norm(x))
        if size == 0.0 or not np.isfinite(size):
            return size and value
        y = apply(x / dtype.type(size))
        value, x = float(np.linalg.norm(y)), back(y)
    return value


def _at_least_single(matrix: Float[np.ndarray, "rows columns"]) -> Float[np.ndarray, "rows columns"]:
    """In float32 where it is float16, whose range the steps would leave."""
    return matrix.astype(np.promote_types(matrix.dtype, np.float32), copy=False)


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
        columns: those of its set, each with its weight, against the base's weights whatever additive patches bring, since states are
            held against them. Of many a few at a time are in memory.
    """

    commit: Commit
    elements: frozenset[Element]
    before: State
    after: State
    columns: Iterable[tuple[str, Columns]]


def prepared(repository: Store, commit: Commit) -> Prepared:
    """Read what the guard needs of a commit that `sets.commits.prepare` made."""
    identity, parent = commit.id, states.first_parent(commit)
    blobs = states.state(identity, lambda name: commit if name == identity else repository.commit(name), {})
    elements = (repository.active(parent) - commit.removed) | commit.added
    columns = recorded_columns(repository, frozenset(element for element in elements if element[1] is not None))
    after = read_blobs(repository, blobs, elements if commit.solved else None)
    return Prepared(commit, elements, read_state(repository, parent), after, columns)


def from_vectors(repository: Store, found: Prepared) -> Measured:
    """The checks that need no model.

    Those that need the base's files are left out where the files are not on this machine. A state that an ancestor had is not measured
    again.
    """
    facts = len(found.commit.added)
    if found.commit.same_as is not None or not found.elements:
        return Measured(facts=facts)
    unmet, crushed = _misfits(repository, found)
    checkpoint = local_base(repository)
    if checkpoint is None:
        return Measured(facts=facts, unmet=unmet, crushed=crushed)
    return Measured(
        facts=facts,
        unmet=unmet,
        crushed=crushed,
        spectrum=_spectrum(repository, found),
        survival=_survival(repository, found, checkpoint),
    )


def most_moved(repository: Store, found: Prepared, places: Iterable[Place]) -> list[Place]:
    """Some places of facts, those first whose outputs the change moves most: ||dD k|| / ||r||, the largest over the weights."""
    shapes = tensor_shapes(repository)
    moved: dict[Place, float] = dict.fromkeys(places, 0.0)
    changes: dict[str, Delta] = {}
    for weight, columns in found.columns:
        if weight not in changes:
            changes[weight] = _change(found, weight, shapes[weight])
        change = image(changes[weight], columns.keys)
        asked = np.linalg.norm(columns.residuals.astype(np.float64), axis=1)
        shares = np.linalg.norm(change, axis=1) / np.where(asked > 0, asked, np.inf)
        for element, share in zip(columns.labels, shares.tolist(), strict=True):
            if element in moved:
                moved[element] = max(moved[element], share)
    return sorted(moved, key=lambda place: (-moved[place], place[0], place[1] or ""))


def _misfits(repository: Store, found: Prepared) -> tuple[Share, Share]:
    """(unmet, crushed) of `Measured`."""
    shapes = tensor_shapes(repository)
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


def _contradicted(repository: Store, found: Prepared) -> frozenset[Place]:
    """What stays although an added fact says otherwise about the same prompt and subject."""
    texts = active_requests(repository, found.elements)
    told = {(texts[e].prompt, texts[e].subject) for e in found.commit.added if e in texts}
    return frozenset(
        place
        for place, request in texts.items()
        if place not in found.commit.added and (request.prompt, request.subject) in told
    )


def _worst_misfits(found: Prepared, state: State, shapes: Shapes) -> dict[Element, float]:
    """Each element's largest misfit over the weights."""
    worst: dict[Element, float] = {}
    totals: dict[str, Delta] = {}
    for weight, columns in found.columns:
        if weight not in totals:
            totals[weight] = add(state.get(weight, ()), shapes[weight])
        values = misfit([totals[weight]], columns).tolist()
        for element, value in zip(columns.labels, values, strict=True):
            worst[element] = max(worst.get(element, 0.0), value)
    return worst


def _change(found: Prepared, weight: str, shape: tuple[int, int]) -> Delta:
    after, before = (add(state.get(weight, ()), shape) for state in (found.after, found.before))
    return add([after, negative(before)], shape)


def _spectrum(repository: Store, found: Prepared) -> dict[str, dict[str, float]]:
    """Largest singular values of each weight's base, change and state."""
    shapes = tensor_shapes(repository)
    base = largest_singular_values(repository, found.after)
    values = {}
    for weight in sorted(base):
        values[weight] = {
            "base": base[weight],
            "change": largest_of_delta(_change(found, weight, shapes[weight])),
            "state": largest_of_delta(add(found.after.get(weight, ()), shapes[weight])),
        }
    return values


def _survival(repository: Store, found: Prepared, checkpoint: Checkpoint) -> dict[str, float]:
    kept = {}
    for weight, deltas in sorted(found.after.items()):
        opened = open_weight(checkpoint, weight, _orientation(repository, weight))
        if opened is not None:
            kept[weight] = survival(opened, deltas)
    return kept


PREFIX: Final = "guard."
_SHOWN_FAULTS: Final = 3

_REMEDIES: Final[Mapping[str, str]] = {
    "drift": "Write fewer facts at once, or lower the editor's clamp and learning_rate",
    "total": "Revert facts that are not needed any more, or raise guard.total",
    "own": "Check the prompts and subjects of the facts, or look for better layers with `patchhub tune`",
    "fewest": "Check the prompts and subjects of the facts, or look for better layers with `patchhub tune`",
    "closed": "Look at what the model writes (--json lists it), and lower the editor's clamp and learning_rate",
    "leak": "Write fewer facts with the same prompt at once, or lower the editor's clamp and learning_rate",
    "all": "Leave out the facts that fail, or --all",
    "earlier": "Write fewer facts at once, or take back what they compete with",
    "misfit": "Take contradicting facts back with `patchhub revert --subject`, or commit with --on-conflict replace",
    "spectrum": "Write fewer facts at once, lower the editor's clamp and learning_rate, or raise its ridge",
    "survival": "Use the base in a wider type, or load with the deltas beside the weights",
}


def limits_of(repository: Store) -> Limits:
    """The limits of a repository: the defaults, changed by its settings."""
    settings = repository.config.settings
    return Limits(**{f.name: settings[PREFIX + f.name] for f in fields(Limits) if PREFIX + f.name in settings})


def decided(
    repository: Store,
    measured: Measured,
    *,
    force: bool,
    all_facts: bool = False,
    facts: int | None = None,
    remedy: str | None = None,
) -> dict[str, Any]:
    """What ``check`` says of a measured change: the fields ``guard``, ``forced`` and ``survival`` of docs/format.md.

    Args:
        all_facts: one new fact that fails is enough to refuse it.
        facts: it may drift as much as so many new facts; None: as those that it brings.
        remedy: what to do about a refusal, where that is not a matter of how facts are written.

    Raises:
        GuardError: a check failed and ``force`` is not set.
    """
    judged = measured if facts is None else replace(measured, facts=facts)
    findings = judge(judged, limits_of(repository), all_facts=all_facts)
    if findings and not force:
        raise refusal(findings, remedy, measured.spoken.faults if measured.spoken else ())
    return Report(measured, tuple(finding.words for finding in findings), force).to_json()


def refusal(findings: Sequence[Finding], remedy: str | None = None, faults: Sequence[Fault] = ()) -> GuardError:
    """The error that says what failed, what the limits are and what to do: ``remedy``, or what helps where facts are written."""
    listed = "; ".join(f"{found.words} ({_limit(found)})" for found in findings)
    shown = "".join(f"; {fault.prompt!r} is followed by {fault.continuation!r}" for fault in faults[:_SHOWN_FAULTS])
    return GuardError(
        f"the guard refused this change: {listed}{shown}",
        remedy=f"{remedy or _REMEDIES[findings[0].check]}; --force writes it all the same. Nothing was committed.",
        findings=[asdict(found) for found in findings],
        faults=[fault.to_json() for fault in faults],
    )


def _limit(found: Finding) -> str:
    """Which limit a finding is held against."""
    return "--all" if found.check == "all" else f"{PREFIX}{found.check} is {found.limit:g}"
