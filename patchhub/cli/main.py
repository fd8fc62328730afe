"""The command `patchhub`."""

from __future__ import annotations

from pathlib import Path

import click

from patchhub import __version__
from patchhub.cli import change, exchange, history, measure, merge, model, refs, search, share, signing, tune
from patchhub.cli.habits import Group
from patchhub.cli.terminal import quiet_libraries


@click.group(
    cls=Group,
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


MODULES = (model, change, tune, history, measure, refs, merge, search, share, signing, exchange)

for module in MODULES:
    for command in module.COMMANDS:
        main.add_command(command)


if __name__ == "__main__":
    main(prog_name="patchhub")
