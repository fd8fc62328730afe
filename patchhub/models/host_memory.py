"""The memory of the machine that this process may use: the machine's own, or what its control group (a container's limit) leaves."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

GROUPS: Final = Path("/sys/fs/cgroup")
MACHINE: Final = Path("/proc/meminfo")

_FILES: Final = (
    ("memory.max", "memory.current", "memory.stat"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),  # version 1
)
_CACHED: Final = ("inactive_file", "active_file")
_UNKNOWN: Final = 4 << 30


def total_memory(groups: Path = GROUPS) -> int:
    """Bytes of the machine's memory, or the control group's limit where that is lower."""
    return min([_pages("SC_PHYS_PAGES"), *(limit for limit, _ in _limits(groups))])


def free_memory(groups: Path = GROUPS, machine: Path = MACHINE) -> int:
    """Bytes that could be taken now, of the machine and within the control group's limit; cached files count as free."""
    return min([_machine_free(machine), *(max(0, limit - used) for limit, used in _limits(groups))])


def _limits(groups: Path) -> Iterator[tuple[int, int]]:
    """The limit of the control group and what it holds, without cached files, in either version; nothing without a limit."""
    for limit, used, statistics in _FILES:
        with suppress(OSError, ValueError):  # no such version, or "max"
            most = int((groups / limit).read_text())
            yield most, int((groups / used).read_text()) - _cached(groups / statistics)


def _cached(statistics: Path) -> int:
    """Bytes of cached files, those of inner groups included."""
    try:
        found = dict(line.split() for line in statistics.read_text().splitlines())
    except (OSError, ValueError):
        return 0
    return sum(int(found.get(f"total_{name}", found.get(name, 0))) for name in _CACHED)


def _machine_free(machine: Path) -> int:
    with suppress(OSError, StopIteration), machine.open() as file:
        return 1024 * int(next(line for line in file if line.startswith("MemAvailable:")).split()[1])
    return _pages("SC_AVPHYS_PAGES")


def _pages(which: str) -> int:
    return os.sysconf(which) * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else _UNKNOWN
