"""The part of `refresh` that is about shards: thresholds are measured again where the weights below them changed."""

from __future__ import annotations

from patchhub.delta import Delta
from patchhub.objects import Element
from patchhub.porcelain.columns import read_state, solve_change
from patchhub.porcelain.opened import Opened
from patchhub.porcelain.progress import Progress
from patchhub.porcelain.shards import stale_shards
from patchhub.porcelain.train_shard import measure_again
from patchhub.store.repository import Repository


def deltas_near(
    repository: Repository, active: frozenset[Element], elements: frozenset[Element]
) -> dict[str, list[Delta]]:
    """The deltas of a set that is near HEAD's, which is ``active``."""
    deltas = {weight: list(found) for weight, found in read_state(repository, repository.head[1]).items()}
    for weight, part in solve_change(repository, active, elements).items():
        deltas.setdefault(weight, []).append(part)
    return deltas


def measure_shards(
    repository: Repository,
    opened: Opened,
    active: frozenset[Element],
    elements: frozenset[Element],
    progress: Progress,
) -> tuple[frozenset[Element], tuple[str, ...], tuple[str, ...]]:
    """The set with stale thresholds measured on its weights; the new shards, and those whose texts are withheld."""
    stale = stale_shards(repository, elements)
    withheld = tuple(shard for shard in stale if not repository.requests(repository.patch(shard)))
    due = [shard for shard in stale if shard not in withheld]
    made: list[str] = []
    if due:
        opened = opened.moved(repository, deltas_near(repository, active, elements))
        progress.stage("measuring thresholds", len(due))
    for shard in due:
        beside = elements - {(shard, None)}
        patch = measure_again(repository, opened, beside, shard, progress)
        elements = beside | patch.elements
        made.append(patch.id)
        progress.advance(1)
    return elements, tuple(made), withheld
