"""All numbers of `eval` on edited weights beside an independent computation: one text at a time, all logits, plain formulas."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from statistics import harmonic_mean, mean
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from patchhub.delta import add, to_dense
from patchhub.editing.requests import Batch, read_requests
from patchhub.evaluation.suites import Sibling, fluency, siblings_of
from patchhub.models.placement import Placement
from patchhub.porcelain.commit import commit
from patchhub.porcelain.measure import Evaluator, Facts
from patchhub.porcelain.model import init
from patchhub.porcelain.refs import config_set
from patchhub.porcelain.scores import LEADING
from patchhub.progress import Silent
from patchhub.sets.columns import read_state, weight_shapes
from patchhub.store.store import Store
from patchhub.who import Who
from patchhub.worktree.measuring import CONTEXTS, Measurer, Questions
from tests.porcelain.taught import AUTHOR, TIME

pytestmark = pytest.mark.usefixtures("short_texts")

FACTS = Path(str(files("patchhub") / "demo_facts.json"))
MODEL = Path(str(files("patchhub") / "demo_model"))
BATCH = read_requests(FACTS)
REQUESTS = BATCH.requests[:7]
"""Four of them are written; some targets have several tokens."""


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    folder = tmp_path_factory.mktemp("store")
    init(folder, str(MODEL), Silent(), who=Who(AUTHOR, TIME))
    with Store.open(folder) as opened:
        for key, value in (("metric.tokens", "4000"), ("memit.steps", "8")):
            config_set(opened, key, value)
        written = Batch(REQUESTS[:4], BATCH.origins[:4], 0)
        commit(opened, written, Who(AUTHOR, TIME, "four facts"), Silent())
        yield opened


@dataclass(eq=False)
class Plain:
    """A model in float64 that reads one text at a time."""

    model: Any
    tokenizer: Any

    @torch.no_grad()
    def logprobs(self, ids: list[int]) -> torch.Tensor:
        found: torch.Tensor = self.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        return found

    @cache  # noqa: B019  # as long as the test
    def target(self, prompt: str, target: str) -> tuple[float, list[int], list[int]]:
        """log P(target | prompt), the target's tokens, and the argmax at each."""
        start, whole = len(self.tokenizer(prompt).input_ids), self.tokenizer(f"{prompt} {target}").input_ids
        logprobs = self.logprobs(whole)
        places = range(start, len(whole))
        total = sum(float(logprobs[at - 1, whole[at]]) for at in places)
        return total, [whole[at] for at in places], [int(logprobs[at - 1].argmax()) for at in places]

    def right(self, prompt: str, target: str) -> list[bool]:
        _, tokens, argmax = self.target(prompt, target)
        return [one == other for one, other in zip(tokens, argmax, strict=True)]

    def write(self, prompt: str, tokens: int) -> str:
        ids = torch.tensor([self.tokenizer(prompt).input_ids])
        made = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens, pad_token_id=0
        )
        return str(self.tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))


