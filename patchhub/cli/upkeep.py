"""Commands that tidy up: squash, gc."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from patchhub.cli.options import check_option, force_option
from patchhub.cli.terminal import (
    author_option,
    count,
    json_option,
    opened,
    print_json,
    repo_option,
    reports_errors,
    say,
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
def squash(repo: Path | None, as_json: bool, **options: Any) -> None:
    """Make one commit of the newest ones: SPAN is how many, or FROM..HEAD.

    The active facts stay the same, and the weights to 1e-6; no model runs. Merges in between become plain. The old commits
    stay in the operation log: `patchhub undo` brings them back.
    """
    repository = opened(repo)
    done = repository.squash(**options)
    if as_json:
        print_json(done)
        return
    branch, _ = repository.store.head
    say(f"[{branch or 'detached'} {done.commit[:12]}] {repository.store.commit(done.commit).message.splitlines()[0]}")
    say(f"{count(len(done.replaced), 'commit')} became one; {count(done.active, 'active fact')}")


@click.command()
@click.option("--dry-run", is_flag=True, help="Say what would be deleted; delete nothing.")
@click.option("--grace", default="14 days", show_default=True, help='Keep what is younger: "36 hours", 2w, 0.')
@repo_option
@json_option
@reports_errors
def gc(repo: Path | None, as_json: bool, **options: Any) -> None:
    """Delete what nothing needs: objects that were never recorded, leftovers of interrupted commands, unused cache.

    Whatever a branch, a tag, a remote branch, a note or any operation of the log leads to is kept, however old, so `undo` always
    works. Use --grace 0 only when no other command runs.
    """
    done = opened(repo).gc(**options)
    if as_json:
        print_json(done)
        return
    for item in done.items[:_SHOWN]:
        say(f"  {item.kind} {item.path} ({item.size / 1000:,.1f} kB)", dim=True)
    if len(done.items) > _SHOWN:
        say(f"  ... and {len(done.items) - _SHOWN} more (--json lists them)", dim=True)
    kinds = ", ".join(count(number, kind) for kind, number in sorted(done.counts.items()))
    say(f"{'would delete' if done.dry_run else 'deleted'} {kinds or 'nothing'}: {done.size / 1e6:.2f} MB")


COMMANDS = (squash, gc)
