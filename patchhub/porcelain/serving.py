"""What servers are given and asked: the adapter of a name that a server was asked for, and `verify-served`. No model runs here.

A server is asked over the OpenAI-compatible interface: vLLM, SGLang, TGI, llama.cpp, Ollama and LM Studio answer `/v1/completions` and
`/v1/chat/completions` alike. A fact counts as said where the greedy continuation of its prompt begins with its target, in a
chat where the answer says it. Facts that the commit was noted not to say are not asked."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from patchhub.errors import RepositoryError, RequestError, UnsupportedModelError
from patchhub.evaluation.guard import Report
from patchhub.evaluation.judge import Server, root_of
from patchhub.objects import Request
from patchhub.progress import Progress
from patchhub.results import Result
from patchhub.sets.elements import active_requests, distinct
from patchhub.store.store import Store

Verdict = Literal["on", "off", "partly"]

_TOKENS: Final = 24  # a target of a few words, and what follows it
_ENOUGH: Final = 0.8  # share of the facts that are said where a revision is on


@dataclass(frozen=True)
class Said(Result):
    """What the server wrote after the prompt of a fact, and whether that says the target, or what was true before."""

    prompt: str
    target: str
    continuation: str
    holds: bool
    as_before: bool


@dataclass(frozen=True)
class Served(Result):
    """Whether a server answers as a revision does.

    Attributes:
        verdict: ``on`` where at least 8 in 10 facts are said, ``off`` where none is, else ``partly``.
        model: the name that was asked.
        commit: the revision.
        answers: of each fact that was asked.
    """

    verdict: Verdict
    url: str
    model: str
    commit: str
    answers: tuple[Said, ...]

    @property
    def said(self) -> int:
        """How many facts are said."""
        return sum(answer.holds for answer in self.answers)

    def words(self) -> str:
        return f"{self.model} at {self.url}: {self.verdict}, {self.said} of {len(self.answers)} facts are said"


def verify_served(
    repository: Store,
    url: str,
    progress: Progress,
    *,
    revision: str = "HEAD",
    model: str | None = None,
    limit: int = 8,
    chat: bool = False,
) -> Served:
    """Ask a server a few facts of a revision.

    Args:
        url: where the interface begins, such as ``http://localhost:8000`` or ``http://localhost:8000/v1``.
        model: the name of the model or adapter there; None: the only one, or the first.
        limit: at most so many facts, spread over all that are active.
        chat: ask as a user's message, not as a text to continue.

    Raises:
        SettingsError: ``url`` is no http address.
        RequestError: the revision holds no fact whose text is here.
        RemoteError: the server cannot be reached, or its answers are of another form.
    """
    server = Server(root_of(url))
    commit = repository.resolve(revision)
    facts = _facts(repository, commit, limit)
    if commit is None or not facts:
        raise RequestError(
            f"{revision} holds no fact that could be asked", remedy="Name a revision with facts by --rev."
        )
    name, fields = model or server.first_model(), server.unremembering()
    progress.stage("asking", len(facts))
    answers = []
    for fact in facts:
        continuation = server.complete(name, fact.text, tokens=_TOKENS, chat=chat, fields=fields)
        answers.append(_judged(fact, continuation, chat=chat))
        progress.advance(1)
    progress.close()
    held = sum(answer.holds for answer in answers)
    verdict: Verdict = "on" if held >= _ENOUGH * len(answers) else "partly" if held else "off"
    return Served(verdict, server.root, name, commit, tuple(answers))


def _facts(repository: Store, commit: str | None, limit: int) -> list[Request]:
    """Facts that the model at a commit says by itself as far as is known, spread over all of them."""
    active = distinct(active_requests(repository, repository.active(commit)))
    report = Report.from_json(repository.commit(commit).check) if commit else None
    spoken = report.measured.spoken if report else None
    unsaid = {fault.request for fault in spoken.faults if fault.why == "not said"} if spoken else set()
    known = [fact for fact in active if fact.id not in unsaid] or list(active)
    step = max(1, len(known) // limit)
    return known[::step][:limit]


def _judged(fact: Request, continuation: str, *, chat: bool) -> Said:
    """In a chat the target may stand anywhere in the answer, which keeps the base's own words before it."""
    from patchhub.evaluation.spoken import said  # with torch, which an address that nobody answers at does not need

    text = " ".join(continuation.split())
    before = fact.target_true
    holds, as_before = (
        bool(target) and said(text, target, anywhere=chat) for target in (fact.target_new, before or "")
    )
    return Said(fact.text, fact.target_new, text, holds, as_before)


