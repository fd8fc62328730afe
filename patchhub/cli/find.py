"""Commands that find out: search, blame, bisect, merge-base."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from patchhub.cli.options import (
    Revision,
    Subject,
    base_option,
    chat_option,
    placement_options,
)
from patchhub.cli.terminal import (
    count,
    json_option,
    local,
    opened,
    print_json,
    repo_option,
    reports_errors,
    say,
    say_metadata,
)

if TYPE_CHECKING:
    from patchhub.porcelain.blame import Bisection, Blame, Step
    from patchhub.porcelain.search import Found
    from patchhub.store.lookup import Change, Fact


_FOUND_SHOWN = 10


@click.command()
@click.argument("words", nargs=-1)
@click.option("--subject", type=Subject(), default="", help="Words that must be in the fact's subject.")
@click.option("--rev", type=Revision(), default="HEAD", show_default=True, help="Where a fact counts as active.")
@click.option("-n", "--limit", type=click.IntRange(min=1), default=50, show_default=True, help="At most so many facts.")
@repo_option
@json_option
@reports_errors
def search(words: tuple[str, ...], repo: Path | None, as_json: bool, **options: Any) -> None:
    """Facts ever committed that hold all WORDS: who taught them, when, and whether they are still active."""
    found = opened(repo).search(*words, **options)
    if as_json:
        print_json(found)
        return
    list_found(found)
    if not found:
        say("no fact matches")


def list_found(found: Iterable[Found]) -> None:
    """Facts, whether they are active, and the commits that added or removed them."""
    for item in found:
        state = click.style("active", fg="green") if item.active else click.style("not active", dim=True)
        say(f"{_fact(item.fact)}  {state}")
        say_metadata(item.metadata)
        for change in item.changes:
            say(f"    {_change(change)}", dim=True)


@click.command()
@click.argument("prompt")
@click.option("--subject", type=Subject(), help="Read the keys at the last token of this part of PROMPT.")
@click.option("--rev", type=Revision(), default="HEAD", show_default=True, help="The revision to question.")
@click.option("--lookup", is_flag=True, help="Only look PROMPT up among the active facts; no model runs.")
@click.option(
    "-n", "--limit", type=click.IntRange(min=1), default=_FOUND_SHOWN, show_default=True, help="Facts to show."
)
@base_option
@placement_options
@chat_option
@repo_option
@json_option
@reports_errors
def blame(prompt: str, lookup: bool, limit: int, repo: Path | None, as_json: bool, **options: Any) -> None:
    """How much each active fact, and each patch, moves the answer to PROMPT.

    Read at the subject's last token, where facts are written: --subject, or the subject of an active fact that is in PROMPT, or
    else PROMPT's last token.
    """
    found: Any = opened(repo).blame(prompt, lookup=lookup, limit=limit, **options)
    if as_json:
        print_json(found)
        return
    if lookup:
        _mentioned(prompt, found)
        return
    _mentioned(prompt, found.mentioned[:limit])
    _shares(found, limit)


@click.command()
@click.argument("good", type=Revision())
@click.argument("bad", type=Revision())
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@click.option(
    "--metric",
    type=click.Choice(["efficacy", "paraphrase", "locality", "perplexity"]),
    help="What is measured, instead of a command.",
)
@click.option("--below", type=float, help="Bad where the metric is below this.")
@click.option("--above", type=float, help="Bad where the metric is above this.")
@click.option(
    "--facts", type=click.Path(path_type=Path, dir_okay=False), help="Facts to measure on. Default: the active ones."
)
@base_option
@placement_options
@chat_option
@repo_option
@json_option
@reports_errors
def bisect(good: str, bad: str, command: tuple[str, ...], repo: Path | None, as_json: bool, **options: Any) -> None:
    """The first commit after GOOD, up to BAD, at which something is broken.

    \b
      patchhub bisect v1.0 HEAD --metric locality --below 0.9
      patchhub bisect base HEAD -- python check.py

    COMMAND runs with the applied checkpoint in PATCHHUB_MODEL and the commit in PATCHHUB_COMMIT; exit code 0 means good, 125
    cannot say, anything else bad. What it prints goes to stderr.
    """
    found = opened(repo).bisect(good, bad, *command, **options)
    if as_json:
        print_json(found)
    else:
        _bisection(found)


@click.command("merge-base")
@click.argument("one", type=Revision())
@click.argument("other", type=Revision())
@repo_option
@json_option
@reports_errors
def merge_base(one: str, other: str, repo: Path | None, as_json: bool) -> None:
    """The newest commits that ONE and OTHER both have; `base` if they share nothing else."""
    found = opened(repo).merge_base(one, other)
    if as_json:
        print_json(found)
        return
    for commit in found or ["base"]:
        say(commit)


def _bisection(found: Bisection) -> None:
    if found.chat is not None:
        say("asked in the base's chat form", dim=True)
    for step in found.steps:
        say(_step(step), dim=True)
    if found.entry is None:
        say("It is one of these; skipped commits hide which:")
        for suspect in found.suspects:
            say(f"  {suspect[:12]}")
        return
    commit = found.entry.commit
    say(f"{click.style(found.entry.id, fg='yellow')} is the first bad commit")
    say(f"Author: {commit.author}")
    say(f"Date:   {local(commit.time)}")
    say(f"    {commit.message.splitlines()[0] if commit.message else ''}")
    for sign, colour, requests in (("+", "green", found.added), ("-", "red", found.removed)):
        for request in requests:
            say(f"  {click.style(sign, fg=colour)} {request.text} {click.style(request.target_new, bold=True)}")


def _step(step: Step) -> str:
    value = "" if step.value is None else f"  ({step.value:.4g})"
    return f"{step.commit[:12] if step.commit else 'base':<12} {step.verdict}{value}"


def _mentioned(prompt: str, facts: Any) -> None:
    exact = [fact for fact in facts if fact.text == prompt.strip()]
    for fact in exact:
        say(f"this is the prompt of an active fact: {_fact(fact)}  (patch {fact.patch[:12]})")
    others = [fact for fact in facts if fact not in exact]
    if others:
        say("active facts about a subject in this prompt:")
    for fact in others:
        say(f"  {_fact(fact)}  (patch {fact.patch[:12]})")
    if not facts:
        say("no active fact has a subject that is in this prompt")


def _shares(found: Blame, limit: int) -> None:
    form = "" if found.chat is None else " in the base's chat form"
    say(f"keys read at {found.token[0]!r}{form}; the answer begins with {found.answer[0]!r} ({found.answer[1]:.1%})")
    for share in found.requests[:limit]:
        text = share.request_id[:12] if share.request is None else f"{share.request.text} {share.request.target_new}"
        say(f"  {share.share:6.1%}  {text}  {click.style(f'patch {share.patch[:12]}', dim=True)}")
    if len(found.requests) > limit:
        say(f"          ... and {len(found.requests) - limit} more", dim=True)
    for patch, value in list(found.patches.items())[:limit]:
        say(f"  {value:6.1%}  patch {patch[:12]} in all", dim=True)
    for weight, value in found.change.items():
        say(f"  {weight}: the edits are {value:.1%} of its output there", dim=True)
    if found.shards:
        say(
            f"{count(found.shards, 'active fact')} in shards, which answer beside the weights, "
            f"{'has' if found.shards == 1 else 'have'} no share here",
            dim=True,
        )


def _fact(fact: Fact) -> str:
    was = f"  (was {fact.target_true})" if fact.target_true else ""
    return f"{fact.text} {click.style(fact.target_new, bold=True)}{was}"


def _change(change: Change) -> str:
    verb = "added" if change.change > 0 else "removed"
    subject = change.message.splitlines()[0] if change.message else ""
    return f"{verb} in {change.commit[:12]} by {change.author}, {local(change.time)}: {subject}"


COMMANDS = (search, blame, bisect, merge_base)
