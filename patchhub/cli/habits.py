"""Habits of the hand: what users of git type, and what does it here; and usage errors that name what was meant, or nothing at all."""

from __future__ import annotations

import difflib
import inspect
import json
import re
from collections.abc import Mapping
from typing import Any, Final

import click

from patchhub.cli.terminal import keep_writing

_REVERT = "`patchhub revert --subject TEXT` takes facts back, whichever commit wrote them."
_TEXTS = (
    "Nothing is checked out as files: `patchhub show REV` lists a commit's facts, `patchhub search WORDS` finds facts."
)

COMMANDS: Final[Mapping[str, str]] = {
    "abandon": "`patchhub undo` takes the last command back, `patchhub revert REV` any commit.",
    "add": "There is no staging area: `patchhub commit FILE -m TEXT` writes the facts of a file.",
    "amend": "`patchhub commit --amend` changes the last commit.",
    "checkout": "`patchhub switch BRANCH` changes the branch, `patchhub switch --detach REV` looks at a commit.",
    "clean": "`patchhub gc` deletes what nothing needs.",
    "delete": _REVERT,
    "describe": "`patchhub show REV` begins with a commit's names.",
    "download": "`patchhub clone hf://user/repo` makes a store of a shared one, `patchhub fetch` brings what is new.",
    "edit": "`patchhub update --subject TEXT --target TEXT` changes one fact, `patchhub commit` writes new ones.",
    "grep": "`patchhub search WORDS` finds facts, `patchhub log -S TEXT` the commits that changed some.",
    "list": "`patchhub show REV` lists a commit's facts, `patchhub diff` all active ones, `patchhub log` the commits.",
    "ls": "`patchhub show REV` lists a commit's facts, `patchhub diff` all active ones, `patchhub log` the commits.",
    "ls-files": _TEXTS,
    "mv": "`patchhub update --subject TEXT --target TEXT` changes a fact, `patchhub branch -m OLD NEW` renames a branch.",
    "new": "`patchhub switch -c NAME REV` begins a branch, `patchhub commit` writes facts.",
    "rebase": "A state is a set of facts, so order does not matter: `patchhub merge REV` joins two "
    "branches, `patchhub cherry-pick REV` takes one commit.",
    "restore": "`patchhub revert REV` takes a commit back, `patchhub reset REV` moves the branch, "
    "`patchhub undo` takes back the last command.",
    "rev-parse": "`patchhub show REV --json` has a commit's id; a branch, a tag or some digits stand for it everywhere.",
    "rm": _REVERT,
    "shortlog": "`patchhub log --format '%an %s'` prints authors and messages.",
    "stash": "There is nothing to put aside: commits are made whole. Make a branch: `patchhub switch -c NAME`.",
    "upload": "`patchhub push` brings branches to a remote, `patchhub remote add origin hf://user/repo` names one.",
    "version": "`patchhub --version` says it.",
}
"""Commands of git, jj and hf that are none here."""

SUBCOMMANDS: Final[Mapping[tuple[str, str], str]] = {
    ("remote", "rm"): "remove",
    ("remote", "ls"): "list",
    ("remote", "show"): "list",
    ("remote", "get-url"): "list",
    ("remote", "mv"): "rename",
    ("op", "ls"): "log",
    ("op", "list"): "log",
}
"""Other spellings of the commands of a group."""

_ALONE: Final[Mapping[str, str]] = {"remote": "list", "op": "log"}
"""What a group does where no command follows, as in git and jj."""

_NO_STAGING = "There is no staging area: `patchhub commit FILE -m TEXT` writes the facts of a file."
_FORCE = (
    "A push never overwrites what others pushed. `patchhub pull` first, which merges by fact, then push; "
    "--force-with-lease overwrites what was seen at the last fetch."
)
_PLAIN_RESET = "`patchhub reset REV` is enough: there are no files that could differ."

