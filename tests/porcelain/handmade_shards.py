"""Shards drawn at random instead of trained: what version control does with them, without training."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from patchhub.delta import Sparse, from_sparse
from patchhub.editing.wise.texts import Shard
from patchhub.objects import Element, Patch, Request
from patchhub.sets.columns import weight_shapes
from patchhub.sets.commits import Draft
from patchhub.sets.shards import ShardRecord, below_of
from patchhub.store.store import Store
from patchhub.who import Who
from patchhub.worktree.shards import store_shard
from tests.porcelain.synthetic import write

AUTHOR = "Ada <ada@example.org>"
TIME = "2026-11-21T09:30:00Z"


def random_change(rng: np.random.Generator, shape: tuple[int, int], density: float = 0.3) -> Sparse:
    """Float32 values of every magnitude at random places, none of them zero."""
    values = rng.standard_normal(shape) * 10.0 ** rng.integers(-8, 2, shape)
    kept = rng.random(shape) < density
    matrix: np.ndarray = np.where(kept, values, 0.0).astype(np.float32)
    return from_sparse(matrix)


def put_shard(
    repository: Store,
    requests: Sequence[Request],
    *,
    follows: str | None = None,
    number: int = 0,
    layer: int = 0,
    beside: Iterable[Element] = (),
    rank: int | None = None,
    threshold: float | None = None,
) -> Patch:
    """A shard patch that holds ``requests``, as training on the set ``beside`` would leave it; they alone decide its numbers."""
    shapes = weight_shapes(repository)
    weights = sorted(shapes)
    beside = frozenset(beside)
    rng = np.random.default_rng([int(request.id[:8], 16) for request in requests])
    drawn = float(rng.uniform(0.1, 10.0))
    record = ShardRecord(
        below=below_of(repository, beside, weights[: layer + 1]),
        contexts=("{}",),
        follows=follows,
        number=number,
        report={} if rank is None else {"rank": rank, "relative_error": 0.5},
        routing={"threshold": drawn if threshold is None else threshold, "distance": "max"},
        training={"layer": layer, "merge_method": "ties", "merge_density": 0.5},
    )
    shard = Shard(weights[layer], random_change(rng, shapes[weights[layer]]), record.routing)
    return store_shard(repository, shard, record, requests, beside)


def commit_shard(
    repository: Store,
    requests: Sequence[Request],
    *,
    follows: str | None = None,
    number: int = 0,
    layer: int = 0,
    message: str = "shard",
    threshold: float | None = None,
) -> Patch:
    """Commit a new shard, or one that takes the place of an active one and holds its facts and ``requests``."""
    _, head = repository.head
    beside = repository.active(head) - {(follows or "", None)}
    earlier = repository.requests(repository.patch(follows)) if follows else []
    patch = put_shard(
        repository,
        [*earlier, *requests],
        follows=follows,
        number=number,
        layer=layer,
        beside=beside,
        threshold=threshold,
    )
    metric = repository.commit(head).metric if head else None
    draft = Draft((head,) if head else (), beside | patch.elements, metric, "commit", {"patches": [patch.id]})
    write(repository, draft, Who(AUTHOR, TIME, message), change={})
    return patch
