"""Commands that tidy up: squash, gc."""

from __future__ import annotations

from pathlib import Path

import click

from patchhub.cli.options import check_option, force_option
from patchhub.cli.terminal import (
    author_option,
    bars,
    count,
    json_option,
    now,
    open_repository,
    print_json,
    repo_option,
    reports_errors,
    say,
    stamp,
)

_SHOWN = 20


@click.command()
@click.argument("span")
@click.option("-m", "--message", default="", help="Why. Default: the messages of the squashed commits.")
@check_option
@force_option
@author_option
@repo_option
@json_option
@reports_errors
def squash(
    span: str, message: str, check: bool, force: bool, author: str | None, repo: Path | None, as_json: bool
) -> None:
    """Make one commit of the newest ones: SPAN is how many, or FROM..HEAD.

    The active facts stay the same, and the weights to 1e-6; no model runs. Merges in between become plain. The old commits
    stay in the operation log: `patchhub undo` brings them back.
    """
    from patchhub.porcelain.change import squash as run
    from patchhub.worktree.judging import Guarding

    repository = open_repository(repo)
    with bars() as progress:
        done = run(repository, span, stamp(repository, author, message), progress, guarding=Guarding(force, check))
    if as_json:
        print_json(done.to_json())
        return
    branch, _ = repository.head
    say(f"[{branch or 'detached'} {done.commit[:12]}] {repository.commit(done.commit).message.splitlines()[0]}")
    say(
        f"{count(len(done.replaced), 'commit')} became one; {count(done.active, 'active fact')}; proof {done.proof:.1e}"
    )


@click.command()
@click.option("--dry-run", is_flag=True, help="Say what would be deleted; delete nothing.")
@click.option("--grace", default="14 days", show_default=True, help='Keep what is younger: "36 hours", 2w, 0.')
@repo_option
@json_option
@reports_errors
def gc(dry_run: bool, grace: str, repo: Path | None, as_json: bool) -> None:
    """Delete what nothing needs: objects that were never recorded, leftovers of interrupted commands, unused cache.

    Whatever a branch, a tag, a remote branch, a note or any operation of the log leads to is kept, however old, so `undo` always
    works. Use --grace 0 only when no other command runs.
    """
    from patchhub.porcelain.upkeep import collect
    from patchhub.who import duration

    done = collect(open_repository(repo), now=now(), grace=duration(grace), dry_run=dry_run)
    if as_json:
        print_json(done.to_json())
        return
    for item in done.items[:_SHOWN]:
        say(f"  {item.kind} {item.path} ({item.size / 1000:,.1f} kB)", dim=True)
    if len(done.items) > _SHOWN:
        say(f"  ... and {len(done.items) - _SHOWN} more (--json lists them)", dim=True)
    kinds = ", ".join(count(number, kind) for kind, number in sorted(done.counts.items()))
    say(f"{'would delete' if dry_run else 'deleted'} {kinds or 'nothing'}: {done.size / 1e6:.2f} MB")


COMMANDS = (squash, gc)
