"""Commands around the base model: demo, init, config, apply, ask."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from patchhub.cli.options import (
    Revision,
    base_option,
    chat_option,
    placement_options,
)
from patchhub.cli.terminal import (
    author_option,
    bars,
    chosen_folder,
    count,
    json_option,
    opened,
    print_json,
    repo_option,
    reports_errors,
    say,
)


@click.command()
@click.option("--keep", type=click.Path(path_type=Path, file_okay=False), help="Keep the demo's folder here.")
@reports_errors
def demo(keep: Path | None) -> None:
    """Edit, question, export and revert a small model that is built in. No network, under a minute."""
    from patchhub.cli.demo import run

    run(keep)


@click.command()
@click.argument("base")
@click.option("--revision", help="Branch, tag or commit of a model on the Hub.")
@click.option(
    "--experts",
    type=click.Choice(["routed", "shared"]),
    help="Which experts facts are written into, where a shared one stands beside the routed ones. Default: routed.",
)
@click.option("--shared", is_flag=True, help="Let the group of the folder write in the store, whatever their umask.")
@click.option("--name", help="What a base in a folder is called on the Hub, org/model: adapters and the card name it.")
@author_option
@click.option(
    "--repo",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder to make the store in. Default: this one.",
)
@json_option
@reports_errors
def init(base: str, repo: Path | None, as_json: bool, **options: Any) -> None:
    """Start a store in ./.patchhub for BASE, a model folder or a Hub id.

    Reads every byte of the base once, to know it again later. The base is never changed.
    """
    from patchhub.repository import Repository

    done: Any = Repository.init(chosen_folder(repo) or Path(), base, progress=bars(), **options).made
    if as_json:
        print_json(done)
        return
    say(f"Initialised {done.store} for {done.model_type} with {done.layers} layers")
    say(
        f"base {done.base[:12]}: {done.tensors} tensors, {done.gigabytes * 1000:,.1f} MB, read in {done.seconds:.1f} s",
        dim=True,
    )


@click.command(context_settings={"ignore_unknown_options": True})  # a value may begin with a minus
@click.argument("key", required=False)
@click.argument("value", required=False)
@click.option("--unset", is_flag=True, help="Go back to the default.")
@repo_option
@json_option
@reports_errors
def config(key: str | None, value: str | None, unset: bool, repo: Path | None, as_json: bool) -> None:
    """Show all settings, show one, or set one.

    \b
      patchhub config author "Ada <ada@example.org>"
      patchhub config memit.layers 3-5
    """
    from patchhub.sets.settings import APPROVALS, SETTINGS

    found = opened(repo).config(key, value, unset=unset)
    values = found if key is None else {key: found}
    if as_json:
        print_json(values)
        return
    for name, found in values.items():
        say(f"{name} = {'(default)' if found is None else found}")
    if key is None:
        unset_keys = [name for name in SETTINGS if name not in values]
        for name in unset_keys:
            say(f"{name:20} {SETTINGS[name].purpose}", dim=True)
        say(f"policy.BRANCH.approvals  {APPROVALS.purpose}", dim=True)


@click.command()
@click.argument("rev", type=Revision())
@click.option("--out", required=True, type=click.Path(path_type=Path, file_okay=False), help="Folder to write.")
@base_option
@click.option("--overwrite", is_flag=True, help="Replace an existing folder.")
@click.option("--link/--no-link", default=True, help="Hard-link untouched weight files (default), or copy them.")
@click.option("--wise", type=click.Choice(["retrieve", "merge"]), help="How loading routes to shards. Default: config.")
@repo_option
@json_option
@reports_errors
def apply(repo: Path | None, as_json: bool, **options: Any) -> None:
    """Write the model at REV as an ordinary checkpoint folder.

    Weights are streamed one tensor at a time; names, types and files are the base's. Weight files that the patch does
    not touch are hard links to the base's where the file system allows it: do not write into them (--no-link copies).

    WISE shards are written beside the weights. `patchhub.load` of the folder routes queries to them; other loaders know
    nothing of them and give the main weights alone.
    """
    done = opened(repo).apply(**options)
    if as_json:
        print_json(done)
        return
    say(f"Wrote {done.out} ({_name(done.commit)}, {count(len(done.survival), 'weight')} changed)")
    for weight, share in sorted(done.survival.items()):
        say(f"  {weight}  {share:.1%} of the change kept by the cast", dim=True)
    if done.shards:
        beside = f"{count(done.shards, 'shard')} beside the weights"
        say(f"{beside}: load the folder with patchhub.load; other loaders give the main weights alone", fg="yellow")


@click.command()
@click.argument("prompt")
@click.option(
    "--rev", type=Revision(), multiple=True, help="Revision to ask; repeat to compare. Default: HEAD and base."
)
@base_option
@placement_options
@chat_option
@repo_option
@json_option
@reports_errors
def ask(prompt: str, repo: Path | None, as_json: bool, **options: Any) -> None:
    """What the model says to PROMPT, at one revision beside another: likely next words and a short continuation."""
    answers = opened(repo).ask(prompt, **options)
    if as_json:
        print_json(answers)
        return
    width = max(18, *(len(answer.revision) + 10 for answer in answers))
    for answer in answers:
        say(f"{answer.revision} ({_name(answer.commit)})", bold=True)
        say(f"  {prompt}{click.style(answer.continuation.splitlines()[0] if answer.continuation else '', fg='green')}")
        for token, probability in answer.top:
            say(f"  {token!r:<{width}} {probability:6.1%} {'█' * round(probability * 30)}", dim=probability < 0.05)


def _name(commit: str | None) -> str:
    return f"commit {commit[:12]}" if commit else "the unpatched base"


COMMANDS = (demo, init, config, apply, ask)
