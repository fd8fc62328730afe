"""`bisect`: the search against brute force over random histories, and both kinds of checks on a real store."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import assume, given
from hypothesis import strategies as st

from patchhub.cli.main import main
from patchhub.errors import RequestError, RevisionError, SettingsError
from patchhub.objects import Request
from patchhub.porcelain.blame import Outcome, Verdict, ancestor_sets, bisect, facts_to_measure, first_bad, metric_check
from patchhub.progress import Silent
from patchhub.store.states import ancestors, oldest_first
from patchhub.store.store import Store
from tests.porcelain.synthetic import Synthetic, make_request
from tests.porcelain.synthetic import make_store as make_synthetic
from tests.porcelain.taught import PLACES, fact, make_store, teach

histories = st.lists(st.lists(st.integers(1, 4), max_size=3, unique=True), min_size=2, max_size=24)


def graph_of(steps: list[list[int]]) -> dict[str, list[str]]:
    """Commits "0" (newest) to the oldest; each goes back by the given steps."""
    size = len(steps)
    return {str(n): [str(n + step) for step in back if n + step < size] for n, back in enumerate(steps)}


@given(histories, st.data())
def test_the_first_bad_commit_is_found(steps: list[list[int]], data: st.DataObject) -> None:
    """Whatever commit breaks it for itself and all its descendants, in fewer checks than there are candidates."""
    parents = graph_of(steps)
    good = data.draw(st.sets(st.sampled_from(sorted(parents)), max_size=2))
    known = ancestors(good, parents.__getitem__)
    candidates = ancestors(["0"], parents.__getitem__) - known
    assume(candidates)
    culprit = data.draw(st.sampled_from(sorted(candidates)))
    checked: list[str] = []

    def verdict(commit: str) -> Verdict:
        checked.append(commit)
        return "bad" if culprit in ancestors([commit], parents.__getitem__) else "good"

    assert first_bad(good, "0", parents.__getitem__, verdict) == [culprit]
    assert len(set(checked)) == len(checked) < len(candidates)


@given(st.integers(2, 300), st.data())
def test_a_line_takes_the_logarithm_of_its_length(length: int, data: st.DataObject) -> None:
    culprit = data.draw(st.integers(0, length - 1))
    parents = {str(n): [str(n - 1)] if n else [] for n in range(length)}
    checks = 0

    def verdict(commit: str) -> Verdict:
        nonlocal checks
        checks += 1
        return "bad" if int(commit) >= culprit else "good"

    assert first_bad([], str(length - 1), parents.__getitem__, verdict) == [str(culprit)]
    assert checks <= (length - 1).bit_length()


@given(histories, st.sets(st.integers(0, 23)), st.data())
def test_skipped_commits_leave_the_culprit_among_the_suspects(
    steps: list[list[int]], skipped: set[int], data: st.DataObject
) -> None:
    parents = graph_of(steps)
    culprit = data.draw(st.sampled_from(sorted(ancestors(["0"], parents.__getitem__))))
    asked: list[str] = []

    def verdict(commit: str) -> Verdict:
        asked.append(commit)
        if int(commit) in skipped:
            return "skip"
        return "bad" if culprit in ancestors([commit], parents.__getitem__) else "good"

    suspects = first_bad([], "0", parents.__getitem__, verdict)
    assert culprit in suspects
    assert all(int(suspect) in skipped for suspect in suspects[1:]) or len(suspects) == 1
    assert len(set(asked)) == len(asked)


@given(histories)
def test_ancestor_sets_are_the_ancestors(steps: list[list[int]]) -> None:
    parents = graph_of(steps)
    commits = list(oldest_first(["0"], parents.__getitem__))
    for commit, bits in ancestor_sets(commits, parents.__getitem__).items():
        assert {c for place, c in enumerate(commits) if bits >> place & 1} == ancestors([commit], parents.__getitem__)


# --- the verb -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> Synthetic:
    made = make_synthetic(tmp_path_factory.mktemp("bisect"))
    for number in range(9):
        made.commit(make_request(f"Person {number}"), message=f"edit {number}")
    return made


def test_the_commit_and_its_facts_are_named(synthetic: Synthetic) -> None:
    repository = synthetic.repository
    broken = make_request("Person 5").id

    def check(commit: str | None) -> Outcome:
        bad = broken in {request for _, request in repository.active(commit)}
        return ("bad" if bad else "good"), None

    found = bisect(repository, "base", "HEAD", check, Silent())
    assert found.entry is not None
    assert found.entry.commit.message == "edit 5"
    assert [request.subject for request in found.added] == ["Person 5"]
    assert len(found.steps) <= 2 + 4
    assert found.to_json()["first_bad"] == found.entry.id
    for good, bad in (("HEAD", "base"), ("HEAD", "HEAD"), ("base", "HEAD~5"), ("HEAD~1", "HEAD")):
        with pytest.raises(RevisionError):
            bisect(repository, good, bad, check, Silent())


def test_skips_leave_suspects(synthetic: Synthetic) -> None:
    ends = {None: "good", synthetic.repository.resolve("HEAD"): "bad"}

    def check(commit: str | None) -> Outcome:
        verdict: Verdict = "good" if commit is None else "bad" if commit in ends else "skip"
        return verdict, None

    found = bisect(synthetic.repository, "base", "HEAD", check, Silent())
    assert found.entry is None
    assert len(found.suspects) == 9


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    with make_store(tmp_path_factory.mktemp("taught")) as made:
        teach(made, [("Lyon", "twin"), ("Paris", "Seattle")], "more")
        yield made


@pytest.mark.parametrize(
    ("metric", "bounds"),
    [
        ("locality", {"below": 1.0}),
        ("perplexity", {"above": 0.0}),
        ("paraphrase", {"above": -1.0}),
    ],
)
def test_metrics_are_measured_commit_by_commit(repository: Store, metric: str, bounds: dict[str, float]) -> None:
    """Each commit measured through the switched model is what the commit gives when it is measured first."""
    requests = [fact(*pair) for pair in PLACES]
    one = metric_check(repository, metric, requests, **bounds)
    commits = [None, *(repository.resolve(revision) for revision in ("HEAD~2", "HEAD~1", "HEAD"))]
    values = [one(commit)[1] for commit in commits]
    assert (
        values
        == [metric_check(repository, metric, requests, **bounds)(commit)[1] for commit in reversed(commits)][::-1]
    )
    assert len(set(values)) > 1 or metric == "paraphrase"
    if metric == "locality":
        assert values[0] == 1.0


def test_from_the_base_on_the_facts_are_those_of_the_bad_end(repository: Store) -> None:
    at_head = facts_to_measure(repository, "locality", "base", "HEAD")
    assert facts_to_measure(repository, "efficacy", "base", "HEAD") == at_head != []
    held = facts_to_measure(repository, "efficacy", "HEAD~2", "HEAD")
    assert 0 < len(held) < len(at_head)


def test_checks_that_cannot_work_are_refused(repository: Store) -> None:
    bare = [Request.make("It is known that {} is", "Ann", "Lyon")]
    with pytest.raises(RequestError):
        metric_check(repository, "locality", bare, below=0.5)
    with pytest.raises(RequestError):
        metric_check(repository, "paraphrase", bare, below=0.5)
    with pytest.raises(SettingsError):
        metric_check(repository, "beauty", bare, below=0.5)
    with pytest.raises(SettingsError):
        metric_check(repository, "efficacy", bare)


def run(repository: Store, *arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(main, ["--repo", str(repository.root.parent), "bisect", *arguments])
    assert result.exit_code == code, result.output
    return result.stdout


def test_a_command_sees_the_applied_model(repository: Store, tmp_path: Path) -> None:
    """A program that can tell by the weights' bytes finds the second commit."""
    script = tmp_path / "check.py"
    script.write_text(
        "import hashlib, os, pathlib, sys\n"
        "data = (pathlib.Path(os.environ['PATCHHUB_MODEL']) / 'model.safetensors').read_bytes()\n"
        "seen = pathlib.Path(sys.argv[1])\n"
        "known = seen.read_text().split() if seen.exists() else []\n"
        "seen.write_text(' '.join([*known, hashlib.sha256(data).hexdigest()]))\n"
        f"sys.exit(os.environ['PATCHHUB_COMMIT'] not in ['base', {repository.resolve('HEAD~2')!r}])\n"
    )
    seen = tmp_path / "seen"
    document = json.loads(run(repository, "base", "HEAD", "--json", "--", sys.executable, str(script), str(seen)))
    assert document["first_bad"] == repository.resolve("HEAD~1")
    digests = seen.read_text().split()
    assert len(set(digests)) == len(digests) == len(document["steps"]) == 4
    assert "is the first bad commit" in run(repository, "base", "HEAD", "--", sys.executable, str(script), str(seen))
    run(repository, "base", "HEAD", "--", str(tmp_path / "nothing"), code=2)
    run(repository, "base", "HEAD", code=2)
    run(repository, "base", "HEAD", "--metric", "locality", "--below", "0.5", "--", "true", code=2)


def test_a_metric_from_the_command_line(repository: Store) -> None:
    document = json.loads(run(repository, "base", "HEAD", "--metric", "locality", "--below", "1", "--json"))
    assert document["first_bad"] == repository.resolve("HEAD~2")
    assert document["steps"][0]["value"] == 1.0
