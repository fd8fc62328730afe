"""How verbs say what they are doing: stages with a length, and warnings."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable


class Progress(Protocol):
    """A listener. ``stage`` begins a stage (and ends the one before), ``advance`` moves it, ``warn`` says one sentence."""

    def stage(self, label: str, total: int) -> None: ...

    def advance(self, amount: int) -> None: ...

    def warn(self, message: str) -> None: ...

    def close(self) -> None: ...


@runtime_checkable
class Noting(Protocol):
    """A listener that also hears sentences which are no warnings."""

    def note(self, message: str) -> None: ...


@runtime_checkable
class Weighing(Protocol):
    """A listener that also hears of stages whose length is in bytes."""

    def stage_bytes(self, label: str, total: int) -> None: ...


def stage_bytes(progress: Progress, label: str, total: int) -> None:
    """Begin a stage of so many bytes: shown with rate and time left by a listener that knows them."""
    if isinstance(progress, Weighing):
        progress.stage_bytes(label, total)
    else:
        progress.stage(label, total)


def note(progress: Progress, message: str) -> None:
    """Say what is about to be done, and why, to a listener that hears such."""
    if isinstance(progress, Noting):
        progress.note(message)


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


class Bars:
    """Bars of tqdm beside the result: in a notebook, and on a terminal. Warnings always."""

    def __init__(self, warn: Callable[[str], None], *, shown: bool = True) -> None:
        """A listener that says warnings by ``warn``, and has no bars unless they are to be ``shown``."""
        self._say = warn
        self._shown = shown
        self._bar: Any = None

    def stage(self, label: str, total: int) -> None:
        self._begin(label, total, {})

    def stage_bytes(self, label: str, total: int) -> None:
        self._begin(label, total, {"unit": "B", "unit_divisor": 1000})

    def _begin(self, label: str, total: int, unit: dict[str, Any]) -> None:
        self.close()
        make = _bar_class() if self._shown else None
        if make is not None:
            form = None if total else "{desc} ..."  # nothing to count
            given = {"total": total or None, "bar_format": form, "leave": bool(total), "unit_scale": True, **unit}
            self._bar = make(desc=f"{label:>20}", **given)

    def advance(self, amount: int) -> None:
        if self._bar is not None:
            self._bar.update(amount)

    def warn(self, message: str) -> None:
        self.close()
        self._say(message)

    def note(self, message: str) -> None:
        """Say a sentence where there are bars."""
        self.close()
        make = _bar_class() if self._shown else None
        if make is not None:
            make.write(message, file=sys.stderr)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _bar_class() -> Any:
    """tqdm's class for where this runs; None where nobody would see a bar. It is imported here, since that takes a while."""
    if "ipykernel" not in sys.modules and not sys.stderr.isatty():
        return None
    from tqdm.auto import tqdm

    return tqdm


def increments(progress: Progress) -> Callable[[int, int], None]:
    """A callback of (done, in all) that advances the present stage by what is new."""
    before = 0

    def report(done: int, total: int) -> None:
        nonlocal before
        progress.advance(done - before)
        before = done

    return report


def told(progress: Progress, stages: Mapping[str, tuple[str, int]]) -> Callable[[str, int], None]:
    """A callback of (stage, done) that moves a listener through stages of a label and a length; the first begins at once."""
    present = next(iter(stages))
    progress.stage(*stages[present])

    def report(stage: str, done: int) -> None:
        nonlocal present
        if stage != present:
            progress.stage(*stages[stage])
            present = stage
        progress.advance(done)

    return report
