"""Results: documents follow from types and metadata, words are short, tables are escaped."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from patchhub.objects import Request
from patchhub.results import Result, Rows, encode, in_full, told

FACT = Request.make("The mother tongue of {} is", "Ada", "French", target_true="English")
ID = "0123456789abcdef" * 4


class Pair(NamedTuple):
    left: int
    right: str | None


@dataclass(frozen=True)
class Inner(Result):
    number: int
    weight: float | None = field(default=None, metadata=told(optional=True))


@dataclass(frozen=True)
class Outer(Result):
    TOLD: ClassVar = {"twice": "double"}

    commit: str
    out: Path
    written: tuple[Request, ...]
    texts: tuple[Request, ...] = field(metadata=told(by=in_full))
    inner: Inner = field(metadata=told(inline=True))
    sizes: Mapping[str, tuple[int, ...]]
    pair: Pair
    hidden: object = field(metadata=told(omit=True))
    size: int = field(metadata=told(name="bytes"))
    seen: tuple[str, ...] = field(default=(), metadata=told(optional=True))
    later: int | None = field(default=None, metadata=told(missing=True))

    @property
    def double(self) -> int:
        return 2 * self.size


DONE = Outer(ID, Path("a/b"), (FACT,), (FACT,), Inner(3), {"w": (1, 2)}, Pair(1, None), object(), 5)


def test_a_document_follows_from_types_and_metadata() -> None:
    texts = {"prompt": FACT.prompt, "subject": "Ada", "target_new": "French", "target_true": "English"}
    assert DONE.to_json() == {
        "commit": ID,
        "out": "a/b",
        "written": [FACT.id],
        "texts": [{"id": FACT.id, **texts}],
        "number": 3,
        "sizes": {"w": [1, 2]},
        "pair": {"left": 1, "right": None},
        "bytes": 5,
        "twice": 10,
    }


def test_what_is_optional_or_missing_is_told_where_it_is_there() -> None:
    assert Inner(1, 0.5).to_json() == {"number": 1, "weight": 0.5}
    assert Inner(1, math.nan).to_json() == {"number": 1}


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text() | st.integers(),
        lambda x: st.lists(x) | st.dictionaries(st.text(), x),
    )
)
def test_what_json_knows_stays_as_it_is_but_for_numbers_that_are_not_finite(value: object) -> None:
    encoded = encode(value)
    json.dumps(encoded, allow_nan=False)
    if isinstance(value, float) and not math.isfinite(value):
        assert encoded is None
    elif not isinstance(value, list | dict):
        assert encoded == value


def test_a_type_that_no_result_holds_is_refused() -> None:
    with pytest.raises(TypeError, match="cannot hold a object"):
        encode({"a": object()})


def test_a_result_says_in_short_what_it_holds() -> None:
    text = repr(DONE)
    assert text.startswith("<Outer commit 0123456789ab, ")
    assert "1 written" in text
    assert ID not in text
    assert len(text) < 200


def test_tables_of_notebooks_are_escaped() -> None:
    bad = Request.make("{} is", "<script>alert(1)</script>", "x&y")
    for shown in (Outer(ID, Path("<b>"), (bad,), (), Inner(1), {}, Pair(1, "<i>"), "<u>", 1), Rows([Inner(1)])):
        table = shown._repr_html_()
        assert table.startswith("<table>")
        assert "<script>" not in table
        assert "<b>" not in table
        assert "<u>" not in table


def test_rows_are_read_as_they_are_asked_for_and_once() -> None:
    read = []

    def source() -> Iterator[Inner]:
        for number in range(50):
            read.append(number)
            yield Inner(number)

    rows = Rows(source())
    first = iter(rows)
    assert [next(first).number for _ in range(3)] == [0, 1, 2]
    assert read == [0, 1, 2]
    assert (len(rows), rows[-1].number, [row.number for row in rows[:2]]) == (50, 49, [0, 1])
    assert read == list(range(50))
    assert repr(rows).endswith("... 50 in all")
    assert repr(Rows([])) == "<nothing>"
    assert rows.to_json()[:1] == [{"number": 0}]


def test_text_that_a_spreadsheet_would_run_stays_text() -> None:
    from patchhub.results import spreadsheet_cell

    for formula in ("=HYPERLINK(1)", "+1", "-1", "@SUM(1)", "\t=1"):
        assert spreadsheet_cell(formula) == f"'{formula}"
    for value in ("Ada", "", 1.5, -2.5, None, "a=b"):
        assert spreadsheet_cell(value) == value
