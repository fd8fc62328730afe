"""Commands that measure: eval."""

from __future__ import annotations

from pathlib import Path

import click

from patchhub.cli.terminal import (
    author_of,
    bars,
    json_option,
    now,
    open_repository,
    print_json,
    repo_option,
    reports_errors,
    say,
)


@click.command("eval")
@click.argument("rev", default="HEAD")
@click.option("--suite", "file", required=True, type=click.Path(path_type=Path), help="Facts to evaluate on.")
@click.option(
    "--metrics",
    type=click.Choice(["counterfact", "zsre", "wise"]),
    default="counterfact",
    show_default=True,
    help="Whose scores.",
)
@click.option("--limit", type=click.IntRange(min=1), help="Only the first so many facts.")
@click.option("--no-note", is_flag=True, help="Do not keep the scores with the commit.")
@click.option("--author", help="Who measures.")
@repo_option
@json_option
@reports_errors
def evaluate(
    rev: str,
    file: Path,
    metrics: str,
    limit: int | None,
    no_note: bool,
    author: str | None,
    repo: Path | None,
    as_json: bool,
) -> None:
    """How well REV holds the facts in --suite FILE, and what that costs elsewhere.

    Teacher-forced scores beside live decoding, each with its definition and 95 % bootstrap interval. The scores are kept as a note of the
    commit.
    """
    from patchhub.editing.requests import read_requests
    from patchhub.porcelain.evaluate import DEFINITIONS
    from patchhub.porcelain.evaluate import evaluate as run

    repository = open_repository(repo)
    requests = read_requests(file).requests
    with bars() as progress:
        done = run(
            repository,
            rev,
            requests,
            progress,
            author=author_of(repository.config.settings, author),
            time=now(),
            suite=metrics,
            limit=limit,
            keep=not no_note,
        )
    if as_json:
        print_json(done.to_json())
        return
    say(f"{done.facts} facts at {done.commit[:12] if done.commit else 'the unpatched base'}", bold=True)
    for scores in (done.scores, done.live):
        for name, found in scores.estimates.items():
            interval = click.style(f"[{found.low:.3f}, {found.high:.3f}]", dim=True)
            say(f"{name:>22} {found.value:6.3f} {interval}  {DEFINITIONS[name]}")
    if done.note:
        say(f"kept as note {done.note[:12]}", dim=True)


COMMANDS = (evaluate,)
