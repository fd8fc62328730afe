"""`log`, its drawings and selections, and `diff`: each against what a direct reading of the same store says."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import example, given
from hypothesis import strategies as st

from patchhub.cli.history import Drawing, draw
from patchhub.cli.main import main
from patchhub.delta import Dense, from_factors, inner, numerical_rank, to_dense
from patchhub.errors import RequestError, SettingsError
from patchhub.objects import Commit, Element
from patchhub.porcelain.history import log, nearest
from patchhub.porcelain.search import changed_answers, diff, weight_steps
from patchhub.progress import Silent
from patchhub.sets.columns import read_state
from patchhub.sets.elements import active_requests
from patchhub.store.lookup import Selection
from patchhub.store.states import ancestors
from patchhub.store.store import Store
from patchhub.who import duration, instant
from tests.porcelain.synthetic import make_request
from tests.porcelain.synthetic import make_store as make_synthetic
from tests.porcelain.taught import PLACES, TONGUES, fact, make_store
from tests.store.builders import make_commit, make_repository, move, put_patch, record

NOW = "2026-11-21T09:30:00Z"


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
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
        ("M:AB A:R B:RS R: S:", ["*   M", "|\\", "* | A", "| * B", "|/|", "* | R", " /", "* S"]),
        ("D:B E:C B:A C: A:", ["* D", "| * E", "* | B", "| * C", "* A"]),
        (
            "N:ML M:BC L:B C:A B:A A:",
            ["*   N", "|\\", "* |   M", "|\\ \\", "| | * L", "| |/", "|/|", "| * C", "* | B", "|/", "* A"],
        ),
    ],
)
def test_golden_drawings(history: str, expected: list[str]) -> None:
    assert drawing(history).splitlines() == expected


def test_text_beside_a_commit_keeps_the_lanes_open() -> None:
    drawn = list(draw([("M", ["A", "B"]), ("A", [])]))
    assert list(drawn[0].beside(["one", "two", "three"])) == ["*   one", "|\\  two", "| | three"]
    assert list(drawn[0].beside([])) == ["*", "|\\"]


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


# --- selections -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """first - second - merge - revert, with a side commit under the merge; one author and day each."""
    with make_repository(tmp_path_factory.mktemp("history")) as repository:
        people = (f"{name} <{name.lower()}@example.org>" for name in ("Ada", "Grace", "Ada_B", "Alan", "Ada"))
        days = (f"2026-11-{day:02}T09:30:00Z" for day in range(1, 6))

        def add(*parents: str, numbers: range = range(0), ref: str | None = None, **changes: frozenset[Element]) -> str:
            added = changes.get("added", put_patch(repository, numbers).elements if numbers else frozenset())
            made = make_commit(repository, *parents, added=added, removed=changes.get("removed", frozenset()))
            return record(repository, replace(made, author=next(people), time=next(days)), ref=ref)

        first = add(numbers=range(2))
        move(repository, {"refs/heads/side": (None, first)}, "branch")
        second = add(first, numbers=range(2, 4))
        side = add(first, numbers=range(4, 5), ref="refs/heads/side")
        merged = repository.active(side) - repository.active(first)
        merge = add(second, side, added=merged)
        add(merge, removed=repository.active(first))
        yield repository


def brute_force(repository: Store, only: Selection) -> list[str]:
    """The selection read off the objects."""

    def fits(commit: Commit) -> bool:
        facts = active_requests(repository, commit.added | commit.removed).values()
        return (
            (only.author is None or only.author.lower() in commit.author.lower())
            and (only.since is None or commit.time >= only.since)
            and (only.until is None or commit.time <= only.until)
            and (
                only.about is None
                or any(only.about.lower() in f"{fact.text} {fact.target_new}".lower() for fact in facts)
            )
        )

    tip = repository.resolve("HEAD")
    assert tip is not None
    return [identity for identity, commit in repository.log(tip) if fits(commit)]


some_day = st.none() | st.integers(1, 6).map("2026-11-{:02}T09:30:00Z".format)
selections = st.builds(
    Selection,
    st.none() | st.sampled_from(["Person 0", "person 4", "Person 3 is french", "tongue", "100%", "_", "Berlin"]),
    st.none() | st.sampled_from(["ada", "ada_b", "Grace", "@example.org", "%", "Zoe"]),
    some_day,
    some_day,
)


@given(selections)
@example(Selection(about="Person 4"))
@example(Selection(author="ada_b"))
def test_a_selection_is_what_the_objects_say(store: Store, only: Selection) -> None:
    assert [entry.id for entry in log(store, only=only)] == brute_force(store, only)


@pytest.mark.parametrize("about", ["person 4", "Person 3 is french", "100%", "Berlin"])
def test_a_database_of_before_there_were_texts_answers_alike(store: Store, about: str) -> None:
    only = Selection(about=about)
    store.connection.execute("BEGIN")
    try:
        store.connection.execute("DROP TABLE texts")
        assert [entry.id for entry in log(store, only=only)] == brute_force(store, only)
    finally:
        store.connection.execute("ROLLBACK")


def test_log_follows_first_parents_and_stops(store: Store) -> None:
    everything = [entry.id for entry in log(store)]
    assert len(everything) == 5
    chain = [entry.id for entry in log(store, first_parent=True)]
    assert chain == [identity for identity in everything if identity != store.refs()["refs/heads/side"]]
    assert [entry.id for entry in log(store, limit=2)] == everything[:2]
    assert list(log(store, "base")) == []


def test_commits_left_out_are_bridged(store: Store) -> None:
    """In a drawing of the first and the last commits the last leads to the first."""
    entries = list(log(store, only=Selection(author="Ada <")))
    assert [entry.shown_parents for entry in entries] == [(entries[1].id,), ()]


@given(histories, st.sets(st.integers(0, 12)))
def test_nearest_are_the_wanted_commits_reached_without_passing_another(steps: list[list[int]], keep: set[int]) -> None:
    size = len(steps)
    parents = {str(n): [str(n + step) for step in back if n + step < size] for n, back in enumerate(steps)}
    wanted = {str(n) for n in keep if n < size}
    cut = {commit: [] if commit in wanted else up for commit, up in parents.items()}
    for commit, up in parents.items():
        expected = wanted & ancestors(up, cut.__getitem__) if up else set()
        assert set(nearest(parents[commit], wanted, parents.__getitem__)) == expected


# --- diff -----------------------------------------------------------------------------------------------------------


def test_facts_of_one_prompt_with_several_targets_are_all_told(tmp_path: Path) -> None:
    made = make_synthetic(tmp_path)
    french, german, dutch = (make_request("Ann", target) for target in ("French", "German", "Dutch"))
    made.commit(french, german)
    made.commit(dutch, remove=made.active())
    gone = diff(made.repository, "HEAD~1", "base")
    assert set(gone.removed) == {french, german}
    found = diff(made.repository, "HEAD~1", "HEAD")
    assert [pair.after for pair in found.retargeted] == [dutch]
    assert {*found.removed, *(pair.before for pair in found.retargeted)} == {french, german}


def test_the_weights_differ_by_what_their_matrices_say(repository: Store) -> None:
    steps = weight_steps(repository, "HEAD~1", "HEAD")
    for weight, step in steps.items():
        old, new = (
            np.sum([to_dense(delta) for delta in read_state(repository, repository.resolve(rev))[weight]], axis=0)
            for rev in ("HEAD~1", "HEAD")
        )
        assert step.step == pytest.approx(float(np.linalg.norm(new - old)), rel=1e-9)
        assert step.cosine == pytest.approx(float(np.sum(new * old) / np.linalg.norm(new) / np.linalg.norm(old)))
        assert (step.old_rank, step.new_rank, step.step_rank) == (3, 6, 3)
    same = weight_steps(repository, "HEAD", "HEAD")
    assert all(step.step < 1e-9 and step.cosine == pytest.approx(1) and step.step_rank == 0 for step in same.values())
    beside_base = weight_steps(repository, "base", "HEAD")
    assert all(step.cosine is None and step.old == 0 and step.old_rank == 0 for step in beside_base.values())


@given(st.integers(0, 5), st.integers(0, 5), st.integers(0, 2**32 - 1))
def test_inner_products_and_ranks_are_those_of_the_matrices(left: int, right: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    one, other = (
        from_factors(rng.standard_normal((7, rank)), rng.standard_normal((rank, 9))) for rank in (left, right)
    )
    a, b = to_dense(one), to_dense(other)
    for x, y in ((one, other), (Dense(a), other), (one, Dense(b))):
        assert inner(x, y) == pytest.approx(float(np.sum(a * b)), abs=1e-4)
    assert numerical_rank(one, 1e-4) == numerical_rank(Dense(a), 1e-4) == np.linalg.matrix_rank(a, tol=1e-4)


def test_answers_that_changed_are_those_of_the_facts(repository: Store) -> None:
    prompts = [fact(*pair).text for pair in (*PLACES, *TONGUES)]
    changed = changed_answers(repository, "HEAD", "HEAD", prompts, Silent())
    assert changed == []
    taught = {answer.prompt for answer in changed_answers(repository, "base", "HEAD", prompts, Silent())}
    assert taught == set(prompts)
    with pytest.raises(RequestError):
        changed_answers(repository, "base", "HEAD", ["", " "], Silent())


# --- times ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2 weeks ago", "2026-11-07T09:30:00Z"),
        ("36h ago", "2026-11-19T21:30:00Z"),
        ("3 months ago", "2026-08-23T09:30:00Z"),
        ("1 year ago", "2025-11-21T09:30:00Z"),
        ("1 day ago", "2026-11-20T09:30:00Z"),
        ("2026-11-20", "2026-11-20T00:00:00Z"),
        ("2026-11-20T10:00", "2026-11-20T10:00:00Z"),
        ("2026-11-20T10:00:05Z", "2026-11-20T10:00:05Z"),
        ("2026-11-20T10:00+02:00", "2026-11-20T08:00:00Z"),
    ],
)
def test_instants(text: str, expected: str) -> None:
    assert instant(text, NOW) == expected


def test_a_day_ends_at_its_last_second() -> None:
    assert instant("2026-11-20", NOW, end=True) == "2026-11-20T23:59:59Z"


@given(st.text(max_size=20))
def test_other_text_is_refused_in_words(text: str) -> None:
    for read in (lambda: duration(text), lambda: instant(text, NOW)):
        with contextlib.suppress(SettingsError):
            read()


# --- the command line -----------------------------------------------------------------------------------------------


def run(repository: Store, *arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(main, ["--repo", str(repository.root.parent), *arguments])
    assert result.exit_code == code, result.output
    return result.stdout


def test_log_draws_and_says_how_much_changes(store: Store, repository: Store) -> None:
    lines = run(store, "log", "--graph", "--oneline").splitlines()
    assert [line[:4].rstrip() for line in lines] == [
        "* " + lines[0][2:4],
        "*",
        "|\\",
        "| *",
        "* |",
        "|/",
        "* " + lines[-1][2:4],
    ]
    (newest, oldest) = json.loads(run(repository, "log", "--stat", "--json"))
    assert newest["size"]["delta_bytes"] > 0
    assert oldest["size"]["weight"].endswith("mlp.c_proj.weight")
    assert oldest["size"]["ratio"] > 0
    assert run(repository, "log", "-S", "eiffel", "--oneline").count("\n") == 1
    run(repository, "log", "--since", "whenever", code=2)


def test_diff_prints_weights_and_answers(repository: Store, tmp_path: Path) -> None:
    asked = tmp_path / "prompts.txt"
    asked.write_text(fact(*TONGUES[1]).text + "\n\n", encoding="utf-8")
    document = json.loads(run(repository, "diff", "HEAD~1", "HEAD", "--weights", "--ask", str(asked), "--json"))
    assert len(document["answers"]) == 1
    assert all(step["step_rank"] == 3 for step in document["weights"].values())
    text = run(repository, "diff", "HEAD~1", "HEAD", "--weights", "--ask", str(asked))
    assert "°" in text
    assert "1 answer changed" in text
