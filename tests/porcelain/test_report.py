"""`report`: what is on the page is what the store holds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from patchhub.constraints import KEY_COSINE, RESIDUAL_COSINE, interfering, misfit
from patchhub.errors import RevisionError, SettingsError
from patchhub.objects import Element, Note
from patchhub.porcelain import refs, scores
from patchhub.porcelain.change import revert
from patchhub.porcelain.merge import merge
from patchhub.porcelain.report import report
from patchhub.porcelain.report.report import Report, edited_weights, verdict, write_report
from patchhub.progress import Silent
from patchhub.sets.columns import read_columns, read_state
from patchhub.sets.rivals import crowding, overlapping
from patchhub.store.store import Store
from tests.porcelain.handmade_shards import commit_shard
from tests.porcelain.synthetic import AUTHOR, BY, TIME, Synthetic, make_request, make_store, stamp


def gathered(repository: Store, revision: str = "HEAD", **options: Any) -> Report:
    return report.report(repository, Silent(), time=TIME, revision=revision, **options)


@pytest.fixture
def store(tmp_path: Path) -> Synthetic:
    """Two branches, merged, and one fact taken back: on `main` Ada, Bob, Cid and Eve were taught, Bob is no longer active."""
    store = make_store(tmp_path)
    store.commit(make_request("Ada"), make_request("Bob"), message="first")
    refs.create_branch(store.repository, "side", "HEAD", BY)
    store.commit(make_request("Cid"), message="here")
    refs.switch(store.repository, "side", BY)
    store.commit(make_request("Eve"), message="there")
    refs.switch(store.repository, "main", BY)
    merge(store.repository, "side", stamp("both"))
    refs.create_tag(store.repository, "v1", "HEAD", BY)
    revert(store.repository, None, stamp("no Bob"), subjects=["Bob"])
    store.commit(make_request("Dan"), message="new")
    return store


def note(store: Synthetic, commit: str, scores: dict[str, Any], suite: str = "counterfact") -> None:
    entry = Note(commit=commit, made_by=AUTHOR, scores=scores, settings={"facts": 10}, suite=suite)
    store.repository.add_note(entry, command="eval", arguments={}, author=AUTHOR, time=TIME)


def test_every_fact_with_everything_that_happened_to_it(store: Synthetic) -> None:
    found = gathered(store.repository)
    told = {
        row.texts.subject: (row.active, [(found.commits[at].commit.message, change) for at, change in row.changes])
        for row in found.facts
        if row.texts is not None
    }
    assert told == {
        "Ada": (True, [("first", 1)]),
        "Bob": (False, [("first", 1), ("no Bob", -1)]),
        "Cid": (True, [("here", 1)]),
        "Eve": (True, [("there", 1), ("both", 1)]),
        "Dan": (True, [("new", 1)]),
    }


@pytest.mark.parametrize("revision", ["HEAD", "v1", "side", "HEAD~4", "base"])
def test_active_is_what_the_revision_holds(store: Synthetic, revision: str) -> None:
    found = gathered(store.repository, revision)
    repository = store.repository
    held = {request for _, request in repository.active(repository.resolve(revision))}
    assert {row.id for row in found.facts if row.active} == held
    assert len(found.facts) == 5
    assert len(found.commits) == 6


def test_commits_come_children_first_with_their_names(store: Synthetic) -> None:
    found = gathered(store.repository)
    place = {row.id: at for at, row in enumerate(found.commits)}
    assert all(place[row.id] < place[parent] for row in found.commits for parent in row.commit.parents)
    labels = {label: row.commit.message for row in found.commits for label in row.labels}
    assert labels == {("branch", "main"): "new", ("branch", "side"): "there", ("tag", "v1"): "both"}
    assert {row.commit.message: (row.added, row.removed, row.active) for row in found.commits} == {
        "first": (2, 0, 2), "here": (1, 0, 3), "there": (1, 0, 3), "both": (1, 0, 4), "no Bob": (0, 1, 3), "new": (1, 0, 4)
    }  # fmt: skip


def test_a_detached_head_is_named_and_its_commits_are_there(store: Synthetic) -> None:
    refs.detach(store.repository, "HEAD~1", BY)
    store.commit(make_request("Fay"), message="adrift")
    found = gathered(store.repository)
    assert found.branch is None
    (adrift,) = [row for row in found.commits if row.commit.message == "adrift"]  # beside main's tip, of the same rank
    assert ("head", "HEAD") in adrift.labels


def test_withheld_texts_leave_their_ids(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    store.commit(make_request("Ada"), withheld=True)
    document = gathered(store.repository).to_json()
    (row,) = document["facts"]
    fact = dict(zip(document["fact_fields"], row, strict=True))
    assert make_request("Ada").id.startswith(fact["id"])
    assert fact["prompt"] is fact["subject"] is fact["target_new"] is None
    assert fact["active"] == 1
    assert fact["misfit"] is not None


def test_facts_of_shards_are_active_and_are_not_compared(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    store.commit(make_request("Ada"), message="columns")
    first = commit_shard(store.repository, [make_request("Bob")], message="shard")
    commit_shard(store.repository, [make_request("Cid")], follows=first.id, message="continued")
    found = gathered(store.repository)
    told = {
        row.texts.subject: (row.active, row.id in found.misfits, [change for _, change in row.changes])
        for row in found.facts
        if row.texts is not None
    }
    assert told == {"Ada": (True, True, [1]), "Bob": (True, False, [1, 0]), "Cid": (True, False, [1])}
    assert [(row.commit.message, row.added, row.removed, row.active) for row in found.commits] == [
        ("continued", 1, 0, 3),
        ("shard", 1, 0, 2),
        ("columns", 1, 0, 1),
    ]


def test_an_empty_store_has_a_page(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    done = write_report(store.repository, tmp_path / "out" / "page.html", Silent(), time=TIME)
    assert done.to_json() | {"out": "", "bytes": 0} == {
        "out": "", "bytes": 0, "commits": 0, "facts": 0, "scores": 0, "left_out": {"commits": 0, "facts": 0}
    }  # fmt: skip


def test_the_same_store_gives_the_same_page(store: Synthetic, tmp_path: Path) -> None:
    pages = []
    for name in ("one.html", "other.html"):
        write_report(store.repository, tmp_path / name, Silent(), time=TIME)
        pages.append((tmp_path / name).read_bytes())
    assert pages[0] == pages[1]


def test_scores_are_the_notes_in_the_order_of_their_definitions(store: Synthetic) -> None:
    head, tag = (store.repository.resolve(name) for name in ("HEAD", "v1"))
    assert head is not None
    assert tag is not None
    note(store, tag, {"ES": 0.5, "S": 0.25})
    note(
        store,
        head,
        {
            "ES": {"value": 0.75, "low": 0.5, "high": 1.0, "base": 0.25, "records": 4},
            "own.name": 3,
            "drift": {"kl": 0.5},
        },
    )
    note(store, head, {"reliability": 1}, suite="wise")
    document = gathered(store.repository).to_json()

    def unbounded(value: float) -> list[float | None]:
        return [value, None, None, None]

    told = [(document["commits"][row["commit"]]["id"], row["suite"], row["scores"]) for row in document["scores"]]
    assert told == [
        (head, "counterfact", {"ES": [0.75, 0.5, 1.0, 0.25], "drift.kl": unbounded(0.5), "own.name": unbounded(3.0)}),
        (head, "wise", {"reliability": unbounded(1.0)}),
        (tag, "counterfact", {"S": unbounded(0.25), "ES": unbounded(0.5)}),
    ]
    assert list(document["scores"][2]["scores"]) == ["S", "ES"]
    assert set(document["definitions"]) == {"S", "ES", "reliability"}


def test_norms_are_those_of_the_commit_relative_to_the_base(store: Synthetic) -> None:
    document = gathered(store.repository).to_json()
    for row in document["commits"]:
        norms = store.repository.commit(row["id"]).check["norms"]
        for (name, base), state, change in zip(document["weights"], row["state"], row["change"], strict=True):
            assert state == pytest.approx(norms[name]["state"] / base, rel=1e-3)
            assert change == pytest.approx(norms[name]["change"] / base, rel=1e-3)


def test_misfits_are_the_worst_over_the_weights(store: Synthetic) -> None:
    found = gathered(store.repository)
    worst: dict[str, float] = {}
    elements = sorted((patch, str(request)) for patch, request in store.active())
    for weight, columns in read_columns(store.repository, store.active()).items():
        shares = misfit(read_state(store.repository, store.repository.head[1])[weight], columns)
        for (_, request), share in zip(elements, shares.tolist(), strict=True):
            worst[request] = max(worst.get(request, 0.0), share)
    assert found.misfits == pytest.approx(worst)


def crowded(tmp_path: Path) -> Synthetic:
    """Facts in patches of two, with keys that lie on a few directions, so that many are near each other."""
    store = make_store(tmp_path, seed=3)
    directions = store.rng.standard_normal((3, 24))
    for n in range(7):
        requests = [make_request(f"{n} {m}") for m in range(2)]
        for weight in store.moment:
            for request in requests:
                key = directions[store.rng.integers(3)] + 0.6 * store.rng.standard_normal(24)
                store.keys.setdefault(weight, {})[request.text] = key
        store.commit(*requests)
    return store


def test_overlaps_are_the_pairs_that_interfere(tmp_path: Path) -> None:
    store = crowded(tmp_path)
    active, commit = store.active(), str(store.repository.head[1])
    elements: list[Element] = sorted(active, key=str)
    nearest: dict[frozenset[str], float] = {}
    for columns in read_columns(store.repository, active).values():
        for i, j, key, _ in interfering(columns, columns):
            if i != j:
                pair = frozenset(str(elements[row][1]) for row in (i, j))
                nearest[pair] = max(nearest.get(pair, 0.0), abs(key))
    found = crowding(store.repository, commit, active, Silent(), shown=1000)
    assert len(found.overlaps) == found.pairs > 5
    told = {frozenset((pair.left, pair.right)): abs(pair.key_cosine) for pair in found.overlaps}
    assert told == pytest.approx(nearest, abs=1e-4)
    assert list(told.values()) == sorted(told.values(), reverse=True)
    few = crowding(store.repository, commit, active, Silent(), shown=2)
    assert (few.overlaps, few.pairs) == (found.overlaps[:2], found.pairs)


def test_blocks_do_not_change_the_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = crowded(tmp_path)
    columns = read_columns(store.repository, store.active())["h.0"]
    whole = overlapping(columns)
    monkeypatch.setattr("patchhub.sets.rivals._BLOCK", 3)
    parts = overlapping(columns)
    assert [pair[:2] for pair in parts] == [pair[:2] for pair in whole]
    np.testing.assert_allclose([pair[2:] for pair in parts], [pair[2:] for pair in whole], atol=1e-12)
    assert all(i < j and abs(key) > KEY_COSINE for i, j, key, _ in whole)
    assert all(np.sign(key) * residual < RESIDUAL_COSINE for _, _, key, residual in whole)


def test_the_last_changed_facts_are_compared(store: Synthetic) -> None:
    found = gathered(store.repository, compared=2)
    compared = {row.texts.subject for row in found.facts if row.id in found.misfits and row.texts}
    assert compared == {"Dan", "Eve"}
    assert gathered(store.repository, compared=0).misfits == {}


def test_what_does_not_fit_is_left_out_and_counted(store: Synthetic, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "COMMITS", 2)
    monkeypatch.setattr(report, "FACTS", 3)
    document = gathered(store.repository).to_json()
    assert [row["message"] for row in document["commits"]] == ["new", "no Bob"]
    assert len(document["facts"]) == 3
    assert document["left_out"] == {"commits": 4, "facts": 2}
    older = document["commits"][1]["parents"]
    assert older == [str(store.repository.resolve("v1"))[:12]]
    assert all(place < 2 for fact in document["facts"] for place, _ in fact[-1])
    json.dumps(document, allow_nan=False)


def test_only_a_report_is_replaced(store: Synthetic, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    write_report(store.repository, out, Silent(), time=TIME)
    write_report(store.repository, out, Silent(), time=TIME)
    out.write_text("my own page", encoding="utf-8")
    with pytest.raises(SettingsError, match="no report"):
        write_report(store.repository, out, Silent(), time=TIME)
    assert out.read_text(encoding="utf-8") == "my own page"
    write_report(store.repository, out, Silent(), time=TIME, overwrite=True)
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(SettingsError, match="is a folder"):
        write_report(store.repository, folder, Silent(), time=TIME)
    with pytest.raises(SettingsError, match="holds a patchhub store"):
        write_report(store.repository, tmp_path, Silent(), time=TIME)


def test_an_unknown_revision_writes_nothing(store: Synthetic, tmp_path: Path) -> None:
    with pytest.raises(RevisionError):
        write_report(store.repository, tmp_path / "page.html", Silent(), time=TIME, revision="nowhere")
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize(
    "value", ["text", 3, None, [], [["a", 1]], {"h.0": "text"}, {"h.0": {"state": "a", "base": None}}]
)
def test_a_check_of_another_form_is_left_out(value: Any) -> None:
    check = {"norms": value, "proof": value, "survival": value, "guard": value, "forced": value}
    assert scores.norms(check, "state") == scores.base_norms(check) == {}
    assert scores.numbers(check, "proof") == []
    guard = scores.guard(check)
    assert guard is None or {bool(found) for found in guard.values()} == {False}
    within = scores.guard({"guard": dict.fromkeys(("own", "drift", "spectrum", "failed"), value)})
    assert within is not None
    json.dumps(within, allow_nan=False)


def test_the_guard_in_numbers() -> None:
    guard = {
        "own": {"count": 3, "of": 4},
        "earlier": {"count": 0, "of": 0},
        "drift": {"kl": 0.75, "kl_before": 0.25, "perplexity_ratio": 1.5, "positions": 9},
        "spectrum": {
            "h.0": {"base": 2.0, "change": 1.0, "state": 3.0},
            "h.1": {"base": 2.0, "change": 1.0, "state": 5.0},
        },
        "failed": ["too much"],
    }
    assert scores.guard({"guard": guard, "forced": True}) == {
        "own": [3, 4],
        "earlier": None,
        "crushed": None,
        "drift": 0.5,
        "perplexity_ratio": 1.5,
        "stretch": 2.5,
        "failed": ["too much"],
        "forced": True,
    }


def test_weights_come_in_the_order_of_their_layers(tmp_path: Path) -> None:
    names = ["model.layers.10.w", "lm_head", "model.layers.9.w", "model.layers.9.a.w"]
    store = make_store(tmp_path)
    store.commit(make_request("Ada"))
    (row,) = report.report(store.repository, Silent(), time=TIME).commits
    check = {"norms": {name: {"base": 1.0, "state": 1.0, "change": 1.0} for name in names}}
    measured = replace(row, commit=replace(row.commit, check=check))
    assert list(edited_weights([measured])) == [
        "lm_head",
        "model.layers.9.a.w",
        "model.layers.9.w",
        "model.layers.10.w",
    ]


@pytest.mark.parametrize(
    ("guard", "scores", "wanted", "levels"),
    [
        (None, {}, "Nobody has measured", []),
        ({"own": {"count": 10, "of": 10}, "failed": []}, {"live_efficacy": 0.95}, "is fine, as far", ["good", "good"]),
        ({"own": {"count": 8, "of": 10}, "failed": []}, {"leak": 0.0}, "mostly fine", ["doubtful", "good"]),
        (
            {"own": {"count": 1, "of": 10}, "failed": ["few hold"]},
            {"leak": 0.5},
            "not fine",
            ["bad", "bad", "doubtful"],
        ),
        ({"failed": []}, {"live_efficacy": 0.2, "live_paraphrase": 0.5}, "mostly fine", ["doubtful", "good"]),
    ],
)
def test_the_verdict_is_as_bad_as_the_worst_that_was_measured(
    guard: dict[str, Any] | None, scores: dict[str, float], wanted: str, levels: list[str]
) -> None:
    check = {} if guard is None else {"guard": guard, "forced": bool(guard["failed"])}
    sentence, grounds = verdict(check, {"2 facts of a.json": scores})
    assert wanted in sentence
    assert [level for level, _ in grounds] == levels
    assert verdict(None, {"": scores}) == ("This is the unpatched model.", [])
