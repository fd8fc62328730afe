"""A revision as a CycloneDX ML-BOM: the base as ancestor, each commit in its pedigree as a patch, scores in the model card.

Documents alone, of version 1.6 of the specification; `patchhub.porcelain.trust.audit` collects what they say. Also in-toto Statements
and the DSSE envelopes around them, since both are how evidence leaves patchhub."""

from __future__ import annotations

import base64
import json
import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

SPECIFICATION: Final = "1.6"
PAYLOAD_TYPE: Final = "application/vnd.in-toto+json"
STATEMENT_TYPE: Final = "https://in-toto.io/Statement/v1"

_SPACE: Final = uuid.UUID("6f1a3c52-5d0e-5b7e-9a7d-3f6f6b1c2d10")  # of serial numbers that follow from commits
_AUTHOR = re.compile(r"\s*(?P<name>[^<]*?)\s*(?:<(?P<email>[^<>\s@]+@[^<>\s@]+)>)?\s*")


@dataclass(frozen=True)
class Ancestor:
    """The base: what it is called, where it is on the Hub if it is, the id of its object, and per tensor type, shape and SHA-256."""

    name: str
    revision: str | None
    on_hub: bool
    id: str
    model_type: str
    tensors: Mapping[str, tuple[str, tuple[int, ...], str]]


@dataclass(frozen=True)
class PatchOf:
    """A commit in the pedigree: who made it, when and why, its changes of facts, and further properties as texts."""

    commit: str
    author: str
    time: str
    message: str
    facts: Sequence[Mapping[str, Any]]
    properties: Mapping[str, str]


@dataclass(frozen=True)
class Performance:
    """One score: whose definition, its value and interval, and what it was measured on."""

    kind: str
    value: float
    interval: tuple[float, float] | None
    measured_on: str


def model_bom(
    name: str,
    version: str,
    commit: str,
    time: str,
    ancestor: Ancestor,
    patches: Iterable[PatchOf],
    scores: Iterable[Performance],
    properties: Mapping[str, str],
) -> dict[str, Any]:
    """The document.

    Args:
        name: what the patched model is called.
        version: of patchhub, which is named as the tool.
        commit: the revision's id; the serial number follows from it.
        time: of the commit.
        patches: the commits below, the oldest first.
        scores: what is noted about the revision.
        properties: what else is said of the revision, as texts.
    """
    found = list(patches)
    base = _base(ancestor)
    component = {
        "type": "machine-learning-model",
        "bom-ref": commit,
        "name": name,
        "version": commit,
        "description": f"{ancestor.name} with the facts of a patchhub commit",
        "pedigree": {
            "ancestors": [base],
            "commits": [_commit(patch) for patch in found],
            "patches": [_patch(patch) for patch in found],
        },
        "modelCard": _card(ancestor, list(scores)),
        "properties": _properties({"commit": commit, "base": ancestor.id, **properties}),
    }
    return {
        "$schema": f"http://cyclonedx.org/schema/bom-{SPECIFICATION}.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": SPECIFICATION,
        "serialNumber": f"urn:uuid:{uuid.uuid5(_SPACE, commit)}",
        "version": 1,
        "metadata": {
            "timestamp": time,
            "tools": {"components": [{"type": "application", "name": "patchhub", "version": version}]},
            "component": component,
        },
        "dependencies": [{"ref": commit}],
    }


def _base(ancestor: Ancestor) -> dict[str, Any]:
    found: dict[str, Any] = {
        "type": "machine-learning-model",
        "bom-ref": f"base-{ancestor.id}",
        "name": ancestor.name,
        "version": ancestor.revision or ancestor.id,
        "hashes": [_sha256(ancestor.id)],
        "properties": _properties(
            {"hash-of": "the base object of patchhub: architecture, and the SHA-256 of each tensor"}
        ),
        "components": [
            {
                "type": "data",
                "name": name,
                "hashes": [_sha256(digest)],
                "properties": _properties({"dtype": dtype, "shape": json.dumps(list(shape))}),
            }
            for name, (dtype, shape, digest) in sorted(ancestor.tensors.items())
        ],
    }
    if ancestor.on_hub:
        found["purl"] = f"pkg:huggingface/{ancestor.name}@{ancestor.revision}"
    return found


def _commit(patch: PatchOf) -> dict[str, Any]:
    parts = _AUTHOR.fullmatch(patch.author)
    name, email = (parts["name"], parts["email"]) if parts else (patch.author, None)
    author = {"timestamp": patch.time, "name": name or email or patch.author, **({"email": email} if email else {})}
    return {"uid": patch.commit, "author": author, "message": patch.message}


def _patch(patch: PatchOf) -> dict[str, Any]:
    document = {"commit": patch.commit, "facts": list(patch.facts), **patch.properties}
    text = json.dumps(document, ensure_ascii=False, sort_keys=True)
    return {"type": "unofficial", "diff": {"text": {"contentType": "application/json", "content": text}}}


def _card(ancestor: Ancestor, scores: Sequence[Performance]) -> dict[str, Any]:
    parameters = {"task": "text-generation", "modelArchitecture": ancestor.model_type}
    metrics = []
    for score in scores:
        metric: dict[str, Any] = {"type": score.kind, "value": f"{score.value:.6g}", "slice": score.measured_on}
        if score.interval is not None:
            low, high = score.interval
            metric["confidenceInterval"] = {"lowerBound": f"{low:.6g}", "upperBound": f"{high:.6g}"}
        metrics.append(metric)
    return {
        "modelParameters": parameters,
        **({"quantitativeAnalysis": {"performanceMetrics": metrics}} if metrics else {}),
    }


def _properties(found: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"name": f"patchhub:{name}", "value": value} for name, value in found.items()]


def _sha256(digest: str) -> dict[str, str]:
    return {"alg": "SHA-256", "content": digest}


# --- attestations ---------------------------------------------------------------------------------------------------


def in_toto_statement(commit: str, predicate_type: str, predicate: Mapping[str, Any]) -> bytes:
    """A Statement of in-toto about a commit, whose id is the SHA-256 of its object."""
    subject = [{"name": "patchhub commit", "digest": {"sha256": commit}}]
    document = {"_type": STATEMENT_TYPE, "subject": subject, "predicateType": predicate_type, "predicate": predicate}
    return json.dumps(document, ensure_ascii=False, sort_keys=True).encode("utf-8")


def signed_bytes(statement: bytes) -> bytes:
    """What is signed of a statement: DSSE's encoding of its type and itself."""
    kind = PAYLOAD_TYPE.encode("ascii")
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(statement), statement)


def envelope(statement: bytes, key: str, signature: bytes) -> dict[str, Any]:
    """A DSSE envelope around a statement, with a signature of `signed_bytes`."""
    return {
        "payloadType": PAYLOAD_TYPE,
        "payload": base64.b64encode(statement).decode("ascii"),
        "signatures": [{"keyid": key, "sig": base64.b64encode(signature).decode("ascii")}],
    }


def lines(documents: Iterable[Mapping[str, Any]]) -> bytes:
    """Documents as JSON Lines, the form of an in-toto bundle."""
    return "".join(_line(document) for document in documents).encode("utf-8")


def _line(document: Mapping[str, Any]) -> str:
    return json.dumps(document, ensure_ascii=False, sort_keys=True) + "\n"
