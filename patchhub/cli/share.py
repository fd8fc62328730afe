"""Commands that share, and those for who must answer: remote, push, fetch, pull, clone; sign, approve, verify, audit."""

from __future__ import annotations

import textwrap
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from patchhub.cli.change import report_merge
from patchhub.cli.options import RemoteName, Revision, allowed_option, key_option, required_option, signature_line
from patchhub.cli.terminal import (
    Group,
    author_option,
    bars,
    count,
    json_option,
    opened,
    print_json,
    reports_errors,
    say,
    short_ref,
    store_options,
    talk,
    together,
)
from patchhub.errors import ContradictionError, SignatureError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from patchhub.porcelain.trust.audit import Audit, FactChange
    from patchhub.porcelain.trust.signing import Signed
    from patchhub.remotes.receive import Fetched, Moved
    from patchhub.store.states import Proofs


size_option = click.option(
    "--max-size", type=click.FloatRange(min=0), default=64.0, show_default=True, help="Most gigabytes to download."
)

trust_option = click.option(
    "--trust", is_flag=True, help="Accept weights that are not those of their facts; fsck and show go on saying so."
)
receiving_options = together(trust_option, required_option, size_option)


@click.group(cls=Group)
def remote() -> None:
    """Name the places that a store is shared with.

    ADDRESS is hf://user/repo, a folder, or an address that fsspec knows, such as s3://bucket/facts.
    """


@remote.command("add")
@click.argument("name")
@click.argument("address")
@store_options
def remote_add(name: str, address: str, repo: Path | None, as_json: bool) -> None:
    """Give ADDRESS a NAME; `origin` is used where no name is given."""
    kept = opened(repo).remote_add(name, address)
    if as_json:
        print_json({name: kept})
    else:
        say(f"{name} is {kept}")


@remote.command("set-url")
@click.argument("name", type=RemoteName())
@click.argument("address")
@store_options
def remote_set_url(name: str, address: str, repo: Path | None, as_json: bool) -> None:
    """Give a remote another ADDRESS."""
    kept = opened(repo).remote_set_url(name, address)
    if as_json:
        print_json({name: kept})
    else:
        say(f"{name} is {kept}")


@remote.command("list")
@store_options
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
@store_options
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
@store_options
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
    "-d", "--delete", is_flag=True, help="Remove REFS there, where they are as they were at the last fetch or push."
)
@click.option(
    "--force-with-lease",
    is_flag=True,
    help="Overwrite a branch that does not lead to yours, where it is as it was at the last fetch or push.",
)
@click.option("--dry-run", is_flag=True, help="Show what would travel.")
@author_option
@store_options
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
@receiving_options
@click.option("--repair", is_flag=True, help="Check all that is reachable and fetch again what is damaged here.")
@click.option("-p", "--prune", is_flag=True, help="Forget branches of REMOTE that it does not have any more.")
@author_option
@store_options
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
@receiving_options
@author_option
@store_options
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
@receiving_options
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


with_option = click.option(
    "--with",
    "with_",
    type=click.Choice(["ssh", "model-signing", "certificate", "sigstore"]),
    help="Sign with OpenSSH, or as OpenSSF Model Signing does: with a key, by certificate, or keyless. Default: the config's, else ssh.",
)


@click.command()
@click.argument("rev", default="HEAD")
@with_option
@key_option
@author_option
@store_options
def sign(repo: Path | None, as_json: bool, **options: Any) -> None:
    """Sign the commit REV, or each one of FROM..TO, that is there already; `commit -s` signs a new one.

    A signature covers the commit's id, and with it every fact, weight and commit below it, down to the base. It travels with
    the branch, as notes do.
    """
    _report(opened(repo).sign(**options), as_json)


@click.command()
@click.argument("rev", default="HEAD")
@click.option("-m", "--message", default="", help="Why.")
@with_option
@key_option
@author_option
@store_options
def approve(repo: Path | None, as_json: bool, **options: Any) -> None:
    """Say with a key of your own that the commit REV of somebody else, or each one of FROM..TO, may go on.

    \b
      patchhub config policy.main.approvals 1

    then refuses a push of main that has a commit which nobody else approved.
    """
    _report(opened(repo).approve(**options), as_json)


