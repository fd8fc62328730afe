"""Every flipped byte is found; what can be derived again is repaired."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from builders import AUTHOR, TIME, make_history
from faults import QUICK

from patchhub.canonical import object_id
from patchhub.store import database
from patchhub.store.fsck import check, reindex
from patchhub.store.store import Store


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("template")
    make_history(directory, disk=QUICK).close()
    return directory


@pytest.fixture
def repository(template: Path, tmp_path: Path) -> Iterator[Store]:
    shutil.copytree(template, tmp_path / "store")
    with Store.open(tmp_path / "store", disk=QUICK) as opened:
        yield opened


def _flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position % len(data)] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)


def test_a_sound_store_has_no_findings(repository: Store) -> None:
    calls: list[tuple[int, int]] = []
    report = check(repository, progress=lambda done, total: calls.append((done, total)))
    names = list(repository.objects.ids())
    assert report.findings == ()
    assert report.objects == len(names)
    assert report.size == sum(repository.objects.path(name).stat().st_size for name in names)
    assert calls == [(done, len(names)) for done in range(1, len(names) + 1)]


def test_a_flipped_byte_in_any_object_is_found(repository: Store) -> None:
    for name in repository.objects.ids():
        path = repository.objects.path(name)
        for position in (0, path.stat().st_size // 2, -1):
            _flip(path, position)
            with Store.open(repository.root.parent) as damaged:
                report = check(damaged)
            _flip(path, position)
            assert not report.sound
            assert any(finding.facts.get("object") == name for finding in report.findings)
            assert all(finding.problem and finding.remedy for finding in report.findings)
    assert check(repository).sound


def test_a_missing_object_is_found(repository: Store) -> None:
    for name in list(repository.objects.ids()):
        path = repository.objects.path(name)
        hidden = path.with_name("hidden")
        path.rename(hidden)
        with Store.open(repository.root.parent) as damaged:
            report = check(damaged)
        hidden.rename(path)
        withheld = path.read_bytes().startswith(b'[{"neighborhood"')
        assert any(name[:12] in finding.problem for finding in report.findings) != withheld
        assert not report.sound  # withheld texts leave a search index that knows too much


def test_a_change_in_any_operation_is_found(repository: Store) -> None:
    connection = repository.connection
    for sequence, name, text in list(connection.execute("SELECT seq, id, json FROM operations")):
        for position in range(0, len(text), 23):
            flipped = text[:position] + chr(ord(text[position]) ^ 1) + text[position + 1 :]
            connection.execute("UPDATE operations SET json = ? WHERE seq = ?", (flipped, sequence))
            assert not check(repository).sound, (sequence, position)
        rewritten = text.replace('"author":"Ada', '"author":"Eve')
        connection.execute(
            "UPDATE operations SET json = ?, id = ? WHERE seq = ?",
            (rewritten, object_id(rewritten.encode()), sequence),
        )
        last = sequence == connection.execute("SELECT MAX(seq) FROM operations").fetchone()[0]
        assert check(repository).sound == last  # nothing names the last row yet; every other one has a successor
        connection.execute("UPDATE operations SET json = ?, id = ? WHERE seq = ?", (text, "0" * 64, sequence))
        assert not check(repository).sound
        connection.execute("UPDATE operations SET json = ?, id = ? WHERE seq = ?", (text, name, sequence))
    assert check(repository).sound


def test_a_missing_operation_is_found(repository: Store) -> None:
    connection = repository.connection
    for row in list(connection.execute("SELECT seq, id, json FROM operations")):
        connection.execute("DELETE FROM operations WHERE seq = ?", row[:1])
        assert not check(repository).sound
        connection.execute("INSERT INTO operations (seq, id, json) VALUES (?, ?, ?)", row)
    assert check(repository).sound


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE refs SET target = replace(target, 'a', 'b') WHERE name = 'refs/heads/side'",
        "DELETE FROM refs WHERE name = 'refs/tags/v1'",
        "INSERT INTO refs VALUES ('refs/heads/new', 'x')",
    ],
)
def test_refs_are_the_fold_of_the_operations(repository: Store, change: str) -> None:
    repository.connection.execute(change)
    assert [finding.facts["ref"] for finding in check(repository).findings]


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE commits SET rank = rank + 1 WHERE rowid = 1",
        "UPDATE commits SET parents = '[]'",
        "UPDATE commits SET message = CAST(x'ff' AS TEXT) WHERE rowid = 1",
        "DELETE FROM changes WHERE change = -1",
        "UPDATE requests SET subject = 'Nobody' WHERE rowid = 1",
        "INSERT INTO requests_fts (requests_fts) VALUES ('delete-all')",
        "UPDATE scores SET value = value + 1 WHERE name = 'S'",
        "INSERT INTO scores SELECT note, commit_id, suite, 'new', value FROM scores LIMIT 1",
        "UPDATE texts SET texts = 'Nobody' WHERE rowid = 1",
        "DROP TABLE changes",
    ],
)
def test_derived_tables_are_compared_and_made_again(repository: Store, change: str) -> None:
    repository.connection.execute(change)
    report = check(repository)
    assert not report.sound
    assert all("--reindex" in finding.remedy for finding in report.findings)
    reindex(repository)
    assert check(repository).findings == ()


def test_reindexing_a_sound_store_changes_no_row(repository: Store) -> None:
    def rows() -> list[list[tuple[object, ...]]]:
        return [sorted(repository.connection.execute(f"SELECT * FROM {name}"), key=repr) for name in database.COLUMNS]

    before = rows()
    reindex(repository)
    assert rows() == before


def test_a_database_of_before_there_were_texts_is_sound_and_gets_them_anew(repository: Store) -> None:
    rows = list(repository.connection.execute("SELECT * FROM texts ORDER BY patch"))
    repository.connection.execute("DROP TABLE texts")
    assert check(repository).sound
    assert not database.has_texts(repository.connection)
    reindex(repository)
    assert rows
    assert list(repository.connection.execute("SELECT * FROM texts ORDER BY patch")) == rows


def test_leftovers_are_harmless(repository: Store) -> None:
    name = next(repository.objects.ids())
    (repository.root / "objects" / name[:2] / ".abc.tmp").write_bytes(b"half")
    (repository.root.parent / ".patchhub.0123.tmp").mkdir()
    report = check(repository)
    assert report.sound
    assert len(report.findings) == 2


def test_an_unsound_commit_is_found(repository: Store) -> None:
    tip = repository.resolve("HEAD~1")
    assert tip is not None
    flawed = dataclasses.replace(repository.commit(tip), added=frozenset(), message="forged")
    identity = repository.objects.put(flawed.to_json())
    connection = repository.connection
    connection.execute("BEGIN IMMEDIATE")  # past the checks of `record`, as a faulty program would
    changes = {"refs/heads/forged": (None, identity)}
    database.append(connection, command="forge", arguments={}, changes=changes, author=AUTHOR, time=TIME)
    connection.execute("COMMIT")
    reindex(repository)
    findings = check(repository).findings
    assert [finding.facts for finding in findings] == [{"commit": identity}]
    assert "set digest" in findings[0].problem


def test_a_config_that_is_not_as_it_was_written_is_said(repository: Store) -> None:
    """It may be edited, so that it is no damage; what the next change writes is as it was written again."""
    path = repository.root / "config.json"
    written = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**written, "settings": {"author": "Eve"}}), encoding="utf-8")
    with Store.open(repository.root.parent) as edited:
        report = check(edited)
        assert report.sound
        assert [finding.facts["path"] for finding in report.findings] == [str(path)]
        edited.change_config(lambda config: config)
        assert check(edited).findings == ()