@dataclass(frozen=True)
class Named:
    """A name that a server is asked for, ``user/facts@v1.2`` or ``/srv/facts@main``: where the facts are, and their revision."""

    place: str
    revision: str

    @classmethod
    def parse(cls, name: str, allowed: Collection[str]) -> Named | None:
        """None where the place is none of those that are allowed.

        Args:
            allowed: ids on the Hub, and folders.
        """
        place, _, revision = name.rpartition("@") if "@" in name else (name, "", "")
        kept = place.removeprefix("hf://")
        if kept not in allowed:
            absolute = str(Path(place).resolve()) if place.startswith("/") else None
            if absolute is None or absolute not in {
                str(Path(entry).resolve()) for entry in allowed if entry[:1] == "/"
            }:
                return None
            kept = absolute
        return cls(kept, revision or "HEAD")


@dataclass(frozen=True)
class ServedAdapter:
    """An adapter in a folder: of which commit, its rank, and its relative error against the state."""

    folder: Path
    commit: str
    rank: int
    error: float


def served_adapter(named: Named, base: str, cache: Path, *, max_rank: int | None = None) -> ServedAdapter:
    """Fetch a revision, prove that its weights are those of its facts, check that the base is its base, and write its PEFT adapter.

    Args:
        base: the model that the server serves: a folder, or an id on the Hub.
        cache: the adapter is written below it, in a folder named after the commit.
        max_rank: the highest rank that the server takes; None: any that servers know.

    Raises:
        RepositoryError: the revision changes nothing, or no adapter of a rank that the server takes is near enough to it.
        UnsupportedModelError: it is one that servers serve wrongly or not at all as an adapter: side memories, routed experts.
        RevisionError, RemoteError, CorruptStoreError, BaseError: as in `patchhub.load`.
    """
    from patchhub.export.peft import BaseName, adapter_files, make_adapter
    from patchhub.fsio import os_errors, write_atomically
    from patchhub.models.checkpoint import open_checkpoint
    from patchhub.models.fingerprint import check_tensors
    from patchhub.porcelain.exchange import TOLERANCE
    from patchhub.remotes.card import adapter_name
    from patchhub.worktree.loading import open_state

    state = open_state(named.place, named.revision, base=base)
    if state.commit is None or (not state.weights and not state.routing.memories):
        raise RepositoryError(f"{named.revision} of {named.place} changes nothing", remedy=f"Ask for {base} itself.")
    if state.routing.memories:
        raise UnsupportedModelError(
            f"{named.revision} of {named.place} routes queries to a side memory, which no LoRA adapter can do",
            remedy=_LOAD,
        )
    checkpoint = open_checkpoint(base)
    check_tensors(state.base, checkpoint, state.weights)
    if state.stored.keys() & state.weights.keys():
        raise UnsupportedModelError(
            f"{named.revision} of {named.place} changes routed experts, and servers leave such adapters out without a word",
            remedy="Serve what `patchhub apply` writes.",
        )
    shapes = {weight: deltas[0].shape for weight, deltas in state.weights.items()}
    adapter = make_adapter(state.weights, shapes, tolerance=TOLERANCE)
    if max_rank is not None and adapter.rank > max_rank:
        raise RepositoryError(
            f"the adapter of {named.revision} of {named.place} has rank {adapter.rank}, and the server takes {max_rank}",
            remedy=f"Start it with --max-lora-rank {adapter.rank}, or serve what `patchhub apply` writes.",
            rank=adapter.rank,
        )
    name = BaseName(base, None, fan_in_fan_out=state.orientation == "in_out")
    folder = cache / "served" / adapter_name(named.place, state.commit)
    with os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for file, data in adapter_files(adapter, name).items():
        write_atomically(folder / file, (data,))
    return ServedAdapter(folder, state.commit, adapter.rank, adapter.error)


_LOAD: Final = "Load it with patchhub.load in a server of your own."
