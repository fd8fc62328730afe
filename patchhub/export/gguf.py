"""An adapter as llama.cpp and Ollama read one: a GGUF file of low-rank factors, and Ollama's Modelfile. NumPy, and the extra `gguf`.

llama.cpp names tensors in its own words (`blk.3.ffn_down.weight`) and stores every weight as (out, in), whatever the checkpoint does;
factors of a weight W are `W.lora_a` (rank, in) and `W.lora_b` (out, rank), and the change is B A times `adapter.lora.alpha` over the
rank (ggml-org/llama.cpp, convert_lora_to_gguf.py and src/llama-adapter.cpp). With alpha equal to the rank the scale is 1."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from patchhub.delta import LowRank
from patchhub.errors import SettingsError
from patchhub.export.peft import Adapter, module_of

_EXTRA: Final = "Install the extra that writes it: pip install 'patchhub[gguf]'."
_ARCHITECTURES: Final[Mapping[str, str]] = {
    "cohere": "command-r",
    "cohere2": "cohere2",
    "exaone4": "exaone4",
    "falcon": "falcon",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3": "gemma3",
    "gemma3_text": "gemma3",
    "glm4": "glm4",
    "gpt2": "gpt2",
    "gpt_neox": "gptneox",
    "gptj": "gptj",
    "granite": "granite",
    "llama": "llama",
    "minicpm3": "minicpm3",
    "mistral": "llama",
    "olmo": "olmo",
    "olmo2": "olmo2",
    "phi": "phi2",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "smollm3": "smollm3",
    "stablelm": "stablelm",
    "starcoder2": "starcoder2",
}
"""What llama.cpp calls an architecture, by transformers' ``model_type``."""

_MOVED: Final = ("attn_q", "attn_k", "attn_qkv")
"""Weights whose rows llama.cpp's converter puts into another order for some architectures."""


def write_adapter(adapter: Adapter, model_type: str, layers: int, file: Path, *, base: str | None) -> None:
    """Write an adapter as GGUF; read it back with `read_adapter`.

    Args:
        layers: how many blocks the base has.
        base: the base's name on the Hub, if it has one.

    Raises:
        SettingsError: the extra is not there, llama.cpp does not know the architecture, or a weight has no plain counterpart there.
    """
    gguf = _library()
    architecture = _ARCHITECTURES.get(model_type)
    if architecture is None:
        raise SettingsError(
            f"it is not known what llama.cpp calls a model of type {model_type!r}",
            remedy="Write the whole model with `patchhub apply` and convert it with llama.cpp's convert_hf_to_gguf.py.",
        )
    known = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(known[architecture], layers)
    tensors = {_name(names, weight, model_type): factor for weight, factor in adapter.factors.items()}
    writer = gguf.GGUFWriter(str(file), architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(adapter.rank))
    writer.add_name(file.stem)
    if base is not None:
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, base.rpartition("/")[2])
        writer.add_base_model_repo_url(0, f"https://huggingface.co/{base}")
    for name, factor in sorted(tensors.items()):
        writer.add_tensor(f"{name}.lora_a", np.ascontiguousarray(factor.A, np.float32))
        writer.add_tensor(f"{name}.lora_b", np.ascontiguousarray(factor.B, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_adapter(file: Path) -> dict[str, LowRank]:
    """The change of each weight, by llama.cpp's name, under its rule: alpha over the rank of the factors, times B A."""
    reader = _library().GGUFReader(str(file))
    alpha = float(reader.fields["adapter.lora.alpha"].contents())
    tensors = {tensor.name: np.asarray(tensor.data, np.float32) for tensor in reader.tensors}
    found = {}
    for name, factor in tensors.items():
        if name.endswith(".lora_a"):
            weight = name.removesuffix(".lora_a")
            scaled = tensors[f"{weight}.lora_b"] * np.float32(alpha / factor.shape[0])
            found[weight] = LowRank(scaled, np.array(factor))
    return found


def names_in_llama_cpp(weights: Mapping[str, Any], model_type: str, layers: int) -> dict[str, str]:
    """What llama.cpp calls each weight."""
    gguf = _library()
    known = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(known[_ARCHITECTURES[model_type]], layers)
    return {weight: _name(names, weight, model_type) for weight in weights}


def modelfile(base: str | None, adapter: str) -> str:
    """Ollama's description of the base with the adapter: `ollama create NAME -f Modelfile`."""
    about = "# FROM is the base as Ollama knows it: a name of its library, or the GGUF file of the same weights."
    return f"{about}\nFROM {base or 'BASE'}\nADAPTER ./{adapter}\n"


def _name(names: Any, weight: str, model_type: str) -> str:
    plain = module_of(weight).replace("model.language_model.", "model.").replace("language_model.", "")
    name = names.get_name(plain)
    if name is None or name.rpartition(".")[2] in _MOVED:
        raise SettingsError(
            f"{weight} has no plain counterpart in llama.cpp's form of a {model_type} model",
            remedy="Write a PEFT adapter with `patchhub export peft`, and convert it with llama.cpp's convert_lora_to_gguf.py.",
            weight=weight,
        )
    return f"{name}.weight"


def _library() -> Any:
    try:
        import gguf
    except ImportError:
        raise SettingsError("GGUF files cannot be written or read here", remedy=_EXTRA) from None
    return gguf