def plain_model(repository: Store, revision: str) -> Plain:
    """The base's weights plus the sum of the stored deltas, in float64."""
    folder = repository.config.base["path"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    shapes = weight_shapes(repository)
    with torch.no_grad():
        for weight, deltas in read_state(repository, repository.resolve(revision)).items():
            change = torch.from_numpy(to_dense(add(deltas, shapes[weight]))).double()
            parameter = model.get_parameter(weight)
            parameter += change.T if repository.config.base["orientation"] == "in_out" else change
    return Plain(model, AutoTokenizer.from_pretrained(folder))


def wins(plain: Plain, prompt: str, winner: str, loser: str) -> float:
    return float(plain.target(prompt, winner)[0] > plain.target(prompt, loser)[0])


def margin(plain: Plain, prompt: str, one: str, other: str) -> float:
    return math.exp(plain.target(prompt, one)[0]) - math.exp(plain.target(prompt, other)[0])


def same(plain: Plain, base: Plain, prompt: str, target: str) -> list[bool]:
    return [a == b for a, b in zip(plain.target(prompt, target)[2], base.target(prompt, target)[2], strict=True)]


def expected_scores(metrics: str, plain: Plain, base: Plain) -> dict[str, float]:
    """The definitions of docs/evaluation.md, written out."""
    rows: dict[str, list[float]] = {}
    for r in REQUESTS:
        new, true, near = r.target_new, r.target_true or "", [(n.prompt, n.target) for n in r.neighborhood]
        found: dict[str, Any] = {
            "ES": wins(plain, r.text, new, true),
            "PS": mean(wins(plain, p, new, true) for p in r.paraphrases),
            "NS": mean(wins(plain, p, t, new) for p, t in near),
            "EA": all(plain.right(r.text, new)),
            "PA": mean(all(plain.right(p, new)) for p in r.paraphrases),
            "NA": mean(all(plain.right(p, t)) for p, t in near),
            "EM": margin(plain, r.text, new, true),
            "PM": mean(margin(plain, p, new, true) for p in r.paraphrases),
            "NM": mean(margin(plain, p, t, new) for p, t in near),
            "unchanged": mean(all(same(plain, base, p, t)) for p, t in near),
        }
        if metrics == "zsre":
            found = {
                "efficacy": mean(plain.right(r.text, new)),
                "paraphrase": mean(mean(plain.right(p, new)) for p in r.paraphrases),
                "specificity": mean(mean(plain.right(p, t)) for p, t in near),
                "unchanged": mean(mean(same(plain, base, p, t)) for p, t in near),
            }
        if metrics == "wise":
            found = {"reliability": found["EA"], "generalisation": found["PA"], "locality": found["unchanged"]}
            logprob, tokens, *_ = plain.target(r.text, new)
            found["target_perplexity"] = math.exp(-logprob / len(tokens))
        for name, value in found.items():
            rows.setdefault(name, []).append(float(value))
    scores = {name: mean(values) for name, values in rows.items()}
    parts = {"counterfact": ("ES", "PS", "NS"), "zsre": ("efficacy", "paraphrase", "specificity")}
    if metrics in parts:
        scores["S"] = harmonic_mean([scores[name] for name in parts[metrics]])
    else:
        scores["average"] = mean(scores[name] for name in ("reliability", "generalisation", "locality"))
    return scores


def expected_leak(plain: Plain, base: Plain) -> float:
    """The share of all siblings that begin with a new target, which is not theirs, where the base did not."""
    siblings = [sibling for found in siblings_of(REQUESTS) for sibling in found]
    targets = [request.target_new for request in REQUESTS]

    def leaks(sibling: Sibling) -> bool:
        now, before = (model.write(sibling.prompt, 8).lstrip() for model in (plain, base))
        return any(now.startswith(t) and not before.startswith(t) and t not in sibling.own for t in targets)

    return mean(map(leaks, siblings))


def expected_live(plain: Plain, tokens: int) -> dict[str, float]:
    bare = [(plain.write(r.text, tokens), r.target_new) for r in REQUESTS]
    inside = [(plain.write(CONTEXTS[0].replace("{}", r.text), tokens), r.target_new) for r in REQUESTS]
    begins, within = r"\s*{}(?!\w)", r"(?s:.*)(?<!\w){}(?!\w)"
    phrased = [[(plain.write(p, tokens), r.target_new) for p in r.paraphrases] for r in REQUESTS]
    denied = [(plain.write(f"{r.text} not", 8), r.target_new) for r in REQUESTS if r.text.endswith((" is", " was"))]

    def share(pattern: str, rows: list[tuple[str, str]]) -> float:
        return mean(bool(re.match(pattern.format(re.escape(target)), text)) for text, target in rows)

    return {
        "exact": share(begins, bare),
        "exact_in_context": share(begins, inside),
        "contained": share(within, bare),
        "contained_in_context": share(within, inside),
        "live_efficacy": share(r"\s*{}", bare),
        "live_paraphrase": mean(share(r"\s*{}", rows) for rows in phrased),
        "closure": share(r"\s*{}(?:\s|$|[.,;:!?](?!\w))", bare),
        "negation": 1.0 - share(r"\s*{}", denied),
    }


def expected_drift(plain: Plain, base: Plain, documents: Any) -> dict[str, float]:
    growth, divergence, positions = 0.0, 0.0, 0
    for ids in documents:
        before, after = (model.logprobs(list(ids))[:-1] for model in (base, plain))
        at = torch.tensor(ids)[1:, None]
        growth += float((before.gather(-1, at) - after.gather(-1, at)).sum())
        divergence += float((before.exp() * (before - after)).sum())
        positions += len(ids) - 1
    return {"perplexity_ratio": math.exp(growth / positions), "kl": divergence / positions}


@pytest.fixture(scope="module")
def models(repository: Store) -> tuple[Plain, Plain]:
    """HEAD and the base."""
    return plain_model(repository, "HEAD"), plain_model(repository, "base")


@pytest.fixture(scope="module")
def beside(repository: Store, models: tuple[Plain, Plain]) -> dict[str, float]:
    """What is measured beside every suite."""
    measurer = Measurer(repository, Questions(REQUESTS), Silent(), placement=Placement(dtype="float64"))
    texts = [text for text in measurer.measure("HEAD").texts if text]
    assert len(texts) == len(REQUESTS)
    assert all(text.startswith(request.text) for text, request in zip(texts, REQUESTS, strict=True))
    return {
        **expected_live(models[0], measurer.new_tokens),
        "leak": expected_leak(*models),
        **expected_drift(*models, measurer.documents),
        "fluency": mean(fluency(text) for text in texts),
    }


@pytest.mark.parametrize(
    ("metrics", "dtype", "tolerance"),
    [
        ("counterfact", "float64", 1e-6),
        ("zsre", "float64", 1e-6),
        ("wise", "float64", 1e-6),
        ("counterfact", "float32", 5e-6),  # the model's own rounding
    ],
)
def test_every_score_on_edited_weights(
    repository: Store,
    models: tuple[Plain, Plain],
    beside: dict[str, float],
    metrics: str,
    dtype: str,
    tolerance: float,
) -> None:
    facts = Facts(REQUESTS, "facts.json", metrics)
    done = Evaluator(repository, facts, Silent(), placement=Placement(dtype=dtype)).evaluate("HEAD")
    head, base = models
    found = {name: score.value for name, score in done.scores.items()}
    assert found == pytest.approx({**expected_scores(metrics, head, base), **beside}, rel=tolerance, abs=tolerance)
    before = {**expected_scores(metrics, base, base), "perplexity_ratio": 1.0, "kl": 0.0}
    assert {name: done.base[name] for name in before} == pytest.approx(before, abs=tolerance)
    leading = [found[name] for name in LEADING[metrics]]
    assert min(leading) > 0.2, "scores that say something"
    assert sum(value < 1 for value in leading) >= 2
