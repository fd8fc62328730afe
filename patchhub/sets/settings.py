"""The settings of a repository and of its editors, typed and named, as they are written. No torch, no NumPy."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from patchhub.editing.settings import EditSettings, WiseSettings
from patchhub.errors import RepositoryError, SettingsError
from patchhub.evaluation.guard import Limits
from patchhub.objects import METRIC_KINDS
from patchhub.settings import (
    COUNT,
    NOT_NEGATIVE,
    POSITIVE,
    TEXT,
    TRUTH,
    WHOLE,
    Kind,
    Setting,
    UnfitError,
    chosen,
    one_of,
    read_layers,
    settings_of,
)
from patchhub.signing.statements import METHODS
from patchhub.store.config import Config
from patchhub.store.revisions import BRANCHES, check_ref
from patchhub.store.states import recorded
from patchhub.store.store import Store

EDITORS: Final = ("memit", "pmet", "wise")
_DEVICES: Final = "cpu|cuda|ipu|xpu|hip|ve|fpga|maia|xla|vulkan|mps|hpu|mtia|npu|privateuseone"


def _presets(text: str) -> str:
    from patchhub.editing.settings import PRESETS, PUBLISHED

    names = sorted({PUBLISHED, *(row.model for row in PRESETS)})
    if text not in names:
        raise UnfitError(f"the presets are {', '.join(names)}")
    return text


_PRESET: Final = Kind("`published`, or the name of a preset", _presets, lambda value: isinstance(value, str))

_METRIC_NUMBERS: Mapping[str, Mapping[str, float]] = {
    "covariance": {"epsilon": 0.01},
    "null_space": {"threshold": 0.02, "l2": 10.0},
}


_HUB_MODEL: Final = Kind(
    "the name of a model on the Hub, such as org/model",
    str,
    lambda value: (
        isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9][\w.\-]*/[A-Za-z0-9][\w.\-]*", value, re.ASCII) is not None
    ),
)

DEVICE: Final = Kind(
    "auto, spread, stream, or a device such as cpu, cuda:0 or mps",
    str,
    lambda value: (
        isinstance(value, str) and re.fullmatch(rf"auto|spread|stream|(?:{_DEVICES})(?::\d+)?", value) is not None
    ),
)

SETTINGS: Mapping[str, Setting] = {
    "author": Setting(TEXT, 'who commits, "Ada <ada@example.org>"; default: git\'s identity'),
    "base.name": Setting(_HUB_MODEL, "what the base is called on the Hub, org/model, where it is read from a folder"),
    "base.path": Setting(TEXT, "where the base model is"),
    "card.license": Setting(
        TEXT, "license that the model card names, such as apache-2.0; default: as the card's owner wrote"
    ),
    "card.title": Setting(TEXT, "title of the model card; default: the repository's name"),
    "chat": Setting(TRUTH, "true: facts are written and asked as answers in the base's chat template; default: false"),
    "device": Setting(
        DEVICE,
        "where the base is put: auto (a GPU if there is one), spread (over all GPUs), stream (blocks stay in its files), cpu, cuda:0, ...",
    ),
    "dtype": Setting(
        one_of("auto", "float32", "bfloat16", "float16"),
        "type of the base in memory; auto: float32 where that takes half of a CPU's memory or a tenth of a GPU's, else its own",
    ),
    **settings_of(Limits, "guard"),
    **settings_of(EditSettings, "memit"),
    "method": Setting(one_of(*EDITORS), "default editor"),
    "metric.epsilon": Setting(NOT_NEGATIVE, "ridge of the second moments, relative to the median of their diagonal"),
    "metric.kind": Setting(one_of(*METRIC_KINDS), "covariance (MEMIT, PMET) or null_space (AlphaEdit)"),
    "metric.l2": Setting(POSITIVE, "of a null_space metric: weight of the change's norm (10)"),
    "metric.seed": Setting(WHOLE, "seed of the text that is sampled from the base"),
    "metric.threshold": Setting(POSITIVE, "of a null_space metric: smallest second moment that is protected (0.02)"),
    "metric.tokens": Setting(COUNT, "tokens of text that are sampled from the base"),
    **settings_of(EditSettings, "pmet"),
    "quantization": Setting(one_of("none", "8bit", "4bit"), "quantise the base in memory while it is edited"),
    "preset": Setting(
        _PRESET, "settings published for a model: `published` for the one that fits the base, or a name; default: none"
    ),
    "sign": Setting(
        one_of("always", "asked"), "sign every commit and tag, or those alone for which it is asked; default: asked"
    ),
    "sign.allowed": Setting(
        TEXT, "a file of allowed signers, as OpenSSH has it: whose keys `verify` and policies trust"
    ),
    "sign.key": Setting(TEXT, "the file of the private key to sign with, or of its public key where an agent holds it"),
    "sign.method": Setting(one_of(*METHODS), "how that key signs; default: ssh"),
    **settings_of(WiseSettings, "wise"),
    "wise.mode": Setting(one_of("retrieve", "merge"), "keep shards apart, or join them; default: retrieve"),
    "wise.rank": Setting(COUNT, "recompress a finished shard to this rank and close it; default: keep it as trained"),
}


_AUTHOR: Final = (
    'Without the setting `author` ("Ada <ada@example.org>") commits are by git\'s user.name and user.email.'
)
_OF_GIT: Final = {
    "user.name": _AUTHOR,
    "user.email": _AUTHOR,
    "user.signingkey": "`sign.key` names the key, `sign` says whether every commit is signed.",
    "commit.gpgsign": "`patchhub config sign always` signs every commit, with the key that `sign.key` names.",
}
_OF_A_BRANCH = re.compile(r"policy\.(.+)\.approvals", re.DOTALL)
APPROVALS: Final = Setting(COUNT, "how many other people must have approved a commit before it is pushed there")


def approvals_wanted(config: Config, branch: str) -> int:
    """How many approvals the policy of a branch asks for; 0 without a policy."""
    return int(config.settings.get(f"policy.{branch}.approvals", 0))


def read_setting(key: str, text: str) -> Any:
    """The value of a key that a text stands for.

    Raises:
        SettingsError: no such key, or the value cannot be used.
    """
    return chosen({key: known_setting(key)}, key, text)


def read_overrides(given: Mapping[str, Any] | Sequence[str], method: str) -> dict[str, Any]:
    """Settings of one edit, from a mapping or from ``KEY=VALUE`` texts; a key is one of the config's, with or without the editor in front.

    Raises:
        SettingsError: not of that form, another editor's key or no key at all, or a value that cannot be used.
    """
    found: dict[str, Any] = {}
    for text in [f"{key}={as_text(value)}" for key, value in given.items()] if isinstance(given, Mapping) else given:
        key, equals, value = text.partition("=")
        name = key.strip().removeprefix(f"{method}.")
        if not equals:
            raise SettingsError(f"{text!r} is not KEY=VALUE", remedy="For example --set layers=3-5 or --set ridge=200.")
        found[name] = read_setting(name if name == "preset" else f"{method}.{name}", value.strip())
    return found


def refuse_beyond(repository: Store, key: str, value: Any) -> None:
    """Refuse layers that the base does not have.

    Raises:
        SettingsError: the value of a key that names layers goes beyond them.
    """
    depth = len(repository.config.base.get("weights", {}))
    if key.rpartition(".")[2] == "layers" and depth and value and value[-1] >= depth:
        raise SettingsError(
            f"{key} cannot name layer {value[-1]}: the base has {depth} layers",
            remedy=f"Name layers from 0 to {depth - 1}.",
        )


def as_text(value: Any) -> str:
    """A setting's value as it is written: ``3,4,5`` for a list, ``true``."""
    if isinstance(value, tuple | list | range):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def layers_of(given: str | Sequence[int]) -> tuple[int, ...]:
    """Layers as they are, or from text such as ``3,4,5`` or ``3-5``; none from an empty text.

    Raises:
        SettingsError: they cannot be used.
    """
    try:
        return tuple(read_layers(as_text(given)) if given else ())
    except ValueError as error:
        raise SettingsError(f"layers cannot be {given!r}", remedy=f"{str(error).capitalize()}.") from None


