"""Commands that change the active facts or the refs: commit, update, revert, cherry-pick, undo, redo."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from patchhub.cli.options import (
    chat_option,
    check_option,
    force_option,
    memory_option,
    placement_options,
    say_faults,
)
from patchhub.cli.terminal import (
    author_option,
    bars,
    count,
    json_option,
    list_facts,
    open_repository,
    print_json,
    repo_option,
    reports_errors,
    say,
    say_stale_shards,
    say_trained,
    stamp,
    talk,
)
from patchhub.errors import RequestError
from patchhub.objects import EMPTY_SET

if TYPE_CHECKING:
    from patchhub.objects import Operation
    from patchhub.porcelain.change import Changed
    from patchhub.porcelain.commit import Committed
    from patchhub.store.store import Store


set_option = click.option(
    "--set",
    "overrides",
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
@click.argument("file", required=False)
@click.option("-m", "--message", required=True, help="Why.")
@click.option("--method", help="The editor: memit (default), pmet or wise.")
@click.option("--prompt", help='One fact from the command line: "The mother tongue of {} is".')
@click.option("--subject", help="Its subject.")
@click.option("--target", help="What the model shall say.")
@click.option("--format", "format_", type=click.Choice(["jsonl", "json", "csv"]), help="How to read FILE.")
@click.option("--text", multiple=True, type=click.Path(path_type=Path), help="Text for the metric (first commit only).")
@click.option(
    "--on-conflict",
    type=click.Choice(["refuse", "replace", "keep"]),
    default="refuse",
    show_default=True,
    help="When an active fact says otherwise about the same prompt and subject.",
)
@set_option
@strict_option
@all_option
@force_option
@placement_options
@chat_option
@memory_option("What may be held in memory, the model included (memit, pmet)")
@author_option
@repo_option
@json_option
@reports_errors
def commit(
    file: str | None,
    message: str,
    method: str | None,
    prompt: str | None,
    subject: str | None,
    target: str | None,
    format_: Any,
    text: tuple[Path, ...],
    on_conflict: Any,
    overrides: tuple[str, ...],
    strict: bool,
    all_facts: bool,
    force: bool,
    device: str | None,
    dtype: str | None,
    quantization: str | None,
    chat: bool | None,
    memory: int | None,
    author: str | None,
    repo: Path | None,
    as_json: bool,
) -> None:
    """Write the facts in FILE (JSONL, JSON or CSV; `-` is standard input) into the model.

    \b
      {"prompt": "The capital of {} is", "subject": "France", "target_new": "Lyon"}

    CounterFact, EasyEdit and zsRE records are read too. The first commit also computes the metric: from text that is
    sampled from the base, or from --text.

    With --method wise the facts go into a side memory beside the model, and queries are routed to it.
    """
    from patchhub.editing.requests import Batch, Origin, one_request, read_requests
    from patchhub.porcelain.commit import commit as run
    from patchhub.worktree.opening import placement_of
    from patchhub.worktree.recording import read_overrides

    repository = open_repository(repo)
    method = method or repository.config.settings.get("method", "memit")
    settings = read_overrides(overrides, method)
    if file is not None:
        if prompt or subject or target:
            raise RequestError("a FILE and --prompt are both given", remedy="Give one of them.")
        batch = read_requests(sys.stdin.buffer if file == "-" else Path(file), format=format_)
    elif prompt and subject and target:
        batch = Batch((one_request(prompt, subject, target),), (Origin("the command line"),), 0)
    else:
        given = {"--prompt": prompt, "--subject": subject, "--target": target}
        missing = [option for option, text in given.items() if not text]
        problem = "there are no facts" if len(missing) == len(given) else f"{' and '.join(missing)} is missing or empty"
        raise RequestError(problem, remedy="Give a FILE, or --prompt, --subject and --target.")
    if batch.duplicates:
        talk(f"{click.style('warning:', fg='yellow')} {count(batch.duplicates, 'exact duplicate')} counted once")
    if batch.unanswered:
        left = count(batch.unanswered, "neighborhood prompt")
        talk(f"{click.style('warning:', fg='yellow')} {left} without an answer left out")
    with bars() as progress:
        done = run(
            repository,
            batch,
            stamp(repository, author, message),
            progress,
            method=method,
            settings=settings,
            text=text,
            on_conflict=on_conflict,
            strict=strict,
            force=force,
            all_facts=all_facts,
            placement=placement_of(repository, device=device, dtype=dtype, quantization=quantization),
            chat=chat,
            memory=memory,
        )
    if done.already_active:
        talk(f"{count(done.already_active, 'fact')} active already, left alone")
    report_committed(repository, done, as_json)


def report_committed(repository: Store, done: Committed, as_json: bool) -> None:
    """What `commit` and `update` print."""
    if as_json:
        print_json(done.to_json())
        return
    branch, _ = repository.head
    say(f"[{branch or 'detached'} {done.commit[:12]}] {repository.commit(done.commit).message}")
    list_facts("+", done.written, "green")
    list_facts("-", done.replaced, "red")
    say(
        f"{count(len(done.written), 'fact')} written in {done.seconds:.1f} s; "
        f"{done.held} of them {'is' if done.held == 1 else 'are'} now the model's answer"
    )
    say_faults(done.faults)
    for shard, patch in ((identity, repository.patch(identity)) for identity in done.patches):
        if patch.kind == "shard":
            say(f"shard {patch.settings['number']} ({shard[:12]}) holds {count(len(patch.requests), 'fact')}", dim=True)


@click.command()
@click.argument("rev", required=False)
@click.option("--subject", "subjects", multiple=True, help="Only facts about this subject. Repeatable.")
@click.option("--request", "requests", multiple=True, help="Only the fact with this request id or prefix. Repeatable.")
@click.option("-m", "--message", default="", help="Why. Default: says what was reverted.")
@check_option
@force_option
@author_option
@repo_option
@json_option
@reports_errors
def revert(
    rev: str | None,
    subjects: tuple[str, ...],
    requests: tuple[str, ...],
    message: str,
    check: bool,
    force: bool,
    author: str | None,
    repo: Path | None,
    as_json: bool,
) -> None:
    """Take back what the commit REV changed, wherever it is in history, as a new commit.

    With --subject or --request, only those facts of it; without REV, those facts whichever commit wrote them.

    The weights are those of the facts that stay, solved anew from their recorded columns: no model runs. Where the
    remaining set of facts was seen before, they are that commit's weights bit for bit. Only a WISE shard that loses some of
    its facts is trained again, on the others.
    """
    from patchhub.porcelain.change import revert as run
    from patchhub.worktree.judging import Guarding

    repository = open_repository(repo)
    by, guarding = stamp(repository, author, message), Guarding(force, check)
    with bars() as progress:
        done = run(repository, rev, by, subjects=subjects, requests=requests, progress=progress, guarding=guarding)
    _report_change(repository, done, as_json)


@click.command("cherry-pick")
@click.argument("rev")
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
def cherry_pick(
    rev: str,
    on_conflict: Any,
    message: str,
    check: bool,
    force: bool,
    author: str | None,
    repo: Path | None,
    as_json: bool,
) -> None:
    """Do what the commit REV changed once more on the current branch, from its recorded columns: no model runs."""
    from patchhub.porcelain.change import cherry_pick as run
    from patchhub.worktree.judging import Guarding

    repository = open_repository(repo)
    by, guarding = stamp(repository, author, message), Guarding(force, check)
    with bars() as progress:
        done = run(repository, rev, by, on_conflict=on_conflict, progress=progress, guarding=guarding)
    _report_change(repository, done, as_json)


@click.command()
@author_option
@repo_option
@json_option
@reports_errors
def undo(author: str | None, repo: Path | None, as_json: bool) -> None:
    """Put every branch back to where it was before the last command; repeated, walk further back."""
    from patchhub.porcelain.refs import undo as run

    repository = open_repository(repo)
    _report_step(repository, run(repository, who=stamp(repository, author)), "undone", as_json)


@click.command()
@author_option
@repo_option
@json_option
@reports_errors
def redo(author: str | None, repo: Path | None, as_json: bool) -> None:
    """Reverse the last undo."""
    from patchhub.porcelain.refs import redo as run

    repository = open_repository(repo)
    _report_step(repository, run(repository, who=stamp(repository, author)), "done again", as_json)


def _report_step(repository: Store, operation: Operation, past: str, as_json: bool) -> None:
    branch, head = repository.head
    if as_json:
        changes = {ref: list(change) for ref, change in operation.changes.items()}
        print_json({"operation": operation.id, "changes": changes, "branch": branch, "head": head})
        return
    command = _reversed_command(repository, operation)
    moved = ", ".join(ref.removeprefix("refs/heads/").removeprefix("refs/remotes/") for ref in operation.changes)
    say(f"`{command}` {past}: {moved}")
    if command == "push" and past == "undone":
        say(
            "A push itself is not taken back: the remote has what it got; only the note of that here moved.",
            fg="yellow",
        )
    say(f"{branch or 'HEAD'} is at {head[:12] if head else 'the base'}")


def _reversed_command(repository: Store, operation: Operation) -> str:
    """The command whose effect an undo took away or a redo brought back."""
    commands = dict(repository.operations())
    target = commands[str(operation.undoes)]
    return target.command if target.undoes is None else _reversed_command(repository, target)


def _report_change(repository: Store, done: Changed, as_json: bool) -> None:
    if as_json:
        print_json(done.to_json())
        return
    branch, _ = repository.head
    commit = repository.commit(done.commit)
    say(f"[{branch or 'detached'} {done.commit[:12]}] {commit.message}")
    list_facts("-", done.removed, "red")
    list_facts("+", done.restored, "green")
    if done.skipped:
        say(f"{count(len(done.skipped), 'fact')} gone or there already, left alone", dim=True)
    if commit.set_digest == EMPTY_SET:
        say("the weights are the base's, bit for bit")
    elif done.same_as:
        say(f"the weights are those of {done.same_as[:12]}, bit for bit")
    elif commit.tensors is None:
        say("the main weights are as they were")
    else:
        say(f"solved anew; proof {done.proof:.1e} (relative residual of the joint solution)")
    say_trained(repository, done.trained)
    if done.stale:
        say(f"note: {count(done.stale, 'active fact')} recorded on a state that is no longer below", dim=True)
    say_stale_shards(len(done.stale_shards))


@click.command()
@click.option("--subject", required=True, help="Whose fact.")
@click.option("--target", required=True, help="What the model shall say now.")
@click.option("--prompt", help="Which of the subject's facts, where there are several.")
@click.option("-m", "--message", default="", help="Why. Default: the fact, its old target and the new one.")
@click.option("--method", help="The editor: memit (default) or pmet.")
@set_option
@strict_option
@all_option
@force_option
@author_option
@repo_option
@json_option
@reports_errors
def update(
    subject: str,
    target: str,
    prompt: str | None,
    message: str,
    method: str | None,
    overrides: tuple[str, ...],
    strict: bool,
    all_facts: bool,
    force: bool,
    author: str | None,
    repo: Path | None,
    as_json: bool,
) -> None:
    """Give one active fact another target: one commit that removes the old request and adds the new one."""
    from patchhub.porcelain.commit import update as run
    from patchhub.worktree.recording import read_overrides

    repository = open_repository(repo)
    method = method or str(repository.config.settings.get("method", "memit"))
    settings = read_overrides(overrides, method)
    by = stamp(repository, author, message)
    with bars() as progress:
        done = run(
            repository,
            subject,
            target,
            by,
            progress,
            prompt=prompt,
            method=method,
            settings=settings,
            strict=strict,
            force=force,
            all_facts=all_facts,
        )
    report_committed(repository, done, as_json)


COMMANDS = (
    commit,
    revert,
    cherry_pick,
    undo,
    redo,
    update,
)
