"""How much a step may take, and what happens to groups that take more."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from patchhub.editing.steps import free_memory, in_halves, reading_positions, resident_memory, step_budget
from patchhub.errors import EditError
from patchhub.models import placement
from tests.tiny_models import tiny_stack

CPU = torch.device("cpu")


@pytest.mark.skipif(not os.path.exists("/proc/meminfo"), reason="no /proc/meminfo to compare with")
def test_cached_files_count_as_free():
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    with open("/proc/meminfo") as file:
        found = dict(line.split(":", 1) for line in file)
    available = 1024 * int(found["MemAvailable"].split()[0])
    assert 0 < free_memory(CPU) <= pages * size
    assert abs(placement.free_memory(Path("no groups")) - available) < 0.2 * pages * size


@pytest.mark.parametrize(
    ("limit", "used", "statistics", "prefix"),
    [
        ("memory.max", "memory.current", "memory.stat", ""),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_"),
    ],
)
def test_a_control_groups_limit_holds(tmp_path, limit, used, statistics, prefix):
    (tmp_path / "memory").mkdir()
    (tmp_path / limit).write_text("1000\n")
    (tmp_path / used).write_text("700\n")
    (tmp_path / statistics).write_text(f"anon 500\n{prefix}inactive_file 150\n{prefix}active_file 50\n")
    machine = tmp_path / "meminfo"
    machine.write_text("MemTotal: 9 kB\nMemAvailable: 8 kB\n")
    assert placement.free_memory(tmp_path, machine) == 1000 - (700 - 200)
    assert placement.total_memory(tmp_path) == 1000
    (tmp_path / used).write_text("1300\n")
    assert placement.free_memory(tmp_path, machine) == 0
    machine.write_text("MemTotal: 9 kB\nMemAvailable: 0 kB\n")
    (tmp_path / limit).write_text("max\n")
    assert placement.free_memory(tmp_path, machine) == 0
    assert placement.total_memory(tmp_path) > 1000


def test_a_budget_is_what_the_process_does_not_hold():
    held = resident_memory()
    assert step_budget(CPU, 0) == 0
    assert step_budget(CPU, held // 2) == 0
    assert 0 < step_budget(CPU, held + (1 << 30)) < 2 << 30


@pytest.mark.parametrize("fits", [1, 2, 3, 10])
def test_every_item_is_run_once_in_order_in_groups_that_fit(fits):
    done: list[int] = []

    def run(group: list[int]) -> None:
        if len(group) > fits:
            raise MemoryError

    for group in in_halves([[1, 2, 3, 4, 5], [6]], run, remedy="-"):
        assert len(group) <= fits
        done += group
    assert done == [1, 2, 3, 4, 5, 6]


def test_one_item_that_does_not_fit_is_an_error():
    def run(group: list[int]) -> None:
        raise MemoryError

    with pytest.raises(EditError) as caught:
        list(in_halves([[1, 2]], run, remedy="Buy memory."))
    assert caught.value.remedy == "Buy memory."


def test_what_is_read_at_once_follows_the_memory():
    stack, held = tiny_stack("llama"), resident_memory()
    assert reading_positions(stack, None, 2048) == 2048
    assert reading_positions(stack, 0, 2048) == 64
    found = [reading_positions(stack, held + (room << 20), 1 << 30) for room in (16, 256, 2048)]
    assert 64 <= found[0] < found[1] < found[2] < 1 << 30
