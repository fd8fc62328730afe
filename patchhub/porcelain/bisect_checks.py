"""The checks of `bisect`: a program on the applied checkpoint, or a measurement on one model that is switched."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from patchhub.errors import RequestError, SettingsError
from patchhub.objects import Request
from patchhub.porcelain.bisect import Check, Outcome
from patchhub.porcelain.facts import active_requests, distinct, places_of
from patchhub.porcelain.progress import Progress
from patchhub.store.repository import Repository

if TYPE_CHECKING:
    from patchhub.editing.chat import Chat

SKIP_CODE: Final = 125
METRICS: Final[Mapping[str, str]] = {
    "efficacy": "reliability",
    "paraphrase": "generalisation",
    "locality": "locality",
    "perplexity": "perplexity",
}
"""What can be measured, and its name in the WISE suite."""
_NEEDED: Final[Mapping[str, str]] = {"efficacy": "", "paraphrase": " with paraphrases"}
_ON_TEXT: Final = "perplexity"
"""The one that is measured on running text, in a chat or not."""


@dataclass(frozen=True, eq=False)
class MetricCheck:
    """A check by a measurement: bad where it is below `below` or above `above`.

    Attributes:
        measure: the number of a commit; of the base for None.
        chat: the form in which its prompts are asked; None: as they are.
    """

    measure: Callable[[str | None], float]
    below: float | None
    above: float | None
    chat: Chat | None

    def __call__(self, commit: str | None) -> Outcome:
        value = self.measure(commit)
        bad = (self.below is not None and value < self.below) or (self.above is not None and value > self.above)
        return ("bad" if bad else "good"), value


def command_check(
    repository: Repository, run: Callable[[Path, str | None], int], progress: Progress, *, base: str | None = None
) -> Check:
    """A check by a program on the applied checkpoint: exit code 0 is good, 125 skips, anything else is bad.

    Args:
        run: runs it on a checkpoint folder (deleted afterwards) and a commit's id, and returns its exit code.
    """
    from patchhub.porcelain.model import apply

    def check(commit: str | None) -> Outcome:
        with tempfile.TemporaryDirectory(prefix="patchhub-bisect-") as folder:
            model = Path(folder) / "model"
            apply(repository, commit or "base", model, progress, base=base)
            code = run(model, commit)
        return ("skip" if code == SKIP_CODE else "bad" if code else "good"), float(code)

    return check


def metric_check(
    repository: Repository,
    metric: str,
    requests: Sequence[Request],
    *,
    below: float | None = None,
    above: float | None = None,
    base: str | None = None,
    chat: bool | None = None,
) -> MetricCheck:
    """A check by a measurement: bad where it is below `below` or above `above`.

    efficacy and paraphrase are the shares of facts and of their paraphrases that are the model's answer; locality is the share of
    neighbour prompts that are answered as by the base (each token by argmax); perplexity is over the neighbours' true sentences. One
    model stays in memory and is switched from commit to commit.

    Args:
        chat: ask prompts, neighbours' too, in the base's chat form; None: as the repository's config says. Sentences stay outside it.

    Raises:
        SettingsError: no such metric, or no bound; a chat without a chat template that can be used, or for perplexity.
        RequestError: the facts have no prompts of the kind that the metric needs.
    """
    if metric not in METRICS or (below is None and above is None):
        raise SettingsError(
            f"{metric} cannot be checked",
            remedy=f"Use --metric {', '.join(METRICS)} with --below or --above and a number.",
        )
    if chat and metric == _ON_TEXT:
        raise SettingsError(f"{metric} is measured on running text, not in a chat", remedy="Leave --chat out.")
    needed = {"efficacy": len(requests), "paraphrase": sum(len(request.paraphrases) for request in requests)}
    if not needed.get(metric, sum(len(request.neighborhood) for request in requests)):
        raise RequestError(
            f"the facts have no prompts to measure {metric} on",
            remedy=f"Give facts{_NEEDED.get(metric, ' with neighborhood prompts')} by --facts.",
        )
    measure, form = _measurement(repository, metric, requests, base, chat)
    return MetricCheck(measure, below, above, form)


def facts_to_measure(repository: Repository, metric: str, good: str, bad: str) -> list[Request]:
    """The facts that a metric is about by default.

    What must hold all along, efficacy and paraphrases: the facts active at both ends, or, where there are none, at the bad end.
    What must not be disturbed, locality and perplexity: the neighbours of all facts active at the bad end.
    """
    texts = active_requests(repository, repository.active(repository.resolve(bad)))
    if metric in ("efficacy", "paraphrase"):
        held = {request for _, request in places_of(repository, repository.active(repository.resolve(good)))}
        texts = {place: request for place, request in texts.items() if request.id in held} or texts
    return list(distinct(texts))


def _measurement(
    repository: Repository, metric: str, requests: Sequence[Request], base: str | None, chat: bool | None
) -> tuple[Callable[[str | None], float], Chat | None]:
    """commit -> the number, on one model that is loaded now; and the form in which it is asked."""
    import torch
    from transformers import AutoModelForCausalLM

    from patchhub.evaluation.metrics import perplexity
    from patchhub.evaluation.suites import read_facts, wise_scores
    from patchhub.models.tokenizer import load_tokenizer
    from patchhub.porcelain.chat_form import chat_form
    from patchhub.porcelain.loading import open_base, state_at
    from patchhub.runtime.patched_model import attach, switch

    checkpoint = open_base(repository, base)
    tokenizer = load_tokenizer(checkpoint)
    form = None if metric == _ON_TEXT else chat_form(repository, tokenizer, chat)
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32, local_files_only=True)
    model.eval()
    attach(model, checkpoint, state_at(repository, "base"))
    unpatched = [] if metric == _ON_TEXT else read_facts(model, tokenizer, requests, chat=form)
    texts = [f"{near.prompt} {near.target}" for request in requests for near in request.neighborhood]

    def measure(commit: str | None) -> float:
        switch(model, checkpoint, state_at(repository, commit or "base"))
        if metric == _ON_TEXT:
            return perplexity(model, tokenizer, texts)
        scores = wise_scores(read_facts(model, tokenizer, requests, chat=form), unpatched, resamples=1)
        return scores.estimates[METRICS[metric]].value

    return measure, form
