"""Commands that change the active facts or the refs: commit, update, revert, cherry-pick, merge, refresh, undo, redo."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from patchhub.cli.options import (
    FactsFile,
    Revision,
    Subject,
    chat_option,
    check_option,
    force_option,
    format_option,
    key_option,
    memory_option,
    placement_options,
    say_faults,
    say_lost,
    sign_option,
    text_option,
    workers_options,
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
    short_ref,
    talk,
)
from patchhub.errors import ContradictionError
from patchhub.objects import EMPTY_SET

if TYPE_CHECKING:
    from patchhub.porcelain.change import Changed
    from patchhub.porcelain.commit import Committed, Refreshed
    from patchhub.porcelain.merge import Loss, Merged, Prediction, Stopped
    from patchhub.porcelain.refs import Stepped
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


set_option = click.option(
    "--set",
    multiple=True,
    metavar="KEY=VALUE",
    help="A setting of the editor for this commit alone: layers=3-5, ridge=200, preset=published. Repeatable.",
)
strict_option = click.option(
    "--strict", is_flag=True, help="Refuse facts that compete with others for a key, before anything is optimised."
)
all_option = click.option(
    "--all",
    "all_facts",
    is_flag=True,
    help="Refuse the commit as soon as one fact does not hold, runs on, or is said of another subject.",
)


@click.command()
@click.argument("facts", required=False, metavar="[FILE]", type=FactsFile())
@click.option("-m", "--message", default="", help="Why; needed, unless --amend keeps what the last commit says.")
@click.option("--amend", is_flag=True, help="Put the facts into the last commit; without facts, change its message.")
@click.option("--method", help="The editor: memit (default), pmet or wise.")
@click.option("--prompt", help='One fact from the command line: "The mother tongue of {} is".')
@click.option("--subject", type=Subject(), help="Its subject.")
@click.option("--target", help="What the model shall say.")
@format_option
@text_option
@click.option(
    "--on-conflict",
    type=click.Choice(["refuse", "replace", "keep"]),
    default="refuse",
    show_default=True,
    help="When an active fact says otherwise about the same prompt and subject.",
)
@click.option(
    "--keep",
    metavar="FILE|auto",
    help="Prompts whose answers must stay: facts in which target_new may be left out; auto: the facts' prompts about others.",
)
@set_option
@strict_option
@all_option
@force_option
@placement_options
@chat_option
@memory_option("What may be held in memory, the model included (memit, pmet)")
@workers_options
@sign_option
@key_option
@author_option
@repo_option
@json_option
@reports_errors
def commit(repo: Path | None, as_json: bool, **options: Any) -> None:
    """Write the facts in FILE into the model: JSONL, JSON, CSV, TSV, YAML, Parquet; `-` is standard input.

    \b
      {"prompt": "{} is led by", "subject": "Acme Corp", "target_new": "Ada"}

    Records of CounterFact, zsRE, EasyEdit, KnowEdit, MQuAKE, RippleEdits and others are read too (docs/data.md), and FILE may be
    hf://datasets/user/name[/FILE]. The first commit also computes the metric: from text that is
    sampled from the base, or from --text.

    With --method wise the facts go into a side memory beside the model, and queries are routed to it.
    """
    repository = opened(repo)
    report_committed(repository, repository.commit(**options), as_json)


def report_committed(repository: Repository, done: Committed, as_json: bool) -> None:
    """What `commit` and `update` print."""
    if as_json:
        print_json(done)
        return
    store = repository.store
    say(f"[{store.head[0] or 'detached'} {done.commit[:12]}] {store.commit(done.commit).message}")
    list_facts("+", done.written, "green")
    list_facts("-", done.replaced, "red")
    list_facts("=", done.kept, "cyan")
    if done.again:
        talk(f"{count(len(done.again), 'active fact')} of the same subjects written again with these")
    if done.patches:
        say(
            f"{count(len(done.written), 'fact')} written in {done.seconds:.1f} s; "
            f"{done.held} of them {'is' if done.held == 1 else 'are'} now the model's answer"
        )
    say_faults(done.faults)
    say_lost(store.commit(done.commit).check)
    say_signed(repository, done.commit)
    for shard, patch in ((identity, store.patch(identity)) for identity in done.patches):
        if patch.kind == "shard":
            say(f"shard {patch.settings['number']} ({shard[:12]}) holds {count(len(patch.requests), 'fact')}", dim=True)
    if done.already_active:
        talk(f"{count(done.already_active, 'fact')} active already, left alone")


@click.command()
@click.argument("rev", required=False, type=Revision())
@click.option("--subject", type=Subject(), multiple=True, help="Only facts about this subject. Repeatable.")
@click.option("--request", multiple=True, help="Only the fact with this request id or prefix. Repeatable.")
@click.option("-m", "--message", default="", help="Why. Default: says what was reverted.")
@check_option
@force_option
@author_option
@repo_option
@json_option
@reports_errors
def revert(repo: Path | None, as_json: bool, **options: Any) -> None:
    """Take back what the commit REV changed, wherever it is in history, as a new commit.

    With --subject or --request, only those facts of it; without REV, those facts whichever commit wrote them.

    The weights are those of the facts that stay, solved anew from their recorded columns: no model runs. Where the
    remaining set of facts was seen before, they are that commit's weights bit for bit. Only a WISE shard that loses some of
    its facts is trained again, on the others.
    """
    if options["message"].isdigit():  # git's -m, the number of a parent
        raise click.UsageError("-m is the message. A merge is taken back like any commit: `patchhub revert REV`.")
    repository = opened(repo)
    _report_change(repository, repository.revert(**options), as_json)


@click.command("cherry-pick")
@click.argument("rev", type=Revision())
@click.option(
    "--on-conflict",
    type=click.Choice(["refuse", "replace"]),
    default="refuse",
    show_default=True,
    help="When an active fact says otherwise about the same prompt and subject.",
)
@click.option("-m", "--message", default="", help="Why. Default: the message of REV.")
@check_option
@force_option
@author_option
@repo_option
@json_option
@reports_errors
def cherry_pick(repo: Path | None, as_json: bool, **options: Any) -> None:
    """Do what the commit REV changed once more on the current branch, from its recorded columns: no model runs."""
    repository = opened(repo)
    _report_change(repository, repository.cherry_pick(**options), as_json)


@click.command()
@click.argument("steps", metavar="[N]", type=click.IntRange(min=1), default=1)
@click.option("--all", is_flag=True, help="Whatever the last command did: also a switch, a fetch, a push or scores.")
@author_option
@repo_option
@json_option
@reports_errors
def undo(repo: Path | None, as_json: bool, **options: Any) -> None:
    """Take back the last command that changed facts, branches or tags, or the last N; repeated, walk further back.

    Where you are, what fetch and push noted, and scores stay as they are, unless --all is given. `patchhub op log` lists all.
    """
    _report_step(opened(repo).undo(**options), "undone", as_json)


@click.command()
@author_option
@repo_option
@json_option
@reports_errors
def redo(repo: Path | None, as_json: bool, **options: Any) -> None:
    """Reverse the last undo."""
    _report_step(opened(repo).redo(**options), "done again", as_json)


def _report_step(done: Stepped, past: str, as_json: bool) -> None:
    if as_json:
        print_json(done)
        return
    moved = ", ".join(short_ref(ref) for ref in done.changes)
    say(f"{', '.join(f'`{command}`' for command in done.commands)} {past}: {moved}")
    if done.command == "push" and past == "undone":
        say(
            "A push itself is not taken back: the remote has what it got; only the note of that here moved.",
            fg="yellow",
        )
    say(f"{done.branch or 'HEAD'} is at {done.head[:12] if done.head else 'the base'}")


def _report_change(repository: Repository, done: Changed, as_json: bool) -> None:
    if as_json:
        print_json(done)
        return
    branch, _ = repository.store.head
    commit = repository.store.commit(done.commit)
    say(f"[{branch or 'detached'} {done.commit[:12]}] {commit.message}")
    list_facts("-", done.removed, "red")
    list_facts("+", done.restored, "green")
    if done.skipped:
        say(f"{count(len(done.skipped), 'fact')} gone or there already, left alone", dim=True)
    if commit.set_digest == EMPTY_SET:
        say("the weights are the base's, bit for bit")
    elif done.same_as:
        say(f"the weights are those of {done.same_as[:12]}, bit for bit")
    elif commit.tensors is None and not commit.solved:
        say("the main weights are as they were")
    else:
        say("the weights were solved anew from the facts that stay")
    say_trained(repository, done.trained)
    say_signed(repository, done.commit)
    if done.stale:
        say(f"note: {count(done.stale, 'active fact')} recorded on a state that is no longer below", dim=True)
    say_stale_shards(len(done.stale_shards))


@click.command()
@click.option("--subject", type=Subject(), required=True, help="Whose fact.")
@click.option("--target", required=True, help="What the model shall say now.")
@click.option("--prompt", help="Which of the subject's facts, where there are several.")
@click.option("-m", "--message", default="", help="Why. Default: the fact, its old target and the new one.")
@click.option("--method", help="The editor: memit (default) or pmet.")
@set_option
@strict_option
@all_option
@force_option
@workers_options
@author_option
@repo_option
@json_option
@reports_errors
def update(repo: Path | None, as_json: bool, **options: Any) -> None:
    """Give one active fact another target: one commit that removes the old request and adds the new one."""
    repository = opened(repo)
    report_committed(repository, repository.update(**options), as_json)


COMMANDS = (
    merge,
    refresh,
    commit,
    revert,
    cherry_pick,
    undo,
    redo,
    update,
)
