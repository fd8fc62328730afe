"""Commands that share: remote, push, fetch, pull, clone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from patchhub.cli.terminal import (
    author_of,
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
from patchhub.errors import ContradictionError
from patchhub.who import Who

if TYPE_CHECKING:
    from patchhub.porcelain.merge import Merged, Stopped
    from patchhub.remotes.sync import Fetched, Moved
    from patchhub.store.store import Store


author_option = click.option("--author", help="Who is recorded in the operation log.")
size_option = click.option(
    "--max-size", type=click.FloatRange(min=0), default=64.0, show_default=True, help="Most gigabytes to download."
)


@click.group()
def remote() -> None:
    """Name the places that a store is shared with.

    ADDRESS is hf://user/repo, a folder, or an address that fsspec knows, such as s3://bucket/facts.
    """


@remote.command("add")
@click.argument("name")
@click.argument("address")
@repo_option
@json_option
@reports_errors
def remote_add(name: str, address: str, repo: Path | None, as_json: bool) -> None:
    """Give ADDRESS a NAME; `origin` is used where no name is given."""
    from patchhub.porcelain.share import remote_add as run

    kept = run(open_repository(repo), name, address)
    if as_json:
        print_json({name: kept})
    else:
        say(f"{name} is {kept}")


@remote.command("list")
@repo_option
@json_option
@reports_errors
def remote_list(repo: Path | None, as_json: bool) -> None:
    """Every remote and its address."""
    from patchhub.porcelain.share import remotes

    found = remotes(open_repository(repo))
    if as_json:
        print_json(found)
        return
    for name, address in found.items():
        say(f"{name:<12} {address}")


@remote.command("remove")
@click.argument("name")
@author_option
@repo_option
@json_option
@reports_errors
def remote_remove(name: str, author: str | None, repo: Path | None, as_json: bool) -> None:
    """Forget a remote; nothing is deleted there."""
    from patchhub.porcelain.share import remote_remove as run

    repository = open_repository(repo)
    run(repository, name, who=stamp(repository, author))
    if as_json:
        print_json({"removed": name})
    else:
        say(f"Removed {name}")


@click.command()
@click.argument("remote", required=False)
@click.argument("refs", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="All branches and tags; they move one after the other.")
@click.option("--tags", is_flag=True, help="All tags.")
@click.option(
    "--private-facts/--public-facts",
    default=None,
    help="Withhold the texts of the facts, or stop doing so. Default: as the remote has it.",
)
@click.option("--dry-run", is_flag=True, help="Show what would travel.")
@author_option
@repo_option
@json_option
@reports_errors
def push(
    remote: str | None,
    refs: tuple[str, ...],
    everything: bool,
    tags: bool,
    private_facts: bool | None,
    dry_run: bool,
    author: str | None,
    repo: Path | None,
    as_json: bool,
) -> None:
    """Bring branches and tags to REMOTE. Default: the current branch, to the only remote or to `origin`.

    Only what is missing there travels. A branch moves only forward; if it moved there, pull first. On the Hub, a
    repository that does not exist is made, private.
    """
    from patchhub.porcelain.share import default_remote
    from patchhub.porcelain.share import push as run

    repository = open_repository(repo)
    with bars() as progress:
        pushed = run(
            repository,
            remote or default_remote(repository),
            refs,
            progress,
            who=stamp(repository, author),
            everything=everything,
            tags=tags,
            private_facts=private_facts,
            dry_run=dry_run,
        )
    if as_json:
        print_json([done.to_json() for done in pushed])
        return
    for done in pushed:
        verb = "move" if done.moved.old != done.moved.new else "update"
        verb = f"would {verb}" if dry_run else f"{verb}d"
        say(f"{verb} {_move(done.moved)}  {count(done.objects, 'object')}, {done.size / 1e6:.2f} MB")
    if not pushed:
        say("Everything is up to date")
    withdrawn = max((done.withdrawn for done in pushed), default=0)
    if withdrawn:
        tense = "would be" if dry_run else "were"
        say(f"{count(withdrawn, 'blob')} of texts that were pushed before {tense} taken out", dim=True)
        say("A Hub repository keeps them in its history, its tags, and branches that are not pushed again.", dim=True)


@click.command()
@click.argument("remote", required=False)
@click.option("--repair", is_flag=True, help="Check all that is reachable and fetch again what is damaged here.")
@click.option("--prune", is_flag=True, help="Forget branches of REMOTE that it does not have any more.")
@size_option
@author_option
@repo_option
@json_option
@reports_errors
def fetch(
    remote: str | None, repair: bool, prune: bool, max_size: float, author: str | None, repo: Path | None, as_json: bool
) -> None:
    """Bring all branches, tags and notes of REMOTE here, every byte verified. Your branches stay where they are."""
    from patchhub.porcelain.share import default_remote
    from patchhub.porcelain.share import fetch as run

    repository = open_repository(repo)
    with bars() as progress:
        fetched = run(
            repository,
            remote or default_remote(repository),
            progress,
            who=stamp(repository, author),
            repair=repair,
            prune=prune,
            max_bytes=_bytes(max_size),
        )
    if as_json:
        print_json(fetched.to_json())
    else:
        _say_fetched(fetched)


@click.command()
@click.argument("remote", required=False)
@size_option
@author_option
@repo_option
@json_option
@reports_errors
def pull(remote: str | None, max_size: float, author: str | None, repo: Path | None, as_json: bool) -> None:
    """Fetch, then bring REMOTE's branch of the same name into the current one: fast-forward, or merge."""
    from patchhub.porcelain.merge import Stopped
    from patchhub.porcelain.share import default_remote
    from patchhub.porcelain.share import pull as run

    repository: Store = open_repository(repo)
    with bars() as progress:
        pulled = run(
            repository,
            remote or default_remote(repository),
            progress,
            stamp(repository, author),
            max_bytes=_bytes(max_size),
        )
    if as_json:
        print_json(pulled.to_json())
    else:
        _say_fetched(pulled.fetched)
        _say_merged(repository, pulled.merged)
    if isinstance(pulled.merged, Stopped):
        raise SystemExit(ContradictionError.exit_code)


