"""Commands that list and move refs: branch, switch, tag, reset, reflog."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from patchhub.cli.terminal import (
    author_option,
    json_option,
    open_repository,
    print_json,
    repo_option,
    reports_errors,
    say,
    stamp,
)
from patchhub.errors import SettingsError

if TYPE_CHECKING:
    from patchhub.porcelain.refs import Moved, Named


@click.command()
@click.argument("name", required=False)
@click.argument("rev", required=False)
@click.option("-d", "--delete", is_flag=True, help="Remove the branch; its commits stay in the operation log.")
@click.option("-r", "--remotes", is_flag=True, help="List the remotes' branches.")
@author_option
@repo_option
@json_option
@reports_errors
def branch(
    name: str | None,
    rev: str | None,
    delete: bool,
    remotes: bool,
    author: str | None,
    repo: Path | None,
    as_json: bool,
) -> None:
    """List the branches, or make the branch NAME at REV (default: HEAD) without switching to it."""
    from patchhub.porcelain import refs

    repository = open_repository(repo)
    if delete:
        _report(refs.delete_branch(repository, _only_name(name, rev), stamp(repository, author)), as_json)
    elif name is None:
        _list(refs.remote_branches(repository) if remotes else refs.branches(repository), as_json)
    else:
        _report(refs.create_branch(repository, name, rev or "HEAD", stamp(repository, author)), as_json)


@click.command()
@click.argument("name", required=False)
@click.argument("rev", required=False)
@click.option("-d", "--delete", is_flag=True, help="Remove the tag.")
@author_option
@repo_option
@json_option
@reports_errors
def tag(name: str | None, rev: str | None, delete: bool, author: str | None, repo: Path | None, as_json: bool) -> None:
    """List the tags, or make the tag NAME at REV (default: HEAD). Tags do not move."""
    from patchhub.porcelain import refs

    repository = open_repository(repo)
    if delete:
        _report(refs.delete_tag(repository, _only_name(name, rev), stamp(repository, author)), as_json)
    elif name is None:
        _list(refs.tags(repository), as_json)
    else:
        _report(refs.create_tag(repository, name, rev or "HEAD", stamp(repository, author)), as_json)


@click.command()
@click.argument("name")
@click.argument("rev", required=False)
@click.option("-c", "--create", is_flag=True, help="Make the branch first, at REV (default: HEAD; `base` begins anew).")
@click.option("--detach", is_flag=True, help="Go to the commit NAME, on no branch.")
@author_option
@repo_option
@json_option
@reports_errors
def switch(
    name: str, rev: str | None, create: bool, detach: bool, author: str | None, repo: Path | None, as_json: bool
) -> None:
    """Go to the branch NAME; one that only a remote has is made here first."""
    from patchhub.porcelain import refs

    if (create and detach) or (rev is not None and not create):
        raise SettingsError(
            "switch takes a branch, or -c NAME [REV], or --detach REV", remedy="Give one of these forms."
        )
    repository = open_repository(repo)
    by = stamp(repository, author)
    if create:
        moved = refs.switch_to_new(repository, name, rev or "HEAD", by)
    elif detach:
        moved = refs.detach(repository, name, by)
    else:
        moved = refs.switch(repository, name, by)
    if as_json:
        print_json({**moved.to_json(), "branch": repository.head[0]})
        return
    on, _ = repository.head
    say(f"on {f'branch {on}' if on else 'no branch'}, at {_place(moved.after)}")


@click.command()
@click.argument("rev")
@author_option
@repo_option
@json_option
@reports_errors
def reset(rev: str, author: str | None, repo: Path | None, as_json: bool) -> None:
    """Move the current branch to REV. Nothing is lost: `patchhub undo` moves it back."""
    from patchhub.porcelain import refs

    repository = open_repository(repo)
    _report(refs.reset(repository, rev, stamp(repository, author)), as_json)


@click.command()
@click.argument("ref", default="HEAD")
@click.option("-n", "--limit", type=click.IntRange(min=1), help="At most this many moves.")
@repo_option
@json_option
@reports_errors
def reflog(ref: str, limit: int | None, repo: Path | None, as_json: bool) -> None:
    """Where REF was, the last move first; REF@{N}, N operations ago, names what it led to then."""
    from patchhub.porcelain import refs

    entries = refs.reflog(open_repository(repo), ref, limit=limit)
    if as_json:
        print_json([entry.to_json() for entry in entries])
        return
    for entry in entries:
        commit = click.style(f"{entry.commit[:12] if entry.commit else '(no commit)':<12}", fg="yellow")
        say(f"{commit} {ref}@{{{entry.ago}}} {entry.time} {entry.command}: {entry.message}")


def _only_name(name: str | None, rev: str | None) -> str:
    if name is None or rev is not None:
        raise SettingsError(
            "--delete takes one name", remedy="Give the name of what shall be removed, and nothing else."
        )
    return name


def _list(found: list[Named], as_json: bool) -> None:
    if as_json:
        print_json([named.to_json() for named in found])
        return
    width = max((len(named.name) for named in found), default=0)
    for named in found:
        name = click.style(f"{named.name:<{width}}", fg="green" if named.current else None)
        say(f"{'*' if named.current else ' '} {name} {named.commit[:12]} {named.message}")


def _report(moved: Moved, as_json: bool) -> None:
    from patchhub.porcelain.refs import short

    if as_json:
        print_json(moved.to_json())
    elif moved.after is None and moved.before is not None:
        say(f"{short(moved.ref)} removed; it was at {_place(moved.before)}")
    else:
        say(f"{short(moved.ref)} is at {_place(moved.after)}")


def _place(commit: str | None) -> str:
    return commit[:12] if commit else "the base"


COMMANDS = (branch, switch, tag, reset, reflog)
