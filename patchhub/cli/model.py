"""Commands around the base model, and what other programs read and write: demo, init, config, apply, ask, import, export, report.

`patchhub demo` is the whole life of an edit on the model that is built in, told as it happens."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import as_file, files
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, TextIO

import click

from patchhub.cli.options import (
    Revision,
    SettingKey,
    allowed_option,
    base_option,
    chat_option,
    check_option,
    force_option,
    key_option,
    placement_options,
    sign_option,
)
from patchhub.cli.terminal import (
    Group,
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
    together,
)
from patchhub.errors import ServedError

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


out_option = click.option("--out", required=True, type=click.Path(path_type=Path), help="Where to write.")
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace what is there.")

rank_options = together(
    click.option(
        "--rank", type=click.IntRange(min=1), help="Rank of the adapter. Default: the smallest that is exact."
    ),
    click.option(
        "--tolerance",
        type=click.FloatRange(min=0),
        default=1e-6,
        show_default=True,
        help="Largest relative error of a weight.",
    ),
)

_LEFT_SHOWN = 8


@click.group("export", cls=Group)
def export() -> None:
    """Write a revision in a form that other programs read."""


def _exports(name: str, *options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A command of `export`: a revision, where it is written, further options, and those of every command."""
    revision = click.argument("rev", default="HEAD", type=Revision())
    return together(export.command(name), revision, out_option, *options, overwrite_option, store_options)


@_exports(
    "peft",
    rank_options,
    click.option("--every-layer", is_flag=True, help="Zeros for layers that do not change, as TGI and LoRAX expect."),
)
def export_peft(repo: Path | None, as_json: bool, **options: Any) -> None:
    """A LoRA adapter for PEFT, vLLM, SGLang and llama.cpp, in a folder of OUT named after the commit.

    All modules have one rank and scale 1, the only form that all of these read alike. It is read back and compared.
    """
    done = opened(repo).export_peft(**options)
    if as_json:
        print_json(done)
    else:
        say(f"Wrote {done.out}: rank {done.rank}, relative error {done.error:.1e}")


@_exports(
    "gguf",
    rank_options,
    click.option(
        "--fuse",
        metavar="BASE.gguf",
        type=click.Path(path_type=Path, exists=True, dir_okay=False),
        help="Write the whole model: this GGUF of the base with the change in it.",
    ),
)
def export_gguf(repo: Path | None, as_json: bool, **options: Any) -> None:
    """An adapter for llama.cpp and Ollama: a GGUF file in the folder OUT, named after the commit, and a Modelfile.

    It fits any GGUF of the base, quantised ones too. With --fuse the file is the whole model: tokenizer, settings and every other
    weight are copied from a GGUF of the base. Either is read back and compared.
    """
    done = opened(repo).export_gguf(**options)
    if as_json:
        print_json(done)
    else:
        what = "the whole model" if done.rank is None else f"rank {done.rank}"
        say(f"Wrote {done.out}: {what}, relative error {done.error:.1e}")
        say(f"  llama-server -m {done.out if done.rank is None else f'BASE.gguf --lora {done.out}'}", dim=True)


@click.command("verify-served")
@click.argument("url")
@click.option("--rev", type=Revision(), default="HEAD", show_default=True, help="The revision that should be on.")
@click.option("--model", help="The name of the model or adapter there. Default: the first that the server names.")
@click.option("-n", "--limit", type=click.IntRange(min=1), default=8, show_default=True, help="At most so many facts.")
@click.option("--chat", is_flag=True, help="Ask as a user's message, not as a text to continue.")
@store_options
def verify_served(repo: Path | None, as_json: bool, **options: Any) -> None:
    """Ask a server whether it answers with a revision's facts. It must be OpenAI-compatible: vLLM, SGLang, llama.cpp, Ollama, ...

    Exit code 13 says that it does not, or not with all of them.
    """
    found = opened(repo).verify_served(**options)
    if as_json:
        print_json(found)
    else:
        for answer in found.answers:
            mark = click.style("said    ", fg="green") if answer.holds else click.style("not said", fg="red")
            say(f"  {mark} {answer.prompt} {click.style(answer.continuation, dim=True)}")
        colour = {"on": "green", "off": "red"}.get(found.verdict, "yellow")
        told = f"{found.said} of {count(len(found.answers), 'fact')} {'is' if found.said == 1 else 'are'} said"
        say(
            f"{options['rev']} is {click.style(found.verdict, fg=colour, bold=True)} at {found.url} ({found.model}): {told}"
        )
    if found.verdict != "on":
        raise SystemExit(ServedError.exit_code)


