"""What all verbs of the front door share: an open store, a listener, and plain arguments as porcelain wants them."""

# No `from __future__ import annotations` here: what a verb takes is checked against its annotations when it is called.

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from patchhub.arguments import check
from patchhub.progress import Bars, Progress
from patchhub.store.store import Store
from patchhub.who import Who, author_of, now

if TYPE_CHECKING:
    from patchhub.porcelain.commit import Writing
    from patchhub.porcelain.measure import Facts
    from patchhub.worktree.judging import Guarding

Place = str | os.PathLike[str]
"""A path."""
Count = Annotated[int, 1]
Index = Annotated[int, 0]
Amount = Annotated[float, 0]
Source = Any
"""Facts: a path, an open file, a pandas DataFrame, a datasets.Dataset, or mappings and requests in any iterable."""
FileFormat = Literal["jsonl", "json", "csv"]
Metrics = Literal["auto", "counterfact", "zsre", "wise"]
Type = Literal["auto", "float32", "bfloat16", "float16"]
Quantization = Literal["none", "8bit", "4bit"]
Mode = Literal["retrieve", "merge"]
Settings = Mapping[str, Any] | Sequence[str]


class Opened:
    """An open store and who hears of progress.

    Attributes:
        store: the store below: objects, refs, operations, configuration.
        progress: who hears of stages and warnings.
    """

    store: Store
    progress: Progress

    def _who(self, author: str | None, time: str | None, message: str = "") -> Who:
        return who_of(author, time, message, self.store.config.settings.get("author"))

    def _resolve(self, *revisions: str) -> None:
        """Refuse names that lead nowhere, before torch is imported for them."""
        for rev in revisions:
            check("rev", rev, str)
            self.store.resolve(rev)

    def _placement(self, device: str | None, dtype: str | None, quantization: str | None) -> Any:
        from patchhub.worktree.opening import placement_of

        return placement_of(self.store, device=device, dtype=dtype, quantization=quantization)

    def _settings(self, given: Settings, method: str | None) -> dict[str, Any]:
        from patchhub.sets.settings import chosen_method, read_overrides

        return read_overrides(given, chosen_method(self.store, method))

    def _suite(self, suite: Source, metrics: str, *, text: Sequence[Place], **options: Any) -> "Facts":
        from patchhub.editing.requests import read_facts

        batch = read_facts(suite)
        from patchhub.porcelain.measure import suite_of

        file = Path(suite) if isinstance(suite, str | os.PathLike) else None
        return suite_of(batch, file, metrics, text=paths(text), **options)

    @contextmanager
    def _heard(self) -> Iterator[Progress]:
        """The listener, whose last bar ends with the block, whatever ends it."""
        try:
            yield self.progress
        finally:
            self.progress.close()


def listener(progress: bool | Progress) -> Progress:
    if isinstance(progress, bool):
        return Bars(lambda message: warnings.warn(message, stacklevel=2), shown=progress)
    return progress


def who_of(author: str | None, time: str | None, message: str = "", configured: Any = None) -> Who:
    return Who(author_of(author, configured, os.environ), now(os.environ) if time is None else time, message)


def guarded_by(force: bool, check: bool) -> "Guarding":
    from patchhub.worktree.judging import Guarding

    return Guarding(force, check)


def as_written(*, text: Sequence[Place] = (), **options: Any) -> "Writing":
    from patchhub.porcelain.commit import Writing

    return Writing(text=paths(text), **options)


def many(given: str | Sequence[str]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)


def paths(given: Sequence[Place]) -> tuple[Path, ...]:
    return tuple(Path(place) for place in given)


def path(given: Place | None) -> Path | None:
    return None if given is None else Path(given)


def place_of(base: Place | None) -> str | None:
    return None if base is None else os.fspath(base)


def in_bytes(gigabytes: float) -> int:
    return int(gigabytes * 1e9)
