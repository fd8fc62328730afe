"""`log`, its drawings and selections, and `diff`: each against what a direct reading of the same store says."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from patchhub.cli.lanes import Drawing, draw
from patchhub.cli.main import main
from patchhub.delta import Dense, from_factors, inner, numerical_rank, to_dense
from patchhub.errors import PatchhubError, RequestError, SettingsError
from patchhub.porcelain.columns import read_state
from patchhub.porcelain.difference import changed_answers, weight_steps
from patchhub.porcelain.history import log, nearest
from patchhub.porcelain.progress import Silent
from patchhub.porcelain.times import duration, instant
from patchhub.store.graph import ancestors
from patchhub.store.lookup import Selection
from patchhub.store.repository import Repository
from tests.porcelain.taught import PLACES, TONGUES, fact, make_store

NOW = "2026-11-21T09:30:00Z"


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Repository]:
    with make_store(tmp_path_factory.mktemp("taught")) as made:
        yield made


# --- drawings -------------------------------------------------------------------------------------------------------


def drawing(history: str) -> str:
    """`history` lists commits, newest first, as "id:parents"."""
    commits = [(item[0], list(item[2:])) for item in history.split()]
    rows = zip(draw(commits), commits, strict=True)
    return "\n".join(line for drawn, (name, _) in rows for line in drawn.beside([name]))


@pytest.mark.parametrize(
    ("history", "expected"),
    [
        ("C:B B:A A:", ["* C", "* B", "* A"]),
        ("M:BC C:A B:A A:", ["*   M", "|\\", "| * C", "* | B", "|/", "* A"]),
        ("M:BC B:A C:A A:", ["*   M", "|\\", "* | B", "| * C", "|/", "* A"]),
        ("X:A Y:A A:", ["* X", "| * Y", "|/", "* A"]),
        ("M:ABC C:R B:R A:R R:", ["*     M", "|\\", "| |\\", "| | * C", "| * | B", "| |/", "* | A", "|/", "* R"]),
        ("B: A:", ["* B", "* A"]),
        ("M:AB A:R B:R2 R: 2:", None),
        ("D:B E:C B:A C: A:", ["* D", "| * E", "* | B", "| * C", "* A"]),
        ("N:ML M:BC L:B C:A B:A A:", None),
    ],
)
def test_golden_drawings(history: str, expected: list[str] | None) -> None:
    found = drawing(history).splitlines()
    if expected is not None:
        assert found == expected
    assert sum("*" in line for line in found) == len(history.split())


histories = st.lists(st.lists(st.integers(1, 4), max_size=3, unique=True), min_size=1, max_size=12)


@given(histories)
def test_lines_lead_from_each_commit_to_its_parents(steps: list[list[int]]) -> None:
    """Following the lines of a drawing reaches every parent; where lines cross it may reach others too."""
    size = len(steps)
    commits = [(n, sorted({n + step for step in back if n + step < size})) for n, back in enumerate(steps)]
    found = parents_read_off(list(draw((str(n), list(map(str, up))) for n, up in commits)))
    for commit, up in commits:
        assert found[commit] >= set(up)


def parents_read_off(drawings: Sequence[Drawing]) -> dict[int, set[int]]:
    """Follow the lines: each cell of the row above hands its lines on to the cells that touch it."""
    parents: dict[int, set[int]] = {number: set() for number in range(len(drawings))}
    lines: dict[int, set[int]] = {}  # column -> commits whose lines arrive there
    for number, drawn in enumerate(drawings):
        row, edges = drawn.commit, drawn.edges
        place = row.index("*") // 2
        for child in lines.get(place, set()):
            parents[child].add(number)
        lines = {column: found for column, found in lines.items() if column != place} | {place: {number}}
        if not edges and len(drawn.lanes) < len(row):
            del lines[place]
        for edge in edges:
            after: dict[int, set[int]] = {}
            for cell, sign in enumerate(edge):
                for source, target in {
                    "|": [(cell // 2, cell // 2)],
                    "/": [((cell + 1) // 2, (cell - 1) // 2)],
                    "\\": [((cell - 1) // 2, (cell + 1) // 2)],
                    "X": [((cell + 1) // 2, (cell - 1) // 2), ((cell - 1) // 2, (cell + 1) // 2)],
                    " ": [],
                }[sign]:
                    after.setdefault(target, set()).update(lines.get(source, set()))
            lines = after
    return parents
