"""Habits of the hand: what users of git type, and what does it here; and usage errors that name what was meant, or nothing at all."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from typing import Any, Final

import click

COMMANDS: Final[Mapping[str, str]] = {
    "add": "There is no staging area: `patchhub commit FILE -m TEXT` writes the facts of a file.",
    "checkout": "`patchhub switch BRANCH` changes the branch, `patchhub switch --detach REV` looks at a commit.",
    "rebase": "A state is a set of facts, so order does not matter: `patchhub merge REV` joins two "
    "branches, `patchhub cherry-pick REV` takes one commit.",
    "restore": "`patchhub revert REV` takes a commit back, `patchhub reset REV` moves the branch, "
    "`patchhub undo` takes back the last command.",
    "rm": "`patchhub revert --subject TEXT` takes facts back, whichever commit wrote them.",
    "stash": "There is nothing to put aside: commits are made whole. Make a branch: `patchhub switch -c NAME`.",
    "help": "`patchhub --help` lists the commands, `patchhub COMMAND --help` explains one.",
}
"""Commands of git that are none here."""

SUBCOMMANDS: Final[Mapping[tuple[str, str], str]] = {
    ("remote", "rm"): "remove",
    ("remote", "ls"): "list",
}
"""Other spellings of the commands of a group."""

OPTIONS: Final[Mapping[tuple[str, str], str]] = {
    ("commit", "--amend"): "A commit is never changed. `patchhub undo` takes the last one back, then "
    "commit again; `patchhub squash 2` joins two.",
    ("commit", "-a"): "There is no staging area: `patchhub commit FILE -m TEXT` writes the facts of a file.",
    ("push", "--force"): "A push never overwrites what others pushed. `patchhub pull` first, "
    "which merges by fact, then push.",
    ("push", "-f"): "A push never overwrites what others pushed. `patchhub pull` first, "
    "which merges by fact, then push.",
    ("push", "--force-with-lease"): "A push never overwrites what others pushed. `patchhub pull` first, "
    "which merges by fact, then push.",
    ("branch", "-m"): "`patchhub branch NEW OLD` makes the new name, `patchhub branch -d OLD` drops the old one.",
    ("branch", "-D"): "`patchhub branch -d NAME` drops a branch; `patchhub undo` brings it back.",
    ("branch", "-v"): "`patchhub branch` lists every branch with its commit; `patchhub log "
    "--oneline BRANCH` shows more.",
    ("log", "--all"): "Name the branches one by one; `patchhub search WORDS` looks through all "
    "commits, `patchhub report` draws them.",
    ("log", "-p"): "`patchhub show REV` lists a commit's facts, `patchhub diff A B` those between two.",
    ("tag", "-m"): "A tag is a name alone; what it is for belongs into a commit's message.",
    ("tag", "-a"): "A tag is a name alone: `patchhub tag NAME REV`.",
    ("reset", "--hard"): "`patchhub reset REV` is enough: there are no files that could differ.",
}
"""Options of git that are none here, by command."""

_ALIKE: Final = 0.75  # of two names: less, and a suggestion misleads
_TYPED: Final = "patchhub.typed"  # where a context keeps its arguments as they were typed
_COUNT: Final = re.compile(r"-(\d+)")


class Group(click.Group):
    """Commands in the order in which a new user meets them; what is mistyped is answered with what was meant."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[_TYPED] = list(args)
        return super().parse_args(ctx, [part for place in range(len(args)) for part in _spelled_out(args, place)])

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        name = args[0] if args else ""
        if self.get_command(ctx, name) is None:
            if name in COMMANDS:
                raise click.UsageError(f"patchhub has no command {name!r}. {COMMANDS[name]}")
            close = difflib.get_close_matches(name, self.commands, n=1, cutoff=_ALIKE)
            hint = f" Did you mean `patchhub {close[0]}`?" if close else " See `patchhub --help`."
            raise click.UsageError(f"there is no command {name!r}.{hint}")
        command = self.get_command(ctx, name)
        if isinstance(command, click.Group) and len(args) > 1:
            args = [name, SUBCOMMANDS.get((name, args[1]), args[1]), *args[2:]]
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            told = _told(error)
            if "--json" in ctx.meta[_TYPED]:
                document = {"kind": "usage", "message": told.format_message()}
                click.echo(json.dumps({"error": document}, ensure_ascii=False), err=True)
                ctx.exit(told.exit_code)
            raise told from None


def _spelled_out(args: list[str], place: int) -> tuple[str, ...]:
    """``-3`` after ``log`` as ``-n 3``; everything else as it is."""
    count = _COUNT.fullmatch(args[place]) if "log" in args[:place] else None
    return ("-n", count[1]) if count else (args[place],)


def _told(error: click.UsageError) -> click.UsageError:
    """A usage error with the answer to a habit, or with a suggestion only where it is near."""
    if not isinstance(error, click.NoSuchOption):
        return error
    command, name = (error.ctx.info_name if error.ctx else None) or "", error.option_name
    if (command, name) in OPTIONS:
        return click.UsageError(f"patchhub {command} has no {name}. {OPTIONS[command, name]}", error.ctx)
    known = [option for param in (error.ctx.command.params if error.ctx else ()) for option in param.opts]
    close = difflib.get_close_matches(name, known, n=1, cutoff=_ALIKE)
    hint = f" Did you mean {close[0]}?" if close else ""
    return click.UsageError(f"there is no option {name}.{hint}", error.ctx)
