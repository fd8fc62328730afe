"""Arguments are checked against annotations: what fits goes through, all else is a `SettingsError` with words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest

from patchhub.errors import SettingsError
from patchhub.repository.arguments import check, fits, words

Place = str | PathLike[str]
Count = Annotated[int, 1]


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (str, ["", "a"], [1, None, b"a", Path("a")]),
        (bool, [True, False], [1, 0, "true", None]),
        (int, [1, np.int64(2)], [True, 1.0, "1"]),
        (float, [1, 1.5, np.float32(2)], [True, "1"]),
        (Count, [1, 7], [0, -1, True, 1.5]),
        (Count | None, [None, 1], [0, "1"]),
        (Place | None, ["a", Path("a"), None], [1, b"a"]),
        (Literal["refuse", "replace"], ["refuse"], ["keep", None, 1, ["refuse"]]),
        (Sequence[str], [(), ["a"], ("a", "b")], ["a", [1], 1, {"a"}]),
        (str | Sequence[int], ["3-5", [3, 4]], [3, [3.5]]),
        (Mapping[str, Any] | Sequence[str], [{}, {"a": 1}, ["a=1"]], [1, "a=1"]),
        (Any, [None, 1, object()], []),
    ],
)
def test_what_fits(kind: Any, good: list[Any], bad: list[Any]) -> None:
    assert all(fits(value, kind) for value in good)
    assert not any(fits(value, kind) for value in bad)
    for value in bad:
        with pytest.raises(SettingsError) as error:
            check("given", value, kind)
        assert error.value.message.startswith("given cannot be ")
        assert error.value.remedy == f"It is {words(kind)}."


def test_words() -> None:
    assert words(Count | None) == "a whole number of at least 1 or None"
    assert words(Literal["refuse", "replace"]) == "one of refuse, replace"
    assert words(Place) == "text or a path"
    assert words(Sequence[Place]) == "a list, each item text or a path"


def test_text_that_is_not_utf_8_is_refused_wherever_it_stands() -> None:
    for value in ("caf\udce9", ["a", "caf\udce9"]):
        with pytest.raises(SettingsError, match="is not UTF-8 text"):
            check("message", value, Any)
