"""Commands that look: log, show, status, diff, fsck."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from patchhub.cli.terminal import (
    bars,
    json_option,
    open_repository,
    print_json,
    repo_option,
    reports_errors,
    say,
)
from patchhub.errors import CorruptStoreError

if TYPE_CHECKING:
    from patchhub.objects import Request
    from patchhub.porcelain.history import Entry

_SHOWN = 20


@click.command()
@click.argument("rev", default="HEAD")
@click.option("-n", "--limit", type=click.IntRange(min=1), help="At most this many commits.")
@click.option("--oneline", is_flag=True, help="One line a commit.")
@repo_option
@json_option
@reports_errors
def log(rev: str, limit: int | None, oneline: bool, repo: Path | None, as_json: bool) -> None:
    """The commits below REV, newest first."""
    from patchhub.porcelain.history import log as run

    entries = run(open_repository(repo), rev, limit=limit)
    if as_json:
        print_json([entry.to_json() for entry in entries])
        return
    for entry in entries:
        if oneline:
            say(f"{click.style(entry.id[:12], fg='yellow')}{_refs(entry)} {_first_line(entry)} {_facts(entry)}")
        else:
            _header(entry)
            say()


@click.command()
@click.argument("rev", default="HEAD")
@click.option("--all", "everything", is_flag=True, help="List every fact.")
@repo_option
@json_option
@reports_errors
def show(rev: str, everything: bool, repo: Path | None, as_json: bool) -> None:
    """One commit: its facts, how they were written, and what was measured."""
    from patchhub.porcelain.history import show as run

    shown = run(open_repository(repo), rev)
    if as_json:
        print_json(shown.to_json())
        return
    _header(shown.entry)
    say()
    _requests("+", shown.added, "green", everything)
    _requests("-", shown.removed, "red", everything)
    for identity, patch in shown.patches.items():
        layers = patch.settings.get("layers", [])
        say(f"patch {identity[:12]}: {patch.method}, {len(patch.requests)} facts, layers {layers}", dim=True)
    _norms(shown.entry.commit.check.get("norms", {}), {"change": "change", "state": "in all"})
    proofs = shown.entry.commit.check.get("proof", {}).values()
    if proofs:
        say(f"proof {max(proofs):.1e}: relative residual of the joint solution, zero when exact", dim=True)


@click.command()
@repo_option
@json_option
@reports_errors
def status(repo: Path | None, as_json: bool) -> None:
    """Where you are: branch, active facts, base."""
    from patchhub.porcelain.history import status as run

    found = run(open_repository(repo))
    if as_json:
        print_json(found.to_json())
        return
    say(f"On branch {found.branch}" if found.branch else "HEAD is detached")
    if found.head is None:
        say("No commits yet: `patchhub commit FILE -m TEXT` writes the first facts.")
    else:
        say(f"{click.style(found.head.id[:12], fg='yellow')} {_first_line(found.head)}")
        say(f"{found.head.active} active facts; the state is {found.delta_bytes / 1e6:.2f} MB of deltas")
    place = found.base["path"] + (f" at {found.base['revision'][:12]}" if found.base["revision"] else "")
    say(f"base {found.base['id'][:12]} ({found.base['model_type']}) from {place}", dim=True)
    if not found.base_found:
        say("the base is not there any more: `patchhub config base.path FOLDER` says where it is", fg="yellow")
    if found.metric:
        say(f"metric {found.metric[:12]}", dim=True)


@click.command()
@click.argument("old", default="base")
@click.argument("new", default="HEAD")
@click.option("--all", "everything", is_flag=True, help="List every fact.")
@repo_option
@json_option
@reports_errors
def diff(old: str, new: str, everything: bool, repo: Path | None, as_json: bool) -> None:
    """What changes from OLD to NEW: facts added, retargeted and removed, and the norms of the weights' changes.

    Default: from the base to HEAD.
    """
    from patchhub.porcelain.history import diff as run

    found = run(open_repository(repo), old, new)
    if as_json:
        print_json(found.to_json())
        return
    _requests("+", found.added, "green", everything)
    for pair in found.retargeted[: None if everything else _SHOWN]:
        before, after = click.style(pair.before.target_new, fg="red"), click.style(pair.after.target_new, fg="green")
        say(f"  {click.style('~', fg='cyan')} {pair.after.text} {before} -> {after}")
    _requests("-", found.removed, "red", everything)
    if not (found.added or found.retargeted or found.removed):
        say("no fact differs")
    _norms(found.norms, {"old": old, "new": new, "change": "step"})


@click.command()
@click.option("--reindex", is_flag=True, help="Rebuild the search index from the objects first.")
@repo_option
@json_option
@reports_errors
def fsck(reindex: bool, repo: Path | None, as_json: bool) -> None:
    """Check every stored byte and every link between objects."""
    from patchhub.porcelain.integrity import fsck as run

    with bars() as progress:
        report = run(open_repository(repo), progress, rebuild=reindex)
    if as_json:
        print_json(
            {
                "sound": report.sound,
                "objects": report.objects,
                "bytes": report.size,
                "findings": [finding.__dict__ for finding in report.findings],
            }
        )
    else:
        for finding in report.findings:
            say(finding.problem, fg="yellow" if finding.harmless else "red")
            say(f"  {finding.remedy}")
        verdict = "sound" if report.sound else "DAMAGED"
        say(f"{report.objects} objects, {report.size / 1e6:.1f} MB: {verdict}")
    if not report.sound:
        raise SystemExit(CorruptStoreError.exit_code)


def _header(entry: Entry) -> None:
    say(f"{click.style(f'commit {entry.id}', fg='yellow')}{_refs(entry)}")
    say(f"Author: {entry.commit.author}")
    say(f"Date:   {entry.commit.time}")
    say(f"Facts:  {_facts(entry)}")
    say()
    for line in entry.commit.message.splitlines() or [""]:
        say(f"    {line}")


def _refs(entry: Entry) -> str:
    return f" ({click.style(', '.join(entry.refs), fg='cyan')})" if entry.refs else ""


def _facts(entry: Entry) -> str:
    return f"+{len(entry.commit.added)} -{len(entry.commit.removed)} ({entry.active} active)"


def _first_line(entry: Entry) -> str:
    return (entry.commit.message.splitlines() or [""])[0]


def _requests(sign: str, requests: tuple[Request, ...], colour: str, everything: bool) -> None:
    for request in requests[: None if everything else _SHOWN]:
        was = f"  (was {request.target_true})" if request.target_true else ""
        say(f"  {click.style(sign, fg=colour)} {request.text} {click.style(request.target_new, bold=True)}{was}")
    if not everything and len(requests) > _SHOWN:
        say(f"  {sign} ... and {len(requests) - _SHOWN} more (--all lists them)", dim=True)


def _norms(norms: Mapping[str, Mapping[str, Any]], columns: Mapping[str, str]) -> None:
    """Norms of changes, relative to the base's weight."""
    if not norms:
        return
    width = max(map(len, norms))
    say(
        f"{'weight':<{width}}  " + "  ".join(f"{title:>10}" for title in columns.values()) + "   (norm / base's)",
        dim=True,
    )
    for weight, found in norms.items():
        cells = ["-" if found[key] is None else f"{found[key] / (found['base'] or 1):.4f}" for key in columns]
        say(f"{weight:<{width}}  " + "  ".join(f"{cell:>10}" for cell in cells), dim=True)


COMMANDS = (status, log, show, diff, fsck)
