"""The settings of a repository and of its editors, typed and named, as they are written. No torch, no NumPy."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from patchhub.errors import RepositoryError, SettingsError
from patchhub.objects import METRIC_KINDS
from patchhub.store.config import Config
from patchhub.store.reachability import recorded
from patchhub.store.store import Store


@dataclass(frozen=True)
class Setting:
    """One key: how its text is read, and what it is for."""

    read: Callable[[str], Any]
    purpose: str


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise ValueError("it must be above 0")
    return value


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise ValueError("it must not be negative")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError("it must be at least 1")
    return value


def read_layers(text: str) -> list[int]:
    """``3,4,5`` or ``3-5``."""
    layers: list[int] = []
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        if not first.isdecimal() or not (last.isdecimal() or not last):
            raise ValueError("write ascending layers such as 3,4,5 or 3-5")
        layers += range(int(first), int(last or first) + 1)
    if not layers or layers != sorted(set(layers)):
        raise ValueError("write ascending layers such as 3,4,5 or 3-5")
    return layers


def _index(text: str) -> int:
    value = int(text)
    if value < 0:
        raise ValueError("it must not be negative")
    return value


EDITORS: Final = ("memit", "pmet", "wise")


def _method(text: str) -> str:
    if text not in EDITORS:
        raise ValueError("the editors are memit, pmet and wise")
    return text


def _metric_kind(text: str) -> str:
    if text not in METRIC_KINDS:
        raise ValueError(f"the kinds are {' and '.join(METRIC_KINDS)}")
    return text


def _preset(text: str) -> str:
    from patchhub.editing.presets import PRESETS, PUBLISHED

    names = sorted({PUBLISHED, *(row.model for row in PRESETS)})
    if text not in names:
        raise ValueError(f"the presets are {', '.join(names)}")
    return text


def _truth(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError("write true or false")
    return text.lower() == "true"


def _one_of(*names: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in names:
            raise ValueError(f"it is one of {', '.join(names)}")
        return text

    return read


def _of_editor(name: str) -> dict[str, Setting]:
    return {
        f"{name}.clamp": Setting(_positive, "largest change of a value, relative to its norm"),
        f"{name}.kl_factor": Setting(_fraction, "weight of the KL term that keeps the subject's essence"),
        f"{name}.layers": Setting(read_layers, "edited layers, such as 3,4,5 or 3-5; default: from the model's depth"),
        f"{name}.learning_rate": Setting(_positive, "Adam step of the value optimisation"),
        f"{name}.nll_factor": Setting(_positive, "weight of the target's likelihood in the loss"),
        f"{name}.ridge": Setting(_positive, "lambda, the weight of what is preserved; default: from the FFN's width"),
        f"{name}.steps": Setting(_count, "most steps of the value optimisation"),
        f"{name}.stop_loss": Setting(_fraction, "a fact is finished below this loss"),
        f"{name}.weight_decay": Setting(_fraction, "weight of the change's norm in the loss"),
    }


_OF_WISE: Mapping[str, Setting] = {
    "wise.act_ratio": Setting(
        _positive, "routing threshold, relative to a low quantile of the edited prompts' distances"
    ),
    "wise.alpha": Setting(_fraction, "margin: distances of unrelated text stay below it"),
    "wise.beta": Setting(_positive, "margin: distances of edited prompts rise above it"),
    "wise.clamp": Setting(_positive, "largest change of a value, relative to its norm"),
    "wise.descent_decay": Setting(_fraction, "weight decay of descent, under the mask"),
    "wise.descent_rate": Setting(_positive, "step of descent"),
    "wise.descent_steps": Setting(_count, "most steps of descent"),
    "wise.distance": Setting(
        _one_of("max", "mean"), "distance of a sequence: its tokens' largest, or their mean as published"
    ),
    "wise.gamma": Setting(_fraction, "margin: how far the two kinds of distances are kept apart"),
    "wise.kl_factor": Setting(_fraction, "weight of the KL term that keeps the subject's essence"),
    "wise.layer": Setting(
        _index, "layer whose feed-forward output gets a side memory; default: from the model's depth"
    ),
    "wise.learning_rate": Setting(_positive, "step of the optimisation"),
    "wise.margins": Setting(
        _one_of("relative", "absolute"), "margins relative to the model's activations, or as published"
    ),
    "wise.mask_ratio": Setting(_positive, "share of the matrix that a shard may change"),
    "wise.merge_density": Setting(_positive, "share of each shard's entries that joining by ties keeps"),
    "wise.merge_method": Setting(_one_of("ties", "linear"), "how shards are joined into one side memory"),
    "wise.mode": Setting(_one_of("retrieve", "merge"), "keep shards apart, or join them; default: retrieve"),
    "wise.neighbours": Setting(_index, "texts about other subjects that the base writes for each fact"),
    "wise.norm_constraint": Setting(_positive, "largest change of an entry"),
    "wise.prefixes": Setting(_index, "random texts, beside the contexts, that a subject is put after"),
    "wise.rank": Setting(_count, "recompress a finished shard to this rank and close it; default: keep it as trained"),
    "wise.rehearsal": Setting(
        _index, "earlier facts of the shard, for each new one, that every round looks at and mends"
    ),
    "wise.ridge": Setting(_positive, "weight of what is preserved against one fact; default: from the FFN's width"),
    "wise.rounds": Setting(_count, "times that the fit is followed by optimising what it left undone"),
    "wise.seed": Setting(_index, "seed of the random subspaces and texts"),
    "wise.shard_size": Setting(_count, "facts after which a shard is full (500)"),
    "wise.solver": Setting(
        _one_of("fit", "descent"), "fit the matrix to optimised values, or descend on it as published"
    ),
    "wise.steps": Setting(_count, "most steps of the optimisation"),
    "wise.stop_loss": Setting(_fraction, "a fact is finished below this loss"),
    "wise.weight_decay": Setting(_fraction, "weight of the change's norm in the loss"),
}

_METRIC_NUMBERS: Mapping[str, Mapping[str, float]] = {
    "covariance": {"epsilon": 0.01},
    "null_space": {"threshold": 0.02, "l2": 10.0},
}

SETTINGS: Mapping[str, Setting] = {
    "author": Setting(str, 'who commits, "Ada <ada@example.org>"; default: git\'s identity'),
    "base.path": Setting(str, "where the base model is"),
    "chat": Setting(_truth, "true: facts are written and asked as answers in the base's chat template; default: false"),
    "device": Setting(
        str, "where the base is put: auto (a GPU if there is one), spread (over all GPUs), cpu, cuda:0, ..."
    ),
    "dtype": Setting(
        _one_of("auto", "float32", "bfloat16", "float16"),
        "type of the base in memory; auto: float32 where that takes half of the memory at most, else the base's own",
    ),
    "guard.closed": Setting(
        _fraction, "least share of the new facts that the model must say by itself with a word's end after them (0.05)"
    ),
    "guard.drift": Setting(
        _positive,
        "most that new facts may add to the drift on held text, nats per token (0.6); few facts less, over 100 more",
    ),
    "guard.earlier": Setting(_fraction, "largest share of the earlier facts that a change may lose (0.5)"),
    "guard.fewest": Setting(_index, "so many new facts must hold, or all where there are fewer (1)"),
    "guard.leak": Setting(_fraction, "largest share of other subjects' prompts that may now say a new target (0.3)"),
    "guard.misfit": Setting(
        _fraction, "largest share of new and contradicted facts that may get less than half of their change (0.7)"
    ),
    "guard.own": Setting(_fraction, "least share of the new facts that the model must answer with (0.15)"),
    "guard.spectrum": Setting(
        _positive, "largest singular value of a weight's change, relative to the base weight's (50)"
    ),
    "guard.survival": Setting(_fraction, "least share of a change that rounding to the base's type must keep (0.1)"),
    "guard.total": Setting(
        _positive, "most that the drift may be in all after a change that adds to it, nats per token (2.5)"
    ),
    **_of_editor("memit"),
    "method": Setting(_method, "default editor"),
    "metric.epsilon": Setting(_fraction, "ridge of the second moments, relative to the median of their diagonal"),
    "metric.kind": Setting(_metric_kind, "covariance (MEMIT, PMET) or null_space (AlphaEdit)"),
    "metric.l2": Setting(_positive, "of a null_space metric: weight of the change's norm (10)"),
    "metric.seed": Setting(int, "seed of the text that is sampled from the base"),
    "metric.threshold": Setting(_positive, "of a null_space metric: smallest second moment that is protected (0.02)"),
    "metric.tokens": Setting(_count, "tokens of text that are sampled from the base"),
    **_of_editor("pmet"),
    "quantization": Setting(_one_of("none", "8bit", "4bit"), "quantise the base in memory while it is edited"),
    "preset": Setting(
        _preset, "settings published for a model: `published` for the one that fits the base, or a name; default: none"
    ),
    **_OF_WISE,
}


def read_setting(key: str, text: str) -> Any:
    """The value of a key that a text stands for.

    Raises:
        SettingsError: no such key, or the value cannot be used.
    """
    setting = known_setting(key)
    try:
        return setting.read(text)
    except ValueError as error:
        raise SettingsError(f"{key} cannot be {text!r}: {error}", remedy=f"`{key}`: {setting.purpose}.") from None


def metric_settings(repository: Store) -> tuple[str, dict[str, float]]:
    """Kind and numbers of the metric that the repository's settings ask for; defaults are the published ones but epsilon."""
    settings = repository.config.settings
    kind = str(settings.get("metric.kind", "covariance"))
    return kind, {name: float(settings.get(f"metric.{name}", value)) for name, value in _METRIC_NUMBERS[kind].items()}


