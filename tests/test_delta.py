"""Every operation on changes of weights against the dense matrix in float64, and the pinned bytes of every form."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save

from patchhub.delta import (
    Delta,
    Dense,
    LowRank,
    Sparse,
    add,
    from_factors,
    from_sparse,
    image,
    negative,
    norm,
    read_deltas,
    to_dense,
    write_deltas,
)
from patchhub.errors import CorruptStoreError

SEEDS = st.integers(0, 2**32 - 1)
SIDES = st.integers(1, 9)
DTYPES = st.sampled_from([np.float32, np.float16])


def draw_low_rank(rng: np.random.Generator, shape: tuple[int, int], dtype: type = np.float32) -> LowRank:
    rank = int(rng.integers(0, 4))
    B, A = rng.standard_normal((shape[0], rank)), rng.standard_normal((rank, shape[1]))
    return LowRank(B.astype(dtype), A.astype(dtype))


def draw_dense(rng: np.random.Generator, shape: tuple[int, int], dtype: type = np.float32) -> Dense:
    return Dense(rng.standard_normal(shape).astype(dtype))


def draw_sparse(rng: np.random.Generator, shape: tuple[int, int], dtype: type = np.float32) -> Sparse:
    matrix = rng.standard_normal(shape) * (rng.random(shape) < 0.4)
    return from_sparse(matrix.astype(dtype))


FORMS = {"low rank": draw_low_rank, "dense": draw_dense, "sparse": draw_sparse}


@st.composite
def shapes_and_deltas(draw: st.DrawFn, most: int = 4) -> tuple[tuple[int, int], list[Delta]]:
    rng, shape, dtype = np.random.default_rng(draw(SEEDS)), (draw(SIDES), draw(SIDES)), draw(DTYPES)
    kinds = draw(st.lists(st.sampled_from(sorted(FORMS)), max_size=most))
    return shape, [FORMS[kind](rng, shape, dtype) for kind in kinds]


def oracle(delta: Delta) -> np.ndarray:
    """dW without the code under test: one entry at a time for the packed mask."""
    if isinstance(delta, LowRank):
        return np.einsum("or,ri->oi", delta.B.astype(np.float64), delta.A.astype(np.float64))
    if isinstance(delta, Dense):
        return delta.matrix.astype(np.float64)
    out, inner = delta.shape
    values, matrix = iter(delta.values.tolist()), np.zeros(delta.shape)
    for place in range(out * inner):
        if int(delta.mask[place // 8]) >> (7 - place % 8) & 1:
            matrix[place // inner, place % inner] = next(values)
    assert next(values, None) is None
    return matrix


def dtype_of(delta: Delta) -> np.dtype:
    array = delta.B if isinstance(delta, LowRank) else delta.matrix if isinstance(delta, Dense) else delta.values
    return array.dtype


@settings(deadline=None)
@given(shapes_and_deltas(most=1))
def test_every_form_is_its_dense_matrix(drawn):
    shape, deltas = drawn
    for delta in deltas:
        assert delta.shape == shape
        assert to_dense(delta).dtype == np.float64
        np.testing.assert_allclose(to_dense(delta), oracle(delta), rtol=1e-13, atol=1e-13)


@settings(deadline=None)
@given(shapes_and_deltas(), SEEDS)
def test_sum_negative_image_and_norm_are_the_matrices(drawn, seed):
    shape, deltas = drawn
    matrices = [oracle(delta) for delta in deltas]
    np.testing.assert_allclose(to_dense(add(deltas, shape)), sum(matrices, np.zeros(shape)), rtol=1e-12, atol=1e-12)
    keys = np.random.default_rng(seed).standard_normal((3, shape[1])).astype(np.float32)
    for delta, matrix in zip(deltas, matrices, strict=True):
        np.testing.assert_array_equal(oracle(negative(delta)), -matrix)
        assert type(negative(delta)) is type(delta)
        np.testing.assert_allclose(image(delta, keys), keys.astype(np.float64) @ matrix.T, rtol=1e-12, atol=1e-12)
        assert norm(delta) == pytest.approx(np.sqrt((matrix**2).sum()), rel=1e-12, abs=1e-12)


@settings(deadline=None)
@given(shapes_and_deltas())
def test_a_sum_with_its_negatives_is_nothing(drawn):
    shape, deltas = drawn
    total = add([*deltas, *[negative(delta) for delta in reversed(deltas)]], shape)
    assert np.abs(to_dense(total)).max() <= 1e-12 * (1 + sum(norm(delta) for delta in deltas))


def test_a_sum_stays_low_rank_while_that_is_smaller():
    rng = np.random.default_rng(0)
    parts = [LowRank(rng.standard_normal((40, 9)), rng.standard_normal((9, 60))) for _ in range(3)]
    two, three = add(parts[:2], (40, 60)), add(parts, (40, 60))
    assert isinstance(two, LowRank)
    assert two.rank == 18
    assert isinstance(three, Dense)  # 27 (40 + 60) >= 40 * 60
    assert isinstance(add([], (40, 60)), LowRank)


@settings(deadline=None)
@given(SEEDS, st.integers(1, 40), st.integers(1, 40), st.integers(0, 12))
def test_factors_give_their_product_in_the_smaller_form(seed, out, inner, rank):
    rng = np.random.default_rng(seed)
    B, A = rng.standard_normal((out, rank)), rng.standard_normal((rank, inner))
    delta = from_factors(B, A)
    assert isinstance(delta, Dense if rank * (out + inner) >= out * inner else LowRank)
    assert (delta.shape, dtype_of(delta)) == ((out, inner), np.float32)
    assert np.linalg.norm(oracle(delta) - B @ A) <= 1e-6 * np.linalg.norm(B @ A)


def test_ill_conditioned_factors_lose_nothing():
    """B A with factors whose columns almost cancel: rounding each to float32 as given would lose everything."""
    rng = np.random.default_rng(1)
    direction, noise = rng.standard_normal((1, 200)), rng.standard_normal((2, 200))
    A = np.repeat(direction, 2, axis=0) * 1e5 + noise
    B = rng.standard_normal((300, 1)) @ np.array([[1.0, -1.0]]) + 1e-7 * rng.standard_normal((300, 2))
    exact, delta = B @ A, from_factors(B, A)
    assert isinstance(delta, LowRank)
    naive = B.astype(np.float32).astype(np.float64) @ A.astype(np.float32).astype(np.float64)
    assert np.linalg.norm(naive - exact) > 1e-3 * np.linalg.norm(exact)
    assert np.linalg.norm(oracle(delta) - exact) <= 3e-7 * np.linalg.norm(exact)


def test_the_norm_of_nearly_cancelling_factors_is_right():
    rng = np.random.default_rng(2)
    B, A = rng.standard_normal((50, 3)), rng.standard_normal((3, 70))
    small = 1e-9 * rng.standard_normal((50, 3))
    delta = LowRank(np.hstack([B + small, -B]), np.vstack([A, A]))
    assert norm(delta) == pytest.approx(np.linalg.norm((delta.B[:, :3] + delta.B[:, 3:]) @ A), rel=1e-5)
    assert norm(LowRank(np.zeros((4, 0)), np.zeros((0, 5)))) == 0.0


@settings(deadline=None)
@given(st.lists(shapes_and_deltas(most=1), min_size=1, max_size=4), st.booleans(), st.booleans())
def test_bytes_round_trip_and_do_not_depend_on_order(drawn, reverse, through_file):
    deltas = {f"h.{number}.w": delta for number, (_, found) in enumerate(drawn) for delta in found}
    shapes = {f"h.{number}.w": shape for number, (shape, _) in enumerate(drawn)}
    written = write_deltas(deltas)
    assert written == write_deltas(dict(sorted(deltas.items(), reverse=reverse)))
    read = read_deltas(written, shapes)
    assert read.keys() == deltas.keys()
    for name, delta in deltas.items():
        assert type(read[name]) is type(delta)
        assert dtype_of(read[name]) == dtype_of(delta)
        np.testing.assert_array_equal(oracle(read[name]), oracle(delta))
    assert write_deltas(read) == written


def test_a_path_reads_as_its_bytes(tmp_path: Path):
    delta = draw_low_rank(np.random.default_rng(3), (4, 6))
    path = tmp_path / "delta"
    path.write_bytes(write_deltas({"w": delta}))
    np.testing.assert_array_equal(oracle(read_deltas(path, {"w": (4, 6)})["w"]), oracle(delta))


def test_arrays_in_any_memory_order_give_the_same_bytes():
    matrix = np.arange(12, dtype=np.float32).reshape(3, 4)
    assert write_deltas({"w": Dense(np.asfortranarray(matrix))}) == write_deltas({"w": Dense(matrix)})
    assert write_deltas({"w": Dense(matrix.T)}) == write_deltas({"w": Dense(matrix.T.copy())})


def golden(kind: str, dtype: type) -> dict[str, Delta]:
    """Deltas whose values are exact in both types."""
    B = (np.arange(-4, 4).reshape(4, 2) / 8).astype(dtype)
    A = (np.arange(10).reshape(2, 5) / 16 - 0.25).astype(dtype)
    matrix = (B @ A).astype(dtype)
    sparse = np.where(np.arange(20).reshape(4, 5) % 3 == 0, matrix, 0).astype(dtype)
    forms: dict[str, Delta] = {"low rank": LowRank(B, A), "dense": Dense(matrix), "sparse": from_sparse(sparse)}
    return {"transformer.h.1.mlp.c_proj.weight": forms[kind]}


GOLDEN = {
    ("low rank", np.float32): "5b497b31bbfdf1e04aebeaedf7533215354172b8e2a450d10740f6edbf240693",
    ("low rank", np.float16): "dc57cc7446795cfb9709d7ef25d8ad1255ffd8e40e9c0f99484eb1caac06d68d",
    ("dense", np.float32): "0ab6afa4e2cac7bb758f5b2a9fcc3564b31fa860a8d6dac5ade72d4e4d262e8b",
    ("dense", np.float16): "1d5dd637a50487157a5bf35a78e6de4c6ac97da0e5f5946b9bab589e77b3c0da",
    ("sparse", np.float32): "0fdb6ad4cc74f7406982a2bc6be11804e8864db1fb72e70560fc6830e2be5e83",
    ("sparse", np.float16): "e41e7736ac5443227c88a96f5fb4bb19edc5028457f45572cfc05cedb0065b32",
}


@pytest.mark.parametrize(("kind", "dtype"), GOLDEN)
def test_the_bytes_of_every_form_are_pinned(kind, dtype):
    assert hashlib.sha256(write_deltas(golden(kind, dtype))).hexdigest() == GOLDEN[kind, dtype]


def test_the_file_has_no_metadata():
    written = write_deltas(golden("low rank", np.float32))
    header = written[8 : 8 + int.from_bytes(written[:8], "little")]
    assert b"__metadata__" not in header


def test_the_mask_is_row_major_most_significant_bit_first():
    matrix = np.zeros((3, 5), np.float32)
    matrix[0, 0], matrix[1, 2], matrix[2, 4] = 1, 2, 3  # places 0, 7 and 14
    delta = from_sparse(matrix)
    assert delta.mask.tolist() == [0b10000001, 0b00000010]
    assert delta.values.tolist() == [1, 2, 3]


SHAPES = {"w": (4, 5), "v": (4, 5)}
ZEROS: Mapping[str, np.ndarray] = {
    "w.B": np.zeros((4, 2), np.float32),
    "w.A": np.zeros((2, 5), np.float32),
    "w.dense": np.zeros((4, 5), np.float32),
    "w.mask": np.zeros(3, np.uint8),
    "w.values": np.zeros(0, np.float32),
}


def tensors(*names: str, **changed: np.ndarray) -> dict[str, np.ndarray]:
    """The valid tensors of these forms of ``w``, some replaced."""
    return {f"w.{name}": changed.get(name, ZEROS[f"w.{name}"]) for name in names}


def not_finite(shape: tuple[int, ...], value: float) -> np.ndarray:
    array = np.zeros(shape, np.float32)
    array.flat[-1] = value
    return array


DAMAGED = {
    "unknown weight": {"x.dense": ZEROS["w.dense"]},
    "weight without a form": {"w": ZEROS["w.dense"]},
    "unknown form": {"w.scale": ZEROS["w.dense"]},
    "wrong shape": tensors("dense", dense=np.zeros((5, 4), np.float32)),
    "wrong number of dimensions": tensors("dense", dense=np.zeros(20, np.float32)),
    "ranks that differ": tensors("B", "A", A=np.zeros((3, 5), np.float32)),
    "vector as a factor": tensors("B", "A", A=np.zeros(5, np.float32)),
    "in of another weight": tensors("B", "A", A=np.zeros((2, 6), np.float32)),
    "one factor": tensors("B"),
    "other factor": tensors("A"),
    "mask without values": tensors("mask"),
    "values without mask": tensors("values"),
    "short mask": tensors("mask", "values", mask=np.zeros(2, np.uint8)),
    "more values than bits": tensors("mask", "values", values=np.zeros(1, np.float32)),
    "fewer values than bits": tensors("mask", "values", mask=np.array([128, 0, 0], np.uint8)),
    "two forms of one weight": tensors("B", "A", "dense"),
    "two other forms of one weight": tensors("mask", "values", "dense"),
    "not a number": tensors("dense", dense=not_finite((4, 5), np.nan)),
    "infinite": tensors("B", "A", B=not_finite((4, 2), np.inf)),
    "not a number among values": tensors(
        "mask", "values", mask=np.array([1, 0, 0], np.uint8), values=not_finite((1,), np.nan)
    ),
    "double precision": tensors("dense", dense=np.zeros((4, 5), np.float64)),
    "integers": tensors("dense", dense=np.zeros((4, 5), np.int32)),
    "signed mask": tensors("mask", "values", mask=np.zeros(3, np.int8)),
    "one good and one bad weight": {**tensors("B", "A"), "v.dense": np.zeros((1, 1), np.float32)},
}


def test_what_the_damaged_files_are_made_of_is_valid():
    for names in (("B", "A"), ("dense",), ("mask", "values")):
        assert read_deltas(save(tensors(*names)), SHAPES).keys() == {"w"}


@pytest.mark.parametrize("kind", DAMAGED)
def test_what_the_format_does_not_allow_is_refused(kind):
    with pytest.raises(CorruptStoreError) as caught:
        read_deltas(save(dict(DAMAGED[kind])), SHAPES)
    assert caught.value.remedy
    assert "\n" not in caught.value.message


def test_bits_behind_the_last_place_of_a_mask_are_refused():
    """They change nothing, so two files would mean one delta."""
    mask = np.array([0, 0, 0b00000001], np.uint8)  # 20 places: the last 4 bits are padding
    with pytest.raises(CorruptStoreError):
        read_deltas(save(tensors("mask", "values", mask=mask)), SHAPES)


def test_truncated_bytes_are_refused_wherever_they_end():
    written = write_deltas(golden("low rank", np.float32))
    shapes = {"transformer.h.1.mlp.c_proj.weight": (4, 5)}
    for length in (0, 1, 7, 8, 20, len(written) // 2, len(written) - 1):
        with pytest.raises(CorruptStoreError):
            read_deltas(written[:length], shapes)
    with pytest.raises(CorruptStoreError):
        read_deltas(written + b"\0", shapes)


def test_bfloat16_is_refused():
    """NumPy has no bfloat16, so the format leaves it out."""
    written = save({"w.dense": np.zeros((4, 5), np.float16)}).replace(b'"F16"', b'"BF16"', 1)
    size = int.from_bytes(written[:8], "little") + 1
    with pytest.raises(CorruptStoreError):
        read_deltas(size.to_bytes(8, "little") + written[8:], SHAPES)
    assert load(save({"w.dense": np.zeros((4, 5), np.float16)}))["w.dense"].dtype == np.float16
