"""WISE shards of a set: which are there, what they came from, and what a change of the set asks of them. Reads JSON only.

A shard is one unit of history. Where a change is about some of its facts only, it is trained again on the facts that it shall hold; but
where the store has a shard of its line that holds exactly those, that one takes its place, bit for bit."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final

from patchhub.canonical import COUNT, IDENTIFIER, MAPPING, TEXT, MalformedError, list_of, object_id, optional, record_of
from patchhub.errors import CorruptStoreError, RepositoryError
from patchhub.objects import Element, Patch, Request, block_of, set_json
from patchhub.store import lookup
from patchhub.store.store import Store

METHOD: Final = "wise"


@dataclass(frozen=True)
class Below:
    """What a threshold was measured on: the part of the active set that changes any of some weights, as a set object's id."""

    set_id: Annotated[str, IDENTIFIER, "set"]
    weights: Annotated[tuple[str, ...], list_of(TEXT)]


@dataclass(frozen=True)
class ShardRecord:
    """The settings of a shard patch, as docs/format.md describes them.

    Attributes:
        below: the weights at or below the shard's layer, and what changed them when its threshold was measured.
        contexts: the templates that its requests were trained in.
        follows: the shard that it was made from; None for one that was opened.
        number: which random subspace it was opened in.
        report: what training or recompression measured.
        routing: what routing needs; ``threshold`` is always there.
        training: the settings of the training.
    """

    below: Annotated[Below, record_of(Below)]
    contexts: Annotated[tuple[str, ...], list_of(TEXT)]
    follows: Annotated[str | None, optional(IDENTIFIER)]
    number: Annotated[int, COUNT]
    report: Annotated[Mapping[str, Any], MAPPING]
    routing: Annotated[Mapping[str, Any], MAPPING]
    training: Annotated[Mapping[str, Any], MAPPING]

    def to_json(self) -> dict[str, Any]:
        """The patch's `settings`."""
        encoded: dict[str, Any] = _RECORD.encode(self)
        return encoded


_RECORD = record_of(ShardRecord)


def shard_record(patch: Patch) -> ShardRecord:
    """The settings of a shard patch.

    Raises:
        CorruptStoreError: they are not those of a shard.
    """
    try:
        record: ShardRecord = _RECORD.decode(patch.settings, "settings")
    except MalformedError as error:
        raise _unsound(patch, str(error)) from None
    threshold = record.routing.get("threshold")
    if not isinstance(threshold, float) or not 0 <= threshold < math.inf:
        raise _unsound(patch, "its routing has no threshold of at least 0")
    if not isinstance(record.routing.get("gate", ""), str):
        raise _unsound(patch, "its routing names a gate that is no path")
    if len(patch.weights) != 1:
        raise _unsound(patch, f"it changes {len(patch.weights)} weights, not one")
    return record


def _unsound(patch: Patch, reason: str) -> CorruptStoreError:
    return CorruptStoreError(
        f"patch {patch.id[:12]} is no sound shard: {reason}",
        remedy="Run `patchhub fsck` to see what is damaged.",
        patch=patch.id,
    )


def active_shards(repository: Store, elements: Iterable[Element]) -> dict[str, Patch]:
    """The shards of a set by patch id, in ascending order."""
    whole = sorted(patch for patch, request in elements if request is None)
    found = {identity: repository.patch(identity) for identity in whole}
    return {identity: patch for identity, patch in found.items() if patch.kind == "shard"}


def shards_at(repository: Store, commit: str | None) -> dict[str, Patch]:
    """The shards that are active at a commit by patch id, in ascending order, without reading its set."""
    return active_shards(repository, ((patch, None) for patch in lookup.whole_patches(repository, commit)))


def without_shards(repository: Store, elements: Iterable[Element]) -> frozenset[Element]:
    """The part of a set that the weights are of: columns and additive patches."""
    elements = frozenset(elements)
    return elements - {(identity, None) for identity in active_shards(repository, elements)}


def texts_of(repository: Store, identity: str) -> list[Request]:
    """The requests of a shard.

    Raises:
        RepositoryError: they are withheld.
    """
    requests = repository.requests(repository.patch(identity))
    if not requests:
        raise withheld(identity)
    return requests


