"""A base that does not fit: the metric of a random one, streamed, against a limit of memory that its process keeps.

    python -m tests.benchmarks.streaming --folder DIR                     # a Llama of 3.2 billion parameters, 6.4 GB on disk
    python -m tests.benchmarks.streaming --folder DIR --small             # one of 20 million, for a look at the script
    python -m tests.benchmarks.streaming --folder DIR --whole             # the same with the base in memory, which says the same bits
    python -m tests.benchmarks.streaming --folder DIR --facts 2           # and so many facts committed on it

The base is made once and stays in DIR. Memory is what the process holds beside mapped pages of files, which the system takes back when it
needs them: RssAnon of /proc, read every 5 ms; a process that holds more than the limit is ended. The floor is 2 FLOP per parameter of
the blocks and token, and of the sums of second moments 2 (inputs)^2 a token, at the speed of this machine's own matrix products in
the types they are in, measured in the same run with the same number of threads."""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from patchhub.canonical import canonical_json
from patchhub.repository import Repository
from patchhub.worktree import metric as worktree
from tests.tiny_models import tiny_tokenizer

LARGE = {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "vocab_size": 128256}
SMALL = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 12, "vocab_size": 32000}
_HEADS = {"num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128}
_FEW_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}


def make_checkpoint(folder: Path, *, small: bool = False) -> None:
    """Write a random Llama with weights of standard deviation 1 / sqrt(inputs) in bfloat16, a block to a file; one tensor is in memory."""
    sizes = {**SMALL, **_FEW_HEADS} if small else {**LARGE, **_HEADS}
    config = LlamaConfig(**sizes, tie_word_embeddings=True, max_position_embeddings=4096, dtype="bfloat16")
    config.architectures = ["LlamaForCausalLM"]
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    d, inner = config.hidden_size, config.intermediate_size
    heads, groups, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    block = {
        "self_attn.q_proj": (heads * width, d),
        "self_attn.k_proj": (groups * width, d),
        "self_attn.v_proj": (groups * width, d),
        "self_attn.o_proj": (d, heads * width),
        "mlp.gate_proj": (inner, d),
        "mlp.up_proj": (inner, d),
        "mlp.down_proj": (d, inner),
    }
    files: dict[str, str] = {}

    def write(name: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / name, metadata={"format": "pt"})
        files.update(dict.fromkeys(tensors, name))

    def drawn(rows: int, columns: int) -> torch.Tensor:
        found = torch.empty(rows, columns, dtype=torch.bfloat16)
        for part in found.split(4096):
            part.copy_(torch.randn(part.shape, generator=generator) * columns**-0.5)
        return found

    ones = torch.ones(d, dtype=torch.bfloat16)
    for number in range(config.num_hidden_layers):
        prefix = f"model.layers.{number}"
        tensors = {f"{prefix}.{name}.weight": drawn(*shape) for name, shape in block.items()}
        norms = {f"{prefix}.{name}.weight": ones.clone() for name in ("input_layernorm", "post_attention_layernorm")}
        write(f"model-{number:05d}.safetensors", tensors | norms)
    rest = {"model.embed_tokens.weight": drawn(config.vocab_size, d), "model.norm.weight": ones}
    write(f"model-{config.num_hidden_layers:05d}.safetensors", rest)
    (folder / "model.safetensors.index.json").write_bytes(canonical_json({"metadata": {}, "weight_map": files}))


class Held:
    """What this process holds beside mapped files, watched while it is open.

    Attributes:
        peak: bytes.
    """

    def __init__(self, limit: int) -> None:
        self.peak, self._limit, self._done = 0, limit, threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.peak = max(self.peak, anonymous())
            if self.peak > self._limit:
                print(f"over the limit: {self.peak / 1e9:.2f} GB", file=sys.stderr, flush=True)
                os._exit(1)

    def close(self) -> None:
        self._done.set()


def anonymous() -> int:
    """Bytes of the process that are not pages of files."""
    with open("/proc/self/status") as file:
        return 1024 * int(next(line for line in file if line.startswith("RssAnon")).split()[1])


