"""History as a graph, against brute force on small random ones."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from patchhub.store import states

Graph = dict[str, tuple[str, ...]]


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    """Commits "a", "b", ...: each has up to three parents among the earlier ones, in any order."""
    names = "abcdefghij"[: draw(st.integers(1, 10))]
    made: Graph = {}
    for name in names:
        earlier = list(made)
        parents = draw(st.lists(st.sampled_from(earlier), max_size=3, unique=True)) if earlier else []
        made[name] = tuple(parents)
    return made


def ranks(history: Graph, data: st.DataObject) -> dict[str, int]:
    """Any numbers that are larger than those of all parents."""
    rank: dict[str, int] = {}
    for commit, parents in history.items():
        rank[commit] = max([data.draw(st.integers(0, 3)), *(rank[parent] + 1 for parent in parents)])
    return rank


def reach(history: Graph) -> set[tuple[str, str]]:
    """All pairs (commit, ancestor), itself included: the transitive closure by repetition."""
    pairs = {(commit, commit) for commit in history}
    while True:
        more = {(commit, above) for commit, below in pairs for above in history[below]} | pairs
        if more == pairs:
            return pairs
        pairs = more


@given(graphs(), st.data())
def test_ancestors(history: Graph, data: st.DataObject) -> None:
    starts = data.draw(st.lists(st.sampled_from(sorted(history))))
    pairs = reach(history)
    assert states.ancestors(starts, history.__getitem__) == {b for a, b in pairs if a in starts}
    for left, right in itertools.product(history, repeat=2):
        assert states.is_ancestor(left, right, history.__getitem__) == ((right, left) in pairs)


@given(graphs())
def test_merge_bases_are_the_best_common_ancestors(history: Graph) -> None:
    pairs = reach(history)
    for left, right in itertools.product(history, repeat=2):
        common = {c for c in history if (left, c) in pairs and (right, c) in pairs}
        best = {c for c in common if not any(other != c and (other, c) in pairs for other in common)}
        assert states.merge_bases(left, right, history.__getitem__) == sorted(best)


def test_a_criss_cross_has_two_merge_bases() -> None:
    history: Graph = {"o": (), "a": ("o",), "b": ("o",), "x": ("a", "b"), "y": ("b", "a")}
    assert states.merge_bases("x", "y", history.__getitem__) == ["a", "b"]


@given(graphs(), st.data())
def test_walk_is_each_ancestor_once_children_first(history: Graph, data: st.DataObject) -> None:
    starts = data.draw(st.lists(st.sampled_from(sorted(history)), min_size=1))
    rank = ranks(history, data)
    order = list(states.walk(starts, history.__getitem__, rank.__getitem__))
    assert sorted(order) == sorted(states.ancestors(starts, history.__getitem__))
    assert [rank[commit] for commit in order] == sorted((rank[commit] for commit in order), reverse=True)
    place = {commit: position for position, commit in enumerate(order)}
    assert all(place[commit] < place[parent] for commit in order for parent in history[commit])


@given(graphs(), st.data())
def test_oldest_first_is_each_ancestor_once_parents_first(history: Graph, data: st.DataObject) -> None:
    starts = data.draw(st.lists(st.sampled_from(sorted(history))))
    order = list(states.oldest_first(starts, history.__getitem__))
    assert sorted(order) == sorted(states.ancestors(starts, history.__getitem__))
    place = {commit: position for position, commit in enumerate(order)}
    assert all(place[parent] < place[commit] for commit in order for parent in history[commit])


@given(graphs(), st.data())
def test_apart_counts_what_only_one_side_has(history: Graph, data: st.DataObject) -> None:
    left, right = (data.draw(st.sets(st.sampled_from(sorted(history)), max_size=2)) for _ in range(2))
    rank = ranks(history, data)
    below = [states.ancestors(side, history.__getitem__) for side in (left, right)]
    expected = (len(below[0] - below[1]), len(below[1] - below[0]))
    assert states.apart(left, right, history.__getitem__, rank.__getitem__) == expected


def test_apart_stops_at_what_both_have() -> None:
    asked: list[int] = []

    def parents(commit: str) -> list[str]:
        asked.append(int(commit))
        return [str(int(commit) - 1)]

    assert states.apart(["1000000"], ["999990"], parents, int) == (10, 0)
    assert states.apart(["999990"], ["1000000"], parents, int) == (0, 10)
    assert states.apart(["7"], ["7"], parents, int) == (0, 0)
    assert len(asked) <= 20


def test_walk_is_lazy() -> None:
    asked: list[int] = []

    def parents(commit: str) -> list[str]:
        asked.append(int(commit))
        return [str(int(commit) - 1)]

    first = list(itertools.islice(states.walk(["1000000"], parents, int), 20))
    assert first == [str(number) for number in range(1_000_000, 999_980, -1)]
    assert len(asked) <= 20


@given(graphs())
def test_first_parents(history: Graph) -> None:
    for commit in history:
        chain = list(states.first_parents(commit, history.__getitem__))
        assert chain[0] == commit
        assert all(history[child][0] == parent for child, parent in itertools.pairwise(chain))
        assert history[chain[-1]] == ()


def test_long_histories_do_not_exhaust_the_stack() -> None:
    history = {str(number): ((str(number - 1),) if number else ()) for number in range(20_000)}
    assert len(states.ancestors(["19999"], history.__getitem__)) == 20_000
    assert next(iter(states.oldest_first(["19999"], history.__getitem__))) == "0"
    assert states.merge_bases("19999", "7", history.__getitem__) == ["7"]
