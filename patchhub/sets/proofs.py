"""Whether the weights of commits are those of their facts: a proof whose cost is linear in what the commits change. NumPy only.

A commit's weights are W0 plus D, the sum of its state's deltas. With X = K L^-1 U^T and Y = R L^-1 U^T of its columns (`constraints`),
and X' the sum of its additive patches, D is what the set asks for exactly where

    E = D (I + X) - Y - X'

is zero. E is never formed. It is looked at from both sides through random directions that are drawn when it is checked, G of shape
(out, s) and V of shape (in, s), as Freivalds (1977, "Probabilistic machines can use less running time") checks a product:

    F = G^T E V = (G^T D) (V + X V) - G^T (Y + X') V

Each part of F follows from the first parent's by what the commit changes: its delta, the columns that come and go, its additive patches. A
history of N columns costs O(N (in + out) s), however many commits it has. V is (I + X_T)^-1 W, with T the union of all columns at hand, so
for the set T itself F is G^T (D - D*) W, D* the solution: the distance to it, whatever the condition of the normal equations, which the
residual in a commit's `check` grows with. Any V gives a valid check, so this one is solved in float32.

G and W are normal, so the mean of |F|^2 / s^2 is the squared Frobenius norm of what is between them, and nobody who does not know them can
choose a delta that they do not see. What they show of a matrix of rank one, the hardest, is its norm times two independent chi_s / sqrt(s);
with s = 16 less than a fifth of it is seen once in about a million times, and less than a tenth never was in 4 10^7.

V shows a set S that is not T more faintly along the keys that S lacks, and whoever writes a history chooses those. So the commits that a
history ends in, and those that refs name, are looked at once more through directions of their own, made for their set.

What is off is compared with D and D*. What float32 loses of the deltas that make D up is excused, but no more of it than is a small share
of D and D*, or of the weight itself: or else two deltas that cancel each other would excuse whatever is between them.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from jaxtyping import Float
from numpy.linalg import LinAlgError

from patchhub.constraints import Columns, blocks, solve
from patchhub.delta import Delta, LowRank, compact, norm, read_delta, read_deltas, to_dense, weights_in
from patchhub.errors import CorruptStoreError, EditError
from patchhub.fsio import Span
from patchhub.objects import Element, Patch
from patchhub.sets.columns import Shapes, read_rows, tensor_shapes, weight_norms
from patchhub.store.states import Proofs, Unprovable, Unproven, solved_commit
from patchhub.store.store import Store

DIRECTIONS: Final = 16
"""Random directions on each side."""

TOLERANCE: Final = 1e-4
"""The distance of weights to their solution, relative to the norms of both, that is still called rounding. Honest histories were measured
below 2e-5 (docs/trust.md)."""

_ROUNDING: Final = 5e-6  # of the norm of the deltas that make up a change: what float32 may lose of them
_MOST_ROUNDING: Final = 0.01  # of the change itself, that is excused as rounding of what cancels in it at the most,
_HARMLESS: Final = 1e-5  # or of the base's weight

_BEYOND: Final = 1e300  # what is off by more than numbers hold

_CANCELLED: Final = (
    1e-6  # of a sum's largest norm: below it is formed anew, so that what float64 lost stays far below the tolerance
)
_PROJECTIONS: Final = 256  # of delta blobs that are kept: a state lists at most half as many
_MOST: Final = 4096  # columns that V is fitted to: more make it no better, and cost their square


class Probe:
    """Random directions for one weight, and what its columns look like through them.

    Attributes:
        right: V.
    """

    def __init__(self, columns: Columns, generator: np.random.Generator) -> None:
        """Draw the directions.

        Args:
            columns: every column that will be asked for, in any order; rows are named by their place here.
        """
        out, inner = columns.shape
        self._left = generator.standard_normal((out, DIRECTIONS))
        self.right = _towards(columns, generator.standard_normal((inner, DIRECTIONS)))
        self._keys = columns.keys
        parts = [(part.preimages, part.residuals, part.ridge) for part in blocks(columns)]
        empty = np.zeros((0, DIRECTIONS))
        seen = [(u.astype(np.float64) @ self.right) / ridge.astype(np.float64)[:, None] for u, _, ridge in parts]
        self._seen: Float[np.ndarray, "n s"] = np.concatenate([empty, *seen])  # u_i V / lambda_i
        asked = [r.astype(np.float64) @ self._left for _, r, _ in parts]
        self._asked: Float[np.ndarray, "n s"] = np.concatenate([empty, *asked])

    def reach(self, rows: Sequence[int]) -> Float[np.ndarray, "in s"]:
        """X V of some columns."""
        reached: Float[np.ndarray, "in s"] = self._keys[rows].astype(np.float64).T @ self._seen[rows]
        return reached

    def ask(self, rows: Sequence[int]) -> Float[np.ndarray, "s s"]:
        """G^T Y V of some columns."""
        asked: Float[np.ndarray, "s s"] = self._asked[rows].T @ self._seen[rows]
        return asked

    def project(self, delta: Delta) -> Float[np.ndarray, "s in"]:
        """G^T D of a delta."""
        projected: Float[np.ndarray, "s in"]
        if isinstance(delta, LowRank):
            projected = (self._left.T @ delta.B.astype(np.float64)) @ delta.A.astype(np.float64)
        else:
            projected = self._left.T @ to_dense(delta)
        return projected


def _towards(columns: Columns, wanted: Float[np.ndarray, "in s"]) -> Float[np.ndarray, "in s"]:
    """(I + X)^-1 W in float32, in the smaller form of the solve; W where that cannot be solved."""
    n, inner = len(columns), columns.shape[1]
    if n > _MOST:
        columns = columns.take(np.linspace(0, n - 1, _MOST).astype(int).tolist())
    if not n:
        return wanted
    scale = (1 / np.sqrt(columns.ridge.astype(np.float32)))[:, None]
    keys, preimages = scale * columns.keys, scale * columns.preimages
    try:
        if len(columns) <= inner:
            gram = preimages @ keys.T
            gram.flat[:: len(gram) + 1] += 1
            found = wanted - keys.T @ np.linalg.solve(gram, preimages @ wanted.astype(np.float32))
        else:
            sums = keys.T @ preimages
            sums.flat[:: inner + 1] += 1
            found = np.linalg.solve(sums, wanted.astype(np.float32)).astype(np.float64)
    except LinAlgError:
        return wanted
    return found if np.isfinite(found).all() else wanted


@dataclass(frozen=True)
class _Seen:
    """One weight at one commit, through the directions.

    Attributes:
        delta: G^T D.
        reached: V + X V.
        asked: G^T (Y + X') V.
        size: the sum of the squared norms of the deltas that make up D.
        base: the norm of the base's weight; 0 where it is not known.
        peaks: the largest norms of `reached` and `asked` that they came from by taking columns back.
    """

    delta: Float[np.ndarray, "s in"]
    reached: Float[np.ndarray, "in s"]
    asked: Float[np.ndarray, "s s"]
    size: float
    base: float
    peaks: tuple[float, float] = (0.0, 0.0)

    @property
    def distance(self) -> float:
        """The norm behind F, relative to those of D and of what is asked for, and to what rounding excuses; 0 where all are 0."""
        off = float(np.linalg.norm(self.delta @ self.reached - self.asked)) / DIRECTIONS
        own = float(np.linalg.norm(self.delta)) / DIRECTIONS**0.5 + float(np.linalg.norm(self.asked)) / DIRECTIONS
        rounding = min(_ROUNDING * float(np.sqrt(self.size)), max(_MOST_ROUNDING * own, _HARMLESS * self.base))
        scale = own + rounding / TOLERANCE
        found = off / scale if scale else 0.0
        return found if np.isfinite(found) else _BEYOND


Heard = Callable[[int], None]
"""Called with how many commits of how many weights are done."""


@np.errstate(over="ignore", invalid="ignore")  # numbers that overflow are numbers that are off
def prove(
    repository: Store,
    commits: Iterable[str],
    *,
    tips: Collection[str] = (),
    generator: np.random.Generator | None = None,
    advance: Heard = lambda done: None,
) -> Proofs:
    """Prove the weights of commits.

    Where a commit's weights are not those of its facts, those of the commits that follow from it are not either, as a rule. The first ones
    are named.

    Args:
        commits: in an order in which every commit comes after its parents. Each must be sound (`store.states.unsound`), with all that it
            refers to in the store; none of it is hashed again.
        tips: those of them that are looked at through directions of their own, besides those that none of the others follows.
        generator: of the directions; None: one that nobody can foresee.

    Raises:
        CorruptStoreError: the tensors of a patch or a commit are not what the format says.
    """
    generator = np.random.default_rng() if generator is None else generator
    plan = _Plan.of(repository, commits, tips)
    worst: dict[str, Unproven] = {}
    for weight in plan.weights:
        for step, off in _Walk(repository, plan, weight, generator).run():
            advance(1)
            if off > TOLERANCE:
                found = Unproven(step.commit, weight, off)
                worst[step.commit] = max(found, worst.get(step.commit, found), key=lambda one: one.distance)
    first = tuple(worst[step.commit] for step in plan.steps if step.commit in worst and step.follows not in worst)
    return Proofs(len(plan.steps) - len(worst), first, unprovable(repository, plan.brought))


def unprovable(repository: Store, elements: Iterable[Element]) -> tuple[Unprovable, ...]:
    """The imported changes and shards among some elements, which no facts prove; by patch id."""
    whole = sorted({identity for identity, request in elements if request is None})
    return tuple(
        Unprovable(identity, patch.kind, patch.method) for identity in whole for patch in [repository.patch(identity)]
    )


@np.errstate(over="ignore", invalid="ignore")
def distance(
    columns: Columns,
    additive: Sequence[Delta],
    deltas: Sequence[Delta],
    generator: np.random.Generator | None = None,
    *,
    base: float = 0.0,
) -> float:
    """How far one weight of one state is from what its columns and additive deltas ask for, as `prove` measures it.

    Args:
        base: the norm of the base's weight; 0 where it is not known.
    """
    probe = Probe(columns, np.random.default_rng() if generator is None else generator)
    every = range(len(columns))
    delta = sum((probe.project(part) for part in deltas), np.zeros((DIRECTIONS, columns.shape[1])))
    asked = probe.ask(every) + sum((probe.project(part) @ probe.right for part in additive), np.zeros(()))
    reached = probe.right + probe.reach(every)
    size = sum(norm(part) ** 2 for part in deltas)
    return _Seen(delta, reached, asked, size, base).distance


def check_state(
    elements: Iterable[Element],
    state: Mapping[str, Sequence[Delta]],
    shapes: Shapes,
    *,
    patch_of: Callable[[str], Patch],
    file_of: Callable[[Patch], Span],
) -> None:
    """Prove one state alone.

    Args:
        elements: its set.
        state: its deltas by weight.
        shapes: (out, in) of every weight that may be changed.
        patch_of: a patch by its id.
        file_of: the verified file of a patch's tensors.

    Raises:
        CorruptStoreError: its weights are not those of its facts.
    """
    elements = frozenset(elements)
    patches = {identity: patch_of(identity) for identity in {identity for identity, _ in elements}}
    files = {patch.tensors: file_of(patch) for patch in patches.values() if patch.kind != "shard"}
    additive: dict[str, list[Delta]] = {}
    for patch in patches.values():
        if patch.kind == "additive":
            for weight, delta in read_deltas(files[patch.tensors].read(), patch.weights).items():
                additive.setdefault(weight, []).append(delta)
    asked = {weight for patch in patches.values() if patch.kind == "closed_form" for weight in patch.weights}
    for weight in sorted(asked | additive.keys() | state.keys()):
        columns = read_rows(patches.__getitem__, files.__getitem__, elements, weight, _shape_of(shapes, weight))
        off = distance(columns, additive.get(weight, ()), state.get(weight, ()))
        if off > TOLERANCE:
            raise CorruptStoreError(
                f"the weights are not those of the facts: {weight} is off by {off:.2%} of the change",
                remedy="Do not use them, or leave out the proof if you trust who made them.",
                weight=weight,
                distance=off,
            )


def _shape_of(shapes: Shapes, weight: str) -> tuple[int, int]:
    try:
        return shapes[weight]
    except KeyError:
        raise CorruptStoreError(
            f"a commit changes {weight!r}, which is no weight of the base", remedy="Do not use it.", weight=weight
        ) from None


def _weights_of(repository: Store, part: str) -> Iterable[str]:
    """The weights that a part of a state changes."""
    commit = solved_commit(part)
    if commit is None:
        return weights_in(repository.objects.place(part))
    patches = map(repository.patch, {patch for patch, request in repository.active(commit) if request is not None})
    return {weight for patch in patches for weight in patch.weights}


@dataclass(frozen=True)
class _Step:
    """One commit: what it changes, the parts of its state, and the commit whose state that follows from."""

    commit: str
    parent: str | None
    removed: frozenset[Element]
    added: frozenset[Element]
    state: tuple[str, ...]
    follows: str | None = None

    @property
    def is_solved(self) -> bool:
        """Whether its state is what is solved from its set, so that there is nothing to prove."""
        return len(self.state) == 1 and solved_commit(self.state[0]) is not None


@dataclass(frozen=True)
class _Plan:
    """What is to be proven.

    Attributes:
        steps: the commits.
        starts: their parents that are not among them, as changes of nothing.
        blobs: for each weight the parts of states and additive patches' tensors that change it.
        weights: every weight that facts, deltas or additive patches are of, in order.
        ends: the steps that are looked at through directions of their own.
        carried: the solved parts that other deltas stand on.
    """

    steps: tuple[_Step, ...]
    starts: Mapping[str, _Step]
    blobs: Mapping[str, frozenset[str]]
    weights: tuple[str, ...]
    ends: frozenset[str]
    carried: frozenset[str]

    @classmethod
    def of(cls, repository: Store, commits: Iterable[str], tips: Collection[str]) -> _Plan:
        steps = []
        for identity in commits:
            commit = repository.commit(identity)
            parent = next(iter(commit.parents), None)
            state = repository.state(identity)
            follows = commit.same_as or parent
            steps.append(_Step(identity, parent, commit.removed, commit.added, state, follows))
        known = {step.commit for step in steps}
        below = {step.parent for step in steps if step.parent is not None} - known
        starts = {
            identity: _Step(identity, None, frozenset(), repository.active(identity), repository.state(identity))
            for identity in below
        }
        every = [*starts.values(), *steps]
        patches = {identity: repository.patch(identity) for step in every for identity, _ in step.added}
        additive = {patch.tensors for patch in patches.values() if patch.kind == "additive"}
        blobs: dict[str, set[str]] = {}
        for part in additive.union(*(step.state for step in every)):
            for weight in _weights_of(repository, part):
                blobs.setdefault(weight, set()).add(part)
        asked = {weight for patch in patches.values() if patch.kind == "closed_form" for weight in patch.weights}
        frozen = {weight: frozenset(found) for weight, found in blobs.items()}
        ends = (known - {parent for step in steps for parent in repository.parents(step.commit)}) | known.intersection(
            tips
        )
        carried = {part for step in every if len(step.state) > 1 for part in step.state if solved_commit(part)}
        weights = tuple(sorted(asked | frozen.keys()))
        return cls(tuple(steps), starts, frozen, weights, frozenset(ends), frozenset(carried))

    @property
    def brought(self) -> frozenset[Element]:
        """Every element that a commit adds."""
        return frozenset().union(*(step.added for step in self.steps))

    @property
    def elements(self) -> frozenset[Element]:
        """Every element that is active anywhere."""
        return self.brought.union(*(start.added for start in self.starts.values()))


class _Walk:
    """One weight's way through the commits of a plan."""

    def __init__(self, repository: Store, plan: _Plan, weight: str, generator: np.random.Generator) -> None:
        self._repository = repository
        self._plan = plan
        self._weight = weight
        self._shape = _shape_of(tensor_shapes(repository), weight)
        patch_of, file_of = repository.patch, repository.objects.place
        self._columns = read_rows(patch_of, file_of, plan.elements, weight, self._shape)
        self._place = {element: row for row, element in enumerate(self._columns.labels)}
        self._generator = generator
        self._probe = Probe(self._columns, generator)
        self._base = weight_norms(repository).get(weight, 0.0)
        self._blobs = plan.blobs.get(weight, frozenset())
        self._projections: OrderedDict[str, tuple[Float[np.ndarray, "s in"], float]] = OrderedDict()
        inner = self._shape[1]
        nothing = np.zeros((DIRECTIONS, DIRECTIONS))
        self._nothing = _Seen(np.zeros((DIRECTIONS, inner)), self._probe.right, nothing, 0.0, self._base)

    def run(self) -> Iterator[tuple[_Step, float]]:
        """Each commit with the distance of its weight to what its set asks for."""
        live: dict[str | None, tuple[_Step | None, _Seen]] = {None: (None, self._nothing)}
        for identity, start in self._plan.starts.items():
            live[identity] = (start, self._after(start, None, self._nothing))
        waiting = Counter(step.parent for step in self._plan.steps)
        for step in self._plan.steps:
            parent, before = live[step.parent]
            seen = self._after(step, parent, before)
            alone = self._alone(step) if step.commit in self._plan.ends else 0.0
            yield step, alone if step.is_solved else max(seen.distance, alone)
            waiting[step.parent] -= 1
            if step.parent is not None and not waiting[step.parent]:
                del live[step.parent]
            if waiting[step.commit]:
                live[step.commit] = (step, seen)

    def _after(self, step: _Step, parent: _Step | None, before: _Seen) -> _Seen:
        """The weight after a commit, from what it was at its parent."""
        gone, come = self._rows(step.removed), self._rows(step.added)
        reached, asked = before.reached, before.asked
        if gone or come:
            reached = reached + self._probe.reach(come) - self._probe.reach(gone)
            asked = asked + self._probe.ask(come) - self._probe.ask(gone)
        for elements, sign in ((step.removed, -1.0), (step.added, 1.0)):
            for blob in self._additive(elements):
                asked = asked + sign * self._project(blob)[0] @ self._probe.right
        then, now = ([blob for blob in (at.state if at else ()) if blob in self._blobs] for at in (parent, step))
        if reached is before.reached and asked is before.asked and then == now:
            return before
        goes_on = now[: len(then)] == then
        if step.is_solved and step.state[0] not in self._plan.carried:
            now = []
        found = [self._project(blob) for blob in (now[len(then) :] if goes_on else now)]
        start = before if goes_on else self._nothing
        delta = sum((projected for projected, _ in found), start.delta)
        size = start.size + sum(size for _, size in found)
        norms = float(np.linalg.norm(reached)), float(np.linalg.norm(asked))
        peaks = max(norms[0], before.peaks[0]), max(norms[1], before.peaks[1])
        if any(norm < _CANCELLED * peak for norm, peak in zip(norms, peaks, strict=True)):
            reached, asked = self._anew(step.commit)
            peaks = float(np.linalg.norm(reached)), float(np.linalg.norm(asked))
        return _Seen(delta, reached, asked, size, self._base, peaks)

    def _alone(self, step: _Step) -> float:
        """The distance of one commit through directions that are made for its set; 0 where those of the walk are.

        A solved state is its solution, if it has one.
        """
        if step.is_solved:
            try:
                found = norm(self._read(step.state[0]))
            except EditError:
                return _BEYOND
            return 0.0 if np.isfinite(found) else _BEYOND
        elements = self._repository.active(step.commit)
        rows = self._rows(elements)
        if len(rows) == len(self._columns):
            return 0.0
        additive = [self._read(blob) for blob in self._additive(elements)]
        deltas = [self._read(blob) for blob in step.state if blob in self._blobs]
        return distance(self._columns.take(rows), additive, deltas, self._generator, base=self._base)

    def _anew(self, commit: str) -> tuple[Float[np.ndarray, "in s"], Float[np.ndarray, "s s"]]:
        """V + X V and G^T (Y + X') V of a whole set: where almost all was taken back, little but rounding errors is left of the sums."""
        elements = self._repository.active(commit)
        rows = self._rows(elements)
        asked = self._probe.ask(rows)
        for blob in self._additive(elements):
            asked = asked + self._project(blob)[0] @ self._probe.right
        return self._probe.right + self._probe.reach(rows), asked

    def _rows(self, elements: Iterable[Element]) -> list[int]:
        return [self._place[element] for element in elements if element in self._place]

    def _additive(self, elements: Iterable[Element]) -> list[str]:
        patches = (self._repository.patch(identity) for identity, request in elements if request is None)
        return [p.tensors for p in patches if p.kind == "additive" and p.tensors in self._blobs]

    def _read(self, blob: str) -> Delta:
        commit = solved_commit(blob)
        if commit is not None:
            rows = self._rows(sorted(self._repository.active(commit), key=lambda one: (one[0], one[1] or "")))
            return compact(solve(self._columns.take(rows)))
        return read_delta(self._repository.objects.place(blob), self._weight, self._shape)

    def _project(self, blob: str) -> tuple[Float[np.ndarray, "s in"], float]:
        """G^T D of a blob, and the squared norm of D."""
        if blob in self._projections:
            self._projections.move_to_end(blob)
            return self._projections[blob]
        projected = self._probe.project(self._read(blob))
        size = float(np.sum(projected * projected)) / DIRECTIONS
        self._projections[blob] = projected, size
        if len(self._projections) > _PROJECTIONS:
            self._projections.popitem(last=False)
        return projected, size
