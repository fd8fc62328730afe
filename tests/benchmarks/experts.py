"""What an edit of a mixture of experts costs beside one of a dense model with the same active parameters.

    python -m tests.benchmarks.experts

Both are random Qwen 3 models of the same width and depth, made on the spot: one feed-forward part of 1,024 inputs, and 16 experts of 256 of
which a token uses 4. Printed are the CPU times of two commits of 8 facts, of which the first computes the metric, and their ratios; and,
as the floor, the time of plain passes forward and backward over as many positions as a step of such a commit has: as transformers runs
them, and as facts are written. An expert gets 24 of these positions, so its weight is read for few products.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from pathlib import Path
from time import process_time
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from patchhub.models.tracing import fast
from patchhub.repository import Repository
from tests.tiny_models import BOS, EOS, VOCABULARY, tiny_tokenizer

COMMON: dict[str, Any] = {
    "hidden_size": 256,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 128,
    "vocab_size": VOCABULARY,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": EOS,
}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3": {**COMMON, "intermediate_size": 1024},
    "qwen3_moe": {
        **COMMON,
        "moe_intermediate_size": 256,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "norm_topk_prob": True,
    },
}
FACTS = 8
ROWS, TIME, PASSES = 48, 2, 40


def facts(start: int) -> list[dict[str, str]]:
    """Facts about subjects that no other call gives."""
    return [
        {"prompt": "The mother tongue of {} is", "subject": f"Person {start + n}", "target_new": "Dutch"}
        for n in range(FACTS)
    ]


def seconds(family: str, folder: Path) -> tuple[float, float]:
    """CPU time of the first commit, which computes the metric, and of the second."""
    torch.manual_seed(0)
    factory: Any = AutoModelForCausalLM
    factory.from_config(CONFIG_MAPPING[family](**MODELS[family]), dtype=torch.float32).save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    text = folder / "text.json"
    text.write_text(json.dumps(["The Space Needle is located in Seattle, in the United States of America."] * 400))
    found = []
    with Repository.init(folder, folder / "base", progress=False, author="Ada <ada@example.org>") as repository:
        for number in range(2):
            start = process_time()
            repository.commit(facts(FACTS * number), message="facts", force=True, text=[text])
            found.append(process_time() - start)
    return found[0], found[1]


def passes(family: str) -> tuple[float, float]:
    """CPU milliseconds of one pass forward and backward to the first states, as transformers runs it and as facts are written."""
    torch.manual_seed(0)
    factory: Any = AutoModelForCausalLM
    model = factory.from_config(CONFIG_MAPPING[family](**MODELS[family]), dtype=torch.float32).eval()
    model.requires_grad_(False)
    states = torch.randn(ROWS, TIME, COMMON["hidden_size"], requires_grad=True)

    def timed() -> float:
        start = process_time()
        for _ in range(PASSES):
            logits = model(inputs_embeds=states, use_cache=False).logits
            torch.autograd.grad(logits.sum(), states)
        return (process_time() - start) / PASSES * 1e3

    timed()
    plain = timed()
    with fast(model):
        timed()
        return plain, timed()


def main() -> None:
    """Print the table."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    floor = {family: passes(family) for family in MODELS}
    for place, how in enumerate(("as transformers runs it", "as facts are written")):
        dense, moe = floor["qwen3"][place], floor["qwen3_moe"][place]
        print(f"a pass {how}: {dense:.1f} and {moe:.1f} ms, mixture / dense {moe / dense:.2f}", flush=True)
    times = {}
    for family in MODELS:
        with tempfile.TemporaryDirectory() as folder:
            times[family] = seconds(family, Path(folder))
        print(
            f"{family}: first commit {times[family][0]:.1f} s, second {times[family][1]:.1f} s of CPU time", flush=True
        )
    ratios = [moe / dense for moe, dense in zip(times["qwen3_moe"], times["qwen3"], strict=True)]
    print(f"mixture / dense: {ratios[0]:.2f} and {ratios[1]:.2f}")


if __name__ == "__main__":
    main()
