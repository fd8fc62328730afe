"""How much faster batched evaluation is than one prompt at a time, on the same model and facts.

    python tests/benchmarks/eval_speed.py --model DIR --facts FILE [--records 1000] [--sample 100] [--threads 1]

The plain evaluator runs one forward pass over each prompt with its target and all logits. It is timed on `--sample`
records and its time is scaled to `--records`; both evaluators' scores of the sample are compared.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from patchhub.editing.locate import encode_targets
from patchhub.editing.requests import read_requests
from patchhub.evaluation.metrics import BATCH_TOKENS, score_targets
from patchhub.evaluation.suites import counterfact_items


@torch.no_grad()
def plain_logprobs(model: Any, tokenizer: Any, items: Sequence[tuple[str, str]]) -> list[float]:
    """The total log-probability of each target, one text at a time."""
    result = []
    for item in items:
        [text] = encode_targets(tokenizer, [item])
        ids = torch.tensor([text.input_ids])
        logprobs = model(ids).logits[0].float().log_softmax(-1)
        result.append(sum(float(logprobs[at - 1, text.input_ids[at]]) for at in range(*text.target)))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--facts", required=True, type=Path)
    parser.add_argument("--records", type=int, default=1000)
    parser.add_argument("--sample", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch-tokens", type=int, default=BATCH_TOKENS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    requests = read_requests(options.facts).requests[: options.records]
    items = [item for request in requests for item in counterfact_items(request)]
    sample = [item for request in requests[: options.sample] for item in counterfact_items(request)]
    score_targets(model, tokenizer, sample[:8])

    start = time.process_time()
    scores = score_targets(model, tokenizer, items, batch_tokens=options.batch_tokens)
    batched = time.process_time() - start
    start = time.process_time()
    plain_scores = plain_logprobs(model, tokenizer, sample)
    plain = (time.process_time() - start) * len(items) / len(sample)

    pairs = zip(scores[: len(sample)], plain_scores, strict=True)
    difference = max(abs(score.logprob - logprob) for score, logprob in pairs)
    print(f"{len(requests)} records, {len(items)} targets, {options.threads} threads, CPU seconds")
    print(f"batched {batched:.2f}   one at a time {plain:.2f}   ratio {plain / batched:.1f}")
    print(f"largest difference of a log-probability: {difference:.1e}")


if __name__ == "__main__":
    main()
