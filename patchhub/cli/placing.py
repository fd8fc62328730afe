"""The options that say how the base is put into memory, how much of it there is, and whether prompts are read inside a chat template."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kKMGT]?i?B)?")
_UNITS = {"B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KiB": 1 << 10, "kiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}


class Size(click.ParamType[int]):
    """Bytes from ``4GB``, ``800MB``, ``3.5GiB``; a number alone is in gigabytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        found = _SIZE.fullmatch(str(value).strip())
        if found is None or not (size := int(float(found[1]) * _UNITS.get(found[2] or "GB", 0))):
            self.fail(f"{value!r} is not a size; write 4GB, 800MB or 3.5GiB", param, ctx)
        return size


def memory_option(purpose: str) -> Callable[[Command], Command]:
    """``--memory``: how much a command may take, in bytes; None where it is not given."""
    return click.option("--memory", type=Size(), metavar="SIZE", help=f"{purpose}, such as 8GB.")


chat_option = click.option(
    "--chat/--no-chat", default=None, help="Read prompts as the user's messages of the base's chat template."
)


def placement_options(command: Command) -> Command:
    """``--device``, ``--dtype`` and ``--quantization``; without them the repository's config decides."""
    options: tuple[Any, ...] = (
        click.option("--device", help="auto (a GPU if there is one), spread (over all GPUs), cpu, cuda:0, ..."),
        click.option(
            "--dtype",
            type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
            help="Type of the base in memory. auto: float32 where that takes half of the memory at most, else its own.",
        ),
        click.option(
            "--quantization",
            type=click.Choice(["none", "8bit", "4bit"]),
            help="Quantise the base in memory; changes run beside its weights in float32.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command