OPTIONS: Final[Mapping[tuple[str, str], str]] = {
    ("commit", "-a"): _NO_STAGING,
    ("commit", "--dry-run"): "A commit is taken back bit for bit: try it, then `patchhub undo`.",
    ("commit", "-F"): "`patchhub commit FILE -m TEXT`: FILE holds the facts, -m the reason.",
    ("push", "--force"): _FORCE,
    ("push", "-f"): _FORCE,
    ("push", "-u"): "Branches of one name belong together; `patchhub push REMOTE BRANCH` is enough.",
    ("push", "--set-upstream"): "Branches of one name belong together; `patchhub push REMOTE BRANCH` is enough.",
    ("pull", "--rebase"): "Order does not matter: `patchhub pull` merges by fact.",
    ("fetch", "--all"): "`patchhub fetch REMOTE` brings all branches, tags and notes of one remote.",
    ("clone", "--depth"): 'A store is cloned whole: deltas are small. `patchhub.load("hf://user/repo")` '
    "reads only what one revision needs.",
    ("clone", "-b"): "`patchhub clone ADDRESS`, then `patchhub switch BRANCH` in its folder.",
    ("branch", "-f"): "`patchhub switch BRANCH`, then `patchhub reset REV` moves it.",
    ("log", "-p"): "`patchhub show REV` lists a commit's facts, `patchhub diff A B` those between two.",
    ("log", "--grep"): "`patchhub log -S TEXT` looks for facts, `patchhub search WORDS` too.",
    ("tag", "-a"): "`patchhub tag NAME -m TEXT` says what a tag is for.",
    ("tag", "-f"): "Tags do not move; `patchhub tag -d NAME` drops one, which then can be made anew.",
    ("reset", "--hard"): _PLAIN_RESET,
    ("reset", "--soft"): _PLAIN_RESET,
    ("reset", "--mixed"): _PLAIN_RESET,
    ("merge", "--squash"): "`patchhub merge REV`, then `patchhub squash 2` makes one commit of the newest two.",
    ("revert", "-n"): "A revert is one commit; `patchhub squash 2` joins it with the one before.",
    ("revert", "--no-commit"): "A revert is one commit; `patchhub squash 2` joins it with the one before.",
    ("diff", "--cached"): "There is no staging area: `patchhub diff A B` compares two revisions.",
    ("diff", "--staged"): "There is no staging area: `patchhub diff A B` compares two revisions.",
    ("diff", "--stat"): "`patchhub diff --weights` compares norms and ranks, `patchhub log --stat` tells sizes.",
    ("status", "--porcelain"): "`patchhub status --json` is for programs.",
    ("status", "-s"): "`patchhub log -1 --oneline` is the short form.",
    ("status", "--short"): "`patchhub log -1 --oneline` is the short form.",
}
"""Options of git that are none here, by command."""

_ALIKE: Final = 0.8  # of two names: less, and a suggestion misleads
_ALIKE_COMMAND: Final = 0.75  # commands are short: two letters of four that changed places leave three quarters
_TYPED: Final = "patchhub.typed"  # where a context keeps its arguments as they were typed
_COUNT: Final = re.compile(r"-(\d+)")


class Group(click.Group):
    """Commands in the order in which a new user meets them; what is mistyped is answered with what was meant.

    Attributes:
        sections: titles of groups of commands, as the help lists them, each with the names of its commands.
    """

    def __init__(self, *args: Any, sections: Mapping[str, tuple[str, ...]] | None = None, **options: Any) -> None:
        super().__init__(*args, **options)
        self.sections = sections or {}

    def main(self, *args: Any, **options: Any) -> Any:
        keep_writing()
        return super().main(*args, **options)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Each section of commands with the first sentence of their help."""
        for title, names in (self.sections or {"Commands": tuple(self.commands)}).items():
            with formatter.section(title):
                formatter.write_dl([(name, _first_sentence(self.commands[name])) for name in names])

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta.setdefault(_TYPED, list(args))
        args = [part for place in range(len(args)) for part in _spelled_out(args, place)]
        if args[:1] == ["help"]:
            args = [*args[1:], "--help"]
        return super().parse_args(ctx, args)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        name = args[0] if args else ""
        if self.get_command(ctx, name) is None:
            here = " ".join(["patchhub", *ctx.command_path.split()[1:]])
            if ctx.parent is None and name in COMMANDS:
                raise click.UsageError(f"patchhub has no command {name!r}. {COMMANDS[name]}")
            close = difflib.get_close_matches(name, self.commands, n=1, cutoff=_ALIKE_COMMAND)
            hint = f" Did you mean `{here} {close[0]}`?" if close else f" See `{here} --help`."
            raise click.UsageError(f"there is no command {name!r}.{hint}")
        if isinstance(self.get_command(ctx, name), click.Group):
            args = [name, *_of_group(name, args[1:], alone=not ctx.resilient_parsing)]
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


def _of_group(name: str, args: list[str], *, alone: bool) -> list[str]:
    """What follows the name of a group, in this tool's words: ``rm x`` as ``remove x``, and ``-v`` ``alone`` as ``list``."""
    if alone and name in _ALONE and all(word in ("-v", "--verbose", "--json", "-q", "--quiet") for word in args):
        return [_ALONE[name], *(word for word in args if word not in ("-v", "--verbose"))]
    return [SUBCOMMANDS.get((name, word), word) if place == 0 else word for place, word in enumerate(args)]


def _first_sentence(command: click.Command) -> str:
    """How a command's help begins, up to its first full stop."""
    paragraph = " ".join(inspect.cleandoc(command.help or "").partition("\n\n")[0].split())
    found = re.match(r".*?[.](?=\s|$)", paragraph)
    return found[0] if found else paragraph


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
    stems = {option.lstrip("-"): option for option in known if option.startswith("--")}
    close = difflib.get_close_matches(name.lstrip("-"), stems, n=1, cutoff=_ALIKE)
    hint = f" Did you mean {stems[close[0]]}?" if close else ""
    return click.UsageError(f"there is no option {name}.{hint}", error.ctx)
