"""The published editors' own code on the facts of `known_facts`: a checkpoint that each leaves, to be asked by that benchmark.

    python -m tests.benchmarks.published --easyedit DIR --model DIR --facts FILE --text FILE --out DIR [--method memit,memit_FE,alphaedit]
        [-n 100] [--hparams FILE] [--set v_lr=0.5 ...]

`--easyedit` is a checkout of EasyEdit, of which the three editors' modules and what they import are used as they stand; its package, which
imports much more, is not. `--facts` is what `known_facts --facts` has written. Second moments are of `--text`, by patchhub's code, in place
of Wikipedia's. Settings are a file of the checkout's `hparams`, with `--set` beside. The name of the model's folder has to hold "llama":
the code looks there for what the model is. CPU seconds, without second moments, are written beside the checkpoint, to `edited.json`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
import types
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from patchhub.editing.metric import second_moments
from patchhub.models.architectures import describe
from patchhub.models.tracing import Stack
from patchhub.objects import Request
from tests.benchmarks.known_facts import chosen_facts

EDITORS: Final = {
    "memit": ("memit_main", "apply_memit_to_model", "MEMITHyperParams", "MEMIT/llama3.2-3b"),
    "memit_FE": ("memit_FE_main", "apply_memit_FE_to_model", "MEMITFEHyperParams", "MEMIT-FE/llama3-8b"),
    "alphaedit": ("AlphaEdit_main", "apply_AlphaEdit_to_model", "AlphaEditHyperParams", "AlphaEdit/llama3-8b"),
}
"""By method: the module, its function, its class of settings and the file of settings that was written for a Llama."""


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    os.chdir(options.out)  # AlphaEdit leaves its projection where it runs, and would take another base's from there
    Path("null_space_project.pt").unlink(missing_ok=True)
    _make_importable(options.easyedit)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "right"
    facts = chosen_facts(json.loads(options.facts.read_bytes()), options.n)
    for method in options.method:
        factory: Any = AutoModelForCausalLM
        model = factory.from_pretrained(options.model, dtype=torch.float32)
        torch.manual_seed(0)
        seconds = edit(method, model, tokenizer, facts, options)
        folder = options.out / method
        model.save_pretrained(folder)
        (folder / "edited.json").write_text(json.dumps({"cpu_s": round(seconds, 1), "facts": len(facts)}))
        print(f"{method}: {len(facts)} facts, {seconds:.1f} CPU s, {folder}", flush=True)


def edit(method: str, model: Any, tokenizer: Any, facts: Sequence[Request], options: argparse.Namespace) -> float:
    """Write the facts into the model with the published code; returns CPU seconds."""
    name, function, settings, file = EDITORS[method]
    module = importlib.import_module(f"easyeditor.models.{method}.{name}")
    hparams = getattr(module, settings).from_hparams(
        str(options.hparams or options.easyedit / "hparams" / f"{file}.yaml")
    )
    changes = {key: json.loads(value) for key, _, value in (one.partition("=") for one in options.set)}
    head = "model.embed_tokens" if model.config.tie_word_embeddings else "lm_head"
    changes |= {"device": "cpu", "model_name": str(options.model), "lm_head_module": head}
    hparams = replace(hparams, **{"v_loss_layer": model.config.num_hidden_layers - 1, **changes})
    moments = _moments(model, tokenizer, hparams.layers, options.text)
    module.layer_stats = lambda *given, **named: _Statistic(moments[given[2]])
    requests = [
        {"case_id": place, "prompt": fact.prompt, "subject": fact.subject, "target_new": fact.target_new}
        for place, fact in enumerate(facts)
    ]
    begun = time.process_time()
    getattr(module, function)(model, tokenizer, requests, hparams)
    return time.process_time() - begun


def _make_importable(checkout: Path) -> None:
    """The editors' modules without what their packages import besides, and without two libraries that they name and do not need."""
    for name, folder in (
        ("easyeditor", "easyeditor"),
        ("easyeditor.models", "easyeditor/models"),
        ("easyeditor.models.rome", "easyeditor/models/rome"),
    ):
        package = types.ModuleType(name)
        package.__path__ = [str(checkout / folder)]
        sys.modules[name] = package
    for name, attribute in (("datasets", "load_dataset"), ("matplotlib", "style"), ("matplotlib.style", "context")):
        module = types.ModuleType(name)
        setattr(module, attribute, None)
        sys.modules.setdefault(name, module)


def _moments(model: Any, tokenizer: Any, layers: Sequence[int], text: Path) -> dict[str, torch.Tensor]:
    """The mean of k k^T by module, as the published code names it."""
    stack = Stack(model, describe(model.config))
    documents = [ids[:256] for ids in tokenizer(json.loads(text.read_bytes()))["input_ids"]]
    found = second_moments(stack, layers, documents)
    return {stack.architecture.ffn_weight(layer).removesuffix(".weight"): found[layer] for layer in layers}


class _Statistic:
    """What the published code asks of its statistics."""

    def __init__(self, moment: torch.Tensor) -> None:
        self._moment = moment

    @property
    def mom2(self) -> _Statistic:
        return self

    def moment(self) -> torch.Tensor:
        return self._moment


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("easyedit", "model", "facts", "text", "out"):
        parser.add_argument(f"--{name}", type=lambda path: Path(path).absolute(), required=True)
    parser.add_argument("--method", type=lambda names: names.split(","), default=list(EDITORS))
    parser.add_argument("-n", type=int, default=100)
    parser.add_argument("--hparams", type=lambda path: Path(path).absolute())
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
