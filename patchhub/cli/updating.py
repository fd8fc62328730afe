"""Commands that change what an active fact says: update."""

from __future__ import annotations

from pathlib import Path

import click

from patchhub.cli.change import report_committed, set_option, strict_option
from patchhub.cli.guarding import force_option
from patchhub.cli.terminal import (
    author_option,
    bars,
    json_option,
    open_repository,
    repo_option,
    reports_errors,
    stamp,
)


@click.command()
@click.option("--subject", required=True, help="Whose fact.")
@click.option("--target", required=True, help="What the model shall say now.")
@click.option("--prompt", help="Which of the subject's facts, where there are several.")
@click.option("-m", "--message", default="", help="Why. Default: the fact, its old target and the new one.")
@click.option("--method", help="The editor: memit (default) or pmet.")
@set_option
@strict_option
@force_option
@author_option
@repo_option
@json_option
@reports_errors
def update(
    subject: str,
    target: str,
    prompt: str | None,
    message: str,
    method: str | None,
    overrides: tuple[str, ...],
    strict: bool,
    force: bool,
    author: str | None,
    repo: Path | None,
    as_json: bool,
) -> None:
    """Give one active fact another target: one commit that removes the old request and adds the new one."""
    from patchhub.porcelain.edit_settings import read_overrides
    from patchhub.porcelain.update import update as run

    repository = open_repository(repo)
    method = method or str(repository.config.settings.get("method", "memit"))
    settings = read_overrides(overrides, method)
    by = stamp(repository, author, message)
    with bars() as progress:
        done = run(
            repository,
            subject,
            target,
            by,
            progress,
            prompt=prompt,
            method=method,
            settings=settings,
            strict=strict,
            force=force,
        )
    report_committed(repository, done, as_json)


COMMANDS = (update,)