@click.command()
@click.argument("rev", default="HEAD")
@allowed_option
@click.option("--all", is_flag=True, help="Check the signatures of every commit below too.")
@store_options
def verify(repo: Path | None, as_json: bool, **options: Any) -> None:
    """Who signed the commit or tag REV, and whether every object and ref below it is what was signed.

    Exit code 12 unless an allowed key signed it and nothing below differs.
    """
    found = opened(repo).verify(**options)
    if as_json:
        print_json(found)
    else:
        say(click.style(f"commit {found.commit}", fg="yellow"))
        for signature in found.signatures:
            at = "" if signature.commit == found.commit else f"{signature.commit[:12]}: "
            say(f"  {at}{signature_line(signature)}")
        if not found.signatures:
            say("  nobody signed it: `patchhub sign` does", fg="yellow")
        for commit in found.unsigned:
            say(f"  {commit[:12]}: no allowed key signed it", fg="yellow")
        for damage in found.damage:
            say(f"  {damage.words()}", fg="red")
        below = "DIFFERS from what was signed" if found.damage else "as it was signed" if found.trusted else "intact"
        say(f"{count(found.objects, 'object')} read, down to the base: {below}")
        verdict = click.style("trusted", fg="green") if found.trusted else click.style("NOT trusted", fg="red")
        say(f"{found.commit[:12]} is {verdict}")
    if not found.trusted:
        raise SystemExit(SignatureError.exit_code)


@click.command()
@click.argument("rev", default="HEAD")
@click.option("--since", metavar="WHEN", help='Only changes from 2026-11-21, 2026-11-21T09:30 or "2 weeks ago" on.')
@allowed_option
@click.option("--csv", type=click.Path(path_type=Path, dir_okay=False), help="Also write the rows as CSV.")
@store_options
def audit(repo: Path | None, as_json: bool, **options: Any) -> None:
    """Every change of a fact below REV: who made it, when and why, on whose approval, with which evidence, and what took it back.

    A row is one change of one fact; of a merge, what neither side had made. All below is read and hashed, down to the base.
    """
    found = opened(repo).audit(**options)
    if as_json:
        print_json(found)
    else:
        for line in _table(found):
            say(line)
        for damage in found.damage:
            say(damage.words(), fg="red")
        if options["csv"]:
            talk(f"wrote {options['csv']}")
    if not found.proven:
        raise SystemExit(SignatureError.exit_code)


_WIDTH = 80
_LEFT = (10, 12, 12)  # when, commit, who


def _table(found: Audit) -> Iterator[str]:
    """The rows in `_WIDTH` columns: a cell for each change, then why, and what speaks for all of the commit."""
    from patchhub.porcelain.trust.audit import by_commit

    left = sum(_LEFT) + len(_LEFT)
    titles = "".join(f"{title:<{width}} " for title, width in zip(("when", "commit", "who"), _LEFT, strict=True))
    yield click.style(f"{titles}what, why, and what speaks for it", bold=True)
    for group in by_commit(found.rows):
        row = group[0]
        who = textwrap.wrap(row.author.partition(" <")[0], _LEFT[2])
        columns = zip_longest([row.time[:10], row.time[11:19]], [row.commit[:12]], who, fillvalue="")
        cells = ["".join(f"{cell:<{width}} " for cell, width in zip(line, _LEFT, strict=True)) for line in columns]
        texts = [*map(_change_words, group), f"why: {' '.join(row.why.split())}", row.evidence.words()]
        lines = [line for text in texts for line in textwrap.wrap(text, _WIDTH - left, subsequent_indent="  ")]
        for cell, line in zip_longest(cells, lines, fillvalue=""):
            yield f"{cell:<{left}}{line}".rstrip()
    since = f" since {found.since}" if found.since else ""
    unsigned = f"{len(found.unsigned)} of them signed by no allowed key"
    yield f"{count(len(found.rows), 'change')}{since}; {count(found.commits, 'commit')}, {unsigned}"
    yield f"{'proven' if found.proven else 'NOT proven'} back to the base {found.base[:12]}"


def _change_words(change: FactChange) -> str:
    back = f" (takes back {change.undoes[:12]})" if change.undoes else ""
    gone = f" (taken back by {change.undone_by[:12]})" if change.undone_by else ""
    return f"{' '.join(change.told.split())}{back}{gone}"


def _report(made: Sequence[Signed], as_json: bool) -> None:
    if as_json:
        print_json(made)
        return
    for signed in made:
        verb = "approved" if signed.kind == "approval" else "signed"
        say(f"{click.style(signed.commit[:12], fg='yellow')} {verb} with {signed.key}")


COMMANDS = (
    remote,
    push,
    fetch,
    pull,
    clone,
    sign,
    approve,
    verify,
    audit,
)
