"""What verbs give back: one way into JSON, one into words, one into a notebook's table. By type; exceptions stand at the fields.

A result is a frozen dataclass that inherits from `Result`. Its document has a key for each field; what a field's type does not say is said
by the field's metadata, see `told`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import Field, fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, Final, TypeVar, overload

from patchhub.objects import Request

Row_co = TypeVar("Row_co", covariant=True)

_ID: Final = re.compile(r"[0-9a-f]{64}")
_SHORT: Final = 12  # digits of an id, as everywhere
_WIDEST: Final = 60
_LISTED: Final = 20
_FORMULA: Final = frozenset("=+-@\t\r\n")


def told(
    *,
    name: str | None = None,
    omit: bool = False,
    inline: bool = False,
    optional: bool = False,
    missing: bool = False,
    by: Callable[[Any], Any] | None = None,
) -> dict[str, Any]:
    """Metadata of a field that its document tells otherwise than its type says.

    Args:
        name: its key there, if not the field's name.
        omit: it is left out.
        inline: it is a document itself, whose keys join those of the whole.
        optional: it is left out where it is None or empty.
        missing: it is left out where it is None.
        by: what is told in place of the value.
    """
    return {"name": name, "omit": omit, "inline": inline, "optional": optional, "missing": missing, "by": by}


def in_full(found: Any) -> Any:
    """Requests with their texts, for `told`; the type alone tells their ids."""
    if isinstance(found, Request):
        texts = {name: getattr(found, name) for name in ("prompt", "subject", "target_new", "target_true")}
        return {"id": found.id, **texts, **({"metadata": found.metadata} if found.metadata else {})}
    return None if found is None else [in_full(request) for request in found]


def encode(value: Any) -> Any:  # noqa: PLR0911  # one way out for each type
    """A value as `json.dumps` takes it.

    A path is its text, a request its id, a named tuple or dataclass a document, a number that is not finite null.

    Raises:
        TypeError: a type that no result holds.
    """
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Request):
        return value.id
    if isinstance(value, Mapping):
        return {str(key): encode(found) for key, found in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return encode(value._asdict())
    if isinstance(value, tuple | list | Rows):
        return [encode(found) for found in value]
    if is_dataclass(value) and not isinstance(value, type):
        return _document(value)
    raise TypeError(f"a result cannot hold a {type(value).__name__}")


def _document(value: Any) -> dict[str, Any]:
    document: dict[str, Any] = {}
    for entry in fields(value):
        how, found = entry.metadata, getattr(value, entry.name)
        if how.get("omit"):
            continue
        found = encode(how["by"](found) if how.get("by") else found)
        if (how.get("missing") and found is None) or (how.get("optional") and found in (None, [], {})):
            continue
        if how.get("inline"):
            document |= found
        else:
            document[how.get("name") or entry.name] = found
    derived: Mapping[str, str] = getattr(type(value), "TOLD", {})
    return document | {key: encode(getattr(value, attribute)) for key, attribute in derived.items()}


class Result:
    """What a verb gives back. Subclasses are frozen dataclasses.

    Attributes:
        TOLD: what a document also tells: by key, the name of a property.
    """

    TOLD: ClassVar[Mapping[str, str]] = {}

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.__repr__ = Result.__repr__  # type: ignore[method-assign]  # else the dataclass would write its own

    def to_json(self) -> dict[str, Any]:
        """The document that `--json` prints."""
        return _document(self)

    def words(self) -> str:
        """What it says in one line: its fields that are short and not empty."""
        parts = [(entry, getattr(self, entry.name)) for entry in fields(self)]  # type: ignore[arg-type]  # subclasses are dataclasses
        return ", ".join(_part(entry, value) for entry, value in parts if value and not _is_long(value))

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.words()}>"

    def _repr_html_(self) -> str:
        """A table of the fields, for notebooks."""
        rows = [(entry.name, getattr(self, entry.name)) for entry in fields(self)]  # type: ignore[arg-type]  # subclasses are dataclasses
        return _table(
            (), [(name, _cell(value)) for name, value in rows if not is_dataclass(value) or not _is_long(value)]
        )


def spreadsheet_cell(value: Any) -> Any:
    """A value for a CSV file: text that a spreadsheet would run as a formula gets an apostrophe before it, which keeps it text."""
    return f"'{value}" if isinstance(value, str) and value[:1] in _FORMULA else value


class Rows(Sequence[Row_co]):
    """What a verb lists. Rows are read as they are asked for, and kept."""

    def __init__(self, rows: Iterable[Row_co]) -> None:
        self._known: list[Row_co] = []
        self._rest = iter(rows)

    def __iter__(self) -> Iterator[Row_co]:
        place = 0
        while place < len(self._known) or self._read_one():
            yield self._known[place]
            place += 1

    def __len__(self) -> int:
        while self._read_one():
            pass
        return len(self._known)

    @overload
    def __getitem__(self, place: int) -> Row_co: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Row_co]: ...
    def __getitem__(self, place: int | slice) -> Row_co | Sequence[Row_co]:
        len(self)
        return self._known[place]

    def to_json(self) -> list[Any]:
        """The document that `--json` prints."""
        return [encode(row) for row in self]

    def _read_one(self) -> bool:
        for row in self._rest:
            self._known.append(row)
            return True
        return False

    def __repr__(self) -> str:
        listed = [repr(row) for row in self[:_LISTED]]
        return "\n".join([*listed, *([f"... {len(self)} in all"] if len(self) > _LISTED else [])]) or "<nothing>"

    def _repr_html_(self) -> str:
        """A table with a line per row, for notebooks."""
        documents = [row for row in self.to_json() if isinstance(row, dict)]
        titles = list({key: None for row in documents for key in row})
        return _table(titles, [[_cell(row.get(title)) for title in titles] for row in documents])


def _is_long(value: Any) -> bool:
    """Whether a value has no short form: a mapping, or a dataclass that is neither a result nor a fact."""
    return isinstance(value, Mapping) or (is_dataclass(value) and not isinstance(value, Result | Request))


def _part(entry: Field[Any], value: Any) -> str:
    """A field in words: `2 written`, `held 2`, `0123456789ab`."""
    name = entry.name.replace("_", " ")
    if isinstance(value, tuple | list) and len({type(item) for item in value}) == 1:
        return f"{len(value)} {name}"
    if value is True:
        return name
    return f"{name} {_cell(value)}"


def _cell(value: Any) -> str:  # noqa: PLR0911  # one way out for each type
    """A value in short: ids cut, numbers rounded, facts as they read, longer things by their size."""
    if isinstance(value, str):
        text = value[:_SHORT] if _ID.fullmatch(value) else " ".join(value.split())
        return text if len(text) <= _WIDEST else text[: _WIDEST - 3] + "..."
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Request):
        return f"{value.text} {value.target_new}"
    if isinstance(value, Result):
        return value.words()
    if isinstance(value, Mapping):
        return ", ".join(f"{_cell(str(key))}: {_cell(found)}" for key, found in value.items())[:_WIDEST]
    if isinstance(value, tuple | list):
        return ", ".join(map(_cell, value[:3])) + (f", ... {len(value)} in all" if len(value) > 3 else "")
    return "" if value is None else str(value)


def _table(titles: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    import html  # only a notebook needs it

    head = "".join(f"<th>{html.escape(title)}</th>" for title in titles)
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table>{f'<tr>{head}</tr>' if head else ''}{body}</table>"
