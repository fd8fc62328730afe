"""Canonical JSON: the one byte form of a value, and how dataclasses are written to it and strictly read from it.

A dataclass states for each field how it is kept: ``base: Annotated[str, IDENTIFIER]``, with the field's name in JSON
as a third argument where it differs. Writing normalises text to NFC. Reading refuses every byte string that writing
would not have produced, so ``from_json(data).to_json() == data`` always holds."""

from __future__ import annotations

import functools
import hashlib
import json
import re
import unicodedata
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any, ClassVar, Final, TypeVar, get_args, get_type_hints

from patchhub.errors import CorruptStoreError

FORMAT: Final = 1

Object = TypeVar("Object", bound="StoredObject")

UNSEEN: Final = "\x00-\x1f\x7f-\x9f\u200b\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff"
"""For a character class: what is acted upon where text is shown, turns its direction, or is not seen; not the joiners of Persian."""

_UNSEEN = re.compile(f"[{UNSEEN}]")
_ID = re.compile(r"[0-9a-f]{64}")
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")


def canonical_json(value: Any) -> bytes:
    """The one byte form of a JSON value: keys sorted by code point, no white space, UTF-8, no NaN or infinity."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8")


def object_id(data: bytes) -> str:
    """The SHA-256 of an object's bytes, 64 lower-case hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def has_unseen(text: str) -> bool:
    """Whether text holds any of `UNSEEN`."""
    return _UNSEEN.search(text) is not None


def one_line(text: str) -> str:
    """Text with a space in place of each of `UNSEEN`, line ends among them: for places that show what others wrote."""
    return _UNSEEN.sub(" ", text)


# --- fields: how one value is read from JSON and written to it ------------------------------------------------------


class MalformedError(Exception):
    """A value does not fit its field; `path` names the field."""

    def __init__(self, path: str, expected: str) -> None:
        super().__init__(f"field {path!r} {expected}" if path else expected)
        self.path = path


def _same(value: Any) -> Any:
    return value


@dataclass(frozen=True)
class Codec:
    """`decode(value, path)` checks and converts a JSON value; `encode` is its inverse.

    `empty` is None for a field that is always there; otherwise the field is left out where its value is `empty`.
    """

    decode: Callable[[Any, str], Any]
    encode: Callable[[Any], Any] = _same
    empty: Any = None


def _expect(valid: bool, path: str, expected: str) -> None:
    if not valid:
        raise MalformedError(path, expected)


def nfc(text: str) -> str:
    """`text` in Unicode normalisation form C, the form of all stored text."""
    return unicodedata.normalize("NFC", text)


def _decode_text(value: Any, path: str) -> str:
    _expect(isinstance(value, str), path, "is not text")
    return str(value)


def _decode_id(value: Any, path: str) -> str:
    _expect(isinstance(value, str) and _ID.fullmatch(value) is not None, path, "is not an id of 64 hexadecimal digits")
    return str(value)


def _decode_time(value: Any, path: str) -> str:
    _expect(isinstance(value, str) and _TIME.fullmatch(value) is not None, path, "is not a UTC time to the second")
    try:
        datetime.fromisoformat(value[:-1])
    except ValueError:
        raise MalformedError(path, "is not a date of the calendar") from None
    return str(value)


def _decode_count(value: Any, path: str) -> int:
    _expect(type(value) is int and value >= 0, path, "is not a whole number of at least 0")
    return int(value)


def _decode_number(value: Any, path: str) -> float:
    _expect(type(value) in (int, float), path, "is not a number")
    return value  # type: ignore[no-any-return]  # an int stays an int: its canonical form differs from the float's


def _decode_mapping(value: Any, path: str) -> dict[str, Any]:
    _expect(isinstance(value, dict), path, "is not an object")
    return dict(value)


def _decode_flag(value: Any, path: str) -> bool:
    _expect(type(value) is bool, path, "is not true or false")
    return bool(value)


DEEPEST: Final = 64
"""Levels of objects and lists within a field of any content: who shows it goes down one call for each."""


def _decode_any(value: Any, path: str) -> dict[str, Any]:
    level: list[Any] = [_decode_mapping(value, path)]
    for _ in range(DEEPEST):
        inner = (item.values() if isinstance(item, dict) else item for item in level)
        level = [found for items in inner for found in items if isinstance(found, dict | list)]
        if not level:
            return dict(value)
    raise MalformedError(path, f"has more than {DEEPEST} levels")


TEXT = Codec(_decode_text, nfc)
IDENTIFIER = Codec(_decode_id)
INSTANT = Codec(_decode_time)
COUNT = Codec(_decode_count)
NUMBER = Codec(_decode_number)
MAPPING = Codec(_decode_any)
FLAG = Codec(_decode_flag, empty=False)


def optional(codec: Codec) -> Codec:
    return Codec(
        lambda value, path: None if value is None else codec.decode(value, path),
        lambda value: None if value is None else codec.encode(value),
    )


def list_of(codec: Codec) -> Codec:
    def decode(value: Any, path: str) -> tuple[Any, ...]:
        _expect(isinstance(value, list), path, "is not a list")
        return tuple(codec.decode(item, f"{path}[{position}]") for position, item in enumerate(value))

    return Codec(decode, lambda values: [codec.encode(value) for value in values])


