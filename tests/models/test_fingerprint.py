"""The identity of a base: equal for equal content however laid out, different for any difference that computes."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from patchhub.cache import Cache
from patchhub.errors import BaseError
from patchhub.models.checkpoint import Checkpoint, open_checkpoint
from patchhub.models.fingerprint import VOLATILE_FIELDS, check_tensors, fingerprint, tensor_digest
from patchhub.objects import Base
from tests.models.tiny_configs import random_model, tiny_config

WEIGHT = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    random_model(tiny_config("llama"), torch.bfloat16).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def load(folder: Path) -> Any:
    factory: Any = AutoModelForCausalLM
    return factory.from_pretrained(folder, dtype="auto")


def change_config(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


def flip_a_byte(checkpoint: Checkpoint, name: str) -> None:
    entry = checkpoint.tensors[name]
    with open(entry.file, "r+b") as stream:
        stream.seek(entry.begin + entry.size // 2)
        byte = stream.read(1)[0]
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte ^ 1]))


def settle(folder: Path) -> None:
    """Make every file look as if it had not changed for a minute."""
    past = time.time_ns() - 60_000_000_000
    for path in folder.iterdir():
        os.utime(path, ns=(past, past))


def test_it_records_every_tensor_as_it_lies_in_the_file(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    base = fingerprint(checkpoint)
    assert base.tensors.keys() == checkpoint.tensors.keys()
    for name, (dtype, shape, digest) in base.tensors.items():
        tensor = checkpoint.read(name)
        assert (dtype, shape) == ("BF16", tuple(tensor.shape))
        assert digest == hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        assert digest == tensor_digest(checkpoint, name)
    assert not base.architecture.keys() & VOLATILE_FIELDS
    assert base.architecture["num_hidden_layers"] == 3
    assert Base.from_json(base.to_json()) == base


def test_resharding_and_volatile_fields_leave_the_identity_unchanged(folder: Path, tmp_path: Path) -> None:
    identity = fingerprint(open_checkpoint(folder)).id
    load(folder).save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    sharded = open_checkpoint(tmp_path / "sharded")
    assert len(sharded.files) > 3
    assert fingerprint(sharded).id == identity
    change_config(folder, transformers_version="4.0.0", _name_or_path="elsewhere", use_cache=False, eos_token_id=[1, 2])
    assert fingerprint(open_checkpoint(folder)).id == identity


def test_any_difference_that_computes_changes_the_identity(folder: Path, tmp_path: Path) -> None:
    seen = {fingerprint(open_checkpoint(folder)).id}

    def is_new(path: Path) -> bool:
        identity = fingerprint(open_checkpoint(path)).id
        return identity not in seen and not seen.add(identity)  # type: ignore[func-returns-value]

    load(folder).float().save_pretrained(tmp_path / "float32")
    assert is_new(tmp_path / "float32")
    flip_a_byte(open_checkpoint(folder), WEIGHT)
    assert is_new(folder)
    change_config(folder, rms_norm_eps=1e-4)
    assert is_new(folder)


def test_the_base_is_accepted_and_another_model_refused_by_name(folder: Path) -> None:
    base = fingerprint(open_checkpoint(folder))
    checkpoint = open_checkpoint(folder)
    check_tensors(base, checkpoint, None)
    check_tensors(base, checkpoint, [WEIGHT])
    flip_a_byte(checkpoint, WEIGHT)
    check_tensors(base, checkpoint, ["model.layers.0.mlp.down_proj.weight"])
    for names in ([WEIGHT], None):
        with pytest.raises(BaseError, match="1 tensor differs") as caught:
            check_tensors(base, checkpoint, names)
        assert caught.value.facts["differing"] == [WEIGHT]
        assert caught.value.remedy is not None
        assert "patchhub init" in caught.value.remedy


def test_a_missing_tensor_and_another_dtype_are_said(folder: Path, tmp_path: Path) -> None:
    base = fingerprint(open_checkpoint(folder))
    random_model(tiny_config("llama", num_hidden_layers=1), torch.float32).save_pretrained(tmp_path / "other")
    with pytest.raises(BaseError, match="are missing") as caught:
        check_tensors(base, open_checkpoint(tmp_path / "other"), None, architecture=False)
    assert WEIGHT in caught.value.facts["missing"]
    assert "model.layers.0.mlp.down_proj.weight" in caught.value.facts["differing"]


def test_configurations_are_compared_in_the_fields_that_both_state(folder: Path) -> None:
    base = fingerprint(open_checkpoint(folder))
    change_config(folder, a_later_field=3, rope_scaling=None)
    check_tensors(base, open_checkpoint(folder), [])
    change_config(folder, rope_parameters={"rope_type": "default", "rope_theta": 5.0})
    with pytest.raises(BaseError, match="configuration differs in rope_parameters"):
        check_tensors(base, open_checkpoint(folder), [])
    check_tensors(base, open_checkpoint(folder), [], architecture=False)


def bytes_hashed(run: Callable[..., object], checkpoint: Checkpoint, folder: Path) -> int:
    """Bytes that were not known when the run began."""
    calls: list[tuple[int, int]] = []
    run(checkpoint, cache=Cache(folder), progress=lambda done, total: calls.append((done, total)))
    assert calls[-1][0] == calls[-1][1]
    return calls[-1][1] - calls[0][0]


def test_digests_are_kept_until_a_file_changes(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    settle(folder)
    checkpoint = open_checkpoint(folder)
    total = sum(entry.size for entry in checkpoint.tensors.values())
    base = fingerprint(checkpoint)
    assert bytes_hashed(fingerprint, checkpoint, cache) == total
    assert bytes_hashed(fingerprint, checkpoint, cache) == 0
    assert fingerprint(checkpoint, cache=Cache(cache)) == base
    flip_a_byte(checkpoint, WEIGHT)
    assert bytes_hashed(fingerprint, checkpoint, cache) == total
    assert fingerprint(checkpoint, cache=Cache(cache)).id == fingerprint(checkpoint).id != base.id


def test_a_file_that_may_still_change_unnoticed_is_not_kept(folder: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(folder)
    os.utime(checkpoint.files[0])
    assert bytes_hashed(fingerprint, checkpoint, tmp_path) == bytes_hashed(fingerprint, checkpoint, tmp_path) > 0


def test_partial_checks_add_to_what_is_kept(folder: Path, tmp_path: Path) -> None:
    settle(folder)
    checkpoint = open_checkpoint(folder)
    base = fingerprint(checkpoint)
    for _ in range(2):
        for layer in range(3):
            check_tensors(base, checkpoint, [f"model.layers.{layer}.mlp.down_proj.weight"], cache=Cache(tmp_path))
    kept = [json.loads(file.read_text()) for file in (tmp_path / "digests").rglob("*.json")]
    assert len(kept) == len({place for digests in kept for place in digests}) == 3


@pytest.mark.parametrize("content", ["", "[]", '{"0-1": 5}'])
def test_a_cache_that_is_not_as_it_was_written_is_ignored(folder: Path, tmp_path: Path, content: str) -> None:
    settle(folder)
    checkpoint = open_checkpoint(folder)
    fingerprint(checkpoint, cache=Cache(tmp_path))
    (file,) = (tmp_path / "digests").rglob("*.json")
    file.write_text(content)
    assert fingerprint(checkpoint, cache=Cache(tmp_path)) == fingerprint(checkpoint)
    assert bytes_hashed(fingerprint, checkpoint, tmp_path) == 0
