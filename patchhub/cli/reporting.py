"""The command `report`."""

from __future__ import annotations

from pathlib import Path

import click

from patchhub.cli.terminal import (
    bars,
    count,
    json_option,
    now,
    open_repository,
    print_json,
    repo_option,
    reports_errors,
    say,
)


@click.command()
@click.argument("rev", default="HEAD")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The HTML file to write.")
@click.option(
    "--compare",
    type=click.IntRange(min=0),
    default=1000,
    show_default=True,
    help="Compare so many active facts with one another, the last changed ones.",
)
@click.option("--overwrite", is_flag=True, help="Replace what is there, even if it is no report.")
@repo_option
@json_option
@reports_errors
def report(rev: str, out: Path, compare: int, overwrite: bool, repo: Path | None, as_json: bool) -> None:
    """One HTML page about the repository: history, facts with search, scores, norms, interference.

    The page is one file that loads nothing; a phone can read it. A fact counts as active where REV holds it. No model runs.
    """
    from patchhub.porcelain.report import write_report as run

    with bars() as progress:
        done = run(
            open_repository(repo), out, progress, time=now(), revision=rev, compared=compare, overwrite=overwrite
        )
        left = done.report.left_out
        if any(left.values()):
            progress.warn(
                f"the page leaves out {count(left['commits'], 'older commit')} and {count(left['facts'], 'fact')}"
            )
    if as_json:
        print_json(done.to_json())
    else:
        counts = f"{count(len(done.report.commits), 'commit')}, {count(len(done.report.facts), 'fact')}"
        say(f"Wrote {done.out}: {counts}, {done.size / 1000:,.0f} kB")


COMMANDS = (report,)
