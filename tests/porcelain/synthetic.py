"""Stores with columns drawn at random instead of recorded from a model: everything that version control does, without one.

Keys are drawn with the metric C as their covariance and lambda is a share of d_in, which is how real ones lie: E[k^T C^-1 k] = d_in.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from patchhub.constraints import Columns, solve
from patchhub.delta import Delta, add, to_dense
from patchhub.objects import Base, Element, Metric, Patch, Request, TensorRecord, requests_json, set_digest
from patchhub.sets.columns import read_columns, read_state, weight_shapes, write_columns
from patchhub.sets.commits import Draft, prepare, record
from patchhub.store.store import Store
from patchhub.who import Who
from tests.benchmarks.synthetic_store import HastyDisk

SHAPES = {"h.0": (12, 24), "h.1": (12, 24)}
AUTHOR = "Ada <ada@example.org>"
TIME = "2026-11-21T09:30:00Z"
BY = Who(AUTHOR, TIME)


def stamp(message: str = "") -> Who:
    return Who(AUTHOR, TIME, message)


def make_request(subject: str, target: str = "French", prompt: str = "The mother tongue of {} is") -> Request:
    return Request.make(prompt, subject, target)


def write(repository: Store, draft: Draft, who: Who, *, change: Mapping[str, Delta] | None = None) -> str:
    """Commit a draft without asking the guard."""
    return record(repository, prepare(repository, draft, who, change=change), draft)


@dataclass
class Synthetic:
    """A store and the distribution that its columns are drawn from."""

    repository: Store
    rng: np.random.Generator
    moment: dict[str, np.ndarray]
    keys: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)

    def active(self, revision: str = "HEAD") -> frozenset[Element]:
        return self.repository.active(self.repository.resolve(revision))

    def targets(self, revision: str = "HEAD") -> dict[str, str]:
        """Each active fact's subject and target."""
        from patchhub.sets.elements import active_requests

        return {r.subject: r.target_new for r in active_requests(self.repository, self.active(revision)).values()}

    def put_patch(
        self,
        requests: Sequence[Request],
        *,
        made_on: Iterable[Element] = (),
        metric: str | None = None,
        withheld: bool = False,
    ) -> Patch:
        """A closed-form patch. A prompt and subject have the same key whatever the target, as in a model."""
        columns = {weight: self._columns(weight, requests) for weight in SHAPES}
        texts = requests_json(requests)
        patch = Patch(
            base=self.repository.config.base_id,
            kind="closed_form",
            made_on=set_digest(made_on),
            method="memit",
            metric=metric or self.put_metric("text"),
            requests=tuple(request.id for request in requests),
            requests_blob="0" * 64 if withheld else self.repository.objects.put(texts),
            settings={},
            tensors=self.repository.objects.put(write_columns(columns, np.zeros((len(requests), 4)))),
            weights=SHAPES,
        )
        self.repository.objects.put(patch.to_json())
        return patch

    def put_metric(self, text: str) -> str:
        digest = text.encode().hex().ljust(64, "0")[:64]
        source = {"kind": "file", "names": [text]}
        metric = Metric(self.repository.config.base_id, "covariance", {"epsilon": 0.01}, source, digest, 100, 10)
        return self.repository.objects.put(metric.to_json())

    def commit(self, *requests: Request, message: str = "edit", remove: Iterable[Element] = (), **options: bool) -> str:
        """Commit a patch of those requests on HEAD, without the elements to ``remove``; returns the commit."""
        _, head = self.repository.head
        staying = self.repository.active(head) - frozenset(remove)
        patch = self.put_patch(requests, made_on=staying, **options)
        draft = Draft((head,) if head else (), staying | patch.elements, patch.metric, "commit", {"patch": patch.id})
        return write(self.repository, draft, stamp(message))

    def weights(self, revision: str = "HEAD") -> np.ndarray:
        """The stored state of a revision, all weights in one vector."""
        state = read_state(self.repository, self.repository.resolve(revision))
        shapes = weight_shapes(self.repository)
        return np.concatenate([to_dense(add(state.get(w, []), shapes[w])).ravel() for w in sorted(shapes)])

    def solution(self, elements: Iterable[Element]) -> np.ndarray:
        """The joint solution of a set, solved from nothing, all weights in one vector."""
        columns = read_columns(self.repository, elements)
        shapes = weight_shapes(self.repository)
        parts = [to_dense(solve(columns[w])) if w in columns else np.zeros(shapes[w]) for w in sorted(shapes)]
        return np.concatenate([part.ravel() for part in parts])

    def _columns(self, weight: str, requests: Sequence[Request]) -> Columns:
        out, inner = SHAPES[weight]
        C = self.moment[weight]
        known = self.keys.setdefault(weight, {})
        factor = np.linalg.cholesky(C)
        for request in requests:
            known.setdefault(request.text, factor @ self.rng.standard_normal(inner))
        keys = np.array([known[request.text] for request in requests]).astype(np.float32)
        preimages = np.linalg.solve(C, keys.T.astype(np.float64)).T.astype(np.float32)
        residuals = self.rng.standard_normal((len(requests), out)).astype(np.float32)
        return Columns(keys, preimages, residuals, np.full(len(requests), inner / 8, np.float32))


def make_store(folder: Path, seed: int = 0) -> Synthetic:
    """An empty store about a base with two small weights."""
    rng = np.random.default_rng(seed)
    tensors = {weight: TensorRecord("F32", shape, "0" * 64) for weight, shape in SHAPES.items()}
    weights = {weight: {"norm": 1.0, "shape": list(shape)} for weight, shape in SHAPES.items()}
    info = {"model_type": "example", "orientation": "out_in", "path": str(folder), "revision": None, "weights": weights}
    base = Base(architecture={"model_type": "example"}, tensors=tensors)
    repository = Store.init(
        folder, base.to_json(), base_info=info, settings={}, author=AUTHOR, time=TIME, disk=HastyDisk()
    )
    return Synthetic(repository, rng, {weight: _moment(rng, inner) for weight, (_, inner) in SHAPES.items()})


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Relative to the larger norm; 0 for two zeros."""
    return float(np.linalg.norm(a - b) / max(np.linalg.norm(a), np.linalg.norm(b), 1e-30))


def _moment(rng: np.random.Generator, inner: int) -> np.ndarray:
    """A random second moment with a spectrum over three decades."""
    basis = np.linalg.qr(rng.standard_normal((inner, inner)))[0]
    moment: np.ndarray = (basis * np.logspace(0, -3, inner)) @ basis.T
    return moment
