"""What `revert`, `cherry-pick` and `commit --on-conflict replace` ask of shards: which come and go whole, which are trained again.

A shard is one unit of history. Where a change is about some of its facts only, it is trained again on the facts that it shall hold; but
where the store has a shard of its line that holds exactly those, that one takes its place, bit for bit. Reads JSON only; `train_reshaped`
loads the base.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from patchhub.objects import Element, Request
from patchhub.porcelain.shards import active_shards, earlier_shards, followers, withheld
from patchhub.store.repository import Repository


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

    def texts(self, repository: Repository) -> dict[str, Request]:
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
    repository: Repository,
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


def shrink(repository: Repository, forgotten: Mapping[str, frozenset[str]]) -> ShardPlan:
    """Take facts out of active shards."""
    found = ShardPlan()
    for shard, facts in sorted(forgotten.items()):
        found += _shaped(repository, shard, _facts(repository, shard) - facts, None)
    return found


def _replaced(
    repository: Repository, active: frozenset[Element], old: str | None, new: str | None, chosen: frozenset[str] | None
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


def _targets(repository: Repository, active: frozenset[Element], old: str | None, new: str | None) -> list[str]:
    """The active shards that a change from ``old`` to ``new`` is made to."""
    if old is not None and (old, None) in active:
        return [old]
    line = [shard for shard in (old, new) if shard is not None]
    here = {shard for shard in line if (shard, None) in active}
    return sorted(here.union(*(followers(repository, shard, active) for shard in line)))


def _shaped(repository: Repository, shard: str, facts: frozenset[str], new: str | None) -> ShardPlan:
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


def line_of(repository: Repository, shard: str, other: str | None) -> list[str]:
    """A shard, another, and what the shard was made from: where the texts of its facts may be."""
    line = [shard, *([other] if other else []), *earlier_shards(repository, shard)]
    return [one for one in dict.fromkeys(line) if one in repository.objects]


def _one_line(repository: Repository, one: str, other: str) -> bool:
    return other in earlier_shards(repository, one) or one in earlier_shards(repository, other)


def _facts(repository: Repository, shard: str | None) -> frozenset[str]:
    return frozenset(repository.patch(shard).requests) if shard is not None else frozenset()


def shards_among(repository: Repository, elements: Iterable[Element]) -> frozenset[str]:
    """The patch ids of the shards among some elements."""
    return frozenset(active_shards(repository, elements))