@contextmanager
def measured(name: str, into: dict[str, Any], limit: int) -> Iterator[None]:
    held, cpu, wall = Held(limit), time.process_time(), time.perf_counter()
    yield
    held.close()
    into[name] = {
        "cpu_s": round(time.process_time() - cpu, 1),
        "wall_s": round(time.perf_counter() - wall, 1),
        "peak_gb": round(held.peak / 1e9, 2),
    }


def speed(rows: int, inner: int, columns: int, dtype: torch.dtype) -> float:
    """FLOP per CPU second of a product."""
    a, b = torch.randn(rows, inner).to(dtype), torch.randn(columns, inner).to(dtype)
    a @ b.T
    begin, runs = time.process_time(), 0
    while time.process_time() - begin < 2.0:
        a @ b.T
        runs += 1
    return 2 * rows * inner * columns * runs / (time.process_time() - begin)


def write_text(folder: Path, tokens: int) -> Path:
    """Documents of about 64 tokens that mean nothing."""
    tokenizer, generator = tiny_tokenizer(), torch.Generator().manual_seed(1)
    texts, count = [], 0
    while count < tokens:
        text = tokenizer.decode(torch.randint(40, 320, (60,), generator=generator).tolist())
        texts.append(text)
        count += len(tokenizer(text)["input_ids"])
    path = folder / "text.json"
    path.write_text(json.dumps(texts))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--tokens", type=int, default=3000)
    parser.add_argument("--layers", default="9,18,27")
    parser.add_argument("--limit", type=float, default=2.0, help="GB")
    parser.add_argument("--facts", type=int, default=0)
    parser.add_argument("--dtype", default="bfloat16")
    arguments = parser.parse_args()
    if not (arguments.folder / "model.safetensors.index.json").exists():
        make_checkpoint(arguments.folder, small=arguments.small)
    with TemporaryDirectory(dir=arguments.folder.parent) as place:
        print(json.dumps(run(arguments, Path(place)), indent=1))


def run(arguments: argparse.Namespace, place: Path) -> dict[str, Any]:
    limit, found = int(arguments.limit * 1e9), dict[str, Any]()
    layers = [int(layer) for layer in arguments.layers.split(",")]
    text = write_text(place, arguments.tokens)
    config = json.loads((arguments.folder / "config.json").read_text())
    d, inner, depth = config["hidden_size"], config["intermediate_size"], layers[-1] + 1
    groups, heads, width = (config[key] for key in ("num_key_value_heads", "num_attention_heads", "head_dim"))
    block = d * (2 * heads * width + 2 * groups * width + 3 * inner)
    found |= {"limit_gb": arguments.limit, "parameters_run": block * depth, "threads": torch.get_num_threads()}
    dtype = getattr(torch, arguments.dtype)
    products = speed(1024, d, inner, dtype), speed(inner, 1024, inner, torch.float32)
    found["gflop_s"] = [round(one / 1e9, 1) for one in products]
    with measured("init", found, limit):
        repository = Repository.init(place / "repository", arguments.folder)
    repository.config("dtype", arguments.dtype)
    repository.config("device", "cpu" if arguments.whole else "stream")
    written = worktree.context_templates

    moments = ExitStack()

    def contexts(*given: Any, **options: Any) -> Any:
        moments.close()
        print(json.dumps(found), file=sys.stderr, flush=True)
        with measured("contexts, written token by token", found, limit):
            return written(*given, **options)

    worktree.context_templates = contexts
    moments.enter_context(measured("metric", found, limit))
    shown = repository.metric_compute(layers=layers, text=[text])
    floor = 2 * block * depth * shown.tokens / products[0] + len(layers) * 2 * inner**2 * shown.tokens / products[1]
    found |= {"tokens": shown.tokens, "floor_cpu_s": round(floor, 1)}
    found["times_floor"] = round(found["metric"]["cpu_s"] / floor, 2)
    found["factors"] = sorted(path.stem[:12] for path in (place / "repository/.patchhub/cache/metric").rglob("*.npy"))
    if arguments.facts:
        facts = [
            {"prompt": "{} lives in", "subject": f"Ada Number {number}", "target_new": "Paris"}
            for number in range(arguments.facts)
        ]
        with measured("commit", found, limit):
            done = repository.commit(
                facts, message="facts", set={"layers": layers[:1], "steps": 2, "repairs": 0}, force=True
            )
        found["patches"] = [str(done)[:400]]
    return found


if __name__ == "__main__":
    main()
