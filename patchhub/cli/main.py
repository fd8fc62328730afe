"""The command `patchhub`."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import click

from patchhub import __version__
from patchhub.cli import change, exchange, history, measure, merge, model, refs, search, share, tune, upkeep
from patchhub.cli.terminal import quiet_libraries


class Commands(click.Group):
    """Commands in the order in which a new user meets them, with a hint for a mistyped name."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        name = args[0] if args else ""
        if self.get_command(ctx, name) is None:
            close = difflib.get_close_matches(name, self.commands, n=1)
            hint = f" Did you mean `patchhub {close[0]}`?" if close else " See `patchhub --help`."
            raise click.UsageError(f"there is no command {name!r}.{hint}")
        return super().resolve_command(ctx, args)


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="REV is a branch, a tag, a commit id or a unique prefix of one, HEAD, HEAD~2, main@{1}, or `base` for the "
    "unpatched model. Every command takes --json.",
)
@click.version_option(__version__, message="patchhub %(version)s")
@click.option(
    "--repo",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder that holds the store. Default: found upward from here.",
)
def main(repo: Path | None) -> None:
    """git for what a model knows.

    Facts go in as commits, the base model never changes, and any commit can be taken back.

    \b
      patchhub demo                              see it work, on a small model that is built in
      patchhub init MODEL                        start in this folder
      patchhub commit facts.jsonl -m "Fixes"     write facts into the model
      patchhub ask "The capital of France is"    compare with the base
      patchhub apply HEAD --out patched/         write an ordinary checkpoint
      patchhub revert HEAD                       take it back, bit for bit
    """
    quiet_libraries()


MODULES = (model, change, tune, history, measure, refs, merge, search, share, exchange, upkeep)

for module in MODULES:
    for command in module.COMMANDS:
        main.add_command(command)


if __name__ == "__main__":
    main(prog_name="patchhub")
