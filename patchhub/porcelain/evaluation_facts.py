"""What a suite asks: which facts of a file, whose scores, and the settings of what is measured beside them."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from patchhub.editing.record_shapes import ZSRE_FIELDS
from patchhub.objects import Request
from patchhub.porcelain.measuring import CONTEXTS


@dataclass(frozen=True)
class Facts:
    """What to evaluate on.

    Attributes:
        requests: the facts, in their order.
        file: the name of the file that they are from.
        metrics: whose scores: counterfact, zsre or wise.
        limit: at most so many of them: the first, or with `seed` a random choice.
        seed: of that choice, of sampled text and of the intervals; None: the first facts, and 0.
        text: files to measure drift on; none: the text that the repository keeps aside, or samples.
        contexts: what live decoding puts the prompt into, beside the bare prompt: templates with one `{}`.
    """

    requests: tuple[Request, ...]
    file: str = ""
    metrics: str = "counterfact"
    limit: int | None = None
    seed: int | None = None
    text: tuple[Path, ...] = ()
    contexts: tuple[str, ...] = CONTEXTS

    @property
    def chosen(self) -> tuple[Request, ...]:
        if self.limit is None or self.limit >= len(self.requests):
            return self.requests
        if self.seed is None:
            return self.requests[: self.limit]
        places = sorted(random.Random(self.seed).sample(range(len(self.requests)), self.limit))
        return tuple(self.requests[place] for place in places)


def metrics_for(file: Path) -> str:
    """zsre where the first record of a file has zsRE's fields, else counterfact."""
    try:
        head = file.read_text(encoding="utf-8", errors="replace")[:4096]
    except OSError:
        return "counterfact"
    header = {cell.strip().strip('"') for cell in head.partition("\n")[0].split(",")}
    return "zsre" if header >= ZSRE_FIELDS or all(f'"{name}":' in head for name in ZSRE_FIELDS) else "counterfact"
