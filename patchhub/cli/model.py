"""Commands around the base model: demo, init, config, apply, ask.

`patchhub demo` is the whole life of an edit on the model that is built in, told as it happens."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import as_file, files
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, TextIO

import click

from patchhub.cli.options import (
    Revision,
    SettingKey,
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
    reports_errors,
    say,
    store_options,
)

if TYPE_CHECKING:
    from patchhub.objects import Request
    from patchhub.repository import Repository


_SHOWN = 6


def run(keep: Path | None) -> None:
    """init, commit, ask, apply, revert and verify; raises the verbs' own errors."""
    begun = perf_counter()
    with _folder(keep) as folder, as_file(files("patchhub") / "demo_model") as model:
        facts = Path(str(files("patchhub") / "demo_facts.json"))
        _story(folder, model, facts)
        say(f"\nDone in {perf_counter() - begun:.0f} s.", bold=True)
        if keep is not None:
            say(f"The store is {folder / '.patchhub'}; `cd {folder} && patchhub log` goes on from here.")
        say("Next: `patchhub init YOUR_MODEL` in a new folder, then `patchhub commit facts.jsonl -m TEXT`.")


def _story(folder: Path, model: Path, facts: Path) -> None:
    from patchhub.editing.requests import read_requests
    from patchhub.porcelain.model import differing_tensors
    from patchhub.repository import Repository

    _step("patchhub init demo_model", "The base: a small Llama that knows a thousand facts. It never changes.")
    with Repository.init(folder, model, progress=bars()) as repository:
        base: Any = repository.made
        say(f"  {base.tensors} tensors, {base.gigabytes * 1000:.1f} MB, identity {base.base[:12]}")

        requests = read_requests(facts).requests
        _step(f"patchhub commit {facts.name} -m 'An alternative world'", f"{len(requests)} facts become a patch.")
        made = repository.commit(facts, message="An alternative world")
        say(
            f"  commit {made.commit[:12]}: {made.held} of {len(made.written)} facts hold; its change takes {_size(repository)}"
        )

        _step("patchhub ask ...", "What the model said, and what it says now.")
        _compare(repository, requests)

        _step("patchhub apply HEAD --out patched", "An ordinary checkpoint, for any program.")
        applied = repository.apply("HEAD", out=folder / "patched")
        changed = differing_tensors(model, folder / "patched")
        expected = len(applied.survival)
        say(f"  {len(changed)} of {base.tensors} tensors differ from the base's, as they should: {expected}")

        _step("patchhub revert HEAD", "Take it back. No model runs; the weights are solved from what is recorded.")
        reverted = repository.revert("HEAD")
        repository.apply("HEAD", out=folder / "reverted")
        left = differing_tensors(model, folder / "reverted")
        verdict = f"{len(left)} tensors differ" if left else click.style("bit for bit the base", fg="green", bold=True)
        say(f"  commit {reverted.commit[:12]}: {base.tensors} tensors compared, {verdict}")

        _step("patchhub log", "Nothing is lost: both commits stay in history.")
        for entry in repository.log():
            identity = click.style(entry.id[:12], fg="yellow")
            say(f"  {identity} {entry.commit.message}  (+{entry.added} -{entry.removed})")


def _size(repository: Repository) -> str:
    delta = repository.status().delta_bytes
    return f"{delta / 1000:.0f} kB"


def _compare(repository: Repository, requests: Sequence[Request]) -> None:
    """The first facts as the base and HEAD answer them, and how many other phrasings and neighbours are right."""
    from patchhub.porcelain.model import score_facts

    then = [request.target_true or request.target_new for request in requests]
    before = score_facts(repository.store, requests, "base", then)
    after = score_facts(repository.store, requests, "HEAD", [request.target_new for request in requests])
    width = max(len(request.text) for request in requests[:_SHOWN])
    for request, old, new in zip(requests[:_SHOWN], before.answers, after.answers, strict=False):
        say(f"  {request.text:<{width}}  {click.style(old, fg='red')} -> {click.style(new, fg='green', bold=True)}")
    say(f"  other phrasings of the same facts: {after.paraphrases_right} of {after.paraphrases} follow")
    say(f"  neighbouring facts: {after.neighbors_right} of {after.neighbors} still right")


@contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep
    else:
        with tempfile.TemporaryDirectory(prefix="patchhub-demo-") as name:
            yield Path(name)


def _step(command: str, meaning: str) -> None:
    say()
    say(f"$ {command}", fg="cyan", bold=True)
    say(f"  {meaning}", dim=True)


@click.command()
@click.option("--keep", type=click.Path(path_type=Path, file_okay=False), help="Keep the demo's folder here.")
@reports_errors
def demo(keep: Path | None) -> None:
    """Edit, question, export and revert a small model that is built in. No network, under a minute."""

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
@click.argument("key", required=False, type=SettingKey())
@click.argument("value", required=False)
@click.option("--unset", is_flag=True, help="Go back to the default.")
@store_options
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
@store_options
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
@click.argument("prompt", nargs=-1)
@click.option("--file", type=click.File(encoding="utf-8"), help="Prompts, one a line; `-` is standard input.")
@click.option(
    "--rev", type=Revision(), multiple=True, help="Revision to ask; repeat to compare. Default: HEAD and base."
)
@base_option
@placement_options
@chat_option
@store_options
def ask(prompt: tuple[str, ...], file: TextIO | None, repo: Path | None, as_json: bool, **options: Any) -> None:
    """What the model says to PROMPT, at one revision beside another: likely next words and a short continuation.

    Several prompts, each in quotes, are asked one after the other; the model is loaded once.
    """
    if not (prompt or file):
        raise click.UsageError("Missing argument 'PROMPT', such as \"The capital of France is\".")
    if len(prompt) > 1 and all(one.isascii() and " " not in one.strip() for one in prompt):
        raise click.UsageError(
            f"these are {len(prompt)} prompts of one word each: put quotes around a sentence, or give words with --file."
        )
    prompts = (*prompt, *(line for line in file.read().splitlines() if line.strip())) if file else prompt
    answers = opened(repo).ask(prompts, **options)
    if as_json:
        print_json(answers)
        return
    width = max(18, *(len(answer.revision) + 10 for answer in answers))
    for answer in answers:
        say(f"{answer.revision} ({_name(answer.commit)})", bold=True)
        lines = answer.continuation.strip().splitlines() if answer.chat else answer.continuation.splitlines()
        said = click.style(lines[0] if lines else "", fg="green")
        say(f"  {answer.prompt} > {said}" if answer.chat else f"  {answer.prompt}{said}")
        for token, probability in answer.top:
            say(f"  {token!r:<{width}} {probability:6.1%} {'█' * round(probability * 30)}", dim=probability < 0.05)


def _name(commit: str | None) -> str:
    return f"commit {commit[:12]}" if commit else "the unpatched base"


COMMANDS = (demo, init, config, apply, ask)
