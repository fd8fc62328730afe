"""Commands of what other programs read and write: export, verify-served, import, report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from patchhub.cli.options import (
    Revision,
    allowed_option,
    base_option,
    check_option,
    force_option,
    key_option,
    sign_option,
)
from patchhub.cli.terminal import (
    Group,
    author_option,
    count,
    opened,
    print_json,
    say,
    store_options,
    together,
)
from patchhub.errors import ServedError

if TYPE_CHECKING:
    pass


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


COMMANDS = (export, verify_served, import_, report)
