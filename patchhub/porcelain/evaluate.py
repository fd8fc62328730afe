"""`eval`: how well a revision holds facts, and what it costs elsewhere. Definitions are in docs/evaluation.md."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoTokenizer

from patchhub.errors import RequestError, SettingsError
from patchhub.evaluation import decoding, suites
from patchhub.evaluation.suites import Scores
from patchhub.objects import Note, Request
from patchhub.porcelain.loading import open_base, state_at
from patchhub.porcelain.progress import Progress
from patchhub.runtime.patched_model import load_patched, switch
from patchhub.store.repository import Repository

SUITES: Mapping[str, Callable[..., Scores]] = {
    "counterfact": suites.counterfact_scores,
    "zsre": suites.zsre_scores,
    "wise": suites.wise_scores,
}
DEFINITIONS: Mapping[str, str] = {
    "ES": "efficacy: the new target is more probable than the old one at the prompt",
    "PS": "paraphrase: the same at other phrasings",
    "NS": "neighborhood: the true answer stays more probable at other subjects' prompts",
    "S": "harmonic mean of the three",
    "EA": "the new target is the argmax at the prompt",
    "PA": "the same at other phrasings",
    "NA": "the true answer is the argmax at other subjects' prompts",
    "EM": "P(new) - P(old) at the prompt",
    "PM": "the same at other phrasings",
    "NM": "P(true) - P(new) at other subjects' prompts",
    "unchanged": "the answer at other subjects' prompts is the base's",
    "efficacy": "share of the target's tokens that are the argmax at the prompt",
    "paraphrase": "the same at other phrasings",
    "specificity": "the same for the true answers at other prompts",
    "reliability": "the new target is the argmax at the prompt",
    "generalisation": "the same at other phrasings",
    "locality": "the answer at other prompts is the base's",
    "average": "arithmetic mean of the three",
    "exact": "live: what the model writes after the prompt begins with the new target",
    "contained": "live: the new target occurs in what the model writes",
    "exact_in_context": "live, after a sentence of other text",
    "contained_in_context": "live, after a sentence of other text",
}


@dataclass(frozen=True)
class Evaluation:
    """The scores of one revision on one list of facts, teacher forced and live, and the note that keeps them."""

    commit: str | None
    facts: int
    scores: Scores
    live: Scores
    note: str | None

    def to_json(self) -> dict[str, Any]:
        return {
            "commit": self.commit,
            "facts": self.facts,
            "suite": self.scores.suite,
            "scores": {**_numbers(self.scores), **_numbers(self.live)},
            "definitions": {name: DEFINITIONS[name] for name in (*self.scores.estimates, *self.live.estimates)},
            "note": self.note,
        }


def evaluate(
    repository: Repository,
    revision: str,
    requests: Sequence[Request],
    progress: Progress,
    *,
    author: str,
    time: str,
    suite: str = "counterfact",
    limit: int | None = None,
    keep: bool = True,
) -> Evaluation:
    """Score a revision beside the base: one model in memory, in float32, switched between the two.

    Args:
        suite: counterfact, zsre or wise; live decoding is always measured as well.
        limit: only the first so many facts.
        keep: write the scores as a note of the commit.

    Raises:
        SettingsError: there is no such suite.
        RequestError: there are no facts.
    """
    if suite not in SUITES:
        raise SettingsError(f"there is no suite {suite!r}", remedy=f"The suites are {', '.join(SUITES)}.")
    facts = list(requests[:limit])
    if not facts:
        raise RequestError("there are no facts to evaluate", remedy="Give --suite FILE with at least one record.")
    state = state_at(repository, revision)
    checkpoint = open_base(repository)
    progress.stage("loading the base", 0)
    model = load_patched(checkpoint, state_at(repository, "base"), cache=repository.cache, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder, local_files_only=True)
    progress.stage("reading the base", 0)
    before = suites.read_facts(model, tokenizer, facts)
    switch(model, checkpoint, state, cache=repository.cache)
    progress.stage("reading the revision", 0)
    after = suites.read_facts(model, tokenizer, facts)
    progress.stage("live decoding", 0)
    contexts = repository.config.recording.contexts[1:] if repository.config.recording else ()
    live = decoding.live_scores(
        decoding.read_live(model, tokenizer, facts, contexts=contexts[:1], max_new_tokens=_longest(tokenizer, facts))
    )
    progress.close()
    scores = SUITES[suite](after, before)
    note = None
    if keep and state.commit is not None:
        kept = {name: found["value"] for name, found in {**_numbers(scores), **_numbers(live)}.items()}
        settings = {**scores.settings, "facts": len(facts)}
        entry = Note(commit=state.commit, made_by=author, scores=kept, settings=settings, suite=suite)
        note = repository.add_note(entry, command="eval", arguments={"suite": suite}, author=author, time=time)
    return Evaluation(state.commit, len(facts), scores, live, note)


def _longest(tokenizer: Any, facts: Sequence[Request]) -> int:
    """Tokens that the longest target has, and four more."""
    return 4 + max(len(ids) for ids in tokenizer([f" {fact.target_new}" for fact in facts])["input_ids"])


def _numbers(scores: Scores) -> dict[str, dict[str, float]]:
    return {
        name: {"value": found.value, "low": found.low, "high": found.high, "records": found.records}
        for name, found in scores.estimates.items()
    }