def withheld(identity: str) -> RepositoryError:
    """The error that a shard's texts are not here."""
    return RepositoryError(
        f"the texts of shard {identity[:12]} are withheld, so it cannot be trained or measured again",
        remedy="Do this where the texts are, or take the whole shard back.",
        patch=identity,
    )


def earlier_shards(repository: Store, identity: str) -> Iterator[str]:
    """The shards that one was made from, the latest first, as far back as this store has them; none for other patches."""
    while identity in repository.objects and repository.patch(identity).kind == "shard":
        before = shard_record(repository.patch(identity)).follows
        if before is None:
            return
        yield before
        identity = before


def followers(repository: Store, identity: str, elements: Iterable[Element]) -> list[str]:
    """The shards of a set that were made from one, at whatever distance; the shard itself is none of them."""
    shards = active_shards(repository, elements)
    return [later for later in shards if later != identity and identity in earlier_shards(repository, later)]


def superseded(repository: Store, elements: frozenset[Element]) -> frozenset[Element]:
    """The shards of a set that another of its shards was made from and holds all facts of."""
    shards = active_shards(repository, elements)
    held = {identity: set(patch.requests) for identity, patch in shards.items()}
    return frozenset(
        (earlier, None)
        for later in shards
        for earlier in earlier_shards(repository, later)
        if earlier in shards and held[earlier] <= held[later]
    )


def open_shard(shards: Mapping[str, Patch], weight: str, shard_size: int) -> str | None:
    """The shard that the next commit continues: of those of ``weight`` with room, the one with the most facts.

    Shards of the same size are taken in order of their ids; one that was recompressed is closed. None where all are full:
    a new one is opened.
    """
    room = [
        identity
        for identity, patch in shards.items()
        if weight in patch.weights and len(patch.requests) < shard_size and "rank" not in shard_record(patch).report
    ]
    return min(room, key=lambda identity: (-len(shards[identity].requests), identity), default=None)


def next_number(shards: Mapping[str, Patch]) -> int:
    """The number of a new shard, which chooses its random subspace: one above the largest there."""
    return 1 + max((shard_record(patch).number for patch in shards.values()), default=-1)


def below_of(repository: Store, elements: Iterable[Element], weights: Iterable[str]) -> Below:
    """The part of a set that changes any of some weights, or another linear weight of their blocks; shards change none."""
    named = set(weights)
    blocks = {block_of(weight) for weight in named}
    columns = without_shards(repository, elements)
    changed = {identity: repository.patch(identity).weights for identity, _ in columns}
    touching = {i for i, names in changed.items() if blocks & {block_of(name) for name in names}}
    part = set_json(element for element in columns if element[0] in touching)
    return Below(object_id(part), tuple(sorted(named)))


def stale_shards(repository: Store, elements: Iterable[Element]) -> list[str]:
    """The shards of a set whose threshold was measured on other weights at or below their layer than the set has."""
    elements = frozenset(elements)
    recorded = {i: shard_record(patch).below for i, patch in active_shards(repository, elements).items()}
    return [i for i, below in recorded.items() if below_of(repository, elements, below.weights) != below]


@dataclass(frozen=True)
class Reshape:
    """A shard that must be trained again.

    Attributes:
        shard: the stored shard; where it is active, the new one takes its place.
        facts: the ids of the requests that the new one shall hold.
        sources: patches that have their texts.
    """

    shard: str
    facts: frozenset[str]
    sources: tuple[str, ...]

    def texts(self, repository: Store) -> dict[str, Request]:
        """The requests to hold by id, in the order of the sources.

        Raises:
            RepositoryError: some are withheld.
        """
        found: dict[str, Request] = {}
        for source in self.sources:
            for request in repository.requests(repository.patch(source)):
                if request.id in self.facts:
                    found.setdefault(request.id, request)
        if found.keys() != self.facts:
            raise withheld(self.shard)
        return found


@dataclass(frozen=True)
class ShardPlan:
    """What shall happen to the shards of a set.

    Attributes:
        remove: active shards that leave.
        restore: stored shards that enter as they are.
        train: shards to be trained again.
        skipped: ids of facts that were as asked already.
    """

    remove: frozenset[Element] = frozenset()
    restore: frozenset[Element] = frozenset()
    train: tuple[Reshape, ...] = ()
    skipped: frozenset[str] = frozenset()

    def __add__(self, other: ShardPlan) -> ShardPlan:
        return ShardPlan(
            self.remove | other.remove,
            self.restore | other.restore,
            self.train + other.train,
            self.skipped | other.skipped,
        )


