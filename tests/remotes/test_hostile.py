"""Remotes that lie: whatever they hold, only declared errors come out, the store stays sound and no ref moves."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import pickle
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save

from patchhub.canonical import DEEPEST, canonical_json, object_id
from patchhub.constraints import Columns
from patchhub.delta import Dense, write_deltas
from patchhub.errors import PatchhubError, RemoteError
from patchhub.objects import Base, Commit, Patch, TensorRecord, requests_json, set_digest
from patchhub.porcelain import share as commands
from patchhub.porcelain.change import largest_proof
from patchhub.porcelain.history import log, show
from patchhub.porcelain.search import diff
from patchhub.porcelain.share import remote_add
from patchhub.progress import Silent
from patchhub.remotes import receive
from patchhub.remotes.receive import Intake, Limits
from patchhub.remotes.remote import FileRemote, LocalFiles, Remote, object_path, read_branch, read_folder
from patchhub.remotes.sync import open_remote
from patchhub.sets.columns import tensor_check, write_columns
from patchhub.sets.commits import Draft, prepare
from patchhub.sets.commits import record as commit_draft
from patchhub.sets.proofs import prove
from patchhub.store.fsck import check
from patchhub.store.store import Store
from patchhub.who import Who
from tests.benchmarks.synthetic_store import HastyDisk
from tests.remotes.stores import AUTHOR, BASE, SHAPES, STAMP, TIME, make_history, make_request, make_store, metric_of
from tests.remotes.test_conformance import push

MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
"""A disk that does not wait for other programs, where there is one."""

EXAMPLES = settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder remote with three commits on two branches, a tag and a note; ``receiver`` beside it is an empty store."""
    folder = tmp_path_factory.mktemp("honest")
    with make_history(folder / "ours") as ours:
        push(ours, open_remote(str(folder / "remote")))
    make_store(folder / "receiver").close()
    return folder


