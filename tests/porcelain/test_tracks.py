"""The drawing of the history: every line that leaves a commit arrives at its parent, and no two commits share a line."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from patchhub.porcelain.report.report import Place, lay_out

History = list[tuple[str, list[str]]]


@st.composite
def histories(draw: st.DrawFn) -> History:
    """Commits numbered from the newest, each with up to three older parents, in any order and with repetitions."""
    size = draw(st.integers(1, 25))
    older = [st.lists(st.integers(n + 1, size - 1), max_size=3) if n + 1 < size else st.just([]) for n in range(size)]
    return [(str(n), [str(parent) for parent in draw(older[n])]) for n in range(size)]


def arrives(places: list[Place], row: int, column: int, target: int) -> bool:
    """Whether a line in that column at a row leads straight on to the commit of the target row."""
    while row < target:
        onward = [to for start, to in places[row].lines if start == column]
        if len(onward) != 1:
            return False
        row, column = row + 1, onward[0]
    return places[target].track == column


@given(histories())
def test_every_line_leads_to_its_parent(history: History) -> None:
    places = list(lay_out(history))
    for row, (_, parents) in enumerate(history):
        passing = {start for start, _ in places[row].lines if start != places[row].track}
        onward = [to for start, to in places[row].lines if start == places[row].track]
        assert len(onward) == len(set(parents))
        assert places[row].track not in passing
        for parent in set(parents):
            assert any(arrives(places, row + 1, column, int(parent)) for column in onward)


@given(histories())
def test_lines_begin_where_lines_end(history: History) -> None:
    places = list(lay_out(history))
    assert not places[-1].lines
    for above, below in pairwise(places):
        ends = {to for _, to in above.lines}
        assert ends - {below.track} == {start for start, _ in below.lines if start != below.track}


@given(histories())
def test_columns_are_never_more_than_what_is_awaited(history: History) -> None:
    places = list(lay_out(history))
    rows = {commit: row for row, (commit, _) in enumerate(history)}
    widest = max(max(place.track, *(column for line in place.lines for column in line), 0) for place in places)
    awaited = [
        len({parent for _, parents in history[: row + 1] for parent in parents if rows[parent] > row} | {"itself"})
        for row in range(len(history))
    ]
    assert widest <= max(awaited) + 1


def test_a_line_of_commits_is_one_straight_line() -> None:
    history = [(str(n), [str(n + 1)]) for n in range(9)] + [("9", [])]
    assert {place.track for place in lay_out(history)} == {0}


def test_a_merged_branch_leaves_the_main_line_where_it_is() -> None:
    history = [("merge", ["main", "side"]), ("side", ["root"]), ("main", ["root"]), ("root", [])]
    assert [place.track for place in lay_out(history)] == [0, 1, 0, 0]
    assert list(lay_out(history))[2].lines == ((1, 0), (0, 0))


def test_a_parent_that_does_not_come_is_awaited_to_the_end() -> None:
    places = list(lay_out([("a", ["elsewhere"]), ("b", [])]))
    assert places == [Place(0, ((0, 0),)), Place(1, ((0, 0),))]
