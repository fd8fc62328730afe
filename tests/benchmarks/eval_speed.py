"""How much faster batched evaluation is than one prompt at a time, on the same model and facts.

    python -m tests.benchmarks.eval_speed --model DIR --facts FILE [--records 1000] [--sample 100] [--threads 1]

The plain evaluator runs one forward pass over each prompt with its target and all logits, and generates after one prompt at a time.
It is timed on `--sample` records and its time is scaled to `--records`; both evaluators' results on the sample are compared.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from patchhub.editing.locate import encode_targets
from patchhub.editing.requests import read_requests
from patchhub.evaluation.live import continue_greedily, live_prompts
from patchhub.evaluation.metrics import BATCH_TOKENS, score_targets
from patchhub.evaluation.suites import counterfact_items
from patchhub.worktree.measuring import CONTEXTS, NEW_TOKENS

Result = TypeVar("Result")


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


@torch.no_grad()
def plain_texts(model: Any, tokenizer: Any, prompts: Sequence[str], new_tokens: int) -> list[str]:
    """The greedy continuation of each prompt, one at a time."""
    result = []
    for prompt in prompts:
        ids = torch.tensor([tokenizer(prompt).input_ids])
        made = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new_tokens, pad_token_id=0
        )
        result.append(str(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)))
    return result


def timed(work: Callable[[], Result]) -> tuple[Result, float]:
    """What `work` returns and the CPU seconds that it took."""
    start = time.process_time()
    return work(), time.process_time() - start


def report(label: str, records: int, batched: float, plain: float) -> None:
    print(
        f"{label:>16} {batched:8.2f} {plain:14.2f} {plain / batched:8.1f}   {1000 * batched / records:.1f} ms a record"
    )


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
    sample = requests[: options.sample]
    scale = len(requests) / len(sample)
    items, some = ([item for request in part for item in counterfact_items(request)] for part in (requests, sample))
    prompts, few = ([p for request in part for p in live_prompts(request, CONTEXTS)] for part in (requests, sample))
    score_targets(model, tokenizer, some[:8])

    scores, forced = timed(lambda: score_targets(model, tokenizer, items, batch_tokens=options.batch_tokens))
    expected, forced_plain = timed(lambda: plain_logprobs(model, tokenizer, some))
    texts, live = timed(lambda: continue_greedily(model, tokenizer, prompts, max_new_tokens=NEW_TOKENS))
    written, live_plain = timed(lambda: plain_texts(model, tokenizer, few, NEW_TOKENS))

    print(
        f"{len(requests)} records, {len(items)} targets, {len(prompts)} texts, {options.threads} threads; CPU seconds"
    )
    print(f"{'':>16} {'batched':>8} {'one at a time':>14} {'ratio':>8}")
    report("teacher forced", len(requests), forced, forced_plain * scale)
    report("live", len(requests), live, live_plain * scale)
    report("both", len(requests), forced + live, (forced_plain + live_plain) * scale)
    pairs = list(zip(scores[: len(some)], expected, strict=True))
    print(f"largest difference of a log-probability: {max(abs(one.logprob - other) for one, other in pairs):.1e}")
    differing = sum(one != other for one, other in zip(texts[: len(few)], written, strict=True))
    print(f"texts that differ: {differing} of {len(few)}")


if __name__ == "__main__":
    main()
