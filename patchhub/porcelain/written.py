"""What an editor hands to `commit`: patches that are in the store, and the state that their commit shall have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from patchhub.delta import Delta
from patchhub.objects import Element
from patchhub.porcelain.competition import Rival


@dataclass(frozen=True, eq=False)
class Written:
    """An edit that is finished and not committed.

    Attributes:
        patches: ids of the patches that were made.
        elements: the active set of the commit.
        metric: the metric of its columns; None where it has none.
        change: the delta of each weight against HEAD; None: to be solved from the recorded columns.
        rivals: facts that compete for a key, found before anything was optimised.
    """

    patches: tuple[str, ...]
    elements: frozenset[Element]
    metric: str | None
    change: Mapping[str, Delta] | None
    rivals: tuple[Rival, ...] = ()