@click.command()
@click.argument("address")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--base", help="The base model, a folder or a Hub id. Default: where the remote says it is.")
@size_option
@author_option
@json_option
@reports_errors
def clone(address: str, folder: Path, base: str | None, max_size: float, author: str | None, as_json: bool) -> None:
    """Make a store in FOLDER with all that ADDRESS has, and name that address `origin`.

    The base is read once and must be the one that the remote was made for.
    """
    from patchhub.porcelain.share import clone as run

    with bars() as progress:
        done = run(
            address,
            folder,
            progress,
            who=Who(author_of({}, author), now()),
            base=base,
            max_bytes=_bytes(max_size),
        )
    if as_json:
        print_json(done.to_json())
        return
    say(f"Cloned into {done.store}")
    if done.commit:
        say(f"On branch {done.branch} at {click.style(done.commit[:12], fg='yellow')}")


def _bytes(gigabytes: float) -> int:
    return int(gigabytes * 1e9)


def _move(moved: Moved) -> str:
    new = click.style(moved.new[:12] if moved.new else "gone", fg="yellow")
    return f"{_short(moved.ref):<24} {moved.old[:12] if moved.old else 'new':>12} -> {new}"


def _short(ref: str) -> str:
    """``main``, ``tag v1``, ``origin/main``, ``note on 0123456789ab (counterfact)``."""
    kind, _, name = ref.removeprefix("refs/").partition("/")
    if kind == "notes":
        commit, _, suite = name.partition("/")
        return f"note on {commit[:12]} ({suite})"
    return f"tag {name}" if kind == "tags" else name


def _say_fetched(fetched: Fetched) -> None:
    for moved in fetched.moved:
        say(_move(moved))
    received = fetched.received
    if not fetched.moved and received.objects:
        say(f"{count(received.objects, 'object')} repaired, {received.size / 1e6:.2f} MB, all verified")
    elif fetched.moved:
        say(f"{count(received.objects, 'object')}, {received.size / 1e6:.2f} MB, all verified", dim=True)
    else:
        say("Nothing new")


def _say_merged(repository: Store, merged: Merged | Stopped | None) -> None:
    from patchhub.cli.merge import report_merged, report_stopped
    from patchhub.porcelain.merge import Stopped

    if merged is None:
        say(f"The remote has no branch {repository.head[0]}; `patchhub push` makes it")
    elif isinstance(merged, Stopped):
        report_stopped(merged)
    else:
        report_merged(repository, merged)


COMMANDS = (remote, push, fetch, pull, clone)