@contextlib.contextmanager
def attacked(honest: Path) -> Iterator[tuple[Path, Store]]:
    """A copy of the remote that can be changed, and a receiver of its own."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        remote = Path(folder) / "remote"
        shutil.copytree(honest / "remote", remote)
        shutil.copytree(honest / "receiver", Path(folder) / "receiver")
        with Store.open(Path(folder) / "receiver", disk=HastyDisk()) as repository:
            yield remote, repository


def fetch(repository: Store, remote: Remote) -> None:
    """As `patchhub fetch` does."""
    intake = Intake(Limits(1 << 30, SHAPES, SHAPES), tensor_check(SHAPES, SHAPES))
    entry = receive.Entry(lambda commits, tips: prove(repository, commits, tips=tips))
    receive.fetch(repository, remote, "origin", intake, who=Who(AUTHOR, TIME), entry=entry)


def replace_file(path: Path, data: bytes) -> None:
    """Write a file, whatever was there."""
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def pulled_objects(honest: Path) -> list[Path]:
    """Every object of the remote that the receiver does not have: all but the base."""
    here = {path.name for path in (honest / "receiver" / ".patchhub" / "objects").rglob("*") if path.is_file()}
    there = (path for path in (honest / "remote" / "objects").rglob("*") if path.is_file())
    return sorted(path for path in there if path.name not in here)


def refused(remote: Path, repository: Store, match: str | None = None) -> None:
    refs = repository.refs()
    with pytest.raises(PatchhubError, match=match):
        fetch(repository, open_remote(str(remote)))
    assert repository.refs() == refs
    assert check(repository).sound


def survives(remote: Path, repository: Store) -> None:
    """Either all is well or a declared error: nothing in between."""
    refs = repository.refs()
    failure: PatchhubError | None = None
    try:
        fetch(repository, open_remote(str(remote)))
    except PatchhubError as error:
        failure = error
    if failure is not None:
        assert repository.refs() == refs
        assert "\n" not in failure.message
    assert check(repository).sound


# --- bytes ----------------------------------------------------------------------------------------------------------


def test_a_flipped_bit_in_any_object_is_found(honest: Path) -> None:
    """Each object, at its first, middle and last byte."""
    for number, original in enumerate(pulled_objects(honest)):
        data = original.read_bytes()
        with attacked(honest) as (remote, repository):
            for place in (0, len(data) // 2, len(data) - 1):
                flipped = bytearray(data)
                flipped[place] ^= 1 << (number % 8)
                replace_file(remote / original.relative_to(honest / "remote"), bytes(flipped))
                refused(remote, repository, "hash")


@settings(EXAMPLES, max_examples=200)
@given(st.data())
def test_a_flipped_bit_anywhere_is_found(honest: Path, data: st.DataObject) -> None:
    original = data.draw(st.sampled_from(pulled_objects(honest)))
    flipped = bytearray(original.read_bytes())
    place = data.draw(st.integers(0, len(flipped) - 1))
    flipped[place] ^= 1 << data.draw(st.integers(0, 7))
    with attacked(honest) as (remote, repository):
        replace_file(remote / original.relative_to(honest / "remote"), bytes(flipped))
        refused(remote, repository, "hash")


@pytest.mark.parametrize("change", ["missing", "empty", "short", "long"])
def test_objects_that_are_not_whole_are_found(change: str, honest: Path) -> None:
    for original in pulled_objects(honest):
        data = original.read_bytes()
        with attacked(honest) as (remote, repository):
            victim = remote / original.relative_to(honest / "remote")
            victim.unlink()
            if change != "missing":
                replace_file(victim, {"empty": b"", "short": data[:-1], "long": data + b" "}[change])
            survives(remote, repository) if change == "missing" else refused(remote, repository)


def test_a_huge_object_is_refused_unread(honest: Path) -> None:
    for original in pulled_objects(honest):
        with attacked(honest) as (remote, repository):
            victim = remote / original.relative_to(honest / "remote")
            replace_file(victim, b"")
            os.truncate(victim, 1 << 42)
            refused(remote, repository, "bytes are too many")


def test_names_that_are_no_objects_are_never_read(honest: Path) -> None:
    with attacked(honest) as (remote, repository):
        for name in (
            "objects/x",
            "objects/ab/../../../etc",
            "objects/AB/" + "c" * 62,
            "objects/ab/" + "c" * 61,
            "../up",
        ):
            (remote / name).parent.mkdir(parents=True, exist_ok=True)
            (remote / name).write_bytes(b"")
        (remote / "objects" / "00").mkdir(exist_ok=True)
        (remote / "objects" / "00" / ("f" * 62)).symlink_to("/dev/zero")
        (remote / "objects" / "00" / ("d" * 62)).symlink_to("nowhere")
        (remote / "objects" / "loop").symlink_to(remote / "objects")
        os.mkfifo(remote / "objects" / "00" / ("e" * 62))
        fetch(repository, open_remote(str(remote)))
        assert check(repository).sound


def test_objects_that_are_elsewhere_are_looked_at_no_deeper_than_objects_lie(honest: Path) -> None:
    """A link to a tree without an end, such as the system's processes, which come and go."""
    with attacked(honest) as (remote, repository):
        shutil.rmtree(remote / "objects")
        (remote / "objects").symlink_to("/proc" if Path("/proc").is_dir() else "/")
        refused(remote, repository, "missing")
    with attacked(honest) as (remote, repository):
        nested = remote / "objects" / "ab" / ("c" * 62) / "deeper"
        nested.mkdir(parents=True)
        (nested / "file").write_bytes(b"")
        assert not any("deeper" in name for name in LocalFiles(remote).sizes("objects"))
        fetch(repository, open_remote(str(remote)))


def test_a_manifest_that_is_no_file_is_refused(honest: Path) -> None:
    for make in (os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)):
        with attacked(honest) as (remote, repository):
            (remote / "patchhub.json").unlink()
            make(remote / "patchhub.json")
            refused(remote, repository, "not a file")


# --- tensors --------------------------------------------------------------------------------------------------------


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("unpickled"),))


