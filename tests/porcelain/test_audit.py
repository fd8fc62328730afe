"""`audit`: the rows are the history. Replayed they give what is active, and every taking back has its two ends."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from patchhub.cli.main import main
from patchhub.objects import Note
from patchhub.porcelain.trust.audit import COLUMNS, Audit, as_csv, inert
from patchhub.repository import Repository
from patchhub.sets.elements import places_of
from tests.pins.history import AUTHOR, EPOCH, TIME, commit_facts, init, make_history


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """Merges, a shard, an import, cherry-picks, reverts of reverts, and a squash."""
    folder = tmp_path_factory.mktemp("history")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("SOURCE_DATE_EPOCH", EPOCH)
        make_history(folder)
    return Repository(folder, progress=False)


def replayed(found: Audit, repository: Repository) -> set[str | None]:
    """What is active when the rows are carried out one after the other, by request, or by patch for an imported change."""
    active: dict[tuple[str, ...], str | None] = {}
    for row in found.rows:
        key = (row.prompt, row.subject, str(row.before)) if row.change == "retargeted" else ()
        if row.change == "removed":
            active.pop((row.prompt, row.subject, str(row.before)) if row.request else (row.patch,))
            continue
        active.pop(key, None)
        active[(row.prompt, row.subject, str(row.after)) if row.request else (row.patch,)] = row.request or row.patch
    return set(active.values())


@pytest.mark.parametrize("tip", ["main", "side", "picks", "v1", "main~1", "main~2", "main~3"])
def test_the_rows_replayed_are_what_is_active(tip: str, history: Repository) -> None:
    found = history.audit(tip)
    active = places_of(history.store, history.store.active(history[tip].id))
    assert replayed(found, history) == {request or patch for patch, request in active}
    assert found.proven
    assert found.commits == len(history.log(tip))
    assert found.base == history.store.config.base_id


def test_whatever_was_taken_back_says_by_whom(history: Repository) -> None:
    found = history.audit("picks")
    assert [(row.change, row.subject) for row in found.rows if row.undoes] != []
    for row in found.rows:
        if row.undoes is not None:
            earlier = [other for other in found.rows if other.commit == row.undoes and other.subject == row.subject]
            assert [other.undone_by for other in earlier] == [row.commit]
        if row.undone_by is not None:
            assert any(other.commit == row.undone_by and other.undoes == row.commit for other in found.rows)


def test_a_merge_tells_what_neither_side_had_done(history: Repository) -> None:
    """Both sides told Eve's tongue: the merge takes one out, and no row comes twice."""
    merge = next(entry for entry in history.log("main") if len(entry.commit.parents) == 2)
    rows = history.audit(merge.id).rows
    assert [(row.change, row.subject, row.before) for row in rows if row.commit == merge.id] == [
        ("removed", "Eve", "French")
    ]
    told = [(row.change, row.request) for row in rows if row.commit != merge.id]
    assert len(told) == len(set(told))


@pytest.fixture
def repo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Repository:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", EPOCH)
    init(tmp_path)
    commit_facts(
        tmp_path,
        "=HYPERLINK(1)\nand a second line that is rather long, so that a table has to break it",
        {"Ann": "French"},
    )
    commit_facts(tmp_path, "two", {"Bob": "German", "Cleo": "Dutch"})
    repository = Repository(tmp_path, progress=False)
    repository.config("author", AUTHOR)
    return repository


def test_scores_guard_and_proof_are_evidence(repo: Repository) -> None:
    head = str(repo["HEAD"].id)
    note = Note(
        commit=head, made_by="Ada", scores={"S": {"value": 0.75}}, settings={"metrics": "counterfact"}, suite="one"
    )
    repo.store.add_note(note, command="eval", arguments={}, author=AUTHOR, time=TIME)
    repo.revert(subject="Bob")
    rows = repo.audit().rows
    assert [(row.change, row.subject) for row in rows][-1] == ("removed", "Bob")
    assert rows[1].evidence.score_words == ["counterfact S 0.750"]
    assert rows[-1].evidence.guard_words == "guard passed"
    assert rows[-1].evidence.proof is not None
    assert rows[1].undone_by == rows[-1].commit
    assert rows[0].evidence.signed_by == ()


def test_since_leaves_earlier_rows_out_and_keeps_their_links(repo: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", str(int(EPOCH) + 86_400))
    repo.revert(subject="Bob")
    found = repo.audit(since="2026-11-22")
    assert [row.subject for row in found.rows] == ["Bob"]
    assert found.rows[0].undoes == repo["HEAD~1"].id
    assert repo.audit(since="2030-01-01").rows == ()


def test_an_empty_history_is_an_audit_of_nothing(tmp_path: Path) -> None:
    init(tmp_path)
    found = Repository(tmp_path, progress=False).audit()
    assert (found.rows, found.commits, found.commit, found.proven) == ((), 0, None, True)


def test_the_table_has_eighty_columns_and_the_document_says_all(repo: Repository, tmp_path: Path) -> None:
    def run(*arguments: str, code: int = 0) -> str:
        result = CliRunner().invoke(main, ["--repo", str(tmp_path), "audit", *arguments])
        assert result.exit_code == code, result.stderr
        return result.stdout

    table, document = run(), json.loads(run("--json"))
    assert max(map(len, table.splitlines())) <= 80
    assert "proven back to the base" in table
    assert document == repo.audit().to_json()
    assert {"time", "author", "why", "change", "before", "after", "evidence", "undone_by"} <= document["rows"][0].keys()
    run("--csv", str(tmp_path / "rows.csv"))
    assert (tmp_path / "rows.csv").read_text(encoding="utf-8") == as_csv(repo.audit())
    path = repo.store.objects.path(repo.store.patch(repo.audit().rows[0].patch).tensors)
    path.chmod(0o600)
    path.write_bytes(b"other")
    assert "NOT proven" in run(code=12)


def test_no_cell_is_a_formula(repo: Repository) -> None:
    rows = list(csv.reader(io.StringIO(as_csv(repo.audit()))))
    assert tuple(rows[0]) == COLUMNS
    assert {len(row) for row in rows} == {len(COLUMNS)}
    assert rows[1][3].startswith("'=HYPERLINK(1)")
    for lead in ("=", "+", "-", "@", " =", "\t=", "\r", "\n", "\uff1d"):
        assert inert(f"{lead}1+1") == f"'{lead}1+1"
    assert inert(None) == ""
    assert inert("Ada") == "Ada"
