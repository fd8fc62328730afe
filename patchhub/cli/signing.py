"""Commands about who vouches for what: sign, approve, verify."""

from __future__ import annotations

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
)
from patchhub.errors import SignatureError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from patchhub.porcelain.signing import Signed

with_option = click.option(
    "--with",
    "with_",
    type=click.Choice(["ssh", "model-signing"]),
    help="Sign with OpenSSH, or as OpenSSF Model Signing does. Default: the config's, else ssh.",
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


def _report(made: Sequence[Signed], as_json: bool) -> None:
    if as_json:
        print_json(made)
        return
    for signed in made:
        verb = "approved" if signed.kind == "approval" else "signed"
        say(f"{click.style(signed.commit[:12], fg='yellow')} {verb} with {signed.key}")


COMMANDS = (sign, approve, verify)
