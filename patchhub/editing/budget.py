"""How many facts are optimised at once: as many as the memory holds, and fewer when it turns out not to.

The memory of one step is what autograd keeps: per position and block the inputs of its products and activations, per predicted token the
logits, and per row the frozen keys and values. `Footprint` counts these from the model's sizes; it need not be exact, since a
batch that does not fit all the same is halved and run again."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate, groupby, takewhile
from typing import Final, TypeVar

import torch

from patchhub.editing.rows import Fact
from patchhub.errors import EditError
from patchhub.models import placement
from patchhub.models.tracing import Stack

POSITIONS: Final = 1536
"""Positions that one step computes on a CPU: enough for its products to run at full speed, few enough for its caches."""

LEAST_FACTS: Final = 8
"""Facts that a batch shrinks to; a multiple of as many begin in one."""

_SHARE = 0.5  # of the memory that is free, where nothing else is said
_SAFE = 0.7  # of what is left: pieces that were freed are not all used again
_KERNELS = 150 << 20  # what the library of the products keeps for their shapes, on a CPU; at most half of what is left
_WIDE, _INNER = 12, 5  # vectors of width d and of the feed-forward part's width that a block keeps per position
_LEAST_READ = 64  # positions
_ON_A_GPU = 8  # times the positions of a batch that is read: with fewer its time is in starting kernels
_LOGITS = 4  # copies of a prediction's logits: themselves, in float32, their softmax, their gradient
_MESSAGES = ("not enough memory", "can't allocate memory", "out of memory")

Item = TypeVar("Item")


@dataclass(frozen=True)
class Footprint:
    """Bytes of one optimisation step.

    Attributes:
        position: per position that a step computes.
        prediction: per predicted token.
        prefix: per position of a frozen prefix.
    """

    position: int
    prediction: int
    prefix: int

    @classmethod
    def of(cls, stack: Stack, first: int) -> Footprint:
        """Of steps that run the blocks from ``first`` on."""
        config, architecture = stack.model.config.get_text_config(), stack.architecture
        size = next(stack.blocks[-1].parameters()).element_size()
        inner = max(projection.passed for projection in architecture.feed_forward)
        blocks = len(stack.blocks)
        kept = max(1, blocks - first) * (_WIDE * architecture.d_model + _INNER * inner)
        return cls(
            position=kept * max(size, 2),
            prediction=_LOGITS * 4 * config.vocab_size,
            prefix=blocks * 2 * architecture.d_model * size,
        )


def free_memory(device: torch.device) -> int:
    """Bytes that could be taken now: of the GPU, or of the machine; see `host_memory`."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return placement.free_memory()


def resident_memory() -> int:
    """Bytes that this process holds now; 0 where that is not known."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def release_memory() -> None:
    """Give freed memory back to the system, where the C library can: it keeps what was freed between pieces still in use."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def step_budget(device: torch.device, memory: int | None) -> int:
    """Bytes that a step may take.

    Args:
        memory: what the process may hold in all, its model included; on a GPU, what may be allocated there. None: half of what is free.
    """
    if memory is None:
        return int(_SHARE * free_memory(device))
    release_memory()
    if device.type == "cuda":
        return max(0, int(_SAFE * (memory - torch.cuda.memory_allocated(device))))
    left = memory - resident_memory()
    return max(0, int(_SAFE * (left - min(_KERNELS, left // 2))))


def reading_positions(stack: Stack, memory: int | None, most: int) -> int:
    """How many padded positions a forward pass without gradients may read, if at most so many on a CPU and eight times as many on a GPU.

    Each takes the keys and values of all blocks, twice while they grow, one block's states, and its logits.

    Args:
        memory: as for `step_budget`; None: ``most``.
    """
    if stack.device.type != "cpu":
        most *= _ON_A_GPU
    if memory is None:
        return most
    config, architecture = stack.model.config.get_text_config(), stack.architecture
    size = max(next(stack.blocks[-1].parameters()).element_size(), 2)
    inner = max(width for _, width in architecture.shapes)
    states = (4 * len(stack.blocks) + _WIDE) * architecture.d_model + _INNER * inner
    position: int = (
        states * size + (_LOGITS + 2) * 4 * config.vocab_size
    )  # the base's logits are there beside a state's
    return min(most, max(_LEAST_READ, step_budget(stack.device, memory) // position))


def planned(
    stack: Stack, first: int, facts: Sequence[Fact], waiting: Sequence[tuple[int, ...]], budget: int
) -> list[list[tuple[int, ...]]]:
    """Groups of facts in batches: single facts and groups apart, those whose first rows are about equally long together.

    Args:
        first: the first block that runs at each step.
        budget: bytes that a step of a batch takes at most.
    """
    footprint = Footprint.of(stack, first)
    most = POSITIONS if stack.device.type == "cpu" else budget // footprint.position

    def several(group: tuple[int, ...]) -> bool:
        return len(group) > 1

    def length(group: tuple[int, ...]) -> tuple[int, int]:
        bare = facts[group[0]]
        return bare.suffix(bare.rows[0]), bare.rows[-1].subject_last

    batches: list[list[tuple[int, ...]]] = []
    for _, alike in groupby(sorted(waiting, key=lambda group: (several(group), *length(group))), key=several):
        rest = list(alike)
        while rest:
            sizes = accumulate(sum(_bytes(facts[place], footprint) for place in group) for group in rest)
            positions = accumulate(sum(positions_of(facts[place]) for place in group) for group in rest)
            fit = takewhile(lambda both: both[0] <= budget and both[1] <= most, zip(sizes, positions, strict=True))
            count = max(1, sum(1 for _ in fit))
            if LEAST_FACTS < count < len(rest):
                count -= count % LEAST_FACTS
            batches.append(rest[:count])
            rest = rest[count:]
    return batches


def positions_of(fact: Fact) -> int:
    """Positions of a fact that a step computes: from its subjects' last tokens on, and the essence's."""
    return 1 + sum(fact.suffix(row) for row in fact.rows)


def _bytes(fact: Fact, footprint: Footprint) -> int:
    """What one fact adds to a step."""
    rows = (*fact.rows, fact.essence)
    ends = fact.closers is not None
    predictions = 1 + sum(row.opening + row.target[1] - row.target[0] + ends for row in fact.rows)
    return (
        footprint.position * positions_of(fact)
        + footprint.prediction * predictions
        + footprint.prefix * sum(row.subject_last for row in rows)
    )


def in_halves(
    groups: Sequence[Sequence[Item]], run: Callable[[Sequence[Item]], None], *, remedy: str
) -> Iterator[Sequence[Item]]:
    """Run every group; one that does not fit in memory is halved and run again. Yields each group that was finished.

    Raises:
        EditError: a single item does not fit.
    """
    waiting = [list(group) for group in reversed(groups)]
    while waiting:
        group = waiting.pop()
        if _fits(run, group):
            yield group
        elif len(group) == 1:
            raise EditError("there is not enough memory to optimise a single fact", remedy=remedy)
        else:
            middle = len(group) // 2
            waiting += [group[middle:], group[:middle]]


def _fits(run: Callable[[Sequence[Item]], None], group: Sequence[Item]) -> bool:
    try:
        run(group)
    except (MemoryError, torch.OutOfMemoryError):
        pass
    except RuntimeError as error:
        if not any(message in str(error).lower() for message in _MESSAGES):
            raise
    else:
        return True
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return False
