"""A checkpoint is read as transformers reads it, or refused with a remedy; a patched copy differs where it should."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from patchhub.errors import BaseError, PatchhubError, RepositoryError, SettingsError
from patchhub.models.checkpoint import INDEX, Checkpoint, open_checkpoint, read_header
from patchhub.models.fingerprint import write_patched
from tests.models.tiny_configs import random_model, tiny_config

GPT2_WEIGHT = "transformer.h.1.mlp.c_proj.weight"
LLAMA_WEIGHT = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A sharded bfloat16 checkpoint with a tokenizer."""
    folder = tmp_path / "llama"
    random_model(tiny_config("llama"), torch.bfloat16).save_pretrained(folder, max_shard_size="20KB")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(96)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    fast: Any = PreTrainedTokenizerFast
    fast(tokenizer_object=words, unk_token="w0").save_pretrained(folder)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "README.md").write_text("the base's card")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    return folder


@pytest.fixture
def gpt2(tmp_path: Path) -> Path:
    """A checkpoint of the bare decoder in one file: names without the prefix of the causal language model."""
    folder = tmp_path / "gpt2"
    random_model(tiny_config("gpt2"), torch.float16).transformer.save_pretrained(folder)
    return folder


def single_file(folder: Path) -> Path:
    return folder / "model.safetensors"


def opened_by_transformers(folder: Path) -> dict[str, Tensor]:
    factory: Any = AutoModelForCausalLM
    return dict(factory.from_pretrained(folder, dtype="auto").state_dict())


# --- reading --------------------------------------------------------------------------------------------------------


def test_every_tensor_is_read_as_transformers_reads_it(llama: Path, gpt2: Path) -> None:
    for folder in (llama, gpt2):
        checkpoint = open_checkpoint(folder)
        assert all(entry.size > 0 for entry in checkpoint.tensors.values())
        state = opened_by_transformers(folder)
        for parameter, tensor in state.items():
            if parameter == "lm_head.weight" and folder == gpt2:
                continue  # tied to the embedding
            read = checkpoint.read(checkpoint.resolve_name(parameter))
            assert read.dtype == tensor.dtype
            assert torch.equal(read, tensor)
    assert len(open_checkpoint(llama).files) > 3
    assert open_checkpoint(gpt2).resolve_name(GPT2_WEIGHT) == "h.1.mlp.c_proj.weight"


