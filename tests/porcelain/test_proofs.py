"""Weights are proven to be those of their facts: a lie is found at its commit and its weight, and no honest history is refused."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from patchhub.constraints import Columns, solve
from patchhub.delta import Delta, Dense, LowRank, add, compact, norm, read_deltas, to_dense, write_deltas
from patchhub.errors import CorruptStoreError, EditError, RemoteError
from patchhub.objects import Element, Patch, requests_json
from patchhub.porcelain import share
from patchhub.porcelain.history import show
from patchhub.porcelain.refs import fsck
from patchhub.progress import Silent
from patchhub.sets.columns import write_columns
from patchhub.sets.commits import Draft, prepare, record
from patchhub.sets.proofs import TOLERANCE, check_state, distance, prove
from patchhub.store.fsck import every_commit
from patchhub.store.states import oldest_first
from patchhub.store.store import Store
from tests.porcelain.synthetic import AUTHOR, BY, SHAPES, TIME, Synthetic, make_request, make_store, stamp, write

WEIGHT = "h.1"


def columns_of(rng: np.random.Generator, n: int, out: int = 20, inner: int = 60) -> Columns:
    """Columns whose keys lie near one another, as those of a model do, so that I + X is far from orthogonal."""
    moment = np.diag(np.logspace(0, -4, inner))
    keys = (rng.standard_normal(inner) * 3 + rng.standard_normal((n, inner))) @ np.sqrt(moment)
    preimages = np.linalg.solve(moment, keys.T).T
    residuals = rng.standard_normal((n, out))
    arrays = (part.astype(np.float32) for part in (keys, preimages, residuals, np.full(n, inner / 8)))
    return Columns(*arrays)


@pytest.mark.parametrize("n", [1, 2, 30, 200])
def test_the_distance_is_that_to_the_solution_in_whatever_direction(n: int) -> None:
    rng = np.random.default_rng(n)
    columns = columns_of(rng, n)
    solution = compact(solve(columns))
    size = norm(solution)
    assert distance(columns, [], [solution]) < TOLERANCE / 100
    left, right = rng.standard_normal((20, 1)), rng.standard_normal((1, 60))
    steep = np.linalg.svd(np.eye(60) + columns.keys.T.astype(float) @ (columns.preimages / columns.ridge[:, None]))[0]
    beside = right - right @ np.linalg.pinv(columns.keys.astype(float)) @ columns.keys
    directions = {
        "any": right,
        "a key": columns.keys[:1],
        "a preimage": columns.preimages[:1],
        "flattest": steep[:, -1:].T,
    }
    for name, direction in {**directions, **({"beside all keys": beside} if n < 60 else {})}.items():
        for share_of in (0.01, 1.0):
            lie = LowRank(left * (share_of * size / (np.linalg.norm(left) * np.linalg.norm(direction))), direction)
            found = distance(columns, [], [solution, lie])
            expected = share_of * size / (np.hypot(size, share_of * size) + size)
            assert expected / 5 < found < expected * 5, (name, share_of)


def rewritten(commit: str, store: Synthetic, change: Callable[[Delta], Delta]) -> str:
    """The history above a commit once more, with another delta of one weight in that commit; returns the new tip."""
    repository = store.repository
    names: dict[str, str] = {}
    for identity in oldest_first([str(repository.head[1])], repository.parents):
        made = repository.commit(identity)
        made = replace(
            made,
            parents=tuple(names.get(parent, parent) for parent in made.parents),
            same_as=None if made.same_as is None else names.get(made.same_as, made.same_as),
        )
        if identity == commit:
            deltas = read_deltas(repository.objects.get(str(made.tensors)), SHAPES)
            deltas[WEIGHT] = change(deltas[WEIGHT])
            made = replace(made, tensors=repository.objects.put(write_deltas(deltas)))
        names[identity] = repository.objects.put(made.to_json())
    return names[str(repository.head[1])]


def put_back(store: Synthetic, tip: str) -> None:
    repository = store.repository
    head = str(repository.head[1])
    repository.move_refs({"refs/heads/main": (head, tip)}, command="reset", arguments={}, author=AUTHOR, time=TIME)


LIES: dict[str, Callable[[Delta], Delta]] = {
    "the negative": lambda delta: Dense(-3 * to_dense(delta).astype(np.float32)),
    "nothing": lambda delta: Dense(np.zeros_like(to_dense(delta), np.float32)),
    "one entry": lambda delta: Dense((to_dense(delta) + np.eye(12, 24) * (0.01 * norm(delta))).astype(np.float32)),
    "a hundredth more": lambda delta: Dense((1.01 * to_dense(delta)).astype(np.float32)),
}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Synthetic]:
    """Five commits of two facts, of which one takes a fact back."""
    made = make_store(tmp_path / "store")
    for number in range(5):
        gone = sorted(made.active())[:1] if number == 3 else []
        made.commit(make_request(f"Ada {number}"), make_request(f"Bob {number}"), remove=gone)
    yield made
    made.repository.close()


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_found_at_its_commit_and_weight_whatever_stands_above_it(lie: str, store: Synthetic) -> None:
    repository = store.repository
    honest = every_commit(repository)
    assert prove(repository, honest).unproven == ()
    for place, commit in enumerate(honest):
        made = repository.commit(commit)
        if made.tensors is None or made.keyframe is not None:
            continue
        tip = rewritten(commit, store, LIES[lie])
        put_back(store, tip)
        commits = [c for c in oldest_first([tip], repository.parents) if c not in honest]
        (found,) = prove(repository, commits).unproven
        assert (found.commit, found.weight) == (commits[0], WEIGHT), place
        assert found.distance > 10 * TOLERANCE
        put_back(store, honest[-1])


def test_what_is_proven_does_not_depend_on_where_the_proof_begins(store: Synthetic) -> None:
    commits = every_commit(store.repository)
    for start in range(len(commits)):
        assert prove(store.repository, commits[start:]).commits == len(commits) - start


def test_what_is_left_when_all_is_taken_back_is_proven_too(store: Synthetic) -> None:
    """Rounding errors of sums that cancel are not taken for weights."""
    repository = store.repository
    elements = sorted(store.active())
    for gone in (elements[1:], elements[:1]):
        head = str(repository.head[1])
        draft = Draft((head,), store.active() - frozenset(gone), repository.commit(head).metric, "revert", {})
        write(repository, draft, stamp("taken back"))
    assert not store.active()
    for number in range(2):
        store.commit(make_request(f"Eve {number}"))
    report = fsck(repository, Silent())
    assert report.sound
    assert report.proofs.commits == len(every_commit(repository))


def test_one_state_is_proven_alone(store: Synthetic) -> None:
    repository = store.repository
    head = str(repository.head[1])
    columns_only = {"patch_of": repository.patch, "file_of": lambda patch: repository.objects.place(patch.tensors)}
    from patchhub.sets.columns import read_state

    state = read_state(repository, head)
    check_state(repository.active(head), state, SHAPES, **columns_only)
    lying = {**state, WEIGHT: [add([*state[WEIGHT], Dense(0.01 * to_dense(state[WEIGHT][0]))], SHAPES[WEIGHT])]}
    with pytest.raises(CorruptStoreError, match=WEIGHT):
        check_state(repository.active(head), lying, SHAPES, **columns_only)
    with pytest.raises(CorruptStoreError, match="not those of the facts"):
        check_state(frozenset(), state, SHAPES, **columns_only)


def test_a_lie_is_refused_unless_it_is_trusted_and_then_stays_visible(store: Synthetic, tmp_path: Path) -> None:
    honest = every_commit(store.repository)
    put_back(store, rewritten(honest[-1], store, LIES["the negative"]))
    share.remote_add(store.repository, "origin", str(tmp_path / "remote"))
    share.push(store.repository, "origin", share.CURRENT, Silent(), who=BY)
    assert not fsck(store.repository, Silent()).sound
    receiver = make_store(tmp_path / "receiver").repository
    share.remote_add(receiver, "origin", str(tmp_path / "remote"))
    before = receiver.refs()
    with pytest.raises(RemoteError, match=rf"not those of its facts, {re.escape(WEIGHT)}") as refused:
        share.fetch(receiver, "origin", Silent(), who=BY)
    assert "--trust" in str(refused.value.remedy)
    assert receiver.refs() == before
    fetched = share.fetch(receiver, "origin", Silent(), who=BY, trust=True)
    (lying,) = fetched.proofs.unproven
    assert fetched.proofs.commits == len(honest) - 1
    assert any("trusted" in warning for warning in fetched.warnings)
    report = fsck(receiver, Silent())
    assert report.sound
    assert [finding.facts["commit"] for finding in report.findings] == [lying.commit]
    assert show(receiver, lying.commit).standing == ("trusted", lying.commit)
    assert show(receiver, f"{lying.commit}~1").standing == ("checked", None)


def forged(store: Synthetic, subject: str, keys: np.ndarray, *, size: float = 1.0, ridge: float = 3.0) -> Patch:
    """A patch of one fact whose column is chosen: its key for both weights, the size of its residuals, and lambda."""
    repository, request = store.repository, make_request(subject)
    columns = {}
    for weight, (out, _) in SHAPES.items():
        residuals = (size * store.rng.standard_normal((1, out))).astype(np.float32)
        columns[weight] = Columns(keys, keys, residuals, np.full(1, ridge, np.float32))
    patch = Patch(
        base=repository.config.base_id,
        kind="closed_form",
        made_on=None,
        method="memit",
        metric=store.put_metric("text"),
        requests=(request.id,),
        requests_blob=repository.objects.put(requests_json([request])),
        settings={},
        tensors=repository.objects.put(write_columns(columns, np.zeros((1, 4)))),
        weights=SHAPES,
    )
    repository.objects.put(patch.to_json())
    return patch


def commit_elements(store: Synthetic, elements: frozenset[Element], metric: str, lie: np.ndarray | None = None) -> str:
    """Commit a set on HEAD; with a lie added to the delta of one weight, and never as a keyframe."""
    repository = store.repository
    _, head = repository.head
    draft = Draft((head,) if head else (), elements, metric, "commit", {})
    if lie is None:
        return write(repository, draft, stamp())
    made = prepare(repository, draft, stamp())
    deltas = read_deltas(repository.objects.get(str(made.tensors)), SHAPES)
    deltas[WEIGHT] = Dense((to_dense(deltas[WEIGHT]) + lie).astype(np.float32))
    tensors = repository.objects.put(write_deltas(deltas))
    return record(repository, replace(made, keyframe=None, tensors=tensors), draft)


def test_a_lie_does_not_hide_between_deltas_that_cancel(tmp_path: Path) -> None:
    """Somebody writes a fact of a huge residual and takes it back: what float32 may lose of that excuses no other change."""
    store = make_store(tmp_path / "store")
    keys = [store.rng.standard_normal((1, 24)).astype(np.float32) for _ in range(3)]
    small, huge, last = (forged(store, f"Ada {n}", key, size=10.0 ** (6 * (n == 1))) for n, key in enumerate(keys))
    metric = str(small.metric)
    commit_elements(store, small.elements, metric)
    commit_elements(store, small.elements | huge.elements, metric)
    tip = commit_elements(store, small.elements | last.elements, metric, store.rng.standard_normal((12, 24)))
    (found,) = prove(store.repository, every_commit(store.repository)).unproven
    assert (found.commit, found.weight) == (tip, WEIGHT)


@pytest.mark.parametrize("where", ["another branch", "a fact that was taken back"])
def test_a_lie_does_not_hide_along_the_key_of_a_fact_that_is_not_active(where: str, tmp_path: Path) -> None:
    """Whoever lies chooses the other facts too: one of great weight, whose key sees the lie as no active one does."""
    store = make_store(tmp_path / "store")
    repository = store.repository
    keys = store.rng.standard_normal((3, 24))
    aside = (keys[2] - keys[2] @ np.linalg.pinv(keys[:2]) @ keys[:2]).astype(np.float32)[None]
    first, second = (forged(store, f"Ada {n}", key.astype(np.float32)[None]) for n, key in enumerate(keys[:2]))
    heavy = forged(store, "Eve", aside, ridge=1e-5)
    metric = str(first.metric)
    root = commit_elements(store, first.elements, metric)
    lie = np.outer(store.rng.standard_normal(12), aside)
    if where == "another branch":
        commit_elements(store, first.elements | heavy.elements, metric)
        other = {"refs/heads/other": (None, root), "HEAD": ("ref: refs/heads/main", "ref: refs/heads/other")}
        repository.move_refs(other, command="switch", arguments={}, author=AUTHOR, time=TIME)
    else:
        commit_elements(store, first.elements | heavy.elements, metric)
        commit_elements(store, first.elements, metric)
    tip = commit_elements(store, first.elements | second.elements, metric, lie)
    commits = every_commit(repository)
    assert [found.commit for found in prove(repository, commits).unproven] == [tip]
    store.commit(make_request("Bob"))
    commits = every_commit(repository)
    assert tip in [found.commit for found in prove(repository, commits, tips=[tip]).unproven]


def test_numbers_that_overflow_prove_nothing(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store")
    patch = forged(store, "Ada", np.full((1, 24), 3e38, np.float32), ridge=1e-45)
    with np.errstate(over="ignore", invalid="ignore"):
        tip = commit_elements(store, patch.elements, str(patch.metric), np.ones((12, 24)))
    assert [found.commit for found in prove(store.repository, [tip]).unproven] == [tip]


def test_a_change_that_float32_does_not_hold_is_refused(tmp_path: Path) -> None:
    """Columns that somebody else wrote may ask for more than numbers hold, by themselves or once another is taken back."""
    store = make_store(tmp_path / "store")
    key = np.full((1, 24), 1e-20, np.float32)
    heavy = forged(store, "Ada", key, size=1e37, ridge=1e-30)
    with pytest.raises(EditError, match="too large for float32"):
        commit_elements(store, heavy.elements, str(heavy.metric))
    assert store.repository.head[1] is None


def test_a_history_that_was_fetched_before_proofs_is_its_authors_claim(store: Synthetic, tmp_path: Path) -> None:
    head = str(store.repository.head[1])
    share.remote_add(store.repository, "origin", str(tmp_path / "remote"))
    share.push(store.repository, "origin", share.CURRENT, Silent(), who=BY)
    receiver = make_store(tmp_path / "receiver").repository
    share.remote_add(receiver, "origin", str(tmp_path / "remote"))
    share.fetch(receiver, "origin", Silent(), who=BY)
    assert show(receiver, head).standing == ("checked", None)
    connection = receiver.connection
    connection.execute("UPDATE operations SET json = replace(json, '\"proven\":5,', '')")
    ((sequence, data),) = connection.execute("SELECT seq, json FROM operations WHERE json LIKE '%fetch%'").fetchall()
    from patchhub.canonical import object_id

    connection.execute("UPDATE operations SET id = ? WHERE seq = ?", (object_id(data.encode()), sequence))
    with Store.open(tmp_path / "receiver") as again:
        assert show(again, head).standing == ("claimed", None)