@_exports("diff")
def export_diff(repo: Path | None, as_json: bool, **options: Any) -> None:
    """The change of each weight alone, as one safetensors file OUT (docs/format.md, "delta")."""
    done = opened(repo).export_diff(**options)
    if as_json:
        print_json(done)
    else:
        say(f"Wrote {done.out}")


@_exports(
    "checkpoint",
    base_option,
)
def export_checkpoint(repo: Path | None, as_json: bool, **options: Any) -> None:
    """The whole model with the change fused in, as `patchhub apply` writes it."""
    done = opened(repo).export_checkpoint(**options)
    if as_json:
        print_json(done)
    else:
        say(f"Wrote {done.out}, {count(len(done.survival), 'weight')} changed")


@_exports(
    "bom",
    allowed_option,
)
def export_bom(repo: Path | None, as_json: bool, **options: Any) -> None:
    """A CycloneDX 1.6 ML-BOM: the base with its hashes, the pedigree with a patch for each commit and its facts, scores."""
    done = opened(repo).export_bom(**options)
    if as_json:
        print_json(done)
    else:
        say(f"Wrote {done.out}: {count(done.count, 'commit')} on the base")


@_exports(
    "attestations",
    sign_option,
    key_option,
)
def export_attestations(repo: Path | None, as_json: bool, **options: Any) -> None:
    """The scores that are noted about REV as in-toto Statements, one a line; with a key, each in a signed DSSE envelope."""
    done = opened(repo).export_attestations(**options)
    if as_json:
        print_json(done)
    else:
        say(f"Wrote {done.out}: {count(done.count, 'statement')}, {'signed' if done.signed else 'not signed'}")


@click.command("import")
@click.argument("source", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("-m", "--message", help="What it is. Default: where it came from.")
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0, max=1),
    default=1e-6,
    show_default=True,
    help="Relative error up to which a difference of checkpoints is taken as low rank.",
)
@base_option
@check_option
@force_option
@author_option
@store_options
def import_(repo: Path | None, as_json: bool, **options: Any) -> None:
    """Commit the change that SOURCE makes to the base: a folder with a PEFT LoRA adapter, or a fine-tuned checkpoint.

    Only linear weights of the blocks may differ from the base. Pickled files are never opened.
    """
    done = opened(repo).import_(**options)
    if as_json:
        print_json(done)
        return
    say(f"Committed {click.style(done.commit[:12], fg='yellow')}")
    listed = list(done.weights.items())
    for weight, (form, error) in listed[:_LEFT_SHOWN]:
        say(f"  {weight}  {form}, {f'relative error {error:.1e}' if error else 'exact'}", dim=True)
    if len(listed) > _LEFT_SHOWN:
        say(f"  ... and {count(len(listed) - _LEFT_SHOWN, 'weight')} more (--json lists them)", dim=True)


@click.command()
@click.argument("rev", default="HEAD", type=Revision())
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The HTML file to write.")
@click.option(
    "--compare",
    type=click.IntRange(min=0),
    default=1000,
    show_default=True,
    help="Compare so many active facts with one another, the last changed ones.",
)
@click.option("--overwrite", is_flag=True, help="Replace what is there, even if it is no report.")
@store_options
def report(repo: Path | None, as_json: bool, **options: Any) -> None:
    """One HTML page about the repository: history, facts with search, scores, norms, interference.

    The page is one file that loads nothing; a phone can read it. A fact counts as active where REV holds it. No model runs.
    """
    done = opened(repo).report(**options)
    if as_json:
        print_json(done)
    else:
        counts = f"{count(len(done.report.commits), 'commit')}, {count(len(done.report.facts), 'fact')}"
        say(f"Wrote {done.out}: {counts}, {done.size / 1000:,.0f} kB")


COMMANDS = (
    demo,
    init,
    config,
    apply,
    ask,
    export,
    verify_served,
    import_,
    report,
)