def map_of(codec: Codec) -> Codec:
    def decode(value: Any, path: str) -> dict[str, Any]:
        return {key: codec.decode(item, f"{path}.{key}") for key, item in _decode_mapping(value, path).items()}

    return Codec(decode, lambda values: {key: codec.encode(value) for key, value in values.items()})


def _as_tuple(*items: Any) -> tuple[Any, ...]:
    return items


def tuple_of(*codecs: Codec, make: Callable[..., Any] = _as_tuple) -> Codec:
    """A JSON list of fixed length, read as `make(*items)`."""

    def decode(value: Any, path: str) -> Any:
        _expect(isinstance(value, list) and len(value) == len(codecs), path, f"is not a list of {len(codecs)}")
        numbered = enumerate(zip(codecs, value, strict=True))
        return make(*(codec.decode(item, f"{path}[{position}]") for position, (codec, item) in numbered))

    return Codec(decode, lambda values: [codec.encode(value) for codec, value in zip(codecs, values, strict=True)])


def choice(*allowed: str) -> Codec:
    def decode(value: Any, path: str) -> str:
        _expect(isinstance(value, str) and value in allowed, path, f"is none of {', '.join(allowed)}")
        return str(value)

    return Codec(decode)


@functools.cache
def _schema(cls: Any) -> dict[str, tuple[str, Codec]]:
    """For each JSON name of a dataclass: its attribute and its codec."""
    hints = get_type_hints(cls, include_extras=True)
    schema: dict[str, tuple[str, Codec]] = {}
    for item in fields(cls):
        _, codec, *renamed = get_args(hints[item.name])
        schema[renamed[0] if renamed else item.name] = (item.name, codec)
    return schema


def _decode_fields(cls: Any, value: Any, fixed: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Constructor arguments of `cls` from a JSON object that has its fields, those of `fixed`, and no others."""
    _expect(isinstance(value, dict), path, "is not a JSON object" if path else "it is not a JSON object")
    schema = _schema(cls)
    prefix = f"{path}." if path else ""
    for name, constant in fixed.items():
        _expect(name in value, prefix + name, "is missing")
        _expect(type(value[name]) is type(constant) and value[name] == constant, prefix + name, f"is not {constant!r}")
    for name in value:
        _expect(name in schema or name in fixed, prefix + name, "is unknown")
    for name, (_, codec) in schema.items():
        _expect(name in value or codec.empty is not None, prefix + name, "is missing")
    return {
        attribute: codec.decode(value[name], prefix + name) if name in value else copy(codec.empty)
        for name, (attribute, codec) in schema.items()
    }


def _encode_fields(record: Any) -> dict[str, Any]:
    """The inverse of `_decode_fields`, without the fixed fields."""
    cls: Any = type(record)
    found = {name: (getattr(record, attribute), codec) for name, (attribute, codec) in _schema(cls).items()}
    return {
        name: codec.encode(value)
        for name, (value, codec) in found.items()
        if codec.empty is None or value != codec.empty
    }


def record_of(cls: type[Any]) -> Codec:
    """A dataclass of stored fields as a JSON object inside another object."""
    return Codec(lambda value, path: cls(**_decode_fields(cls, value, {}, path)), _encode_fields)


def read(kind: str, data: bytes, decode: Callable[[Any], Any], encode: Callable[[Any], bytes]) -> Any:
    """Decode JSON bytes; anything but the canonical form of a valid object raises `CorruptStoreError`."""
    try:
        result = decode(json.loads(data.decode("utf-8"), parse_int=_integer))
        canonical = encode(result) == data
    except MalformedError as error:
        raise _malformed(kind, data, str(error), error.path) from None
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, NaN, lone surrogates, contradictory groups
        raise _malformed(kind, data, f"it is not JSON of format {FORMAT} ({error})") from None
    if not canonical:
        raise _malformed(kind, data, "it is not in canonical form")
    return result


def _integer(digits: str) -> int:
    """A whole number of 64 bits, the most that the index and other readers of JSON hold exactly as a number."""
    value = int(digits)
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{digits[:20]}... is beyond 64 bits")
    return value


def _malformed(kind: str, data: bytes, reason: str, path: str | None = None) -> CorruptStoreError:
    name = object_id(data)
    return CorruptStoreError(
        f"object {name[:12]} cannot be read as a {kind}: {reason}",
        remedy="Run `patchhub fsck`; if the object came from a newer version, upgrade patchhub.",
        object=name,
        kind=kind,
        field=path,
    )


class StoredObject:
    """Abstract: a JSON object with a ``type`` and this format's number; subclasses are frozen dataclasses."""

    TYPE: ClassVar[str]
    __slots__ = ()

    def to_json(self) -> bytes:
        """Canonical bytes."""
        return canonical_json({**_encode_fields(self), "format": FORMAT, "type": self.TYPE})

    @classmethod
    def from_json(cls: type[Object], data: bytes) -> Object:
        """Read canonical bytes back; `CorruptStoreError` names the field that is wrong."""

        def decode(value: Any) -> Object:
            arguments = _decode_fields(cls, value, {"format": FORMAT, "type": cls.TYPE})
            return cls(**arguments)

        result: Object = read(cls.TYPE, data, decode, lambda made: made.to_json())
        return result

    @functools.cached_property
    def id(self) -> str:
        """SHA-256 of the canonical bytes."""
        return object_id(self.to_json())
