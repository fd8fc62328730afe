"""`patchhub demo`: the whole life of an edit on the model that is built in, told as it happens."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import as_file, files
from pathlib import Path
from time import perf_counter
from typing import Any

import click

from patchhub.cli.terminal import author_of, now, say

_SHOWN = 6


def run(keep: Path | None, progress: Any) -> None:
    """init, commit, ask, apply, revert and verify; raises the verbs' own errors."""
    begun = perf_counter()
    with _folder(keep) as folder, as_file(files("patchhub") / "demo_model") as model:
        facts = Path(str(files("patchhub") / "demo_facts.json"))
        _story(folder, model, facts, progress)
        say(f"\nDone in {perf_counter() - begun:.0f} s.", bold=True)
        if keep is not None:
            say(f"The store is {folder / '.patchhub'}; `cd {folder} && patchhub log` goes on from here.")
        say("Next: `patchhub init YOUR_MODEL` in a new folder, then `patchhub commit facts.jsonl -m TEXT`.")


def _story(folder: Path, model: Path, facts: Path, progress: Any) -> None:
    from patchhub.editing.requests import read_requests
    from patchhub.porcelain.change import revert
    from patchhub.porcelain.commit import commit
    from patchhub.porcelain.model import apply, differing_tensors, init, score_facts
    from patchhub.store.store import Store
    from patchhub.who import Who

    author = author_of({}, None)
    batch = read_requests(facts)

    _step("patchhub init demo_model", "The base: a small Llama that knows a thousand facts. It never changes.")
    done = init(folder, str(model), progress, who=Who(author, now()))
    say(f"  {done.tensors} tensors, {done.gigabytes * 1000:.1f} MB, identity {done.base[:12]}")

    with Store.open(folder) as repository:
        _step(f"patchhub commit {facts.name} -m 'An alternative world'", f"{len(batch.requests)} facts become a patch.")
        made = commit(repository, batch, Who(author, now(), "An alternative world"), progress)
        size = sum(repository.objects.path(blob).stat().st_size for blob in repository.state(made.commit))
        say(
            f"  commit {made.commit[:12]}: {made.held} of {len(made.written)} facts hold; {size / 1000:.0f} kB of deltas"
        )

        _step("patchhub ask ...", "What the model said, and what it says now.")
        facts_now = [request.target_new for request in batch.requests]
        facts_then = [request.target_true or request.target_new for request in batch.requests]
        before = score_facts(repository, batch.requests, "base", facts_then)
        after = score_facts(repository, batch.requests, "HEAD", facts_now)
        width = max(len(request.text) for request in batch.requests[:_SHOWN])
        for request, old, new in zip(batch.requests[:_SHOWN], before.answers, after.answers, strict=False):
            say(f"  {request.text:<{width}}  {click.style(old, fg='red')} -> {click.style(new, fg='green', bold=True)}")
        say(f"  other phrasings of the same facts: {after.paraphrases_right} of {after.paraphrases} follow")
        say(f"  neighbouring facts: {after.neighbors_right} of {after.neighbors} still right")

        _step("patchhub apply HEAD --out patched", "An ordinary checkpoint, for any program.")
        applied = apply(repository, "HEAD", folder / "patched", progress)
        changed = differing_tensors(model, folder / "patched")
        say(
            f"  {len(changed)} of {done.tensors} tensors differ from the base's, as they should: {len(applied.survival)}"
        )

        _step("patchhub revert HEAD", "Take it back. No model runs; the weights are solved from what is recorded.")
        reverted = revert(repository, "HEAD", Who(author, now(), ""))
        apply(repository, "HEAD", folder / "reverted", progress)
        left = differing_tensors(model, folder / "reverted")
        verdict = (
            click.style("bit for bit the base", fg="green", bold=True) if not left else f"{len(left)} tensors differ"
        )
        say(f"  commit {reverted.commit[:12]}: {done.tensors} tensors compared, {verdict}")

        _step("patchhub log", "Nothing is lost: both commits stay in history.")
        for identity, entry in repository.log(reverted.commit):
            say(
                f"  {click.style(identity[:12], fg='yellow')} {entry.message}  (+{len(entry.added)} -{len(entry.removed)})"
            )


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
