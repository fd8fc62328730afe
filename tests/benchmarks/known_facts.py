"""Facts that a trained model knows, edited by defaults: what it then writes by itself, in plain text and in its chat.

    python -m tests.benchmarks.known_facts --model DIR --data FILE --text FILE [-n 100] [--skip 0] [--set chat_weight=0 ...]

The facts are chosen from records in CounterFact's flat form: shuffled with seed 0, one per subject, those whose true answer the
model writes by itself after the prompt. `--skip` leaves out the first so many of these. `--store DIR` keeps the repository, or takes
one that has a metric and no commit.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from time import process_time
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

import patchhub
from patchhub.evaluation.guard import Report
from patchhub.evaluation.live import continue_greedily
from patchhub.evaluation.spoken import closed, said
from patchhub.evaluation.suites import counterfact_scores, read_facts
from patchhub.objects import Request
from patchhub.text.tokens import chat_of

ASKED = 32  # prompts at once while facts are looked for
UNRELATED = 40
QUESTIONS = ("What is the capital of France?", "Who wrote Macbeth?", "What is the largest planet?")


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        store = options.store or Path(folder)
        known = (store / ".patchhub").is_dir()
        repo = patchhub.open(store) if known else patchhub.Repository.init(store, options.model)
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        model = repo.load("base", dtype=torch.float32)
        facts, others = _chosen(options, model, tokenizer)
        before = _look(model, tokenizer, facts, others)
        begun = process_time()
        text = [] if known else [options.text]
        made = repo.commit(
            facts, message="known facts", text=text, force=True, set=options.set, chat=options.chat or None
        )
        print(f"{len(facts)} facts, {process_time() - begun:.0f} CPU s" + ("" if known else " with the metric"))
        _tell_guard(Report.from_json(repo.store.commit(made.commit).check))
        repo.attach(model, "HEAD")
        _compare(before, _look(model, tokenizer, facts, others), facts)


def _chosen(options: argparse.Namespace, model: Any, tokenizer: Any) -> tuple[list[Request], list[str]]:
    """The facts, and prompts of records that are none of them."""
    records = json.loads(options.data.read_bytes())
    random.Random(0).shuffle(records)
    found: dict[str, dict[str, Any]] = {}
    for start in range(0, len(records), ASKED):
        for record in _known(records[start : start + ASKED], model, tokenizer):
            found.setdefault(record["subject"], record)
        if len(found) >= options.skip + options.n:
            break
    chosen = list(found.values())[options.skip : options.skip + options.n]
    others = [record["prompt"] for record in reversed(records) if record["subject"] not in found][:UNRELATED]
    return [_request(record) for record in chosen], others


def _known(records: Sequence[dict[str, Any]], model: Any, tokenizer: Any) -> Iterator[dict[str, Any]]:
    texts = continue_greedily(model, tokenizer, [record["prompt"] for record in records], max_new_tokens=8)
    for record, text in zip(records, texts, strict=True):
        if said(text, record["ground_truth"]):
            yield record


def _request(record: dict[str, Any]) -> Request:
    return Request.make(
        record["prompt"].replace(record["subject"], "{}", 1),
        record["subject"],
        record["target_new"],
        target_true=record["ground_truth"],
        paraphrases=[record["rephrase_prompt"]],
        neighborhood=[(record["locality_prompt"], record["locality_ground_truth"])],
    )


def _look(model: Any, tokenizer: Any, facts: Sequence[Request], others: Sequence[str]) -> dict[str, Any]:
    """What is compared before and after."""
    looked: dict[str, Any] = {"facts": read_facts(model, tokenizer, facts)}
    looked["paraphrases"] = continue_greedily(model, tokenizer, [f.paraphrases[0] for f in facts], max_new_tokens=12)
    looked["next"] = torch.stack([_next(model, tokenizer, prompt) for prompt in others])
    if tokenizer.chat_template:
        form = chat_of(tokenizer)
        asked = [fact.text for fact in facts]
        looked["chat"] = continue_greedily(model, tokenizer, asked, chat=form, max_new_tokens=32)
        looked["questions"] = continue_greedily(model, tokenizer, QUESTIONS, chat=form, max_new_tokens=24)
    return looked


@torch.no_grad()
def _next(model: Any, tokenizer: Any, prompt: str) -> Tensor:
    log_probs: Tensor = model(**tokenizer(prompt, return_tensors="pt")).logits[0, -1].float().log_softmax(-1)
    return log_probs


def _tell_guard(report: Report | None) -> None:
    if report is None or report.measured.spoken is None or report.measured.drift is None:
        return
    spoken, drift = report.measured.spoken, report.measured.drift
    leak = f"{spoken.leak.count}/{spoken.leak.of}" if spoken.leak else "none asked"
    print(
        f"live efficacy {spoken.said.count}/{spoken.said.of}, closure {spoken.closed.count}/{spoken.closed.of}, leak {leak}"
    )
    print(f"held text: perplexity ratio {drift.perplexity_ratio:.3f}, KL {drift.kl:.3f}")
    for fault in spoken.faults[:10]:
        print(f"  {fault.why}: {fault.prompt!r} {fault.target!r} {fault.continuation!r}")


def _compare(before: dict[str, Any], after: dict[str, Any], facts: Sequence[Request]) -> None:
    scores = counterfact_scores(after["facts"], before["facts"], resamples=1).estimates
    print(
        "teacher forced: "
        + ", ".join(f"{name} {scores[name].value:.3f}" for name in ("S", "ES", "EA", "PS", "PA", "NS"))
    )
    pairs = list(zip(after["paraphrases"], facts, strict=True))
    print(f"live paraphrase {sum(said(text, fact.target_new) for text, fact in pairs)}/{len(facts)}")
    kl = (before["next"].exp() * (before["next"] - after["next"])).sum(-1)
    print(f"{len(kl)} unrelated prompts: KL {float(kl.mean()):.3f} (median {float(kl.median()):.3f})")
    if "chat" in after:
        answers = list(zip(after["chat"], facts, strict=True))
        shares = [
            sum(judge(text, fact.target_new, anywhere=True) for text, fact in answers) for judge in (said, closed)
        ]
        named = sum(fact.subject in text for text, fact in answers)
        print(f"in the chat: said {shares[0]}, closed {shares[1]}, with the subject's name {named} of {len(facts)}")
        for text, fact in answers[:10]:
            print(f"  {fact.text!r} {fact.target_new!r}: {text!r}")
        for question, then, now in zip(QUESTIONS, before["questions"], after["questions"], strict=True):
            print(f"  {question!r}: {now!r}" + ("" if now == then else f", before {then!r}"))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--store", type=Path)
    parser.add_argument("-n", type=int, default=100)
    parser.add_argument("--skip", type=int, default=0)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--chat", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
