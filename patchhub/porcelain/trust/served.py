"""`verify-served`: whether a server answers with a revision's facts. It asks over the OpenAI-compatible interface; no model runs here.

vLLM, SGLang, TGI, llama.cpp, Ollama and LM Studio answer `/v1/completions` and `/v1/chat/completions` alike. A fact counts as said
where the greedy continuation of its prompt begins with its target. Facts that the commit was noted not to say are not asked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from patchhub.errors import RequestError
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
    """What the server continued a fact's prompt with, and whether that begins with the fact's target, or with what was true before."""

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
    name = model or server.first_model()
    progress.stage("asking", len(facts))
    answers = []
    for fact in facts:
        continuation = server.complete(name, fact.text, tokens=_TOKENS, chat=chat)
        answers.append(_judged(fact, continuation))
        progress.advance(1)
    progress.close()
    said = sum(answer.holds for answer in answers)
    verdict: Verdict = "on" if said >= _ENOUGH * len(answers) else "partly" if said else "off"
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


def _judged(fact: Request, continuation: str) -> Said:
    text = " ".join(continuation.split())
    before = fact.target_true
    return Said(
        fact.text, fact.target_new, text, text.startswith(fact.target_new), bool(before and text.startswith(before))
    )
