"""Looking at results: what a revision answers to given facts, and which tensors of two checkpoints differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from patchhub.evaluation.metrics import score_targets
from patchhub.models.checkpoint import open_checkpoint
from patchhub.models.fingerprint import fingerprint
from patchhub.models.tokenizer import load_tokenizer
from patchhub.objects import Request
from patchhub.porcelain.loading import open_base, state_at
from patchhub.runtime.patched_model import load_patched
from patchhub.store.repository import Repository


@dataclass(frozen=True)
class Answers:
    """What one revision says about some facts: its first words at each prompt, and counts over their evaluation prompts."""

    answers: tuple[str, ...]
    paraphrases_right: int
    paraphrases: int
    neighbors_right: int
    neighbors: int


def score_facts(repository: Repository, requests: Sequence[Request], revision: str, expected: Sequence[str]) -> Answers:
    """What a revision answers: at each prompt, with as many tokens as the expected answer has, and at the evaluation prompts.

    Answers are teacher forced; paraphrases are right with the new target, neighbours with their own.

    Raises:
        RevisionError: no such revision.
    """
    checkpoint = open_base(repository)
    model = load_patched(checkpoint, state_at(repository, revision))
    tokenizer = load_tokenizer(checkpoint)
    prompts = [(request.text, answer) for request, answer in zip(requests, expected, strict=True)]
    paraphrases = [(text, request.target_new) for request in requests for text in request.paraphrases]
    neighbors = [(near.prompt, near.target) for request in requests for near in request.neighborhood]
    scores = score_targets(model, tokenizer, [*prompts, *paraphrases, *neighbors])
    right = [score.argmax_right for score in scores]
    end = len(prompts) + len(paraphrases)
    return Answers(
        tuple(str(tokenizer.decode(list(score.argmax))).strip() for score in scores[: len(prompts)]),
        sum(right[len(prompts) : end]),
        len(paraphrases),
        sum(right[end:]),
        len(neighbors),
    )


def differing_tensors(one: Path, other: Path) -> list[str]:
    """Names of tensors whose type, shape or bytes differ between two checkpoint folders, or that only one of them has."""
    a, b = fingerprint(open_checkpoint(one)).tensors, fingerprint(open_checkpoint(other)).tensors
    return sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))
