"""Changes that other programs made, as deltas: a PEFT LoRA adapter, or a full difference of two weights. NumPy only."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
from jaxtyping import Float

from patchhub.delta import Delta, Dense, LowRank, add, compact, from_factors, from_sparse, norm, to_dense
from patchhub.errors import BaseError, RequestError
from patchhub.export.adapters import CONFIG, WEIGHTS, Shapes
from patchhub.models.checkpoint import read_floats, read_header

_NAME: Final = re.compile(
    r"base_model\.model\.(?P<module>.+)\.(?:lora_(?:(?P<part>[AB])\.weight|embedding_(?P<embedding>[AB])|B\.(?P<bias>bias)|"
    r"(?P<size>magnitude_vector)(?:\.weight)?)|token_adapter\.(?P<tokens>trainable_tokens_delta))"
)
_ENDS: Final = re.compile(
    r"(?:^|\.)(?:lm_head|embed_tokens|embed_in|embed_out|wte)$"
)  # where the two ends of a model may be one tensor
_LIMIT: Final = 1 << 20  # bytes of a configuration
_SHOWN: Final = 60  # letters of a value in a message
_REMEDY: Final = "Give a LoRA adapter that PEFT wrote as safetensors, or the model that it was merged into."

MERGE: Final = "Merge the adapter into its base with PEFT (merge_and_unload), save that model and import its folder."
SEPARATE: Final = (
    "Save it as an ordinary LoRA with save_pretrained(FOLDER, path_initial_model_for_weight_conversion=...), or merge "
    "it into its base (merge_and_unload), save that model and import its folder."
)
NO_CHANGE: Final = "No change of the weights says the same, so patchhub cannot keep it; serve it with PEFT."

_Number = TypeVar("_Number", int, float)


@dataclass(frozen=True)
class Field:
    """A field of ``adapter_config.json``: the values at which it changes nothing about `base + scale * B A`.

    Attributes:
        is_harmless: whether a value is such, or one that is read here.
        otherwise: what any other value means.
        remedy: what to do then.
    """

    is_harmless: Callable[[Any], bool]
    otherwise: str = ""
    remedy: str = MERGE


def _any(value: object) -> bool:
    """Of a field that is read here, says where an adapter comes from, or acts in training only."""
    return True


def _off(value: object) -> bool:
    """Of a field that switches something on unless it is null, false or empty."""
    return value is None or value is False or value in ({}, [])


def _null(value: object) -> bool:
    """Of a field whose empty object stands for another configuration's defaults."""
    return value is None


def _one_of(*values: object) -> Callable[[Any], bool]:
    return lambda value: any(type(value) is type(one) and value == one for one in values)


