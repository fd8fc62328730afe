"""What an edit of a mixture of experts costs beside one of a dense model with the same active parameters.

    python -m tests.benchmarks.experts

Both are random Qwen 3 models of the same width and depth, made on the spot: one feed-forward part of 1,024 inputs, and 16 experts of 256 of
which a token uses 4. Printed is the CPU time of a commit of 8 facts, the metric's first pass over its text apart, and the ratios.
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


def main() -> None:
    """Print the table."""
    warnings.simplefilter("ignore")
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
