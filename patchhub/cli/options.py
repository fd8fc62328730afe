"""Options that several commands share: where the base is put, and how a change is guarded."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from patchhub.cli.terminal import count
from patchhub.evaluation.guard import Measured, Report, Share

Command = TypeVar("Command", bound=Callable[..., Any])

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kKMGT]?i?B)?")
_UNITS = {"B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KiB": 1 << 10, "kiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}


class Size(click.ParamType[int]):
    """Bytes from ``4GB``, ``800MB``, ``3.5GiB``; a number alone is in gigabytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        found = _SIZE.fullmatch(str(value).strip())
        if found is None or not (size := int(float(found[1]) * _UNITS.get(found[2] or "GB", 0))):
            self.fail(f"{value!r} is not a size; write 4GB, 800MB or 3.5GiB", param, ctx)
        return size


class FactsFile(click.ParamType[Any]):
    """A file of facts; ``-`` is standard input."""

    name = "file"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return sys.stdin.buffer if value == "-" else Path(value)


def memory_option(purpose: str) -> Callable[[Command], Command]:
    """``--memory``: how much a command may take, in bytes; None where it is not given."""
    return click.option("--memory", type=Size(), metavar="SIZE", help=f"{purpose}, such as 8GB.")


metrics_option = click.option(
    "--metrics",
    type=click.Choice(["auto", "counterfact", "zsre", "wise"]),
    default="auto",
    show_default=True,
    help="Whose scores; auto: zsRE's for a file of its records, else CounterFact's.",
)
limit_option = click.option(
    "--limit", type=click.IntRange(min=1), help="At most so many facts: the first ones, or with --seed a sample."
)
seed_option = click.option(
    "--seed", type=click.IntRange(min=0), help="Of the sample, of sampled text and of the intervals."
)
format_option = click.option("--format", type=click.Choice(["jsonl", "json", "csv"]), help="How to read FILE.")
text_option = click.option(
    "--text", multiple=True, type=click.Path(path_type=Path), help="Text for the metric (first commit only)."
)
base_option = click.option("--base", help="Where the base model is, if it moved.")
chat_option = click.option(
    "--chat/--no-chat", default=None, help="Read prompts as the user's messages of the base's chat template."
)


def placement_options(command: Command) -> Command:
    """``--device``, ``--dtype`` and ``--quantization``; without them the repository's config decides."""
    options: tuple[Any, ...] = (
        click.option("--device", help="auto (a GPU if there is one), spread (over all GPUs), cpu, cuda:0, ..."),
        click.option(
            "--dtype",
            type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
            help="Type of the base in memory. auto: float32 where that takes half of the memory at most, else its own.",
        ),
        click.option(
            "--quantization",
            type=click.Choice(["none", "8bit", "4bit"]),
            help="Quantise the base in memory; changes run beside its weights in float32.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


force_option = click.option(
    "--force", is_flag=True, help="Write what the guard refuses all the same; the commit says so."
)
check_option = click.option(
    "--check", is_flag=True, help="Let the guard run the model too: whether facts hold, whether other text drifts."
)


def guard_summary(check: Mapping[str, Any]) -> str:
    """One line on what the guard found when a commit was made; empty where it was not asked."""
    report = Report.from_json(check)
    if report is None:
        return ""
    if report.failed:
        return click.style(f"forced although {'; '.join(report.failed)}", fg="red")
    return ", ".join(["passed", *_short(report.measured)])


def guard_lines(check: Mapping[str, Any]) -> Iterator[str]:
    """All that the guard measured, a sentence each; nothing where it was not asked."""
    report = Report.from_json(check)
    if report is None:
        return
    for failed in report.failed:
        yield click.style(f"guard: forced although {failed}", fg="red")
    if not report.failed:
        yield "guard: passed" + (" (--force was given)" if report.forced else "")
    yield from (f"  {words}" for words in (*_facts(report.measured), *_weights(report.measured)))


def _short(found: Measured) -> Iterator[str]:
    if found.own and found.own.of:
        yield f"{found.own.count}/{found.own.of} new facts hold"
    if found.earlier and found.earlier.of:
        yield f"{found.earlier.count}/{found.earlier.of} earlier ones lost"
    if found.drift:
        yield f"drift {found.drift.kl:.3f}"


def _facts(found: Measured) -> Iterator[str]:
    if found.own and found.own.of:
        yield f"{_of(found.own, 'new fact')} {_verb(found.own, 'is', 'are')} the model's answer"
    if found.earlier and found.earlier.of:
        lost = f"that {_verb(found.earlier, 'was read and held is', 'were read and held are')} lost"
        yield f"{_of(found.earlier, 'earlier fact')} {lost} ({found.active} active)"
    if found.drift:
        guessing = "; the base itself is guessing, so this is not judged" if found.drift.guessing else ""
        yield (
            f"drift from the base on held text {found.drift.kl:.3f} nats per token ({found.drift.kl_before:.3f} before), perplexity "
            f"times {found.drift.perplexity_ratio:.3f}, over {found.drift.positions} tokens{guessing}"
        )
    if found.unmet and found.unmet.of:
        gets = _verb(found.unmet, "gets less than half of its", "get less than half of their")
        yield f"{_of(found.unmet, 'new or contradicted fact')} {gets} change"
    if found.crushed and found.crushed.of:
        gets = _verb(found.crushed, "gets less than half of what it asks for", "get less than half of theirs")
        yield f"{_of(found.crushed, 'other fact')} now {gets}"
    if found.first_token:
        yield f"{found.first_token} of the subjects end at the first token, where the keys of all texts are alike"


def _of(share: Share, noun: str) -> str:
    return f"{share.count} of {count(share.of, noun)}"


def _verb(share: Share, one: str, many: str) -> str:
    return one if share.of == 1 else many


def _weights(found: Measured) -> Iterator[str]:
    if found.spectrum:
        largest = max(values["state"] / (values["base"] or 1.0) for values in found.spectrum.values())
        yield f"largest singular value of a weight's change: {largest:.2f} times the base weight's"
    if found.survival:
        yield f"rounding to the base's type keeps at least {min(found.survival.values()):.1%} of the change"
