"""The verbs, found by introspection: as commands and as methods."""

from __future__ import annotations

import keyword
from collections.abc import Callable, Iterator
from typing import Any

import click

from patchhub.cli.main import main
from patchhub.repository import Repository


def commands(group: click.Group = main, path: tuple[str, ...] = ()) -> Iterator[tuple[str, click.Command]]:
    """Every command with the name that its method has; groups only where they do something by themselves."""
    for name, command in group.commands.items():
        here = (*path, name)
        if not isinstance(command, click.Group) or command.invoke_without_command:
            yield method_name(here), command
        if isinstance(command, click.Group):
            yield from commands(command, here)


def method_name(path: tuple[str, ...]) -> str:
    name = "_".join(path).replace("-", "_")
    return f"{name}_" if keyword.iskeyword(name) else name


def methods() -> dict[str, Callable[..., Any]]:
    """Every public method of `Repository`."""
    return {name: getattr(Repository, name) for name in dir(Repository) if not name.startswith("_")} | {}
