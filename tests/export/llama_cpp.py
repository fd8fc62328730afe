"""llama.cpp for tests: GGUF files of small models, written here, and its own server (the wheel `xllamacpp`), in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

_SERVER = """
import sys
import xllamacpp

model, *adapters = sys.argv[1:]
given = xllamacpp.CommonParams()
given.model.path, given.port, given.n_ctx, given.n_parallel, given.warmup, given.verbosity = model, 0, 96, 1, False, 0
given.cpuparams.n_threads = given.cpuparams_batch.n_threads = 1
loras = []
for path in adapters:
    lora = xllamacpp.CommonAdapterLoraInfo()
    lora.path, lora.scale = path, 1.0
    loras.append(lora)
given.lora_adapters = loras
server = xllamacpp.Server(given)
print(server.listening_address, flush=True)
sys.stdin.read()
"""


@contextmanager
def llama_server(model: Path, *adapters: Path) -> Iterator[str]:
    """llama.cpp's server of a model with adapters; yields its address."""
    command = [sys.executable, "-c", _SERVER, str(model), *map(str, adapters)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as process:  # type: ignore[call-overload]
        try:
            address = process.stdout.readline().strip()
            assert address.startswith("http"), process.stderr.read()
            yield address
        finally:
            process.kill()


def ask(address: str, path: str, body: Any) -> Any:
    """What the server answers to a question in JSON."""
    request = urllib.request.Request(
        f"{address}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.loads(answer.read())


def continued(address: str, prompt: str, tokens: int = 8) -> str:
    """The greedy continuation of a text, from the weights as they are now."""
    body = {"prompt": prompt, "n_predict": tokens, "temperature": 0, "cache_prompt": False}
    return str(ask(address, "/completion", body)["content"])


def scaled(address: str, scale: float) -> None:
    """Switch the server's first adapter on, off or to a part."""
    assert ask(address, "/lora-adapters", [{"id": 0, "scale": scale}])["success"]


def write_base(folder: Path, file: Path) -> Path:
    """A checkpoint of a small Llama or GPT-2 with a byte-level tokenizer as GGUF in float32."""
    import gguf

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    family = {"llama": _llama, "gpt2": _gpt2}[config["model_type"]]
    writer = gguf.GGUFWriter(str(file), config["model_type"])
    layers = family(writer, config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[config["model_type"].upper()], layers)
    for name, tensor in load_file(folder / "model.safetensors").items():
        base, _, ending = name.rpartition(".")
        array = np.asarray(tensor, np.float32)
        if config["model_type"] == "gpt2" and array.ndim == 2 and "wte" not in name and "wpe" not in name:
            array = array.T
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(base.rpartition(".")[2])
        if (
            heads and config["model_type"] == "llama"
        ):  # its rotary pairs are neighbours in llama.cpp, halves in transformers
            count = config[heads]
            array = array.reshape(count, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        found = names.get_name(base) or names.get_name(base.removeprefix("transformer."))
        writer.add_tensor(f"{found}.{ending}", np.ascontiguousarray(array))
    _tokenizer(writer, folder)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _llama(writer: Any, config: dict[str, Any]) -> int:
    layers = int(config["num_hidden_layers"])
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(layers)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    return layers


def _gpt2(writer: Any, config: dict[str, Any]) -> int:
    layers = int(config["n_layer"])
    writer.add_context_length(config["n_positions"])
    writer.add_embedding_length(config["n_embd"])
    writer.add_block_count(layers)
    writer.add_feed_forward_length(config.get("n_inner") or 4 * config["n_embd"])
    writer.add_head_count(config["n_head"])
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    return layers


def _tokenizer(writer: Any, folder: Path) -> None:
    import gguf

    found = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    special = {token["id"] for token in found["added_tokens"]}
    ids = {place: token for token, place in found["model"]["vocab"].items()}
    ids |= {token["id"]: token["content"] for token in found["added_tokens"]}
    tokens = [ids.get(place, f"[PAD{place}]") for place in range(config["vocab_size"])]
    kinds = [
        gguf.TokenType.CONTROL if place in special else gguf.TokenType.NORMAL if place in ids else gguf.TokenType.UNUSED
        for place in range(len(tokens))
    ]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) if isinstance(pair, list) else pair for pair in found["model"]["merges"]])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)