def chosen_method(repository: Store, given: str | None) -> str:
    """The editor that is asked for, else the config's; `SettingsError` if there is none of that name."""
    chosen = str(given or repository.config.settings.get("method", EDITORS[0]))
    if chosen not in EDITORS:
        raise SettingsError(f"there is no editor {chosen!r}", remedy=f"The editors are {', '.join(EDITORS)}.")
    return chosen


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
    """A setting of `SETTINGS`, or ``policy.BRANCH.approvals``; `SettingsError` if there is none of that name."""
    of_branch = _OF_A_BRANCH.fullmatch(key)
    if of_branch:
        check_ref(BRANCHES + of_branch[1])
        return APPROVALS
    if key in _OF_GIT:
        raise SettingsError(f"there is no setting {key!r}", remedy=_OF_GIT[key])
    if key not in SETTINGS:
        close = difflib.get_close_matches(key, SETTINGS, n=1, cutoff=0.75)
        group = f"{key.partition('.')[0]}."
        alike = [name for name in SETTINGS if name.startswith(group)] or difflib.get_close_matches(key, SETTINGS, n=5)
        hint = f"Did you mean {close[0]}?" if close else "`patchhub config` lists all."
        if alike and not close:
            hint = f"{'There are' if key.startswith(group) else 'Nearest are'} {', '.join(alike)}; {hint}"
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
