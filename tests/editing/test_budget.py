"""How much a step may take, and what happens to groups that take more."""

from __future__ import annotations

import os

import pytest
import torch

from patchhub.editing.budget import free_memory, in_halves, resident_memory, step_budget
from patchhub.errors import EditError

CPU = torch.device("cpu")


@pytest.mark.skipif(not os.path.exists("/proc/meminfo"), reason="no /proc/meminfo to compare with")
def test_cached_files_count_as_free():
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    with open("/proc/meminfo") as file:
        found = dict(line.split(":", 1) for line in file)
    available = 1024 * int(found["MemAvailable"].split()[0])
    assert 0 < free_memory(CPU) <= pages * size
    assert abs(free_memory(CPU) - available) < 0.2 * pages * size


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
