"""The command `patchhub`."""

from __future__ import annotations

import os
from pathlib import Path

import click

from patchhub import __version__
from patchhub.cli import change, exchange, find, history, measure, model, refs, share
from patchhub.cli.terminal import Group, collect_seldom, do_not_page, quiet_libraries, quiet_option

SECTIONS = {
    "Begin": ("demo", "init", "clone", "config"),
    "Write facts, and take them back": (
        "commit",
        "update",
        "revert",
        "cherry-pick",
        "merge",
        "refresh",
        "squash",
        "import",
        "undo",
        "redo",
    ),
    "Look": ("status", "log", "show", "diff", "search", "blame", "bisect", "merge-base", "reflog", "op"),
    "Ask, measure and use the model": ("ask", "eval", "bench", "report", "apply", "export", "verify-served"),
    "Fit the editor to the model": ("metric", "tune"),
    "Branches and tags": ("branch", "switch", "tag", "reset"),
    "Sign, and say that it was looked at": ("sign", "approve", "verify", "audit"),
    "Share": ("remote", "push", "fetch", "pull"),
    "Keep the store well": ("fsck", "gc"),
}
"""The commands as `patchhub --help` lists them."""


@click.group(
    cls=Group,
    sections=SECTIONS,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="REV is a branch, a tag, a commit id or a unique prefix of one, HEAD (or @), HEAD~2, main@{1}, or `base` for "
    "the unpatched model. Every command takes --json, for programs, and -q, for silence; `patchhub help COMMAND` explains one.",
)
@click.version_option(__version__, "-V", "--version", message="patchhub %(version)s")
@click.option(
    "--repo",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder that holds the store. Default: found upward from here.",
)
@click.option("--no-pager", is_flag=True, help="Print long output at once, without a pager.")
@quiet_option
@click.pass_context
def main(ctx: click.Context, repo: Path | None, no_pager: bool) -> None:
    """git for what a model knows.

    Facts go in as commits, the base model never changes, and any commit can be taken back.

    \b
      patchhub demo                              see it work, on a built-in model
      patchhub init MODEL                        start in this folder
      patchhub commit facts.jsonl -m "Fixes"     write facts into the model
      patchhub ask "The capital of France is"    compare with the base
      patchhub apply HEAD --out patched/         write an ordinary checkpoint
      patchhub revert HEAD                       take it back, bit for bit
    """
    quiet_libraries()
    collect_seldom()
    if os.environ.get("NO_COLOR"):
        ctx.color = False
    if no_pager:
        do_not_page(ctx)


MODULES = (model, exchange, change, history, measure, refs, find, share)

for module in MODULES:
    for command in module.COMMANDS:
        main.add_command(command)


if __name__ == "__main__":
    main(prog_name="patchhub")
