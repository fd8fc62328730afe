"""Commands that join histories: merge, refresh."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from patchhub.cli.options import (
    Revision,
    check_option,
    force_option,
)
from patchhub.cli.terminal import (
    author_option,
    count,
    json_option,
    list_facts,
    opened,
    print_json,
    repo_option,
    reports_errors,
    say,
    say_signed,
    say_stale_shards,
    say_trained,
)
from patchhub.errors import ContradictionError

if TYPE_CHECKING:
    from patchhub.porcelain.merge import Loss, Merged, Prediction, Stopped
    from patchhub.porcelain.refresh import Refreshed
    from patchhub.repository import Repository
    from patchhub.sets.merging import Contradiction, Side


_SHOWN = 8


@click.command()
@click.argument("rev", required=False, type=Revision())
@click.option("-m", "--message", default="", help="Default: \"Merge branch 'REV'\".")
@click.option(
    "--ff/--no-ff",
    default=True,
    help="Move the branch forward where that is all (default), or make a commit even then.",
)
@click.option("--ours", is_flag=True, help="Decide every contradiction for the current branch.")
@click.option("--theirs", is_flag=True, help="Decide every contradiction for REV.")
@click.option(
    "--choices",
    type=click.Path(path_type=Path, dir_okay=False),
    help='JSON file that decides them one by one: {"The mother tongue of Ada is": "theirs", ...}.',
)
@click.option("--refresh", is_flag=True, help="Then record what REV brought again on the merged state.")
@click.option("--dry-run", is_flag=True, help="Only say what would contradict or weaken what.")
@click.option(
    "--continue", "continue_", is_flag=True, help="Take up a stopped merge, with --choices, --ours or --theirs."
)
@click.option("--abort", is_flag=True, help="Leave a stopped merge.")
@check_option
@force_option
@author_option
@repo_option
@json_option
@reports_errors
def merge(repo: Path | None, as_json: bool, **options: Any) -> None:
    """Bring what REV changed into the current branch.

    Each fact is merged on its own: what one side changed since the two parted is kept. Where the sides answer one prompt
    differently the merge stops and lists both answers. The weights are solved from recorded columns: no model runs.
    """
    repository = opened(repo)
    done: Any = repository.merge(**options)
    if as_json:
        print_json(done)
    else:
        report_merge(repository, done)
    if done.outcome == "stopped":
        raise SystemExit(ContradictionError.exit_code)


@click.command()
@click.option("-m", "--message", default="", help="Why. Default: says how many facts.")
@force_option
@author_option
@repo_option
@json_option
@reports_errors
def refresh(repo: Path | None, as_json: bool, **options: Any) -> None:
    """Record facts again whose recording is stale, and on a merge those that it brought, as a new commit.

    Shards whose threshold was measured on other weights are measured on the present ones.

    Forward passes of the model alone: the values that were optimised when the facts were written are kept.
    """
    done = opened(repo).refresh(**options)
    if as_json:
        print_json(done)
    else:
        _report_refreshed(done)


def _report_refreshed(done: Refreshed) -> None:
    again = f"{count(len(done.facts), 'fact')} recorded again" if done.facts or not done.shards else ""
    measured = f"the threshold of {count(len(done.shards), 'shard')} measured again" if done.shards else ""
    what = ", ".join(part for part in (again, measured) if part)
    say(f"[{done.commit[:12]}] {what} in {done.seconds:.1f} s")
    if done.left:
        say(f"{count(done.left, 'fact')} left as they were: the texts are withheld", fg="yellow")


def report_merge(repository: Repository, done: Any) -> None:
    """What became of a merge, by its outcome."""
    if done.outcome == "aborted":
        say("the merge is left; nothing had changed")
    elif done.outcome == "dry run":
        _report_prediction(done)
    elif done.outcome == "stopped":
        _report_stopped(done)
    else:
        _report_merged(repository, done)
        if done.refreshed:
            _report_refreshed(done.refreshed)


def _report_merged(repository: Repository, done: Merged) -> None:
    branch, _ = repository.store.head
    at = f"[{branch or 'detached'} {done.commit[:12] if done.commit else 'base'}]"
    if done.outcome != "merged":
        say(f"{at} {done.outcome}")
    else:
        say(f"{at} {repository.store.commit(str(done.commit)).message}")
    list_facts("+", done.from_theirs, "green")
    for patch in done.imports:
        weights = count(len(repository.store.patch(patch).weights), "weight")
        say(f"  {click.style('+', fg='green')} an imported change of {weights} ({patch[:12]})")
    list_facts("-", done.removed_by_theirs, "red")
    for found, side in done.decided.items():
        say(f"  {click.style('~', fg='cyan')} {found.text}: {_targets(found, side)} ({side}) stays")
    if done.outcome != "merged":
        return
    say(
        f"{count(len(done.from_ours), 'fact')} from ours alone, {count(len(done.from_theirs), 'fact')} from theirs alone"
    )
    if done.same_as:
        say(f"the weights are those of {done.same_as[:12]}, bit for bit")
    else:
        say(f"the weights were solved anew from the facts of both, in {done.seconds:.1f} s")
    say_trained(repository, done.trained)
    say_signed(repository, str(done.commit))
    _say_unchecked(done.unchecked)
    if done.stale:
        say(f"note: {count(done.stale, 'active fact')} recorded on a state that is no longer below", dim=True)
    say_stale_shards(len(done.stale_shards))


def _report_stopped(done: Stopped) -> None:
    say(f"{count(len(done.open), 'contradiction')} between ours and {done.merge.revision}; nothing was changed:")
    _report_contradictions(done.open)
    _say_unchecked(done.unchecked)
    say()
    say("Decide with `patchhub merge --continue` and --ours, --theirs or --choices FILE, where FILE is")
    text = done.open[0].text.replace('"', '\\"')
    say(f'  {{"{text}": "ours" or "theirs", ...}}')
    say("or leave it with `patchhub merge --abort`.")


def _report_prediction(found: Prediction) -> None:
    say(f"{count(found.from_ours, 'fact')} from ours alone, {count(found.from_theirs, 'fact')} from theirs alone")
    if found.contradictions:
        say(f"{count(len(found.contradictions), 'contradiction')}; the merge would stop:")
        _report_contradictions(found.contradictions)
    _say_unchecked(found.unchecked)
    if found.losses:
        say(f"{count(len(found.losses), 'fact')} would be weakened, or compete with one of the other side:")
        for loss in found.losses[:_SHOWN]:
            _report_loss(loss)
        if len(found.losses) > _SHOWN:
            say(f"  ... and {len(found.losses) - _SHOWN} more (--json lists them)", dim=True)
    else:
        say("no fact of either side would be weakened by the other")


def _report_contradictions(contradictions: tuple[Contradiction, ...]) -> None:
    for found in contradictions:
        say(f"\n  {found.text}")
        width = max(len(claim.request.target_new) for claim in (*found.ours, *found.theirs))
        for side, colour in (("ours", "green"), ("theirs", "red")):
            for claim in found.ours if side == "ours" else found.theirs:
                target = click.style(f"{claim.request.target_new:<{width}}", fg=colour, bold=True)
                message = next(iter(claim.message.splitlines()), "")
                say(f"    {side:<6} {target}   {claim.author} in {claim.commit[:12]} “{message}”, {claim.time[:10]}")


def _report_loss(loss: Loss) -> None:
    say(f"\n  {loss.text} {click.style(loss.target, bold=True)} ({loss.side})")
    say(f"    misses {loss.before:.0%} of its change now, {loss.after:.0%} merged, at {loss.weight}")
    if loss.other is not None:
        say(f"    beside: {loss.other.text} {loss.other.target} (keys alike to {loss.other.key_cosine:.2f})")


def _targets(found: Contradiction, side: Side) -> str:
    return ", ".join(claim.request.target_new for claim in found.claims(side))


def _say_unchecked(unchecked: int) -> None:
    if unchecked:
        say(f"{count(unchecked, 'fact')} could not be checked for contradictions: the texts are withheld", fg="yellow")


COMMANDS = (merge, refresh)
