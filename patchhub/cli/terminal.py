"""The terminal and the environment: options that every command has, progress, errors, who is asking."""

from __future__ import annotations

import functools
import getpass
import json
import logging
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

from patchhub.errors import PatchhubError

if TYPE_CHECKING:
    from click._termui_impl import ProgressBar

    from patchhub.objects import Request
    from patchhub.porcelain.snapshot import Stamp
    from patchhub.store.repository import Repository

Command = TypeVar("Command", bound=Callable[..., Any])

repo_option = click.option(
    "--repo",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder that holds the store, or the store itself. Default: found upward from here.",
)
author_option = click.option("--author", help='Who makes this change, "Ada <ada@example.org>".')
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of text.")


def open_repository(repo: Path | None) -> Repository:
    """The store named by --repo (on the command or before it), or the one found upward from the working directory."""
    from patchhub.store.repository import DIRECTORY, Repository

    chosen = repo or click.get_current_context().find_root().params.get("repo")
    if chosen is not None:
        return Repository.open(chosen.parent if chosen.name == DIRECTORY else chosen)
    return Repository.discover(Path.cwd())


def now() -> str:
    """The present instant as the format writes it; SOURCE_DATE_EPOCH replaces it for reproducible runs."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    instant = datetime.fromtimestamp(int(epoch), timezone.utc) if epoch else datetime.now(timezone.utc)
    return instant.strftime("%Y-%m-%dT%H:%M:%SZ")


def author_of(settings: Mapping[str, Any], given: str | None) -> str:
    """--author, else the config's ``author``, else git's identity, else the login name."""
    login = getpass.getuser()
    return str(given or settings.get("author") or _git_identity() or f"{login} <{login}@{platform.node()}>")


def stamp(repository: Repository, author: str | None, message: str) -> Stamp:
    from patchhub.porcelain.snapshot import Stamp

    return Stamp(author_of(repository.config.settings, author), now(), message)


def _git_identity() -> str | None:
    found = []
    for key in ("user.name", "user.email"):
        try:
            result = subprocess.run(["git", "config", key], capture_output=True, text=True, check=False)
        except OSError:
            return None
        found.append(result.stdout.strip())
    return f"{found[0]} <{found[1]}>" if all(found) else None


def say(message: str = "", **style: Any) -> None:
    """One line of the result, to stdout."""
    click.secho(message, **style)


def talk(message: str) -> None:
    """One line beside the result, to stderr."""
    click.echo(message, err=True)


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
        patch = repository.patch(shard)
        number, facts = patch.settings["number"], count(len(patch.requests), "fact")
        say(f"shard {number} ({shard[:12]}) was trained again, on the {facts} that it holds now")


def print_json(document: Any) -> None:
    click.echo(json.dumps(document, ensure_ascii=False, indent=2, sort_keys=True))


class Bars:
    """Progress bars on stderr, only where that is a terminal; warnings always."""

    def __init__(self) -> None:
        self._bar: ProgressBar[int] | None = None
        self._quiet = not sys.stderr.isatty()

    def stage(self, label: str, total: int) -> None:
        self.close()
        if self._quiet:
            return
        if total:
            bar: ProgressBar[int] = click.progressbar(length=total, label=f"{label:>20}", file=sys.stderr, width=30)
            self._bar = bar.__enter__()
        else:
            talk(f"{label:>20} ...")

    def advance(self, amount: int) -> None:
        if self._bar is not None:
            self._bar.update(amount)

    def warn(self, message: str) -> None:
        self.close()
        talk(f"{click.style('warning:', fg='yellow')} {message}")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.__exit__(None, None, None)
            self._bar = None


def quiet_libraries() -> None:
    """Keep the model libraries' own bars and notices off the terminal; to be called before they are imported."""
    for name, value in (
        ("HF_HUB_DISABLE_PROGRESS_BARS", "1"),
        ("TOKENIZERS_PARALLELISM", "false"),
        ("TRANSFORMERS_VERBOSITY", "error"),
    ):
        os.environ.setdefault(name, value)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it notes every product that it casts


@contextmanager
def bars() -> Iterator[Bars]:
    """Progress bars that end with the block, whatever ends it."""
    progress = Bars()
    try:
        yield progress
    finally:
        progress.close()


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
