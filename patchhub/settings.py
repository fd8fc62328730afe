"""How a setting is written, checked and explained: once, beside the dataclass field that holds it.

    steps: int = setting(COUNT, "most steps of the value optimisation")

`check` holds the values of such a dataclass to their kinds, `settings_of` lists them for the command line and the config. No torch, no
NumPy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Final

from patchhub.errors import SettingsError

_KEY: Final = "setting"
_LAYERS: Final = "ascending layers such as 3,4,5 or 3-5"


class UnfitError(ValueError):
    """A text that stands for no value, with words of its own."""


@dataclass(frozen=True)
class Kind:
    """What values a setting may have.

    Attributes:
        words: completes "it must be ...".
        read: from text; ValueError where the text is none.
        fits: whether a value may be used.
    """

    words: str
    read: Callable[[str], Any]
    fits: Callable[[Any], bool]


@dataclass(frozen=True)
class Setting:
    """One key: its kind, and what it is for."""

    kind: Kind
    purpose: str

    def read(self, text: str) -> Any:
        """The value that a text stands for.

        Raises:
            ValueError: it stands for none, or for one that cannot be used.
        """
        try:
            value = self.kind.read(text)
        except UnfitError:
            raise
        except ValueError:
            raise ValueError(f"it must be {self.kind.words}") from None
        if not self.kind.fits(value):
            raise ValueError(f"it must be {self.kind.words}")
        return value


def _number(words: str, fits: Callable[[float], bool]) -> Kind:
    def usable(value: Any) -> bool:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and fits(value)

    return Kind(words, float, usable)


def _whole(words: str, least: int) -> Kind:
    return Kind(words, int, lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= least)


def read_layers(text: str) -> list[int]:
    """``3,4,5`` or ``3-5``.

    Raises:
        ValueError: anything else.
    """
    layers: list[int] = []
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        if not first.isdecimal() or not (last.isdecimal() or not last):
            raise ValueError(_LAYERS)
        layers += range(int(first), int(last or first) + 1)
    if not _ascending(layers):
        raise ValueError(_LAYERS)
    return layers


def _ascending(layers: Sequence[int]) -> bool:
    return bool(layers) and list(layers) == sorted(set(layers)) and layers[0] >= 0


POSITIVE: Final = _number("a number above 0", lambda value: value > 0)
NOT_NEGATIVE: Final = _number("a number of at least 0", lambda value: value >= 0)
SHARE: Final = _number("a number above 0, at most 1", lambda value: 0 < value <= 1)
AT_MOST_ONE: Final = _number("a number from 0 to 1", lambda value: 0 <= value <= 1)
COUNT: Final = _whole("a whole number above 0", 1)
INDEX: Final = _whole("a whole number of at least 0", 0)
LAYERS: Final = Kind(_LAYERS, read_layers, _ascending)
TEXT: Final = Kind("text", str, lambda value: isinstance(value, str))
WHOLE: Final = Kind("a whole number", int, lambda value: isinstance(value, int) and not isinstance(value, bool))


def _truth(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError(text)
    return text.lower() == "true"


TRUTH: Final = Kind("true or false", _truth, lambda value: isinstance(value, bool))


def one_of(*names: str) -> Kind:
    """One of some words."""
    return Kind(f"one of {', '.join(names)}", str, lambda value: value in names)


def setting(kind: Kind, purpose: str, *, default: Any = MISSING) -> Any:
    """A dataclass field that is a setting; without a default it must be given."""
    return field(default=default, metadata={_KEY: Setting(kind, purpose)})


def settings_of(owner: Any, prefix: str) -> dict[str, Setting]:
    """The settings of a dataclass by key, ``prefix.field``, in order of name."""
    found = {f"{prefix}.{entry.name}": entry.metadata[_KEY] for entry in fields(owner) if _KEY in entry.metadata}
    return dict(sorted(found.items()))


def check(value: Any) -> None:
    """Hold the fields of a dataclass instance to their kinds.

    Raises:
        SettingsError: a value cannot be used.
    """
    for entry in fields(value):
        known: Setting | None = entry.metadata.get(_KEY)
        given = getattr(value, entry.name)
        if known is not None and not known.kind.fits(given):
            shown = list(given) if isinstance(given, tuple) else given
            raise SettingsError(
                f"{entry.name} must be {known.kind.words}, not {shown!r}",
                remedy=f"Set {entry.name} to {known.kind.words}: {known.purpose}.",
            )


def chosen(texts: Mapping[str, Setting], key: str, text: str) -> Any:
    """The value of a key that a text stands for.

    Raises:
        SettingsError: the value cannot be used.
    """
    try:
        return texts[key].read(text)
    except ValueError as error:
        raise SettingsError(f"{key} cannot be {text!r}: {error}", remedy=f"`{key}`: {texts[key].purpose}.") from None
