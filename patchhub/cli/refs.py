"""Commands that move about in history, and that keep the store well: branch, switch, tag, reset, reflog, op, squash, gc."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from patchhub.cli.options import (
    Revision,
    check_option,
    force_option,
    key_option,
    sign_option,
)
from patchhub.cli.terminal import (
    Group,
    author_option,
    count,
    json_option,
    local,
    opened,
    print_json,
    repo_option,
    reports_errors,
    say,
    say_all,
    say_signed,
)
from patchhub.results import Rows

if TYPE_CHECKING:
    from patchhub.repository import Repository


_SHOWN = 20


@click.command()
@click.argument("name", required=False, type=Revision())
@click.argument("rev", required=False, type=Revision())
@click.option("-d", "-D", "--delete", is_flag=True, help="Remove the branch; its commits stay in the operation log.")
@click.option("-m", "--move", is_flag=True, help="Rename: the current branch to NAME, or the branch NAME to REV.")
@click.option("-r", "--remotes", is_flag=True, help="List the remotes' branches.")
@click.option("-a", "--all", is_flag=True, help="List the remotes' branches too.")
@click.option("-v", "--verbose", is_flag=True, help="Also say how many facts are active there.")
@click.option("-l", "--list", "listing", is_flag=True, hidden=True, help="List the branches, as without a name.")
@author_option
@repo_option
@json_option
@reports_errors
def branch(repo: Path | None, verbose: bool, listing: bool, as_json: bool, **options: Any) -> None:
    """List the branches, or make the branch NAME at REV (default: HEAD) without switching to it."""
    repository = opened(repo)
    _report(repository.branch(**options), as_json, repository if verbose else None)


@click.command()
@click.argument("name", required=False, type=Revision())
@click.argument("rev", required=False, type=Revision())
@click.option("-d", "--delete", is_flag=True, help="Remove the tag.")
@click.option("-m", "--message", default="", help="What the tag is for; listed in place of its commit's message.")
@sign_option
@key_option
@click.option("-l", "--list", "listing", is_flag=True, hidden=True, help="List the tags, as without a name.")
@author_option
@repo_option
@json_option
@reports_errors
def tag(repo: Path | None, listing: bool, as_json: bool, **options: Any) -> None:
    """List the tags, or make the tag NAME at REV (default: HEAD). Tags do not move.

    What is signed of a tag is its name with the commit that it leads to.
    """
    _report(opened(repo).tag(**options), as_json)


@click.command()
@click.argument("name", type=Revision())
@click.argument("rev", required=False, type=Revision())
@click.option("-c", "--create", is_flag=True, help="Make the branch first, at REV (default: HEAD; `base` begins anew).")
@click.option("-d", "--detach", is_flag=True, help="Go to the commit NAME, on no branch.")
@author_option
@repo_option
@json_option
@reports_errors
def switch(repo: Path | None, as_json: bool, **options: Any) -> None:
    """Go to the branch NAME; one that only a remote has is made here first."""
    moved = opened(repo).switch(**options)
    if as_json:
        print_json(moved)
        return
    say(f"on {f'branch {moved.branch}' if moved.branch else 'no branch'}, at {_place(moved.after)}")


@click.command()
@click.argument("rev", type=Revision())
@author_option
@repo_option
@json_option
@reports_errors
def reset(repo: Path | None, as_json: bool, **options: Any) -> None:
    """Move the current branch to REV. Nothing is lost: `patchhub undo` moves it back."""
    _report(opened(repo).reset(**options), as_json)


@click.command()
@click.argument("ref", default="HEAD", type=Revision())
@click.option("-n", "--limit", type=click.IntRange(min=1), help="At most this many moves.")
@repo_option
@json_option
@reports_errors
def reflog(ref: str, repo: Path | None, as_json: bool, **options: Any) -> None:
    """Where REF was, the last move first; REF@{N}, N operations ago, names what it led to then."""
    entries = opened(repo).reflog(ref, **options)
    if as_json:
        print_json(entries)
        return
    for entry in entries:
        commit = click.style(f"{entry.commit[:12] if entry.commit else '(no commit)':<12}", fg="yellow")
        say(f"{commit} {ref}@{{{entry.ago}}} {local(entry.time)} {entry.command}: {entry.message}")


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
    say_signed(repository, done.commit)


@click.command()
@click.option("--dry-run", is_flag=True, help="Say what would be deleted; delete nothing.")
@click.option("--grace", default="14 days", show_default=True, help='Keep what is younger: "36 hours", 2w, 0.')
@click.option("--pack", is_flag=True, help="Put objects that are files of their own into packs.")
@repo_option
@json_option
@reports_errors
def gc(repo: Path | None, as_json: bool, **options: Any) -> None:
    """Delete what nothing needs: objects that were never recorded, leftovers of interrupted commands, unused cache.

    Whatever a branch, a tag, a remote branch, a note or any operation of the log leads to is kept, however old, so `undo` always
    works. Use --grace 0 only when no other command runs. --pack makes a few files of the many: a large history takes less room, and is
    copied sooner.
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
    if done.packed.objects:
        verb = "would pack" if done.dry_run else "packed"
        say(f"{verb} {count(done.packed.objects, 'object')} into {count(done.packed.packs, 'pack')}")


@click.group("op", cls=Group)
def operation() -> None:
    """What was done here: every command that moved a branch, a tag or HEAD is one operation."""


@operation.command("log")
@click.option("-n", "--limit", type=click.IntRange(min=1), help="At most this many operations.")
@repo_option
@json_option
@reports_errors
def operation_log(repo: Path | None, as_json: bool, **options: Any) -> None:
    """Every operation, the last one first: what was run, by whom, and what it moved.

    HEAD@{N} is where HEAD was before the newest N of them; `patchhub undo` takes the newest back.
    """
    found = opened(repo).op_log(**options)
    if as_json:
        print_json(found)
        return
    say_all(
        f"{click.style(f'@{{{done.ago}}}', fg='yellow')} {local(done.time)} {done.author}: {done.command}"
        f" {', '.join(_named(done.refs))}"
        for done in found
    )


def _named(refs: Iterable[str]) -> Iterator[str]:
    """Refs as people write them; notes by the commit that they are about."""
    for ref in refs:
        kind, _, rest = ref.removeprefix("refs/").partition("/")
        yield f"note on {rest[:12]}" if kind == "notes" else rest or ref


def _report(found: Any, as_json: bool, counted: Repository | None = None) -> None:
    """A list of names, those of a repository with their numbers of active facts; or a ref that moved."""
    if as_json:
        print_json(found)
    elif isinstance(found, Rows):
        width = max((len(named.name) for named in found), default=0)
        for named in found:
            name = click.style(f"{named.name:<{width}}", fg="green" if named.current else None)
            active = f" ({count(counted.store.active_count(named.commit), 'active fact')})" if counted else ""
            say(f"{'*' if named.current else ' '} {name} {named.commit[:12]}{active} {named.message}")
    else:
        name = found.ref.removeprefix("refs/heads/").removeprefix("refs/tags/")
        if found.after is None and found.before is not None:
            say(f"{name} removed; it was at {_place(found.before)}")
        else:
            say(f"{name} is at {_place(found.after)}")


def _place(commit: str | None) -> str:
    return commit[:12] if commit else "the base"


COMMANDS = (branch, switch, tag, reset, reflog, operation, squash, gc)
