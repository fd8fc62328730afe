"""Evidence in the forms of others: held to the official schema of CycloneDX, and to in-toto's and DSSE's encodings."""

from __future__ import annotations

import base64
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from patchhub.errors import RevisionError, SettingsError
from patchhub.objects import Note
from patchhub.repository import Repository
from patchhub.signing.ssh import verify
from tests.pins.history import AUTHOR, BASE, EPOCH, TIME, commit_facts, init
from tests.signing.conftest import keys, public  # noqa: F401  # a fixture


@pytest.fixture
def repo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Repository:
    """Two commits, a revert, and a note with an interval."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", EPOCH)
    (tmp_path / "store").mkdir()
    init(tmp_path / "store")
    commit_facts(tmp_path / "store", "two facts\u202e <b>", {"Ann": "French", "Bob": "German"})
    commit_facts(tmp_path / "store", "", {"Cleo": "Dutch"})
    repository = Repository(tmp_path / "store", progress=False)
    repository.config("author", AUTHOR)
    repository.revert(subject="Bob")
    scores = {"S": {"value": 0.75, "low": 0.5, "high": 1.0, "records": 4}, "more": {"n": 1.0}}
    note = Note(
        str(repository["HEAD"].id), "Ada", scores, {"metrics": "counterfact", "file": "f.json", "facts": 4}, "one"
    )
    repository.store.add_note(note, command="eval", arguments={}, author=AUTHOR, time=TIME)
    return repository


def bom(repository: Repository, tmp_path: Path) -> dict[str, Any]:
    done = repository.export_bom(out=tmp_path / "bom.json")
    document: dict[str, Any] = json.loads((tmp_path / "bom.json").read_text(encoding="utf-8"))
    assert done.count == len(document["metadata"]["component"]["pedigree"]["commits"])
    return document


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_bom_is_one_by_the_official_schema(repo: Repository, tmp_path: Path) -> None:
    validation = pytest.importorskip(
        "cyclonedx.validation.json", reason="cyclonedx-python-lib[json-validation] is not there", exc_type=ImportError
    )
    pytest.importorskip("jsonschema", reason="cyclonedx-python-lib[json-validation] is not there")
    from cyclonedx.schema import SchemaVersion

    bom(repo, tmp_path)
    for extra in ({}, {"author": "no email < at all"}, {"author": "<ada@example.org>"}):
        if extra:
            repo.revert("HEAD", message=str(extra), **extra)
            repo.export_bom(out=tmp_path / "bom.json", overwrite=True)
        text = (tmp_path / "bom.json").read_text(encoding="utf-8")
        assert validation.JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
        assert validation.JsonStrictValidator(SchemaVersion.V1_6).validate_str(text.replace('"SHA-256"', '"other"'))


def test_the_bom_says_what_the_audit_says(repo: Repository, tmp_path: Path) -> None:
    document, found = bom(repo, tmp_path)["metadata"]["component"], repo.audit()
    assert document["version"] == found.commit
    (base,) = document["pedigree"]["ancestors"]
    assert base["hashes"] == [{"alg": "SHA-256", "content": BASE.id}]
    assert {part["name"]: part["hashes"][0]["content"] for part in base["components"]} == {
        name: record.sha256 for name, record in BASE.tensors.items()
    }
    log = list(reversed(list(repo.log())))
    assert [commit["uid"] for commit in document["pedigree"]["commits"]] == [entry.id for entry in log]
    patches = [json.loads(patch["diff"]["text"]["content"]) for patch in document["pedigree"]["patches"]]
    told = [(patch["commit"], fact["change"], fact["request"]) for patch in patches for fact in patch["facts"]]
    assert told == [(row.commit, row.change, row.request) for row in found.rows]
    metrics = document["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    assert metrics[0] == {
        "type": "counterfact: S",
        "value": "0.75",
        "slice": "4 facts of f.json",
        "confidenceInterval": {"lowerBound": "0.5", "upperBound": "1"},
    }
    assert bom_again(repo, tmp_path) == (tmp_path / "bom.json").read_bytes()


def bom_again(repository: Repository, tmp_path: Path) -> bytes:
    repository.export_bom(out=tmp_path / "again.json")
    return (tmp_path / "again.json").read_bytes()


def test_attestations_are_statements_about_the_commit(repo: Repository, tmp_path: Path) -> None:
    done = repo.export_attestations(out=tmp_path / "scores.jsonl")
    (line,) = (tmp_path / "scores.jsonl").read_text(encoding="utf-8").splitlines()
    statement = json.loads(line)
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    assert statement["subject"][0]["digest"] == {"sha256": repo["HEAD"].id}
    assert statement["predicate"]["scores"]["S"]["value"] == 0.75
    assert (done.count, done.signed) == (1, False)
    with pytest.raises(SettingsError, match="there already"):
        repo.export_attestations(out=tmp_path / "scores.jsonl")
    with pytest.raises(RevisionError, match="nothing is noted"):
        repo.export_attestations("HEAD~1", out=tmp_path / "none.jsonl")
    with pytest.raises(SettingsError, match="in a patchhub store"):
        repo.export_bom(out=repo.store.root / "bom.json")
    with pytest.raises(RevisionError, match="unpatched model"):
        repo.export_bom("base", out=tmp_path / "none.json")


def test_a_signed_attestation_is_an_envelope_that_openssh_checks(repo: Repository, keys: Path, tmp_path: Path) -> None:  # noqa: F811
    assert repo.export_attestations(out=tmp_path / "signed.jsonl", key=keys / "ada").signed
    envelope = json.loads((tmp_path / "signed.jsonl").read_text(encoding="utf-8"))
    payload = base64.b64decode(envelope["payload"])
    kind = envelope["payloadType"]
    words = f"DSSEv1 {len(kind)} {kind} {len(payload)} ".encode() + payload
    (signature,) = envelope["signatures"]
    body = "\n".join(signature["sig"][start : start + 70] for start in range(0, len(signature["sig"]), 70))
    text = f"-----BEGIN SSH SIGNATURE-----\n{body}\n-----END SSH SIGNATURE-----\n"
    assert verify(words, "attestation", public(keys / "ada"), text, TIME, None).status == "unknown"
    assert verify(words + b" ", "attestation", public(keys / "ada"), text, TIME, None).status == "broken"
    listed = subprocess.run(
        ["ssh-keygen", "-l", "-f", str(keys / "ada.pub")], capture_output=True, text=True, check=True
    )
    assert signature["keyid"] == listed.stdout.split()[1]