def with_tensors(remote: Path, data: bytes, *, of_patch: bool) -> None:
    """Make the remote's main a commit whose delta, or whose patch's columns, are ``data``; every hash is right."""

    def put(content: bytes) -> str:
        replace_file(remote / object_path(object_id(content)), content)
        return object_id(content)

    def get(identity: str) -> Any:
        return json.loads((remote / object_path(identity)).read_bytes())

    manifest = json.loads((remote / "patchhub.json").read_bytes())
    commit = get(manifest["refs"]["refs/tags/v1"])
    if of_patch:
        ((identity, requests),) = commit["added"]
        patch = {**get(identity), "tensors": put(data)}
        commit["added"] = [[put(canonical_json(patch)), requests]]
        commit["set"] = digest_of(commit["added"])
    else:
        commit["tensors"] = put(data)
    refs = {"refs/heads/main": put(canonical_json(commit))}
    replace_file(remote / "patchhub.json", canonical_json({**manifest, "refs": refs}))


def digest_of(groups: list[Any]) -> str:
    """The set digest of what a root commit adds."""
    return set_digest((patch, request) for patch, requests in groups for request in requests or [None])


def honest_tensors(honest: Path, *, of_patch: bool) -> dict[str, np.ndarray]:
    with Store.open(honest / "ours") as ours:
        commit = ours.commit(ours.refs()["refs/tags/v1"])
        patch = ours.patch(next(iter(commit.added))[0])
        found: dict[str, np.ndarray] = load(ours.objects.get(patch.tensors if of_patch else str(commit.tensors)))
        return found


def bfloat16(tensors: dict[str, np.ndarray]) -> bytes:
    return _relabelled(save({name: array.astype(np.float16) for name, array in tensors.items()}))


def _relabelled(data: bytes) -> bytes:
    """The same file with BF16 for F16 in its header, whose length then is another."""
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].replace(b'"F16"', b'"BF16"')
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


@pytest.mark.parametrize("of_patch", [True, False])
def test_tensors_that_the_format_does_not_allow_are_refused(of_patch: bool, honest: Path) -> None:
    good = honest_tensors(honest, of_patch=of_patch)
    name = sorted(good)[0]
    bad = {
        "a pickle": pickle.dumps(Bomb()),
        "no file at all": b"\xff" * 100,
        "a header that is too long": (1 << 60).to_bytes(8, "little") + b"{}",
        "a missing tensor": save({key: good[key] for key in good if key != name}),
        "an unknown tensor": save({**good, "evil": np.zeros(3, np.float32)}),
        "a wrong shape": save({**good, name: np.zeros((2, 2), np.float32)}),
        "a wrong type": save({**good, name: good[name].astype(np.float64)}),
        "integers": save({**good, name: good[name].astype(np.int32)}),
        "bfloat16": bfloat16(good),
        "NaN": save({**good, name: np.full_like(good[name], np.nan)}),
        "infinity": save({**good, name: np.full_like(good[name], np.inf)}),
    }
    for reason, data in bad.items():
        with attacked(honest) as (remote, repository):
            with_tensors(remote, data, of_patch=of_patch)
            refs = repository.refs()
            with pytest.raises(PatchhubError, match="refused"):
                fetch(repository, open_remote(str(remote)))
            assert repository.refs() == refs, reason
    assert not Path("unpickled").exists()
    with attacked(honest) as (remote, repository):
        with_tensors(remote, save(good), of_patch=of_patch)
        fetch(repository, open_remote(str(remote)))


