"""Commands for those who must answer: sign, approve, verify, audit."""

from __future__ import annotations

import textwrap
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from patchhub.cli.options import allowed_option, key_option, signature_line
from patchhub.cli.terminal import (
    author_option,
    count,
    json_option,
    opened,
    print_json,
    repo_option,
    reports_errors,
    say,
    talk,
)
from patchhub.errors import SignatureError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from patchhub.porcelain.trust.audit import Audit, FactChange
    from patchhub.porcelain.trust.signing import Signed

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
@repo_option
@json_option
@reports_errors
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
@repo_option
@json_option
@reports_errors
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
@repo_option
@json_option
@reports_errors
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
@repo_option
@json_option
@reports_errors
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


COMMANDS = (sign, approve, verify, audit)