@pytest.mark.parametrize(
    "dtype",
    [torch.bool, torch.uint8, torch.int64, torch.float64, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2],
)
def test_every_type_and_empty_and_scalar_tensors_are_read(tmp_path: Path, dtype: torch.dtype) -> None:
    shapes = [(), (0, 3), (5,), (2, 3, 4)]
    tensors = {f"t{len(shape)}{shape.count(0)}": torch.randint(0, 2, shape).to(dtype) for shape in shapes}
    save_file(tensors, single_file(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    checkpoint = open_checkpoint(tmp_path)
    for name, tensor in tensors.items():
        read = checkpoint.read(name)
        assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(read.double(), tensor.double())


def test_a_name_that_is_ambiguous_or_absent_is_refused(gpt2: Path) -> None:
    checkpoint = open_checkpoint(gpt2)
    with pytest.raises(BaseError, match="no tensors that could be the parameter nothing"):
        checkpoint.resolve_name("nothing")
    with pytest.raises(BaseError, match="3 tensors"):
        checkpoint.resolve_name("mlp.c_proj.weight")
    with pytest.raises(BaseError, match=r"no tensor h\.9"):
        checkpoint.read("h.9.mlp.c_proj.weight")


# --- refusals -------------------------------------------------------------------------------------------------------


def refused(folder: Path | str, match: str, revision: str | None = None) -> None:
    with pytest.raises(PatchhubError, match=match) as caught:
        open_checkpoint(folder, revision)
    assert caught.value.remedy
    assert "\n" not in caught.value.message


def test_what_is_no_checkpoint_is_refused(tmp_path: Path, gpt2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(tmp_path / "absent", "no model folder")
    refused(str(tmp_path / "absent"), "no model folder")
    refused("../absent", "no model folder")
    refused("what is this", "neither a folder nor a valid Hub id")
    refused(gpt2, "has no revision", revision="main")
    refused(tmp_path, "no transformers model folder")
    single_file(gpt2).rename(gpt2 / "pytorch_model.bin")
    refused(gpt2, "no weights in safetensors")
    for text in ("{", "[]", '{"a": NaN}', '{"a": "\\ud800"}', "[" * 100_000):
        (gpt2 / "config.json").write_text(text)
        refused(gpt2, "is not")


def test_an_unreachable_hub_is_said_in_one_sentence(tmp_path: Path) -> None:
    program = """
        from patchhub.errors import BaseError
        from patchhub.models.checkpoint import open_checkpoint
        try:
            open_checkpoint("nobody/nothing", "main")
        except BaseError as error:
            print(error.message, "|", error.remedy)
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == (
        "the model nobody/nothing cannot be downloaded and is not in the local cache"
        " | Go online, or give a local folder.\n"
    )


@settings(max_examples=60)
@given(data=st.data())
def test_a_cut_or_damaged_header_is_refused_or_read_but_never_crashes(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    file = tmp_path_factory.mktemp("cut") / "a.safetensors"
    save_file({"x": torch.arange(6.0).reshape(2, 3), "y": torch.arange(3)}, file)
    whole = bytearray(file.read_bytes())
    length = 8 + int.from_bytes(whole[:8], "little")
    if data.draw(st.booleans()):
        file.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
        with pytest.raises(BaseError, match="not a whole safetensors file"):
            read_header(file)
        return
    whole[data.draw(st.integers(0, length - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(whole)
    with contextlib.suppress(BaseError):
        assert all(length <= e.begin <= e.end <= len(whole) for e in read_header(file).values())


@pytest.mark.parametrize(
    "header",
    [
        {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
        {"x": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}},
        {"x": {"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]}},
        {"x": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}},
        {"x": {"dtype": "F31", "shape": [2], "data_offsets": [0, 8]}},
        {"x": {"dtype": "F32", "shape": [2]}},
        {"x": []},
        {
            "x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
            "y": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        },
        ["x"],
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, header: Any) -> None:
    text = json.dumps(header).encode()
    file = tmp_path / "a.safetensors"
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    with pytest.raises(BaseError, match="not a whole safetensors file"):
        read_header(file)


def test_an_index_that_lies_or_leaves_the_folder_is_refused(llama: Path) -> None:
    index = json.loads((llama / INDEX).read_text())
    name, file = next(iter(index["weight_map"].items()))
    other = next(f for f in index["weight_map"].values() if f != file)
    for changed in ({name: other}, {"absent": file}):
        (llama / INDEX).write_text(json.dumps({"weight_map": {**index["weight_map"], **changed}}))
        refused(llama, "which is not so")
    for outside in ("../a.safetensors", "/etc/passwd", "pickle.bin", 3):
        (llama / INDEX).write_text(json.dumps({"weight_map": {name: outside}}))
        refused(llama, "no valid weight_map")
    (llama / INDEX).write_text(json.dumps(index))
    (llama / other).unlink()
    refused(llama, "cannot be read")


# --- writing --------------------------------------------------------------------------------------------------------


def negated(tensor: Tensor) -> Tensor:
    return -tensor


def differing_tensors(one: Checkpoint, other: Checkpoint) -> set[str]:
    assert one.tensors.keys() == other.tensors.keys()
    return {name for name in one.tensors if not torch.equal(one.read(name), other.read(name))}


@pytest.mark.parametrize("link", [True, False])
def test_a_patched_copy_differs_in_the_replaced_tensor_alone(llama: Path, tmp_path: Path, link: bool) -> None:
    base = open_checkpoint(llama)
    before = {path.name: path.read_bytes() for path in llama.iterdir()}
    calls: list[tuple[int, int]] = []
    out = tmp_path / "deep" / "out"
    write_patched(base, out, {LLAMA_WEIGHT: negated}, link=link, progress=lambda a, b: calls.append((a, b)))

    copy = open_checkpoint(out)
    assert differing_tensors(base, copy) == {LLAMA_WEIGHT}
    assert torch.equal(copy.read(LLAMA_WEIGHT), -base.read(LLAMA_WEIGHT))
    touched = base.tensors[LLAMA_WEIGHT].file.name
    assert {path.name for path in out.iterdir()} == before.keys() - {"README.md", "pytorch_model.bin"}
    for path in out.iterdir():
        assert (path.read_bytes() == before[path.name]) == (path.name != touched)
        weights = path.suffix == ".safetensors"
        assert path.samefile(llama / path.name) == (link and weights and path.name != touched)
    assert {path.name: path.read_bytes() for path in llama.iterdir()} == before
    assert calls[-1][0] == calls[-1][1] == sum(file.stat().st_size for file in base.files)
    assert [path.name for path in out.parent.iterdir()] == ["out"]

    assert torch.equal(opened_by_transformers(out)[LLAMA_WEIGHT], -base.read(LLAMA_WEIGHT))
    assert AutoTokenizer.from_pretrained(out)("w3 w5")["input_ids"] == [3, 5]


def test_a_bare_decoder_in_one_file_keeps_its_names(gpt2: Path, tmp_path: Path) -> None:
    base = open_checkpoint(gpt2)
    write_patched(base, tmp_path / "out", {GPT2_WEIGHT: negated})
    assert differing_tensors(base, open_checkpoint(tmp_path / "out")) == {"h.1.mlp.c_proj.weight"}
    assert torch.equal(
        opened_by_transformers(tmp_path / "out")[GPT2_WEIGHT], -opened_by_transformers(gpt2)[GPT2_WEIGHT]
    )


def test_symbolic_links_are_followed_as_the_hub_cache_has_them(llama: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in llama.iterdir():
        (snapshot / path.name).symlink_to(path)
    write_patched(open_checkpoint(snapshot), tmp_path / "out", {LLAMA_WEIGHT: negated})
    shutil.rmtree(snapshot)
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert differing_tensors(open_checkpoint(llama), open_checkpoint(tmp_path / "out")) == {LLAMA_WEIGHT}


def test_no_existing_folder_is_harmed(llama: Path, tmp_path: Path) -> None:
    base = open_checkpoint(llama)
    out = tmp_path / "out"
    out.mkdir()
    write_patched(base, out, {})
    assert not differing_tensors(base, open_checkpoint(out))
    (out / "mine.txt").write_text("keep")
    with pytest.raises(SettingsError, match="not empty"):
        write_patched(base, out, {LLAMA_WEIGHT: negated})
    assert (out / "mine.txt").read_text() == "keep"
    write_patched(base, out, {LLAMA_WEIGHT: negated}, overwrite=True)
    assert not (out / "mine.txt").exists()
    assert differing_tensors(base, open_checkpoint(out)) == {LLAMA_WEIGHT}
    for target in (llama, llama.parent):
        with pytest.raises(SettingsError, match="the base itself"):
            write_patched(base, target, {}, overwrite=True)
    with pytest.raises(SettingsError, match="is a file"):
        write_patched(base, llama / "config.json", {}, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama", "out"]


def test_only_a_models_folder_is_replaced(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, mine = open_checkpoint(llama), tmp_path / "project"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    mine.mkdir()
    for content in ("", "5", '{"name": "no model"}'):
        (mine / "config.json").write_text(content)
        with pytest.raises(SettingsError, match="not a model's folder"):
            write_patched(base, mine, {}, overwrite=True)
    (tmp_path / "home").mkdir()
    for target in (tmp_path / "home", Path("/")):
        with pytest.raises(SettingsError, match=r"home folder|base itself"):
            write_patched(base, target, {}, overwrite=True)
    assert (mine / "config.json").read_text() == content


def test_a_symbolic_link_stands_for_the_folder_that_it_names(llama: Path, tmp_path: Path) -> None:
    base, real, link = open_checkpoint(llama), tmp_path / "real", tmp_path / "link"
    link.symlink_to(real)
    for _ in range(2):
        write_patched(base, link, {LLAMA_WEIGHT: negated}, overwrite=True)
        assert link.is_symlink()
        assert differing_tensors(base, open_checkpoint(real)) == {LLAMA_WEIGHT}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "llama", "real"]


def test_a_failure_leaves_nothing(llama: Path, tmp_path: Path) -> None:
    def interrupted(tensor: Tensor) -> Tensor:
        raise KeyboardInterrupt

    base = open_checkpoint(llama)
    with pytest.raises(KeyboardInterrupt):
        write_patched(base, tmp_path / "out", {LLAMA_WEIGHT: interrupted})
    with pytest.raises(ValueError, match="cannot replace"):
        write_patched(base, tmp_path / "out", {LLAMA_WEIGHT: Tensor.float})
    with pytest.raises(BaseError, match="no tensors that could be"):
        write_patched(base, tmp_path / "out", {"model.layers.9.mlp.down_proj.weight": negated})
    (tmp_path / "file").write_text("")
    with pytest.raises(RepositoryError, match="cannot write"):
        write_patched(base, tmp_path / "file" / "out", {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "llama"]


def test_a_kill_in_the_middle_leaves_no_out_folder(llama: Path, tmp_path: Path) -> None:
    program = f"""
        import time
        from pathlib import Path
        from patchhub.models.checkpoint import open_checkpoint
        from patchhub.models.fingerprint import write_patched

        def wait(tensor):
            print("waiting", flush=True)
            time.sleep(60)

        write_patched(open_checkpoint({str(llama)!r}), Path({str(tmp_path / "out")!r}), {{{LLAMA_WEIGHT!r}: wait}})
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not (tmp_path / "out").exists()
    write_patched(open_checkpoint(llama), tmp_path / "out", {LLAMA_WEIGHT: negated})
    assert differing_tensors(open_checkpoint(llama), open_checkpoint(tmp_path / "out")) == {LLAMA_WEIGHT}


def test_a_file_cut_after_opening_is_said(gpt2: Path) -> None:
    checkpoint = open_checkpoint(gpt2)
    entry = checkpoint.tensors["h.1.mlp.c_proj.weight"]
    os.truncate(entry.file, entry.begin + 10)
    with pytest.raises(BaseError, match="became shorter"):
        checkpoint.read("h.1.mlp.c_proj.weight")
