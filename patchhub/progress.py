"""How verbs say what they are doing: stages with a length, and warnings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class Progress(Protocol):
    """A listener. ``stage`` begins a stage (and ends the one before), ``advance`` moves it, ``warn`` says one sentence."""

    def stage(self, label: str, total: int) -> None: ...

    def advance(self, amount: int) -> None: ...

    def warn(self, message: str) -> None: ...

    def close(self) -> None: ...


class Silent:
    """Hears everything, says nothing; keeps the warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def stage(self, label: str, total: int) -> None:
        pass

    def advance(self, amount: int) -> None:
        pass

    def warn(self, message: str) -> None:
        self.warnings.append(message)

    def close(self) -> None:
        pass


def increments(progress: Progress) -> Callable[[int, int], None]:
    """A callback of (done, in all) that advances the present stage by what is new."""
    before = 0

    def report(done: int, total: int) -> None:
        nonlocal before
        progress.advance(done - before)
        before = done

    return report
