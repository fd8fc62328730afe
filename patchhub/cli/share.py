"""Commands that share: remote, push, fetch, pull, clone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from patchhub.cli.change import report_merge
from patchhub.cli.habits import Group
from patchhub.cli.options import RemoteName, Revision, required_option
from patchhub.cli.terminal import (
    author_option,
    bars,
    count,
    json_option,
    opened,
    print_json,
    repo_option,
    reports_errors,
    say,
    short_ref,
    talk,
)
from patchhub.errors import ContradictionError

if TYPE_CHECKING:
    from patchhub.remotes.sync import Fetched, Moved
    from patchhub.store.states import Proofs


size_option = click.option(
    "--max-size", type=click.FloatRange(min=0), default=64.0, show_default=True, help="Most gigabytes to download."
)

trust_option = click.option(
    "--trust", is_flag=True, help="Accept weights that are not those of their facts; fsck and show go on saying so."
)


@click.group(cls=Group)
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
    kept = opened(repo).remote_add(name, address)
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
    found = opened(repo).remote_list()
    if as_json:
        print_json(found)
        return
    for name, address in found.items():
        say(f"{name:<12} {address}")
    if not found:
        talk("there is no remote yet: `patchhub remote add NAME ADDRESS` names one")


@remote.command("remove")
@click.argument("name", type=RemoteName())
@author_option
@repo_option
@json_option
@reports_errors
def remote_remove(name: str, author: str | None, repo: Path | None, as_json: bool) -> None:
    """Forget a remote; nothing is deleted there."""
    opened(repo).remote_remove(name, author=author)
    if as_json:
        print_json({"removed": name})
    else:
        say(f"Removed {name}")


@remote.command("rename")
@click.argument("old", type=RemoteName())
@click.argument("new")
@author_option
@repo_option
@json_option
@reports_errors
def remote_rename(old: str, new: str, author: str | None, repo: Path | None, as_json: bool) -> None:
    """Give a remote another name, and its branches here with it."""
    address = opened(repo).remote_rename(old, new, author=author)
    if as_json:
        print_json({new: address})
    else:
        say(f"{new} is {address}")


@click.command()
@click.argument("remote", required=False, type=RemoteName())
@click.argument("refs", nargs=-1, type=Revision())
@click.option("--all", is_flag=True, help="All branches and tags; they move one after the other.")
@click.option("--tags", is_flag=True, help="All tags.")
@click.option(
    "--private-facts/--public-facts",
    default=None,
    help="Withhold the texts of the facts, or stop doing so. Default: as the remote has it.",
)
@click.option(
    "--delete", is_flag=True, help="Remove REFS there, where they are as they were at the last fetch or push."
)
@click.option(
    "--force-with-lease",
    is_flag=True,
    help="Overwrite a branch that does not lead to yours, where it is as it was at the last fetch or push.",
)
@click.option("--dry-run", is_flag=True, help="Show what would travel.")
@author_option
@repo_option
@json_option
@reports_errors
def push(
    remote: str | None, refs: tuple[str, ...], dry_run: bool, repo: Path | None, as_json: bool, **options: Any
) -> None:
    """Bring branches and tags to REMOTE. Default: the current branch, to the only remote or to `origin`.

    Only what is missing there travels. A branch moves only forward; if it moved there, pull first. On the Hub, a
    repository that does not exist is made, private.
    """
    pushed = opened(repo).push(remote, *refs, dry_run=dry_run, **options)
    if as_json:
        print_json(pushed)
        return
    for done in pushed:
        if done.moved.new is None:
            say(
                f"{'would remove' if dry_run else 'removed'} {short_ref(done.moved.ref)}; it was at {str(done.moved.old)[:12]}"
            )
            continue
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
@click.argument("remote", required=False, type=RemoteName())
@trust_option
@click.option("--repair", is_flag=True, help="Check all that is reachable and fetch again what is damaged here.")
@click.option("--prune", is_flag=True, help="Forget branches of REMOTE that it does not have any more.")
@required_option
@size_option
@author_option
@repo_option
@json_option
@reports_errors
def fetch(repo: Path | None, as_json: bool, **options: Any) -> None:
    """Bring all branches, tags and notes of REMOTE here: every byte verified, and weights proven to be those of their facts.

    Your branches stay where they are.
    """
    fetched = opened(repo).fetch(**options)
    if as_json:
        print_json(fetched)
    else:
        _say_fetched(fetched)


@click.command()
@click.argument("remote", required=False, type=RemoteName())
@trust_option
@required_option
@size_option
@author_option
@repo_option
@json_option
@reports_errors
def pull(repo: Path | None, as_json: bool, **options: Any) -> None:
    """Fetch, then bring REMOTE's branch of the same name into the current one: fast-forward, or merge."""
    repository = opened(repo)
    pulled = repository.pull(**options)
    if as_json:
        print_json(pulled)
    else:
        _say_fetched(pulled.fetched)
        if pulled.merged is None:
            say(f"The remote has no branch {repository.store.head[0]}; `patchhub push` makes it")
        else:
            report_merge(repository, pulled.merged)
    if pulled.merged is not None and pulled.merged.outcome == "stopped":
        raise SystemExit(ContradictionError.exit_code)


@click.command()
@click.argument("address")
@click.argument("folder", required=False, type=click.Path(path_type=Path, file_okay=False))
@click.option("--base", help="The base model, a folder or a Hub id. Default: where the remote says it is.")
@click.option("--shared", is_flag=True, help="Let the group of the folder write in the store, whatever their umask.")
@trust_option
@required_option
@size_option
@author_option
@json_option
@reports_errors
def clone(as_json: bool, **options: Any) -> None:
    """Make a store in FOLDER (default: named as ADDRESS ends) with all that ADDRESS has, and name that address `origin`.

    The base is read once and must be the one that the remote was made for.
    """
    from patchhub.repository import Repository

    done: Any = Repository.clone(progress=bars(), **options).made
    if as_json:
        print_json(done)
        return
    _say_proofs(done.fetched.proofs)
    say(f"Cloned into {done.store}")
    if done.commit:
        say(f"On branch {done.branch} at {click.style(done.commit[:12], fg='yellow')}")


def _move(moved: Moved) -> str:
    new = click.style(moved.new[:12] if moved.new else "gone", fg="yellow")
    return f"{short_ref(moved.ref):<24} {moved.old[:12] if moved.old else 'new':>12} -> {new}"


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
    _say_proofs(fetched.proofs)


def _say_proofs(proofs: Proofs) -> None:
    """What is proven of what came; what was trusted was said as a warning."""
    if proofs.commits:
        say(f"{count(proofs.commits, 'commit')}: the weights are those of the facts", dim=True)
    for taken in proofs.unprovable:
        say(f"{taken.words()}: no facts prove what it does, its author alone vouches for it", fg="yellow")


COMMANDS = (remote, push, fetch, pull, clone)
