"""The picture is well-formed, self-contained SVG that says what it was given, inside its frame, whatever the texts are."""

from __future__ import annotations

import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from patchhub.porcelain.report.charts import Box, Point, Series, lines, picture, rows, square

SVG = "{http://www.w3.org/2000/svg}"
BOX = Box(60, 60, 400, 200)
shares = st.floats(-2, 2)
texts = st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=12) | st.sampled_from(
    ["</svg><script>alert(1)</script>", '" onload="x', "a & b"]
)


def parse(*parts: str) -> ElementTree.Element:
    return ElementTree.fromstring(picture(600, 400, "a title", parts))


@given(
    steps=st.lists(texts, min_size=1, max_size=40),
    names=st.lists(texts, min_size=1, max_size=7),
    data=st.data(),
)
def test_any_history_is_drawn_inside_its_frame(steps: list[str], names: list[str], data: st.DataObject) -> None:
    column = st.lists(st.none() | shares, min_size=len(steps), max_size=len(steps))
    bands = st.just([]) | st.lists(st.none() | st.tuples(shares, shares), min_size=len(steps), max_size=len(steps))
    series = [Series(name, data.draw(column), data.draw(bands)) for name in names]
    root = parse(lines(BOX, "scores", "commit", steps, series))
    for line in root.iter(f"{SVG}polyline"):
        places = [tuple(map(float, pair.split(","))) for pair in line.attrib["points"].split()]
        assert places == sorted(places, key=lambda place: place[0])
        assert all(60 <= x <= 460 and 60 <= y <= 260 for x, y in places)


@given(st.lists(st.builds(Point, texts, shares, shares, st.booleans()), max_size=6), texts, texts)
def test_texts_are_never_markup(points: list[Point], across: str, up: str) -> None:
    root = parse(square(BOX, "title", across, up, points))
    assert {child.tag.removeprefix(SVG) for child in root.iter()} <= {
        *("svg", "title", "style", "rect", "text", "line", "polyline", "circle"),
    }
    said = [text.text or "" for text in root.iter(f"{SVG}text")]
    assert {across, up} <= set(said)


def test_labels_at_the_right_do_not_cover_each_other() -> None:
    series = [Series(f"s{number}", [0.5, 0.9]) for number in range(6)]
    root = parse(lines(BOX, "title", "commit", ["a", "b"], series))
    labels = [float(text.attrib["y"]) for text in root.iter(f"{SVG}text") if (text.text or "").endswith("0.900")]
    assert len(labels) == 6
    assert all(below - above >= 14 for above, below in pairwise(labels))


def test_no_more_labels_than_there_is_room_for() -> None:
    steps = [f"{number:07x}" for number in range(500)]
    root = parse(lines(BOX, "title", "commit", steps, [Series("S", [0.5] * 500)]))
    shown = [text.text for text in root.iter(f"{SVG}text") if text.text in steps]
    assert steps[-1] in shown
    assert len(shown) <= 12


def test_a_row_has_a_mark_for_each_value_it_has() -> None:
    drawn = rows(BOX, "by relation", ["one", "two"], [Series("ES", [0.5, None]), Series("PS", [0.25, 1.0])])
    said = [title.text for title in parse(drawn).iter(f"{SVG}title")]
    assert {"one: ES 0.500", "one: PS 0.250", "two: PS 1.000"} <= set(said)
    assert not any(text and text.startswith("two: ES") for text in said)


@pytest.mark.parametrize("setting", ["light", "dark"])
def test_text_stands_out_from_the_page(setting: str) -> None:
    """WCAG contrast of at least 4.5 for text, series labels included, and 3 for marks; nothing is fetched."""
    style = picture(10, 10, "", [])
    light, _, dark = style.partition("@media")
    rules = dict(re.findall(r"\.?([\w.]+)\{[^}]*?fill:(#\w{6})", light))
    if setting == "dark":
        rules |= dict(re.findall(r"\.?([\w.]+)\{[^}]*?fill:(#\w{6})", dark.partition("{")[2]))
    page = luminance(rules.pop("page"))
    assert {"text", "dim", "f0", "f5"} <= set(rules)
    for name, colour in rules.items():
        other = luminance(colour)
        contrast = (max(page, other) + 0.05) / (min(page, other) + 0.05)
        assert contrast >= 4.5, (name, contrast)
    assert "http" not in style.replace("http://www.w3.org/2000/svg", "")
    assert "url(" not in style


def luminance(colour: str) -> float:
    channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
