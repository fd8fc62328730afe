"""Exported adapters under SGLang's rules, by its own reader of adapters where the package is here (`pip install --no-deps sglang`)."""

from __future__ import annotations

import ast
import importlib.util
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Optional, Union

import pytest

from patchhub.porcelain.exchange import export_peft
from patchhub.progress import Silent
from tests.export.models import model_folder, model_store

FOUND = importlib.util.find_spec("sglang")
PLACES = [Path(place) / "srt" / "lora" for place in (FOUND.submodule_search_locations or ())] if FOUND else []
LORA = next((place for place in PLACES if (place / "lora_config.py").is_file()), None)

pytestmark = pytest.mark.skipif(LORA is None, reason="SGLang is not here")


def reader() -> Any:
    """SGLang's class of an adapter's configuration, from its file alone: the package imports kernels."""
    assert LORA is not None
    spec = importlib.util.spec_from_file_location("sglang_lora_config", LORA / "lora_config.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.LoRAConfig


def normalised(targets: list[str]) -> set[str]:
    """What SGLang makes of ``target_modules``, by its own function."""
    assert LORA is not None
    tree = ast.parse((LORA / "utils.py").read_text(encoding="utf-8"))
    name = "get_normalized_target_modules"
    (found,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)
    names: dict[str, Any] = {"Iterable": Iterable, "Union": Union, "Optional": Optional}
    exec(compile(ast.Module([found], []), str(LORA / "utils.py"), "exec"), names)
    return set(names[name](targets))


def scale(config: Any) -> float:
    """SGLang's one scale of an adapter (``LoRAAdapter`` in its ``lora.py``, which imports kernels)."""
    assert LORA is not None
    (line,) = (
        line for line in (LORA / "lora.py").read_text(encoding="utf-8").splitlines() if "self.scaling: float" in line
    )
    return float(eval(line.partition("=")[2].replace("self.config", "config"), {"config": config}))


@pytest.mark.parametrize("every_layer", [False, True])
def test_sglang_reads_what_peft_does(every_layer: bool, tmp_path: Path) -> None:
    """One scale of 1, no rank or alpha of a module's own, no DoRA, no tokens, a list of modules that it knows by their last names."""
    base = model_folder(tmp_path / "base", "llama")
    with model_store(tmp_path / "store", base, range(3)) as store:
        folder = export_peft(store, "HEAD", tmp_path / "out", Silent(), every_layer=every_layer).out
    config = reader()(path=str(folder))
    told = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config.r, config.lora_alpha, scale(config)) == (told["r"], told["r"], 1.0)
    assert not getattr(config, "rank_overrides", {})
    assert not getattr(config, "alpha_overrides", {})
    assert not getattr(config, "use_dora", False)
    assert not config.lora_added_tokens_size
    assert isinstance(config.target_modules, list)
    assert normalised(config.target_modules) == {"down_proj"}
