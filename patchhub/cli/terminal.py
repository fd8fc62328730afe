"""The terminal: options that every command has, the repository that is meant, what is printed, errors."""

from __future__ import annotations

import errno
import functools
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

from patchhub.canonical import UNSEEN
from patchhub.errors import PatchhubError, RepositoryError
from patchhub.progress import Bars
from patchhub.results import Result, Rows

if TYPE_CHECKING:
    from patchhub.objects import Request
    from patchhub.repository import Repository


Command = TypeVar("Command", bound=Callable[..., Any])

_UNSAFE = re.compile(f"\x1b\\[(?:[012]|3[1-6])m|(?![\n\t])([{UNSEEN}])")
"""Characters that a terminal would act upon, that turn the direction of text, or that cannot be written; the colours and weights of `say`
match whole."""

repo_option = click.option(
    "--repo",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder that holds the store, or the store itself. Default: found upward from here.",
)
author_option = click.option("--author", help='Who makes this change, "Ada <ada@example.org>".')
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of text.")

_NOT_ESCAPED_IN_JSON = re.compile(f"(?![\x00-\x1f])[{UNSEEN}]")


def opened(repo: Path | None) -> Repository:
    """The repository named by --repo (on the command or before it), or the one found upward from the working directory."""
    from patchhub.repository import Repository, open

    chosen = chosen_folder(repo)
    return open(Path.cwd(), progress=bars()) if chosen is None else Repository(chosen, progress=bars())


def chosen_folder(repo: Path | None) -> Path | None:
    """What --repo says, on the command or before it."""
    return repo or click.get_current_context().find_root().params.get("repo")


def bars() -> Bars:
    """Bars on stderr, where that is a terminal; warnings always."""
    return Bars(lambda message: talk(f"{click.style('warning:', fg='yellow')} {message}"))


def say(message: str = "", **style: Any) -> None:
    """One line of the result, to stdout."""
    with _to_stdout():
        click.secho(visible(message), **style)


def talk(message: str) -> None:
    """One line beside the result, to stderr."""
    click.echo(visible(message), err=True)


def visible(text: str) -> str:
    r"""`text` with control characters spelled out, such as ``\x1b``: stored texts may come from anyone.

    Line ends, tabs and the escapes that `click.style` makes here for colour, bold and dim stay as they are.
    """
    return _UNSAFE.sub(lambda found: _spelled(found[1]) if found[1] else found[0], text)


def _spelled(character: str) -> str:
    return f"\\x{ord(character):02x}" if ord(character) < 0x100 else f"\\u{ord(character):04x}"


def count(number: int, noun: str) -> str:
    """A number with its noun: 1 fact, 2 facts."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def list_facts(sign: str, requests: Sequence[Request], colour: str, *, shown: int = 8) -> None:
    """The first few facts, a line each, and how many more there are."""
    for request in requests[:shown]:
        say(f"  {click.style(sign, fg=colour)} {request.text} {click.style(request.target_new, bold=True)}")
    if len(requests) > shown:
        say(f"  {sign} ... and {len(requests) - shown} more", dim=True)


def say_stale_shards(number: int) -> None:
    """That thresholds were measured on other weights than there are now, if any were."""
    if number:
        say(
            f"note: the threshold of {count(number, 'shard')} is stale, since weights below changed; "
            "`patchhub refresh` measures it again",
            dim=True,
        )


def say_trained(repository: Repository, shards: Sequence[str]) -> None:
    """Which shards were trained again, and on how many facts."""
    for shard in shards:
        patch = repository.store.patch(shard)
        number, facts = patch.settings["number"], count(len(patch.requests), "fact")
        say(f"shard {number} ({shard[:12]}) was trained again, on the {facts} that it holds now")


def print_json(document: Any) -> None:
    """A document as JSON; a result or a list of results as the document that it is."""
    document = document.to_json() if isinstance(document, Result | Rows) else document
    text = json.dumps(document, ensure_ascii=False, indent=2, sort_keys=True)
    with _to_stdout():
        click.echo(_NOT_ESCAPED_IN_JSON.sub(lambda found: f"\\u{ord(found[0]):04x}", text))


@contextmanager
def _to_stdout() -> Iterator[None]:
    """Turn a failure to write to stdout into a `RepositoryError`; a closed pipe is left to click, which ends without a word.

    What could not be written goes nowhere afterwards, so that the interpreter does not try it again when it ends.
    """
    try:
        yield
    except OSError as error:
        if error.errno == errno.EPIPE:
            raise
        with open(os.devnull, "w", encoding="utf-8") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        raise RepositoryError(
            f"cannot write to the standard output: {error.strerror or error}",
            remedy="Free space there, or write elsewhere.",
            errno=error.errno,
        ) from error


def quiet_libraries() -> None:
    """Keep the model libraries' own bars and notices off the terminal; to be called before they are imported."""
    for name, value in (
        ("HF_HUB_DISABLE_PROGRESS_BARS", "1"),
        ("TOKENIZERS_PARALLELISM", "false"),
        ("TRANSFORMERS_VERBOSITY", "error"),
    ):
        os.environ.setdefault(name, value)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it notes every product that it casts


def reports_errors(command: Command) -> Command:
    """Print a PatchhubError as one line and its remedy, or as JSON under --json, and exit with its code."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except PatchhubError as error:
            if kwargs.get("as_json"):
                click.echo(json.dumps({"error": error_json(error)}, ensure_ascii=False), err=True)
            else:
                talk(f"{click.style('error:', fg='red', bold=True)} {error.message}")
                if error.remedy:
                    talk(f"  {_sentence(error.remedy)}")
            raise SystemExit(error.exit_code) from None
        except KeyboardInterrupt:
            talk("interrupted; the store is as it was")
            raise SystemExit(130) from None

    return cast(Command, wrapped)


def error_json(error: PatchhubError) -> Mapping[str, Any]:
    return {
        "kind": error.kind,
        "message": error.message,
        "remedy": error.remedy,
        "exit_code": error.exit_code,
        "facts": {key: value if _is_json(value) else str(value) for key, value in error.facts.items()},
    }


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")
