"""A model is its configuration, its weights and its tokenizer: nothing else that lies in the folder is loaded or run."""

from __future__ import annotations

import ast
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import patchhub
from patchhub.errors import BaseError, SettingsError
from patchhub.models.architectures import read_model
from patchhub.models.checkpoint import open_checkpoint
from patchhub.models.fingerprint import write_patched
from patchhub.text.tokens import lacks_tokenizer, load_tokenizer
from tests.tiny_models import tiny_model, tiny_tokenizer

SOURCES = sorted(Path(patchhub.__file__).parent.rglob("*.py"))
EVIL = """
from pathlib import Path
Path(__file__).with_name("ran").touch()
class Evil: pass
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model("llama").save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_every_call_that_could_run_a_models_code_says_that_it_must_not() -> None:
    """Left out, ``trust_remote_code`` lets transformers ask the terminal, where `yes` is an answer."""
    calls = [
        (f"{path.name}:{node.lineno}", {keyword.arg: keyword.value for keyword in node.keywords})
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in {"from_pretrained", "from_config"}
    ]
    assert len(calls) >= 4
    for place, keywords in calls:
        said = keywords.get("trust_remote_code")
        assert isinstance(said, ast.Constant), place
        assert said.value is False, place


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_an_adapter_beside_the_weights_is_not_put_on_and_not_copied(folder: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    factory: Any = AutoModelForCausalLM
    plain = factory.from_pretrained(folder).state_dict()
    options = {"target_modules": ["down_proj"], "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    get_peft_model(factory.from_pretrained(folder), LoraConfig(**options)).save_pretrained(tmp_path / "adapter")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(tmp_path / "adapter" / name, folder / name)
    assert factory.from_pretrained(folder).state_dict().keys() != plain.keys()  # what transformers does

    loaded = read_model(folder).state_dict()
    assert loaded.keys() == plain.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in plain.items())

    write_patched(open_checkpoint(folder), tmp_path / "out", {})
    assert not list((tmp_path / "out").glob("adapter*"))
    assert factory.from_pretrained(tmp_path / "out").state_dict().keys() == plain.keys()


def test_code_of_a_model_cannot_be_asked_for(folder: Path) -> None:
    with pytest.raises(SettingsError, match="never runs a model's own code"):
        read_model(folder, trust_remote_code=True)


@pytest.mark.parametrize("reference", [["evil.Evil", None], [None, "evil.Evil"], ["someone/else--evil.Evil", None]])
@pytest.mark.parametrize("known", [False, True])
def test_a_tokenizers_own_code_is_never_run(folder: Path, reference: list[Any], known: bool) -> None:
    file = folder / "tokenizer_config.json"
    fields = json.loads(file.read_text()) | {"auto_map": {"AutoTokenizer": reference}}
    file.write_text(json.dumps(fields | ({} if known else {"tokenizer_class": "Evil"})))
    (folder / "evil.py").write_text(EVIL)
    checkpoint = open_checkpoint(folder)
    if known:  # transformers has the class that is named
        assert lacks_tokenizer(folder) is None
        assert load_tokenizer(checkpoint)("w3 w5")["input_ids"] == tiny_tokenizer()("w3 w5")["input_ids"]
    else:
        with pytest.raises(BaseError, match="Python code of its own, which patchhub never runs"):
            load_tokenizer(checkpoint)
    assert not (folder / "ran").exists()


def test_a_tokenizer_that_is_no_json_is_told_as_that(folder: Path) -> None:
    """transformers alone reads the file; why it could not is looked up afterwards."""
    (folder / "tokenizer.json").write_text("{", encoding="utf-8")
    assert lacks_tokenizer(folder) == "a tokenizer.json that is not valid JSON"
    with pytest.raises(BaseError, match=r"a tokenizer\.json that is not valid JSON"):
        load_tokenizer(open_checkpoint(folder))