def is_metric_used(repository: Store) -> bool:
    """Whether any commit was ever made here, so that its columns are of the present metric."""
    changes = (operation.changes for _, operation in repository.operations())
    return any(reference.kind == "commit" for reference in recorded(changes))


def known_setting(key: str) -> Setting:
    if key not in SETTINGS:
        close = difflib.get_close_matches(key, SETTINGS, n=1)
        hint = f"Did you mean {close[0]}?" if close else f"The settings are {', '.join(SETTINGS)}."
        raise SettingsError(f"there is no setting {key!r}", remedy=hint)
    return SETTINGS[key]


def without_metric(key: str, config: Config) -> Config:
    """The config with no metric pinned, where the key is one of the metric's: the next use computes it anew."""
    return replace(config, recording=None) if key.startswith("metric.") else config


def refuse_fixed(repository: Store, key: str) -> None:
    if key.startswith("metric.") and repository.config.recording is not None and is_metric_used(repository):
        raise RepositoryError(
            f"{key} is fixed: one repository has one metric, and facts are recorded with this one's",
            remedy="Start another repository for another metric.",
        )


@dataclass(frozen=True)
class Contender:
    """An editor with settings of its own, under the name that the user gave it."""

    name: str
    method: str
    settings: Mapping[str, Any]


def contender(text: str) -> Contender:
    """``memit``, or with settings ``pmet:ridge=200:layers=2-4``.

    Raises:
        SettingsError: there is no such editor, or a setting is malformed or unknown.
    """
    method, *parts = text.split(":")
    if method not in EDITORS:
        raise SettingsError(f"there is no editor {method!r}", remedy=f"The editors are {', '.join(EDITORS)}.")
    settings = {}
    for part in parts:
        name, _, value = part.partition("=")
        known = SETTINGS.get(f"{method}.{name}")
        if known is None or not value:
            names = [key.partition(".")[2] for key in SETTINGS if key.startswith(f"{method}.")]
            raise SettingsError(
                f"{text!r}: {part!r} sets nothing of {method}",
                remedy=f"Write {method}:NAME=VALUE with one of {', '.join(names)}.",
            )
        try:
            settings[name] = known.read(value)
        except ValueError as error:
            raise SettingsError(
                f"{text!r}: {name} cannot be {value!r}: {error}", remedy=f"`{name}`: {known.purpose}."
            ) from None
    return Contender(text, method, settings)