# --- JSON -----------------------------------------------------------------------------------------------------------

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=12)
    | st.sampled_from(["0" * 64, "f" * 64, "..", "refs/heads/x", "closed_form", "2026-11-21T09:30:00Z"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def mutated(draw: Any, document: Any) -> Any:
    """One value replaced, removed, added or doubled somewhere in a JSON document."""
    document = copy.deepcopy(document)
    *above, last = draw(st.sampled_from(sorted(filter(None, places(document)), key=repr)))
    parent = document
    for key in above:
        parent = parent[key]
    kind = draw(st.sampled_from(["replace", "remove", "add"]))
    if kind == "remove":
        del parent[last]
    elif kind == "replace" or not isinstance(parent, dict):
        parent[last] = draw(VALUES)
    else:
        parent[draw(st.text(max_size=8))] = draw(VALUES)
    return document


@EXAMPLES
@given(st.data())
def test_mutated_manifests_give_only_declared_errors(honest: Path, data: st.DataObject) -> None:
    document = json.loads((honest / "remote" / "patchhub.json").read_bytes())
    branch = {key: document[key] for key in ("base", "base_model", "base_revision", "format", "notes", "private_facts")}
    branch |= {"type": "branch", "commit": document["refs"]["refs/heads/main"]}
    for original, read in ((document, read_folder), (branch, read_branch)):
        read(canonical_json(original), "here")
        changed = mutated(data.draw, original)
        raw = canonical_json(changed)
        cut = data.draw(st.integers(0, len(raw)))
        for content in (raw, raw[:cut], raw[:cut] + data.draw(st.binary(max_size=3)) + raw[cut:]):
            with contextlib.suppress(RemoteError):
                read(content, "here")


@settings(EXAMPLES, max_examples=100)
@given(st.data())
def test_a_remote_with_a_mutated_manifest(honest: Path, data: st.DataObject) -> None:
    with_mutated_manifest(honest, data)


@pytest.mark.slow
@EXAMPLES
@given(st.data())
def test_a_thousand_remotes_with_mutated_manifests(honest: Path, data: st.DataObject) -> None:
    with_mutated_manifest(honest, data)


def with_mutated_manifest(honest: Path, data: st.DataObject) -> None:
    with attacked(honest) as (remote, repository):
        document = mutated(data.draw, json.loads((remote / "patchhub.json").read_bytes()))
        replace_file(remote / "patchhub.json", canonical_json(document))
        survives(remote, repository)


@settings(EXAMPLES, max_examples=150)
@given(st.data())
def test_a_remote_with_a_mutated_object(honest: Path, data: st.DataObject) -> None:
    """A commit, or a patch and the commit that names it, changed and given their right hashes."""
    with attacked(honest) as (remote, repository):
        manifest = json.loads((remote / "patchhub.json").read_bytes())
        commit = json.loads((remote / object_path(manifest["refs"]["refs/tags/v1"])).read_bytes())
        if data.draw(st.booleans()):
            commit = mutated(data.draw, commit)
        else:
            ((identity, requests),) = commit["added"]
            patch = canonical_json(mutated(data.draw, json.loads((remote / object_path(identity)).read_bytes())))
            replace_file(remote / object_path(object_id(patch)), patch)
            commit["added"] = [[object_id(patch), requests]]
            commit["set"] = digest_of(commit["added"])
        raw = canonical_json(commit)
        replace_file(remote / object_path(object_id(raw)), raw)
        refs = {"refs/heads/main": object_id(raw)}
        replace_file(remote / "patchhub.json", canonical_json({**manifest, "notes": {}, "refs": refs}))
        survives(remote, repository)


def with_commit(remote: Path, commit: dict[str, Any]) -> str:
    """Put a commit onto the remote as all that its main branch has; returns its id."""
    raw = Commit.from_json(canonical_json(commit)).to_json()
    replace_file(remote / object_path(object_id(raw)), raw)
    manifest = json.loads((remote / "patchhub.json").read_bytes())
    refs = {"refs/heads/main": object_id(raw)}
    replace_file(remote / "patchhub.json", canonical_json({**manifest, "notes": {}, "refs": refs}))
    return object_id(raw)


WEIGHT = next(iter(SHAPES))


@pytest.mark.parametrize(
    "measured",
    [
        {},
        {"norms": 5, "proof": 5, "guard": 5},
        {"norms": [], "proof": None},
        {"norms": {WEIGHT: 1.0}, "proof": {WEIGHT: "small"}},
        {"norms": {WEIGHT: {"base": 1.0}, "elsewhere": {"base": 1.0, "change": 1.0, "state": 1.0}}, "proof": {}},
    ],
)
def test_a_check_of_another_form_is_taken_as_not_measured(measured: dict[str, Any], honest: Path) -> None:
    with attacked(honest) as (remote, repository):
        manifest = json.loads((remote / "patchhub.json").read_bytes())
        commit = json.loads((remote / object_path(manifest["refs"]["refs/tags/v1"])).read_bytes())
        identity = with_commit(remote, {**commit, "check": measured})
        fetch(repository, open_remote(str(remote)))
        (entry,) = log(repository, "origin/main", sizes=True)
        assert entry.id == identity
        assert entry.size is not None
        assert entry.size.weight in {None, "elsewhere"}
        assert show(repository, identity).entry.id == identity
        assert diff(repository, "base", identity).norms == {}
        assert largest_proof(repository.commit(identity)) == 0.0


@pytest.mark.parametrize(
    "stated",
    [
        *({"layers": 3}, {"layers": [-1]}, {"layers": ["0"]}, {"contexts": "{}"}, {"contexts": [1]}, {"ridge": "much"}),
        *({"chat": "yes"}, {"chat": {"before": ""}}, {"refreshes": ["../.."]}, {"refreshes": 1}),
    ],
)
def test_settings_of_other_types_are_refused(stated: dict[str, Any], honest: Path) -> None:
    with attacked(honest) as (remote, repository):
        manifest = json.loads((remote / "patchhub.json").read_bytes())
        commit = json.loads((remote / object_path(manifest["refs"]["refs/tags/v1"])).read_bytes())
        ((identity, requests),) = commit["added"]
        patch = json.loads((remote / object_path(identity)).read_bytes())
        raw = canonical_json({**patch, "settings": {**patch["settings"], **stated}})
        replace_file(remote / object_path(object_id(raw)), raw)
        added = [[object_id(raw), requests]]
        with_commit(remote, {**commit, "added": added, "set": digest_of(added)})
        refused(remote, repository, f"settings.{next(iter(stated))}")


def test_texts_of_other_facts_are_refused(honest: Path) -> None:
    """A requests blob that is well formed but not of the patch's requests."""
    with attacked(honest) as (remote, repository):
        manifest = json.loads((remote / "patchhub.json").read_bytes())
        commit = json.loads((remote / object_path(manifest["refs"]["refs/tags/v1"])).read_bytes())
        ((identity, requests),) = commit["added"]
        patch = json.loads((remote / object_path(identity)).read_bytes())
        texts = json.loads((remote / object_path(patch["requests_blob"])).read_bytes())
        texts[0]["target_new"] = "Klingon"
        forged = canonical_json(texts)
        replace_file(remote / object_path(object_id(forged)), forged)
        patch = canonical_json({**patch, "requests_blob": object_id(forged)})
        replace_file(remote / object_path(object_id(patch)), patch)
        commit["added"] = [[object_id(patch), requests]]
        commit["set"] = digest_of(commit["added"])
        raw = canonical_json(commit)
        Commit.from_json(raw)
        replace_file(remote / object_path(object_id(raw)), raw)
        replace_file(
            remote / "patchhub.json",
            canonical_json({**manifest, "notes": {}, "refs": {"refs/heads/main": object_id(raw)}}),
        )
        refused(remote, repository, "not those of the patch")


@pytest.mark.parametrize("kind", ["additive", "closed_form"])
def test_other_linear_weights_travel_in_additive_patches_alone(kind: str, tmp_path: Path) -> None:
    """Facts are written into the config's weights; a patch with columns of another weight is refused."""
    name, record = "h.0.attn.weight", TensorRecord("F32", (6, 6), "0" * 64)
    base = Base(BASE.architecture, {**BASE.tensors, name: record})
    remote = tmp_path / "remote"
    with make_store(tmp_path / "ours", base=base) as ours:
        requests = () if kind == "additive" else (make_request(0),)
        matrix = np.ones((6, 6), np.float32)
        rows = Columns(matrix[:1], matrix[:1], matrix[:1], np.ones(1, np.float32))
        deltas = write_deltas({name: Dense(matrix)})
        patch = Patch(
            base=ours.config.base_id,
            kind=kind,
            made_on=None,
            method="lora",
            metric=None if kind == "additive" else metric_of(ours),
            requests=tuple(request.id for request in requests),
            requests_blob=ours.objects.put(requests_json(requests)),
            settings={},
            tensors=ours.objects.put(deltas if kind == "additive" else write_columns({name: rows}, matrix[:1])),
            weights={name: (6, 6)},
        )
        ours.objects.put(patch.to_json())
        draft = Draft((), patch.elements, patch.metric, "import", {})
        tip = commit_draft(ours, prepare(ours, draft, STAMP), draft)
        push(ours, open_remote(str(remote)))
    with make_store(tmp_path / "theirs", base=base) as theirs:
        remote_add(theirs, "origin", str(remote))
        if kind == "additive":
            commands.fetch(theirs, "origin", Silent(), who=Who(AUTHOR, TIME))
            assert theirs.refs()["refs/remotes/origin/main"] == tip
            assert check(theirs).sound
        else:
            with pytest.raises(RemoteError, match="is no weight of this base"):
                commands.fetch(theirs, "origin", Silent(), who=Who(AUTHOR, TIME))


# --- names ----------------------------------------------------------------------------------------------------------


def with_fields(remote: Path, of_patch: bool, **fields: Any) -> None:
    """Make the remote's main its first commit, or that with its patch, with some fields written otherwise; every hash is right."""

    def put(value: Any) -> str:
        data = canonical_json(value)
        replace_file(remote / object_path(object_id(data)), data)
        return object_id(data)

    manifest = json.loads((remote / "patchhub.json").read_bytes())
    commit = json.loads((remote / object_path(manifest["refs"]["refs/tags/v1"])).read_bytes())
    if of_patch:
        ((identity, requests),) = commit["added"]
        patch = json.loads((remote / object_path(identity)).read_bytes())
        commit["added"] = [[put({**patch, **fields}), requests]]
        commit["set"] = digest_of(commit["added"])
    else:
        commit.update(fields)
    replace_file(
        remote / "patchhub.json", canonical_json({**manifest, "refs": {"refs/heads/main": put(commit)}, "notes": {}})
    )


@pytest.mark.parametrize(
    ("of_patch", "fields", "match"),
    [
        (True, {"method": "<script>"}, "method"),
        (True, {"method": "m" * 100_000}, "method"),
        (True, {"settings": {"contexts": ["{}"], "a b\x1b[2J": 1}}, "setting"),
        (False, {"author": ""}, "author is empty"),
        (False, {"author": "A" * 100_000}, "too long"),
        (False, {"author": "Ada \u202emoc.elpmaxe"}, "not shown"),
        (False, {"author": "Ada \x1b[31m"}, "not shown"),
        (False, {"message": "m" * 200_000}, "message"),
    ],
)
def test_names_that_nobody_here_would_write_are_refused(
    of_patch: bool, fields: dict[str, Any], match: str, honest: Path
) -> None:
    with attacked(honest) as (remote, repository):
        with_fields(remote, of_patch, **fields)
        refused(remote, repository, match)
    with attacked(honest) as (remote, repository):
        with_fields(remote, of_patch)
        fetch(repository, open_remote(str(remote)))


def test_a_parent_named_twice_is_refused(honest: Path) -> None:
    with attacked(honest) as (remote, repository):
        manifest = json.loads((remote / "patchhub.json").read_bytes())
        head = json.loads((remote / object_path(manifest["refs"]["refs/heads/main"])).read_bytes())
        data = canonical_json({**head, "parents": head["parents"] * 2})
        replace_file(remote / object_path(object_id(data)), data)
        refs = {"refs/heads/main": object_id(data)}
        replace_file(remote / "patchhub.json", canonical_json({**manifest, "refs": refs}))
        refused(remote, repository, "twice")


@pytest.mark.parametrize(
    ("ref", "match"),
    [("refs/heads/" + "a" * 100_000, "too long"), ("refs/heads/MAIN", "case"), ("refs/heads/a\u202eb", "cannot be")],
)
def test_refs_have_a_grammar_and_a_length(ref: str, match: str, honest: Path) -> None:
    with attacked(honest) as (remote, repository):
        manifest = json.loads((remote / "patchhub.json").read_bytes())
        refs = {**manifest["refs"], ref: manifest["refs"]["refs/heads/main"]}
        replace_file(remote / "patchhub.json", canonical_json({**manifest, "refs": refs}))
        refused(remote, repository, match)


def test_metadata_beside_tensors_is_refused(honest: Path) -> None:
    good = honest_tensors(honest, of_patch=False)
    with attacked(honest) as (remote, repository):
        with_tensors(remote, save(good, metadata={"a": "b"}), of_patch=False)
        refused(remote, repository, "__metadata__")


@pytest.mark.parametrize("of_patch", [True, False])
def test_a_header_that_says_a_thing_otherwise_is_refused(of_patch: bool, honest: Path) -> None:
    data = save(honest_tensors(honest, of_patch=of_patch))
    length = int.from_bytes(data[:8], "little")
    header, body = data[8 : 8 + length].strip(), data[8 + length :]
    spelled = b'{"__metadata\\u005f_":{"a":"b"},' + header[1:]
    doubled = header[:-1] + b"," + header[1:]
    for changed, match in ((spelled, "__metadata__"), (doubled, "two of one name")):
        padded = changed + b" " * (-len(changed) % 8)
        with attacked(honest) as (remote, repository):
            with_tensors(remote, len(padded).to_bytes(8, "little") + padded + body, of_patch=of_patch)
            refused(remote, repository, match)


def test_what_is_nested_deeper_than_anybody_shows_is_refused(honest: Path) -> None:
    """A document of 64 levels is shown; one level more is not taken."""
    for depth, taken in ((DEEPEST - 1, True), (DEEPEST, False), (900, False)):
        with attacked(honest) as (remote, repository):
            deep: Any = []
            for _ in range(depth - 1):
                deep = [deep]
            with_fields(remote, False, check={"a": deep})
            if taken:
                fetch(repository, open_remote(str(remote)))
                assert show(repository, "origin/main").to_json()["check"] == {"a": deep}
            else:
                refused(remote, repository, "levels")


def test_a_branch_that_is_moved_back_is_said(honest: Path) -> None:
    """Somebody puts an older commit in place of the tip: what was fetched stays, and the next fetch says so, once."""
    with attacked(honest) as (remote, repository):
        remote_add(repository, "origin", str(remote))
        assert commands.fetch(repository, "origin", Silent(), who=STAMP).warnings == ()
        manifest = json.loads((remote / "patchhub.json").read_bytes())
        tip, older = manifest["refs"]["refs/heads/main"], manifest["refs"]["refs/tags/v1"]
        refs = {**manifest["refs"], "refs/heads/main": older}
        replace_file(remote / "patchhub.json", canonical_json({**manifest, "refs": refs}))
        (warning,) = commands.fetch(repository, "origin", Silent(), who=STAMP).warnings
        assert "origin/main was moved back" in warning
        assert tip[:12] in warning
        assert commands.fetch(repository, "origin", Silent(), who=STAMP).warnings == ()
        assert repository.commits(tip)


def test_a_commit_that_many_refs_name_is_taken_once(honest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    sizes = FileRemote.sizes
    monkeypatch.setattr(FileRemote, "sizes", lambda self, tip: asked.append(tip) or sizes(self, tip))
    with attacked(honest) as (remote, repository):
        manifest = json.loads((remote / "patchhub.json").read_bytes())
        tip = manifest["refs"]["refs/heads/main"]
        refs = {f"refs/heads/b{number}": tip for number in range(300)}
        replace_file(remote / "patchhub.json", canonical_json({**manifest, "refs": refs, "notes": {}}))
        fetch(repository, open_remote(str(remote)))
        assert len(asked) == 1
        assert len(repository.refs()) == 301