FIELDS: Final[Mapping[str, Field]] = {
    # Read: see `_Lora`.
    **dict.fromkeys(("r", "lora_alpha", "rank_pattern", "alpha_pattern"), Field(_any)),
    **dict.fromkeys(("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"), Field(_any)),
    "use_rslora": Field(_one_of(True, False, None), "it is neither true nor false"),
    "peft_type": Field(_one_of("LORA"), "only plain LoRA is a sum of base and B A", MERGE),
    # Where it comes from, and what acts in training alone.
    **dict.fromkeys(
        ("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "runtime_config"),
        Field(_any),
    ),
    **dict.fromkeys(("lora_dropout", "unsloth_fixed"), Field(_any)),
    "fan_in_fan_out": Field(_any),  # factors are (r, in) and (out, r) whatever it says
    # Parameters of what another field switches on.
    **dict.fromkeys(("corda_config", "eva_config", "loftq_config", "lora_ga_config"), Field(_any)),
    **dict.fromkeys(("megatron_core", "merge_weights", "qalora_group_size"), Field(_any)),
    "task_type": Field(_one_of("CAUSAL_LM", None), "it belongs to another kind of model than a causal language model"),
    "init_lora_weights": Field(
        _one_of(True, False, None, "gaussian", "orthogonal", "eva", "mica"),
        "such a start takes values out of the base weights, so the adapter is not a change of the base as it is",
        SEPARATE,
    ),
    "bias": Field(_one_of("none", "all", "lora_only"), "it is none of none, all and lora_only"),
    "lora_bias": Field(_one_of(True, False, None), "it is neither true nor false"),
    "use_dora": Field(_one_of(True, False, None), "it is neither true nor false"),
    "velora_config": Field(_null, "VeLoRA stores what it trained with beside its factors"),
    "kasa_config": Field(_null, "KaSA takes singular values out of the base weights"),
    "use_qalora": Field(_off, "QALoRA pools its input", NO_CHANGE),
    "use_bdlora": Field(_null, "block-diagonal factors are stored in another form"),
    "monteclora_config": Field(_null, "its factors are drawn at random", NO_CHANGE),
    "alora_invocation_tokens": Field(_off, "an activated LoRA acts only after its invocation tokens", NO_CHANGE),
    "arrow_config": Field(_null, "Arrow chooses between adapters token by token", NO_CHANGE),
    "layer_replication": Field(_off, "it adds layers that the base does not have", NO_CHANGE),
    "target_parameters": Field(_off, "it changes parameters that are no linear weights"),
    "modules_to_save": Field(_any),  # whole tensors, which are read: see `_whole`
    "trainable_token_indices": Field(_any),  # rows in the place of the embedding's: see `_rows`
    "ensure_weight_tying": Field(_off, "it changes embedding and head together"),
    "megatron_config": Field(_off, "its factors are those of Megatron's parallel layers"),
    "enable_lora": Field(_off, "it changes parts of a fused weight"),  # PEFT before 0.3
}
"""Every field that is known. One that is not, and is not switched off, is refused by its name."""

_WRAPPER: Final = "base_model.model."
_BELOW: Final = ".base_layer."  # where PEFT saves the weight below its factors too: always of an embedding
_OTHER: Final = {"A": "B", "B": "A"}
_SIZE: Final = "magnitude_vector"
_LONG: Final = 8
_SPARSE: Final = 0.5  # below this share of values that changed, a mask and values are smaller than the matrix


_ONE_TENSOR: Final = "and the base's embedding and head are one tensor, or its configuration does not say"


def read_adapter(
    folder: Path,
    shapes: Shapes,
    of_base: Callable[[str], np.ndarray] | None = None,
    *,
    tied: bool | None = None,
    transposed: bool = False,
) -> dict[str, Delta]:
    """The deltas of a PEFT LoRA adapter, scaled as PEFT scales them (``alpha_i / r_i``, with rsLoRA ``alpha_i / sqrt(r_i)``).

    With DoRA (Liu et al. 2024) and its magnitudes m the weight is m (W0 + D) / ||W0 + D||, row by row, of an embedding column by
    column. A bias of B (``lora_bias``) is added to the module's own, scaled as B A is.

    Args:
        folder: holds ``adapter_config.json`` and ``adapter_model.safetensors``; nothing is unpickled.
        shapes: (out, in) of each weight that may be changed.
        of_base: reads a parameter of the base as it is stored, for DoRA and adapters that hold whole modules or rows in its place;
            None: all of them are refused.
        tied: whether the base's embedding and head are one tensor; None: its configuration does not say. Where they may be one, a change
            of one of them alone is refused; single tokens are changed in both by PEFT too.
        transposed: the base stores weights (in, out), and so do whole modules.

    Raises:
        RequestError: it is no plain LoRA, it changes other modules, or its tensors are malformed.
    """
    config = _read_config(folder / CONFIG)
    pairs: dict[str, dict[str, np.ndarray]] = {}
    tables: set[str] = set()
    deltas: dict[str, Delta] = {}

    def put(weight: str, delta: Delta | None) -> None:
        if delta is not None:
            deltas[weight] = compact(add([deltas[weight], delta], shapes[weight])) if weight in deltas else delta

    for name, array in _read_tensors(folder / WEIGHTS).items():
        match = _NAME.fullmatch(name)
        weight = f"{match['module']}.weight" if match else name.removeprefix(_WRAPPER).replace(_BELOW, ".")
        both = match is not None and match["tokens"] is not None and tied is True
        if _ENDS.search(weight.rpartition(".")[0]) and tied is not False and not both:
            raise _refusal(folder, f"it changes {weight} alone, {_ONE_TENSOR}", remedy=MERGE, weight=weight)
        if match and match["tokens"]:
            put(weight, _rows(folder, weight, array, config, shapes, of_base))
        elif match and match["bias"]:
            put(f"{match['module']}.bias", _biased(folder, match["module"], array, config, shapes))
        elif match:
            _refuse_elsewhere(folder, name, weight, config, shapes)
            part, factor = (match["part"] or match["size"], array)
            if match["embedding"]:  # A is (rank, tokens) and B (width, rank): the table's change is A^T B^T
                part, factor = _OTHER[match["embedding"]], array.T
                tables.add(weight)
            pairs.setdefault(weight, {})[part] = factor
        elif of_base is not None and weight in shapes and (_BELOW in name or config.saves(weight)):
            put(weight, _whole(folder, weight, array.T if transposed else array, _read(of_base, weight, transposed)))
        else:
            raise _refusal(folder, f"it holds {name}, which is no factor of a linear weight", remedy=MERGE, tensor=name)
    before = None if of_base is None else lambda weight: _read(of_base, weight, transposed)
    for weight, parts in pairs.items():
        known = None if weight in deltas else before  # what else changes the weight leaves no magnitudes to speak of
        put(weight, _paired(folder, weight, parts, config, shapes[weight], known, axis=0 if weight in tables else 1))
    return dict(sorted(deltas.items()))


def _paired(
    folder: Path,
    weight: str,
    parts: dict[str, np.ndarray],
    config: _Lora,
    shape: tuple[int, int],
    before: Callable[[str], np.ndarray] | None,
    *,
    axis: int,
) -> Delta:
    """What two factors, and with DoRA their magnitudes along ``axis``, change of a weight, which ``before`` reads."""
    size = parts.pop(_SIZE, None)
    product = _product(folder, weight, parts, config, shape)
    if (size is not None) != config.resized or (config.resized and before is None):
        reason = f"its use_dora and its magnitudes of {weight} do not fit together"
        raise _refusal(folder, reason, remedy=MERGE, field="use_dora")
    if size is None or before is None:
        return product
    return _resized(folder, weight, product, size, before(weight), axis=axis)


def _biased(folder: Path, module: str, array: np.ndarray, config: _Lora, shapes: Shapes) -> Delta:
    """What B's bias adds to its module's: PEFT scales it as it scales B A."""
    bias = f"{module}.bias"
    if not config.factors_biased or config.resized or not config.covers(module):
        raise _refusal(
            folder, f"its lora_bias and what it holds of {bias} do not fit together", remedy=MERGE, field="lora_bias"
        )
    if bias not in shapes:
        reason = f"its lora_bias is true, and the base has no {bias} that can be changed"
        raise _refusal(folder, reason, remedy=NO_CHANGE, field="lora_bias")
    if array.shape != shapes[bias][:1] or not bool(np.isfinite(array).all()):
        raise _refusal(folder, f"its bias of {module} is not finite, or not of shape {shapes[bias][:1]}")
    return Dense((array.astype(np.float64) * config.scale_of(module)).astype(np.float32)[:, None])


def _rows(
    folder: Path,
    weight: str,
    rows: Float[np.ndarray, "tokens width"],
    config: _Lora,
    shapes: Shapes,
    of_base: Callable[[str], np.ndarray] | None,
) -> Delta | None:
    """The change of a table of tokens some rows of which an adapter puts into the base's place (``trainable_token_indices``)."""
    tokens = config.tokens_of(weight.removesuffix(".weight"))
    if of_base is None or weight not in shapes or len(set(tokens)) != len(tokens) or not tokens:
        reason = (
            f"its trainable_token_indices do not say which rows of {weight} it holds, or the base has no such table"
        )
        raise _refusal(folder, reason, remedy=MERGE, field="trainable_token_indices")
    count, width = shapes[weight]
    if rows.shape != (len(tokens), width) or max(tokens) >= count or not bool(np.isfinite(rows).all()):
        reason = (
            f"its rows of {weight} are not finite, or not those of {len(tokens)} tokens below {count} of width {width}"
        )
        raise _refusal(folder, reason, remedy=MERGE, field="trainable_token_indices")
    change = np.zeros((count, width), np.float32)
    change[tokens] = rows.astype(np.float64) - _read(of_base, weight, transposed=False)[tokens]
    return from_sparse(change) if change.any() else None


def _refuse_elsewhere(folder: Path, name: str, weight: str, config: _Lora, shapes: Shapes) -> None:
    """Refuse a factor of what is no weight, or of a module that PEFT would leave out."""
    if weight not in shapes:
        raise _refusal(folder, f"it changes {weight}, which is no linear weight of the base's blocks", tensor=name)
    if not config.covers(weight.removesuffix(".weight")):
        raise _refusal(folder, f"it holds {name}, and its target_modules leave that module out", tensor=name)


def _product(
    folder: Path, weight: str, parts: Mapping[str, np.ndarray], config: _Lora, shape: tuple[int, int]
) -> Delta:
    """The delta scale * B A of a weight."""
    out, inner = shape
    module = weight.removesuffix(".weight")
    rank = len(parts["A"]) if parts.keys() == {"A", "B"} and parts["A"].ndim == 2 else -1
    if rank < 1 or parts["A"].shape != (rank, inner) or parts["B"].shape != (out, rank):
        raise _refusal(folder, f"its factors of {weight} are missing or do not fit {(out, inner)}")
    factors = [part.astype(np.float64) for part in (parts["B"], parts["A"])]
    if rank != config.rank_of(module):
        raise _refusal(folder, f"its factors of {weight} have rank {rank}, its {CONFIG} says {config.rank_of(module)}")
    if not all(bool(np.isfinite(factor).all()) for factor in factors):
        raise _refusal(folder, f"its factors of {weight} are not finite")
    return from_factors(factors[0] * config.scale_of(module), factors[1])


def _read(of_base: Callable[[str], np.ndarray], weight: str, transposed: bool) -> Float[np.ndarray, ...]:
    """A parameter of the base, a matrix as (out, in), in float64."""
    found = of_base(weight).astype(np.float64)
    return found.T if transposed else found


def _resized(
    folder: Path,
    weight: str,
    product: Delta,
    size: Float[np.ndarray, " lengths"],
    before: Float[np.ndarray, "out in"],
    axis: int,
) -> Delta:
    """DoRA's change: each row of W0 + D with the length that the adapter gives it, less W0.

    Args:
        axis: along which lengths are: 1 for rows; 0 for columns, as PEFT has it of embeddings.
    """
    lines, count = ("rows", "columns")[1 - axis], before.shape[1 - axis]
    if size.shape != (count,) or not bool(np.isfinite(size).all()):
        reason = (
            f"its use_dora has magnitudes of {weight} that are not finite, or not one for each of its {count} {lines}"
        )
        raise _refusal(folder, reason, remedy=MERGE, field="use_dora")
    moved = before + to_dense(product)
    lengths = np.linalg.norm(moved, axis=axis)
    if not bool(lengths.all()):
        raise _refusal(
            folder, f"one of the {lines} of {weight} has no length, so it cannot be given another", remedy=MERGE
        )
    return from_difference(np.expand_dims(size.astype(np.float64) / lengths, axis) * moved - before, 0.0)[0]


def _whole(folder: Path, weight: str, values: np.ndarray, before: np.ndarray) -> Delta | None:
    """The change from a parameter of the base to what an adapter has in its place (PEFT's ``modules_to_save``), if there is any."""
    if values.shape != before.shape or not bool(np.isfinite(values).all()):
        raise _refusal(folder, f"its {weight} is not finite, or not of the base's shape {before.shape}")
    change = values.astype(np.float64) - before
    return from_difference(change[:, None] if change.ndim == 1 else change, 0.0)[0] if change.any() else None


def from_difference(change: Float[np.ndarray, "out in"], tolerance: float) -> tuple[Delta, str, float]:
    """A weight's change in its smallest form: (delta, name of the form, relative error).

    Sparse where at most half of the values changed and that is smaller; low rank where the singular values that are
    left out have at most `tolerance` of the norm and that is smaller; dense otherwise.
    """
    out, inner = change.shape
    u, values, vt = _singular(change.astype(np.float64))
    tails = np.append(np.sqrt(np.cumsum(values[::-1] ** 2))[::-1], 0.0)
    rank = int((tails > tolerance * tails[0]).sum())
    nonzero = int(np.count_nonzero(change))
    low_cost, sparse_cost = rank * (out + inner), nonzero + out * inner / 32
    if nonzero <= _SPARSE * change.size and sparse_cost < low_cost:
        return from_sparse(change.astype(np.float32)), "sparse", 0.0
    if low_cost < change.size:
        factors = from_factors(u[:, :rank] * values[:rank], vt[:rank])
        return factors, f"rank {rank}", float(tails[rank] / tails[0])
    return Dense(change.astype(np.float32)), "dense", 0.0


def _singular(
    change: Float[np.ndarray, "out in"],
) -> tuple[Float[np.ndarray, "out rank"], Float[np.ndarray, " rank"], Float[np.ndarray, "rank in"]]:
    """The thin singular value decomposition; of a matrix far longer than wide, an embedding's, by way of its QR decomposition."""
    out, inner = change.shape
    if out <= _LONG * inner:
        return np.linalg.svd(change, full_matrices=False)
    q, r = np.linalg.qr(change)
    u, values, vt = np.linalg.svd(r, full_matrices=False)
    return q @ u, values, vt


def form_of(delta: Delta) -> str:
    """A delta's form in words."""
    if isinstance(delta, LowRank):
        return f"rank {delta.rank}"
    return "dense" if isinstance(delta, Dense) else "sparse"


def is_nothing(delta: Delta) -> bool:
    return norm(delta) == 0


@dataclass(frozen=True)
class _Lora:
    """What an adapter's configuration says that `base + scale * B A` needs.

    Attributes:
        rank, alpha: of modules without a pattern.
        ranks, alphas: PEFT's patterns, in the file's order: the first that matches a module's name wins.
        rank_stabilised: the scale is alpha / sqrt(rank), not alpha / rank.
        targets, excluded: names of modules, or one expression for all; None: any, and none.
        layers: the numbers of the layers that are changed, None: all; `lists` are the names of their list, empty: any.
        whole: names of modules that are held whole.
        resized: DoRA: the rows of the weights are given other lengths.
        biases: biases are held too.
        factors_biased: B has a bias of its own.
        tokens: the rows of tables that are held, by the end of a module's name; under None of the embedding.
    """

    rank: int
    alpha: float
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    rank_stabilised: bool
    targets: Sequence[str] | str | None
    excluded: Sequence[str] | str | None
    layers: Sequence[int] | None
    lists: Sequence[str]
    whole: Sequence[str] = ()
    resized: bool = False
    biases: bool = False
    factors_biased: bool = False
    tokens: Mapping[str | None, Sequence[int]] = field(default_factory=dict)

    def tokens_of(self, module: str) -> Sequence[int]:
        """The rows of a module's table that are held, in their order; none where the configuration names none."""
        named = next((rows for name, rows in self.tokens.items() if name and module.endswith(name)), ())
        return self.tokens.get(None, named)

    def saves(self, parameter: str) -> bool:
        """Whether PEFT puts a whole parameter of the adapter into the base's place: of a module that is held whole, or a bias."""
        if self.biases and parameter.endswith(".bias"):
            return True
        parts = parameter.split(".")[:-1]
        above = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
        return any(name.endswith(whole) for name in above for whole in self.whole)  # as PEFT matches them

    def covers(self, module: str) -> bool:
        """Whether PEFT gives a module factors, and so reads those that the file has for it."""
        if self.excluded and _is_named(self.excluded, module):
            return False
        if self.targets is None or self.targets == "all-linear":
            return True
        if isinstance(self.targets, str) or not self.layers or not _is_named(self.targets, module):
            return _is_named(self.targets, module)
        for name in self.lists or (r"[^.]*",):
            found = re.match(rf"(?:^|.*?\.){name}\.(\d+)\.", module)
            if found:
                return int(found[1]) in self.layers
        return False

    def rank_of(self, module: str) -> int:
        return _first_match(self.ranks, module, self.rank)

    def scale_of(self, module: str) -> float:
        rank = self.rank_of(module)
        return _first_match(self.alphas, module, self.alpha) / (math.sqrt(rank) if self.rank_stabilised else rank)


def _is_named(names: Sequence[str] | str, module: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    # Some writers name modules as the file's tensors do, below PEFT's own wrapper.
    bare = [name.removeprefix(_WRAPPER) for name in names]
    return any(module == name or module.endswith(f".{name}") for name in bare)


def _first_match(patterns: Mapping[str, _Number], module: str, default: _Number) -> _Number:
    return next((value for key, value in patterns.items() if _expression(key).match(module)), default)


def _expression(pattern: str) -> re.Pattern[str]:
    """As PEFT matches the keys of its patterns: the whole name of a module, or its end after a dot."""
    return re.compile(rf"(.*\.)?({pattern})$")


def _read_config(path: Path) -> _Lora:
    """The configuration of an adapter that is `base + scale * B A` and nothing else.

    Raises:
        RequestError: a field says that the adapter is something else, is not known here, or is malformed.
    """
    try:
        data = path.read_bytes()[: _LIMIT + 1]
        config = json.loads(data) if len(data) <= _LIMIT else None
    except (OSError, ValueError, RecursionError) as error:
        raise _refusal(path, f"it cannot be read ({error})") from error
    if not isinstance(config, dict):
        raise _refusal(path, "it is not the configuration of an adapter")
    if "peft_type" not in config:
        raise _refusal(path, "it has no peft_type, so it is not the configuration of an adapter", field="peft_type")
    for name, value in sorted(config.items(), key=lambda item: item[0] != "peft_type"):  # other kinds have other fields
        _check_field(path, name, value)
    rank: Any = config.get("r")
    alpha: Any = config.get("lora_alpha")
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    if not isinstance(ranks, dict) or not all(map(_is_rank, (rank, *ranks.values()))):
        raise _refusal(path, "its r or rank_pattern is missing or malformed")
    if not isinstance(alphas, dict) or not all(map(_is_number, (alpha, *alphas.values()))):
        raise _refusal(path, "its lora_alpha or alpha_pattern is missing or malformed")
    targets, excluded = config.get("target_modules"), config.get("exclude_modules")
    layers, lists = config.get("layers_to_transform"), config.get("layers_pattern") or ()
    layers, lists = [layers] if _is_index(layers) else layers, [lists] if isinstance(lists, str) else lists
    if not all(names is None or isinstance(names, str) or _is_list_of(str, names) for names in (targets, excluded)):
        raise _refusal(path, "its target_modules or exclude_modules is malformed")
    if not (layers is None or _is_list_of(int, layers)) or not (lists == () or _is_list_of(str, lists)):
        raise _refusal(path, "its layers_to_transform or layers_pattern is malformed")
    whole = [names for names in (targets, excluded) if isinstance(names, str)]
    try:
        for pattern in (*ranks, *alphas, *lists, *whole):
            _expression(pattern)
    except re.error as error:
        raise _refusal(path, f"one of its names of modules is no regular expression ({error})") from error
    saved = config.get("modules_to_save") or ()
    if not (saved == () or _is_list_of(str, saved)):
        raise _refusal(path, "its modules_to_save is malformed", field="modules_to_save")
    named: dict[str, Any] = {"targets": targets, "excluded": excluded, "layers": layers, "lists": lists, "whole": saved}
    named |= {"biases": config.get("bias", "none") != "none", "factors_biased": config.get("lora_bias") is True}
    stabilised, resized = config.get("use_rslora") is True, config.get("use_dora") is True
    tokens = _read_tokens(path, config.get("trainable_token_indices"))
    return _Lora(rank, alpha, ranks, alphas, stabilised, resized=resized, tokens=tokens, **named)


def _read_tokens(path: Path, tokens: Any) -> dict[str | None, Sequence[int]]:
    """``trainable_token_indices``: a list of rows of the embedding, or of each module that is named."""
    named: dict[str | None, Sequence[int]] = tokens if isinstance(tokens, dict) else {None: tokens} if tokens else {}
    if not all(_is_list_of(int, rows) and min(rows, default=0) >= 0 for rows in named.values()):
        raise _refusal(path, "its trainable_token_indices is malformed", field="trainable_token_indices")
    return named


def _check_field(path: Path, field: str, value: Any) -> None:
    known = FIELDS.get(field)
    if known is None:
        if _off(value):
            return  # switched off: newer versions of PEFT write every field that they know
        reason = f"it has the field {field} ({_shown(value)}), which patchhub does not know"
        raise _refusal(
            path,
            reason,
            remedy=f"{MERGE} If {field} is only a remark, take it out of {path.name}.",
            field=field,
        )
    if not known.is_harmless(value):
        raise _refusal(path, f"its {field} is {_shown(value)}: {known.otherwise}", remedy=known.remedy, field=field)


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + " ..."


def _is_list_of(kind: type, value: object) -> bool:
    return isinstance(value, list) and all(type(entry) is kind for entry in value)


def _is_index(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _read_tensors(path: Path) -> dict[str, np.ndarray]:
    try:
        return {name: read_floats(entry) for name, entry in read_header(path).items()}
    except BaseError as error:
        raise _refusal(path, error.message) from error


def _refusal(path: Path, reason: str, *, remedy: str = _REMEDY, **facts: Any) -> RequestError:
    return RequestError(f"{path} cannot be imported: {reason}", remedy=remedy, path=str(path), **facts)
