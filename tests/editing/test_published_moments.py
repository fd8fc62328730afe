"""Files of the published editors' second moments, as numpy.savez writes the state of their running sum."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from patchhub.editing.metric import read_moment, weight_of
from patchhub.errors import SettingsError

WIDTH, TOKENS = 12, 500
WEIGHTS = [f"transformer.h.{layer}.mlp.c_proj.weight" for layer in (0, 1, 10)]


def keys(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((TOKENS, WIDTH)).astype(np.float32)


def write(path: Path, **changes: Any) -> Path:
    """The fields of util/runningstats.py: CombinedStat(mom2=SecondMoment()) and the arguments of tally."""
    k = keys()
    state = {
        "mom2.constructor": "util.runningstats.SecondMoment()",
        "mom2.count": TOKENS,
        "mom2.mom2": k.T @ k,
        "sample_size": 100000,
        **changes,
    }
    np.savez(path, **{name: value for name, value in state.items() if value is not None})
    return path


def test_the_mean_over_tokens_is_read(tmp_path: Path):
    found = read_moment(write(tmp_path / "a.npz"), WIDTH)
    assert found.tokens == TOKENS
    assert found.moment.dtype == np.float32
    np.testing.assert_allclose(found.moment, (keys().T @ keys()) / TOKENS, rtol=1e-5, atol=1e-6)


def test_the_digest_is_that_of_the_moment(tmp_path: Path):
    one = read_moment(write(tmp_path / "a.npz"), WIDTH)
    same = read_moment(write(tmp_path / "b.npz", sample_size=7), WIDTH)
    other = read_moment(write(tmp_path / "c.npz", **{"mom2.count": TOKENS + 1}), WIDTH)
    assert one.digest == same.digest != other.digest


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mom2.mom2": None}, "mom2.mom2"),
        ({"mom2.count": None}, "mom2.count"),
        ({"mom2.count": 0}, "above 0"),
        ({"mom2.mom2": np.ones((WIDTH, WIDTH + 1))}, r"shape \(12, 13\)"),
        ({"mom2.mom2": np.eye(WIDTH, dtype=np.int64)}, "shape"),
        ({"mom2.mom2": np.full((WIDTH, WIDTH), np.nan)}, "not a number"),
        ({"mom2.mom2": -np.eye(WIDTH)}, "symmetric"),
        ({"mom2.mom2": np.triu(np.ones((WIDTH, WIDTH)))}, "symmetric"),
        ({"mom2.mom2": np.array([{}] * 3)}, "pickle"),
    ],
)
def test_what_is_no_second_moment_is_refused(tmp_path: Path, changes, words):
    path = write(tmp_path / "a.npz", **changes)
    with pytest.raises(SettingsError, match=words) as caught:
        read_moment(path, WIDTH)
    assert caught.value.facts == {"file": str(path)}


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"not an archive"])
def test_what_is_no_archive_is_refused(tmp_path: Path, content):
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(SettingsError, match="cannot be used as a second moment"):
        read_moment(tmp_path / "a.npz", WIDTH)
    with pytest.raises(SettingsError, match="cannot be used as a second moment"):
        read_moment(tmp_path / "missing.npz", WIDTH)


@pytest.mark.parametrize("layer", [0, 1, 10])
def test_a_file_is_known_by_its_name(layer):
    name = f"stats/gpt2-xl/wikipedia_stats/transformer.h.{layer}.mlp.c_proj_float32_mom2_100000.npz"
    assert weight_of(Path(name), WEIGHTS) == f"transformer.h.{layer}.mlp.c_proj.weight"
    assert weight_of(Path(f"transformer.h.{layer}.mlp.c_proj.npz"), WEIGHTS) == WEIGHTS[[0, 1, 10].index(layer)]


def test_a_name_that_says_no_weight_is_refused():
    with pytest.raises(SettingsError, match="does not say which weight") as caught:
        weight_of(Path("layer3.npz"), WEIGHTS)
    assert "3=layer3.npz" in str(caught.value.remedy)
