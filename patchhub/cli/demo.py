"""`patchhub demo`: the whole life of an edit on the model that is built in, told as it happens."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import as_file, files
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import click

from patchhub.cli.terminal import bars, say

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
            f"  commit {made.commit[:12]}: {made.held} of {len(made.written)} facts hold; {_size(repository)} of deltas"
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
