"""Ids, bytes and weights of one fixed history, made through the command line; `history` says why they are the same on every machine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load

from patchhub.delta import Dense, LowRank, from_sparse, read_deltas, to_dense, write_deltas
from patchhub.store.store import Store
from tests.pins.history import EPOCH, SHAPE, WEIGHTS, found_in, make_history

PINNED = json.loads((Path(__file__).parent / "history.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("history")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("SOURCE_DATE_EPOCH", EPOCH)
        make_history(made)
    return made


def test_every_commit_has_the_id_that_it_had(folder: Path) -> None:
    assert found_in(folder)["commits"] == PINNED["commits"]


def test_every_object_holds_what_it_held(folder: Path) -> None:
    found = found_in(folder)["objects"]
    for identity, content in PINNED["objects"].items():
        assert found.get(identity) == content
    assert found.keys() == PINNED["objects"].keys()


def test_refs_and_the_chain_of_operations_are_what_they_were(folder: Path) -> None:
    found = found_in(folder)
    for part in ("refs", "operations", "config"):
        assert found[part] == PINNED[part]


def test_the_state_of_every_commit_is_the_solution_in_rational_numbers(folder: Path) -> None:
    """Not to a tolerance: so no BLAS can make another."""
    with Store.open(folder) as repository:
        for ref in ("main", "picks"):
            for identity, _ in repository.log(str(repository.resolve(ref))):
                stored = np.zeros((len(WEIGHTS), *SHAPE))
                for blob in repository.state(identity):
                    for weight, delta in read_deltas(
                        repository.objects.get(blob), dict.fromkeys(WEIGHTS, SHAPE)
                    ).items():
                        stored[WEIGHTS.index(weight)] += to_dense(delta)
                solved = [solution(repository, identity, weight) for weight in WEIGHTS]
                assert [list(map(Fraction, row)) for row in stored[:, 0].tolist()] == solved


def test_the_three_forms_of_a_delta_have_the_bytes_that_they_had() -> None:
    matrix = np.array([[0, 0.5, 0, -2], [0, 0, 0.25, 0]], np.float32)
    factors = LowRank(np.array([[1], [-2]], np.float32), np.array([[0.5, 0, 0, 4]], np.float32))
    data = write_deltas({"a": factors, "b": Dense(matrix), "c": from_sparse(matrix)})
    assert hashlib.sha256(data).hexdigest() == "18e502ee90037c9f66119bcb4da9f8931d8e009aaa5c2d681e49e880669daef9"


def solution(repository: Store, commit: str, weight: str) -> list[Fraction]:
    """X + sum of b_i u_i with M b = R - X K, where M = K U^T + lambda and X is what additive patches bring; for one row of a weight."""
    X = [Fraction(0)] * SHAPE[1]
    rows: list[tuple[Sequence[Fraction], ...]] = []
    for identity, fact in repository.active(commit):
        patch = repository.patch(identity)
        arrays = load(repository.objects.get(patch.tensors))
        if patch.kind == "additive" and weight in patch.weights:
            X = [x + Fraction(value) for x, value in zip(X, arrays[f"{weight}.dense"][0].tolist(), strict=True)]
        elif patch.kind == "closed_form":
            row = patch.requests.index(str(fact))
            parts = (np.ravel(arrays[f"{weight}.{part}"][row]).tolist() for part in ("k", "u", "r", "lambda"))
            rows.append(tuple(list(map(Fraction, part)) for part in parts))
    system = [
        [*(dot(k, u) + ridge[0] * (i == j) for j, (_, u, _, _) in enumerate(rows)), r[0] - dot(X, k)]
        for i, (k, _, r, ridge) in enumerate(rows)
    ]
    for b, (_, u, _, _) in zip(solve(system), rows, strict=True):
        X = [x + b * entry for x, entry in zip(X, u, strict=True)]
    return X


def dot(a: Sequence[Fraction], b: Sequence[Fraction]) -> Fraction:
    return sum((x * y for x, y in zip(a, b, strict=True)), Fraction(0))


def solve(system: list[list[Fraction]]) -> list[Fraction]:
    """Gauss-Jordan without pivoting, for a positive definite matrix with the right-hand side as its last column."""
    for i, pivot in enumerate(system):
        pivot[:] = [entry / pivot[i] for entry in pivot]
        for j, row in enumerate(system):
            if j != i:
                row[:] = [entry - row[i] * other for entry, other in zip(row, pivot, strict=True)]
    return [row[-1] for row in system]
