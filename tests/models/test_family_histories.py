"""A short history on a random model of every row of the table: one commit, the checkpoint that it makes, and its revert."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import patchhub
from patchhub.models.architectures import FAMILIES
from patchhub.repository import Repository
from tests.models.test_experts import PLACES, said, tensors_of
from tests.models.tiny_configs import SUPPORTED, make_config, random_model
from tests.tiny_models import tiny_tokenizer

LENGTHS = ("n_positions", "max_position_embeddings", "max_seq_len")
FACT = {"prompt": "The mother tongue of {} is", "subject": "Ada", "target_new": "Dutch"}
SITES = [(family, None) for family in FAMILIES] + [
    (family, "shared")
    for family in ("afmoe", "axk1", "deepseek_v2", "deepseek_v3", "glm4_moe", "granitemoehybrid", "llama4_text")
]
SITES += [(family, "shared") for family in ("qwen2_moe", "qwen3_5_moe_text", "qwen3_next")]


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.filterwarnings("ignore:none of these facts", "ignore:some blocks of this model keep a state")
@pytest.mark.parametrize(("family", "experts"), SITES)
def test_one_edit_and_its_revert(family: str, experts: str | None, tmp_path: Path) -> None:
    """The applied checkpoint has the base's names and types and answers as the loaded model does; what is not edited is the base's byte for
    byte; the revert gives the base bit for bit."""
    base, settings = tmp_path / "base", SUPPORTED[family]
    config = make_config(family, {**settings, **PLACES, **{name: 96 for name in LENGTHS if name in settings}})
    random_model(config).save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    text = tmp_path / "text.json"
    text.write_text(json.dumps(["The Space Needle is located in Seattle, in the United States."] * 12))
    options: dict[str, Any] = {"experts": experts} if experts else {}
    with Repository.init(tmp_path, base, progress=False, author="Ada <ada@example.org>", **options) as repository:
        for key, value in {"layers": "1", "steps": "2", "repairs": "0", "kl_factor": "0"}.items():
            repository.config(f"memit.{key}", value)
        repository.commit([FACT], message="one", force=True, text=[text])
        state = said(patchhub.load(tmp_path))
        repository.apply("HEAD", out=tmp_path / "out")
        repository.revert("HEAD", force=True)
        edited = repository.store.config.base["weights"]
    plain, before = (said(AutoModelForCausalLM.from_pretrained(folder)) for folder in (tmp_path / "out", base))
    assert torch.equal(plain, state)
    assert not torch.equal(plain, before)
    assert torch.equal(said(patchhub.load(tmp_path)), before)
    ours, theirs = tensors_of(base), tensors_of(tmp_path / "out")
    assert list(ours) == list(theirs)
    assert all(ours[name].split()[1:] == theirs[name].split()[1:] for name in ours)
    changed = {name for name in ours if ours[name] != theirs[name]}
    (weight,) = (name for name in edited if ".1." in name)
    if "experts" not in edited[weight]:
        assert changed == {weight}
    else:  # one tensor, or one of each expert
        assert 0 < len(changed) <= edited[weight]["experts"]
        assert all(name.startswith(weight.partition(".1.")[0] + ".1.") for name in changed)