def plan_shards(
    repository: Store,
    active: frozenset[Element],
    leaving: Iterable[str],
    entering: Iterable[str],
    chosen: frozenset[str] | None = None,
) -> ShardPlan:
    """Take shards out of a set and put others in, as far as they differ in facts.

    A shard that leaves and one of its line that enters are one change: it is about the facts that only one of the two holds. Where the
    leaving one is not active any more, the change is made to the active shards that were made from it.

    Args:
        active: the set.
        leaving, entering: patch ids of shards.
        chosen: only these facts; None: all.
    """
    found = ShardPlan()
    free = sorted(entering)
    for old in sorted(leaving):
        new = next((one for one in free if _one_line(repository, old, one)), None)
        if new is not None:
            free.remove(new)
        found += _replaced(repository, active, old, new, chosen)
    for new in free:
        found += _replaced(repository, active, None, new, chosen)
    return found


def shrink(repository: Store, forgotten: Mapping[str, frozenset[str]]) -> ShardPlan:
    """Take facts out of active shards."""
    found = ShardPlan()
    for shard, facts in sorted(forgotten.items()):
        found += _shaped(repository, shard, _facts(repository, shard) - facts, None)
    return found


def _replaced(
    repository: Store, active: frozenset[Element], old: str | None, new: str | None, chosen: frozenset[str] | None
) -> ShardPlan:
    held, wanted = _facts(repository, old), _facts(repository, new)
    minus, plus = held - wanted, wanted - held
    if chosen is not None:
        minus, plus = minus & chosen, plus & chosen
    targets = _targets(repository, active, old, new)
    if not targets:
        whole = chosen is None or plus == wanted
        if not plus or new is None:
            return ShardPlan(skipped=minus)
        if whole:
            return ShardPlan(restore=frozenset({(new, None)}), skipped=minus)
        return ShardPlan(train=(Reshape(new, plus, (new,)),), skipped=minus)
    present = frozenset(fact for target in targets for fact in _facts(repository, target))
    found = ShardPlan(skipped=(minus - present) | (plus & present))
    for number, target in enumerate(targets):
        more = plus - present if number == 0 else frozenset()
        found += _shaped(repository, target, (_facts(repository, target) - minus) | more, new)
    return found


def _targets(repository: Store, active: frozenset[Element], old: str | None, new: str | None) -> list[str]:
    """The active shards that a change from ``old`` to ``new`` is made to."""
    if old is not None and (old, None) in active:
        return [old]
    line = [shard for shard in (old, new) if shard is not None]
    here = {shard for shard in line if (shard, None) in active}
    return sorted(here.union(*(followers(repository, shard, active) for shard in line)))


def _shaped(repository: Store, shard: str, facts: frozenset[str], new: str | None) -> ShardPlan:
    """An active shard with other facts: as it is, gone, one of its line that holds just these, or trained again."""
    if facts == _facts(repository, shard):
        return ShardPlan()
    gone = frozenset({(shard, None)})
    if not facts:
        return ShardPlan(remove=gone)
    line = [*([new] if new else []), *earlier_shards(repository, shard)]
    exact = next((one for one in line if one in repository.objects and _facts(repository, one) == facts), None)
    if exact is not None:
        return ShardPlan(remove=gone, restore=frozenset({(exact, None)}))
    return ShardPlan(train=(Reshape(shard, facts, tuple(line_of(repository, shard, new))),))


def line_of(repository: Store, shard: str, other: str | None) -> list[str]:
    """A shard, another, and what the shard was made from: where the texts of its facts may be."""
    line = [shard, *([other] if other else []), *earlier_shards(repository, shard)]
    return [one for one in dict.fromkeys(line) if one in repository.objects]


def _one_line(repository: Store, one: str, other: str) -> bool:
    return other in earlier_shards(repository, one) or one in earlier_shards(repository, other)


def _facts(repository: Store, shard: str | None) -> frozenset[str]:
    return frozenset(repository.patch(shard).requests) if shard is not None else frozenset()


def shards_among(repository: Store, elements: Iterable[Element]) -> frozenset[str]:
    """The patch ids of the shards among some elements."""
    return frozenset(active_shards(repository, elements))
